"""What an output folder holds of a run: whether one may begin there, may continue, and from which checkpoint."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..adapters_openvla import ADAPTER, belongings, changed_files
from ..configuration_openvla import OpenVLAConfig
from ..data.sources import Source, dataset_places
from ..data.survey import content_key, order_digest
from ..files_openvla import check_file, read_json
from ..folders import MARKS, read_settings, remove_working_folder
from ..options.fields import decisive
from ..options.training import ADAPTER_STRATEGIES, OF_ADAPTERS, FinetuneOptions
from .checkpoints import STARTED


FINISHED = "dataset_statistics.json"  # of a result: comes last, see `folders.move_into`
CHECKPOINTS = "checkpoints"
UNFINISHED = ".unfinished"  # what is being written
RESULT = ("*.json", "*.jinja", "*.model", "README.md", "curves.png")  # beside the weights, what a run writes
TENSORS = (".pt", ".pth", ".bin")  # torch.save writes zip archives


# The output folder ----------------------------------------------------------------------------------------------------


def check_output(options: FinetuneOptions, resume: bool, dataset: bool = True) -> None:
    """Whether a run may begin in its output folder, or continue there; nothing is made.

    Args:
        dataset: Whether `options.dataset` may be a path.

    Raises:
        ValueError: If the output is a file, is or belongs to the model or the dataset, or holds something else.
        FileExistsError: If it holds a run, and `resume` is False or nothing is left to continue from.
        OSError: If it cannot be written.
    """
    output = Path(options.output).resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"output='{output}' is a file: give a folder.")
    model = Path(options.model)
    if model.is_dir() and (model.resolve() == output or output / CHECKPOINTS in model.resolve().parents):
        raise ValueError(
            f"The model '{model}' lies where the run would overwrite it (output='{output}'): give another."
        )
    for place in dataset_places(options.dataset, options.data_root) if dataset else ():
        data = place.resolve()
        if data == output or data in output.parents:
            raise ValueError(f"output='{output}' lies inside the dataset '{data}': give a folder outside of it.")
    begun, finished = (output / STARTED).exists(), (output / FINISHED).exists()
    if begun and not resume:
        state = "a finished" if finished else "an unfinished"
        raise FileExistsError(f"'{output}' holds {state} run: continue it with --resume, or choose another folder.")
    if begun and finished and not checkpoints(output / CHECKPOINTS):
        raise FileExistsError(
            f"'{output}' holds a finished run without checkpoints to continue from: give another folder."
        )
    if not begun and output.is_dir():
        of_model = [
            *(output / name for name in MARKS),
            *output.glob("*.safetensors"),
            *checkpoints(output / CHECKPOINTS),
        ]
        foreign = [*of_model, *(path for pattern in RESULT for path in sorted(output.glob(pattern)))]
        if there := [path for path in foreign if path.exists()]:
            kind = "a model" if there[0] in of_model else "files that a run replaces"
            raise ValueError(
                f"'{output}' holds {kind} but no {STARTED}, so it is not the output of a run: give another folder, "
                f"so that '{there[0]}' stays."
            )
    existing = next(path for path in (output, *output.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"output='{output}' cannot be written ({error.strerror}): give another folder.") from error


def check_space(output: Path, model: Any, options: FinetuneOptions) -> str | None:
    """A warning where the checkpoints to keep do not fit on the disk; an OSError where not even one does."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = sum(p.numel() * p.element_size() for p in (learns if hasattr(model, "peft_config") else model.parameters()))
    # Two float32 numbers of AdamW for each that learns; Muon has one for most.
    checkpoint = saved + sum(p.numel() for p in learns) * 4 * (1 if options.optimizer == "muon" else 2)
    more = max(1, options.keep + 1 - len(checkpoints(output / CHECKPOINTS)))
    free = shutil.disk_usage(output).free
    sizes = f"a checkpoint takes about {checkpoint / 1e9:.2g} GB, the result {saved / 1e9:.2g} GB"
    if free < checkpoint + saved:
        raise OSError(f"'{output}': {sizes}, and {free / 1e9:.2g} GB are free on that disk: make room.")
    if free < more * checkpoint + saved:
        return f"{sizes}; with keep={options.keep} the {free / 1e9:.2g} GB that are free will not do."
    return None


