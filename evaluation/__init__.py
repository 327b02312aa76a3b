"""Policies in the loop: environments, recording, evaluation, reports.

environment = make_environment("metaworld")
observation = environment.reset(seed=EVALUATION_SEEDS[0], task="drawer-open-v3")
observation, success = environment.step(environment.expert_action())
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .environment import (
        EVALUATION_SEEDS,
        RECORDING_SEEDS,
        Environment,
        Observation,
        choose_tasks,
        make_environment,
    )


def __getattr__(name: str):
    """Names are imported when they are first used: the command line reads options without numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".environment", __name__), name)


__all__ = [
    "EVALUATION_SEEDS",
    "RECORDING_SEEDS",
    "Environment",
    "Observation",
    "choose_tasks",
    "make_environment",
]
