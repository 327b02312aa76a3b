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
from ..policy import Policy, begin_episode
from .environment import Environment, check_action


def record_episode(
    environment: Environment,
    task: str,
    seed: int,
    *,
    variation: str = "",
    noise: float = 0.0,
    student: Policy | None = None,
    paraphrases: bool = False,
    after_success: int = 5,
    image_format: ImageFormat = "jpeg",
) -> Episode | None:
    """One episode of the expert; None where it does not succeed within the environment's `max_steps`.

    The observation of a step is what was seen before its action. Noise and wording follow from `seed` and `task`; each
    episode draws its own standard deviation between 0 and `noise`.

    Args:
        student: Acts in the first steps, of which each episode draws the number up to half of `max_steps`. The actions
            of the episode are the expert's nevertheless (DAgger, arXiv 1011.0686).

    Raises:
        ValueError: If the student gives something that is no action.
    """
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    observation = environment.reset(seed, task, variation)
    texts = environment.instructions(task) if paraphrases else (observation.instruction,)
    instruction = texts[generator.integers(len(texts))]
    images: dict[str, list[bytes]] = {camera: [] for camera in observation.images}
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    done: list[np.ndarray] = []  # what was executed
    strength = noise * generator.random()
    driven = generator.integers(environment.max_steps // 2 + 1) if student is not None else 0
    if student is not None:
        begin_episode(student)
    left: int | None = None  # steps to go, once the task is done
    while left != 0:
        if left is None and len(actions) == environment.max_steps:
            return None
        for camera, image in observation.images.items():
            images[camera].append(encode_image(image, image_format))
        action = environment.expert_action().astype(np.float32)
        states.append(observation.state)
        actions.append(action)
        if student is not None and len(actions) <= driven:
            answer = student.act([replace(observation, instruction=instruction)])
            first = np.atleast_2d(np.squeeze(np.asarray(answer), axis=0))[0]  # of a chunk
            executed = check_action(first, len(action))
        else:
            executed = action.copy()
            executed[:3] += strength * generator.standard_normal(3)
        done.append(executed)
        observation, success = environment.step(executed)
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
        executed=np.stack(done) if noise or student is not None else None,
    )


def save_episode(episode: Episode, file: Path, *, seed: int, failed: int) -> None:
    arrays: dict[str, Any] = {"actions": episode.actions, "state": episode.state}
    if episode.executed is not None:
        arrays["executed"] = episode.executed
    for camera, frames in episode.images.items():
        assert isinstance(frames, EncodedImages)
        arrays[f"bytes.{camera}"] = np.frombuffer(b"".join(frames.encoded), np.uint8)
        arrays[f"sizes.{camera}"] = np.array([len(data) for data in frames.encoded])
    # Of this process alone: a worker of a killed run may still be at the same episode.
    part = file.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as stream:
        np.savez(stream, instruction=episode.instruction, seed=seed, failed=failed, **arrays)
    part.replace(file)


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
