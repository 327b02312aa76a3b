"""Fine-tuning: which parameters learn, a run, and merging what it learned."""

from .finetune import FinetuneOptions, finetune, merge_adapter
from .strategies import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters


__all__ = [
    "STRATEGIES",
    "FinetuneOptions",
    "apply_strategy",
    "finetune",
    "merge_adapter",
    "qlora_quantization",
    "trainable_parameters",
]
