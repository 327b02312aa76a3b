"""What is left out of training, each filter counting what it removed. A reader itself drops nothing."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .episode import Episode, Frames


# A filter gives (steps, A) -> mask of steps to keep for an episode; none kept drops the episode.
StepFilter = Callable[[Episode], np.ndarray]


def keep_labeled(episode: Episode) -> np.ndarray:
    """Nothing of an episode without any instruction, else all of it."""
    texts = episode.step_instructions or (episode.instruction,)
    return np.full(len(episode), any(text.strip() for text in texts))


def keep_moving(episode: Episode) -> np.ndarray:
    """Without LIBERO-style no-ops: steps of which all but the gripper is smaller than 1e-4 (L2 norm) and whose gripper
    is that of the last step kept. The first step is judged by its norm alone."""
    still = np.linalg.norm(episode.actions[:, :-1].astype(np.float64), axis=1) < 1e-4
    keep, gripper = np.zeros(len(episode), dtype=bool), None
    for step, action in enumerate(episode.actions):
        if still[step] and (gripper is None or action[-1] == gripper):
            continue
        keep[step], gripper = True, action[-1]
    return keep


def keep_nonzero(episode: Episode) -> np.ndarray:
    """Without steps whose action is zero in every dimension but the gripper (Bridge)."""
    return (episode.actions[:, :-1] != 0).any(axis=1)


def keep_below(max_action: float) -> StepFilter:
    """Nothing of an episode in which any value of any action exceeds `max_action` in magnitude."""

    def keep(episode: Episode) -> np.ndarray:
        return np.full(len(episode), bool((np.abs(episode.actions) <= max_action).all()))

    return keep


class Filtered:
    """Episodes after filters, in order, and `removed`: what each filter took away, as steps and whole episodes."""

    def __init__(self, episodes: Iterable[Episode], filters: dict[str, StepFilter]):
        self.episodes, self.filters = episodes, filters
        self.removed: dict[str, Counter] = {name: Counter() for name in filters}

    def __iter__(self) -> Iterator[Episode]:
        self.removed = {name: Counter() for name in self.filters}
        for episode in self.episodes:
            kept = self._apply(episode)
            if kept is not None:
                yield kept

    def _apply(self, episode: Episode) -> Episode | None:
        for name, keep_steps in self.filters.items():
            keep = keep_steps(episode)
            self.removed[name]["steps"] += int((~keep).sum())
            if not keep.any():
                self.removed[name]["episodes"] += 1
                return None
            if not keep.all():
                episode = select_steps(episode, np.flatnonzero(keep))
        return episode

    def report(self) -> str:
        """One line for each filter, once the episodes have been read."""
        return "\n".join(
            f"{name}: removed {counts['steps']} steps, of these {counts['episodes']} whole episodes"
            for name, counts in self.removed.items()
        )


class SelectedFrames(Frames):
    """Some steps of other frames, decoded on access."""

    def __init__(self, frames: Sequence[np.ndarray], steps: np.ndarray):
        self.frames, self.steps = frames, steps

    def __len__(self) -> int:
        return len(self.steps)

    def _decode(self, step: int) -> np.ndarray:
        return self.frames[int(self.steps[step])]

    def _select(self, steps: slice) -> "SelectedFrames":
        return SelectedFrames(self.frames, self.steps[steps])


def select_steps(episode: Episode, steps: np.ndarray) -> Episode:
    """An episode of some steps of another, images still encoded."""
    texts = tuple(episode.step_instructions[step] for step in steps) if episode.step_instructions else None
    return Episode(
        instruction=texts[0] if texts else episode.instruction,
        actions=episode.actions[steps],
        images={camera: SelectedFrames(frames, steps) for camera, frames in episode.images.items()},
        state=None if episode.state is None else episode.state[steps],
        dataset_name=episode.dataset_name,
        index=episode.index,
        step_instructions=texts if texts and len(set(texts)) > 1 else None,
        source=episode.source,
    )
