"""What an evaluation is begun with, as its folder keeps it (evaluation.json), and whether one that continues agrees."""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files_openvla import read_json
from ..folders import MARKS, read_settings
from ..options.evaluation import EvaluateOptions
from ..options.fields import decisive
from ..policy import PIXELS, OpenVLAPolicy
from ..processor_files_openvla import STARTED
from .loop import EPISODES
from .report import REPORT


SETTINGS = "evaluation.json"
OLDER_QUANTIZATIONS = {"int8": "bnb-int8", "int4": "bnb-nf4"}  # names until format_version 1


def earlier_settings(folder: Path, now: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The settings `folder` was begun with; empty where it is new.

    Raises:
        ValueError: If they are not those of `now`; says what changed. The number of episodes may, and the latency,
            which is kept. Folders of older versions hold no digests, and maybe the path of `model`.
    """
    if not (folder / SETTINGS).exists():
        if there := [name for name in (EPISODES, *REPORT, "videos") if (folder / name).exists()]:
            raise ValueError(
                f"'{folder}' holds {'episodes' if EPISODES in there else there[0]} but no {SETTINGS}, so nothing says "
                "what was evaluated: choose another folder."
            )
        if there := [name for name in (STARTED, *MARKS) if (folder / name).exists()]:
            raise ValueError(
                f"'{folder}' holds {there[0]}, so it is a model or a training run: give a folder of its own, it may "
                "lie inside."
            )
        return {}
    before, version = read_settings(folder / SETTINGS)
    check_saved(before, folder)
    if version == 0:
        before = {**_from_version_0(before), "pixels": now.get("pixels")}  # compared in `check_older_pixels`
    if version < 2:  # "int8" and "int4" were those of bitsandbytes
        before["quantization"] = OLDER_QUANTIZATIONS.get(before.get("quantization", ""))
    if before.get("model") == model:
        before["model"] = now.get("model")
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in decisive(EvaluateOptions)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"'{folder}' holds another evaluation: {'; '.join(changed)}. Choose another folder.")
    known, found = before.get("digests") or now["digests"], now["digests"]
    kinds = (known.keys() | found.keys()) - ({"base"} - known.keys())  # older versions did not look at it
    other = [name for name in sorted(kinds) if known.get(name) != found.get(name)]
    if other:
        raise ValueError(
            f"'{folder}' holds episodes of '{model}' with other {' and '.join(other)}: the files have changed since. "
            "Choose another output folder for the model as it is now."
        )
    return before


def check_saved(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise a `ValueError` for saved settings that no evaluation writes: somebody edited them. Options that are only
    compared may be anything; those that are read here may not."""
    texts = dict.fromkeys(("device", "quantization", "axis"), (str,))
    kinds: dict[str, tuple[type, ...]] = {"digests": (dict,), "latency": (int, float), **texts}
    for name, kind in kinds.items():
        value = settings.get(name)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and (not good or (name == "latency" and not 0 <= value < math.inf)):
            raise ValueError(
                f"'{folder / SETTINGS}' says {name}={value!r:.100}, which no evaluation writes: the file was edited. "
                "Choose another folder."
            )


def _from_version_0(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were saved before they had a version: variations were called so, and joined by ", "; options of the
    simulator stood among the others; whether images were cropped was `center_crop`, see `check_older_pixels`."""
    known = {item.name for item in fields(EvaluateOptions)} | {"digests", "center_crop"}
    renamed = {"axis" if name == "variations" else name: value for name, value in settings.items()}
    renamed = {name: str(value).replace(", ", ",") if name == "axis" else value for name, value in renamed.items()}
    own = {name: value for name, value in renamed.items() if name in known}
    more = {name: value for name, value in renamed.items() if name not in known}
    return {"center_crop": None, **own, **({"env_options": more} if more else {})}


def check_older_pixels(crop: bool | None, folder: Path, policy: OpenVLAPolicy, size: int | None) -> None:
    """Raise a `ValueError` if an evaluation that was begun before pixels were stored with a model, when all images were
    resized with lanczos3, showed others than those that `policy` is shown now.

    Args:
        crop: Whether it was asked for the center of images; None: as finetune.json said in `image_aug`.
        folder: Of the model.
        size: Width and height of the images, where it is known.
    """
    started = folder / "finetune.json"
    if crop is None:
        crop = started.is_file() and bool(read_json(started).get("image_aug"))
    then = {**PIXELS["libero"], "jpeg_quality": None}
    if not crop:
        then["center_crop"] = None
    images = policy.model.processor.image_processor
    now = {name: getattr(images, name) for name in then}
    if images.input_sizes[0][1:] == [size, size]:  # nothing to resize
        now |= {"resize_filter": then["resize_filter"], "jpeg_quality": None}
    if now != then:
        raise ValueError(
            f"The evaluation was begun by an older version, which showed the model other pixels ({then}, now {now}): "
            "choose another output folder."
        )
