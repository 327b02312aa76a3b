"""Presets: the published shapes follow from the configurations, unknown names are answered with the nearest."""

import math

import pytest
import torch

from openvla import ActionTokenizer, OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAImageProcessor
from openvla.action_tokenizer import get_action_stats
from openvla.configuration_openvla import IMAGE_RESIZE_STRATEGIES, LLM_BACKBONES, VISION_BACKBONES
from openvla.presets import ROOT, load_base_vlms, load_preset_config, load_preset_statistics, preset_names


def test_names():
    assert preset_names() == ["libero", "openvla-7b", "openvla-v01-7b"]


@pytest.mark.parametrize(
    "name, tensors, parameters, projector, resize",
    [
        ("openvla-7b", 982, 7_541_237_184, [(8704, 2176), (4096, 8704), (4096, 4096)], "resize-naive"),
        ("openvla-v01-7b", 637, 7_188_124_608, [(4096, 1152), (4096, 4096)], "letterbox"),
    ],
)
def test_config_describes_the_published_checkpoint(name, tensors, parameters, projector, resize):
    config = load_preset_config(name)
    assert isinstance(config, OpenVLAConfig)
    assert config.image_resize_strategy == resize
    assert config.norm_stats is None, "statistics stand once, in dataset_statistics.json"
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in OpenVLAForActionPrediction(config).state_dict().items()}
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert [shapes[key] for key in shapes if key.startswith("projector.") and key.endswith("weight")] == projector
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)
    assert ActionTokenizer(config.action_vocab_size).token_range == (31744, 32000)


@pytest.mark.parametrize("name", ["openvla-7b", "openvla-v01-7b"])
def test_image_processor_fits_the_config(name):
    config, processor = load_preset_config(name), OpenVLAImageProcessor.from_pretrained(ROOT / name)
    assert processor.image_resize_strategy == config.image_resize_strategy
    assert processor.input_sizes == [[3, size, size] for size in config.image_sizes]


@pytest.mark.parametrize("name, datasets", [("openvla-7b", 25), ("libero", 4)])
def test_statistics(name, datasets):
    statistics = load_preset_statistics(name)
    assert len(statistics) == datasets
    for key in statistics:
        assert len(get_action_stats(statistics, key)["q01"]) == 7
        assert statistics[key]["num_transitions"] > 0


def test_published_numbers():
    bridge = load_preset_statistics("openvla-7b")["bridge_orig"]
    assert bridge["num_trajectories"] == 60064
    assert bridge["action"]["mask"] == [True] * 6 + [False]
    assert sorted(load_preset_statistics("libero")) == ["libero_10", "libero_goal", "libero_object", "libero_spatial"]


def test_base_vlms_name_known_parts():
    base_vlms = load_base_vlms()
    assert base_vlms["prism-dinosiglip-224px+7b"] == {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "image_resize_strategy": "resize-naive",
    }
    for parts in base_vlms.values():
        assert parts["vision_backbone_id"] in VISION_BACKBONES
        assert parts["llm_backbone_id"] in LLM_BACKBONES
        assert parts["image_resize_strategy"] in IMAGE_RESIZE_STRATEGIES


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match="Did you mean 'openvla-7b'.*Known: libero"):
        load_preset_config("openvla7b")
    with pytest.raises(ValueError, match="'libero' holds no configuration.*openvla-7b"):
        load_preset_config("libero")
    with pytest.raises(ValueError, match="'openvla-v01-7b' holds no action statistics.*libero, openvla-7b"):
        load_preset_statistics("openvla-v01-7b")
