"""Writing HDF5 demonstrations in the style of LIBERO: one file for each task."""

import errno
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from ..episode import EXECUTED, Episode
from ..images import check_size


TEXT = h5py.string_dtype()
MARGIN = 2**20  # bytes of everything but images, and of what the library holds back
# Our names of cameras -> theirs; others keep their names
CAMERAS = {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}


def write_hdf5(episodes: Iterable[Episode], path: Path, *, env_name: str = "", frequency: float = 0.0) -> None:
    """Write demonstrations of one task to `path`, by custom `<words_of_the_task>_demo.hdf5`.

    `data` says the instruction of the first demonstration (`problem_info`), and one that differs its own; instructions
    that change along the way are a data set `language_instruction`, one for each step. Images are
    compressed frame by frame, so that any of them is read alone. States of 8 dimensions are stored as LIBERO's,
    `ee_states` (6) and `gripper_states` (2); others as `obs/state`. Actions stay as they are: here a gripper of 1 is
    open, where LIBERO's own files have -1. The file appears when it is complete.

    Raises:
        FileExistsError: If it is there already.
        ValueError: If there are no episodes, or images of one camera and episode differ in size.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = total = 0
    with h5py.File(part, "w") as file:
        data = file.create_group("data")
        for episode in episodes:
            check_room(episode, path)
            group = data.create_group(f"demo_{count}")
            if not count:
                data.attrs["problem_info"] = _problem_info(episode, env_name)
            if episode.step_instructions is not None:  # read where problem_info has none
                group.attrs["problem_info"] = _problem_info(replace(episode, instruction=""), env_name)
                group.create_dataset("language_instruction", data=list(episode.step_instructions), dtype=TEXT)
            elif _problem_info(episode, env_name) != data.attrs["problem_info"]:
                group.attrs["problem_info"] = _problem_info(episode, env_name)
            _write_episode(group, episode)
            count, total = count + 1, total + len(episode)
        arguments = {"env_name": env_name, "type": 1, "env_kwargs": {"control_freq": frequency}}
        data.attrs["env_args"] = json.dumps(arguments)
        data.attrs["env_name"], data.attrs["bddl_file_name"] = env_name, ""
        data.attrs["macros_image_convention"] = "opencv"  # the highest row first; LIBERO's own are "opengl"
        data.attrs["num_demos"], data.attrs["total"] = str(count), str(total)
    if not count:
        part.unlink()
        raise ValueError(f"No episodes to write to {path}.")
    part.replace(path)


def check_room(episode: Episode, path: Path) -> None:
    """Raise an `OSError` where the disk may not hold an episode: on a full one the library ends the process."""
    sizes = [len(frames) * frames[0].nbytes for frames in episode.images.values()]
    needed, free = sum(sizes) + MARGIN, shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e6:.0f} MB may be needed for an episode and {free / 1e6:.0f} MB are free",
            str(path),
        )


def _problem_info(episode: Episode, problem: str) -> str:
    info = {"problem_name": problem, "domain_name": episode.dataset_name, "language_instruction": episode.instruction}
    return json.dumps(info)


def _write_episode(group: h5py.Group, episode: Episode) -> None:
    group.attrs["num_samples"] = str(len(episode))
    last = np.zeros(len(episode), dtype=np.uint8)
    last[-1] = 1
    group.create_dataset("actions", data=episode.actions.astype(np.float64))
    if episode.executed is not None:
        group.create_dataset(EXECUTED, data=episode.executed.astype(np.float64))
    group.create_dataset("rewards", data=last)
    group.create_dataset("dones", data=last)
    seen = group.create_group("obs")
    for camera, frames in episode.images.items():
        _write_images(seen, CAMERAS.get(camera, camera), frames)
    if episode.state is None or not episode.state.shape[1]:
        return
    state = episode.state.astype(np.float64)
    if state.shape[1] != 8:
        seen.create_dataset("state", data=state)
        return
    seen.create_dataset("ee_states", data=state[:, :6])
    seen.create_dataset("ee_pos", data=state[:, :3])
    seen.create_dataset("ee_ori", data=state[:, 3:6])
    seen.create_dataset("gripper_states", data=state[:, 6:])


def _write_images(group: h5py.Group, name: str, frames: Sequence[np.ndarray]) -> None:
    shape = frames[0].shape
    images = group.create_dataset(
        name, (len(frames), *shape), np.uint8, chunks=(1, *shape), compression="gzip", compression_opts=1, shuffle=False
    )
    for step in range(len(frames)):
        image = frames[step]
        check_size(image.shape, shape, f"{group.name}/{name}, step {step}")
        images[step] = image
