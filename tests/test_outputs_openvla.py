"""The cache under both names on every version of the library, without its warnings, also once the old name is gone."""

import copy
import logging
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from test_modeling_openvla import FULLGRAPH, small_config, small_inputs
from tiny import TINY
from transformers import DynamicCache, GenerationConfig, pipeline

from openvla import OpenVLAForActionPrediction, OpenVLAOutput
from openvla.outputs_openvla import CACHE, CACHE_NAMES
from openvla.training.strategies import checkpoint_activations


OTHER = next(name for name in CACHE_NAMES if name != CACHE)
GREEDY = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return OpenVLAForActionPrediction(small_config()).eval()


@pytest.fixture(autouse=True)
def no_deprecated_name():
    """Whatever the library says about names that it will drop is an error, by `warnings` or by its log."""

    class Refuse(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            # Pipelines of transformers before 5.23 say the second about themselves.
            if "deprecated" in message and not message.startswith("Passing `generation_config`"):
                raise AssertionError(message)

    handler = Refuse(level=logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    logging.Logger.warning_once.cache_clear()  # what was said once before is said again
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", "(?i).*(cache|past_key_values)")
        yield
    logger.removeHandler(handler)


def test_the_guard_sees_what_the_library_says():
    if CACHE == "past_key_values":
        pytest.skip("this transformers has one name only, and drops none")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    with pytest.raises(AssertionError, match="deprecated"):
        CausalLMOutputWithPast(past_key_values=DynamicCache())


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_output_under_both_names(name):
    logits, features, cache, other = torch.zeros(1, 2, 3), torch.ones(1, 4, 8), DynamicCache(), DynamicCache()
    output = OpenVLAOutput(logits=logits, projector_features=features, **{name: cache})
    assert output.cache is cache and output.past_key_values is cache
    for key in CACHE_NAMES:
        assert output[key] is cache and output.get(key) is cache and key in output
    assert [value is expected for value, expected in zip(output.to_tuple(), (logits, cache, features), strict=True)]
    assert list(output) == ["logits", CACHE, "projector_features"] and output[1] is cache and output[-1] is features
    assert output[:2][1] is cache

    for change in (lambda: setattr(output, name, other), lambda: output.__setitem__(name, cache)):
        before = output.cache
        change()
        assert output.cache is output.past_key_values is output[CACHE] is not before
    assert replace(output, logits=None).cache is output.cache
    for again in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(again) is OpenVLAOutput and list(again) == list(output)
        assert again.past_key_values is again.cache is not None
    flat, spec = torch.utils._pytree.tree_flatten(output)
    assert torch.utils._pytree.tree_unflatten(flat, spec).cache is not None

    empty = OpenVLAOutput(logits=logits)
    assert empty.cache is None and empty.past_key_values is None and empty.get(name, 5) == 5 and name not in empty
    assert OpenVLAOutput(None, logits, cache, None, None, features).cache is cache  # the published order
    assert OpenVLAOutput(cache=cache, past_key_values=cache).cache is cache
    with pytest.raises(ValueError, match="two names of one thing"):
        OpenVLAOutput(cache=cache, past_key_values=other)
    with pytest.raises(KeyError):
        empty[name]


def test_an_output_is_built_of_the_items_of_another():
    """accelerate does so with what a model returns in bf16, and torch when it gathers the outputs of replicas."""
    output = OpenVLAOutput(
        loss=torch.zeros(()), logits=torch.ones(1, 2, 3), cache=DynamicCache(), predicted=torch.ones(2)
    )
    output.projector_features = torch.ones(1, 4, 5)
    again = type(output)({name: value for name, value in output.items()})
    assert dict(again) == dict(output) and set(again) == {"loss", "logits", CACHE, "projector_features", "predicted"}


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_under_both_names(small_model, name):
    inputs, cache = small_inputs(), DynamicCache(config=small_model.config.text_config)
    with torch.inference_mode():
        expected = small_model(**inputs)
        first = small_model(**{key: value[:, :5] if value.ndim == 2 else value for key, value in inputs.items()},
                            **{name: cache}, use_cache=True)  # fmt: skip
        assert first.cache is first.past_key_values is cache
        rest = small_model(inputs["input_ids"][:, 5:], **{name: first[name]})
        torch.testing.assert_close(rest.logits[:, -1], expected.logits[:, -1])
        with pytest.raises(ValueError, match="two names of one thing"):
            small_model(**inputs, cache=cache, past_key_values=DynamicCache())
        loss, logits, given, features = small_model(
            **inputs, labels=inputs["input_ids"], return_dict=False, output_projector_features=True
        )
    torch.testing.assert_close(logits, expected.logits)
    assert given.get_seq_length() == 10 and features.shape == (2, 4, 32)


def test_positions_of_the_published_forward(small_model):
    """`forward(input_ids, attention_mask, pixel_values, labels, inputs_embeds, past_key_values, use_cache, ...)`."""
    inputs = small_inputs()
    with torch.inference_mode():
        output = small_model(*inputs.values(), None, None, DynamicCache(), False)
    assert output.logits.shape[1] == 10


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_under_both_names(small_model, name, options):
    inputs = small_inputs()
    given = {} if options else {name: DynamicCache(config=small_model.config.text_config)}
    output = small_model.generate(**inputs, **GREEDY, **options, **given, return_dict_in_generate=True)
    assert output.cache is output.past_key_values is output[name] and name in output and output.get(name) is not None
    assert not given or output.cache is given[name]
    copied = pickle.loads(pickle.dumps(output))
    assert torch.equal(copied.sequences, output.sequences) and type(copied) is type(output)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("again", [True, False], ids=["image given again", "image left out"])
def test_an_image_in_the_cache_is_still_seen(small_model, name, again):
    """Going on from a cache gives what one run gives, and depends on the image that only the cache holds."""
    inputs, other = small_inputs(), small_inputs()
    other["pixel_values"] = -3 * other["pixel_values"]
    complete = small_model.generate(**inputs, **{**GREEDY, "min_new_tokens": 6, "max_new_tokens": 6})
    scores = []
    for prompt in (inputs, other):
        first = small_model.generate(**prompt, **GREEDY, return_dict_in_generate=True)
        image = {"pixel_values": prompt["pixel_values"]} if again else {}
        rest = small_model.generate(
            first.sequences, **{name: first[name]}, **image, **GREEDY, return_dict_in_generate=True, output_scores=True
        )
        scores.append(rest.scores[0])
        if prompt is inputs:
            assert rest.sequences.tolist() == complete.tolist()
    assert not torch.allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("filled_by", ["generate", "forward"])
def test_another_image_than_that_in_the_cache(small_model, filled_by):
    """It would not be seen, and the old one be acted on."""
    inputs = small_inputs()
    if filled_by == "generate":
        first = small_model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        sequences, cache = first.sequences, first.cache
    else:
        with torch.inference_mode():
            cache = small_model(**inputs, use_cache=True).cache
        sequences = torch.cat([inputs["input_ids"], torch.full((2, 1), 9)], dim=1)
    for pixels in (-inputs["pixel_values"], inputs["pixel_values"][:1], inputs["pixel_values"].flip(0)):
        with pytest.raises(ValueError, match="cache holds another image"):
            small_model.generate(sequences, cache=cache, pixel_values=pixels, **GREEDY)
    small_model.generate(sequences, cache=cache, pixel_values=inputs["pixel_values"].double(), **GREEDY)


def test_an_image_beside_every_token(small_model):
    """A loop written against the published code, which did not look at images beside a cache."""
    inputs = small_inputs()
    pixels, token = inputs["pixel_values"], torch.full((2, 1), 9)
    with torch.inference_mode():
        found = []
        for image in ({}, {"pixel_values": pixels}):
            cache = small_model(**inputs, use_cache=True).cache
            found += [small_model(token, cache=cache, **image).logits for _ in range(2)]
        assert found[0].shape[1] == 1
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
        with pytest.raises(ValueError, match="cache holds another image"):
            small_model(token, pixel_values=-pixels, cache=cache)
        cache.crop(1 - cache.get_seq_length())  # before the image, which may enter again
        assert small_model(token, pixel_values=pixels, cache=cache).logits.shape[1] == 1 + small_model.num_patches


def test_an_image_after_text_in_the_cache(small_model):
    """It would be left out."""
    inputs = small_inputs()
    pixels = inputs.pop("pixel_values")
    with torch.inference_mode():
        cache = small_model(inputs["input_ids"][:, :3], use_cache=True).cache
    with pytest.raises(ValueError, match="no image, which comes right after the first"):
        small_model.generate(inputs["input_ids"], cache=cache, pixel_values=pixels, **GREEDY)


def test_prepare_inputs_for_generation(small_model):
    inputs = small_inputs()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.inference_mode():
        full = small_model(**inputs, use_cache=True).cache
    for cache, sees_image in ((full, False), (DynamicCache(config=small_model.config.text_config), True)):
        for names in ({"cache"}, {"past_key_values"}, set(CACHE_NAMES)):
            given = {name: cache if name in names else None for name in CACHE_NAMES}
            prepared = small_model.prepare_inputs_for_generation(
                ids, pixel_values=pixels, is_first_iteration=True, use_cache=True, **given
            )
            assert prepared[CACHE] is cache and OTHER not in prepared
            assert (prepared["pixel_values"] is not None) == sees_image
    later = small_model.prepare_inputs_for_generation(ids[:, -1:], pixel_values=pixels, use_cache=True, cache=full)
    assert later["pixel_values"] is None and later[CACHE] is full


def test_generate_takes_a_config_by_position(small_model):
    inputs = small_inputs()
    generated = small_model.generate(inputs.pop("input_ids"), GenerationConfig(**GREEDY), **inputs)
    assert generated.shape == (2, 9)


@pytest.mark.skipif(not FULLGRAPH, reason="Llama of transformers 5.4 compiled by torch 2.6 fails with a NameError")
def test_a_compiled_graph_returns_the_output():
    """The output class breaks no graph, as an output and as a tuple."""
    small_model = OpenVLAForActionPrediction(
        small_config(text_config={**small_config().text_config.to_dict(), "num_hidden_layers": 1})
    ).eval()
    inputs = small_inputs()
    patches = torch.full((2, 4), small_model.config.image_token_id)
    ids = torch.cat([inputs["input_ids"][:, :1], patches, inputs["input_ids"][:, 1:]], dim=1)
    compiled = torch.compile(small_model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        expected = small_model(ids, pixel_values=inputs["pixel_values"]).logits
        output = compiled(ids, pixel_values=inputs["pixel_values"])
        logits = compiled(ids, pixel_values=inputs["pixel_values"], return_dict=False)[0]
    torch._dynamo.reset()
    assert isinstance(output, OpenVLAOutput) and output.cache is output.past_key_values
    torch.testing.assert_close((output.logits, logits), (expected, expected))


def test_predict_and_pipeline_without_a_warning():
    checkpoint = TINY[0]
    model, processor = checkpoint.load(), checkpoint.processor()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert model.predict_action(image, "open the drawer", unnorm_key="bridge_orig").shape == (7,)

    ask = pipeline("image-text-to-text", model=model, processor=processor)
    prompt = processor.format_prompt("open the drawer")
    [answer] = ask(
        images=Image.fromarray(image), text=prompt, generate_kwargs={"generation_config": GenerationConfig(**GREEDY)}
    )
    assert answer["input_text"] == prompt and len(answer["generated_text"]) > len(prompt)


def test_one_training_step_without_a_warning(small_model):
    model = copy.deepcopy(small_model).train()
    checkpoint_activations(model)
    inputs = small_inputs()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert model.projector.fc1.weight.grad.abs().sum() > 0


# transformers 5.40 as far as it can be foreseen: every door by which 5.24 still lets the old name in is shut.
FUTURE = """
import transformers.utils.deprecation
transformers.utils.deprecation.deprecate_kwarg = lambda *args, **kwargs: lambda function: function
import transformers.utils.generic as generic
generic._rename_kwargs_for_bc = lambda kwargs: None
generic.ModelOutput._replace_old_cache_name = lambda self, key: key
del generic.ModelOutput.past_key_values, generic.ModelOutput.cache_params

from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
try:
    CausalLMOutputWithPast(past_key_values=1)
except TypeError:
    pass
else:
    raise AssertionError("this is not the future yet")
assert not hasattr(CausalLMOutputWithPast(), "past_key_values")
"""


def test_a_library_without_the_old_name():
    if CACHE == "past_key_values":
        pytest.skip("this transformers does not have the new name yet")
    program = FUTURE + (
        "import sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-k', sys.argv[1], *sys.argv[2:]]))\n"
    )
    chosen = "names or seen or prepare or predict or training_step"
    ran = processes.run(program, chosen, __file__, cwd=Path(__file__).parents[1], server="libraries")
    assert ran.returncode == 0, (ran.stdout[-4000:], ran.stderr[-2000:])
    assert " passed" in ran.stdout and "failed" not in ran.stdout
