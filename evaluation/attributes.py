"""What a simulator says of itself, looked at before it is used: a text in place of a list is a list of letters."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from ..action_spec import ActionSpec


NAMES = ("tasks", "task_sets", "max_steps", "frequency", "robot", "state_names")  # that every environment has


def check_attributes(environment: Any, name: str) -> None:
    """Raise a `ValueError` if an attribute of the environment `name` is missing, or is not as `Environment` says."""
    if lacking := [attribute for attribute in NAMES if not hasattr(environment, attribute)]:
        raise ValueError(f"simulator {name!r} has no {', '.join(lacking)}; see docs/extending.md.")
    of = f"simulator {name!r}"
    tasks = check_texts(environment.tasks, f"{of}: tasks")
    if not tasks:
        raise ValueError(f"{of} has no tasks.")
    check_texts(environment.state_names, f"{of}: state_names")
    check_texts(getattr(environment, "unnorm_keys", ()), f"{of}: unnorm_keys")
    if not isinstance(environment.task_sets, Mapping):
        kind = type(environment.task_sets).__name__
        raise ValueError(f"{of}: task_sets is a {kind}, expected {{name: (task, ...)}}, which may be empty.")
    for group, held in environment.task_sets.items():
        if unknown := [task for task in check_texts(held, f"{of}: task_sets[{group!r}]") if task not in tasks]:
            raise ValueError(f"{of}: task_sets[{group!r}] holds {unknown[0]!r}, which is none of its tasks.")
    steps, rate = environment.max_steps, environment.frequency
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{of}: max_steps is {steps!r:.100}, expected a whole number of steps, at least 1.")
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool) or not 0 < float(rate) < math.inf:
        raise ValueError(f"{of}: frequency is {rate!r:.100}, expected actions in a second, above 0.")
    spec = getattr(environment, "action_spec", None)
    if not isinstance(spec, ActionSpec | None):
        raise ValueError(f"{of}: action_spec is a {type(spec).__name__}, expected an ActionSpec (openvla.action_spec).")


def check_texts(given: Any, what: str) -> Sequence[str]:
    """`given`, if it is several texts; a `ValueError` otherwise."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{what} is {given!r:.100}, expected several texts, such as ('one',).")
    return given


def instructions_of(environment: Any, task: str) -> Sequence[str]:
    """Ways to ask for a task, at least one. Raises a `ValueError` if the environment says something else."""
    what = f"instructions({task!r}) of {type(environment).__name__}"
    if not (texts := check_texts(environment.instructions(task), what)):
        raise ValueError(f"{what} gave none, expected the usual one first.")
    return texts


def variations_of(environment: Any, task: str) -> Sequence[str]:
    """What episodes of a task can differ in. Raises a `ValueError` if the environment says something else."""
    return check_texts(environment.variations(task), f"variations({task!r}) of {type(environment).__name__}")
