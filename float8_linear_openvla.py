"""Linear layers with weights that are floats of 8 bits (fp8): for GPUs that multiply them, above all for batches.
Activations are rounded as well."""

from functools import cache

import torch
from torch import nn
from torch.nn.functional import linear

from .quantized_linear_openvla import AT_ONCE, FLOAT8, SMALLEST, QuantizedLinear, finite, float_type


LARGEST_FLOAT8 = 448.0


class Float8Linear(QuantizedLinear):
    """Weights in float8_e4m3fn, with one factor (`scale`) for each output: the largest of a row becomes 448.

    A GPU that multiplies them (compute capability 8.9 and above) is given activations of the same type, each row with a
    factor of its own; the product has bfloat16. Everywhere else the weights are unpacked: memory is saved, not time."""

    bits = 8
    scale: torch.Tensor  # not the name of 8-bit whole numbers: a folder of these must not load as the other
    fixed = {"scale": torch.float32}

    @staticmethod
    def stored(in_features, out_features):
        return {"weight": ((out_features, in_features), FLOAT8), "scale": ((out_features,), torch.float32)}

    @staticmethod
    def quantize(weight):
        parts = [round_to_float8(rows) for rows in finite(weight).split(max(1, AT_ONCE // weight.shape[1]))]
        small, scales = zip(*parts)
        return {"weight": torch.cat(small), "scale": torch.cat(scales)[:, 0]}

    def plain(self):
        return self.weight

    def dequantize(self, dtype):
        return (self.weight.float() * self.scale[:, None]).to(dtype)

    def multiply(self, rows):
        if self.is_fast(rows.device):
            return product_of_float8(rows, self.weight, self.scale, unit_scale(rows.device))
        kind = float_type(rows)
        return linear(rows.to(kind), self.dequantize(kind))

    def is_fast(self, device: torch.device) -> bool:
        """Whether its product is one of floats of 8 bits there."""
        return self.in_features % 16 == 0 and self.out_features % 16 == 0 and multiplies_float8(device)


def round_to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, n) floats -> the same in float8, and the float32 factor (rows, 1) of each row. Of a row of zeros: zeros. A
    row with a number that is not finite has a factor that is not."""
    largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True).float()
    factor = largest.clamp(min=SMALLEST) / LARGEST_FLOAT8
    return (rows / factor).to(FLOAT8), factor


def product_of_float8(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor
) -> torch.Tensor:
    """(rows, in) floats, (out, in) and (out,) -> (rows, out) float32.

    Factors are multiplied afterwards: cuBLAS has many kernels for products with one factor, among them such for few
    rows, and one for a factor of each row (12288 x 4096 and 16 rows on an H200: 17 and 25 microseconds). Rows are
    filled up to a multiple of 16: torch asks for that of the other two sizes, cuBLAS refuses some numbers of rows.

    Args:
        unit: Of the device, see `unit_scale`.
    """
    count = len(rows)
    if count % 16:
        rows = nn.functional.pad(rows, (0, 0, 0, -count % 16))
    small, factor = round_to_float8(rows.contiguous())
    product = torch._scaled_mm(small, weight.t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)
    return product[:count] * factor[:count] * scale


@cache
def unit_scale(device: torch.device) -> torch.Tensor:
    """() float32 1 on the device: the scale of a product that is scaled afterwards, made once."""
    with torch.inference_mode(False):
        return torch.ones((), device=device)


@cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether a device multiplies floats of 8 bits, found by a small product: torch refuses that on some chips that
    have the instructions."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    sizes = torch.arange(64.0, device=device)
    rows, weight = sizes[:3, None] - sizes % 7, sizes[:32, None] % 5 - sizes % 3
    small, factor = round_to_float8(weight)
    try:
        product = product_of_float8(rows, small, factor[:, 0], unit_scale(rows.device))
    except RuntimeError:
        return False
    return bool((product - rows @ weight.T).norm() < 0.05 * (rows @ weight.T).norm())


__all__ = ["Float8Linear", "multiplies_float8", "product_of_float8", "round_to_float8", "unit_scale"]
