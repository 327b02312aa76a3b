"""Fine-tuning: which parameters learn, a run, and merging what it learned."""

from ..options.training import FinetuneOptions
from .checkpoints import merge_adapter
from .dry_run import plan_run
from .run import finetune
from .strategies import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters


__all__ = [
    "STRATEGIES",
    "FinetuneOptions",
    "apply_strategy",
    "finetune",
    "merge_adapter",
    "plan_run",
    "qlora_quantization",
    "trainable_parameters",
]
