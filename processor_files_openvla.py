"""Files of a processor, in a folder or of a Hub id: which there are, what is wrong with them, and what those of older
versions do not say.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .files_openvla import QUIET, read_json
from .oft_openvla import HUB_KWARGS


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
STARTED = "finetune.json"  # the options of a run of `openvla finetune`, written before it begins
SHOWN = {"resize_filter", "center_crop"}  # fields of the image processor that older versions did not store
OF_MODEL_ALONE = (  # arguments of `from_pretrained` of a model
    "attn_implementation", "device_map", "dtype", "load_in_4bit", "load_in_8bit", "low_cpu_mem_usage", "max_memory",
    "offload_folder", "quantization_config", "torch_dtype", "variant",
)  # fmt: skip


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `HUB_KWARGS`: where files are, of whoever reads them."""
    return {name: options[name] for name in HUB_KWARGS if name in options}


def check_processor_files(folder: Path) -> None:
    """Raise an error that names the file, if one of the processor is missing, damaged or a Git LFS pointer."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"'{folder}' has no tokenizer.json: copy the tokenizer of the model beside its weights."
        )
    contents = {
        name: read_json(folder / name, marked=False)
        for name in (*PROCESSOR_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        if (folder / name).is_file()
    }
    # Today's layout keeps the image processor inside processor_config.json, the published one in a file of its own.
    if "preprocessor_config.json" not in contents and "image_processor" not in contents.get(
        "processor_config.json", {}
    ):
        raise FileNotFoundError(
            f"'{folder}' has no preprocessor_config.json: copy the image processor of the model beside its weights."
        )


def check_tokenizer(folder: Path) -> None:
    """Raise an error that names tokenizer.json, if it is what could not be loaded: it is large, and read once."""
    if not isinstance(read_json(folder / "tokenizer.json", marked=False).get("model"), dict):
        raise ValueError(f"'{folder / 'tokenizer.json'}' holds no tokenizer ('model'): copy or download it again.")


def cached_folder(name: Any, hub: dict[str, Any]) -> Path | None:
    """Where the files of the processor of a Hub id lie, and beside them what an older run says; None without them."""
    files = [cached_file(name, file, **QUIET, **hub) for file in PROCESSOR_FILES]
    place = next((Path(file).parent for file in files if file is not None), None)
    if place is not None and not image_fields(place).keys() & SHOWN:
        cached_file(name, STARTED, **QUIET, **hub)
    return place


def image_fields(folder: Path) -> dict[str, Any]:
    """Fields of the image processor in a folder, today's layout or the published one."""
    files = [folder / name for name in PROCESSOR_FILES]
    images, processor = (read_json(file) if file.is_file() else {} for file in files)
    return processor.get("image_processor") or images


def pixels_of_older_run(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `openvla finetune` of older versions trained a model to see, as fields of its image processor; empty where
    `fields`, those that are stored, say it themselves, or `folder` is neither such a run nor one of its checkpoints.

    Older versions stored it in finetune.json alone, as `image_aug`. Tells in a warning what is assumed.
    """
    places = [folder, *(folder.absolute().parents[1:2] if folder.absolute().parent.name == "checkpoints" else ())]
    started = next((place / STARTED for place in places if (place / STARTED).is_file()), None)
    if started is None or fields.keys() & SHOWN:
        return {}
    with_crops = read_json(started).get("image_aug")
    if with_crops is None:  # something else of that name
        return {}
    pixels = {"resize_filter": "lanczos3", "center_crop": 0.9 if with_crops else None}
    warnings.warn(
        f"'{folder}' was fine-tuned by an older version, and its processor does not say what it was trained to see. "
        f"From '{started}' (image_aug={with_crops}): resize_filter='lanczos3', center_crop={pixels['center_crop']}. "
        "Save the processor once to store that: OpenVLAProcessor.from_pretrained(folder).save_pretrained(folder).",
        stacklevel=3,
    )
    return pixels


__all__ = [
    "HUB_KWARGS",
    "OF_MODEL_ALONE",
    "STARTED",
    "cached_folder",
    "check_processor_files",
    "check_tokenizer",
    "hub_options",
    "image_fields",
    "pixels_of_older_run",
]