def remove_leftovers(output: Path) -> None:
    """What a killed run was writing; a FileExistsError where something else has that name."""
    for folder in (output, output / CHECKPOINTS):
        remove_working_folder(folder / UNFINISHED)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_checkpoint(folder: Path) -> None:
    """Whether every file that a run continues from is there and complete. Of a complete model weights are not read.

    Raises:
        FileNotFoundError, ValueError: For the first file that is missing, cut off, or a Git LFS pointer.
    """
    for needed in ("*model*.safetensors", "optimizer.*", "scheduler.pt", "rng_state*.pth", FINISHED):
        if not any(folder.glob(needed)):
            raise FileNotFoundError(f"'{folder}' has no {needed}")
    config = ADAPTER if any(folder.glob("adapter_model*")) else "config.json"
    if not (folder / config).exists():
        raise FileNotFoundError(f"'{folder}' has no {config}")
    if (step := read_json(folder / "trainer_state.json").get("global_step")) != step_of(folder):
        raise ValueError(f"'{folder / 'trainer_state.json'}' is of step {step}")
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            content = read_json(file)
            for shard in set(content.get("weight_map", {}).values()):
                check_file(folder / shard, "weights file")
        elif file.suffix == ".safetensors":
            check_file(file, "weights file")
            try:
                safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"'{file}' is cut off or damaged ({error})") from error
        elif file.suffix in TENSORS:
            _check_archive(check_file(file, "file"))
    if config == ADAPTER:
        digests = belongings(read_json(folder / config)).get("file_digests", {})  # runs of older versions have none
        if changed := changed_files(folder, digests):
            raise ValueError(f"'{changed[0]}' is damaged, or of another run")


def _check_archive(file: Path) -> None:
    """Raise a `ValueError` where what `torch.save` wrote is not what is there: torch itself does not look."""
    try:
        with zipfile.ZipFile(file) as archive:
            good = archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        good = False
    if not good:
        raise ValueError(f"'{file}' is cut off or damaged")


def checkpoint_to_resume(output: Path, steps: int) -> Path | None:
    """The newest checkpoint; None where a run has not come to its first.

    Raises:
        ValueError: If it is damaged (names the newest that is not), or beyond `steps`.
    """
    found = checkpoints(output / CHECKPOINTS)
    if not found:
        return None
    newest = found[-1]
    try:
        check_checkpoint(newest)
    except (OSError, ValueError) as error:
        damaged = [newest]
        while (good := found[-1 - len(damaged)] if len(damaged) < len(found) else None) and not _is_good(good):
            damaged.append(good)
        names = " and ".join(f"'{path}'" for path in damaged)
        remedy = (
            f"'{good}' is the newest good one: remove {names}, and --resume goes on from there"
            if good
            else f"No older one is good: remove {names}, and --resume begins again at step 0"
        )
        raise ValueError(f"The newest checkpoint is damaged: {str(error).rstrip('.')}. {remedy}.") from error
    if step_of(newest) > steps:
        raise ValueError(
            f"'{newest}' is beyond steps={steps}: give --steps {step_of(newest)} for its result, more to continue, or "
            "another folder for a shorter run."
        )
    return newest


def _is_good(checkpoint: Path) -> bool:
    try:
        check_checkpoint(checkpoint)
    except (OSError, ValueError):
        return False
    return True


# What a run was begun with --------------------------------------------------------------------------------------------


