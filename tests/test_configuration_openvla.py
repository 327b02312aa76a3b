"""The configuration: what it fills in, what it refuses, and the published layouts on the meta device."""

import json
import warnings

import processes
import pytest
import torch
from tiny import FIXTURES

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.configuration_openvla import LLM_BACKBONES, VISION_BACKBONES
from openvla.presets import load_preset_config


@pytest.mark.parametrize("name", ["openvla-7b", "openvla-v01-7b"])
def test_published_tensors(name):
    published = json.loads((FIXTURES / "published_keys" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(load_preset_config(name))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == {key: list(shape) for key, shape in published["keys"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == published["total_params"]


@pytest.mark.parametrize("vision_backbone_id", VISION_BACKBONES)
def test_every_vision_backbone(vision_backbone_id):
    """Published sizes but for the depth, one-layer language model: patches, channels and the width the projector
    expects."""
    config = OpenVLAConfig(
        vision_backbone_id=vision_backbone_id,
        timm_model_kwargs=[{"depth": 2}] * len(VISION_BACKBONES[vision_backbone_id]),
        text_config={"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
        size = config.image_sizes[0]
        pixel_values = torch.zeros(1, 3 * len(VISION_BACKBONES[vision_backbone_id]), size, size)
        features = model.encode_images(pixel_values)
    patch = 16 if vision_backbone_id == "in1k-vit-l" else 14
    assert features.shape == (1, (size // patch) ** 2, 32)
    assert model.projector.fc1.in_features == model.vision_backbone.embed_dim


@pytest.mark.parametrize("llm_backbone_id", LLM_BACKBONES)
def test_every_llm_backbone(llm_backbone_id):
    config = OpenVLAConfig(llm_backbone_id=llm_backbone_id)
    hub_id, model_type = LLM_BACKBONES[llm_backbone_id]
    assert config.text_config.model_type == model_type and config.hf_llm_id == hub_id
    small = OpenVLAConfig(
        llm_backbone_id=llm_backbone_id,
        timm_model_kwargs=[{"embed_dim": 32, "depth": 2, "num_heads": 2}],
        text_config={
            "vocab_size": 400,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    )
    model = OpenVLAForActionPrediction(small).eval()
    with torch.inference_mode():
        output = model(torch.tensor([[1, 5, 6]]), pixel_values=torch.randn(1, 3, 224, 224))
    assert output.logits.shape == (1, 256 + 3, 400)


def test_language_model_follows_its_config():
    """`rms_norm_eps`, rotary base and everything else come from `text_config`."""
    fields = {
        "rms_norm_eps": 1e-3,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 400,
    }
    config = OpenVLAConfig(timm_model_kwargs=[{"embed_dim": 32, "depth": 2, "num_heads": 2}], text_config=fields)
    model = OpenVLAForActionPrediction(config)
    assert model.language_model.model.norm.variance_epsilon == 1e-3


def test_save_and_load(tmp_path):
    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="mistral-v0.1-7b-pure",
        timm_model_kwargs=[{"depth": 2}, {"depth": 3}],
        norm_stats={"a": {"action": {"q01": [0.0], "q99": [1.0]}}},
    )
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_the_vocabulary_is_not_assumed():
    config = OpenVLAConfig(text_config={"vocab_size": 1000}, pad_to_multiple_of=8, n_action_bins=100)
    assert config.action_vocab_size == 992 and config.image_token_id == 999
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert model.action_tokenizer.token_range == (892, 992)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_backbone_id": "siglip-vit-so400"}, "Did you mean 'siglip-vit-so400m'"),
        ({"llm_backbone_id": "llama2-7b"}, "Did you mean 'llama2-7b-"),
        ({"image_resize_strategy": "crop"}, "resize-crop"),
        ({"timm_model_kwargs": [{}, {}]}, "2 entries for 1 vision tower"),
        ({"text_config": {"vocab_size": 200}}, "n_action_bins=256 does not fit"),
        ({"text_config": {"model_type": "mamba", "vocab_size": 400}}, "'mamba', which has no attention.*such as llama"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**fields)


@pytest.mark.parametrize("field", [[8], "int8", 8, {"quant_method": 5}, {"quant_method": ["openvla"], "bits": 8}])
def test_a_quantization_that_is_none(field, tmp_path):
    """The library's own errors name nothing, and with a number as the method the weights were loaded as they are."""
    OpenVLAConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": field}))
    with pytest.raises(ValueError, match=r"quantization_config of '.*config.json' is .*names its quant_method"):
        OpenVLAConfig.from_pretrained(tmp_path)


def test_old_transformers_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "transformers.py").write_text("__version__ = '4.40.1'\n")
    result = processes.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import openvla", server="libraries")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: OpenVLA needs transformers >= 5.4, found 4.40.1: run `pip install -U transformers`."
    )


def test_an_export_is_no_model_to_load(tmp_path):
    (tmp_path / "vision.onnx").touch()
    with pytest.raises(FileNotFoundError, match="no config.json.*an export to ONNX, which openvla_runtime.OnnxPolicy"):
        OpenVLAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, given",
    [("normalization", "normalisation"), ("camera_names", "camera_name"), ("action_chunk", "actionChunk")],
)
def test_a_field_that_is_misspelled_in_the_file(name, given, tmp_path):
    """The library keeps any name: the model acted in other units, or through another camera, unsaid."""
    OpenVLAConfig(text_config={"vocab_size": 320}).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenVLAConfig.from_pretrained(tmp_path)
    content[given] = content.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"config.json': '{given}' is no field.*Did you mean '{name}'"):
        OpenVLAConfig.from_pretrained(tmp_path)
