"""Training runs of the original, as they lie on disk.

A run is a folder with `config.json`, `dataset_statistics.json` and `checkpoints/*.pt`; a checkpoint is
`{"model": {"vision_backbone": {...}, "projector": {...}, "llm_backbone": {...}}}` and holds only the parts that were
trained. Names were read off the original's `prismatic/models` and its converter.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration_openvla import OpenVLAConfig
from ..files_openvla import read_json
from ..pixels_openvla import PIXELS
from ..presets import load_base_vlms
from .hub_folder import LazyTensor


PARTS = ("vision_backbone", "projector", "llm_backbone")
LATEST = "checkpoints/latest-checkpoint.pt"
# In the config.json of a run that was exported; the original reads "vla" alone.
SHOWN = "pixels"
SIZES = "hub_config"  # of a model of other sizes than its ids stand for


# Names ----------------------------------------------------------------------------------------------------------------


def name_table(config: OpenVLAConfig) -> list[tuple[str, str]]:
    """(prefix in training, published prefix) of every part; the training side begins with the part's own name."""
    if config.use_fused_vision_backbone:
        second = "clip_featurizer" if config.vision_backbone_id.startswith("dinoclip") else "siglip_featurizer"
        towers = [("dino_featurizer.", "featurizer."), (f"{second}.", "fused_featurizer.")]
        linears = [0, 2, 4]
    else:
        towers, linears = [("featurizer.", "featurizer.")], [0, 2]
    return [
        *((f"vision_backbone.{theirs}", f"vision_backbone.{ours}") for theirs, ours in towers),
        # An nn.Sequential with GELUs between its linear layers.
        *((f"projector.projector.{index}.", f"projector.fc{n}.") for n, index in enumerate(linears, start=1)),
        ("llm_backbone.llm.", "language_model."),
    ]


def rename(name: str, table: list[tuple[str, str]], back: bool = False) -> str:
    """Published name of a training name, or with `back` the training name; names the table lacks stay as they are."""
    for theirs, ours in table:
        old, new = (ours, theirs) if back else (theirs, ours)
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith("vision_backbone."):
        # LayerScale: transformers 4 rewrote every name with "gamma" in it, so the published files avoid the word.
        old, new = (".scale_factor", ".gamma") if back else (".gamma", ".scale_factor")
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


# Reading a run --------------------------------------------------------------------------------------------------------


def find_checkpoint(checkpoint: str | os.PathLike) -> tuple[Path, Path]:
    """The .pt file and the folder of its run, of either of them. A run stands for its latest checkpoint."""
    path = Path(checkpoint)
    if path.is_dir():
        steps = [*path.glob(LATEST), *sorted(path.glob("checkpoints/step-*.pt"), reverse=True)]
        if not steps:
            raise FileNotFoundError(
                f"'{path}' has no {LATEST} and no checkpoints/step-*.pt: give a run folder or a .pt."
            )
        return steps[0], path
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at '{path}'. Give a .pt file, or the run folder it lies in.")
    return path, path.parent.parent if path.parent.name == "checkpoints" else path.parent


def read_checkpoint(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The parts a checkpoint holds, mapped from disk, not read.

    Raises:
        ValueError: If the file is not a training checkpoint of the original.
    """
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"'{file}' cannot be read as a torch checkpoint of tensors alone: {str(error).splitlines()[0]}"
        ) from error
    parts = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(parts, Mapping) or not set(parts) & set(PARTS):
        holds = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"'{file}' is no training checkpoint of OpenVLA: expected {{'model': {{{', '.join(PARTS)}}}}}, got {holds}."
        )
    return {part: parts[part] for part in PARTS if parts.get(part)}


def lazy(parts: Mapping[str, Mapping[str, torch.Tensor]], config: OpenVLAConfig) -> dict[str, LazyTensor]:
    """Tensors of a checkpoint under their published names."""
    table = name_table(config)
    return {
        rename(f"{part}.{name}", table): LazyTensor.of(tensor)
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def run_ids(run: Path) -> dict[str, str]:
    """Backbone ids and resize strategy that a run's config.json tells; empty where it tells nothing."""
    if not (run / "config.json").is_file():
        return {}
    content = read_json(run / "config.json")
    fields = ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
    model = content.get("model") or {}
    if all(field in model for field in fields):
        return {field: model[field] for field in fields}
    base_vlm = str((content.get("vla") or {}).get("base_vlm", ""))
    return load_base_vlms().get(base_vlm, {})


def config_of_run(run: Path) -> OpenVLAConfig | None:
    """Configuration of a model of sizes of its own, that was exported; None where ids say all."""
    content = read_json(run / "config.json").get(SIZES) if (run / "config.json").is_file() else None
    return OpenVLAConfig.from_dict(content) if isinstance(content, dict) else None


def pixels_of_run(run: Path) -> dict[str, Any]:
    """What a run's config.json says that the model was trained to see, as `with_pixels` takes it; empty where it says
    nothing. The original says that it cropped at random (`image_aug`), what was exported says all (`SHOWN`)."""
    content = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if isinstance(shown := content.get(SHOWN), dict):
        return {name: shown.get(name) for name in ("resize_filter", "center_crop", "jpeg_quality")}
    return PIXELS["libero"] if content.get("image_aug") is True else {}
