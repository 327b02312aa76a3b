"""The model beyond parity: the image matters, padding does not, and everything the library's models can do works."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from tiny import TINY, golden_image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    set_seed,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import openvla
from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.configuration_openvla import TRANSFORMERS
from openvla.decoding_openvla import decode_tokens
from openvla.graphs_openvla import plain_decoding
from openvla.vision_openvla import PatchProjection


# Llama of transformers 5.4 cannot be captured as one graph by torch 2.6.
FULLGRAPH = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)
INSTRUCTIONS = ["open the drawer", "push the puck to the goal", "pick up the cup"]


def small_config(**fields) -> OpenVLAConfig:
    """Two towers of four patches, a two-layer language model."""
    tower = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    arguments = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_sizes": [28, 28],
        "timm_model_kwargs": [{**tower, "init_values": 0.1}, tower],
        "text_config": {
            "vocab_size": 400,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "empty_token_id": 7,
        "norm_stats": {"robot": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
        **fields,
    }
    return OpenVLAConfig(**arguments)


def small_inputs(batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(8, 80, (batch, length), generator=generator)
    input_ids[:, 0] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch, 6, 28, 28, generator=generator),
    }


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return OpenVLAForActionPrediction(small_config()).eval()


def batch_of(processor, side: str = "right") -> dict[str, torch.Tensor]:
    images = [golden_image(index) for index in range(len(INSTRUCTIONS))]
    return processor(processor.format_prompt(INSTRUCTIONS), images, padding_side=side)


# The image always matters (openvla issue 346: since transformers 4.50 the published code ignores it silently)


def test_the_image_matters(tiny_model, tiny_processor):
    prompt = tiny_processor.format_prompt("open the drawer")
    black, white = (tiny_processor(prompt, np.full((64, 64, 3), level, dtype=np.uint8)) for level in (0, 255))
    with torch.inference_mode():
        logits = [tiny_model(**inputs).logits for inputs in (black, white)]
    assert not torch.allclose(*logits, atol=0.1)
    generated = [tiny_model.generate(**inputs, max_new_tokens=7, do_sample=False) for inputs in (black, white)]
    assert not torch.equal(*generated)
    for constrained in (True, False):
        actions = [
            tiny_model.predict_action(**inputs, unnorm_key="bridge_orig", constrained=constrained)
            for inputs in (black, white)
        ]
        assert not np.array_equal(*actions)


# forward


def test_padding_changes_nothing(tiny_model, tiny_processor):
    with torch.inference_mode():
        for side in ("left", "right"):
            batch = batch_of(tiny_processor, side)
            output = tiny_model(**batch)
            assert output.logits.shape[:2] == (3, 256 + batch["input_ids"].shape[1])
            expanded = torch.nn.functional.pad(batch["attention_mask"], (256, 0), value=1)
            if side == "left":  # padding stays in front of the first token, patches follow it
                expanded = torch.cat([batch["attention_mask"], torch.ones(3, 256, dtype=torch.long)], dim=1)
            for row in range(3):
                real = batch["attention_mask"][row].bool()
                alone = tiny_model(batch["input_ids"][row][real][None], pixel_values=batch["pixel_values"][row][None])
                torch.testing.assert_close(
                    output.logits[row][expanded[row].bool()][-5:], alone.logits[0][-5:], rtol=0, atol=2e-3
                )


@pytest.mark.parametrize("size", [56, (60, 45)], ids=str)
def test_patches_are_embedded_as_by_the_convolution(size):
    """Also where pixels at the right and below fill no patch, as at 384 pixels."""
    pixels = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)), requires_grad=True)
    product = PatchProjection(3, 16, kernel_size=14, stride=14)
    convolution = torch.nn.Conv2d(3, 16, kernel_size=14, stride=14)
    convolution.load_state_dict(product.state_dict())
    torch.testing.assert_close(product(pixels), convolution(pixels), atol=1e-5, rtol=1e-5)
    for module in (product, convolution):
        module(pixels).square().sum().backward()
    torch.testing.assert_close(product.weight.grad, convolution.weight.grad, atol=1e-3, rtol=1e-4)


def test_inputs_embeds_and_tuple_output(small_model):
    inputs = small_inputs()
    with torch.inference_mode():
        reference = small_model(**inputs, labels=inputs["input_ids"])
        embeds = small_model.get_input_embeddings()(inputs["input_ids"])
        other = {name: value for name, value in inputs.items() if name != "input_ids"}
        torch.testing.assert_close(small_model(inputs_embeds=embeds, **other).logits, reference.logits)
        loss, logits, *_ = small_model(**inputs, labels=inputs["input_ids"], return_dict=False)
    torch.testing.assert_close((loss, logits), (reference.loss, reference.logits))


def test_hidden_states_and_attentions():
    model = OpenVLAForActionPrediction._from_config(small_config(), attn_implementation="eager").eval()
    with torch.inference_mode():
        output = model(**small_inputs(), output_hidden_states=True, output_attentions=True, use_cache=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 10, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 10, 10)] * 2
    assert output.past_key_values.get_seq_length() == 10
    assert output.projector_features.shape == (2, 4, 32)


def test_labels_shifted_by_the_caller(small_model):
    """`shift_labels`, which sequence parallel training gives, with patches inserted in rows padded on the left."""
    inputs = small_inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    labels = inputs["input_ids"].clone()
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    with torch.inference_mode():
        expected = small_model(**inputs, labels=labels).loss
        zeros, expanded = torch.zeros_like(labels), torch.full((2, 10), -100)
        loss = small_model(**inputs, labels=zeros, shift_labels=shifted).loss
        expanded[0, :2], expanded[0, 6:], expanded[1, 4:] = shifted[0, :2], shifted[0, 2:], shifted[1]
        counted = small_model(**inputs, labels=zeros, shift_labels=expanded).loss
    torch.testing.assert_close((loss, counted), (expected, expected))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("part", [None, "text_config"], ids=["config", "text_config"])
def test_what_a_config_asks_for_a_call_may_refuse(part, name):
    model = OpenVLAForActionPrediction._from_config(small_config(), attn_implementation="eager").eval()
    setattr(model.config if part is None else model.config.text_config, name, True)
    field = name.removeprefix("output_")
    with torch.inference_mode():
        assert model(**small_inputs())[field] is not None
        assert model(**small_inputs(), **{name: False}).get(field) is None


def test_placeholders_give_what_plain_prompts_give(small_model):
    inputs = small_inputs()
    placeholders = torch.full((2, 4), small_model.config.image_token_id)
    expanded = torch.cat([inputs["input_ids"][:, :1], placeholders, inputs["input_ids"][:, 1:]], dim=1)
    with torch.inference_mode():
        plain, explicit = (
            small_model(ids, pixel_values=inputs["pixel_values"]) for ids in (inputs["input_ids"], expanded)
        )
        kept = small_model(expanded, pixel_values=inputs["pixel_values"], logits_to_keep=2)
    torch.testing.assert_close(plain.logits, explicit.logits)
    torch.testing.assert_close(kept.logits, plain.logits[:, -2:])


@pytest.mark.parametrize("head", ["tokens", "parallel_tokens", "diffusion"])
def test_another_default_device(head):
    """Rows of placeholders were looked for on the host, where `torch.set_default_device("cuda")` had not left them."""
    model = OpenVLAForActionPrediction(small_config(action_head=head, action_dim=7)).eval()
    inputs = small_inputs()
    ids, image = inputs["input_ids"], torch.full((2, model.num_patches), model.config.image_token_id)
    given = {"input_ids": torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1), "pixel_values": inputs["pixel_values"]}
    expected = model.predict_action(**given, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        found = model.predict_action(**given, generator=torch.Generator("cpu").manual_seed(0))
    assert np.array_equal(found, expected)


def test_the_last_block_is_not_run(small_model, monkeypatch):
    for tower in small_model.vision_backbone.towers:
        monkeypatch.setattr(tower.blocks[-1], "forward", None)
    small_model(**small_inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_checkpoint, tiny_processor, dtype):
    model = tiny_checkpoint.load(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    action = model.predict_action(golden_image(0), "open the drawer", unnorm_key="bridge_orig")
    assert action.shape == (7,) and np.isfinite(action).all()


def test_flex_attention(small_model, monkeypatch):
    model = OpenVLAForActionPrediction._from_config(small_config(), attn_implementation="flex_attention").eval()
    model.load_state_dict(small_model.state_dict())
    inputs = small_inputs()
    inputs["attention_mask"][1, -2:] = 0
    # Not compiled: that would need a C++ compiler on the machine. Nor asked for, which takes two seconds of imports.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        flex, reference = model(**inputs).logits, small_model(**inputs).logits
    torch.testing.assert_close(flex[0], reference[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flex[1, :-2], reference[1, :-2], rtol=1e-4, atol=1e-4)


def flash_attention_reference(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash_attention_2 computes from what it is given: causal to the lower right, padding as a 2-D mask."""
    assert attention_mask is None or attention_mask.ndim == 2
    length, total = query.shape[2], key.shape[2]
    allowed = torch.ones(length, total, dtype=torch.bool).tril(total - length)[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, -total:].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_gets_the_masks_it_needs(small_model, monkeypatch, side):
    """The kernels need a GPU; what they are handed gives the result of sdpa, in forward and predict_action."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention_reference)
    model = OpenVLAForActionPrediction(small_config()).eval()
    model.load_state_dict(small_model.state_dict())
    for config in (model.config, model.config.text_config, model.language_model.config):
        config._attn_implementation_internal = "flash_attention_2"  # past the check that the package is there
    inputs = small_inputs()
    inputs["attention_mask"][1, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    padded = torch.ones(2, 10, dtype=torch.bool)
    padded[1, slice(0, 2) if side == "left" else slice(-2, None)] = False
    with torch.inference_mode():
        flash, reference = model(**inputs).logits, small_model(**inputs).logits
    torch.testing.assert_close(flash[padded], reference[padded], rtol=1e-4, atol=1e-4)
    assert model.predict_action(**inputs).tolist() == small_model.predict_action(**inputs).tolist()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(tmp_path, small_model, device_map):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    small_model.save_pretrained(tmp_path)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path, device_map=device_map)
    inputs = small_inputs()
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, small_model(**inputs).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(small_config()).train()
    inputs = small_inputs()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.23
    getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.vision_backbone.gradient_checkpointing and model.language_model.model.gradient_checkpointing
    torch.testing.assert_close(gradients(), expected)
    getattr(model, f"{switch}_checkpointing_disable")()
    assert not model.vision_backbone.gradient_checkpointing


def test_forward_errors(small_model):
    inputs = small_inputs()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small_model(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="1 image.* 2 prompt"):
        small_model(inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])


# Loading, saving, initialization


def test_state_dict_is_the_published_one(tiny_checkpoint, tiny_model, tmp_path):
    from safetensors.torch import load_file

    published = load_file(tiny_checkpoint.folder / "model.safetensors")
    tiny_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(published)
    for name, tensor in published.items():
        assert torch.equal(saved[name], tensor), name
    statistics = json.loads((tiny_checkpoint.folder / "dataset_statistics.json").read_text())
    assert json.loads((tmp_path / "dataset_statistics.json").read_text()) == statistics


def test_statistics_beside_the_weights_win(tmp_path, small_model):
    small_model.save_pretrained(tmp_path)
    other = {"mine": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(other))
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path).norm_stats == other
    (tmp_path / "dataset_statistics.json").unlink()
    assert set(OpenVLAForActionPrediction.from_pretrained(tmp_path).norm_stats) == {"robot"}


def test_every_tensor_is_initialized():
    """Two models of one seed agree, two of different seeds differ, and nothing is left as memory happened to be."""
    states = []
    for seed in (0, 0, 1):
        set_seed(seed)
        with torch.device("meta"):
            model = OpenVLAForActionPrediction(small_config())
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        model.init_weights()
        states.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    for name, tensor in states[0].items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, states[1][name]), name
        constant = tensor.numel() == 1 or bool((tensor == tensor.flatten()[0]).all())
        assert constant or not torch.equal(tensor, states[2][name]), name
        assert tensor.abs().max() < 3, name
    assert states[0]["vision_backbone.featurizer.blocks.0.ls1.scale_factor"].unique().tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText, openvla.AutoModelForVision2Seq])
def test_auto_classes(auto, tiny_checkpoint):
    """Published folders name code of their own, which is not there: this package stands in for it."""
    options = {"timm_model_kwargs": tiny_checkpoint.timm_model_kwargs, "low_cpu_mem_usage": True}
    if auto is openvla.AutoModelForVision2Seq or TRANSFORMERS >= (5, 5):  # transformers 5.4 would run the folder's code
        options["trust_remote_code"] = True
    model = auto.from_pretrained(
        str(tiny_checkpoint.folder), attn_implementation="sdpa", torch_dtype=torch.float32, **options
    )
    assert isinstance(model, OpenVLAForActionPrediction)


@pytest.mark.parametrize("auto", [AutoProcessor, AutoImageProcessor])
def test_auto_processors(auto, tiny_checkpoint):
    options = {"trust_remote_code": True} if TRANSFORMERS >= (5, 5) else {}
    expected = openvla.OpenVLAProcessor if auto is AutoProcessor else openvla.OpenVLAImageProcessor
    assert type(auto.from_pretrained(str(tiny_checkpoint.folder), **options)) is expected


# generate


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_generate(small_model, options):
    inputs = small_inputs()
    generated = small_model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options)
    sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
    rows = 2 * options.get("num_return_sequences", 1)
    assert sequences.shape == (rows, 6 + 4)
    assert torch.equal(sequences[:, :6], inputs["input_ids"].repeat_interleave(rows // 2, dim=0))
    if options.get("do_sample") is False:
        torch.testing.assert_close(sequences, small_model.generate(**inputs, max_new_tokens=4, min_new_tokens=4))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_with_prompts_of_different_lengths(tiny_model, tiny_processor, options):
    """Padded on the right, as the published processor does: the answer followed padding, and the library only logs."""
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    alone = [
        tiny_model.generate(**tiny_processor(tiny_processor.format_prompt(text), golden_image(row)), **options)
        for row, text in enumerate(INSTRUCTIONS)
    ]
    expected = torch.cat([answers[:, -5:] for answers in alone]).tolist()
    for side in ("left", "right"):
        batch = batch_of(tiny_processor, side)
        length, mask = batch["input_ids"].shape[1], batch["attention_mask"]
        for more in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, {"return_dict_in_generate": True}):
            together = tiny_model.generate(**batch, **options, **more)
            together = together if isinstance(together, torch.Tensor) else together.sequences
            assert together[:, -5:].tolist() == expected
            prompts = batch["input_ids"].repeat_interleave(len(together) // 3, dim=0)
            assert torch.equal(together[:, :length], prompts)  # as they were given


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_in_every_form(tiny_model, tiny_processor, side):
    """Embeddings, placeholders, the caller's own cache, and a cache that goes on: of padding on the right some followed
    padding, and what went on from a cache looked at padding there in the place of words."""
    plain, options = batch_of(tiny_processor, side), {"do_sample": False}
    ids, mask, pixels = (plain[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    expected = [
        tiny_model.generate(row[own.bool()][None], pixel_values=image[None], max_new_tokens=4, **options)[0, -4:]
        for row, own, image in zip(ids, mask, pixels)
    ]
    plain = {**plain, **options}
    embeds = tiny_model.get_input_embeddings()(ids)
    several = [
        tiny_model.generate(**{**plain, **more}, max_new_tokens=4)
        for more in (
            {},
            {"attention_mask": mask.bool()},
            {"past_key_values": DynamicCache()},
            {"inputs_embeds": embeds},
            {"inputs_embeds": embeds, "input_ids": None},
        )
    ]
    cache = StaticCache(config=tiny_model.config.text_config, max_cache_len=320)
    more = torch.ones(3, 2, dtype=torch.long)
    for _ in range(2):  # the second time in one that was emptied
        cache.reset()
        half = tiny_model.generate(**plain, past_key_values=cache, max_new_tokens=2)
        rest = {"attention_mask": torch.cat([mask, more], dim=1), "past_key_values": cache, **options}
        several.append(tiny_model.generate(half, **rest, max_new_tokens=2))
    twice = tiny_model.generate(
        **{**plain, "do_sample": True}, num_return_sequences=2, max_new_tokens=2, return_dict_in_generate=True
    )
    mask_of_all = torch.cat([mask, more], dim=1).repeat_interleave(2, dim=0)
    rest = {"attention_mask": mask_of_all, "max_new_tokens": 1, **options}
    afresh = tiny_model.generate(twice.sequences, **rest, pixel_values=pixels.repeat_interleave(2, dim=0))
    assert torch.equal(tiny_model.generate(twice.sequences, **rest, past_key_values=twice.past_key_values), afresh)
    if side == "right":  # the image follows the first token
        with pytest.raises(ValueError, match="answers to 3 prompts .* and 2 are given"):
            rest = {**rest, "attention_mask": mask_of_all[:2], "past_key_values": twice.past_key_values}
            tiny_model.generate(twice.sequences[:2], **rest)
        image = torch.full((3, tiny_model.num_patches), tiny_model.config.image_token_id)
        ids, mask = (torch.cat([v[:, :1], p, v[:, 1:]], dim=1) for v, p in ((ids, image), (mask, image.ne(-1))))
        several.append(tiny_model.generate(ids, **options, pixel_values=pixels, attention_mask=mask, max_new_tokens=4))
    for answers in several:
        assert answers[:, -4:].tolist() == torch.stack(expected).tolist()


def test_assisted_generation(small_model):
    inputs = {name: value[:1] for name, value in small_inputs().items()}
    plain = small_model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assisted = small_model.generate(**inputs, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)
    assert plain.tolist() == assisted.tolist()


def test_generate_without_an_image(small_model):
    inputs = small_inputs()
    del inputs["pixel_values"]
    assert small_model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (2, 9)


def test_generate_from_inputs_embeds(small_model):
    inputs = small_inputs()
    expected = small_model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    input_ids = inputs.pop("input_ids")
    embeds = small_model.get_input_embeddings()(input_ids)
    generated = small_model.generate(
        inputs_embeds=embeds, **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert generated.tolist() == expected[:, 6:].tolist()
    # Patches do not count in the length that is asked for, as little as with ids.
    lengths = {"max_length": 10, "min_length": 10, "do_sample": False}
    generated = small_model.generate(inputs_embeds=embeds, **inputs, **lengths)
    assert generated.tolist() == expected[:, 6:].tolist()
    # With the ids beside them, which come back.
    for options in ({"attention_mask": inputs.pop("attention_mask")}, {}):
        generated = small_model.generate(input_ids, inputs_embeds=embeds, **inputs, **options, **lengths)
        assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("settings", ["model", "option", "config"])
def test_generate_finds_padding_without_a_mask(small_model, settings):
    """As it does without an image; patches would enter behind the padding and not behind BOS."""
    inputs = small_inputs()
    inputs["input_ids"][0, :3], pad = torch.tensor([0, 0, 1]), {"pad_token_id": 0}
    inputs["attention_mask"][0, :2] = 0
    length = {"max_new_tokens": 4, "do_sample": False}
    expected = small_model.generate(**inputs, **length)
    del inputs["attention_mask"]
    options = {
        "model": length,
        "option": length | pad | {"eos_token_id": torch.tensor([2, 3])},
        "config": {"generation_config": GenerationConfig(**length, **pad)},
    }
    assert small_model.generate(**inputs, **options[settings]).tolist() == expected.tolist()
    # A token that begins prompts is no padding.
    assert small_model.generate(**inputs, **length, pad_token_id=1).tolist() != expected.tolist()


def test_generate_goes_on_from_a_cache(small_model):
    inputs = small_inputs()
    options = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    whole = small_model.generate(**inputs, **{**options, "min_new_tokens": 6, "max_new_tokens": 6})
    first = small_model.generate(**inputs, **options, return_dict_in_generate=True)
    rest = small_model.generate(
        first.sequences, past_key_values=first.past_key_values, pixel_values=inputs["pixel_values"], **options
    )
    assert rest.tolist() == whole.tolist()


def test_lengths_count_text_only(small_model):
    inputs = small_inputs()
    for config in (GenerationConfig(max_length=9, min_length=9), GenerationConfig(max_new_tokens=3, min_new_tokens=3)):
        assert small_model.generate(**inputs, generation_config=config, do_sample=False).shape == (2, 9)
    # Of the model, which a given config leaves open.
    model = copy.copy(small_model)
    model.generation_config = GenerationConfig(max_length=9, min_length=9, pad_token_id=0)
    for options in ({"do_sample": False}, {"generation_config": GenerationConfig(do_sample=False)}):
        assert model.generate(**inputs, **options).shape == (2, 9)


def test_position_ids_of_a_plain_prompt(small_model):
    inputs = small_inputs()
    position_ids = torch.arange(6)[None].expand(2, -1)
    with torch.inference_mode():
        torch.testing.assert_close(
            small_model(**inputs, position_ids=position_ids).logits, small_model(**inputs).logits
        )


def test_parts_may_be_compiled(small_model, tmp_path):
    """Another module takes the place of a part, which has no mode of its own, and names of tensors grow."""
    model, inputs = copy.deepcopy(small_model).train(), small_inputs()
    expected = model.predict_action(**inputs)
    with torch.compiler.set_stance("force_eager"):
        for name in ("vision_backbone", "language_model"):
            setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
        for mode in (False, True):
            assert np.array_equal(model.train(mode).predict_action(**inputs), expected)
            assert all(module.training == mode for module in model.modules())
    for options in ({}, {"state_dict": model.state_dict()}):  # with names that have grown
        model.save_pretrained(tmp_path, **options)
        loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path)
        assert np.array_equal(loaded.predict_action(**inputs), expected)
    assert all(type(part).__name__ == "OptimizedModule" for part in (model.vision_backbone, model.language_model))


def test_a_compiled_graph_cannot_lose_the_image(small_model):
    """A captured graph cannot look for placeholders; it fails on a long plain prompt rather than ignore its image."""
    compiled = torch.compile(small_model, backend="eager", fullgraph=FULLGRAPH)
    with torch.inference_mode(), pytest.raises((RuntimeError, ValueError), match="(?i)assert|placeholders"):
        compiled(**small_inputs())
    torch._dynamo.reset()


def test_static_cache_in_forward(small_model):
    inputs = small_inputs()
    cache = StaticCache(config=small_model.config.text_config, max_cache_len=16)
    with torch.inference_mode():
        cached = small_model(**inputs, past_key_values=cache).logits
        torch.testing.assert_close(cached, small_model(**inputs).logits, rtol=1e-4, atol=1e-5)


# predict_action


def test_batches_equal_single_predictions(tiny_model, tiny_processor):
    images = [golden_image(index) for index in range(3)]
    options = {"unnorm_key": "bridge_orig", "return_dict": True}
    batch = tiny_model.predict_action(images, INSTRUCTIONS, **options)
    assert batch.actions.shape == (3, 7) and batch.actions.dtype == np.float64
    published = [tiny_model.predict_action(**batch_of(tiny_processor, side), **options) for side in ("left", "right")]
    for row in range(3):
        alone = tiny_model.predict_action(images[row], INSTRUCTIONS[row], **options)
        assert alone.actions.shape == (7,)
        for prediction in (batch, *published):
            assert prediction.token_ids[row].tolist() == alone.token_ids.tolist()
            assert prediction.actions[row].tolist() == alone.actions.tolist()
            np.testing.assert_allclose(prediction.token_probabilities[row], alone.token_probabilities, atol=1e-3)


def test_a_list_of_one_is_a_batch_of_one(tiny_model):
    assert tiny_model.predict_action([golden_image(0)], ["stop"], unnorm_key="bridge_orig").shape == (1, 7)


def test_one_unnorm_key_per_sample():
    norm_stats = {name: {"action": {"q01": [0.0] * 7, "q99": [high] * 7}} for name, high in (("a", 1.0), ("b", 5.0))}
    model = OpenVLAForActionPrediction(small_config(norm_stats=norm_stats)).eval()
    inputs = small_inputs()
    actions = model.predict_action(**inputs, unnorm_key=["a", "b"])
    for row, key in enumerate("ab"):
        assert actions[row].tolist() == model.predict_action(**inputs, unnorm_key=key)[row].tolist()
    assert actions[0].max() <= 1 < actions[1].max()


def test_the_empty_token_is_added_per_row(tiny_model, tiny_processor):
    prompts = tiny_processor.format_prompt(INSTRUCTIONS[:2])
    prompts[1] += " "  # this one ends in ▁ already
    images = [golden_image(0)] * 2
    batch = tiny_model.predict_action(**tiny_processor(prompts, images), unnorm_key="bridge_orig")
    for row in range(2):
        alone = tiny_model.predict_action(images[0], INSTRUCTIONS[row], unnorm_key="bridge_orig")
        assert batch[row].tolist() == alone.tolist()


def test_only_action_tokens_become_actions(tiny_checkpoint):
    """Goldens where the original turned text tokens into motion; restricted decoding never does."""
    model, processor = tiny_checkpoint.load(), tiny_checkpoint.processor()
    first, end = model.action_tokenizer.token_range
    strayed = 0
    for case in tiny_checkpoint.cases:
        inputs = tiny_checkpoint.inputs(processor, case)
        prediction = model.predict_action(**inputs, unnorm_key=case["unnorm_key"], return_dict=True)
        assert ((prediction.token_ids >= first) & (prediction.token_ids < end)).all()
        is_text = [not first <= token < end for token in case["generated"]]
        strayed += any(is_text)
        clean = is_text.index(True) if any(is_text) else len(is_text)
        assert prediction.token_ids[:clean].tolist() == case["generated"][:clean]
    assert strayed


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels[:, :3],
        lambda pixels: torch.cat([pixels, pixels[:, :3]], dim=1),
        lambda pixels: pixels[..., :14, :14],
        lambda pixels: pixels[..., :20],
        lambda pixels: pixels[0],
        lambda pixels: pixels.to(torch.uint8),
        lambda pixels: pixels.long(),
    ],
    ids=["one tower", "three towers", "smaller", "narrow", "no batch", "uint8", "integers"],
)
def test_pixels_of_another_model(small_model, change):
    """Channels that no tower sees, or levels of 8 bits, went through without a sign."""
    inputs = small_inputs()
    inputs["pixel_values"] = change(inputs["pixel_values"])
    for call in (small_model, partial(small_model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"expected normalized floats \(batch, 6, 28, 28\)"):
            call(**inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_generate_sees_only_finite_pixels(small_model, value):
    inputs = small_inputs()
    inputs["pixel_values"][1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        small_model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("name", ["labels", "position_ids", "attention_mask"])
@pytest.mark.parametrize("length", [5, 7, 10])
def test_values_that_do_not_fit_the_prompt(small_model, name, length):
    """Those of ten tokens are in the coordinates of the prompt with its patches."""
    with pytest.raises(ValueError, match="plain prompt"):
        small_model(**{**small_inputs(), name: torch.ones(2, length, dtype=torch.long)})


@pytest.mark.parametrize(("rows", "multiple"), [(401, None), (500, None), (401, 64), (None, 64), (400, None)])
@pytest.mark.parametrize("part", ["model", "language model"])
def test_action_tokens_stay_where_they_are(rows, multiple, part, tmp_path):
    """However many rows the embedding table has, in memory and after saving and loading."""
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(small_config()).eval()
    expected = model.predict_action(**small_inputs(), return_dict=True)
    (model if part == "model" else model.language_model).resize_token_embeddings(rows, multiple)
    model.save_pretrained(tmp_path)
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert (model.vocab_size, loaded.vocab_size, loaded.config.action_vocab_size) == (336, 336, 336)
    assert loaded.get_input_embeddings().weight.shape[0] >= (rows or 400)
    for predicting in (model, loaded):
        found = predicting.predict_action(**small_inputs(), return_dict=True)
        assert np.array_equal(found.token_ids, expected.token_ids)
        assert np.array_equal(found.actions, expected.actions)
    labels = small_inputs()["input_ids"]
    assert loaded(**small_inputs(), labels=labels).loss.isfinite()


@pytest.mark.parametrize("rows", [399, 337, 336, 100])
def test_a_table_without_its_action_tokens_neither_predicts_nor_is_saved(rows, tmp_path):
    for resize in ("model", "language_model"):
        model = OpenVLAForActionPrediction(small_config()).eval()
        if resize == "model":
            with pytest.warns(
                UserWarning, match=f"has {rows} rows; action tokens end at 336.*at least 400.*neither predicts"
            ):
                model.resize_token_embeddings(rows)
        else:
            model.language_model.resize_token_embeddings(rows)
        with pytest.raises(ValueError, match=f"has {rows} rows; action tokens end at 336"):
            model.predict_action(**small_inputs())
        with pytest.raises(ValueError, match=f"has {rows} rows; action tokens end at 336"):
            model.save_pretrained(tmp_path)


@pytest.mark.parametrize("constrained", [True, False])
def test_end_of_sequence_cannot_shorten_an_action(constrained, monkeypatch):
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(small_config()).eval()
    head = torch.nn.Linear(32, 400)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(torch.tensor(2), 400).float() * 100  # </s> always wins
    model.language_model.lm_head = head
    prediction = model.predict_action(**small_inputs(), constrained=constrained, return_dict=True)
    assert prediction.token_ids.shape == (2, 7)
    assert (prediction.token_ids == 2).all() != constrained


def test_prediction_holds_probabilities_and_entropies(small_model):
    prediction = small_model.predict_action(**small_inputs(), return_dict=True)
    assert prediction.normalized_actions.shape == prediction.token_ids.shape == (2, 7)
    assert ((prediction.token_probabilities > 1 / 256 - 1e-3) & (prediction.token_probabilities <= 1)).all()
    assert ((prediction.token_entropies >= 0) & (prediction.token_entropies <= np.log(256) + 1e-3)).all()
    # The first token's distribution, recomputed from forward.
    inputs = small_inputs()
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((2, 1), 7)], dim=1)
    with torch.inference_mode():
        logits = small_model(inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[:, -1]
    first, end = small_model.action_tokenizer.token_range
    distribution = logits[:, first:end].softmax(dim=-1)
    np.testing.assert_allclose(prediction.token_probabilities[:, 0], distribution.amax(dim=-1), rtol=1e-4)
    entropy = torch.distributions.Categorical(distribution).entropy()
    np.testing.assert_allclose(prediction.token_entropies[:, 0], entropy, rtol=1e-4)


@pytest.mark.parametrize("steps", ["own", "library"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_read_back_while_decoding(small_model, monkeypatch, steps, padded):
    """From the towers to the last token no value is copied to the host; in padded batches by steps of our own, as the
    library looks at the mask. With a draft the tokens of a pass are, in every pass."""
    decoding, read = [], []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def method(self, *arguments, **options):
            if decoding:
                read.append(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        watch(name)
    encode, decode = small_model.encode_images, decode_tokens
    monkeypatch.setattr(small_model, "encode_images", lambda *arguments: decoding.append(1) or encode(*arguments))

    def decode_and_stop_watching(*arguments, **options):
        result = decode(*arguments, **options)
        assert decoding
        if steps == "library" and padded:
            read.clear()
        decoding.clear()
        return result

    monkeypatch.setattr("openvla.token_head_openvla.decode_tokens", decode_and_stop_watching)
    inputs = small_inputs()
    if padded:
        inputs["attention_mask"][0, -2:] = 0
    with plain_decoding() if steps == "library" else nullcontext():
        for options in ({}, {"do_sample": True, "constrained": False}):
            prediction = small_model.predict_action(**inputs, **options, return_dict=True)
        assert not read
        if steps == "own":
            found = small_model.predict_action(**inputs, draft=prediction.token_ids, return_dict=True)
            assert len(read) == found.token_passes.max()


def test_sampling(small_model):
    inputs = small_inputs()
    greedy = small_model.predict_action(**inputs)

    def sample(seed: int, **options) -> np.ndarray:
        return small_model.predict_action(
            **inputs, do_sample=True, generator=torch.Generator().manual_seed(seed), **options
        )

    assert np.array_equal(sample(0), sample(0)) and not np.array_equal(sample(0), sample(1))
    assert np.array_equal(sample(0, temperature=1e-4), greedy)
    set_seed(3)
    assert small_model.predict_action(**inputs, do_sample=True, temperature=2.0).shape == (2, 7)


def test_action_dimension_follows_the_statistics():
    norm_stats = {f"robot{dim}": {"action": {"q01": [0.0] * dim, "q99": [2.0] * dim}} for dim in (6, 7, 14)}
    model = OpenVLAForActionPrediction(small_config(norm_stats=norm_stats)).eval()
    for dim in (6, 7, 14):
        assert model.get_action_dim(f"robot{dim}") == dim
        assert model.predict_action(**small_inputs(), unnorm_key=f"robot{dim}").shape == (2, dim)


def test_published_positional_form(small_model):
    inputs = {name: value[:1] for name, value in small_inputs().items()}
    by_keyword = small_model.predict_action(**inputs, unnorm_key="robot", do_sample=False)
    positional = small_model.predict_action(
        inputs["input_ids"], "robot", pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"]
    )
    assert by_keyword.shape == (7,) and by_keyword.tolist() == positional.tolist()


class TestErrorsBeforeAnyCompute:
    """Each is a ValueError or KeyError that says what to do, and none reaches the towers."""

    IMAGE = np.zeros((32, 32, 3), dtype=np.uint8)

    @pytest.fixture(scope="class")
    def model(self):
        model = TINY[0].load()
        model.processor = TINY[0].processor()
        model.encode_images = None  # any compute would fail loudly
        return model

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"instruction": "stop"}, "No image given"),
            ({"image": IMAGE}, "No instruction given"),
            ({"image": IMAGE, "instruction": ""}, "instruction is empty"),
            ({"image": IMAGE, "instruction": "  "}, "instruction is empty"),
            ({"image": IMAGE, "instruction": 5}, "string"),
            ({"image": [IMAGE] * 2, "instruction": ["stop", 5]}, "string"),
            ({"image": IMAGE, "instruction": []}, "string"),
            ({"image": IMAGE, "instruction": ["stop", "go"]}, "1 image.* 2 instruction"),
            ({"image": [IMAGE] * 2, "instruction": "stop"}, "2 image.* 1 instruction.* {camera: image}"),
            ({"image": [], "instruction": []}, r"a list of at least one, got \[\]"),
            ({"image": "stop", "instruction": IMAGE}, "The image comes first"),
            ({"image": IMAGE * np.nan, "instruction": "stop"}, "NaN"),
            ({"image": IMAGE, "instruction": "stop " * 3000}, "shorten the instruction"),
            ({"image": IMAGE, "instruction": "stop", "unnorm_key": ["bridge_orig"] * 2}, "2 unnorm_keys for 1"),
            ({"image": IMAGE, "instruction": "stop", "unnorm_key": None}, "bridge_orig"),
            ({"image": IMAGE, "instruction": "stop", "do_sample": True, "temperature": 0.0}, "temperature"),
        ],
    )
    def test_raw_form(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.predict_action(**{"unnorm_key": "bridge_orig", **arguments})

    def test_unknown_key(self, model):
        with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
            model.predict_action(self.IMAGE, "stop", unnorm_key="bridge-orig")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pixel_values": None}, "No image given"),
            ({"pixel_values": torch.full((1, 6, 224, 224), float("nan"))}, "NaN"),
            ({"pixel_values": torch.zeros(2, 6, 224, 224)}, "expected"),
            ({"pixel_values": torch.zeros(1, 3, 224, 224)}, "expected"),
            ({"pixel_values": torch.zeros(1, 6, 128, 128)}, "expected"),
            ({"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "all zero"),
            ({"attention_mask": torch.ones(1, 3, dtype=torch.long)}, "does not fit"),
            ({"input_ids": torch.ones(4, dtype=torch.long)}, "batch, length"),
            ({"input_ids": None}, "pixel_values without input_ids"),
            ({"input_ids": torch.tensor([[1, 5, 40000, 6]])}, "40000"),
            ({"image": IMAGE}, "not both"),
        ],
    )
    def test_published_form(self, model, change, message):
        inputs = {
            "input_ids": torch.tensor([[1, 5, 6, 7]]),
            "attention_mask": torch.ones(1, 4, dtype=torch.long),
            "pixel_values": torch.zeros(1, 6, 224, 224),
        }
        with pytest.raises(ValueError, match=message):
            model.predict_action(**{**inputs, **change}, unnorm_key="bridge_orig")

    def test_no_statistics(self):
        model = OpenVLAForActionPrediction(small_config(norm_stats=None)).eval()
        with pytest.raises(ValueError, match="no action statistics"):
            model.predict_action(**small_inputs())
        with pytest.raises(ValueError, match="knows no processor"):
            model.predict_action(self.IMAGE, "stop")
