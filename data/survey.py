"""One pass over all episodes of a dataset, without its images, kept for the next start: statistics, what filters find.

The result is stored by content: under a digest of the files that matter and of every option that changes an action. A
copy of the dataset elsewhere finds it, a dataset with one other action does not.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenizer import scale_of
from ..files_openvla import cache_folder as cache_folder
from ..prompts_openvla import has_words
from .dataset import EpisodeDataset
from .dimensions import shares
from .episode import Episode
from .filters import keep_labeled, told_the_same
from .oxe.conversions import droid_moves_raw
from .prepare import PreparedDataset
from .recording import Recording
from .statistics import collect, compute_statistics


VERSION = 6  # of what is stored: to be raised with every change that makes other numbers of the same files
CLOCK_GRAIN = 2.0  # seconds; within them a file may change again without a new time stamp
OURS = re.compile(r"(survey|files)-[0-9a-f]{32}\.json\.")  # what names of unfinished entries begin with
ABANDONED = 3600.0  # seconds after which nobody is writing an unfinished entry any more


@dataclass(frozen=True)
class Survey:
    """What a pass found. Lists have one entry for each episode that the raw filters left steps of."""

    statistics: dict[str, Any]
    removed: dict[str, dict[str, int]]  # {raw filter: {"steps", "episodes"}}
    steps: list[int]
    labeled: list[int]  # steps that have an instruction
    parts: list[list[list[int]]]  # [steps, 1 with an instruction else 0] of each part that has one instruction
    largest_action: list[float]  # magnitude after normalization, before it is clipped
    largest_proprio: list[float]
    moving: list[int]  # steps that the frame filter of DROID keeps; without it all
    moving_labeled: list[int]  # of these, the ones that have an instruction
    action: dict[str, list[float]]  # {what: (A,) share of the steps}, see `dimensions.shares`
    proprio: dict[str, list[float]]  # the same of states; empty without them
    instructions: list[str]  # each once, "" left out
    told: list[list[int]]  # [index of the episode, the places of its instructions in `instructions`]
    contents: list[str]  # digests of actions, states and words, by which copies are found


def take_survey(
    recording: Recording,
    mask: Sequence[bool] | None = None,
    given: Mapping[str, Any] | None = None,
    progress: bool = False,
    normalization: str = "bounds_q99",
) -> Survey:
    """Read every episode of a recording.

    Args:
        mask: (A,) which dimensions are scaled. Default: all but those that the layout of a standardized dataset names,
            or but grippers in [0, 1]; dimensions that never change are scaled in any case.
        given: Statistics to normalize with instead of the dataset's own.
        normalization: "bounds_q99" or "bounds", see `normalize_actions`.
    """
    datasets, droid, notes = recording.everything, recording.standardize == "droid", _Notes()
    try:
        actions, states = collect(notes.taken(chain.from_iterable(datasets)), progress)
    except ValueError as error:
        taken = {name for dataset in datasets for name, counts in dataset.removed.items() if counts["episodes"]}
        if not notes.labeled and taken:
            raise ValueError(f"{datasets[0].name}: no step is left after the filters {sorted(taken)}.") from error
        raise
    if mask is None and recording.absolute is not None:
        low, high = (bound([bound(part, axis=0) for part in actions], axis=0) for bound in (np.min, np.max))
        mask = [not kept or bool(low[dim] == high[dim]) for dim, kept in enumerate(recording.absolute)]
    statistics = compute_statistics(
        actions,
        states,
        mask,
        grippers=recording.gripper_dims,
        names=recording.action_names,
        published=recording.standardize is not None,
    )
    units = given or statistics
    proprio = proprio_statistics(units) if states else None
    _check_dimensions(datasets[0].name, units["action"], actions, proprio, states)
    instructions = sorted({text for _, texts in notes.texts for text in texts if has_words(text)})
    place = {text: number for number, text in enumerate(instructions)}
    moving = [droid_moves_raw(part) if droid else np.ones(len(part), dtype=bool) for part in actions]
    return Survey(
        statistics=statistics,
        removed=_removed(datasets),
        steps=[len(part) for part in actions],
        labeled=[int(words.sum()) for words in notes.labeled],
        parts=notes.parts,
        largest_action=[largest_normalized(part, units["action"], normalization) for part in actions],
        largest_proprio=[largest_normalized(part, proprio, normalization) for part in states or ()]
        if proprio
        else [0.0] * len(actions),
        moving=[int(moves.sum()) for moves in moving],
        moving_labeled=[int((moves & words).sum()) for moves, words in zip(moving, notes.labeled)],
        action=_shares(actions, units["action"], normalization),
        proprio=_shares(states, proprio, normalization) if states and proprio else {},
        instructions=instructions,
        told=[[index, *sorted(place[text] for text in texts if text in place)] for index, texts in notes.texts],
        contents=notes.contents,
    )


@dataclass
class _Notes:
    """What is noted of each episode beside its actions and states, in their order."""

    labeled: list[np.ndarray] = field(default_factory=list)
    parts: list[list[list[int]]] = field(default_factory=list)
    texts: list[tuple[int, Sequence[str]]] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)

    def taken(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """The episodes, of which notes are taken on the way."""
        for episode in episodes:
            self.labeled.append(words := keep_labeled(episode))
            self.parts.append([[part.stop - part.start, int(words[part.start])] for part in told_the_same(episode)])
            self.texts.append((episode.index, sorted({*(episode.step_instructions or (episode.instruction,))})))
            values = [part.tobytes() for part in (episode.actions, episode.state) if part is not None]
            said = repr(self.texts[-1][1]).encode()
            self.contents.append(hashlib.sha256(b"".join([*values, said])).hexdigest()[:12])
            yield episode


def _check_dimensions(
    name: str,
    action: Mapping[str, Any],
    actions: Sequence[np.ndarray],
    proprio: Mapping[str, Any] | None,
    states: Sequence[np.ndarray] | None,
) -> None:
    """Raise a `ValueError` where statistics are of other dimensions than the data."""
    dims, known = actions[0].shape[1], len(action["q01"])
    if known != dims:
        raise ValueError(f"{name}: actions have {dims} dimensions, the statistics given {known}.")
    if proprio is not None and states and len(proprio["q01"]) != states[0].shape[1]:
        raise ValueError(
            f"{name}: states have {states[0].shape[1]} dimensions, the proprio statistics given "
            f"{len(proprio['q01'])}: give those of this robot, or leave proprio out of the statistics."
        )


def _removed(datasets: Iterable[PreparedDataset]) -> dict[str, dict[str, int]]:
    """What the raw filters took, of all datasets together."""
    removed: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for name, counts in dataset.removed.items():
            before = removed.get(name, {})
            removed[name] = {what: before.get(what, 0) + counts[what] for what in ("steps", "episodes")}
    return removed


def _shares(values: Sequence[np.ndarray], stats: Mapping[str, Any], normalization: str) -> dict[str, list[float]]:
    low, high = scale_of(stats, normalization)
    return shares(np.concatenate(values), low, high, stats.get("mask") or [True] * len(low))


def proprio_statistics(statistics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The statistics of states, of a dataset that has some."""
    proprio = statistics.get("proprio")
    if not isinstance(proprio, Mapping) or not {"q01", "q99"} <= proprio.keys():
        return None
    return proprio if any(proprio["q01"]) or any(proprio["q99"]) else None  # zeros stand for no states at all


