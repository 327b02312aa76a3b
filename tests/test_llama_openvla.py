"""Steps of our own are those of the library: the same tokens, with the same probabilities, from whatever model."""

import copy
import functools
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from test_modeling_openvla import small_config, small_inputs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from openvla import OpenVLAForActionPrediction
from openvla.decoding_openvla import EagerSteps
from openvla.graphs_openvla import plain_decoding
from openvla.llama_openvla import _POOLS, CachePool, LlamaSteps, calls_of_llama, is_plain_llama
from openvla.policy import load_model
from openvla.products_openvla import of_library, take_fast_products


ROOT = Path(__file__).resolve().parents[1]


def new_model(seed: int = 0, **fields) -> OpenVLAForActionPrediction:
    torch.manual_seed(seed)
    model = OpenVLAForActionPrediction(small_config(**fields)).eval()
    with torch.no_grad():  # of the size of trained weights: logits that differ
        for parameter in model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def prompts(batch: int, seed: int = 0, padded: bool = False) -> dict[str, torch.Tensor]:
    """Random prompts and images; padded: of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    length = 6 + seed % 4
    ids = torch.randint(8, 60, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 0] = 1
    if padded:
        for row in range(batch):
            mask[row, length - row % 3 :] = 0
    pixels = torch.randn(batch, 6, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def check_equal(model, inputs, tolerance: float = 1e-5, **options) -> np.ndarray:
    """Tokens and details of both ways; the tokens."""
    found = model.predict_action(**inputs, return_dict=True, **options)
    with plain_decoding():
        expected = model.predict_action(**inputs, return_dict=True, **options)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    for name in ("token_probabilities", "token_entropies"):
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance)
    assert found.token_passes.tolist() == expected.token_passes.tolist()
    return found.token_ids


@pytest.fixture(scope="module")
def model():
    return new_model()


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
KINDS = {
    "eager": {"attn_implementation": "eager"},
    "grouped": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
}  # fmt: skip


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_tokens_are_those_of_the_library(kind, model):
    if kind is not None:
        fields = dict(KINDS[kind])
        attention = fields.pop("attn_implementation", "sdpa")
        model = new_model(text_config={**small_config().text_config.to_dict(), **fields})
        model.set_attn_implementation({"text_config": attention})
        assert model.language_model.config._attn_implementation == attention
    assert is_plain_llama(model.language_model)
    for seed in range(12 if kind is None else 4):  # four have every length, batch and padding
        for options in ({}, {"constrained": False}):
            check_equal(model, prompts(1 + seed % 4, seed, padded=seed % 2 == 1), **options)


def test_sampling_draws_the_same(model):
    for seed in range(3):
        options = {"do_sample": True, "temperature": 1.5, "top_k": 40}
        found = model.predict_action(**prompts(3, seed, True), **options, generator=torch.Generator().manual_seed(seed))
        with plain_decoding():
            again = torch.Generator().manual_seed(seed)
            assert found.tolist() == model.predict_action(**prompts(3, seed, True), **options, generator=again).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The same kernels, with the same roundings: but for the attention of a cache that is longer than it need be."""
    half = new_model().to(dtype)
    same = []
    for seed in range(8):
        inputs = prompts(2, seed, seed % 2 == 1)
        found = half.predict_action(**inputs, return_dict=True)
        with plain_decoding():
            expected = half.predict_action(**inputs, return_dict=True)
        same.append((found.token_ids == expected.token_ids).all(axis=1))
        first = found.token_ids[:, 0] == expected.token_ids[:, 0]
        np.testing.assert_allclose(
            found.token_probabilities[:, 0][first], expected.token_probabilities[:, 0][first], rtol=0.05
        )
    assert np.mean(same) >= 0.75


def test_what_the_library_computes_otherwise_is_left_to_it(model):
    """Modules that are watched, replaced or of another kind; a call of hidden states leaves nothing in the way."""
    language_model = model.language_model
    with torch.inference_mode():
        language_model(torch.tensor([[1, 5]]), output_hidden_states=True, output_attentions=False)
    assert is_plain_llama(language_model)
    for change in (
        lambda other: other.model.layers[1].register_forward_hook(lambda *_: None),
        lambda other: other.register_forward_pre_hook(lambda *_: None),
        lambda other: setattr(other, "forward", other.forward),
        lambda other: setattr(other.model.layers[0], "self_attn", torch.nn.Identity()),
        lambda other: setattr(other.model, "norm", torch.nn.LayerNorm(8)),
        lambda other: setattr(other.model.rotary_emb, "rope_type", "dynamic"),
        lambda other: setattr(other.config, "_attn_implementation", "flex_attention"),
        lambda other: setattr(other.config, "is_causal", False),
        lambda other: setattr(other.model.layers[1].self_attn, "is_causal", False),
    ):
        other = copy.deepcopy(language_model)
        assert is_plain_llama(other)
        change(other)
        assert not is_plain_llama(other)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)  # of all modules
    assert not is_plain_llama(language_model)
    handle.remove()
    assert is_plain_llama(language_model)
    for kind in ("mistral", "qwen2", "phi"):
        sizes = {name: getattr(small_config().text_config, name) for name in SIZES}
        other = new_model(text_config={"model_type": kind, **sizes})
        assert not is_plain_llama(other.language_model)
        assert other.predict_action(**prompts(2)).shape == (2, 7)


