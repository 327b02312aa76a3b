"""Linear layers with weights of 4 bits: the small ones.

A few tokens pass a kernel that reads 4 bits, many (the prompt) a matrix product with weights that are unpacked for it.
"""

from functools import cache

import torch
from torch.nn.functional import linear

from .quantized_linear_openvla import (
    AT_ONCE,
    FEW,
    SMALLEST,
    QuantizedLinear,
    finite,
    float_type,
    has_kernel,
    kernel_of,
)


GROUP_SIZES = (64, 32)  # of weights that share a scale; the first that divides a row
FEW_ON_CUDA = 16  # rows that the kernel is for there: at 8 it takes as long as bfloat16, at 276 twenty times (H200)
SHRUNK = (1.0, 0.93, 0.86, 0.79)  # ranges that are tried for a group


class Int4Linear(QuantizedLinear):
    """Weights 0 to 15, two in a byte, the even column in the low half. Of each group of a row `scale_and_zero` holds
    the two numbers of (q - 8) scale + zero, in bfloat16 as the kernels take them: (groups, out_features, 2)."""

    bits = 4
    scale_and_zero: torch.Tensor
    fixed = {"scale_and_zero": torch.bfloat16}

    @staticmethod
    def stored(in_features, out_features):
        groups = in_features // group_size(in_features)
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "scale_and_zero": ((groups, out_features, 2), torch.bfloat16),
        }

    @staticmethod
    def fits(in_features):
        return group_size(in_features) is not None

    @staticmethod
    def quantize(weight):
        group = group_size(weight.shape[1])
        rows = finite(weight).split(max(1, AT_ONCE // weight.shape[1]))
        parts = [_quantize_groups(part.float().unflatten(1, (-1, group))) for part in rows]
        whole, scales, zeros = (torch.cat(part) for part in zip(*parts))
        return {
            "weight": _join(whole),
            "scale_and_zero": torch.stack([scales, zeros], -1).transpose(0, 1).contiguous(),
        }

    def plain(self):
        weight = self.weight
        if kernel_of(weight) is None:
            return weight
        if kernel_of(weight) == "cuda":
            if knows_tiles(weight.device, 2 * weight.shape[-1]):
                return _stored_of_tiles(weight)
            return _join(_unpack_cuda(weight, self.in_features, self.out_features))
        return _join(_unpack_cpu(weight, self.in_features))

    def dequantize(self, dtype):
        return self._rows(self._readable(), slice(None), dtype)

    def _readable(self) -> torch.Tensor:
        """The weight as `_rows` takes it: stored, or packed for a CPU."""
        weight = self.weight
        return weight if kernel_of(weight) == "cpu" else self.plain()

    def _rows(self, weight: torch.Tensor, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight as floats; of what is packed for a CPU, complete blocks of them."""
        packed = kernel_of(weight) == "cpu"
        whole = _unpack_cpu(weight[part], self.in_features) if packed else _split(weight[part])
        scale, zero = self.scale_and_zero[:, part].to(dtype).transpose(0, 1).unbind(-1)  # (rows, groups)
        values = whole.unflatten(1, (len(self.scale_and_zero), -1)).to(dtype)
        return torch.addcmul((zero - 8 * scale)[..., None], values, scale[..., None]).flatten(1)

    def multiply(self, rows):
        group = self.in_features // len(self.scale_and_zero)
        block = rows_of_a_block() if len(rows) <= FEW and rows.device.type == "cpu" and self.may_pack else None
        if block is not None and self.out_features % block == 0:
            packed: torch.Tensor = self.weight
            if not kernel_of(packed):
                whole = _split(packed).int()
                packed = self.pack(torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1), "cpu")
            # In float32 the kernel is slower than the matrix product (torch 2.15).
            rows = rows.bfloat16().contiguous()
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, self.scale_and_zero)
        if rows.device.type == "cuda" and self.has_tiles():
            packed = self.packed_in_tiles()
            known = knows_tiles(rows.device, 2 * packed.shape[-1])
            return product_of_tiles(rows, packed, self.scale_and_zero, known)
        kind = float_type(rows)
        rows, weight = rows.to(kind), self._readable()
        y = rows.new_empty(len(rows), self.out_features)
        step = max(64, AT_ONCE // self.in_features // 64 * 64)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            y[:, part] = linear(rows, self._rows(weight, part, kind))
        return y

    def has_tiles(self) -> bool:
        """Whether torch's CUDA kernel takes such a weight."""
        return self.may_pack and self.out_features % 8 == 0 and _tiles(self.in_features) is not None

    def has_known_tiles(self) -> bool:
        """And whether they are in an order that is known here."""
        tiles = _tiles(self.in_features)
        return tiles is not None and self.has_tiles() and knows_tiles(self.weight.device, tiles)

    def packed_in_tiles(self) -> torch.Tensor:
        """The weight as the CUDA kernel takes it."""
        packed: torch.Tensor = self.weight
        tiles = _tiles(self.in_features)
        if not kernel_of(packed) and tiles is not None:  # there the even column is in the high half
            turned = (packed << 4) | (packed >> 4)
            packed = self.pack(torch.ops.aten._convert_weight_to_int4pack(turned, tiles), "cuda")
            knows_tiles(packed.device, tiles)  # asked before a graph may be recorded
        return packed


def group_size(in_features: int) -> int | None:
    """Weights of a row that share a scale; None where no size divides it."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def _quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, groups, size) -> 0 to 15 (rows, groups * size), scales and zeros (rows, groups); of several ranges, from
    the complete one to a part of it, that with the least squared error."""
    low, high = groups.amin(2), groups.amax(2)
    best: tuple[torch.Tensor, ...] | None = None
    for part in SHRUNK:
        scale = ((high - low) * (part / 15)).clamp_(min=SMALLEST).bfloat16()
        zero = ((high + low) / 2 + scale.float() / 2).bfloat16()  # the middle of 0 to 15 is 7.5
        steps, offset = scale.float()[..., None], zero.float()[..., None]
        whole = ((groups - offset) / steps).round_().add_(8).clamp_(0, 15)
        error = torch.addcmul(offset, whole - 8, steps).sub_(groups).square_().sum(2)
        found = (error, whole.to(torch.uint8), scale, zero)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better[..., None] if old.ndim == 3 else better, new, old) for new, old in zip(found, best)
            )
    assert best is not None
    return best[1].flatten(1), best[2], best[3]


def _split(packed: torch.Tensor) -> torch.Tensor:
    """Two in a byte -> one in a byte."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _join(whole: torch.Tensor) -> torch.Tensor:
    """One in a byte -> two in a byte, row after row: what is not, safetensors refuses."""
    return (whole[:, ::2] | (whole[:, 1::2] << 4)).contiguous()


def _unpack_cpu(packed: torch.Tensor, in_features: int, block: int | None = None) -> torch.Tensor:
    """(out_features, in_features / 2) as the CPU kernel takes it -> (out_features, in_features), one in a byte. Blocks
    of rows (64 with AVX-512, 32 with AVX2) stand column by column, 16 rows side by side in each half byte."""
    block = block or rows_of_a_block() or 32
    stored = packed.detach().view(-1, in_features, block // 32, 16)
    whole = torch.stack([stored & 15, stored >> 4], 2)  # (blocks, in_features, 2, block / 32, 16)
    return whole.flatten(2).transpose(1, 2).reshape(-1, in_features)


@cache
def rows_of_a_block() -> int | None:
    """How the CPU kernel orders 4-bit weights, found by packing some; None where there is no kernel, or it has another
    order."""
    if not (
        has_kernel("_weight_int4pack_mm_for_cpu", "CPU") and has_kernel("_convert_weight_to_int4pack_for_cpu", "CPU")
    ):
        return None
    whole = torch.arange(128 * 64, dtype=torch.int32).view(128, 64) * 7919 // 64 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    return next((block for block in (64, 32) if torch.equal(_unpack_cpu(packed, 64, block).int(), whole)), None)


def _tiles(in_features: int) -> int | None:
    """`innerKTiles` of the CUDA kernel: the largest that divides a row."""
    if not has_kernel("_weight_int4pack_mm", "CUDA"):
        return None
    return next((tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0), None)


def _unpack_cuda(packed: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """What the CUDA kernel has packed, by letting it multiply the identity with scale 1: (out_features, in_features)
    numbers 0 to 15, which bfloat16 holds exactly."""
    group = group_size(in_features) or 1
    ones = torch.zeros(in_features // group, out_features, 2, dtype=torch.bfloat16, device=packed.device)
    ones[..., 0] = 1
    identity = torch.eye(in_features, dtype=torch.bfloat16, device=packed.device)
    product = torch.ops.aten._weight_int4pack_mm(identity, packed, group, ones)
    return product.t().add(8).to(torch.uint8)


def _stored_of_tiles(packed: torch.Tensor) -> torch.Tensor:
    """(out_features / 8, in_features / (16 tiles), 32, tiles / 2) int32 as the CUDA kernel takes it -> the stored form,
    (out_features, in_features / 2) uint8: element by element.

    The 32 are the threads of a tensor core: four to a row, each with columns c, c + 1, c + 8 and c + 9 (c = 0, 2, 4, 6)
    of two tiles of 16 columns. Bytes: even columns of both tiles, odd columns of both; the low half: c or c + 1."""
    rows, columns, _, pairs = packed.shape
    threads = packed.view(rows, columns, 8, 4, pairs).unbind(3)
    words = []  # of four bytes, one of each thread: half a row of a tile
    for place in (0, 4, 8, 12):  # of an even column, from the lowest bit; its neighbour is 16 above
        first, second, third, fourth = (((four >> place) & 15) | ((four >> place + 16 & 15) << 4) for four in threads)
        words.append(first | second << 8 | third << 16 | fourth << 24)
    stored = torch.stack(words, -1).transpose(1, 2)  # (rows, 8, columns, pairs, 4)
    return stored.contiguous().view(torch.uint8).view(8 * rows, -1)


def _scaled(stored: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    """The stored form -> (out_features, in_features) bfloat16, rounded once as in the CUDA kernel."""
    groups = (_split(stored).to(torch.int8) - 8).unflatten(1, (len(scale_and_zero), -1))
    scale, zero = scale_and_zero.transpose(0, 1).unsqueeze(3).unbind(2)  # (out_features, groups, 1)
    return torch.addcmul(zero, groups, scale).flatten(1)


def product_of_tiles(
    rows: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, known: bool = True
) -> torch.Tensor:
    """(rows, in) floats -> (rows, out) bfloat16, by what the CUDA kernel has packed.

    Args:
        known: Whether `knows_tiles`: many rows are then multiplied without that kernel.
    """
    rows = rows.bfloat16().contiguous()
    if known and len(rows) > FEW_ON_CUDA:
        return linear(rows, _scaled(_stored_of_tiles(packed), scale_and_zero))
    group = rows.shape[1] // len(scale_and_zero)
    return torch.ops.aten._weight_int4pack_mm(rows, packed, group, scale_and_zero)


@cache
def knows_tiles(device: torch.device, tiles: int) -> bool:
    """Whether the CUDA kernel orders 4-bit weights as `_stored_of_tiles` takes them, found by packing some: on GPUs of
    another maker it has another order."""
    whole = torch.arange(16 * 32 * tiles, device=device).view(16, -1) * 7919 // 64 % 16
    scale_and_zero = torch.tensor([2.0, 1.0], dtype=torch.bfloat16, device=device).expand(tiles, 16, 2)
    try:
        halves = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(halves, tiles)
        return torch.equal(_scaled(_stored_of_tiles(packed), scale_and_zero).long(), 2 * (whole - 8) + 1)
    except RuntimeError:
        return False


__all__ = ["Int4Linear", "group_size", "knows_tiles", "product_of_tiles"]
