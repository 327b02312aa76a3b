"""Actions <-> tokens: 256 bins over [-1, 1] written as the last ids of the vocabulary, and the dataset statistics
that carry [-1, 1] to the units of a robot. numpy alone; tensors are taken where torch is there.

Formulas: OpenVLA paper (arXiv 2406.09246) section 3.2 and the published `modeling_prismatic.py`. Everything is
vectorized; arrays stay numpy, tensors stay on their device.
"""

import copy
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .choices_openvla import closest, nearest
from .files_openvla import read_json
from .tensors_openvla import is_tensor


NOT_FINITE = "actions are not finite (NaN or infinity), which no action token stands for: repair or drop the step."


class ActionTokenizer:
    """Discretizes normalized actions and maps the bins to the last ids of a vocabulary.

    `bins` edges divide [-1, 1] into `bins - 1` intervals; edge index `k` in [1, bins] (from `np.digitize`) becomes
    token `vocabulary_end - k`. The top edge has an interval of its own in the vocabulary but not in the decoder: both
    `vocabulary_end - bins` and `vocabulary_end - bins + 1` decode to the last center.

    Args:
        tokenizer: A tokenizer, whose `vocab_size` (added tokens not counted) ends the action tokens, or that number.
        bins: Number of bin edges, equal to the number of action tokens.
        min_action, max_action: Range of a normalized action; values outside are clipped to it.

    Raises:
        ValueError: If the vocabulary has fewer than `bins` tokens, or the range is empty.
    """

    def __init__(self, tokenizer, bins: int = 256, min_action: float = -1.0, max_action: float = 1.0):
        self.tokenizer = None if isinstance(tokenizer, int) else tokenizer
        self.vocabulary_end = tokenizer if isinstance(tokenizer, int) else int(tokenizer.vocab_size)
        if not 2 <= bins <= self.vocabulary_end:
            raise ValueError(
                f"{bins} bins do not fit a vocabulary of {self.vocabulary_end} tokens: give 2 to that many."
            )
        if not min_action < max_action:
            raise ValueError(f"min_action={min_action}, max_action={max_action}: expected a range, the smaller first.")
        self.n_bins, self.min_action, self.max_action = bins, min_action, max_action
        self.bins = np.linspace(min_action, max_action, bins)  # (bins,) edges
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0  # (bins - 1,)
        # Published attribute: the id BEFORE the first action token.
        self.action_token_begin_idx = self.vocabulary_end - (bins + 1)

    @property
    def vocab_size(self) -> int:
        """Number of action tokens (published name)."""
        return self.n_bins

    @property
    def token_range(self) -> tuple[int, int]:
        """First action token id and the id after the last one."""
        return self.vocabulary_end - self.n_bins, self.vocabulary_end

    def encode(self, actions):
        """Token ids of normalized actions.

        Args:
            actions: (...) array, tensor or list; clipped to [min_action, max_action].

        Returns:
            (...) int64 ids in `token_range`, a tensor for a tensor, else an array.

        Raises:
            ValueError: If a value is NaN or infinite, which has no bin.
        """
        if is_tensor(actions):
            import torch

            # float64 as in numpy, whose digitize promotes float32 values before it compares them with the edges.
            values = actions.detach().to(torch.float64)
            if not bool(values.isfinite().all()):
                raise ValueError(NOT_FINITE)
            values = values.clamp(self.min_action, self.max_action)
            edges = torch.from_numpy(self.bins).to(values.device)
            return self.vocabulary_end - torch.bucketize(values, edges, right=True)
        array = np.asarray(actions, dtype=np.float64)
        if not np.isfinite(array).all():
            raise ValueError(NOT_FINITE)
        return self.vocabulary_end - np.digitize(np.clip(array, self.min_action, self.max_action), self.bins)

    def decode(self, token_ids):
        """Normalized actions (bin centers) of token ids, the inverse of `encode` up to half a bin.

        Ids outside `token_range` are clipped to the nearest bin, as the published code does.

        Args:
            token_ids: (...) integer array, tensor or list.

        Returns:
            (...) float64 values in [-1, 1], a tensor for a tensor, else an array.

        Raises:
            ValueError: If the ids are no integers.
        """
        if is_tensor(token_ids):
            import torch

            if token_ids.dtype == torch.bool or token_ids.is_floating_point() or token_ids.is_complex():
                raise ValueError(f"token_ids must be integers, got {token_ids.dtype}.")
            centers = torch.from_numpy(self.bin_centers).to(token_ids.device)
            return centers[(self.vocabulary_end - token_ids.long() - 1).clamp(0, len(centers) - 1)]
        array = np.asarray(token_ids)
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"token_ids must be integers, got {array.dtype}.")
        indices = self.vocabulary_end - array.astype(np.int64) - 1
        return self.bin_centers[np.clip(indices, 0, len(self.bin_centers) - 1)]

    # Published names -------------------------------------------------------------------------------------------------

    def __call__(self, action) -> str | list[str]:
        """Text of the action tokens: a string for (A,), a list of strings for (N, A)."""
        if self.tokenizer is None:
            raise ValueError("This ActionTokenizer knows only a vocabulary size; make it from a tokenizer to get text.")
        token_ids = self.encode(action)
        if token_ids.ndim == 1:
            return self.tokenizer.decode(token_ids.tolist())
        return self.tokenizer.batch_decode(token_ids.tolist())

    def decode_token_ids_to_actions(self, action_token_ids) -> np.ndarray:
        """Published name of `decode`."""
        return self.decode(action_token_ids)


