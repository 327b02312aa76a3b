"""Linear layers whose weights have 8 or 4 bits: how they are rounded, how they are multiplied.

On a CPU whole numbers of 8 bits are the fast ones: activations are rounded as well, each token by its largest number,
and multiplied by oneDNN. 4 bits are the small ones: a few tokens pass a kernel that reads 4 bits, many (the prompt) a
matrix product with weights that are unpacked for it. Floats of 8 bits (fp8) are for GPUs that multiply them and for
batches: there activations are rounded as well, by whole numbers and 4 bits weights alone.

Weights are stored in a form of our own, the same for every machine, and are packed for a kernel when they first run
there; the packed form takes their place, so that they are in memory once.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


GROUP_SIZES = (64, 32)  # of 4-bit weights that share a scale; the first that divides a row
FEW = 8  # rows that a kernel for few of them is faster for
FEW_ON_CUDA = 16  # the same of 4 bits there: at 8 rows it takes as long as bfloat16, at 276 twenty times (H200)
SMALLEST = 1e-30  # step of a row of zeros
FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
SHRUNK = (1.0, 0.93, 0.86, 0.79)  # ranges that are tried for a group of 4-bit weights
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


# 8 bits ---------------------------------------------------------------------------------------------------------------


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
        for rows in _finite(weight).split(max(1, AT_ONCE // weight.shape[1])):
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
        if rows.device.type == "cuda" and len(rows) <= FEW and _has("_weight_int8pack_mm", "CUDA"):
            return torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.weight_scale.bfloat16())
        return linear(rows, self.dequantize(rows.dtype))


def quantize_rows(rows: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, in_features) floats -> the same as uint8, where `most + 1` stands for 0, and the step (rows, 1) of each. A
    row with a number that is not finite has a step that is not, or is multiplied to one that is not."""
    rows = rows.float()
    step = rows.abs().amax(1, keepdim=True).clamp_(min=SMALLEST) / most
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
    if not _has("qlinear_pointwise", "MkldnnCPU", "onednn"):
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


# Floats of 8 bits -----------------------------------------------------------------------------------------------------


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
        parts = [round_to_float8(rows) for rows in _finite(weight).split(max(1, AT_ONCE // weight.shape[1]))]
        small, scales = zip(*parts)
        return {"weight": torch.cat(small), "scale": torch.cat(scales)[:, 0]}

    def plain(self):
        return self.weight

    def dequantize(self, dtype):
        return (self.weight.float() * self.scale[:, None]).to(dtype)

    def multiply(self, rows):
        if self.is_fast(rows.device):
            return product_of_float8(rows, self.weight, self.scale, one(rows.device))
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


def product_of_float8(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """(rows, in) floats, (out, in) and (out,) -> (rows, out) float32.

    Factors are multiplied afterwards: cuBLAS has many kernels for products with one factor, among them such for few
    rows, and one for a factor of each row (12288 x 4096 and 16 rows on an H200: 17 and 25 microseconds). Rows are
    filled up to a multiple of 16: torch asks for that of the other two sizes, cuBLAS refuses some numbers of rows.

    Args:
        one: Of the device, see `one`.
    """
    count = len(rows)
    if count % 16:
        rows = nn.functional.pad(rows, (0, 0, 0, -count % 16))
    small, factor = round_to_float8(rows.contiguous())
    product = torch._scaled_mm(small, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return product[:count] * factor[:count] * scale


@cache
def one(device: torch.device) -> torch.Tensor:
    """The factor of a product that has none."""
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
        product = product_of_float8(rows, small, factor[:, 0], one(rows.device))
    except RuntimeError:
        return False
    return bool((product - rows @ weight.T).norm() < 0.05 * (rows @ weight.T).norm())


# 4 bits ---------------------------------------------------------------------------------------------------------------


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
    def quantize(weight):
        group = group_size(weight.shape[1])
        rows = _finite(weight).split(max(1, AT_ONCE // weight.shape[1]))
        parts = [_quantize_groups(part.float().unflatten(1, (-1, group))) for part in rows]
        whole, scales, zeros = (torch.cat(part) for part in zip(*parts))
        return {
            "weight": whole[:, ::2] | (whole[:, 1::2] << 4),
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
    return whole[:, ::2] | (whole[:, 1::2] << 4)


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
    if not (_has("_weight_int4pack_mm_for_cpu", "CPU") and _has("_convert_weight_to_int4pack_for_cpu", "CPU")):
        return None
    whole = torch.arange(128 * 64, dtype=torch.int32).view(128, 64) * 7919 // 64 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    return next((block for block in (64, 32) if torch.equal(_unpack_cpu(packed, 64, block).int(), whole)), None)


def _tiles(in_features: int) -> int | None:
    """`innerKTiles` of the CUDA kernel: the largest that divides a row."""
    if not _has("_weight_int4pack_mm", "CUDA"):
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


# Of all ---------------------------------------------------------------------------------------------------------------


LINEARS: dict[int | str, type[QuantizedLinear]] = {8: Int8Linear, 4: Int4Linear, "fp8": Float8Linear}


def fits(bits: int | str, in_features: int) -> bool:
    """Whether a layer with rows of this length can have so few bits."""
    return bits != 4 or group_size(in_features) is not None


def float_type(rows: torch.Tensor) -> torch.dtype:
    """The type in which unpacked weights are multiplied: that of the rows, or float32 where a CPU has no instructions
    for it, which is many times slower."""
    native = rows.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if rows.device.type == "cpu" and not native else rows.dtype


def _finite(weight: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "The weights hold numbers that are not finite (NaN or infinity), which cannot be rounded: the file is "
            "damaged, or training diverged."
        )
    return weight.detach()


@cache
def _has(name: str, key: str, library: str = "aten") -> bool:
    """Whether torch has a kernel `library::name` for a dispatch key such as "CPU" or "CUDA"."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", key)
    except RuntimeError:  # it knows no operator of that name
        return False


__all__ = ["LINEARS", "Float8Linear", "Int4Linear", "Int8Linear", "QuantizedLinear", "fits"]
