"""Policies in the loop: environments, recording, evaluation, reports.

environment = make_environment("metaworld")
observation = environment.reset(seed=EVALUATION_SEEDS[0], task="drawer-open-v3")
observation, success = environment.step(environment.expert_action())
"""

from .environment import (
    EVALUATION_SEEDS,
    RECORDING_SEEDS,
    Environment,
    Observation,
    choose_tasks,
    make_environment,
)


__all__ = [
    "EVALUATION_SEEDS",
    "RECORDING_SEEDS",
    "Environment",
    "Observation",
    "choose_tasks",
    "make_environment",
]
