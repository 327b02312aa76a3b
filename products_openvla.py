"""Products with the weights of linear layers, in float32 on a CPU by oneDNN where it is faster than torch's own choice.

torch hands such products to a BLAS that does not use all of every CPU: MKL multiplies at the rate of AVX2 on those of
AMD that have AVX-512, half of what they can (docs/LOG.md). Half precision is oneDNN's anyway. Sums are added in another
order than by `torch.nn.functional.linear`, and as exactly. On
CPUs of Intel, where MKL uses all it finds, torch's choice stays.
"""

import platform
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional


MANY_ROWS = 5  # from here on oneDNN is faster, also with small weights
LARGE = 1 << 21  # numbers of weights that come from the memory and from no cache: faster for any number of rows

Product = Callable[..., torch.Tensor]  # as `torch.nn.functional.linear`


class Linear(nn.Linear):
    """torch's, with the fastest product for what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product_for(input)(input, self.weight, self.bias)


LINEAR = (nn.Linear, Linear)  # the classes of layers that are this product and no more


def take_fast_products(model: nn.Module) -> None:
    """Make `Linear` of all linear layers of a model: once it is loaded, as what quantizes while loading looks for
    torch's class by itself."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def product_for(like: torch.Tensor) -> Product:
    """How activations as these are multiplied fastest: `onednn_linear`, or `torch.nn.functional.linear` where it is as
    fast, or alone knows what is to be known: gradients, autocast, compiling and exporting, tensors of other classes."""
    fast = (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and like.dtype == torch.float32
        and like.device.type == "cpu"
        and type(like) is torch.Tensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._get_mkldnn_enabled()
        and has_fast_products()
    )
    return onednn_linear if fast else functional.linear


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
    """`torch.nn.functional.linear` of float32 on a CPU, without gradients."""
    few = hidden.numel() < MANY_ROWS * hidden.shape[-1] and weight.numel() < LARGE
    of_torch = weight.dtype != torch.float32 or hidden.shape[-1] != weight.shape[-1]  # torch has the words for it
    if few or of_torch or (bias is not None and bias.shape != weight.shape[:1]):
        return functional.linear(hidden, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


__all__ = ["LINEAR", "Linear", "Product", "has_fast_products", "onednn_linear", "product_for", "take_fast_products"]
