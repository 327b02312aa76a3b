"""Graphs of compiled kernels predict what the model does. Traced as for a GPU, and run by torch without a compiler."""

import copy
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_graphs import CHANGES, Again, check, details, lora, recordings  # noqa: F401 - a fixture that is used by all
from test_llama_openvla import new_model, prompts

from openvla import compiled_openvla, float8_linear_openvla
from openvla.compiled_openvla import side_by_side, weights_of
from openvla.float8_linear_openvla import round_to_float8
from openvla.quantization_openvla import LINEARS, OpenVLAQuantizationConfig, quantize_linears
from openvla.token_head_openvla import moved


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(compiled_openvla, "BACKEND", "eager")


def told(prediction):
    """As `moved` takes them."""
    tokens = prediction.token_distributions.shape[-1]
    return prediction.token_ids.reshape(1, -1), prediction.token_distributions.reshape(1, -1, tokens)


def prepared(model, **sizes):
    done = model.prepare_for_inference(compile=True, **sizes)
    assert done.compiled and not done.reason, done.reason
    return done


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 1}, {"attn_implementation": "eager"}])
def test_tokens_are_those_of_the_model(fields):
    plain = new_model(**fields)
    model = copy.deepcopy(plain)
    done = prepared(model, batch_sizes=(1, 3), prompt_buckets=(12,))
    assert done.graphs == [(1, 12), (3, 12)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(4):
            for batch in (1, 3):
                inputs = prompts(batch, seed, padded=seed % 2 == 1)
                found = check(model, plain, inputs, 1)
                draft = found.token_ids if batch > 1 else found.token_ids[None]
                check(model, plain, inputs, 1, draft=draft)
                draft = draft.copy()
                draft[:, 2] = 150
                check(model, plain, inputs, draft=draft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings_are_those_of_graphs_that_are_not_compiled(dtype):
    model = new_model().to(dtype)
    other = copy.deepcopy(model)
    prepared(model, prompt_buckets=[16])
    other.prepare_for_inference(prompt_buckets=[16])
    for seed in range(4):
        found, expected = (details(one, prompts(1, seed), return_distributions=True) for one in (model, other))
        # Attention of one token alone adds up in float32.
        assert moved(told(found), told(expected)) < 0.05
        found, expected = (details(one, prompts(1, seed), draft=expected.token_ids[None]) for one in (model, other))
        assert found.token_probabilities.tolist() == expected.token_probabilities.tolist()


def test_weights_lie_side_by_side_and_are_the_same(tmp_path):
    plain = new_model()
    model = copy.deepcopy(plain)
    prepared(model, prompt_buckets=[16])
    attention = model.language_model.model.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    places = [module.weight.data_ptr() for module in projections]
    together = side_by_side(projections)
    assert together.data_ptr() == places[0] and torch.equal(together, torch.cat([part.weight for part in projections]))
    prepared(model, batch_sizes=(1, 2), prompt_buckets=[16])
    assert [module.weight.data_ptr() for module in projections] == places
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}  # a CPU may have turned some
    save_file(state, tmp_path / "state.safetensors")
    check(copy.deepcopy(model), plain, prompts(1), 0)  # which has no graphs


def test_weights_that_were_made_in_inference_mode():
    """They became weights that nothing could read any more."""
    plain = new_model()
    with torch.inference_mode():
        model = copy.deepcopy(plain)
    prepared(model, prompt_buckets=[16])
    check(model, plain, prompts(1), 1)


def test_weights_still_learn_and_move():
    plain = new_model()
    model = copy.deepcopy(plain)
    prepared(model, prompt_buckets=[16])
    for one in (model, plain):
        loss = one(**prompts(1), labels=prompts(1)["input_ids"]).loss
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    check(model, plain, prompts(1), 1)  # values have changed where they are
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    CHANGES["cast back"](model)
    with pytest.warns(UserWarning, match="is not what prepare_for_inference recorded"):
        assert details(model, prompts(1)).token_ids.tolist() == details(plain, prompts(1)).token_ids.tolist()
    prepared(model, prompt_buckets=[16])
    check(model, plain, prompts(1), 1)


def quantized(model):
    quantize_linears(model, OpenVLAQuantizationConfig("fp8"))


def bias(model):
    model.language_model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(1))


