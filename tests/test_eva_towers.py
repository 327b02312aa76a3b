"""Towers of timm's class Eva (DINOv3, EVA-02): positions that are in no file, layers that are called."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.int8_linear_openvla import Int8Linear
from openvla.quantization_openvla import OpenVLAQuantizationConfig
from openvla.training.strategies import STRATEGIES, freeze_unused
from openvla.vision_openvla import create_vision_tower


ROOT = Path(__file__).parents[1]
KINDS = {  # timm's model -> sizes of a small one
    "vit_small_patch16_dinov3": {"embed_dim": 24, "depth": 3, "num_heads": 3},  # rotary positions alone
    "eva02_tiny_patch14_224": {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 16},  # both kinds, biases
    "vit_small_patch16_rope_mixed_224": {"embed_dim": 24, "depth": 3, "num_heads": 3},  # learned frequencies
}
NEW = pytest.mark.skipif(not timm.is_model("vit_small_patch16_dinov3"), reason="a timm without DINOv3")


def with_towers(name, **options) -> OpenVLAForActionPrediction:
    """The tower and SigLIP's kind beside it, in front of a small Llama."""
    processor = OpenVLAProcessor.from_pretrained(ROOT)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = OpenVLAConfig(
        vision_backbone_id="mine",
        llm_backbone_id="mine",
        timm_model_ids=[name, "vit_tiny_patch16_224"],
        image_sizes=[224] * 2,
        timm_model_kwargs=[KINDS[name], {"embed_dim": 24, "depth": 2, "num_heads": 3}],
        use_fused_vision_backbone=True,
        image_resize_strategy=processor.image_processor.image_resize_strategy,
        text_config={
            "model_type": "llama",
            "vocab_size": processor.tokenizer.vocab_size + 64,
            "pad_token_id": 0,
            **text,
        },
        norm_stats=json.loads((ROOT / "dataset_statistics.json").read_text()),
        **options,
    )
    model = OpenVLAForActionPrediction(config).eval()
    with torch.no_grad():
        for name, parameter in model.vision_backbone.named_parameters():
            if name.endswith(("gamma_1", "gamma_2", "bias", "token")):
                parameter.normal_()  # as they are after training: all of them matter
    model.processor = processor
    return model


@NEW
@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_timm(name):
    model = with_towers(name)
    tower = model.vision_backbone.featurizer
    theirs = timm.create_model(name, img_size=224, num_classes=0, **KINDS[name]).eval()
    theirs.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 224, 224)
    (expected,) = theirs.forward_intermediates(pixels, indices=[1], output_fmt="NLC", intermediates_only=True)
    assert expected.shape == (2, 196, 24)
    torch.testing.assert_close(tower(pixels)[0], expected, rtol=1e-5, atol=1e-5)


@NEW
@pytest.mark.parametrize("name", KINDS)
def test_positions_come_back_with_the_weights(name, tmp_path):
    model = with_towers(name)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 6, 224, 224)
    features = model.vision_backbone(pixels)
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.vision_backbone(pixels), features, rtol=0, atol=0)
    half = OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16).eval().vision_backbone(pixels)
    assert torch.equal(half, loaded.to(torch.bfloat16).vision_backbone(pixels)) and half.dtype == torch.bfloat16
    assert (half - features).abs().max() < 0.1 * features.abs().max()
    with torch.device("meta"):
        empty = OpenVLAForActionPrediction(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.eval().vision_backbone(pixels), features)


@NEW
@pytest.mark.parametrize("name", KINDS)
def test_every_layer_acts_and_learns(name):
    model = with_towers(name)
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    both = model.predict_action([dark, light], ["open the drawer"] * 2, return_dict=True)
    one = model.predict_action(dark, "open the drawer", return_dict=True)
    assert both.actions.shape == (2, 7) and both.token_ids[0].tolist() == one.token_ids.tolist()
    inputs = model.processor("In: a\nOut:", dark)
    adapted = STRATEGIES["lora"](model, rank=2)
    freeze_unused(adapted)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    learning = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any(".featurizer.blocks.0.attn." in name for name in learning)
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []


@NEW
def test_a_tower_without_positions_and_tokens(monkeypatch):
    bare = {"class_token": False, "num_reg_tokens": 0}
    monkeypatch.setitem(KINDS, "vit_small_patch16_dinov3", KINDS["vit_small_patch16_dinov3"] | bare)
    model = with_towers("vit_small_patch16_dinov3")
    assert [*model.vision_backbone.featurizer.parameters(recurse=False)] == []
    assert model.to(torch.bfloat16).vision_backbone(torch.randn(1, 6, 224, 224)).dtype == torch.bfloat16


@NEW
def test_rounded_towers(tmp_path):
    model = with_towers("eva02_tiny_patch14_224")
    model.save_pretrained(tmp_path)
    rounded = OpenVLAQuantizationConfig(bits=8, modules_to_not_convert=["lm_head"])
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path, quantization_config=rounded).eval()
    assert isinstance(loaded.vision_backbone.featurizer.blocks[0].attn.qkv, Int8Linear)
    pixels = torch.randn(1, 6, 224, 224)
    features = model.vision_backbone(pixels)
    assert (loaded.vision_backbone(pixels) - features).abs().max() < 0.05 * features.abs().max()


def test_what_such_towers_do_not_take():
    with pytest.raises(ValueError, match="Eva takes no act_layer, got 'quick_gelu'"):
        create_vision_tower("eva02_tiny_patch14_224", 224, "quick_gelu", {})
    with pytest.raises(ValueError, match="not BEiT or Swin"):
        create_vision_tower("beit_base_patch16_224", 224, None, {"depth": 2})
