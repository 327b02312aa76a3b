"""Options of `openvla bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import option, required
from .prediction import ModelOptions


@dataclass(kw_only=True)
class BenchOptions(ModelOptions):
    """What is measured, and on what."""

    what: Literal["exact"] = required("What to measure: exact.", argument=True)
    dataset: str = required("Demonstrations whose frames are predicted, as finetune takes them.")
    split: str = option("train", "Split of the dataset.")
    frames: int = option(100, "Frames to predict, the first ones of the first episodes.")
    threads: int | None = option(None, "Threads of torch on a CPU.", shown="as torch chooses")
    output: Path | None = option(None, "JSON file for the figures.", shown="none")