def data_digests(sources: Sequence[Source]) -> dict[str, str]:
    """Of the files of each dataset, or of its episodes in their order where files are not known."""
    # Of one version for good: what the cache of statistics holds may change, and runs that were begun continue.
    return {
        source.name: content_key(source.everything, {"version": 4}) or order_digest(source.survey) for source in sources
    }


def data_bytes(options: FinetuneOptions) -> list[int]:
    """Sizes of the datasets of a run with all of their files, images as well."""
    places = dataset_places(options.dataset, options.data_root)
    files = ([path] if path.is_file() else [*path.rglob("*")] for path in places)
    return [sum(file.stat().st_size for file in of_dataset if file.is_file()) for of_dataset in files]


def check_begun(
    output: Path,
    options: FinetuneOptions,
    now: Mapping[str, Any],
    statistics: Mapping[str, Any],
    checkpoint: Path | None,
    unsaid: Mapping[str, Any],
    own: OpenVLAConfig,
) -> None:
    """Whether a run continues with the options and data that it was begun with.

    Args:
        options: As they were given; so older versions stored paths.
        now: As they are stored, with `global_batch`, `data_digests`, `data_bytes`, and of a YAML file `mixture`, what
            it says.
        statistics: Of its datasets.
        unsaid: What options meant to earlier versions that are saved as null.
        own: Of the model that the run begins with.

    Raises:
        ValueError: Names the options, datasets and statistics that have changed.
    """
    before, _ = read_settings(output / STARTED)
    before |= {name: value for name, value in unsaid.items() if before.get(name) is None}
    given, now = (json.loads(json.dumps(each, default=str)) for each in (asdict(options), now))  # tuples are lists
    same = {name: value for name, value in given.items() if before.get(name) == value}
    files: Mapping[str, Any] = now["data_digests"]
    known: Mapping[str, Any] = before.get("data_digests", files)  # runs of older versions have none
    # Digests leave out images that lie apart (HDF5, videos): the same actions may have been rendered again elsewhere.
    compared = now.get("data_bytes") and now["data_bytes"] == before.get("data_bytes") and known == files
    by_content: tuple[str, ...] = ("path", "dataset", "data_root") if compared else ()
    by_content += ("model",) if before.get("model_digest") else ()  # see `check_model`
    by_content += ("statistics",) if checkpoint is not None else ()
    same |= {name: before[name] for name in by_content if _moved(before.get(name), now.get(name))}
    changed = differences(*_spelled_out(before, {**now, **same}, own))
    stored = known if checkpoint is None else read_json(checkpoint / FINISHED)
    if stored.keys() != files.keys():
        changed.append(f"the datasets were {', '.join(sorted(stored))}, are {', '.join(sorted(files))}")
    entries, earlier = now.get("mixture", {}), before.get("mixture", {})  # runs of older versions have none
    for name in sorted(entries.keys() & earlier.keys()):
        for key in sorted(entries[name].keys() | earlier[name].keys()):
            was, is_now = earlier[name].get(key), entries[name].get(key)
            if was != is_now and not (key in by_content and _moved(was, is_now)):
                changed.append(f"{key} of '{name}' in the mixture was {was!r}, is {is_now!r}")
    for name in sorted(known.keys() & files.keys()):
        if known[name] not in (None, files[name]):  # None: an object in Python, in runs of older versions
            changed.append(f"the files or episodes of the dataset '{name}' are others")
    if checkpoint is not None:
        changed += changed_statistics(stored, json.loads(json.dumps(statistics)))
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


def changed_statistics(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which statistics of which datasets differ by more than rounding; both as read from JSON."""
    found = []
    for name in sorted(before.keys() & now.keys()):
        keys = {**before[name], **now[name]}
        if "action_spec" not in before[name]:  # runs of older versions
            keys.pop("action_spec", None)
        other = [key for key in sorted(keys) if not _same(before[name], now[name], key)]
        if other:
            found.append(f"the statistics of the dataset '{name}' are others ({', '.join(other)})")
    return found


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