def gelu(model):
    model.language_model.config.hidden_act = "gelu"


@pytest.mark.parametrize(
    "change, reason", [(quantized, "quantized"), (lora, "adapted"), (bias, "biases"), (gelu, "MLP")]
)
def test_what_is_not_compiled_has_graphs_as_without(change, reason):
    model = new_model()
    change(model)
    plain = copy.deepcopy(model)
    done = model.prepare_for_inference(prompt_buckets=[16], compile=True)
    assert not done.compiled and done.graphs and reason in done.reason
    if change is not bias:  # which torch cannot add
        check(model, plain, prompts(1), 1)


def test_float8(monkeypatch):
    """As on a GPU that multiplies such, with a product of the same roundings."""

    def product(rows, weight, scale, one):
        small, factor = round_to_float8(rows)
        return ((small.float() * factor) @ (weight.float() * scale[:, None]).T).bfloat16()

    for module in (float8_linear_openvla, compiled_openvla):
        monkeypatch.setattr(module, "product_of_float8", product)
    monkeypatch.setattr(float8_linear_openvla, "multiplies_float8", lambda device: True)
    plain = new_model().to(torch.bfloat16)
    quantize_linears(plain, OpenVLAQuantizationConfig("fp8"))
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    prepared(model, prompt_buckets=[16])
    other.prepare_for_inference(prompt_buckets=[16])
    for seed in range(3):
        found, expected = (details(one, prompts(1, seed), return_distributions=True) for one in (model, other))
        assert moved(told(found), told(expected)) < 0.05
        found, expected = (details(one, prompts(1, seed), draft=expected.token_ids[None]) for one in (model, other))
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.token_probabilities.tolist() == expected.token_probabilities.tolist()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("bits", [8, "fp8"])
def test_products_of_few_bits_are_those_of_their_weights(bits, count, monkeypatch):
    monkeypatch.setattr(
        compiled_openvla, "product_of_float8",
        lambda rows, weight, scale, one: (rows.double() @ (weight.double() * scale[:, None]).T).float(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    layers = [LINEARS[bits](128, width, bias=False) for width in (24, 16)]
    for layer in layers:
        layer.load_state_dict(layer.quantize(torch.randn(layer.out_features, 128, generator=generator)))
    values = torch.randn(1, count, 128, generator=generator).bfloat16()
    found = compiled_openvla._product(values, weights_of(*layers), [24, 16])
    for product, layer in zip(found, layers):
        expected = values.double() @ layer.dequantize(torch.float32).double().T
        assert product.dtype == torch.bfloat16 and product.shape == expected.shape
        error = (product.double() - expected).norm() / expected.norm()
        assert error < 0.01


def test_without_a_compiler(monkeypatch):
    def missing(graph, inputs):
        raise ImportError("there is no triton")

    monkeypatch.setattr(compiled_openvla, "BACKEND", missing)
    plain = new_model()
    model = copy.deepcopy(plain)
    done = model.prepare_for_inference(prompt_buckets=[16], compile=True)
    assert done.graphs and not done.compiled and "cannot be compiled" in done.reason and "triton" in done.reason
    check(model, plain, prompts(1), 1)
    with pytest.raises(ValueError, match="compile='yes'"):
        model.prepare_for_inference(compile="yes")


def test_more_sizes_than_torch_compiles_by_default():
    """Of one function: eight, or as many as torch is told; here two."""
    from torch._dynamo import config as dynamo_config  # half a second

    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    plain = new_model()
    model = copy.deepcopy(plain)
    buckets = (8, 9, 10)
    with warnings.catch_warnings(), dynamo_config.patch({limit: 2}):
        warnings.simplefilter("error")
        prepared(model, prompt_buckets=buckets)
    check(model, plain, prompts(1, 3), 1)
    assert Again.recorded == 3 * len(buckets)
    np.testing.assert_equal(details(model, prompts(1)).actions.shape, (7,))
