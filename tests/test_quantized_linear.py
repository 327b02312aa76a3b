"""Layers of 8 bits, 4 bits and fp8 against a reference that rounds in float64."""

import copy
import pickle
import sys

import pytest
import torch
from torch.nn.functional import linear

from openvla import float8_linear_openvla, int8_linear_openvla
from openvla import int4_linear_openvla as int4
from openvla.float8_linear_openvla import Float8Linear, round_to_float8
from openvla.int4_linear_openvla import Int4Linear, rows_of_a_block
from openvla.int8_linear_openvla import Int8Linear, largest_activation
from openvla.quantized_linear_openvla import all_finite, has_kernel


KINDS = [Int8Linear, Int4Linear, Float8Linear]
PACKED = KINDS[:2]  # for a kernel of the CPU


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not has_kernel("qlinear_pointwise", "MkldnnCPU", "onednn"):
        pytest.skip("torch has no oneDNN here")


def made(kind, out_features=128, in_features=96, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    stored = kind.quantize(weight)
    if bias:
        stored["bias"] = torch.randn(out_features, generator=generator)
    module = kind(in_features, out_features, bias)
    module.load_state_dict(stored)
    return module, weight, stored


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Each row as whole multiples of its largest number over `largest_activation()`, in float64."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest_activation()
    return (x / step).round() * step


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (40, 96), (2, 5, 96), (0, 96), (2, 0, 96)], ids=str)
def test_int8_is_the_product_of_rounded_numbers(shape, bias):
    module, _, stored = made(Int8Linear, bias=bias)
    weight = stored["weight"].double() * stored["weight_scale"].double()[:, None]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-4, 2, max(1, x[..., 0].numel())).view(*shape[:-1], 1)[..., : x.shape[-1]] if x.numel() else 1
    expected = linear(rounded_rows(x), weight, stored["bias"].double() if bias else None)
    y = module(x)
    assert y.shape == expected.shape and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_int8_keeps_the_largest_numbers():
    """Products of bytes that do not fit into 16 bits: CPUs without VNNI cut them off unless activations are smaller."""
    module = Int8Linear(64, 64, bias=False)
    module.load_state_dict(Int8Linear.quantize(torch.ones(64, 64)))
    for x in (torch.ones(1, 64), -torch.ones(9, 64), torch.cat([torch.ones(3, 32), -torch.ones(3, 32)], 1)):
        torch.testing.assert_close(module(x), x.sum(1, keepdim=True).expand(-1, 64), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_close_to_the_weights_it_was_made_of(kind, dtype, rows):
    module, weight, stored = made(kind, bias=False)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, expected = module(x), x.double() @ weight.double().T
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < {Int8Linear: 0.02, Int4Linear: 0.12, Float8Linear: 0.04}[
        kind
    ]
    exact = x.double() @ module.dequantize(torch.float32).double().T  # few rows and many alike
    assert (y.double() - exact).norm() / exact.norm() < 0.015


@pytest.mark.parametrize("kind", PACKED)
def test_stored_and_packed_is_one(kind):
    module, _, stored = made(kind, 64)
    plain = module.dequantize(torch.float32)
    x = torch.randn(3, 96)
    with torch.inference_mode():
        y = module(x)
    assert module.kernel == {8: "onednn", 4: "cpu"}[kind.bits]
    assert module.weight.numel() == stored["weight"].numel()  # in the place of the other, not beside it
    assert torch.equal(module.dequantize(torch.float32), plain)
    saved = module.state_dict()
    assert saved.keys() == stored.keys() and all(torch.equal(saved[name], stored[name]) for name in stored)
    assert all(value.is_contiguous() for value in saved.values())  # safetensors takes no others; 64 rows are one block
    assert module.kernel, "saving leaves it packed"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.inference_mode():
            assert torch.equal(other(x), y) and torch.equal(module(x), y)
    module.load_state_dict(made(kind, 64, seed=5)[2])
    with torch.inference_mode():
        assert not torch.equal(module(x), y)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_by_another_thread_meanwhile(kind, rows, monkeypatch):
    module, _, _ = made(kind)
    place = sys.modules[kind.__module__]
    x, kernel_of, calls = torch.randn(rows, 96), place.kernel_of, []
    expected = copy.deepcopy(module)(x)

    def another_thread_is_first(weight):
        calls.append(weight)
        if len(calls) == 1:
            module(x[:1])
        return kernel_of(weight)

    monkeypatch.setattr(place, "kernel_of", another_thread_is_first)
    assert torch.equal(module(x), expected) and module.kernel


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_rounded_are_refused(kind, strict):
    """Cast to whole numbers they would be zeros; whole numbers as floats of 8 bits others."""
    module, weight, stored = made(kind)
    other = Int8Linear if kind is Float8Linear else Float8Linear
    with pytest.raises(RuntimeError, match=f"weight is {other.stored(1, 1)['weight'][1]}, and this layer"):
        module.load_state_dict({"weight": other.quantize(weight)["weight"]}, strict=strict)
    with pytest.raises(RuntimeError, match=f"weight is torch.float32, and this layer holds {kind.bits} bits"):
        module.load_state_dict({"weight": weight}, strict=strict)
    assert torch.equal(module.state_dict()["weight"], stored["weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_put_in_with_their_steps(kind):
    """With strict=False those of other weights counted, silently."""
    module, weight, stored = made(kind)
    others = kind.quantize(weight * 3)
    for name, value in others.items():
        with pytest.raises(RuntimeError, match="is missing, without which the others mean other numbers"):
            module.load_state_dict({name: value}, strict=False)
    for name, value in module.state_dict().items():
        assert name == "bias" or torch.equal(value, stored[name])
    module.load_state_dict(others, strict=False)
    module.load_state_dict({}, strict=False)
    assert torch.equal(module.state_dict()["weight"], others["weight"])


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_lie_across_memory(kind):
    module, _, _ = made(kind)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(96, 3).to(dtype).T
        torch.testing.assert_close(module(x), module(x.contiguous()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.long, torch.float8_e4m3fn])
def test_what_is_no_float_is_refused(kind, dtype):
    """The type of its own weights, to which callers cast what they give a layer of torch: nearly all became zeros."""
    module, _, _ = made(kind)
    with pytest.raises(ValueError, match=f"bits is {dtype}, expected floats"):
        module(torch.zeros(2, 96).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_scales_as_they_are(kind, dtype):
    module, _, stored = made(kind)
    with torch.inference_mode():
        y = module(torch.ones(2, 96))
    module.to(dtype)
    assert module.bias.dtype == dtype and module.weight.dtype in (stored["weight"].dtype, torch.int8)
    with torch.inference_mode():
        assert module(torch.ones(2, 96, dtype=dtype)).dtype == dtype
    for name in module.fixed:
        assert (
            torch.equal(module.get_buffer(name), stored[name]) and module.get_buffer(name).dtype == stored[name].dtype
        )
    module.float()
    with torch.inference_mode():
        torch.testing.assert_close(module(torch.ones(2, 96)), y, rtol=1e-2, atol=1e-2)  # the bias was cast


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_input_are_right(kind):
    module, _, _ = made(kind)
    with torch.inference_mode():
        module(torch.ones(2, 96))
    x = torch.randn(2, 96, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize(torch.float32).sum(0).expand(2, 96), rtol=1e-5, atol=1e-5)
    assert all(not parameter.requires_grad for parameter in module.parameters())
    assert not isinstance(module, torch.nn.Linear)  # PEFT would add to whole numbers


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_not_finite_stays_so(kind, value, rows):
    module, _, _ = made(kind)
    x = torch.randn(rows, 96)
    x[0, 5] = value
    y = module(x)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(kind, value):
    weight = torch.randn(8, 64)
    weight[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        kind.quantize(weight)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_and_of_any_size(kind):
    for factor in (0.0, 1e-20, 1e20):
        module = kind(64, 64, bias=False)
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * factor
        module.load_state_dict(kind.quantize(weight))
        y, expected = module(torch.ones(1, 64)), weight.sum(1)
        assert y.isfinite().all() and (y - expected).norm() <= 0.2 * expected.norm()


def test_rows_that_no_group_divides():
    assert Int8Linear.fits(33) and Float8Linear.fits(33)
    assert not Int4Linear.fits(33) and Int4Linear.fits(672) and Int4Linear.fits(4096)
    assert Int4Linear.stored(672, 256)["scale_and_zero"][0] == (21, 256, 2)  # of 32


def test_order_of_the_4_bit_kernel_is_found(monkeypatch):
    whole = torch.randint(0, 16, (192, 64), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    assert torch.equal(int4._unpack_cpu(packed, 64).int(), whole)
    module, _, _ = made(Int4Linear, 192)
    with torch.inference_mode():
        expected = module(torch.ones(2, 96))
        module.unpack()
        monkeypatch.setattr(int4, "rows_of_a_block", lambda: None)  # a kernel with another order is not used
        torch.testing.assert_close(module(torch.ones(2, 96)), expected, rtol=2e-2, atol=2e-2)
        assert module.kernel is None
    assert rows_of_a_block() in (32, 64)


def test_without_the_kernel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(int8_linear_openvla, "has_kernel", lambda *_: False)
    with pytest.raises(ValueError, match="onednn.qlinear_pointwise.*install torch >= 2.6.*without quantization"):
        largest_activation.__wrapped__()


# What a GPU does, without one -----------------------------------------------------------------------------------------


def packed_for_cuda(whole: torch.Tensor, tiles: int) -> torch.Tensor:
    """(rows, columns) numbers 0 to 15 as torch's CUDA kernel packs them, one after the other."""
    rows, columns = whole.shape
    packed = torch.zeros(rows // 8, columns // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    offsets = (0, 8, 16, 24, 1, 9, 17, 25)  # of the half bytes of a number, from the lowest
    for row, column, thread, pair in (
        place.tolist() for place in torch.cartesian_prod(*map(torch.arange, packed.shape))
    ):
        first = 16 * tiles * column + 32 * pair + 2 * (thread % 4)
        for place, offset in enumerate(offsets):
            packed[row, column, thread, pair] += int(whole[8 * row + thread // 4, first + offset]) << 4 * place
    return torch.where(packed < 2**31, packed, packed - 2**32).int()


@pytest.mark.parametrize("tiles", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_4_bits_are_unpacked_from_the_order_of_cuda(tiles, group):
    generator = torch.Generator().manual_seed(tiles)
    whole = torch.randint(0, 16, (24, 64 * tiles), generator=generator)
    packed = packed_for_cuda(whole, tiles)
    stored = int4._stored_of_tiles(packed)
    assert torch.equal(int4._split(stored), whole.to(torch.uint8))
    scale_and_zero = torch.randn(whole.shape[1] // group, 24, 2, generator=generator).bfloat16()
    scale, zero = scale_and_zero.double().transpose(0, 1)[..., None].unbind(2)
    expected = (whole.unflatten(1, (-1, group)) - 8) * scale + zero
    weight = expected.flatten(1).bfloat16()
    assert torch.equal(int4._scaled(stored, scale_and_zero), weight)
    rows = torch.randn(int4.FEW_ON_CUDA + 1, whole.shape[1], generator=generator)
    found = int4.product_of_tiles(rows, packed, scale_and_zero)
    assert torch.equal(found, torch.nn.functional.linear(rows.bfloat16(), weight))


def test_an_order_of_cuda_that_is_another_is_not_taken(monkeypatch):
    orders = {"as here": lambda halves: halves, "another": lambda halves: halves.flip(0)}
    for name, change in orders.items():

        def pack(halves, tiles, change=change):
            return packed_for_cuda(
                torch.stack([halves >> 4, halves & 15], -1).flatten(1).long()[change(torch.arange(16))], tiles
            )

        monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack)
        assert int4.knows_tiles.__wrapped__(torch.device("cpu"), 4) == (name == "as here")


@pytest.fixture
def float8_products(monkeypatch):
    """`torch._scaled_mm` in float64, with what it asks for on a GPU; the numbers of rows that it was given."""
    given = []

    def scaled_mm(rows, weight, scale_a, scale_b, out_dtype, use_fast_accum):
        assert rows.dtype == weight.dtype == torch.float8_e4m3fn and scale_a.dtype == scale_b.dtype == torch.float32
        assert rows.is_contiguous() and weight.t().is_contiguous()
        assert scale_a.numel() == scale_b.numel() == 1
        assert all(size % 16 == 0 for size in (*rows.shape, *weight.shape))
        given.append(len(rows))
        return ((rows.double() @ weight.double()) * scale_a.double() * scale_b.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(float8_linear_openvla, "multiplies_float8", lambda device: True)
    return given


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float8_is_the_product_of_rounded_numbers(dtype, float8_products):
    module, weight, stored = made(Float8Linear, bias=False)
    assert stored["weight"].float().abs().amax(1).eq(448).all()
    for rows in (1, 15, 16, 40):
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, rows)[:, None]
        x = x.to(dtype)
        y, exact = module(x), x.double() @ module.dequantize(torch.float64).T
        assert y.dtype == dtype and y.shape == (rows, 128)
        assert ((y.double() - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.05  # three bits of a mantissa
    assert float8_products == [16, 16, 16, 48]
    assert torch.equal(module(x.T.contiguous().T), y)


@torch.inference_mode()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_rows_of_nothing_finite_and_of_zeros(value, dtype, float8_products):
    module, _, _ = made(Float8Linear, bias=False)
    x = torch.randn(20, 96).to(dtype)
    x[0, 3], x[1], x[2] = value, 0, torch.finfo(dtype).max
    x[3] = torch.finfo(dtype).tiny
    y = module(x)
    assert not y[0].isfinite().any() and y[3:].isfinite().all() and (y[1] == 0).all()
    small, factor = round_to_float8(x[1:])
    assert small.float().isfinite().all() and factor.isfinite().all()  # 448 is reached and not passed


@torch.inference_mode()
@pytest.mark.parametrize("size", [(40, 32), (32, 40)], ids=str)
def test_float8_of_other_sizes_is_unpacked(size, float8_products):
    module, _, _ = made(Float8Linear, *size, bias=False)
    x = torch.randn(5, size[1])
    torch.testing.assert_close(module(x), x @ module.dequantize(torch.float32).T)
    assert not float8_products


def test_float8_is_for_gpus():
    assert not float8_linear_openvla.multiplies_float8(torch.device("cpu"))


def test_all_finite():
    """Of empty parts as well, which FSDP gives a rank of few weights."""
    assert all_finite(torch.zeros(0, 3)) and all_finite(torch.tensor([[1.0, -3e38]]).t())
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for place in (0, 5, 98):
                values = torch.randn(99).to(dtype)
                values[place] = value
                assert not all_finite(values)
