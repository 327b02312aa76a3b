"""What a run is begun with, as its output folder keeps it (finetune.json), and whether one that continues agrees."""

import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..adapters_openvla import portable_model, portable_path
from ..configuration_openvla import OpenVLAConfig
from ..data.sources import Source, dataset_places, mixture_entries
from ..data.survey import content_key, order_digest
from ..files_openvla import read_json
from ..folders import files_below, read_settings
from ..hub import config_of
from ..options.fields import decisive
from ..options.training import ADAPTER_STRATEGIES, OF_ADAPTERS, FinetuneOptions
from ..processor_files_openvla import STARTED
from .prepared_run import Run, learning_rate
from .resume import FINISHED


# Of one version for good: what the cache of statistics holds may change, and runs that were begun continue.
OF_DIGEST = {"version": 4}


def what_begins(run: Run, data: Any = None) -> dict[str, Any]:
    """What is kept of a run, but for `model_digest`, which reads the weights.

    Args:
        data: Demonstrations as a Python object, where they are no files.
    """
    return {
        **shared_options(run.options),
        "learning_rate": learning_rate(run.options),
        "global_batch": run.global_batch,
        "data_digests": data_digests(run.sources),
        "data_bytes": data_bytes(run.options) if data is None else [],
    }


def shared_options(options: FinetuneOptions) -> dict[str, Any]:
    """The options as others may read them: without paths of this machine (see `portable_path`)."""
    made, output = asdict(options), options.output
    parts = [part.partition(":") for part in options.dataset.split(",")]  # of a mixture: NAME:WEIGHT,NAME:WEIGHT
    if Path(options.dataset).expanduser().exists():
        parts = [(options.dataset, "", "")]
    made["dataset"] = ",".join(_portable(name, output) + colon + weight for name, colon, weight in parts)
    for name in ("data_root", "statistics"):
        if made[name] is not None:
            made[name] = _portable(made[name], output)
    if (entries := mixture_entries(options.dataset, options.data_root)) is not None:  # a file that may change
        for entry in entries.values():
            places = {name: entry[name] for name in ("path", "statistics") if isinstance(entry.get(name), str)}
            entry |= {name: _portable(place, output) for name, place in places.items()}
        made["mixture"] = json.loads(json.dumps(entries, default=str))
    return {**made, "model": portable_model(options.model, output), "output": Path(output).resolve().name}


def _portable(name: str, output: str) -> str:
    path = Path(name).expanduser()
    return portable_path(path, output) if path.is_absolute() or path.exists() else name


def data_digests(sources: Sequence[Source]) -> dict[str, str]:
    """Of the files of each dataset, or of its episodes in their order where files are not known."""
    return {source.name: content_key(source.everything, OF_DIGEST) or order_digest(source.survey) for source in sources}


def _by_earlier_versions(name: str, path: Path) -> bool:
    """Whether earlier versions looked at a table of LeRobot in digests: not in folders that are links, nor elsewhere
    than in these two."""
    *between, _ = Path(name).parts[1:] or ("",)
    return name.startswith(("meta/", "data/")) and not any(map(os.path.islink, path.parents[: len(between)]))


def data_bytes(options: FinetuneOptions) -> list[int]:
    """Sizes of the datasets of a run with all of their files, images as well."""
    places = dataset_places(options.dataset, options.data_root)
    files = ([path] if path.is_file() else files_below(path) for path in places)
    return [sum(file.stat().st_size for file in of_dataset if file.is_file()) for of_dataset in files]


def read_begun(output: Path) -> dict[str, Any]:
    """What a run was begun with. Raises a `ValueError` for what is read here and no run writes: somebody edited it.
    Options that are only compared may be anything."""
    before, _ = read_settings(output / STARTED)
    entries = before.get("mixture", {})
    good = {
        "data_digests": isinstance(before.get("data_digests", {}), dict),
        "mixture": isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values()),
        "rank": isinstance(before.get("rank", 0), int),
    }
    if wrong := [name for name in good if not good[name]]:
        raise ValueError(
            f"'{output / STARTED}' says {wrong[0]}={before[wrong[0]]!r:.100}, which no run writes: the file was "
            "edited. Put back what stood there, or choose another output folder."
        )
    return before


