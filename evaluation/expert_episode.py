"""One episode of a scripted expert, and the file it waits in until all are there."""

import os
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.episode import EncodedImages, Episode
from ..data.images import ImageFormat, encode_image
from ..folders import whole_file
from ..policy import Policy, begin_episode, chunk_of
from .attributes import instructions_of
from .control import BlockingControl, RealtimeControl
from .environment import (
    Environment,
    action_spec_of,
    check_action,
    check_expert,
    check_form,
    check_observation,
    check_step,
    standstill,
)


class LateAnswers:
    """In spells of 1 to `delay` steps the robot does what the expert answered 1 to `delay` steps ago; between them are
    1 to 2 * `delay` steps without delay.

    Args:
        start: (A,) what is executed where the expert had not answered yet.
    """

    def __init__(self, delay: int, start: np.ndarray, generator: np.random.Generator) -> None:
        self._most, self._start, self._generator = delay, start, generator
        self._age, self._left = int(generator.integers(2)), 0  # of what is executed; steps to go with it

    def executed(self, answers: list[np.ndarray]) -> np.ndarray:
        """(A,) what is done at a step, of the answers until then, the newest last."""
        if not self._left:
            late = not self._age
            self._age = int(self._generator.integers(1, self._most + 1)) if late else 0
            self._left = int(self._generator.integers(1, (1 if late else 2) * self._most + 1))
        self._left -= 1
        return answers[-1 - self._age] if self._age < len(answers) else self._start


def record_episode(
    environment: Environment,
    task: str,
    seed: int,
    *,
    variation: str = "",
    noise: float = 0.0,
    delay: int = 0,
    student: Policy | None = None,
    latency: float = 0.0,
    paraphrases: bool = False,
    after_success: int = 5,
    image_format: ImageFormat = "jpeg",
) -> Episode | None:
    """One episode of the expert; None where it does not succeed within the environment's `max_steps`.

    The observation of a step is what was seen before its action. Noise and wording follow from `seed` and `task`; each
    episode draws its own standard deviation between 0 and `noise`.

    Args:
        delay: Steps by which answers of the expert are late at most, see `LateAnswers`; 0: none is.
        student: Acts in the first steps, of which each episode draws the number up to half of `max_steps`. The actions
            of the episode are the expert's nevertheless (DAgger, arXiv 1011.0686).
        latency: Seconds that the student takes for an answer, while the world goes on and it continues what is executed
            ("prefix" of `RealtimeControl`); each episode draws its own between 0 and this.

    Raises:
        ValueError: If the expert or the student gives something that is no action.
    """
    generator, spec = np.random.default_rng([seed, zlib.crc32(task.encode())]), action_spec_of(environment)
    moved = [dim for dim in range(min(3, spec.action_dim)) if dim not in spec.grippers]  # by noise
    observation = first = check_observation(environment.reset(seed, task, variation))
    texts = instructions_of(environment, task) if paraphrases else ()
    if observation.instruction not in texts:  # a variation that words the task itself
        texts = (observation.instruction,)
    instruction = texts[int(generator.integers(len(texts)))]
    images: dict[str, list[bytes]] = {camera: [] for camera in observation.images}
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    done: list[np.ndarray] = []  # what was executed
    strength = noise * generator.random()
    driven = generator.integers(environment.max_steps // 2 + 1) if student is not None else 0
    control: BlockingControl | RealtimeControl = BlockingControl(execute=1)
    if student is not None:
        begin_episode(student)
        if latency:
            latency *= generator.random()
            control = RealtimeControl(environment.frequency, standstill(environment), chunking="prefix")
    late = LateAnswers(delay, standstill(environment), generator) if delay else None
    left: int | None = None  # steps to go, once the task is done
    while left != 0:
        if left is None and len(actions) == environment.max_steps:
            return None
        for camera, image in observation.images.items():
            if image.shape != (shape := first.images[camera].shape):  # else it is said when all episodes are recorded
                raise ValueError(
                    f"step() shows '{camera}' as {image.shape}, and reset() as {shape}: in a data set all have one "
                    "size, so give all the same."
                )
            images[camera].append(encode_image(image, image_format))
        action = check_expert(environment, environment.expert_action()).astype(np.float32)
        states.append(np.array(observation.state))  # a simulator may give one array, which it changes
        actions.append(action)
        step = len(actions) - 1
        if student is not None and step < driven:
            if control.wants_action(step):
                committed = control.committed(step, latency, chunk_of(student))
                answer = student.act([replace(observation, instruction=instruction, step=step, committed=committed)])
                control.give(step, np.squeeze(np.asarray(answer), axis=0), latency)
            executed = check_action(control.action(step), len(action))
        else:
            executed = np.array(action if late is None else late.executed(actions))
            executed[moved] += strength * generator.standard_normal(3)[moved]
        done.append(executed.astype(np.float32))
        observation, success = check_step(environment.step(executed))
        check_form(observation, first)
        if left is not None:
            left -= 1
        elif success:
            left = after_success
    return Episode(
        instruction=instruction,
        actions=np.stack(actions),
        images={camera: EncodedImages(frames) for camera, frames in images.items()},
        state=np.stack(states),
        dataset_name=task,
        index=seed,
        executed=np.stack(done) if noise or delay or student is not None else None,
    )


def save_episode(episode: Episode, file: Path, *, seed: int, failed: int) -> None:
    """Write an episode with its encoded images, complete or not at all.

    Args:
        failed: Attempts of the expert before the one that succeeded.
    """
    arrays: dict[str, Any] = {"actions": episode.actions, "state": episode.state}
    if episode.executed is not None:
        arrays["executed"] = episode.executed
    for camera, frames in episode.images.items():
        assert isinstance(frames, EncodedImages)
        arrays[f"bytes.{camera}"] = np.frombuffer(b"".join(frames.encoded), np.uint8)
        arrays[f"sizes.{camera}"] = np.array([len(data) for data in frames.encoded])
    # Of this process alone: a worker of a killed run may still be at the same episode.
    with whole_file(file, file.with_suffix(f".{os.getpid()}.part")) as part, open(part, "wb") as stream:
        np.savez(stream, instruction=episode.instruction, seed=seed, failed=failed, **arrays)


def is_episode(file: Path, executed: bool = False) -> bool:
    """Whether there is a file as `save_episode` writes it, and where `executed` is needed, with that: earlier versions
    left it out. A disk that lost power may keep a part of one."""
    needed = {"actions.npy", "seed.npy", "failed.npy"} | ({"executed.npy"} if executed else set())
    try:
        with zipfile.ZipFile(file) as archive:
            return needed <= set(archive.namelist()) and archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False


def load_episode(file: Path, dataset_name: str) -> Episode:
    """What `save_episode` wrote."""
    with np.load(file) as arrays:
        images = {}
        for camera in (name.removeprefix("bytes.") for name in arrays if name.startswith("bytes.")):
            data, ends = arrays[f"bytes.{camera}"].tobytes(), np.cumsum(arrays[f"sizes.{camera}"]).tolist()
            images[camera] = EncodedImages([data[start:end] for start, end in zip([0, *ends], ends)], str(file))
        return Episode(
            instruction=str(arrays["instruction"]),
            actions=arrays["actions"],
            images=images,
            state=arrays["state"],
            dataset_name=dataset_name,
            index=int(arrays["seed"]),
            origin=str(file),
            executed=arrays["executed"] if "executed" in arrays else None,
        )