def largest_normalized(values: np.ndarray, stats: Mapping[str, Any], normalization: str = "bounds_q99") -> float:
    """Largest magnitude of (T, D) values, normalized as `normalize_actions` does but for the clipping, after which
    nothing could exceed a limit of 1."""
    values = values.astype(np.float64)
    low, high = scale_of(stats, normalization)
    scaled = np.where(stats.get("mask") or [True] * len(low), 2 * (values - low) / (high - low + 1e-8) - 1, values)
    if "min" in stats and "max" in stats:
        scaled = np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), 0.0, scaled)
    return float(np.abs(scaled).max())


# The cache ------------------------------------------------------------------------------------------------------------


def content_key(
    datasets: Sequence[EpisodeDataset], options: Mapping[str, Any], of: Callable[[str, Path], bool] | None = None
) -> str | None:
    """Digest of the files that decide actions, states and instructions, and of `options`; None where the files are
    not known or cannot be read. Digests of single files are kept, and hold while size and time stamps stay.

    Args:
        of: Which of these files count, by name and path. Default: all.
    """
    files: dict[str, tuple[Path, EpisodeDataset]] = {}
    for dataset in datasets:
        found = dataset.content_files() or {}
        found = {name: path for name, path in found.items() if of is None or of(name, path)}
        if not found:
            return None
        files |= {name: (path, dataset) for name, path in found.items()}
    memory = (
        cache_folder() / f"files-{_digest(os.path.commonpath([path.absolute() for path, _ in files.values()]))}.json"
    )
    known, digests, stamps = _read(memory) or {}, {}, {}
    try:
        for name, (path, dataset) in sorted(files.items()):
            status = path.stat()
            # ctime and inode differ where a file was replaced by another of the same size and time stamp
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, VERSION]
            remembered = known.get(name)
            if isinstance(remembered, list) and remembered[:-1] == stamp:
                digests[name] = remembered[-1]
            else:
                digests[name] = dataset.content_digest(path)
            if time.time() - status.st_mtime > CLOCK_GRAIN:
                stamps[name] = [*stamp, digests[name]]
    except OSError:  # a file is missing or damaged: whoever reads it says so
        return None
    if stamps != known:
        _write(memory, {**known, **stamps})
    return _digest({"version": VERSION, "files": digests, **options})


def order_digest(survey: Survey) -> str:
    """Digest of what tells episodes apart and of their order, where no files are known: lengths, words, largest
    actions."""
    largest = [f"{value:.4g}" for value in survey.largest_action]
    return _digest([survey.steps, survey.parts, survey.told, survey.instructions, largest])


def load_survey(key: str) -> Survey | None:
    """What an earlier pass found, or None where there was none or it cannot be read."""
    stored = _read(cache_folder() / f"survey-{key}.json")
    return Survey(**stored) if stored and stored.keys() == {each.name for each in fields(Survey)} else None


def store_survey(key: str, survey: Survey) -> None:
    """Keep what a pass found; a cache that cannot be written is a warning."""
    _write(cache_folder() / f"survey-{key}.json", asdict(survey))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a file that `_write` wrote and nothing changed since."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["content"] if stored["digest"] == _digest([path.name, stored["content"]]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Complete or not at all, also beside other processes that write the same; what a killed one left is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("*.part"):
            if not OURS.match(left.name):  # the user's: the folder may be any
                continue
            with contextlib.suppress(FileNotFoundError):  # another process finished or removed it meanwhile
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        named: dict[str, Any] = {"prefix": f"{path.name}.", "suffix": ".part", "delete": False}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, **named) as file:
            try:
                json.dump({"digest": _digest([path.name, content]), "content": content}, file)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written ({error}): statistics will be computed again at the next start. "
            "Set OPENVLA_CACHE to a folder of yours.",
            RuntimeWarning,
            stacklevel=4,
        )
