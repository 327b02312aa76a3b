"""Linear layers whose weights have few bits: what those of 8 bits (`int8_linear_openvla`), floats of 8 bits
(`float8_linear_openvla`) and 4 bits (`int4_linear_openvla`) have in common.

Weights are stored in a form of our own, the same for every machine, and are packed for a kernel when they first run
there; the packed form takes their place, so that they are in memory once.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


FEW = 8  # rows that a kernel for few of them is faster for
SMALLEST = 1e-30  # step of a row of zeros
FLOAT8 = torch.float8_e4m3fn
AT_ONCE = 2**18  # weights that are rounded or unpacked at once: what stays in the cache, and is little memory


class QuantizedLinear(nn.Module):
    """x (..., in_features) -> x W^T + b (..., out_features), with W of few bits. It takes what `nn.Linear` takes, but
    is none: what would train or change the weights of one must not take it for one.

    Where gradients are asked for, weights are unpacked: those of the input are right, and weights do not learn.

    Args:
        dtype: Of weights that are not rounded yet, and of the bias. The library rounds them while it loads; None: they
            are stored rounded.
    """

    bits: int
    weight: torch.Tensor
    fixed: dict[str, torch.dtype]  # buffers that keep their type when the model is cast

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, kind) in self.stored(in_features, out_features).items():
            if name == "weight":
                empty = torch.empty(shape, dtype=kind) if dtype is None else torch.empty(out_features, in_features)
                self.weight = nn.Parameter(empty if dtype is None else empty.to(dtype), requires_grad=False)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=kind))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @staticmethod
    def stored(in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and type of what is stored of a weight."""
        raise NotImplementedError

    @staticmethod
    def fits(in_features: int) -> bool:
        """Whether a layer with rows of this length can have so few bits."""
        return True

    @staticmethod
    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """(out_features, in_features) -> what is stored of it; a `ValueError` for numbers that are not finite."""
        raise NotImplementedError

    def plain(self) -> torch.Tensor:
        """The weight as it is stored, whatever kernel it is packed for."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """(out_features, in_features) in a floating-point type."""
        raise NotImplementedError

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, in_features) -> (rows, out_features), without bias, where no gradients are asked for."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_rounded(self.weight):
            raise ValueError("The weights were not rounded: load the model with from_pretrained.")
        if is_rounded(x):  # the output would be cut to its type
            raise ValueError(f"The input of a layer of {self.bits} bits is {x.dtype}, expected floats.")
        if x.requires_grad and torch.is_grad_enabled():
            return linear(x, self.dequantize(x.dtype), self.bias)
        y = self.multiply(x.reshape(-1, self.in_features)) if x.numel() else x.new_zeros(0, self.out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def pack(self, packed: torch.Tensor, kernel: str) -> torch.Tensor:
        """Let the form for a kernel take the place of the weight."""
        with torch.inference_mode(False):
            parameter = nn.Parameter(packed, requires_grad=False)
        parameter.kernel = kernel  # type: ignore[attr-defined]
        self.weight = parameter
        return packed

    @property
    def kernel(self) -> str | None:
        """What the weight is packed for."""
        return kernel_of(self.weight)

    @property
    def may_pack(self) -> bool:
        """Weights that accelerate brings for each call come in the stored form each time."""
        return not getattr(self.__dict__.get("_hf_hook"), "offload", False)

    def unpack(self) -> None:
        """Back to the stored form: to be moved, copied or saved."""
        if self.kernel is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = nn.Parameter(self.plain().clone(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        self.unpack()
        weight, kept = self.weight, {name: self.get_buffer(name) for name in self.fixed}
        data = weight.data  # of that before, where torch gives the parameter another content
        super()._apply(fn, recurse)
        for name, dtype in self.fixed.items():  # a cast of the model rounds them and back, so they come from before
            moved = self.get_buffer(name)
            if moved.dtype != dtype:
                setattr(self, name, kept[name].to(moved.device))
        if is_rounded(data) and self.weight.dtype != data.dtype:  # floats of 8 bits are floats to torch
            self.weight = nn.Parameter(data.to(self.weight.device), requires_grad=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()  # what oneDNN packs cannot be copied
        return self.__dict__

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[f"{prefix}weight"] = self.plain()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.unpack()
        given = state_dict.get(f"{prefix}weight")
        if given is not None and is_rounded(self.weight) and given.dtype != self.weight.dtype:
            *_, errors = args  # to be cast would make zeros of nearly all of them, or other numbers
            errors.append(f"{prefix}weight is {given.dtype}, and this layer holds {self.bits} bits: round it first.")
            return
        missing = [name for name in ("weight", *self.fixed) if f"{prefix}{name}" not in state_dict]
        if 0 < len(missing) <= len(self.fixed):  # also where some may be missing (strict=False)
            *_, errors = args
            errors.append(f"{prefix}{missing[0]} is missing, without which the others mean other numbers.")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}"
        )


def kernel_of(weight: torch.Tensor) -> str | None:
    """What a weight is packed for. Who multiplies reads the weight of a layer once: another thread may pack it."""
    return getattr(weight, "kernel", None)


def is_rounded(weight: torch.Tensor) -> bool:
    """Whether numbers have few bits; floats of 8 bits are so."""
    return weight.dtype == FLOAT8 or not weight.is_floating_point()


def type_of_inputs(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The type in which a module of weights takes numbers: theirs, of those that are not rounded; `otherwise` where
    there are none. As numbers of 8 bits an input would be cut to whole ones, silently."""
    return next((weight.dtype for weight in module.parameters() if not is_rounded(weight)), otherwise)


def float_type(rows: torch.Tensor) -> torch.dtype:
    """The type in which unpacked weights are multiplied: that of the rows, or float32 where a CPU has no instructions
    for it, which is many times slower."""
    native = rows.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if rows.device.type == "cpu" and not native else rows.dtype


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """() bool: whether no number is NaN or infinite, which stay in the least and the largest. Of a weight twenty times
    as fast as to look at each."""
    return torch.stack(values.aminmax()).isfinite().all() if values.numel() else values.new_ones((), dtype=torch.bool)


def finite(weight: torch.Tensor) -> torch.Tensor:
    """The weight without its gradient; a `ValueError` if a number of it is not finite."""
    if not all_finite(weight):
        raise ValueError(
            "The weights hold numbers that are not finite (NaN or infinity), which cannot be rounded: the file is "
            "damaged, or training diverged."
        )
    return weight.detach()


@cache
def has_kernel(name: str, key: str, library: str = "aten") -> bool:
    """Whether torch has a kernel `library::name` for a dispatch key such as "CPU" or "CUDA"."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", key)
    except RuntimeError:  # it knows no operator of that name
        return False


__all__ = [
    "QuantizedLinear",
    "all_finite",
    "finite",
    "float_type",
    "has_kernel",
    "is_rounded",
    "kernel_of",
    "type_of_inputs",
]