@pytest.mark.parametrize("kind", ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "LlamaDecoderLayer", "Linear", "sdpa"])
def test_a_function_of_the_library_that_is_replaced(kind, model, monkeypatch):
    """Of a class, for all its modules: predictions were those of the model without it."""
    model = copy.deepcopy(model)
    take_fast_products(model)
    before = model.predict_action(**prompts(2), return_dict=True)

    def smaller(function):
        def call(*given, **options):
            found = function(*given, **options)
            return (found[0] * 0.3, *found[1:]) if isinstance(found, tuple) else found * 0.3

        return call

    if kind == "sdpa":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, kind, smaller(ALL_ATTENTION_FUNCTIONS[kind]))
    else:
        replaced = getattr(llama, kind, torch.nn.Linear)
        monkeypatch.setattr(replaced, "forward", smaller(replaced.forward))
    assert check_equal(model, prompts(2)).tolist() != before.token_ids.tolist()


def test_a_function_that_was_replaced_before():
    """As by a script whose imports of openvla come last; what `kernels` makes of a function is the library's."""
    forward = llama.LlamaAttention.forward
    assert all(map(of_library, calls_of_llama()))
    for other in (functools.wraps(forward)(lambda *given: None), lambda *given: None, functools.partial(forward)):
        assert not of_library(other)
    of_kernels = type("Func", (torch.nn.Module,), {"__module__": "kernels.layer.func"})()
    assert of_library(of_kernels)


def test_prompts_that_see_what_comes_after_them(model):
    """A field of the library for every model: own steps were causal whatever it said."""
    causal = model.predict_action(**prompts(2), return_dict=True)
    text = {**small_config().text_config.to_dict(), "is_causal": False}
    other = OpenVLAForActionPrediction(small_config(text_config=text)).eval()
    other.load_state_dict(model.state_dict())
    found = check_equal(other, prompts(2))
    assert found.tolist() != causal.token_ids.tolist()


def test_fewer_layers_after_predictions_with_all(model):
    other, inputs = copy.deepcopy(model), prompts(2)
    check_equal(other, inputs)
    other.language_model.config.num_hidden_layers = 1
    check_equal(other, inputs)


def test_hooks_on_linear_layers_run(model):
    """Those are called as modules: adapters, quantization and whatever watches them."""
    seen = []
    handles = [
        module.register_forward_hook(lambda module, *_: seen.append(module))
        for module in model.language_model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        assert is_plain_llama(model.language_model)
        model.predict_action(**prompts(1))
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 7 * len(handles)


def test_adapters_loaded_switched_and_merged(model):
    adapted = copy.deepcopy(model)
    inputs = prompts(3, 1, True)
    before = check_equal(adapted, inputs)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    inject_adapter_in_model(lora, adapted)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert is_plain_llama(adapted.language_model)
    with_adapter = check_equal(adapted, inputs)
    assert with_adapter.tolist() != before.tolist()
    for layer in layers:
        layer.enable_adapters(False)
    assert check_equal(adapted, inputs).tolist() == before.tolist()
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    assert check_equal(adapted, inputs, 1e-4).tolist() == with_adapter.tolist()


def test_weights_that_change_between_predictions(model):
    """Nothing of a model is kept from one prediction to the next: cast, tied, resized, trained, other values."""
    changed = copy.deepcopy(model)
    inputs = prompts(2, 2)
    expected = check_equal(changed, inputs)
    changed.to(torch.bfloat16).to(torch.float64)
    check_equal(changed, inputs)
    changed.to(torch.float32)
    changed.load_state_dict(model.state_dict())
    assert check_equal(changed, inputs).tolist() == expected.tolist()
    with torch.no_grad():
        changed.language_model.model.layers[0].self_attn.k_proj.weight.neg_()
    assert check_equal(changed, inputs).tolist() != expected.tolist()
    changed.language_model.lm_head = torch.nn.Linear(*reversed(changed.language_model.lm_head.weight.shape), bias=False)
    check_equal(changed, inputs)
    changed.language_model.lm_head.weight = changed.get_input_embeddings().weight
    check_equal(changed, inputs)
    changed.resize_token_embeddings(changed.get_input_embeddings().num_embeddings + 8)
    check_equal(changed, inputs)
    changed.set_attn_implementation({"text_config": "eager"})
    check_equal(changed, inputs)


@pytest.mark.parametrize("rows", [70, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_an_output_layer_that_lacks_action_tokens(rows, bias, model):
    """Not silently the most probable of those that are there."""
    cut = copy.deepcopy(model)
    cut.set_output_embeddings(torch.nn.Linear(cut.llm_dim, rows, bias=bias))
    for way in (plain_decoding, nullcontext):
        with way(), pytest.raises(ValueError, match=rf"\(lm_head\) has {rows} rows, and action tokens end at 336"):
            cut.predict_action(**prompts(1))


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8", "bnb-int8", "bnb-nf4"])
def test_quantized_linear_layers_are_called(quantization):
    pytest.importorskip("bitsandbytes", reason="quantized loading needs the [quant] extra")
    model = load_model(str(ROOT), quantization=quantization, dtype="float32")
    assert is_plain_llama(model.language_model)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = model.predict_action(image, "open the drawer", return_dict=True)
    with plain_decoding():
        expected = model.predict_action(image, "open the drawer", return_dict=True)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, atol=0.02)


def test_two_models_and_many_threads():
    models = [new_model(0), new_model(1)]
    jobs = [(models[seed % 2], prompts(1 + seed % 3, seed, seed % 2 == 0)) for seed in range(24)]
    expected = [model.predict_action(**inputs).tolist() for model, inputs in jobs]
    assert expected[0] != models[1].predict_action(**jobs[0][1]).tolist()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: job[0].predict_action(**job[1]).tolist(), jobs * 2))
    assert found == expected * 2