# Dataset statistics ---------------------------------------------------------------------------------------------------


OF_DATASET = ("action", "proprio", "action_spec", "num_transitions", "num_trajectories")
OF_SPACE = ("q01", "q99", "min", "max", "mean", "std", "mask")
FAR = 5.0  # ranges beyond its end: degrees for radians are 57 times as much, percent for a share 100
NOISE = 0.01  # of a state that stands still near 0, in metres or radians
LARGEST = 1e6  # above it a statistic is no unit of a robot, but a wrong file; published ones stay below 1e4


def read_statistics(file: str | os.PathLike) -> dict[str, Any]:
    """Content of a `dataset_statistics.json`, checked.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or `check_statistics` refuses what it holds.
    """
    return check_statistics(read_json(file, unique=True), f"'{os.fspath(file)}'")


def check_statistics(norm_stats: Any, where: str = "norm_stats") -> dict[str, Any]:
    """The statistics of datasets, `{dataset: {"action": {"q01": [...], "q99": [...], ...}}}`, if they can be acted on.

    Args:
        where: The file they come from, for the message.

    Raises:
        ValueError: If they are nested in another way, or would move an arm wrongly: values that are no finite numbers
            or above 1e6, lengths that differ, q01 above q99, min above max, a negative std, a mask that is not of
            booleans, a name that is misspelled. The message names dataset and dimension. A range that was widened by
            hand, beyond min and max, is one that somebody chose.
    """
    example = "{'my_robot': {'action': {'q01': [...], 'q99': [...]}}}"
    if not isinstance(norm_stats, Mapping):
        raise ValueError(f"{where}: statistics are {example}, got {type(norm_stats).__name__}.")
    if "q01" in norm_stats or "action" in norm_stats:
        raise ValueError(
            f"{where}: these are the statistics of one dataset, whose name is missing: put them under it, {example}."
        )
    for dataset, entry in norm_stats.items():
        _check_dataset(entry, f"{where}, dataset '{dataset}'")
    return dict(norm_stats)


