"""Predictions, losses and gradients of OpenVLA-OFT's own code, for tiny checkpoints that it saved (float32).

Here against a part of the reference; against a complete one, with features of all cases and the loss over the complete
vocabulary:

    OPENVLA_OFT_REFERENCE=FOLDER python -m pytest tests/test_oft_parity.py
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oft import GIVEN, OFT, TIMM, saved_by_oft
from safetensors import safe_open
from safetensors.torch import load_file

from openvla import OpenVLAForActionPrediction
from openvla.data.collate import ActionCollator
from openvla.pixels_openvla import load_image


REFERENCE = os.environ.get("OPENVLA_OFT_REFERENCE")
VARIANTS = ["libero-l1", "libero-discrete", "aloha-film-l1", "libero-diffusion"]
# Of normalized actions; tokens are exact, and what 50 steps of a diffusion add up is larger.
TOLERANCE = {"libero-l1": 1e-4, "libero-discrete": 0, "aloha-film-l1": 1e-4, "libero-diffusion": 3e-3}


def goldens_of(variant: str) -> Path:
    return Path(REFERENCE) / "goldens" / variant if REFERENCE else OFT / variant


def image_of(number: int) -> np.ndarray:
    folder = Path(REFERENCE) / "goldens" / "images" if REFERENCE else OFT / "images"
    return np.asarray(load_image(folder / f"raw{number}.png"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The checkpoints of all variants, and their base, as the original saves them."""
    folder = tmp_path_factory.mktemp("oft")
    if not REFERENCE:
        for variant in ("base", *VARIANTS):
            saved_by_oft(variant, folder)
        return folder
    for variant in ("base", *VARIANTS):
        shutil.copytree(Path(REFERENCE) / variant, folder / variant)
        shutil.copy(Path(REFERENCE) / "tokenizer" / "tokenizer.json", folder / variant)
    for file in (Path(REFERENCE) / "libero-l1").glob("model*"):
        shutil.copy(file, folder / "libero-discrete")
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    if request.param == "libero-diffusion":
        pytest.importorskip("diffusers", reason="needs the [oft] extra")
    return request.param


@pytest.fixture(scope="module")
def model(variant, folders) -> OpenVLAForActionPrediction:
    return load_variant(variant, folders)


