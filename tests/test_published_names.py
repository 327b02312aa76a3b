"""What scripts written against the original import, register, pass and read."""

from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from tiny import golden_image

import openvla
from openvla import AutoModelForVision2Seq, OpenVLAForActionPrediction


ROOT = Path(__file__).resolve().parents[1]
REGISTER = f"""
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from openvla import AutoModelForVision2Seq, OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla import PrismaticImageProcessor, PrismaticProcessor
from openvla.configuration_openvla import TRANSFORMERS

# Where a folder brings code, the auto classes of transformers 5.4 take that instead of what is registered.
trust = {{"trust_remote_code": TRANSFORMERS > (5, 4)}}

AutoConfig.register("openvla", OpenVLAConfig)
AutoImageProcessor.register(OpenVLAConfig, PrismaticImageProcessor)
AutoProcessor.register(OpenVLAConfig, PrismaticProcessor)
AutoModelForVision2Seq.register(OpenVLAConfig, OpenVLAForActionPrediction)
for folder in ({str(ROOT)!r}, {str(ROOT / "tests" / "fixtures" / "tiny-openvla-fused")!r}):
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert isinstance(processor, OpenVLAProcessor), type(processor)
    images = AutoImageProcessor.from_pretrained(folder, **trust)
    assert images.to_dict() == processor.image_processor.to_dict()
    assert isinstance(AutoConfig.from_pretrained(folder, **trust), OpenVLAConfig)
model = AutoModelForVision2Seq.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
assert isinstance(model, OpenVLAForActionPrediction)
assert isinstance(AutoModel.from_pretrained({str(ROOT)!r}), OpenVLAForActionPrediction)
"""


def test_registering_the_published_names_again():
    """As the original's fine-tuning and evaluation scripts begin; in a process of its own, because it lasts."""
    result = processes.run(REGISTER, server="transformers")
    assert result.returncode == 0, result.stderr[-3000:]


def test_names_on_a_model(tiny_checkpoint, tiny_model):
    config = tiny_model.config
    assert tiny_model.vocab_size == config.text_config.vocab_size - config.pad_to_multiple_of
    assert tiny_model.bins.tolist() == np.linspace(-1, 1, config.n_action_bins).tolist()
    assert tiny_model.bin_centers.shape == (config.n_action_bins - 1,)
    assert tiny_model.pad_token_id == config.pad_token_id and tiny_model.llm_dim == config.text_config.hidden_size
    assert tiny_model.vision_backbone.use_fused_vision_backbone is config.use_fused_vision_backbone
    assert OpenVLAForActionPrediction._check_unnorm_key(tiny_model.norm_stats, "bridge_orig") == "bridge_orig"
    with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
        tiny_model._check_unnorm_key(tiny_model.norm_stats, "bridge_org")
    # What the original computes from these names
    image_processor = tiny_checkpoint.processor().image_processor
    pixels = image_processor.apply_transform(golden_image(0))
    assert torch.equal(pixels, image_processor(golden_image(0), return_tensors="pt")["pixel_values"][0])
    prediction = tiny_model.predict_action(golden_image(0), "stop", unnorm_key="bridge_orig", return_dict=True)
    bins = np.clip(tiny_model.vocab_size - prediction.token_ids - 1, 0, len(tiny_model.bin_centers) - 1)
    assert tiny_model.bin_centers[bins].tolist() == prediction.normalized_actions.tolist()
    output = tiny_model(input_ids=torch.tensor([[1, 2]]))
    assert isinstance(output, openvla.PrismaticCausalLMOutputWithPast)


def test_resized_embeddings(tiny_checkpoint):
    """The action tokens stay where they are, and so does the name from which scripts compute them."""
    model = tiny_checkpoint.load()
    end = model.vocab_size
    before = model.predict_action(golden_image(0), "stop", unnorm_key="bridge_orig")
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64)
    assert model.vocab_size == end
    assert model.predict_action(golden_image(0), "stop", unnorm_key="bridge_orig").tolist() == before.tolist()


def test_the_evaluation_of_the_original_passes_both_quantization_keywords():
    model = AutoModelForVision2Seq.from_pretrained(ROOT, load_in_8bit=False, load_in_4bit=False, trust_remote_code=True)
    assert getattr(model, "quantization_method", None) is None
