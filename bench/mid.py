"""A model between the embedded policy and the published size: large enough for weights to matter, and soon made."""

from pathlib import Path

import torch

from ..modeling_openvla import OpenVLAForActionPrediction
from ..presets import load_preset_config, load_preset_statistics


TOWER = {"img_size": 224, "embed_dim": 384, "depth": 6, "num_heads": 6}
LANGUAGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}
GAIN = 3.0  # of the output rows of action tokens, so that these are chosen where any token may be


def mid_model(folder: Path) -> Path:
    """Write a model of the published form and 0.25 billion random weights in float32, without a tokenizer."""
    config = load_preset_config("openvla-7b")
    config.timm_model_kwargs = [TOWER] * len(config.timm_model_ids)
    config.text_config.update(LANGUAGE)
    config.norm_stats = {"bridge_orig": load_preset_statistics("openvla-7b")["bridge_orig"]}
    config.empty_token_id = 29871
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config)
    first, end = model.action_tokenizer.token_range
    with torch.no_grad():
        model.language_model.lm_head.weight[first:end] *= GAIN
    model.save_pretrained(folder)
    return folder
