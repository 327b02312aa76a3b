"""Parts that an adapter brings: whose they are, and that nobody predicts with those of another."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_parallel_heads import IMAGES, ROOT, WORDS, state_of
from test_parallel_heads import options as parallel_options
from typer.testing import CliRunner

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.action_spec import action_lines, action_record
from openvla.cli import app
from openvla.model_card import model_card
from openvla.training import FinetuneOptions, finetune, merge_adapter


peft = pytest.importorskip("peft", reason="adapters need the [train] extra")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402


PARTS = "added_parts.safetensors"
BASE = ROOT  # until `small_base`
pytestmark = pytest.mark.usefixtures("small_base")


def options(output: Path, **changes) -> FinetuneOptions:
    return parallel_options(output, **{"model": str(BASE), **changes})


@pytest.fixture(scope="module")
def adapter(small_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "run"
    finetune(options(folder, strategy="lora", head="l1_regression", film=True, proprio=True, steps=1))
    return folder


@pytest.fixture(scope="module")
def other(adapter, tmp_path_factory) -> Path:
    """The same adapter with another head."""
    folder = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(adapter, folder)
    parts = load_file(folder / PARTS)
    parts["action_head.fc2.bias"] += 1
    save_file(parts, folder / PARTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_adapter(adapter, folder)
    return folder


def act(model) -> np.ndarray:
    return model.predict_action(IMAGES[0], WORDS[0], state=state_of(model))


def tuner_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_two_adapters_with_parts(adapter, other):
    """The model has the parts of the one that was loaded last."""
    model = OpenVLAForActionPrediction.from_pretrained(BASE)
    model.load_adapter(str(adapter), "first")
    expected = act(model)
    model.load_adapter(str(other), "second")
    for layer in tuner_layers(model):  # as `model.set_adapter`, which the library has for newer versions of PEFT alone
        layer.set_adapter("second")
    assert not np.allclose(act(model), expected)
    for layer in tuner_layers(model):
        layer.set_adapter("first")
    with pytest.raises(ValueError, match="a model has those of one adapter"):
        act(model)


def test_an_adapter_that_could_not_be_loaded_leaves_no_head_behind(adapter, other, tmp_path):
    model = OpenVLAForActionPrediction.from_pretrained(adapter)
    act(model)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(other))
    with pytest.raises(ValueError, match="those of the model are not its"):
        act(model)
    # Nor random ones, where the file lacks some
    shutil.copytree(adapter, tmp_path / "cut")
    parts = load_file(adapter / PARTS)
    parts.pop("action_head.fc2.bias")
    save_file(parts, tmp_path / "cut" / PARTS, metadata={"format": "pt"})
    model = OpenVLAForActionPrediction.from_pretrained(BASE)
    with pytest.raises(ValueError, match="fc2.bias"):
        model.load_adapter(str(tmp_path / "cut"))
    with pytest.raises(ValueError, match="came with the adapter"):
        model.predict_action(IMAGES[0], WORDS[0])


def test_without_its_adapter_a_head_predicts_nothing(adapter):
    model = OpenVLAForActionPrediction.from_pretrained(adapter)
    expected, state = act(model), state_of(model)
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
    with pytest.raises(ValueError, match="came with the adapter 'default', which is not active"):
        model.predict_action(IMAGES[0], WORDS[0], state=state)
    for layer in tuner_layers(model):
        layer.enable_adapters(True)
    np.testing.assert_array_equal(act(model), expected)


def test_a_base_with_parts_does_not_lend_them(adapter, merged, tmp_path):
    """The adapter of a run that began with a model with a head has that head's successor."""
    run = tmp_path / "run"
    finetune(options(run, model=str(merged), strategy="lora", action_chunk=None, steps=1, learning_rate=0.1))
    expected = act(OpenVLAForActionPrediction.from_pretrained(run))
    base = OpenVLAForActionPrediction.from_pretrained(merged)
    wrapped = peft.PeftModel.from_pretrained(base, run)
    with pytest.raises(ValueError, match="those of the model are not its"):
        wrapped.predict_action(IMAGES[0], WORDS[0], state=state_of(base))
    base = OpenVLAForActionPrediction.from_pretrained(merged)
    base.load_adapter(str(run))
    np.testing.assert_allclose(act(base), expected, atol=1e-6)
    (run / PARTS).unlink()
    with pytest.raises(FileNotFoundError, match=PARTS):
        OpenVLAForActionPrediction.from_pretrained(run)
    # Merged in memory they are the model's own
    tuned = OpenVLAForActionPrediction.from_pretrained(merged)
    tuned.load_parts(adapter, {**vars(tuned.config)})
    both = peft.PeftModel.from_pretrained(tuned, adapter)
    assert act(both.merge_and_unload()).shape == act(tuned).shape


