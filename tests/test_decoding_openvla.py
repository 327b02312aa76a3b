"""What `predict_action` takes, and that nothing but a finite computation becomes an action."""

import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_modeling_openvla import small_config, small_inputs
from transformers import GenerationConfig

from openvla import ActionTokenizer, OpenVLAForActionPrediction, unnormalize_actions
from openvla.decoding_openvla import choose_token
from openvla.modules_openvla import evaluation_mode
from openvla.sampling_openvla import Sampling


def new_model(**fields) -> OpenVLAForActionPrediction:
    torch.manual_seed(0)
    return OpenVLAForActionPrediction(small_config(**fields)).eval()


@pytest.fixture(scope="module")
def model():
    return new_model()


# Nothing that is not finite becomes an action


BREAKABLE = [
    "vision_backbone.featurizer.patch_embed.proj.bias",
    "vision_backbone.fused_featurizer.blocks.0.mlp.fc1.weight",
    "projector.fc3.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.layers.1.mlp.down_proj.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",  # row 0: a text token, which is computed where it could be chosen
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", BREAKABLE)
@pytest.mark.parametrize("options", [{}, {"constrained": False}, {"do_sample": True}], ids=str)
def test_damaged_weights(name, value, options, model):
    weights, at = model.get_parameter(name).detach().view(-1), 0
    if name == "language_model.lm_head.weight" and options.get("constrained", True):
        at = model.action_tokenizer.token_range[0] * model.llm_dim  # rows of other tokens are not computed
    before = weights[at].item()
    weights[at] = value
    try:
        with pytest.raises(ValueError, match="NaN or infinite values for sample 0, 1 of 2.*weights are damaged"):
            model.predict_action(**small_inputs(), **options)
    finally:
        weights[at] = before


def test_one_broken_sample_is_named(model, monkeypatch):
    encode = model.encode_images

    def broken(pixel_values):
        features = encode(pixel_values)
        features[1, 0, 0] = torch.nan
        return features

    monkeypatch.setattr(model, "encode_images", broken)
    with pytest.raises(ValueError, match="sample 1 of 2"):
        model.predict_action(**small_inputs())


def test_float16_overflow():
    half = new_model().half()
    with torch.no_grad():
        half.language_model.lm_head.weight.fill_(6e4)
    with pytest.raises(ValueError, match="float16 overflowed.*bfloat16"):
        half.predict_action(**small_inputs())


@pytest.mark.parametrize("part", ["vision_backbone.featurizer", "vision_backbone.fused_featurizer", "projector"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_in_half_precision(part, dtype, model):
    cast = new_model()
    cast.get_submodule(part).to(dtype)
    assert np.abs(cast.predict_action(**small_inputs()) - model.predict_action(**small_inputs())).max() < 0.5


@pytest.mark.parametrize("part", ["language_model.lm_head", "language_model.model.layers.1.mlp", "projector.fc2"])
def test_parts_that_do_not_compute_together(part):
    cast = new_model()
    cast.get_submodule(part).half()
    with pytest.raises(ValueError, match="several types, torch.float16, torch.float32.*cast all"):
        cast.predict_action(**small_inputs())


def test_weights_without_values():
    with pytest.raises(ValueError, match='on "meta", where they have no values'):
        new_model().to("meta").predict_action(**small_inputs())


def test_weights_that_are_not_used_do_not_matter(model):
    changed = new_model()
    with torch.no_grad():
        changed.vision_backbone.featurizer.blocks[-1].mlp.fc1.weight.fill_(torch.nan)
        changed.get_input_embeddings().weight[3] = torch.nan  # neither of the prompts nor an action
    assert np.array_equal(changed.predict_action(**small_inputs()), model.predict_action(**small_inputs()))


def test_conversions_refuse_what_is_not_finite():
    stats = {"q01": [0.0] * 2, "q99": [1.0] * 2}
    tokenizer = ActionTokenizer(400)
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            unnormalize_actions(np.array([0.0, value]), stats)
        for actions in (np.array([0.0, value]), torch.tensor([0.0, value])):
            with pytest.raises(ValueError, match="finite"):
                tokenizer.encode(actions)
    for ids in (np.array([390.5]), torch.tensor([390.0]), [True]):
        with pytest.raises(ValueError, match="integers"):
            tokenizer.decode(ids)


# Train mode, threads


def forgetful_model() -> OpenVLAForActionPrediction:
    """Every action in train mode would be another one."""
    model = new_model(
        timm_model_kwargs=[
            {**small_config().timm_model_kwargs[0], "proj_drop_rate": 0.5, "drop_path_rate": 0.5},
            small_config().timm_model_kwargs[1],
        ]
    )
    with torch.no_grad():  # of the size of trained weights: what is seen decides
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.language_model.config.attention_dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_mode_predicts_as_evaluation_mode(checkpointing):
    model = forgetful_model()
    expected = model.predict_action(**small_inputs(), return_dict=True)
    model.train()
    model.projector.eval()  # modes are given back to each module
    if checkpointing:
        switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.23
        getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})
    modes = {name: module.training for name, module in model.named_modules()}
    for _ in range(2):
        found = model.predict_action(**small_inputs(), return_dict=True)
        assert np.array_equal(found.actions, expected.actions)
        assert np.array_equal(found.token_probabilities, expected.token_probabilities)
    with pytest.raises(ValueError, match="generator"):
        model.predict_action(**small_inputs(), do_sample=True, generator=3)
    model.encode_images = None
    with pytest.raises(TypeError):
        model.predict_action(**small_inputs())
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_module_that_is_replaced_predicts_in_evaluation_mode():
    model, modes = new_model(), []
    expected = model.predict_action(**small_inputs())

    class Projection(torch.nn.Linear):
        def forward(self, features):
            modes.append(self.training)
            return super().forward(features)

    old = model.projector.fc2
    model.projector.fc2 = Projection(old.in_features, old.out_features).train()
    model.projector.fc2.load_state_dict(old.state_dict())
    assert np.array_equal(model.predict_action(**small_inputs()), expected)
    assert modes == [False] and model.projector.fc2.training


def test_a_model_that_predicted_is_let_go_of():
    model = new_model()
    model.predict_action(**small_inputs())
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_the_last_prediction_gives_train_mode_back():
    model = new_model().train()
    entered, leave = threading.Event(), threading.Event()

    def predict_slowly():
        with evaluation_mode(model):
            entered.set()
            leave.wait(timeout=60)
            return model.training

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(predict_slowly)
        entered.wait(timeout=60)
        with evaluation_mode(model):
            pass
        assert not model.training
        leave.set()
        assert slow.result() is False
    assert model.training and model.language_model.training


@pytest.mark.parametrize("mode", [True, False])
def test_another_thread_changes_the_mode_of_a_model_that_predicts(mode):
    """train() let the rest of the prediction forget; what eval() said was undone at its end."""
    model = forgetful_model()
    expected = model.predict_action(**small_inputs())
    model.train(not mode)
    with ThreadPoolExecutor(1) as pool:
        first = model.vision_backbone.featurizer.patch_embed
        hook = first.register_forward_hook(lambda *_: pool.submit(model.train, mode).result() and None)
        found = model.predict_action(**small_inputs())
    hook.remove()
    assert np.array_equal(found, expected)
    assert {module.training for module in model.modules()} == {mode}


def test_threads_predict_what_one_thread_does():
    model = forgetful_model().train()
    batches = [{**small_inputs(), "pixel_values": torch.randn(2, 6, 28, 28)} for _ in range(8)]
    expected = [model.predict_action(**batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: model.predict_action(**batch), batches * 3))
    for row, action in enumerate(found):
        assert np.array_equal(action, expected[row % 8])


# Options of generate


@pytest.mark.parametrize(
    "options",
    [
        {"constrained": None},
        {"use_cache": True},
        {"use_cache": False},
        {"max_new_tokens": 7},
        {"min_new_tokens": 7, "max_new_tokens": 7},
        {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0},
        {"pad_token_id": 0, "eos_token_id": 2},
        {"do_sample": None, "temperature": 0},
        {"do_sample": False, "temperature": 1.0, "top_p": 1.0},
        {"output_scores": False, "return_dict_in_generate": False, "logits_processor": None},
        {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=7)},
        {"do_sample": False, "generation_config": GenerationConfig(do_sample=True)},
        {
            "proprio": None,
            "proprio_projector": None,
            "action_head": None,
            "use_film": False,
        },  # of OpenVLA-OFT's scripts
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-6},
        {"do_sample": True, "temperature": 1e-20},
    ],
    ids=str,
)
def test_options_that_ask_for_the_most_probable_action(model, options):
    expected = model.predict_action(**small_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(model.predict_action(**small_inputs(), **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 cannot be used.*do_sample=True"),
        ({"max_new_tokens": 8}, "max_new_tokens=8: an action of these statistics has 7 tokens"),
        ({"max_length": 50}, "max_length=50.*leave it out"),
        ({"output_scores": True}, "output_scores=True.*return_dict=True"),
        ({"output_hidden_states": True}, r"output_hidden_states=True.*model\(\*\*inputs, output_hidden_states=True"),
        ({"proprio": np.zeros(8)}, "proprio=array.*state=... takes the state of the robot.*not normalized"),
        ({"action_head": torch.nn.Identity()}, r"action_head=Identity\(\) cannot be used here: leave it out"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"logits_processor": [min]}, "logits_processor"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4"),
        ({"generation_config": {"num_beams": 1}}, "GenerationConfig, got dict"),
        ({"unorm_key": "robot"}, "Did you mean 'unnorm_key'"),
        ({"do_sampel": True}, "Did you mean 'do_sample'"),
        ({"instructions": "stop"}, "Did you mean 'instruction'"),
        ({"do_sample": "no"}, "do_sample='no' must be True or False"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0 must be a number above 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature=nan"),
        ({"do_sample": True, "temperature": "warm"}, "temperature='warm'"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1 must be an integer of at least 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k=2.5"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"temperature": {1}}, "temperature={1}"),
        ({"constrained": "yes"}, "constrained='yes' must be True or False"),
        ({"do_sample": True, "generator": 7}, "torch.Generator, got int"),
    ],
)
def test_options_that_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict_action(**small_inputs(), **options)


def test_a_top_k_of_zero_is_none(model):
    """As in `generate`, and in scripts of reinforcement learning."""
    found = [
        model.predict_action(**small_inputs(), do_sample=True, generator=torch.Generator().manual_seed(0), **options)
        for options in ({}, {"top_k": 0})
    ]
    assert np.array_equal(*found)


def test_sampling_options_without_sampling_warn(model):
    with pytest.warns(UserWarning, match="temperature=0.5 without do_sample=True"):
        action = model.predict_action(**small_inputs(), temperature=0.5)
    assert np.array_equal(action, model.predict_action(**small_inputs()))


def test_sampling_from_the_most_probable():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(400, 1)
    for sampling, drawn in (
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_k=9), {0, 1, 2, 3}),
        (Sampling(top_p=0.7), {0, 1}),
        (Sampling(top_p=0.76), {0, 1, 2}),
        (Sampling(top_p=0.76, top_k=2), {0, 1}),
    ):
        chosen, probability, entropy, _ = choose_token(logits, sampling)
        assert set(chosen.flatten().tolist()) == drawn
        assert bool(entropy.isfinite().all()) and float(probability.min()) > 0.09
    with_top_k = choose_token(logits, Sampling(top_k=2))
    torch.testing.assert_close(with_top_k[1].amax(), torch.tensor(2 / 3))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"constrained": False}], ids=str)
