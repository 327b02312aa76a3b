"""A simulator as `openvla serve --sim` hands it to its page: worlds in processes of their own, tasks in words."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..observation import Observation
from .attributes import instructions_of
from .environment import (
    EVALUATION_SEEDS,
    choose_tasks,
    environment_class,
    make_environment,
    renders,
    usual_tasks,
    with_cameras,
)
from .rendering import opengl_backend
from .report import without_paths
from .workers import EnvironmentFailure, EnvironmentProcess


class ServedWorld:
    """An environment that breaks alone. Its methods block.

    Args:
        cameras: What a model sees: where it sees a wrist, the world shows one.
    """

    def __init__(self, env: str, cameras: Sequence[str]):
        self._process = EnvironmentProcess(partial(make_environment, env, **with_cameras({}, env, cameras)))

    def reset(self, seed: int, task: str) -> Observation:
        """See `Environment`; also for errors of `step`.

        Raises:
            EnvironmentFailure: If it broke; says why, without paths.
        """
        return self._call("reset", seed, task)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        return self._call("step", action)

    def close(self) -> None:
        self._process.stop()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._process.ask(method, *arguments)
            return self._process.answer()
        except EnvironmentFailure as failure:
            raise EnvironmentFailure(without_paths(str(failure))) from failure


def served(env: str = "metaworld") -> dict[str, Any]:
    """The fields of `serving.episodes.Simulator`: the usual tasks of an environment, from seeds of evaluation.

    Raises:
        ValueError: If the simulator is not installed.
        NoOpenGL: If there is nothing to render with.
    """
    if renders(environment_class(env)):
        opengl_backend()
    environment = make_environment(env, render=False)  # which environments that cannot be without pictures leave out
    try:
        tasks = choose_tasks(environment, usual_tasks(environment))
        return {
            "name": env,
            "make": partial(ServedWorld, env),
            "tasks": {task: instructions_of(environment, task)[0] for task in tasks},
            "max_steps": environment.max_steps,
            "frequency": environment.frequency,
            "seeds": EVALUATION_SEEDS,
            "unnorm_keys": (*getattr(environment, "unnorm_keys", ()), env),
        }
    finally:
        environment.close()
