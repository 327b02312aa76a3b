"""How late answers are in real-time control: seconds of one prediction, measured, or as they were written down."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..observation import Observation
from ..policy import Policy, begin_episode
from .environment import EVALUATION_SEEDS, Environment
from .report import NoEpisodes, without_paths
from .workers import EnvironmentFailure, EnvironmentProcess


def decide_latency(
    given: float | None,
    before: Mapping[str, Any],
    policy: Policy | None,
    make: Callable[[], Environment],
    first: tuple[str, str],
    folder: Path,
) -> float:
    """Seconds that a prediction takes, as they are written down: those of the settings that the folder was begun with,
    those given, or measured on what is seen first.

    Args:
        first: Variation and task of the first episode.

    Raises:
        ValueError: If others are given than the folder was begun with.
    """
    known = before.get("latency")
    if known is not None and given is not None and round(given, 4) != known:
        raise ValueError(
            f"'{folder}' holds another evaluation: latency was {known:g}, is {given:g}. Leave it out to continue, or "
            "choose another folder."
        )
    if known is not None:
        return float(known)
    if given is None and policy is not None:
        variation, task = first
        process = EnvironmentProcess(make)
        try:
            process.ask("reset", EVALUATION_SEEDS[0], task, variation)
            given = median_latency(policy, process.answer())
        except EnvironmentFailure as failure:
            raise NoEpisodes(f"No latency can be measured: {without_paths(str(failure))}.") from failure
        finally:
            process.stop()
    return round(float(given or 0.0), 4)


def single_latency(policy: Policy, instruction: str, size: int) -> float:
    """`median_latency` of an observation that nothing has seen: noise, and a state of eight zeros."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    images = {"image": image, "wrist_image": image}
    return median_latency(policy, Observation(images, np.zeros(8, dtype=np.float32), instruction))


def median_latency(policy: Policy, observation: Observation) -> float:
    """Median seconds of ten predictions for one observation, after two to warm up; each the first of an episode, as a
    policy that keeps its last action would have it easy with the same observation again."""
    times = []
    for _ in range(12):
        begin_episode(policy)
        started = time.perf_counter()
        policy.act([observation])
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))