def load_variant(variant, folders) -> OpenVLAForActionPrediction:
    told = {name: str(folders / value) if name == "base" else value for name, value in GIVEN[variant].items()}
    loaded = OpenVLAForActionPrediction.from_pretrained(
        folders / variant, dtype=torch.float32, timm_model_kwargs=TIMM, **told
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def cases(variant) -> list[dict]:
    arrays = np.load(goldens_of(variant) / "cases.npz")
    found = json.loads((goldens_of(variant) / "cases.json").read_text())
    for case in found:
        before = f"case{case['case']}|"
        case["golden"] = {name.removeprefix(before): arrays[name] for name in arrays if name.startswith(before)}
    return found


def predict(model, cases, **options):
    """Raw images and states in, as the original's evaluation gets them; one sample, or a batch."""
    model.processor.image_processor.center_crop = 0.9 if cases[0]["center_crop"] else None
    images = [dict(zip(case["image_names"], map(image_of, case["images"]))) for case in cases]
    words = [case["instruction"] for case in cases]
    states = None if cases[0]["state"] is None else [case["state"] for case in cases]
    if "torch_seed" in cases[0]:
        torch.manual_seed(cases[0]["torch_seed"])
        model.action_head.num_inference_steps = cases[0]["num_diffusion_steps_inference"]
    if len(cases) == 1:
        images, words, states = images[0], words[0], None if states is None else states[0]
    return model.predict_action(
        images, words, unnorm_key=cases[0]["unnorm_key"], state=states, return_dict=True, **options
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_actions(model, cases, variant, attention):
    model.language_model.set_attn_implementation(attention)
    compared = cases if attention == "sdpa" else cases[:2]
    if variant == "libero-diffusion" and not REFERENCE:
        # All 50 steps with a crop and without one, and the case of ten steps: words and images as of "libero-l1"
        compared = [cases[0], cases[5], cases[6]] if attention == "sdpa" else [cases[5]]
    try:
        for case in compared:
            prediction, golden = predict(model, [case]), case["golden"]
            assert prediction.actions.dtype == np.float64
            np.testing.assert_allclose(prediction.normalized_actions, golden["normalized"], atol=TOLERANCE[variant])
            width = np.abs(golden["actions"]).max() + 1
            np.testing.assert_allclose(prediction.actions, golden["actions"], atol=width * TOLERANCE[variant])
            if "token_ids" in case:
                assert prediction.token_ids.reshape(-1).tolist() == case["token_ids"]
                assert np.array_equal(prediction.actions, golden["actions"])
    finally:
        model.language_model.set_attn_implementation("sdpa")


def test_batches_of_prompts_of_any_length(model, cases, variant):
    """The original refuses batches; here each row is what it is alone."""
    together = [case for case in cases if case["center_crop"] and case["unnorm_key"] == cases[0]["unnorm_key"]]
    if variant == "libero-diffusion":
        few = next(case for case in together if case["num_diffusion_steps_inference"] == 10)
        together = [few] * 2  # rows draw their noise one after the other: the first is that of the golden
    assert len(together) > 1
    batch = predict(model, together)
    for row, case in enumerate(together[:1] if variant == "libero-diffusion" else together):
        np.testing.assert_allclose(
            batch.normalized_actions[row], case["golden"]["normalized"], atol=max(TOLERANCE[variant], 1e-12)
        )


def test_what_lies_between(model, cases, variant, monkeypatch):
    """Ids, state, pixels, features of the towers, projected patches, hidden states of the actions, first noise."""
    seen: dict[str, list] = {}

    def watch(owner, name, key):
        original = getattr(owner, name)

        def method(*arguments, **options):
            result = original(*arguments, **options)
            seen.setdefault(key, []).append((arguments, options, result))
            return result

        monkeypatch.setattr(owner, name, method)

    watch(model, "action_sequence", "sequence")
    watch(model.vision_backbone, "forward", "features")
    watch(model.projector, "forward", "projected")
    watch(model.action_head, "forward_sequence" if variant == "libero-diffusion" else "num_tokens", "noise")
    every_case = cases if REFERENCE else cases[:1]
    for case in every_case:
        seen.clear()
        predict(model, [case])
        inputs, golden = seen["sequence"][0][0][0], case["golden"]
        assert [*inputs.prompts[0], *([] if inputs.prompts[0][-1] == 29871 else [29871])] == case["input_ids"]
        if case["state"] is not None:
            np.testing.assert_allclose(inputs.proprio[0], case["proprio_normalized"], atol=1e-6)
        if "pixel_values_every7" in golden:
            assert np.array_equal(inputs.pixel_values[0, :, ::7, ::7].numpy(), golden["pixel_values_every7"])
        sequence = seen["sequence"][0][2]
        assert sequence.inputs_embeds.shape[1] == case["sequence_length"]
        if "vision_features_every4" in golden:
            features, projected = seen["features"][0][2][0], seen["projected"][0][2][0]
            np.testing.assert_allclose(features[::4].numpy(), golden["vision_features_every4"], atol=5e-5)
            np.testing.assert_allclose(projected[::4].numpy(), golden["projected_every4"], atol=5e-5)
        if "average_language_embedding" in golden:
            condition = seen["features"][0][0][1][0]
            np.testing.assert_allclose(condition.numpy(), golden["average_language_embedding"], atol=1e-6)
        if variant != "libero-diffusion":
            with torch.inference_mode():
                hidden = sequence.hidden_states(model.language_model, len(golden["action_hidden"]))
            np.testing.assert_allclose(hidden[0].numpy(), golden["action_hidden"], atol=3e-4)
        elif "noise_pred_by_step" in golden:
            first = seen["noise"][0][2].predicted[0]
            np.testing.assert_allclose(first.numpy(), golden["noise_pred_by_step"][0], atol=5e-5)


def test_a_training_batch(model, variant):
    """The original's collated batch, its loss and the norm of every gradient."""
    told, arrays = golden_batch(variant)
    batch = collated(model, told, arrays)
    for name in ("input_ids", "labels", "attention_mask"):
        assert np.array_equal(batch[name].numpy(), arrays[name]), name
    head, expected = model.action_head, told["all_parameters"]
    answer, norms = one_step(model, model, batch, told)
    assert answer.pop("loss") == pytest.approx(expected["loss"], rel=1e-5)
    compared = 0
    for name, norm in expected["grad_norms"].items():
        if norm and "lora_" not in name:
            assert norms[own_name(name)] == pytest.approx(norm, rel=1e-3), name
            compared += 1
    assert compared > 100
    if "curr_action_l1_loss" in expected["metrics"]:
        found = head.compare(**answer, shape=(model.action_chunk, arrays["actions"].shape[2]))
        distance = (found.predicted - found.wanted).abs()
        assert distance[:, 0].mean().item() == pytest.approx(expected["metrics"]["curr_action_l1_loss"], rel=1e-4)
        assert distance[:, 1:].mean().item() == pytest.approx(expected["metrics"]["next_actions_l1_loss"], rel=1e-4)


def test_a_training_batch_with_an_adapter(folders):
    """The same where an adapter learns beside the head, on the base it is not merged into."""
    pytest.importorskip("diffusers", reason="needs the [oft] extra")
    peft = pytest.importorskip("peft", reason="adapters need the [train] extra")
    told, arrays = golden_batch("libero-diffusion")
    if "lora_unmerged" not in told:
        pytest.skip("the loss with an adapter needs the complete reference, see OPENVLA_OFT_REFERENCE")
    folder, expected = folders / "libero-diffusion", told["lora_unmerged"]
    model = load_variant("libero-diffusion", folders)  # merged: the weights of the base come back
    model.load_state_dict(load_file(folders / "base" / "model.safetensors"), strict=False)
    config = peft.LoraConfig.from_pretrained(folder / "lora_adapter")
    with safe_open(folder / "lora_adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in tensors.keys()}  # noqa: SIM118
    config.target_modules = adapted  # not by the ends of names, which those of the head have as well
    wrapped = peft.PeftModel.from_pretrained(model, folder / "lora_adapter", config=config, is_trainable=True)
    for parameter in model.added_parameters().values():
        parameter.requires_grad_(True)
    answer, norms = one_step(model, wrapped, collated(model, told, arrays), told)
    assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    compared = 0
    for name, norm in expected["grad_norms"].items():
        if norm:
            own = name.removeprefix("vla.")
            assert norms[own if "lora_" in name else f"base_model.model.{own_name(name)}"] == pytest.approx(
                norm, rel=1e-3
            ), name
            compared += 1
    assert compared > 100


def golden_batch(variant) -> tuple[dict, dict]:
    folder = goldens_of(variant)
    if not (folder / "train.json").is_file():
        pytest.skip("the loss over the complete vocabulary needs the complete reference, see OPENVLA_OFT_REFERENCE")
    return json.loads((folder / "train.json").read_text()), np.load(folder / "train.npz")


def collated(model, told, arrays) -> dict:
    """The samples of the golden batch as ours."""
    images = model.processor.image_processor
    images.center_crop = None
    samples = []
    for row, (numbers, words) in enumerate(zip(told["image_ids"], told["instructions"])):
        cameras = dict(zip(model.camera_names, (images.trained_pixels(image_of(number)) for number in numbers)))
        samples.append({"instruction": words, "actions": arrays["actions"][row], "image": cameras})
        if model.config.proprio_dim:
            samples[-1]["state"] = arrays["proprio"][row]
    batch = ActionCollator(model.processor, model.action_head, model.config.proprio_dim is not None)(samples)
    if model.config.use_film:
        batch["film_padding"] = True  # the original takes padding for words
    return batch


def one_step(model, learns, batch, told) -> tuple[dict, dict[str, float]]:
    """What the head answers, with its loss, and the norms of the gradients in `learns`, the model or what wraps it."""
    learns.train()
    try:
        torch.manual_seed(told["torch_seed"])
        loss, answer = model.action_head.loss(model, model.action_head.prepare(batch))
        loss.backward()
        norms = {name: value.grad.norm().item() for name, value in learns.named_parameters() if value.grad is not None}
    finally:
        learns.zero_grad()
        learns.eval()
    return {**answer, "loss": loss.item()}, norms


def own_name(name: str) -> str:
    """How a parameter of the original is called here."""
    for part in (".base_layer", ".block.", "vla.vision_backbone.vision_backbone."):
        name = name.replace(part, {".block.": "."}.get(part, "vision_backbone." if part.startswith("vla") else ""))
    for before, after in (
        ("vla.", ""),
        ("action_head.model.", "action_head."),
        ("action_head.noise_predictor.mlp_resnet.", "action_head."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
