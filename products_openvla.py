"""Products with the weights of linear layers, in float32 on a CPU by oneDNN where it is faster than torch's own choice.

torch hands such products to MKL, which multiplies at the rate of AVX2 on CPUs of AMD that have AVX-512: half of what
they can (docs/LOG.md). Half precision is oneDNN's anyway. Sums are added in another order than by
`torch.nn.functional.linear`, whose rounding is up to two times smaller. On CPUs of Intel torch's choice stays.
"""

import math
import os
import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula


# Of one multiplication: for less of both MKL's shorter calls are faster. Measured with weights that no cache holds, as
# those of a model are by the time that they are read again; with others a few rows are faster by MKL (docs/LOG.md).
MANY_WEIGHTS, MANY_PRODUCTS = 150_000, 1 << 20
PAGE = 4096  # bytes

# oneDNN, and torch in front of it, keep code for each number of rows, up to 0.8 MB, and for 1024 of them: a gigabyte in
# a process that sees many lengths of prompts. Read at its first product; to make code again takes 0.3 ms.
MOST_SHAPES = 256
for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(variable, str(MOST_SHAPES))

Product = Callable[..., torch.Tensor]  # as `torch.nn.functional.linear`


def of_library(call: Callable) -> bool:
    """Whether a function is of torch or transformers, or what `kernels` makes of one: by where it was written as well,
    as `functools.wraps` copies the name of a module."""
    places = call.__module__, getattr(call, "__globals__", {}).get("__name__", call.__module__)
    return {place.partition(".")[0] for place in places} <= {"torch", "transformers", "kernels"}


TORCHS = nn.Linear.forward if of_library(nn.Linear.forward) else None  # it may have been replaced already


class Linear(nn.Linear):
    """torch's, with the fastest product for what it is given; what replaces the forward of torch's is called."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if nn.Linear.forward is not TORCHS:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        return product_for(input, weight, bias)(input, weight, bias)


LINEAR = (nn.Linear, Linear)  # the classes of layers that are this product and no more


def take_fast_products(model: nn.Module) -> None:
    """Make `Linear` of all linear layers of a model: once it is loaded, as what quantizes while loading looks for
    torch's class by itself."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def product_for(like: torch.Tensor, *parameters: Any) -> Product:
    """How activations as these are multiplied fastest: `onednn_linear`, or `torch.nn.functional.linear` where it is as
    fast, or alone knows what is to be known: gradients, autocast, compiling and exporting, tensors of other classes.

    Args:
        parameters: Weight and bias; without them ask `fits` before each product.
    """
    fast = (
        type(like) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and like.dtype is torch.float32
        and like.is_cpu
        and like.layout is torch.strided
        and like.ndim > 1
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._get_mkldnn_enabled()
        and getattr(forward_ad, "_current_level", -1) < 0
        and has_fast_products()
        and (not parameters or fits(*parameters))
    )
    return onednn_linear if fast else functional.linear


def fits(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether `onednn_linear` reads such weights as torch does."""
    if not (_is_plain(weight) and weight.ndim == 2):
        return False
    # Of a bias it reads the memory, whatever the strides are.
    return bias is None or (_is_plain(bias) and bias.ndim == 1 and len(bias) == len(weight) and bias.is_contiguous())


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.is_cpu
    )


def order_weight(module: Any, learns: bool = False) -> None:
    """Store the weight of a linear layer, or of a convolution that is one, in the order that its products read fastest
    once no cache holds it: by inputs where oneDNN multiplies (a third less time for few rows, a fifth for many), as
    loaded elsewhere, where steps of whole pages would share the same lines of the cache, and where it learns: torch's
    fused optimizers read it, its gradient and their moments as they lie in memory, whatever the strides are. The
    parameter stays what it is, with other strides; nothing is in memory twice."""
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.ndim < 2:  # a part of one that is sharded, or another library's
        return
    fast = not learns and has_fast_products() and _is_plain(weight)
    by_inputs = fast and len(weight) * weight.element_size() % PAGE != 0
    rows = weight.flatten(1)
    turned, alone = rows.t().is_contiguous(), weight.untyped_storage().nbytes() == weight.nbytes
    if turned == by_inputs or not alone or (weight.is_cpu and weight.is_shared()):  # with other processes
        return
    with torch.inference_mode(weight.is_inference()), torch.no_grad():  # others may learn later
        rows = rows.t().contiguous().t() if by_inputs else rows.contiguous()
        weight.data = rows.unflatten(1, weight.shape[1:])


@cache
def has_fast_products() -> bool:
    """Whether oneDNN was measured to be faster here: torch has MKL, and the CPU is one of AMD with AVX-512."""
    backends = torch.backends
    able = backends.cpu.get_cpu_capability() == "AVX512" and backends.mkldnn.is_available()
    return able and backends.mkl.is_available() and "AuthenticAMD" in processor()


def processor() -> str:
    """What the system says of the CPU, its maker among it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as told:  # Linux, where `platform` says no more
            return told.read(4096)  # than x86_64
    except OSError:
        return platform.processor()


def onednn_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of what `product_for` and `fits` allow."""
    outputs, inputs = weight.shape
    rows = hidden.numel() // max(inputs, 1)
    many = rows * weight.numel() >= MANY_PRODUCTS or (rows > 1 and weight.numel() >= MANY_WEIGHTS)
    if not (many and rows) or hidden.shape[-1] != inputs:
        return functional.linear(hidden, weight, bias)  # the last for torch's error
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


def _flops(hidden: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(hidden) * weight[0]


# torch counts none of it. Once: code of a Hub folder is a second module of this name.
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


__all__ = [
    "LINEAR",
    "Linear",
    "Product",
    "fits",
    "has_fast_products",
    "of_library",
    "onednn_linear",
    "order_weight",
    "product_for",
    "take_fast_products",
]