def _check_dataset(entry: Any, where: str) -> None:
    """Raise a `ValueError` if the entry of one dataset cannot be acted on."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("action"), Mapping):
        raise ValueError(
            f"{where}: expected {{'action': {{'q01': [...], 'q99': [...]}}}}, got {_shorten(entry)}: recompute the "
            "statistics (`openvla stats DATASET --output dataset_statistics.json`)."
        )
    _check_spelling(entry, OF_DATASET, where)
    _check_lists(entry["action"], f"{where}, action", required=("q01", "q99"))
    if entry.get("proprio") is not None:
        _check_lists(entry["proprio"], f"{where}, proprio")


def _check_lists(stats: Any, where: str, required: tuple[str, ...] = ()) -> None:
    """Raise a `ValueError` if the lists of one space do not fit together."""
    remedy = "Recompute the statistics (`openvla stats`), or take the dataset_statistics.json of the training."
    if not isinstance(stats, Mapping):
        raise ValueError(f"{where}: expected {{'q01': [...], 'q99': [...]}}, got {_shorten(stats)}. {remedy}")
    _check_spelling(stats, OF_SPACE, where)
    missing = [name for name in required if name not in stats]
    if missing:
        raise ValueError(f"{where}: {' and '.join(missing)} missing, so actions would have no units. {remedy}")
    values = {}
    for name in ("q01", "q99", "min", "max", "mean", "std"):
        if name in stats:
            values[name] = _numbers(stats[name], f"{where}, {name}", remedy)
    mask = stats.get("mask")
    if mask is not None:
        entries = mask.tolist() if isinstance(mask, np.ndarray) else mask
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, (bool, np.bool_)) for entry in entries):
            raise ValueError(f"{where}: mask has to be a list of true and false, got {_shorten(mask)}. {remedy}")
    lengths = {name: len(array) for name, array in values.items()} | ({} if mask is None else {"mask": len(mask)})
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: one value for each dimension is needed, the lengths are {lengths}. {remedy}")
    if required and not lengths["q01"]:
        raise ValueError(f"{where}: no dimensions, q01 is empty. {remedy}")
    for low, high in (("q01", "q99"), ("min", "max")):
        if low in values and high in values:
            for dim in np.flatnonzero(values[low] > values[high])[:1]:
                raise ValueError(
                    f"{where}, dimension {dim}: {low} ({values[low][dim]:g}) is above {high} ({values[high][dim]:g}), "
                    f"which would mirror the motion. {remedy}"
                )
    if "std" in values and (values["std"] < 0).any():
        raise ValueError(f"{where}, dimension {int(np.argmax(values['std'] < 0))}: std is negative. {remedy}")


def _check_spelling(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise a `ValueError` for a name that is nearly a known one, which is absent: it would be left out silently, and
    without its mask a gripper be scaled like an arm."""
    for name in (name for name in entry if name not in known):
        near = nearest(name, known, 0.78)  # names this short are less like each other
        if near and near not in entry:
            raise ValueError(f"{where}: '{name}' is no statistic. Did you mean '{near}'?")


def _numbers(entries: Any, where: str, remedy: str) -> np.ndarray:
    """A list of finite numbers of sensible size as (dimensions,) float64; no text, no booleans, no null."""
    if isinstance(entries, np.ndarray):
        entries = entries.tolist()
    if not isinstance(entries, (list, tuple)):
        raise ValueError(
            f"{where}: expected a list with one number for each dimension, got {_shorten(entries)}. {remedy}"
        )
    for dim, entry in enumerate(entries):
        number = isinstance(entry, (int, float, np.integer, np.floating)) and not isinstance(entry, bool)
        if not number or not abs(entry) <= LARGEST:  # NaN is not either
            raise ValueError(
                f"{where}, dimension {dim}: {_shorten(entry)} is not a finite number of at most {LARGEST:g}. {remedy}"
            )
    return np.asarray(entries, dtype=np.float64)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def resolve_unnorm_key(norm_stats: Mapping[str, Any] | None, unnorm_key: str | None) -> str:
    """The dataset whose statistics un-normalize an action.

    `None` is enough where there is one dataset. Raises a `ValueError` that lists the datasets where a choice has to be
    made, and a `KeyError` that names the nearest, if one is near, where the key is unknown.
    """
    if not norm_stats:
        raise ValueError(
            "The model has no action statistics, so its actions have no units: put a dataset_statistics.json beside "
            "the weights, or set model.norm_stats = {dataset: {'action': {'q01': [...], 'q99': [...], 'mask': [...]}}}."
        )
    if unnorm_key is None:
        if len(norm_stats) > 1:
            raise ValueError(
                f"The model was trained on {len(norm_stats)} datasets; pass unnorm_key to say whose units the action "
                f"shall have: {', '.join(sorted(norm_stats))}."
            )
        return next(iter(norm_stats))
    if not isinstance(unnorm_key, str) or unnorm_key not in norm_stats:
        raise KeyError(
            f"unnorm_key={unnorm_key!r} is not among the model's statistics.{closest(unnorm_key, norm_stats)} "
            f"Known: {', '.join(sorted(norm_stats))}."
        )
    return unnorm_key


