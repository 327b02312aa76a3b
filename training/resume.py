"""What an output folder holds of a run: whether one may begin there, and from which checkpoint one continues."""

import math
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..adapters_openvla import ADAPTER, belongings, changed_files
from ..data.sources import dataset_places
from ..files_openvla import check_file, read_json
from ..folders import MARKS, read_settings, remove_working_folder
from ..options.training import FinetuneOptions
from ..processor_files_openvla import STARTED


FINISHED = "dataset_statistics.json"  # of a result: comes last, see `folders.move_into`
CHECKPOINTS = "checkpoints"
UNFINISHED = ".unfinished"  # what is being written
SHARED = Path("/dev/shm")  # of Linux
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


def check_shared_memory(model: Any, options: FinetuneOptions, pinned: bool) -> None:
    """Raise an OSError where the batches of processes that decode images do not fit the shared memory, of which a
    container of Docker has 64 MB: such a process says so to nobody, and training would wait for ever.

    Args:
        pinned: Each batch is copied elsewhere (for a GPU); else those of an update are held, and the last before it.
    """
    if not (options.workers and SHARED.is_dir()):
        return
    pixels = len(model.camera_names) * math.prod(model.vision_backbone.input_shape) * 4  # bytes of a sample
    batches = 2 * options.workers + (1 if pinned else options.gradient_accumulation + 1)  # 2: of a DataLoader
    needed = batches * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * options.batch_size * pixels
    free = shutil.disk_usage(SHARED).free if os.access(SHARED, os.W_OK) else 0
    if needed > free:
        raise OSError(
            f"workers={options.workers}: their batches take up to {needed / 1e6:.0f} MB of shared memory, and {SHARED} "
            f"has {free / 1e6:.0f} MB free: give it more (docker run --shm-size 8g), or fewer workers (0: none)."
        )


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
    if (folder / STARTED).is_file():  # checkpoints of older versions have none
        ours, theirs = (read_settings(place / STARTED)[0] for place in (folder.parents[1], folder))
        for name in sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]):
            raise ValueError(f"'{folder}' is of another run, whose {name} was {theirs[name]!r:.80}")


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
        raise ValueError(f"The newest checkpoint cannot be continued: {str(error).rstrip('.')}. {remedy}.") from error
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
