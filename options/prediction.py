"""Options of `openvla predict`, and those of every verb that runs a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import Options, option, required


EMBEDDED_POLICY = str(Path(__file__).resolve().parents[1])  # the root of the package is a model


@dataclass(kw_only=True)
class VariantOptions(Options):
    """What a folder of OpenVLA-OFT does not tell of its model."""

    action_head: Literal["parallel_tokens"] | None = option(
        None,
        "Say that the model is of OpenVLA-OFT's discrete variant, of which nothing in its folder tells.",
        shown="as the folder says",
        heading="Model",
        flag="--head",
    )
    action_chunk: int | None = option(
        None,
        "Steps that one prediction is for, of a model of OpenVLA-OFT; a folder of this package says it.",
        least=1,
        shown="8 for actions of 7 numbers, 25 for 14",
        flag="--chunk",
    )


@dataclass(kw_only=True)
class GraphOptions(Options):
    """How a model on a GPU gets ready for many predictions."""

    compile: bool = option(
        False,
        "On a GPU, compile the kernels of the graphs that predictions are made of: a quarter less time for each "
        "action, some ten seconds to get ready for each number of samples.",
        heading="Model",
        neutral=True,
    )


@dataclass(kw_only=True)
class ModelOptions(VariantOptions):
    """Which model, and how it is loaded."""

    model: str = option(
        EMBEDDED_POLICY,
        "Model: a folder, or a Hub id such as openvla/openvla-7b.",
        shown="the policy that comes with the package",
        heading="Model",
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
    quantization: Literal["int8", "int4", "fp8", "bnb-int8", "bnb-nf4"] | None = option(
        None,
        "Load the language model with fewer bits. int8: fast on a CPU; int4: small; fp8: fast on a GPU "
        "that multiplies such (compute capability 8.9 or more); folders of these: quantize. "
        "bnb-int8, bnb-nf4: those of bitsandbytes.",
    )


@dataclass(kw_only=True)
class ActingOptions(ModelOptions):
    """A model that acts step by step."""

    decoding: Literal["mode", "mean"] | None = option(
        None,
        "What is executed of the distribution of each number: mode, the most probable bin, as published; mean, the "
        "mean of all bins, which is smoother, and steadier where answers come late; grippers and absolute angles stay "
        "the most probable. For heads that choose token by token.",
        shown="mode",
        heading="Model",
    )


@dataclass(kw_only=True)
class PredictOptions(ModelOptions):
    """One prediction."""

    image: list[str] = required(
        "Camera frame of any size: PNG, JPEG or another format that PIL reads. Of a model of several cameras once for "
        "each, with the name of its camera before it.",
        metavar="[CAMERA=]PATH",
    )
    instruction: str = required("What the robot shall do, for example 'open the drawer'.")
    state: str | None = option(
        None,
        "State of the robot, for a model that sees it, in the units of the dataset: numbers with commas between them.",
        shown="none",
    )
    as_json: bool = option(False, "Print one JSON object instead of a table.", flag="--json")