def test_states_are_normalized_as_in_training(merged, tmp_path):
    """Also by a model whose original clips numbers that never change, where training makes them 0."""
    clips = tmp_path / "clips"
    shutil.copytree(merged, clips)
    config = OpenVLAConfig.from_pretrained(clips)
    config.constant_state = "clip"
    config.save_pretrained(clips)
    for strategy in ("lora", "last_layer"):
        finetune(options(tmp_path / strategy, model=str(clips), strategy=strategy, action_chunk=None, steps=1))
        model = OpenVLAForActionPrediction.from_pretrained(tmp_path / strategy)
        assert model.constant_state == "zero"
    assert OpenVLAForActionPrediction.from_pretrained(clips).constant_state == "clip"


def test_numbers_without_probabilities_are_shown(merged):
    model = OpenVLAForActionPrediction.from_pretrained(merged)
    prediction = model.predict_action(IMAGES[0], WORDS[0], state=state_of(model), return_dict=True)
    record = action_record(prediction, unnorm_key="mine")
    assert "probabilities" not in record and len(record["action"]) == 3
    lines = action_lines(record)
    assert (
        lines.count("gripper") == 1 and len(lines.splitlines()) == 5 and "%" not in lines and "confidence" not in lines
    )


def test_predict_and_the_model_card_know_state_and_chunk(merged, tmp_path, monkeypatch):
    image = tmp_path / "frame.png"
    Image.fromarray(IMAGES[0]).save(image)
    model = OpenVLAForActionPrediction.from_pretrained(merged)
    state = state_of(model).round(3)
    told = ["predict", "--model", str(merged), "--image", str(image), "--instruction", WORDS[0], "--device", "cpu"]
    said = CliRunner().invoke(app, [*told, "--json", "--state", ",".join(map(str, state))])
    assert said.exit_code == 0, said.output
    expected = model.predict_action(Image.open(image), WORDS[0], state=state)
    np.testing.assert_allclose(json.loads(said.stdout)["action"], expected, atol=1e-5)
    wrong = CliRunner().invoke(app, [*told, "--state", "left"])
    assert wrong.exit_code and "'left': expected numbers" in wrong.output
    with monkeypatch.context() as patch:  # before the weights are read
        patch.setattr("openvla.prediction.load_model", lambda *args, **options: pytest.fail("read"))
        wrong = CliRunner().invoke(app, [*told, "--state", "1,2"])
    assert wrong.exit_code and "The state has 2 numbers" in wrong.output
    card = (merged / "README.md").read_text()
    assert "`l1_regression`; one prediction is for 3 step(s)" in card and "# (3, 7) float64" in card
    assert f"{len(state)} numbers" in card and "state=state)" in card and "FiLM" in card
    code = model_card("two", model.config, model.norm_stats, carries_code=True)
    assert 'processor(prompt, Image.open("frame.png"))' in code
    model.config.camera_names = ["a", "b"]
    code = model_card("two", model.config, model.norm_stats, carries_code=True)
    assert '{"a": Image.open("a.png"), "b": Image.open("b.png")}' in code
    assert "It needs `torch`, `torchvision`, `timm` and `transformers`" in code
    model.config.action_head = "diffusion"
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"jpeg_quality": 95}}')
    code = model_card("two", model.config, model.norm_stats, carries_code=True, model_folder=tmp_path)
    assert "`timm`, `diffusers`, `simplejpeg` and `transformers`" in code  # of OpenVLA-OFT's


def test_a_copy_is_a_model_of_its_own(merged):
    """FiLM changes what a block computes: that of a copy reads the weights of the copy."""
    model = OpenVLAForActionPrediction.from_pretrained(merged)
    expected, twin = act(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.vision_backbone.parameters():
            parameter.mul_(2)
    assert not np.allclose(act(twin), expected)
    np.testing.assert_array_equal(act(model), expected)
