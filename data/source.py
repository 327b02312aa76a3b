"""One dataset as training sees it: episodes with what makes frames of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np

from ..action_spec import ActionSpec, action_names
from ..action_tokenizer import normalize_actions, scale_of
from .dataset import EpisodeDataset
from .dimensions import check_dims, default_grippers
from .episode import Episode
from .filters import keep_labeled, removal_report, told_the_same
from .oxe.conversions import droid_moves_raw
from .samples import model_cameras
from .statistics import collect, counted
from .survey import Survey, largest_normalized, proprio_statistics
from .trajectory import chunk_act_obs


# What follows in a chunk that begins less than `action_chunk` steps before the end of its episode, or before another
# instruction.
CHUNK_ENDS = {
    "still": "no motion: relative dimensions are 0, absolute ones (grippers) repeat; learned like all else",
    "repeat": "the last action again; not learned",
    "drop": "there are no such chunks: each lies inside its episode, as in OpenVLA-OFT",
}


@dataclass
class Source:
    """One dataset as training sees it."""

    name: str  # the unnorm_key
    dataset: EpisodeDataset  # to train on: standardized, raw filters applied, actions in units of the dataset
    held_out: EpisodeDataset | None  # kept back for evaluation during training; None where there are too few
    statistics: dict[str, Any]  # of all episodes, also held out and unlabeled ones, before normalization
    survey: Survey
    everything: tuple[EpisodeDataset, ...]  # what the statistics are of, without images
    weight: float = 1.0
    camera: str | None = None  # None: `main_camera` decides
    standardize: str | None = None  # name of the standardization
    keep_unlabeled: bool = False
    max_action: float | None = None
    max_proprio: float | None = None
    gripper_dims: tuple[int, ...] | None = None  # that are grippers for certain
    absolute_dims: tuple[int, ...] | Literal["all"] | None = None  # that are places for certain
    frame: str | None = None  # see `ActionSpec`
    unit: str | None = None
    hz: float | None = None
    recorded_names: list[str] | None = None  # of the dimensions of an action
    state_names: list[str] | None = None
    action_chunk: int = 1  # steps that one sample is for
    chunk_end: str = "repeat"  # one of `CHUNK_ENDS`
    normalization: str = "bounds_q99"  # what -1 and 1 stand for, of actions and states; or "bounds", min and max
    camera_names: Sequence[str] = ("primary",)  # what the model sees
    stated: bool = False  # which numbers are changes and which places was said
    as_recorded: tuple[int, ...] | None = None  # grippers in a range of their own, where it was said
    mask_given: bool = False  # which dimensions are scaled was said, and not found from the data

    @property
    def action_dim(self) -> int:
        return len(self.survey.statistics["action"]["q01"])

    @property
    def state_dim(self) -> int:
        """Numbers of a state; 0 where an episode has none, or there are no statistics of them."""
        known = proprio_statistics(self.statistics) if self.survey.proprio else None
        return len((known or {"q01": ()})["q01"])

    @property
    def names(self) -> list[str]:
        """Of the dimensions of an action: as recorded, else the usual ones."""
        names = self.recorded_names or ()
        return list(names) if len(names) == len({*names}) == self.action_dim else action_names(self.action_dim)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Dimensions of an action that are taken for grippers."""
        if self.gripper_dims is None:
            return default_grippers(self.action_dim, self.recorded_names)
        return check_dims(self.gripper_dims, self.action_dim, self.name)

    @property
    def absolute(self) -> np.ndarray:
        """(A,) bool, dimensions of an action that are places and not changes: grippers, and what was said to be so;
        else what is not scaled."""
        if self.absolute_dims == "all":
            return np.ones(self.action_dim, dtype=bool)
        if self.absolute_dims is None:
            absolute = ~np.array(self.statistics["action"].get("mask") or [True] * self.action_dim)
        else:
            absolute = np.zeros(self.action_dim, dtype=bool)
            absolute[list(check_dims(self.absolute_dims, self.action_dim, self.name, "absolute_dims"))] = True
        absolute[list(self.grippers)] = True
        return absolute

    def bounds(self, stats: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """What becomes -1 and 1, (D,) float64 each, by statistics of actions or states."""
        return scale_of(stats, self.normalization)

    @property
    def action_scale(self) -> np.ndarray:
        """(A,) float64: units of the dataset in one unit of normalized action."""
        low, high = self.bounds(self.statistics["action"])
        return np.where(self.statistics["action"].get("mask") or [True] * self.action_dim, (high - low) / 2, 1.0)

    @property
    def action_spec(self) -> ActionSpec:
        """What the numbers of an action mean."""
        relative = tuple((~self.absolute).tolist())
        own = self.survey.statistics["action"]
        ends = [(dim, own["min"][dim], own["max"][dim]) for dim in self.grippers]
        odd = tuple(dim for dim, low, high in ends if low < -0.01 or high > 1.01 or low < high < 0.5)
        if self.as_recorded is not None:
            odd = tuple(dim for dim in self.grippers if dim in self.as_recorded)
        return ActionSpec(
            tuple(self.names),
            relative,
            self.grippers,
            self.frame,
            self.unit,
            self.hz,
            odd,
            self.stated or not any(relative),
        )

    @property
    def meaning(self) -> str:
        """The same in words, with the option that says what is a guess."""
        spec = self.action_spec
        return spec.describe() + ("" if spec.stated else "; say it: --absolute-dims none, or all (joint positions)")

    @property
    def num_episodes(self) -> int:
        """Episodes of all splits, after raw filters."""
        return len(self.survey.steps)

    @property
    def num_transitions(self) -> int:
        """Their steps: the size that the weight of a mixture is multiplied with."""
        return sum(self.survey.steps)

    @property
    def num_frames(self) -> int:
        """Steps that all filters leave, those of held-out episodes included."""
        gone = sum(counts["steps"] for name, counts in self.removed.items() if name not in self.survey.removed)
        return self.num_transitions - gone

    @property
    def removed(self) -> dict[str, dict[str, int]]:
        """{filter: {"steps", "episodes"}} that each took away, in their order, over all splits."""
        survey, counts = self.survey, dict(self.survey.removed)
        steps, left = np.array(survey.steps), np.ones(len(survey.steps), dtype=bool)
        filters: dict[str, Any] = {}
        labeled = np.array(survey.labeled)
        if not self.keep_unlabeled:
            filters["unlabeled"] = labeled == 0
        if self.max_action is not None:
            filters["max_action"] = np.array(survey.largest_action) > self.max_action
        if self.max_proprio is not None:
            filters["max_proprio"] = np.array(survey.largest_proprio) > self.max_proprio
        for name, drops in filters.items():
            gone = drops & left
            counts[name] = {"steps": int(steps[gone].sum()), "episodes": int(gone.sum())}
            left &= ~gone
            if name == "unlabeled":  # also single steps of episodes that stay
                counts[name]["steps"] += int((steps - labeled)[left].sum())
                steps = labeled
        if self.standardize == "droid":
            moving = np.array(survey.moving if self.keep_unlabeled else survey.moving_labeled)[left]
            counts["standstill"] = {"steps": int((steps[left] - moving).sum()), "episodes": int((moving == 0).sum())}
            steps[left] = moving
        if self.chunk_end == "drop" and self.action_chunk > 1:  # at least: DROID may have left out earlier ones
            whole = [
                sum(max(length - self.action_chunk + 1, 0) for length, words in parts if words or self.keep_unlabeled)
                for parts in survey.parts
            ]
            inside = np.minimum(steps, whole)[left]
            gone = int((steps[left] - inside).sum())
            counts["chunk_end"] = {"steps": gone, "episodes": int(((inside == 0) & (steps[left] > 0)).sum())}
        return counts

    def report(self) -> str:
        """How many episodes there are, how they were read, and what each filter took away."""
        kept_back = len(self.held_out) if self.held_out is not None else 0
        head = (
            f"{self.name}: {counted(self.num_episodes, 'episode')}, {counted(self.num_transitions, 'step')}; "
            f"{counted(len(self.dataset), 'episode')} to train on, {kept_back} held out"
        )
        if self.standardize:
            head += f"; standardized as '{self.standardize}' (--standardize none reads as recorded)"
        lines = removal_report(self.removed).splitlines()
        unlabeled = self.num_transitions - sum(self.survey.labeled)
        if unlabeled and self.keep_unlabeled:
            lines.append(f"without an instruction: {unlabeled} steps, kept with an empty one")
        return "\n  ".join([head, *lines])

    def actions(self) -> np.ndarray:
        """(num_transitions, A) of all splits, in units of the dataset: read again, images left alone."""
        return np.concatenate(collect(chain.from_iterable(self.everything))[0])

    def frames(self, episode: Episode, action_chunk: int | None = None) -> Iterator[Episode]:
        """The training frames of an episode of `dataset` or `held_out`; none where a filter drops it.

        Each has an image, still encoded, of each camera that the model sees, in its order, `actions` (action_chunk, A)
        normalized to [-1, 1], `executed` of the same shape where it is known to differ (noise may leave [-1, 1]), and
        `state` (1, S) normalized where its statistics are known (None elsewhere). What comes past the end of the
        episode says `chunk_end`; `padded` counts steps that are not to be learned. Where the instruction changes along
        the way, a chunk ends with its own: what follows was done for another one.

        Args:
            action_chunk: Default: that of the source.

        Raises:
            ValueError: If `action_chunk` is below 1, or the episode lacks the camera.
        """
        action_chunk = self.action_chunk if action_chunk is None else action_chunk
        if self._drops(episode):
            return
        cameras = model_cameras(episode, self.camera_names, self.camera)
        parts = told_the_same(episode)
        chunks = np.concatenate([self._chunks(episode.actions[part], action_chunk) for part in parts])
        executed = None
        if episode.executed is not None:
            executed = np.concatenate([self._chunks(episode.executed[part], action_chunk) for part in parts])
        end = np.concatenate([np.full(part.stop - part.start, part.stop) for part in parts])
        beyond = np.maximum(np.arange(len(episode)) + action_chunk - end, 0)  # steps past the end, of a chunk
        proprio = proprio_statistics(self.statistics)
        state = None
        if proprio is not None and episode.state is not None:
            state = normalize_actions(episode.state, proprio, self.normalization).astype(np.float32)
        kept = np.ones(len(episode), dtype=bool) if self.keep_unlabeled else keep_labeled(episode)
        if self.standardize == "droid":
            kept &= droid_moves_raw(episode.actions)
        if self.chunk_end == "drop":
            kept &= beyond == 0
        images = {name: episode.images[name] for name in cameras}
        seen = replace(episode, images=images, state=state, executed=None)
        for step in np.flatnonzero(kept):
            padded = int(beyond[step]) if self.chunk_end == "repeat" else 0
            done = None if executed is None else executed[step].copy()
            yield replace(seen[step : step + 1], actions=chunks[step].copy(), padded=padded, executed=done)

    def _chunks(self, actions: np.ndarray, action_chunk: int) -> np.ndarray:
        """(T, action_chunk, A) float32, normalized: of each step its action and those that follow."""
        absolute = self.absolute if self.chunk_end == "still" else np.ones(self.action_dim, dtype=bool)
        trajectory = {"action": actions, "observation": {}, "absolute_action_mask": absolute}
        chunks = chunk_act_obs(trajectory, 1, action_chunk - 1)["action"]
        return normalize_actions(chunks, self.statistics["action"], self.normalization).astype(np.float32)

    def _drops(self, episode: Episode) -> bool:
        """Whether a filter of complete episodes drops this one."""
        if not len(episode) or not (self.keep_unlabeled or keep_labeled(episode).any()):
            return True
        if self.max_action is not None:
            if largest_normalized(episode.actions, self.statistics["action"], self.normalization) > self.max_action:
                return True
        proprio = proprio_statistics(self.statistics)
        if self.max_proprio is None or proprio is None or episode.state is None:
            return False
        return largest_normalized(episode.state, proprio, self.normalization) > self.max_proprio


def statistics_with_spec(source: Source) -> dict[str, Any]:
    """The statistics of a dataset, and what the numbers of its actions mean: what a model keeps of it."""
    return {**source.statistics, "action_spec": source.action_spec.to_dict()}