@pytest.mark.parametrize("fields", [{}, {"action_head": "parallel_tokens", "action_chunk": 2}], ids=str)
def test_distributions_are_what_tokens_were_chosen_from(fields, options):
    model = new_model(**fields)
    asked = {**small_inputs(), **options, "return_dict": True}
    assert model.predict_action(**asked).token_distributions is None
    found = model.predict_action(**asked, return_distributions=True)
    first = model.action_tokenizer.token_range[0] if options.get("constrained", True) else 0
    assert found.token_distributions.shape[:-1] == found.token_ids.shape
    np.testing.assert_allclose(found.token_distributions.sum(axis=-1), 1, atol=1e-5)
    chosen = np.take_along_axis(found.token_distributions, found.token_ids[..., None] - first, axis=-1)[..., 0]
    np.testing.assert_array_equal(chosen, found.token_probabilities)
    if not options.get("do_sample"):
        np.testing.assert_array_equal(found.token_distributions.argmax(axis=-1), found.token_ids - first)


def test_distributions_of_actions_that_are_decided():
    model = new_model(action_chunk=2)
    committed = np.zeros((2, 1, 7))
    found = model.predict_action(**small_inputs(), committed=committed, return_dict=True, return_distributions=True)
    first = model.action_tokenizer.token_range[0]
    np.testing.assert_array_equal(found.token_distributions.argmax(axis=-1), found.token_ids - first)
    np.testing.assert_array_equal(found.token_distributions[:, 0].max(axis=-1), 1.0)


