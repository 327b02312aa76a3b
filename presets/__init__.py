"""Published configurations and action statistics, as data: no download and no weights needed to read them."""

import json
from pathlib import Path
from typing import Any

from ..choices_openvla import closest
from ..configuration_openvla import OpenVLAConfig


ROOT = Path(__file__).parent


def preset_names() -> list[str]:
    """All presets, sorted."""
    files = [*ROOT.glob("*/config.json"), *ROOT.glob("*/dataset_statistics.json")]
    return sorted({file.parent.name for file in files})


def _read(name: str, file: str, what: str) -> dict[str, Any]:
    """A JSON file of a preset; a `ValueError` names the nearest preset, or those that have such a file."""
    if name not in preset_names():
        raise ValueError(
            f"No preset is called '{name}'.{closest(name, preset_names())} Known: {', '.join(preset_names())}."
        )
    path = ROOT / name / file
    if not path.is_file():
        having = [other for other in preset_names() if (ROOT / other / file).is_file()]
        raise ValueError(f"Preset '{name}' holds no {what}. Presets that do: {', '.join(having)}.")
    return json.loads(path.read_text(encoding="utf-8"))


def load_preset_config(name: str) -> OpenVLAConfig:
    """Configuration of a published model, without statistics (see `load_preset_statistics`).

    Raises:
        ValueError: If `name` is unknown (the message names the nearest preset) or holds statistics only.
    """
    return OpenVLAConfig.from_dict(_read(name, "config.json", "configuration"))


def load_preset_statistics(name: str) -> dict[str, Any]:
    """Statistics `{dataset: {"action": {"q01", "q99", "mask", ...}, "num_trajectories", ...}}` of a published model.

    Raises:
        ValueError: If `name` is unknown (the message names the nearest preset) or its statistics are not public.
    """
    return _read(name, "dataset_statistics.json", "action statistics")


def load_base_vlms() -> dict[str, dict[str, str]]:
    """`{base_vlm: {"vision_backbone_id", "llm_backbone_id", "image_resize_strategy"}}`, ids of the original's runs."""
    return json.loads((ROOT / "prismatic" / "base_vlms.json").read_text(encoding="utf-8"))


__all__ = ["load_base_vlms", "load_preset_config", "load_preset_statistics", "preset_names"]
