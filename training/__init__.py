"""Fine-tuning: which parameters learn."""

from .strategies import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters


__all__ = ["STRATEGIES", "apply_strategy", "qlora_quantization", "trainable_parameters"]
