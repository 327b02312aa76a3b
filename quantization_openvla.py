"""Quantized loading: what stays unquantized, the original's keywords, and workarounds for bitsandbytes."""

import logging
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig


# "projector" is part of the names of those of state and noisy actions too.
NOT_QUANTIZED = [
    "vision_backbone",
    "projector",
    "lm_head",
    "action_head",
    "proprio_projector",
    "noisy_action_projector",
]


def take_quantization(kwargs: dict[str, Any]) -> None:
    """Leave in the arguments of `from_pretrained` one `quantization_config`, or none.

    `load_in_8bit` and `load_in_4bit` (the original's evaluation always passes both) and options that begin with
    `bnb_4bit_` or `llm_int8_` are those of transformers 4. Towers, projector and lm_head are excepted, unless the
    config names exceptions itself.

    Raises:
        ValueError: If both are asked for, or one beside a `quantization_config`.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    asked = [name for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)]
    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(("bnb_4bit_", "llm_int8_"))}
    given = kwargs.get("quantization_config")
    if len(asked) > 1 or (asked and given is not None):
        raise ValueError(
            f"{' and '.join(f'{name}=True' for name in asked)}{' beside a quantization_config' if given else ''}: a "
            "model is quantized in one way, give one of them."
        )
    if asked:
        given = BitsAndBytesConfig(**{asked[0]: True}, **options)
    if isinstance(given, dict):
        given = AutoQuantizationConfig.from_dict(given)
    if given is not None:
        kwargs["quantization_config"] = _keep_out(given)


def _is_news(record: logging.LogRecord) -> bool:
    """bitsandbytes 0.50 says at every int8 layer of every token that it computes in float16, as int8 always does."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _keep_out(quantization_config):
    """The same config with towers, projector and lm_head excepted, unless it names exceptions itself."""
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization_config, name) and getattr(quantization_config, name) is None:
            quantization_config = type(quantization_config).from_dict(quantization_config.to_dict())
            setattr(quantization_config, name, list(NOT_QUANTIZED))
    return quantization_config


def turn_block_scales_back(model: nn.Module) -> None:
    """bitsandbytes 0.50 packs 4-bit weights when they first run on a CPU and, without double quantization, forgets to
    turn the scales of their blocks back when it unpacks them for saving."""
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        packed = state is not None and getattr(state, "packing_format_for_cpu", False)
        if packed and not state.original_nested and state.absmax.ndim == 2:
            state.absmax = state.absmax.T.flatten().float()


def keep_split_blocks_from_packing(model: nn.Module) -> None:
    """bitsandbytes 0.50 packs 4-bit weights for CPUs with AVX512-BF16, and fails where a row ends inside a block or the
    rows are no multiple of 32."""
    layer: Any
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            divides = layer.in_features % layer.weight.blocksize == 0 and layer.out_features % 32 == 0
            layer.support_avx512bf16_for_cpu = divides


__all__ = ["NOT_QUANTIZED"]
