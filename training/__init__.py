"""Fine-tuning: which parameters learn, a run, and merging what it learned.

Names are imported when they are first used: the command line reads the options without what training needs.
"""

import importlib
from typing import TYPE_CHECKING

from .options import FinetuneOptions


if TYPE_CHECKING:
    from .checkpoints import merge_adapter
    from .preparation import plan_run
    from .run import finetune
    from .strategies import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters

_MODULES = {
    "merge_adapter": "checkpoints",
    "finetune": "run",
    "plan_run": "preparation",
    "STRATEGIES": "strategies",
    "apply_strategy": "strategies",
    "qlora_quantization": "strategies",
    "trainable_parameters": "strategies",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


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
