"""Linear layers with weights of 8 bits, whole numbers: the fast ones on a CPU.

There activations are rounded as well, each token by its largest number, and multiplied by oneDNN. On a GPU weights
alone are rounded.
"""

from functools import cache

import torch
from torch.nn.functional import linear

from .quantized_linear_openvla import AT_ONCE, FEW, SMALLEST, QuantizedLinear, finite, has_kernel, kernel_of


class Int8Linear(QuantizedLinear):
    """Weights -127 to 127, one step size (`weight_scale`) for each output."""

    bits = 8
    weight_scale: torch.Tensor
    fixed = {"weight_scale": torch.float32}

    @staticmethod
    def stored(in_features, out_features):
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features,), torch.float32),
        }

    @staticmethod
    def quantize(weight):
        parts = []
        for rows in finite(weight).split(max(1, AT_ONCE // weight.shape[1])):
            rows = rows.float()
            scale = rows.abs().amax(1, keepdim=True).clamp_(min=SMALLEST) / 127
            parts.append(((rows / scale).round_().to(torch.int8), scale[:, 0]))
        whole, scales = zip(*parts)
        return {"weight": torch.cat(whole), "weight_scale": torch.cat(scales)}

    def plain(self):
        weight = self.weight
        return weight.to_dense().t().contiguous() if kernel_of(weight) else weight

    def dequantize(self, dtype):
        return (self.plain() * self.weight_scale[:, None]).to(dtype)

    def multiply(self, rows):
        if rows.device.type == "cpu" and self.may_pack:
            most = largest_activation()
            packed: torch.Tensor = self.weight
            if not kernel_of(packed):
                packed = self.pack(torch.ops.onednn.qlinear_prepack(packed.data, None), "onednn")
            whole, step = quantize_rows(rows, most)
            return _qlinear(whole, most + 1, packed, self.weight_scale).mul_(step)
        if rows.device.type == "cuda" and len(rows) <= FEW and has_kernel("_weight_int8pack_mm", "CUDA"):
            return torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.weight_scale.bfloat16())
        return linear(rows, self.dequantize(rows.dtype))


def quantize_rows(rows: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., in_features) floats -> the same as uint8, where `most + 1` stands for 0, and the step (..., 1) of each row.
    A row with a number that is not finite has a step that is not, or is multiplied to one that is not."""
    rows = rows.float()
    step = rows.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST) / most
    return (rows / step).round_().add_(most + 1).to(torch.uint8), step


def _qlinear(rows: torch.Tensor, zero: int, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, in_features) uint8 -> float32 (rows, out_features); steps of the rows are left to the caller. Other types
    than float32 have no fast kernel on CPUs without VNNI (torch 2.15: 25 ms instead of 0.2)."""
    zeros = _zeros(len(scale))
    return torch.ops.onednn.qlinear_pointwise.default(  # named, as to choose among the overloads takes longer
        rows, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def _zeros(count: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int64)


@cache
def largest_activation() -> int:
    """What a rounded activation may be at most: 127, or 63 on CPUs without VNNI, which add products of bytes in 16 bits
    and cut off what does not fit. Found by multiplying the largest numbers.

    Raises:
        ValueError: If torch has no such kernel, or it is wrong here in both ways.
    """
    if not has_kernel("qlinear_pointwise", "MkldnnCPU", "onednn"):
        raise ValueError(
            f"8-bit weights run on a CPU through onednn.qlinear_pointwise, which torch {torch.__version__} for this "
            "machine does not have: install torch >= 2.6 from its own index for Linux or Windows on x86, or load the "
            "model without quantization."
        )
    weight = torch.full((64, 64), 127, dtype=torch.int8)
    weight[:, ::5] = -127
    packed, scale = torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(64)
    for most in (127, 63):
        for count in (1, 7, 64):
            rows = torch.full((count, 64), 2 * most + 1)
            rows[:, ::3] = 1
            expected = (rows - most - 1).double() @ weight.double().T
            if not torch.equal(_qlinear(rows.to(torch.uint8), most + 1, packed, scale).double(), expected):
                break
        else:
            return most
    raise ValueError("onednn.qlinear_pointwise gives wrong products on this CPU: load the model without 8 bits.")


__all__ = ["Int8Linear", "largest_activation", "quantize_rows"]
