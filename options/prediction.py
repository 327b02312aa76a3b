"""Options of `openvla predict`, and those of every verb that runs a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import Options, option, required


EMBEDDED_POLICY = str(Path(__file__).resolve().parents[1])  # the root of the package is a model


@dataclass(kw_only=True)
class ModelOptions(Options):
    """Which model, and how it is loaded."""

    model: str = option(
        EMBEDDED_POLICY,
        "Model: a folder, or a Hub id such as openvla/openvla-7b.",
        shown="the policy that comes with the package",
    )
    unnorm_key: str | None = option(
        None, "Dataset in whose units the action is, such as bridge_orig.", shown="the model's, if it has only one"
    )
    device: str = option(
        "auto",
        "Where the model runs: cuda (a GPU of NVIDIA or AMD; cuda:1 the second), mps (that of an Apple computer) or "
        "cpu; auto: cuda where there is such a GPU, else the CPU.",
        neutral=True,
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "Type of the weights in memory; auto: as they are stored."
    )
    quantization: Literal["int8", "int4", "bnb-int8", "bnb-nf4"] | None = option(
        None,
        "Load the language model with fewer bits. int8: fast on a CPU; int4: small; folders of either: see quantize. "
        "bnb-int8, bnb-nf4: those of bitsandbytes.",
    )


@dataclass(kw_only=True)
class PredictOptions(ModelOptions):
    """One prediction."""

    image: Path = required("Camera frame of any size: PNG, JPEG or another format that PIL reads.")
    instruction: str = required("What the robot shall do, for example 'open the drawer'.")
    state: str | None = option(
        None,
        "State of the robot, for a model that sees it, in the units of the dataset: numbers with commas between them.",
        shown="none",
    )
    as_json: bool = option(False, "Print one JSON object instead of a table.", flag="--json")