def test_caches_are_kept_and_do_not_grow(model):
    model = copy.deepcopy(model)
    for batch in (3, 1, 2):
        model.predict_action(**prompts(batch))
    (cache,) = _POOLS[model.language_model]._free
    assert cache.shape[2] == 3  # it served the smaller batches as well
    gc.collect()
    before = sum(map(torch.is_tensor, gc.get_objects()))
    for seed in range(12):
        model.predict_action(**prompts(1 + seed % 3, seed))
    assert _POOLS[model.language_model]._free[0] is cache
    gc.collect()
    assert sum(map(torch.is_tensor, gc.get_objects())) <= before  # what other tests left behind may go meanwhile
    model.predict_action(**prompts(5))
    (larger,) = _POOLS[model.language_model]._free
    assert larger.shape[2] == 5
    model.to(torch.bfloat16).predict_action(**prompts(1))
    (cast,) = _POOLS[model.language_model]._free
    assert cast.dtype == torch.bfloat16
    pools = len(_POOLS)
    del model
    gc.collect()
    assert len(_POOLS) == pools - 1


def test_many_short_prompts_and_a_long_one_have_caches_of_their_own():
    """One for both had the largest batch in the largest length: of 7B 17 GB where both have 3.8."""
    pool, like = CachePool(), torch.zeros(())
    for shape in 2 * [(2, 2, 16, 4, 64, 8), (2, 2, 1, 4, 1024, 8), (2, 2, 2, 4, 64, 8), (2, 2, 1, 4, 512, 8)]:
        cache = pool.take(shape, like)
        assert all(there >= wanted for there, wanted in zip(cache.shape, shape))
        pool.give_back(cache)
    assert sorted(cache.shape[2:5] for cache in pool._free) == [(1, 4, 1024), (16, 4, 64)]


def test_a_cache_is_free_again_after_an_error(model, monkeypatch):
    model.predict_action(**prompts(1))
    kept = list(_POOLS[model.language_model]._free)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaSteps, "prefill", lambda self, token_ids=None: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.predict_action(**prompts(1))
    assert [id(cache) for cache in _POOLS[model.language_model]._free] == [id(cache) for cache in kept]


def test_steps_read_again_from_an_earlier_place(model):
    """Logits of tokens read together, and of tokens read once more behind others, are those of single steps."""
    inputs = small_inputs()
    from openvla.inputs_openvla import ModelInputs, check_prompts, place_patches
    from openvla.llama_openvla import open_steps

    rows = check_prompts(inputs["input_ids"], inputs["attention_mask"], model.config, model.num_patches)
    rows[0] = rows[0][:-2]  # padded
    with torch.inference_mode():
        given = ModelInputs(rows, inputs["pixel_values"])
        prefix = model.prefix(given, place_patches(given.prompts, model.config, model.num_patches, 5))
        tokens = torch.randint(100, 300, (2, 4))
        eager = EagerSteps(model.language_model, prefix, 5, (0, None))
        expected = [eager.prefill(), *(eager.step(tokens[:, n : n + 1], n) for n in range(4))]
        expected = torch.cat(expected, dim=1)
        with open_steps(model.language_model, prefix, 5, (0, None)) as steps:
            torch.testing.assert_close(steps.prefill(tokens), expected)
            steps.step(tokens.flip(1), 0)
            for begin in (0, 2, 3, 1):
                torch.testing.assert_close(steps.step(tokens[:, begin:], begin), expected[:, begin + 1 :])