def check_begun(run: Run, now: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Whether a run continues with the options and data that it was begun with.

    Args:
        now: Of `what_begins`.

    Raises:
        ValueError: Names the options, datasets and statistics that have changed.
    """
    options, output = run.options, Path(run.options.output)
    before = read_begun(output)
    # Earlier versions left it to the head: only chunks of tokens ended with standstill.
    stood = run.shape[0] > 1 and not run.head.wants_actions
    unsaid = {"chunk_end": "still" if stood else options.chunk_end}
    before |= {name: value for name, value in unsaid.items() if before.get(name) is None}
    # As they were given: so older versions stored paths. Tuples are lists.
    given, now = (json.loads(json.dumps(each, default=str)) for each in (asdict(options), now))
    same = {name: value for name, value in given.items() if before.get(name) == value}
    files: Mapping[str, Any] = now["data_digests"]
    known: Mapping[str, Any] = before.get("data_digests", files)  # runs of older versions have none
    # Digests leave out images that lie apart (HDF5, videos): the same actions may have been rendered again elsewhere.
    compared = now.get("data_bytes") and now["data_bytes"] == before.get("data_bytes") and known == files
    by_content: tuple[str, ...] = ("path", "dataset", "data_root") if compared else ()
    by_content += ("model",) if before.get("model_digest") else ()  # see `check_model`
    by_content += ("statistics",) if checkpoint is not None else ()
    same |= {name: before[name] for name in by_content if _moved(before.get(name), now.get(name))}
    changed = differences(*_spelled_out(before, {**now, **same}, config_of(options.model)))
    stored = known if checkpoint is None else read_json(checkpoint / FINISHED)
    if stored.keys() != files.keys():
        changed.append(f"the datasets were {', '.join(sorted(stored))}, are {', '.join(sorted(files))}")
    entries, earlier = now.get("mixture", {}), before.get("mixture", {})  # runs of older versions have none
    for name in sorted(entries.keys() & earlier.keys()):
        for key in sorted(entries[name].keys() | earlier[name].keys()):
            was, is_now = earlier[name].get(key), entries[name].get(key)
            if was != is_now and not (key in by_content and _moved(was, is_now)):
                changed.append(f"{key} of '{name}' in the mixture was {was!r}, is {is_now!r}")
    for source in sorted(run.sources, key=attrgetter("name")):
        name = source.name
        if known.get(name) in (None, files[name]):  # None: an object in Python, in runs of older versions
            continue
        if known[name] != content_key(source.everything, OF_DIGEST, _by_earlier_versions):
            changed.append(f"the files or episodes of the dataset '{name}' are others")
    if checkpoint is not None:
        converted = any(source.chunk_end == "still" for source in run.sources) and run.shape[0] > 1
        said = [{"gripper": options.gripper, "filters": options.filters}, *entries.values()]
        converted |= any(one.get("gripper", "open-is-1") != "open-is-1" or one.get("filters") for one in said)
        changed += changed_statistics(stored, json.loads(json.dumps(run.statistics)), converted)
    if changed:
        raise ValueError(
            f"'{output}' was begun with other options or data: {'; '.join(changed)}. Take those that it was begun "
            "with, or another output folder."
        )


def _moved(was: Any, is_now: Any) -> bool:
    """Whether two paths, relative to a run that may have been moved, or mixtures of such (PATH:WEIGHT,PATH:WEIGHT), may
    be one and the same: their last parts are."""
    if not (isinstance(was, str) and isinstance(is_now, str)):
        return False
    before, now = ([Path(part).name for part in text.split(",")] for text in (was, is_now))
    return before == now and all(before)


def _spelled_out(
    before: dict[str, Any], now: dict[str, Any], own: OpenVLAConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run with what those mean that only one of its two commands gives: values are compared, and not
    whether they were typed."""

    def meant(settings: Mapping[str, Any]) -> dict[str, Any]:
        names = [*settings.get("data_digests", ())]
        one = len(names) == 1
        of_dataset = {"name": names[0], "normalization": own.normalization.get(names[0], "bounds_q99")} if one else {}
        return of_dataset | {
            "alpha": min(settings.get("rank", 32), 16),
            "head": own.action_head,
            "action_chunk": own.action_chunk,
            "camera_names": ",".join(own.camera_names),
            "prefix_training": 0,
            "eval_every": settings.get("save_every"),
        }

    def filled(settings: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in meant(settings).items() if other.get(name) is not None}
        found = settings | {name: value for name, value in given.items() if settings.get(name) is None}
        if isinstance(cameras := found.get("camera_names"), str):
            found["camera_names"] = ",".join(name.strip() for name in cameras.split(","))
        return found

    return filled(before, now), filled(now, before)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options of a resumed run that do not agree with those it was started with; both with `global_batch`.

    What changes nothing in the weights may differ, see `option(neutral=True)`. An option that older versions did not
    have was as it is by default.
    """
    known = decisive(FinetuneOptions) | ({"global_batch": before["global_batch"]} if "global_batch" in before else {})
    if now["strategy"] not in ADAPTER_STRATEGIES:
        known = {name: default for name, default in known.items() if name not in OF_ADAPTERS}
    if now["schedule"] in ("linear", "cosine"):
        known["steps"] = before["steps"]  # the learning rate depends on them
    words = {"global_batch": "global_batch (batch_size x gradient_accumulation x processes)"}
    return [
        f"{words.get(name, name)} was {before.get(name, default)!r}, is {now[name]!r}"
        for name, default in sorted(known.items())
        if before.get(name, default) != now[name]
    ]


def check_model(output: Path, now: Mapping[str, Any]) -> None:
    """Whether a run continues from the base that it was begun with: a ValueError where `model_digest` is another."""
    if read_settings(output / STARTED)[0].get("model_digest") not in (None, now["model_digest"]):
        raise ValueError(
            f"'{output}' was begun with other weights than '{now['model']}' has now: take those that it was begun "
            "with, or another output folder."
        )


def check_frozen(checkpoint: Path, model: Any, merged: bool) -> None:
    """Whether what does not learn is in the checkpoint of a complete model as the run began with it: a ValueError where
    it is not. Loaded from there it would count, and nothing else looks at it.

    Args:
        merged: The run began with an adapter, which was added to its base on another machine, maybe: rounding may
            differ.
    """
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in sorted(frozen.keys() & stored.keys()):
                own, found = frozen[name], stored.get_tensor(name)
                if own.shape != found.shape:
                    continue  # who loads it says so
                # Of a run that went on in another precision the shorter type says what both hold.
                kind = min(own.dtype, found.dtype, key=lambda dtype: dtype.itemsize)
                own, found = own.to(kind), found.to(kind)
                if not (torch.allclose(found, own, rtol=1e-2, atol=1e-6) if merged else torch.equal(found, own)):
                    raise ValueError(
                        f"'{file}' holds another {name} than the model that the run was begun with, and it does not "
                        f"learn: the file is damaged, or of another run. Remove '{checkpoint}', and --resume goes on "
                        "from the one before it."
                    )


def changed_statistics(before: Mapping[str, Any], now: Mapping[str, Any], grippers: bool = True) -> list[str]:
    """Which statistics of which datasets differ by more than rounding; both as read from JSON. `grippers`: training
    depends on which of the numbers are; earlier versions did not take that from statistics that are given, nor did
    they say frame and unit. Nothing is computed of these, nor of what is a guess, which versions may see otherwise."""
    found = []
    for name in sorted(before.keys() & now.keys()):
        unsaid = {"frame", "unit"} - (before[name].get("action_spec") or {}).keys()
        unsaid |= {"as_recorded", "stated"} | (set() if grippers else {"grippers", "relative"})
        was, is_now = (_without(each[name], unsaid) for each in (before, now))
        keys = {**was, **is_now}
        if "action_spec" not in was:  # runs of older versions
            keys.pop("action_spec", None)
        other = [key for key in sorted(keys) if not _same(was, is_now, key)]
        if other:
            found.append(f"the statistics of the dataset '{name}' are others ({', '.join(other)})")
    return found


def _without(entry: Mapping[str, Any], unsaid: Set[str]) -> Mapping[str, Any]:
    if not isinstance(spec := entry.get("action_spec"), Mapping):
        return entry
    return {**entry, "action_spec": {key: spec[key] for key in spec.keys() - unsaid}}


def _same(before: Any, now: Any, key: str) -> bool:
    one, other = before.get(key), now.get(key)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one, other, part) for part in one)
    if one == other or key == "mask":
        return bool(one == other)
    left, right = np.asarray(one), np.asarray(other)
    if {left.dtype.kind, right.dtype.kind} - {"i", "f"} or left.shape != right.shape:
        return False
    return bool(np.allclose(left, right, rtol=1e-6, atol=1e-9))
