"""Episodes in the convention of the model, before anything is known about all of a dataset: gripper, raw filters."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..action_tokenizer import LARGEST
from ..choices_openvla import check_choice
from .dataset import EpisodeDataset
from .dimensions import check_dims, default_grippers
from .episode import DamagedDataError, Episode, MissingKeyError
from .filters import RAW_FILTERS, apply_filters


# Convention -> values of an open and a closed gripper, the last dimension of an action. The model's is the first.
GRIPPERS: dict[str, tuple[float, float]] = {
    "open-is-1": (1.0, 0.0),
    "open-is-0": (0.0, 1.0),
    "open-is-minus-1": (-1.0, 1.0),  # LIBERO and robomimic as recorded
    "open-is-plus-1": (1.0, -1.0),
}
TOLERANCE = 0.1  # recorded positions overshoot a little


def open_is_1(gripper: np.ndarray, convention: str, origin: str) -> np.ndarray:
    """Gripper values in the model's convention, 1 = open and 0 = closed.

    Args:
        gripper: (T, ...) in `convention`, one of `GRIPPERS`. "open-is-1" leaves them as they are.

    Raises:
        ValueError: If values lie outside the range of the convention, so that it cannot be the right one.
    """
    if convention == "open-is-1":
        return gripper
    opened, closed = GRIPPERS[convention]
    low, high = min(opened, closed), max(opened, closed)
    if gripper.min() < low - TOLERANCE or gripper.max() > high + TOLERANCE:
        raise ValueError(
            f"{origin}: the gripper goes from {gripper.min():.3g} to {gripper.max():.3g}, which is not "
            f"'{convention}' ({low:g} to {high:g}). Conventions: {', '.join(GRIPPERS)}. One in a range of its own "
            "(0 to 100, a width) has none: without --gripper it is scaled, and predicted as recorded."
        )
    return (np.clip((gripper - closed) / (opened - closed), 0, 1) + 0.0).astype(gripper.dtype)  # + 0.0: no -0


class PreparedDataset(EpisodeDataset):
    """Episodes of another dataset under a name, the grippers in the model's convention, raw filters applied.

    `gripper_dims` are the dimensions of grippers (default: `default_grippers` of `names`); `remark` goes with errors
    about fields of the recording. An episode of which the filters leave nothing has no steps; iteration leaves it out.
    `removed` counts what was read.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        name: str,
        gripper: str = "open-is-1",
        filters: Sequence[str] = (),
        gripper_dims: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        remark: str = "",
    ) -> None:
        check_choice("gripper", gripper, GRIPPERS)
        for given in filters:
            check_choice("filter", given, RAW_FILTERS)
        super().__init__(name, dataset.on_error)
        if gripper != "open-is-1" and gripper_dims is not None and not gripper_dims:
            raise ValueError(
                f"{name}: gripper='{gripper}', but gripper_dims says that there is none (or, where it is not given, "
                "the action_spec of recording or statistics): leave one out, or say which there are."
            )
        self.dataset, self.gripper, self.gripper_dims, self.names = dataset, gripper, gripper_dims, names
        self.remark = remark
        self.filters = {given: RAW_FILTERS[given] for given in filters}
        self.removed: dict[str, Counter] = {given: Counter() for given in filters}

    def __len__(self) -> int:
        return len(self.dataset)

    def runs(self) -> list[range]:
        return self.dataset.runs()

    def kind_of(self, index: int) -> tuple[str, ...] | None:
        return self.dataset.kind_of(index)

    def check_files(self) -> None:
        self.dataset.check_files()

    def content_files(self) -> dict[str, Path] | None:
        return self.dataset.content_files()

    def content_digest(self, path: Path) -> str:
        return self.dataset.content_digest(path)

    def _load(self, index: int) -> Episode:
        try:
            episode = self.dataset._load(index)
        except (KeyError, MissingKeyError) as error:
            if not self.remark or self.remark in str(error):
                raise
            raise type(error)(f"{error.args[0]} ({self.name}: {self.remark})") from error
        origin = episode.origin or f"{self.name}, episode {index}"
        dims = episode.actions.shape[1]
        grippers = default_grippers(dims, self.names) if self.gripper_dims is None else self.gripper_dims
        grippers = check_dims(grippers, dims, origin)
        actions, executed = episode.actions.copy(), None if episode.executed is None else episode.executed.copy()
        for values in (actions,) if executed is None else (actions, executed):
            if grippers:
                values[:, grippers] = open_is_1(values[:, grippers], self.gripper, origin)
            _check_size(values, "action", "correct it, or leave the episode out", origin)
        if episode.state is not None:
            _check_size(episode.state, "state", "correct it, or leave states out (--state-key none)", origin)
        episode = replace(episode, actions=actions, executed=executed, dataset_name=self.name)
        return apply_filters(episode, self.filters, self.removed, grippers)

    def read(self, indices: Iterable[int]) -> Iterator[Episode]:
        return (episode for episode in super().read(indices) if len(episode))


def _check_size(values: np.ndarray, what: str, remedy: str, origin: str) -> None:
    """Raise a DamagedDataError for values (T, D) of which the statistics could not be read again."""
    large = np.argwhere(abs(values) > LARGEST)
    if len(large):
        step, dim = large[0]
        raise DamagedDataError(
            f"{origin}: {what}[{dim}] of step {step} is {values[step, dim]:g}, and nothing above {LARGEST:g} is a "
            f"unit of a robot: {remedy}"
        )
