"""Products of linear layers by oneDNN: the numbers of torch's own, wherever they may be taken, and nowhere else."""

import contextlib
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from openvla import OpenVLAForActionPrediction, products_openvla
from openvla.modules_openvla import evaluation_mode
from openvla.policy import OpenVLAPolicy
from openvla.products_openvla import Linear, onednn_linear, product_for, take_fast_products


ROOT = Path(__file__).resolve().parents[1]
onednn = pytest.mark.skipif(not products_openvla.has_fast_products(), reason="a CPU or a torch on which MKL multiplies")


@pytest.fixture
def asked(monkeypatch):
    """Rows of each product that was asked of oneDNN, also where it would not be taken."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    rows = []

    def product(hidden, weight, bias=None):
        rows.append(hidden.shape[:-1].numel())
        return onednn_linear(hidden, weight, bias)

    monkeypatch.setattr(products_openvla, "has_fast_products", lambda: True)
    monkeypatch.setattr(products_openvla, "onednn_linear", product)
    monkeypatch.setattr(products_openvla, "MANY_PRODUCTS", 0)
    return rows


@pytest.mark.parametrize("shape", [(1, 24), (2, 7, 24), (67, 24), (3, 1, 24), (0, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_are_those_of_torch(asked, shape, bias):
    layer = Linear(24, 40, bias=bias)
    hidden = torch.randn(shape)
    expected = functional.linear(hidden, layer.weight, layer.bias)
    with torch.inference_mode():
        found = layer(hidden)
    assert asked or len(shape) == 1
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_numbers_of_other_strides(asked):
    weight, bias = torch.randn(40, 24), torch.randn(40)
    transposed = torch.randn(24, 40).t()
    for hidden in (torch.randn(24, 60).t()[::2], torch.randn(1, 24).expand(9, 24), torch.randn(2, 9, 48)[..., ::2]):
        for weights in (weight, transposed, torch.randn(80, 24)[::2]):
            expected = functional.linear(hidden, weights, bias)
            torch.testing.assert_close(onednn_linear(hidden, weights, bias), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_finite_stays_so(asked):
    hidden = torch.ones(9, 24)
    hidden[0, 0], hidden[1, 3] = torch.nan, torch.inf
    with torch.no_grad():
        found = onednn_linear(hidden, torch.rand(40, 24))
    assert found[0].isnan().all() and found[1].isinf().all() and found[2:].isfinite().all()


def test_who_needs_torch_has_it(asked):
    layer, hidden = Linear(24, 40), torch.randn(9, 24)
    layer(hidden).sum().backward()  # gradients
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(hidden).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            layer(hidden)
        assert copy.deepcopy(layer).bfloat16()(hidden.bfloat16()).dtype == torch.bfloat16
        with FakeTensorMode() as mode:
            Linear(24, 40)(mode.from_tensor(hidden))
        torch.jit.trace(layer, hidden, check_trace=False)
        assert not asked
        layer(hidden)
        assert asked == [9]


@pytest.mark.parametrize("wrong", [torch.randn(9, 23), torch.randn(9, 24).bfloat16(), torch.zeros(9, 24).long()])
def test_errors_are_those_of_torch(asked, wrong):
    layer = Linear(24, 40)
    with torch.no_grad(), pytest.raises(RuntimeError) as expected:
        functional.linear(wrong, layer.weight, layer.bias)
    with torch.no_grad(), pytest.raises(RuntimeError) as found:
        layer(wrong)
    assert str(found.value) == str(expected.value)
    half = Linear(24, 40).bfloat16()  # oneDNN would round its weights' products without a word
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype|same"):
        half(torch.randn(9, 24))


class Wrapped(torch.Tensor):
    """Weights as other libraries quantize them: of their own class, said to be float32."""


@torch.no_grad()
def test_parameters_that_onednn_reads_otherwise_are_torchs(asked):
    """It reads the memory of a bias, and the values of a tensor of another class or layout."""
    weight, hidden = torch.randn(40, 24), torch.randn(9, 24)
    biases = [torch.randn(80)[::2], torch.randn(1).expand(40), torch.ones(1), torch.randn(40, 2)[:, 0]]
    layer = Linear(24, 40)
    for bias in biases:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        torch.testing.assert_close(layer(hidden), functional.linear(hidden, layer.weight, bias))
    for odd in (weight.as_subclass(Wrapped), weight.to_sparse_csr(), weight.to("meta"), weight.double()):
        layer = Linear(24, 40, bias=False)
        layer.weight = torch.nn.Parameter(odd, requires_grad=False)
        with contextlib.suppress(RuntimeError):  # torch's own
            layer(hidden)
    assert not asked
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer(hidden)
    assert asked == [9]


@torch.no_grad()
def test_forward_derivatives_without_gradients(asked):
    layer, hidden = Linear(24, 40), torch.randn(9, 24)
    _, found = torch.func.jvp(layer, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(found, torch.ones(9, 24) @ layer.weight.T)
    assert not asked


GROWTH = """
import torch
{first}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
torch.set_num_threads(1)
weight, multiply = torch.randn(256, 672), torch.ops.mkldnn._linear_pointwise
with torch.inference_mode():
    for rows in range(8, 1200):
        multiply(torch.ones(rows, 672), weight, None, "none", [], "")
        before = resident() if rows == 8 else before
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory of a process")
def test_code_that_is_kept_is_bounded():
    """oneDNN makes code for each number of rows: torch alone keeps most of a gigabyte of it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    environment = {name: value for name, value in os.environ.items() if name not in BOUNDS}
    alone, bounded = (
        float(run_python(GROWTH.format(first=first), environment)) for first in ("", "import openvla.products_openvla")
    )
    assert bounded < max(0.6 * alone, 100), (alone, bounded)


BOUNDS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_bounds_of_the_user_stay():
    environment = {**os.environ, BOUNDS[0]: "7"}
    environment.pop(BOUNDS[1], None)
    told = run_python(
        f"import os, openvla.products_openvla; print(*[os.environ[name] for name in {BOUNDS}])", environment
    )
    assert told.split() == ["7", str(products_openvla.MOST_SHAPES)]


def run_python(program, environment):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_layers_of_a_loaded_model(small_policy, asked):
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module) for module in layers} == {Linear} and len(layers) > 20
    names = [*model.state_dict()]
    assert [*copy.deepcopy(model).state_dict()] == names
    again = pickle.loads(pickle.dumps(model.projector))  # a test's own bytes
    assert type(again.fc1) is Linear

    built = OpenVLAForActionPrediction(model.config)
    assert not any(type(module) is Linear for module in built.modules())  # what quantizes while loading finds torch's
    take_fast_products(built)
    assert {type(module) for module in built.modules() if isinstance(module, torch.nn.Linear)} == {Linear}


def test_predictions_are_those_of_torchs_products(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    model = OpenVLAForActionPrediction.from_pretrained(ROOT).eval()
    images = list(np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8))
    words = ["open the drawer", "push the puck to the goal", "close the window"]
    found, taken = [], []
    multiply = torch.ops.mkldnn._linear_pointwise
    operators = SimpleNamespace(_linear_pointwise=lambda *given: taken.append(1) or multiply(*given))
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    for fast in (False, True):
        monkeypatch.setattr(products_openvla, "has_fast_products", lambda fast=fast: fast)
        single = [model.predict_action(*pair, return_dict=True) for pair in zip(images, words)]
        batch = model.predict_action(images, words, return_dict=True)
        draft = model.predict_action(images, words, draft=batch.token_ids.tolist(), return_dict=True)
        assert batch.token_ids.tolist() == [one.token_ids.tolist() for one in single] == draft.token_ids.tolist()
        found.append(batch)
        assert bool(taken) == fast
    assert found[0].token_ids.tolist() == found[1].token_ids.tolist()
    np.testing.assert_allclose(found[0].token_probabilities, found[1].token_probabilities, atol=1e-4)


def ordered(model) -> set[str]:
    """Names of the weights that lie by inputs."""
    weights = {name: one for name, one in model.named_parameters() if one.ndim > 1 and not one.is_contiguous()}
    return {name for name, one in weights.items() if one.flatten(1).t().is_contiguous()}


@pytest.fixture
def fast(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    monkeypatch.setattr(products_openvla, "has_fast_products", lambda: True)
    monkeypatch.setattr(products_openvla, "MANY_PRODUCTS", 0)


def test_a_model_that_is_prepared_reads_its_weights_by_inputs(small_policy, fast, monkeypatch):
    """The same parameters with the same numbers, once in memory; tables of tokens stay, and steps of whole pages."""
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    model.prepare_for_inference()
    changed = ordered(model)
    assert "language_model.model.layers.0.mlp.down_proj.weight" in changed
    assert "vision_backbone.featurizer.patch_embed.proj.weight" in changed
    assert not {name for name in changed if "lm_head" in name or "embed_tokens" in name}
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, before[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert not parameter.is_inference()
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    model.prepare_for_inference()  # nothing is left to do
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places

    model.bfloat16().prepare_for_inference()  # whose products read rows
    assert not ordered(model)
    with evaluation_mode(model):  # a prediction of another thread
        model.float().prepare_for_inference()
    assert not ordered(model)
    monkeypatch.setattr(products_openvla, "PAGE", 4)
    assert not model.float().prepare_for_inference().graphs and not ordered(model)


def test_tokens_do_not_depend_on_the_order_of_weights(fast):
    model = OpenVLAForActionPrediction.from_pretrained(ROOT).eval()
    other = copy.deepcopy(model)
    other.prepare_for_inference()
    assert len(ordered(other)) == 50 and not ordered(model)
    images = list(np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8))
    for draft in (None, [[]] * 4):
        found, expected = (
            one.predict_action(images, ["open the drawer"] * 4, draft=draft, return_dict=True)
            for one in (other, copy.deepcopy(other) if draft else model)
        )
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, atol=1e-4)
    assert ordered(OpenVLAPolicy.load(str(ROOT)).model) == ordered(other)


def learn(model, optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    pixels = torch.randn(2, *model.vision_backbone.input_shape, generator=generator)
    for _ in range(steps):
        model.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_that_was_prepared_learns_and_is_saved(small_policy, fast, tmp_path):
    """Fused optimizers read weights and moments as they lie in memory: they learned otherwise after a preparation."""
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, fused=True) for one in (model, other)]
    model.prepare_for_inference()
    for count in (1, 2):
        for one, optimizer in zip((model, other), optimizers):
            learn(one, optimizer, count)
        assert not ordered(model)
        model.prepare_for_inference()
        assert not ordered(model)  # in train mode
        model.eval().prepare_for_inference()
        assert ordered(model)
    learned = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(learned[name], value), name
    model.save_pretrained(tmp_path / "saved")
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, learned[name]) for name, value in again.state_dict().items())
    assert ordered(model) and not ordered(again)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_prepared_learns_in_evaluation_mode(small_policy, fast):
    """As scripts do that never call `train()`: fused moments of before were taken for those of other weights."""
    learned = []
    for prepares in (True, False):
        model = OpenVLAForActionPrediction.from_pretrained(small_policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        model.train = lambda mode=True, model=model: model  # never
        learn(model, optimizer)
        if prepares:
            model.prepare_for_inference()
            assert ordered(model)
        learn(model, optimizer, 2)
        learned.append(model.state_dict())
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())


def test_a_copy_learns_and_frozen_weights_stay_in_order(small_policy, fast):
    """A copy did not know that its weights are in order; an evaluation with gradients on undid the preparation."""
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    model.prepare_for_inference()
    inputs = {
        "input_ids": torch.tensor([[1, 3, 4]]),
        "pixel_values": torch.zeros(1, *model.vision_backbone.input_shape),
    }
    model.requires_grad_(False)(**inputs)
    other = copy.deepcopy(model).requires_grad_(True)
    assert ordered(model) and ordered(other)
    other(**inputs)
    assert not ordered(other)


def test_a_model_with_a_part_of_another_that_predicts(small_policy, fast):
    """Its weights changed their place while they were multiplied: other actions."""
    model, other = (OpenVLAForActionPrediction.from_pretrained(small_policy).eval() for _ in range(2))
    other.language_model = model.language_model
    with evaluation_mode(other):
        model.prepare_for_inference()
        assert ordered(model) and not ordered(model.language_model)
    other.prepare_for_inference()
    with evaluation_mode(model):
        other.train().eval()
        assert ordered(other) == {f"language_model.{name}" for name in ordered(model.language_model)} != set()


def test_weights_that_belong_to_others_as_well(small_policy, fast):
    """Memory of several processes, which would no longer see what one of them writes; flat ones of a library that
    shards; and those made in inference mode, which became weights that no prediction could read."""
    loaded = OpenVLAForActionPrediction.from_pretrained(small_policy).eval()
    frame = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = loaded.predict_action(frame, "open the drawer")
    shared = copy.deepcopy(loaded).share_memory()
    shared.prepare_for_inference()
    assert all(parameter.is_shared() for parameter in shared.parameters())
    flat = copy.deepcopy(loaded)
    flat.projector.fc1.weight.data = flat.projector.fc1.weight.data.flatten()
    flat.train().eval().prepare_for_inference()
    with torch.inference_mode():
        made = copy.deepcopy(loaded)
    made.prepare_for_inference()
    assert ordered(made) and all(parameter.is_inference() for parameter in made.parameters())
    np.testing.assert_allclose(made.predict_action(frame, "open the drawer"), expected, atol=1e-6)


@pytest.mark.parametrize(
    "capability, mkl, maker, expected",
    [
        ("AVX512", True, "vendor_id : AuthenticAMD", True),
        ("AVX512", True, "vendor_id : GenuineIntel", False),
        ("AVX512", True, "", False),
        ("AVX2", True, "vendor_id : AuthenticAMD", False),
        ("AVX512", False, "vendor_id : AuthenticAMD", False),
    ],
)
def test_where_it_was_measured(monkeypatch, capability, mkl, maker, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(products_openvla, "processor", lambda: maker)
    assert products_openvla.has_fast_products.__wrapped__() is expected


def test_the_system_tells_the_cpu():
    assert products_openvla.processor()


@onednn
@torch.no_grad()
def test_it_is_used_and_counted():
    hidden = torch.randn(9, 24)
    assert product_for(hidden) is onednn_linear
    layer = Linear(256, 672)
    hidden = torch.randn(9, 256)
    with FlopCounterMode(display=False) as counter:
        layer(hidden)
    assert counter.get_total_flops() == 2 * 9 * 256 * 672
