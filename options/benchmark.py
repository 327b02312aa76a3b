"""Options of `openvla bench`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .fields import default_of, option, pairs, required
from .prediction import GraphOptions, ModelOptions


# Options that not every measurement has a use for.
OF = {
    "batch_sizes": ("throughput",),
    "against": ("latency",),
    "onnx": ("latency",),
    "frames": ("latency", "throughput", "memory", "exact"),
    "compile": ("latency", "throughput", "exact"),
}
# The first one has no effect without the second.
WITH = (
    ("preset_fields", "preset"),
    ("towers", "preset"),
    ("towers", "quantization"),
    ("split", "dataset"),
    ("original_code", "against"),
)
# What the second one decides.
BESIDE = {"model": "preset", "action_head": "preset", "action_chunk": "preset", "onnx": "preset", "size": "dataset"}


@dataclass(kw_only=True)
class BenchOptions(GraphOptions, ModelOptions):
    """What is measured, and on what."""

    what: Literal["latency", "throughput", "memory", "load", "exact"] = required(
        "What to measure: latency (one action, by stage), throughput (batches), load (seconds and memory from the "
        "start of a program to its first action), memory (whether it stays flat over --frames predictions, such as "
        "1000) or exact (whether fast ways give the tokens of plain decoding).",
        argument=True,
    )
    preset: Literal["openvla-7b", "openvla-v01-7b"] | None = option(
        None,
        "A published size with random weights in place of --model: nothing is downloaded.",
        heading="Model",
    )
    preset_fields: dict[str, Any] = pairs(
        "Field of the preset's configuration, any number of times: action_head=l1_regression, action_chunk=8, "
        'proprio_dim=8, ...; a list as JSON: camera_names=\'["primary", "wrist"]\'.',
        flag="--field",
    )
    towers: bool = option(
        False, "Quantize vision towers and projector of the preset as well; a folder is as quantize --towers wrote it."
    )
    dataset: str | None = option(
        None,
        "Demonstrations whose frames are predicted, as finetune takes them.",
        shown="random images; exact: needed",
        heading="Measurement",
    )
    split: str = option("train", "Split of the dataset.")
    frames: int = option(100, "Predictions that are measured: the first frames of the first episodes.", least=1)
    size: str = option("256,256", "Height and width of random images, in pixels.")
    batch_sizes: str = option("1,2,4,8,16", "Numbers of samples predicted at once, for throughput.")
    against: dict[str, Any] = pairs(
        "Another environment that predicts the same frames, in turns: NAME=PYTHON, an interpreter with another version "
        "of openvla, or without it and with what the original's code needs.",
        flag="--against",
        heading="What it is compared with",
    )
    original_code: Path | None = option(
        None,
        "The original's code, for an environment of --against without openvla: prismatic/extern/hf of a clone.",
        shown="the code in the model's folder",
    )
    onnx: Path | None = option(None, "An export of the model (export --to onnx), timed with the others.", shown="none")
    threads: int | None = option(
        None, "Threads of torch on a CPU.", shown="as torch chooses", least=1, below=1025, heading="Measurement"
    )
    output: Path | None = option(
        None, "JSON file for the figures; of latency a plot beside it (needs [demo]).", shown="none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {item.name for item in fields(self) if getattr(self, item.name) != default_of(item)}
        for name, measured in OF.items():
            if name in given and self.what not in measured:
                raise ValueError(
                    f"{name}=...: {self.what} has no use for it, only {', '.join(measured)}: leave it out."
                )
        for name, other in WITH:
            if name in given and other not in given:
                raise ValueError(f"{name}=... says nothing without {other}=...: give both, or none.")
        for name, other in BESIDE.items():
            if {name, other} <= given:
                raise ValueError(f"{name}=... beside {other}=..., which decides that: leave one of them out.")