def get_action_stats(
    norm_stats: Mapping[str, Any] | None, unnorm_key: str | None, checked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `"action"` entry of a dataset's statistics, checked again: statistics may have been set by hand.

    Args:
        checked: Copies of the entries that were checked before, filled here: equal ones are not checked again.

    Raises:
        ValueError, KeyError: As `resolve_unnorm_key`, and as `check_statistics` for this dataset.
    """
    if norm_stats is not None and not isinstance(norm_stats, Mapping):
        check_statistics(norm_stats)
    key = resolve_unnorm_key(norm_stats, unnorm_key)
    entry = (norm_stats or {})[key]
    if checked is None or key not in checked or not _equal(checked[key], entry):
        _check_dataset(entry, f"norm_stats, dataset '{key}'")
        if checked is not None:
            checked[key] = copy.deepcopy(entry)
    return dict(entry["action"])


def _equal(entry: Any, other: Any) -> bool:
    """Whether two entries are equal; False as well where they cannot be compared (numpy arrays)."""
    try:
        return bool(entry == other)
    except ValueError:
        return False


def _count_dims(stats: Mapping[str, Any]) -> int:
    """Dimensions that statistics are of, 0 where they hold no number."""
    return len(next((stats[name] for name in ("q01", "mean", "min") if name in stats), ()))


def _mask(stats: Mapping[str, Any], dims: int) -> np.ndarray:
    """(dims,) bool, which dimensions are scaled (absent: all), after a check that the statistics have as many."""
    known = _count_dims(stats)
    if known != dims:
        raise ValueError(f"Actions have {dims} dimensions, their statistics {known}: wrong unnorm_key?")
    mask = stats.get("mask")
    return np.ones(dims, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)


def unnormalize_actions(
    actions: np.ndarray, stats: Mapping[str, Any], mode: str = "bounds_q99", margin: float = 0.0
) -> np.ndarray:
    """From [-1, 1] to the units of the dataset: `0.5 (a + 1) (q99 - q01) + q01` where the mask is True.

    Args:
        actions: (..., A) normalized actions.
        stats: `"action"` entry of a dataset's statistics.
        mode: `"bounds_q99"`, or `"bounds"` for min and max in place of q01 and q99.
        margin: Added to q99 - q01: 1e-8 in OpenVLA-OFT, 0 in OpenVLA.

    Returns:
        (..., A) float64.

    Raises:
        ValueError: If an action is not finite, or as `normalize_actions`; "normal" is not known here.
    """
    actions = np.asarray(actions, dtype=np.float64)
    if not np.isfinite(actions).all():
        raise ValueError("Normalized actions are not finite (NaN or infinity): there is no motion for them.")
    low, high = scale_of(stats, mode, BOUNDED)
    mask = _mask(stats, actions.shape[-1])
    return np.where(mask, 0.5 * (actions + 1) * (high - low + margin) + low, actions)


NORMALIZATIONS = {"normal": ("mean", "std"), "bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}


BOUNDED = ("bounds", "bounds_q99")  # modes that give numbers in [-1, 1]: those that models act with


def scale_of(
    stats: Mapping[str, Any], mode: str, known: Collection[str] = tuple(NORMALIZATIONS)
) -> tuple[np.ndarray, np.ndarray]:
    """The two statistics of a mode, (A,) float64 each: of bounds, what becomes -1 and 1.

    Raises:
        ValueError: If the mode is not `known`, or they are not there.
    """
    if mode not in known:
        raise ValueError(f"mode='{mode}' is unknown. Known: {', '.join(known)}.")
    missing = [name for name in NORMALIZATIONS[mode] if stats.get(name) is None]
    if missing:
        raise ValueError(
            f"The statistics have no {' and no '.join(missing)}, which normalization='{mode}' needs: take the "
            "dataset_statistics.json of the training, or recompute them (`openvla stats`)."
        )
    first, second = (np.asarray(stats[name], dtype=np.float64) for name in NORMALIZATIONS[mode])
    return first, second


def normalize_actions(
    actions: np.ndarray, stats: Mapping[str, Any], mode: str = "bounds_q99", constant: str = "zero"
) -> np.ndarray:
    """From the units of the dataset to those of training.

    `"bounds_q99"`, which all published models were trained with: `2 (a - q01) / (q99 - q01 + 1e-8) - 1`, clipped to
    [-1, 1]; `"bounds"`: the same with min and max; `"normal"`: `(a - mean) / (std + 1e-8)`. Dimensions that the mask
    excludes pass as they are. With bounds, dimensions that never change (min == max) become 0 in any case.

    Args:
        actions: (..., A) actions (or states) in the units of the dataset.
        stats: `"action"` (or `"proprio"`) entry of a dataset's statistics.
        constant: `"zero"`, or `"clip"`: dimensions that never change become -1 or 1, as the formula has it, and those
            that the mask excludes are clipped as well (the evaluation of OpenVLA-OFT).

    Returns:
        (..., A) float64.

    Raises:
        ValueError: If `mode` is unknown, or the statistics lack what it needs or have other dimensions.
    """
    actions = np.asarray(actions, dtype=np.float64)
    first, second = scale_of(stats, mode)
    mask = _mask(stats, actions.shape[-1])
    if mode == "normal":
        return np.where(mask, (actions - first) / (second + 1e-8), actions)
    scaled = np.where(mask, np.clip(2 * (actions - first) / (second - first + 1e-8) - 1, -1, 1), actions)
    if constant == "zero" and "min" in stats and "max" in stats:
        scaled = np.where(np.asarray(stats["min"]) == np.asarray(stats["max"]), 0.0, scaled)
    return np.clip(scaled, -1, 1) if constant == "clip" else scaled


def units_of(normalization: Mapping[str, str], norm_stats: Mapping[str, Any], datasets: Sequence[str]) -> list[str]:
    """What -1 and 1 of each dataset stand for, "bounds_q99" or "bounds"; a `ValueError` if that is not in the
    statistics of its actions.

    Args:
        normalization: Of the model, see `OpenVLAConfig`.
    """
    modes = [normalization.get(dataset, "bounds_q99") for dataset in datasets]
    for dataset, mode in zip(datasets, modes):
        scale_of(norm_stats[dataset]["action"], mode, BOUNDED)
    return modes


def check_units(normalization: Mapping[str, str], before: Any, now: Any) -> None:
    """Warn where statistics take the place of others under another name, and the units of these do not go with them.

    Args:
        normalization: Of the model, see `OpenVLAConfig`.
        before, now: Statistics by dataset; None: there were, or are, none. What else they are is said elsewhere.
    """
    if not isinstance(now, Mapping):
        return
    gone, new = normalization.keys() - now.keys(), now.keys() - (before or {}).keys() - normalization.keys()
    for dataset in sorted(gone):
        if new and normalization[dataset] != "bounds_q99":
            warnings.warn(
                f"The model has normalization='{normalization[dataset]}' for '{dataset}', of which there are no "
                f"statistics now; those of {', '.join(sorted(new))} are taken as 'bounds_q99', so that -1 and 1 stand "
                "for q01 and q99. If they are of the same training, give them the name that they had, or say it: "
                f"model.config.normalization = {{'{min(new)}': '{normalization[dataset]}'}}.",
                stacklevel=3,
            )


def check_state_given(state: Any, proprio_dim: int | None) -> None:
    """Raise a `ValueError` if a model that sees `proprio_dim` numbers of the robot's state (None: that sees none) is
    given no state (or one), or one that is unknown in part."""
    if proprio_dim is None and state is not None:
        raise ValueError("The model sees no state (config.proprio_dim is null): leave state out.")
    if proprio_dim is not None and state is None:
        raise ValueError(f"The model sees the state of the robot ({proprio_dim} numbers): give state=...")
    if holds_no_number(state):
        raise ValueError(
            f"state={state!r:.100} has masked numbers, or True and False among them: give {proprio_dim} numbers that "
            "are known."
        )


def holds_no_number(values: Any) -> bool:
    """Whether there are masked numbers or booleans among what else would be taken for numbers: what lies under a mask,
    and 1 and 0."""
    if isinstance(values, (list, tuple)):
        return any(map(holds_no_number, values))
    kind = str(getattr(values, "dtype", type(values).__name__))
    return kind.rpartition(".")[2] == "bool" or bool(np.ma.is_masked(values))


def check_state_of_one(state: Any, proprio_dim: int | None) -> None:
    """The same of one robot, (proprio_dim,), also where there are more or fewer numbers."""
    check_state_given(state, proprio_dim)
    if state is not None and (shape := tuple(np.shape(state))) != (proprio_dim,):
        numbers = f"{shape[0]} numbers" if len(shape) == 1 else f"shape {shape}"
        raise ValueError(f"The state has {numbers}, and the model sees {proprio_dim} of one robot: ({proprio_dim},).")


def normalize_state(
    state: np.ndarray, norm_stats: Mapping[str, Any], unnorm_key: str, mode: str, constant: str = "zero"
) -> np.ndarray:
    """(S,) float64, a state in the units of a dataset as a model sees it; see `normalize_actions`.

    Raises:
        ValueError: If the statistics of the dataset hold none of the state, or of another one.
    """
    stats = norm_stats[unnorm_key].get("proprio")
    if stats is None:
        raise ValueError(f"The statistics of '{unnorm_key}' have no proprio, so that the state has no units.")
    if (known := _count_dims(stats)) != len(state):
        raise ValueError(
            f"The state has {len(state)} numbers, the proprio statistics of '{unnorm_key}' {known}: give those of the "
            "training, or another unnorm_key."
        )
    if mode in BOUNDED:
        _warn_far(state, stats, mode, unnorm_key)
    return normalize_actions(state, stats, mode, constant)


def _warn_far(state: np.ndarray, stats: Mapping[str, Any], mode: str, unnorm_key: str) -> None:
    """A state of other units (degrees for radians) or in another order is clipped to the ends of what was seen, and
    the model acts for a robot that stands there."""
    least, most = scale_of(stats, mode)
    # Noise of what stands still is no range.
    extent = np.maximum(most - least, np.maximum(NOISE, 0.1 * np.maximum(abs(least), abs(most))))
    far = (least < most) & ((state < least - FAR * extent) | (state > most + FAR * extent))
    far &= _mask(stats, len(state))  # others pass as they are
    if stats.get("min") is not None and stats.get("max") is not None:  # it was seen, but in under 1% of the steps
        far &= (state < stats["min"]) | (state > stats["max"])
    if far.any():
        named = ", ".join(f"{dim} ({least[dim]:.3g} to {most[dim]:.3g})" for dim in np.flatnonzero(far))
        warnings.warn(  # the numbers given are left out: a loop is told once
            f"The state is far outside of that of the training of '{unnorm_key}', as in other units (degrees for "
            f"radians) or in another order; it is clipped. Numbers, counted from 0, with what was seen: {named}.",
            stacklevel=4,
        )


def check_same_action_dim(
    norm_stats: Mapping[str, Any] | None, unnorm_keys: Sequence[str | None], checked: dict[str, Any] | None = None
) -> int:
    """Common number of action dimensions of several datasets; a `ValueError` names those that differ."""
    dims = {
        resolve_unnorm_key(norm_stats, key): len(get_action_stats(norm_stats, key, checked)["q01"])
        for key in unnorm_keys
    }
    if len(set(dims.values())) > 1:
        raise ValueError(f"One batch cannot mix action dimensions {dims}: predict these datasets in separate calls.")
    return next(iter(dims.values()))


__all__ = [
    "ActionTokenizer",
    "check_same_action_dim",
    "check_state_given",
    "check_state_of_one",
    "check_statistics",
    "check_units",
    "get_action_stats",
    "normalize_actions",
    "normalize_state",
    "read_statistics",
    "resolve_unnorm_key",
    "scale_of",
    "units_of",
    "unnormalize_actions",
]
