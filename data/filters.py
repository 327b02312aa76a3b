"""What is left out of training, each filter counting what it removed. A reader itself drops nothing."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..prompts_openvla import has_words, plain_text
from .episode import CameraImages, Episode


# A filter gives the mask of steps to keep, (T,), for an episode, given which dimensions are grippers; none kept drops
# the episode.
StepFilter = Callable[[Episode, Sequence[int]], np.ndarray]
LAST = (-1,)


def keep_labeled(episode: Episode, grippers: Sequence[int] = LAST) -> np.ndarray:
    """The steps that have an instruction."""
    if episode.step_instructions:
        return np.array([has_words(text) for text in episode.step_instructions])
    return np.full(len(episode), has_words(episode.instruction))


def keep_moving(episode: Episode, grippers: Sequence[int] = LAST) -> np.ndarray:
    """Without LIBERO-style no-ops: steps of which all but the gripper is smaller than 1e-4 (L2 norm) and whose gripper
    is that of the last step kept. The first step is judged by its norm alone."""
    return moving(_arm(episode, grippers), episode.actions[:, list(grippers)])


def moving(arm: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """(T,) bool, see `keep_moving`; the dimensions of an action that are no grippers, and those that are."""
    still = np.linalg.norm(arm.astype(np.float64), axis=1) < 1e-4
    keep, last = np.zeros(len(still), dtype=bool), None
    for step, now in enumerate(gripper):
        if still[step] and (last is None or (now == last).all()):
            continue
        keep[step], last = True, now
    return keep


def keep_nonzero(episode: Episode, grippers: Sequence[int] = LAST) -> np.ndarray:
    """Without steps whose action is zero in every dimension but the gripper (Bridge)."""
    return (_arm(episode, grippers) != 0).any(axis=1)


def _arm(episode: Episode, grippers: Sequence[int]) -> np.ndarray:
    return np.delete(episode.actions, list(grippers), axis=1)


# The filters that act on actions as recorded, before statistics, by the names that a user types.
RAW_FILTERS: dict[str, StepFilter] = {"no-ops": keep_moving, "zero-actions": keep_nonzero}


def apply_filters(
    episode: Episode,
    filters: Mapping[str, StepFilter],
    removed: Mapping[str, Counter],
    grippers: Sequence[int] = LAST,
) -> Episode:
    """What the filters, one after the other, leave of an episode, perhaps no step; `removed` counts the rest."""
    for name, keep_steps in filters.items():
        keep = keep_steps(episode, grippers)
        removed[name]["steps"] += int((~keep).sum())
        if not keep.all():
            episode = select_steps(episode, np.flatnonzero(keep))
        if not len(episode):
            removed[name]["episodes"] += 1
            break
    return episode


def removal_report(removed: Mapping[str, Mapping[str, int]]) -> str:
    """One line for each filter."""
    return "\n".join(
        f"{name}: removed {counts.get('steps', 0)} steps"
        + (f", of these {counts['episodes']} complete episodes" if counts.get("episodes") else "")
        for name, counts in removed.items()
    )


def told_the_same(episode: Episode) -> list[slice]:
    """The steps of an episode that has some, in parts of one instruction each, as a model reads them: another spelling
    of blanks or capitals is the same one."""
    if episode.step_instructions is None:
        return [slice(0, len(episode))]
    read = {text: plain_text(text) for text in set(episode.step_instructions)}
    texts = [read[text] for text in episode.step_instructions]
    changes = [step for step in range(1, len(texts)) if texts[step] != texts[step - 1]]
    return [slice(start, stop) for start, stop in zip([0, *changes], [*changes, len(texts)], strict=True)]


class SelectedImages(CameraImages):
    """Some steps of other frames, decoded on access."""

    def __init__(self, frames: Sequence[np.ndarray], steps: np.ndarray):
        self.frames, self.steps = frames, steps

    def __len__(self) -> int:
        return len(self.steps)

    def _decode(self, step: int) -> np.ndarray:
        return self.frames[int(self.steps[step])]

    def _select(self, steps: slice) -> Any:
        chosen = self.steps[steps]
        if len(chosen) == 1:  # one frame is to hold its own image, not those of the complete episode
            return self.frames[int(chosen[0]) : int(chosen[0]) + 1]
        return SelectedImages(self.frames, chosen)


def select_steps(episode: Episode, steps: np.ndarray) -> Episode:
    """An episode of some steps of another, images still encoded."""
    texts = tuple(episode.step_instructions[step] for step in steps) if episode.step_instructions else None
    return Episode(
        instruction=texts[0] if texts else episode.instruction,
        actions=episode.actions[steps],
        images={camera: SelectedImages(frames, steps) for camera, frames in episode.images.items()},
        state=None if episode.state is None else episode.state[steps],
        dataset_name=episode.dataset_name,
        index=episode.index,
        step_instructions=texts if texts and len(set(texts)) > 1 else None,
        origin=episode.origin,
        executed=None if episode.executed is None else episode.executed[steps],
    )