# Inputs


def ending(*ids: int) -> torch.Tensor:
    """Prompts whose last tokens are others."""
    input_ids = small_inputs()["input_ids"]
    input_ids[:, -len(ids) :] = torch.tensor(ids)
    return input_ids


def as_numbers(inputs: dict, kind) -> dict:
    return {name: kind(value) for name, value in inputs.items()}


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        lambda value: list(value),
        lambda value: value.numpy().astype(value.numpy().dtype.newbyteorder(">")),
    ],
    ids=["numpy", "lists", "list of tensors", "big-endian"],
)
def test_arrays_and_lists(model, kind):
    expected = model.predict_action(**small_inputs())
    assert np.array_equal(model.predict_action(**as_numbers(small_inputs(), kind)), expected)
    inputs = as_numbers(small_inputs(), kind)
    assert np.array_equal(model.predict_action(inputs.pop("input_ids"), "robot", **inputs), expected)


def test_masks_of_every_kind(model):
    inputs = small_inputs()
    expected = model.predict_action(**inputs)
    for mask in (None, inputs["attention_mask"].bool(), inputs["attention_mask"].float()):
        assert np.array_equal(model.predict_action(**{**inputs, "attention_mask": mask}), expected)


def test_padding_without_a_mask(model):
    inputs = small_inputs()
    del inputs["attention_mask"]
    expected = model.predict_action(**inputs)
    pads = torch.zeros(2, 3, dtype=torch.long)
    inputs["input_ids"] = torch.cat([pads, inputs["input_ids"], pads], dim=1)
    assert np.array_equal(model.predict_action(**inputs), expected)


def test_tokens_that_the_mask_hides_are_not_seen(model):
    inputs = small_inputs()
    expected = model.predict_action(**inputs)
    hidden = torch.full((2, 1), 9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    inputs["input_ids"] = torch.cat([ids[:, :3], hidden, ids[:, 3:]], dim=1)
    inputs["attention_mask"] = torch.cat([mask[:, :3], 0 * hidden, mask[:, 3:]], dim=1)
    assert np.array_equal(model.predict_action(**inputs), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(0, 6, dtype=torch.long)}, "at least one prompt and token"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one prompt and token"),
        ({"input_ids": []}, "at least one prompt and token"),
        ({"input_ids": [[1, 5], [1]]}, "rows of one length"),
        ({"input_ids": [["open", "it"]] * 2}, "lists of numbers"),
        ({"input_ids": small_inputs()["input_ids"].float()}, "integers, got torch.float32"),
        ({"input_ids": small_inputs()["input_ids"].bool()}, "integers, got torch.bool"),
        ({"input_ids": torch.full((2, 6), 399)}, "image placeholders"),
        ({"input_ids": torch.tensor([[1, 7]] * 2), "attention_mask": None}, "No instruction"),
        ({"input_ids": ending(100)}, "holds 1 action token.*for example 100"),
        ({"input_ids": ending(335, 2)}, "holds 1 action token.*for example 335"),
        ({"input_ids": ending(2)}, "ends in the token that ends a sequence .2."),
        ({"input_ids": ending(2, 7)}, "ends in the token that ends a sequence .2."),
        ({"input_ids": ending(0, 0)}, "holds padding .0. that no attention_mask hides"),
        ({"input_ids": torch.tensor([[1, 1, 9, 10, 11, 12]] * 2)}, "starts with .1, 1, 9. .* 2 times"),
        ({"input_ids": torch.tensor([[1, 8, 1, 10, 11, 12]] * 2)}, "2 times"),
        ({"attention_mask": torch.full((2, 6), 0.5)}, "1 where there is a token"),
        ({"attention_mask": torch.full((2, 6), float("nan"))}, "1 where there is a token"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "does not fit"),
        ({"pixel_values": torch.zeros(2, 6, 28, 28, dtype=torch.uint8)}, "torch.uint8, expected normalized floats"),
        ({"pixel_values": torch.full((2, 6, 28, 28), 200.0)}, "pixel_values reach 200"),
        ({"pixel_values": torch.zeros(6, 28, 28)}, "have shape"),
        ({"pixel_values": torch.zeros(2, 6, 28, 28, device="meta")}, "dense tensor that holds values"),
        ({"pixel_values": torch.zeros(2, 6, 28, 28).to_sparse()}, "dense tensor"),
        ({"pixel_values": "frame.png"}, "lists of numbers, got str"),
        ({"unnorm_key": []}, "0 unnorm_keys for 2"),
    ],
)
def test_inputs_that_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model.predict_action(**{**small_inputs(), **change})


def test_prompts_that_start_with_a_word(model):
    with pytest.warns(UserWarning, match="without the token that starts a sequence .1."):
        model.predict_action(
            **{**small_inputs(), "input_ids": small_inputs()["input_ids"][:, 1:], "attention_mask": None}
        )


@pytest.mark.parametrize("key", [5, b"robot", {"robot": 1}, {"robot"}, ["robot", None, "x"], ["robot", 3], ""])
def test_keys_that_are_none(model, key):
    with pytest.raises((KeyError, ValueError), match="unnorm_key"):
        model.predict_action(**small_inputs(), unnorm_key=key)
