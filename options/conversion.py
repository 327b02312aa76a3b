"""Options of `openvla convert`, `openvla export`, `openvla package` and `openvla quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import Options, option, required
from .prediction import VariantOptions


SavedDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(kw_only=True)
class OverwriteOptions(Options):
    """Of verbs that write a folder of model files."""

    overwrite: bool = option(False, "Replace model files in OUT; other files stay.", flag="--overwrite")


@dataclass(kw_only=True)
class ConvertOptions(OverwriteOptions, VariantOptions):
    """From a checkpoint of the original's training code, or of OpenVLA-OFT, to a Hub folder."""

    checkpoint: Path = required(
        "A .pt of the original's training code, or the folder of its run; or a folder or Hub id of OpenVLA-OFT.",
        argument=True,
    )
    out: Path = required("Hub folder to write.", argument=True)
    vision_backbone_id: str | None = option(None, "Vision backbone, for example dinosiglip-vit-so-224px.")
    llm_backbone_id: str | None = option(None, "Language model, for example llama2-7b-pure.")
    image_resize_strategy: str | None = option(None, "How images were resized: resize-naive, resize-crop or letterbox.")
    tokenizer: str | None = option(None, "Folder or Hub id that has the tokenizer.json.", shown="the language model's")
    statistics: Path | None = option(
        None, "File with the action statistics.", shown="dataset_statistics.json of the run"
    )
    base: str | None = option(
        None,
        "What supplies parts that were frozen and so are not in CHECKPOINT: a checkpoint, run, Hub folder or id, or "
        "'timm'. Of OpenVLA-OFT: what an adapter that was not merged was trained on.",
    )
    camera_names: str | None = option(
        None,
        "What the model sees, joined by commas (OpenVLA-OFT).",
        shown="by the numbers of the state",
        flag="--cameras",
    )
    normalization: Literal["bounds_q99", "bounds"] | None = option(
        None,
        "Which statistics -1 and 1 stand for, q01 and q99 or min and max (OpenVLA-OFT).",
        shown="bounds for 14 numbers, else bounds_q99",
    )
    diffusion_steps: int | None = option(
        None,
        "Steps of noise that a diffusion was trained on (OpenVLA-OFT): no file tells.",
        least=1,
        shown="50, the original's",
    )
    dtype: SavedDtype | None = option(None, "Type of the written weights.", shown="bfloat16; of OpenVLA-OFT as stored")
    max_shard_size: str | None = option(
        None,
        "Size of the largest weight file, and of the memory that is needed.",
        shown="5GB; of OpenVLA-OFT one file",
    )


@dataclass(kw_only=True)
class ExportOptions(OverwriteOptions):
    """From a Hub folder to a run of the original's training code, or to graphs that run without torch."""

    weights: str = required("Model to export: a folder or a Hub id.", argument=True)
    out: Path = required("Folder to write.", argument=True)
    to: Literal["prismatic", "onnx"] = option(
        "prismatic", "A run of the original's training code, or ONNX graphs for openvla-runtime."
    )
    dtype: Literal["bfloat16", "float16", "float32", "int8"] | None = option(
        None,
        "Type of the written weights: bfloat16, float16 or float32 of a run (the original trains from float32); "
        "float32 (exact), float16 or int8 (the language model in 8 bits, as `openvla quantize` has it) of ONNX graphs.",
        shown="as stored; of ONNX graphs float32, or int8 where the weights are in 8 bits",
    )


@dataclass(kw_only=True)
class PackageOptions(OverwriteOptions):
    """A Hub folder that carries its own code."""

    out: Path = required("Folder to write.", argument=True)
    weights: str = required("Model to package: a folder or a Hub id with safetensors weights.")
    revision: str | None = option(None, "Branch, tag or commit, where --weights is a Hub id.", shown="main")
    name: str | None = option(None, "What the model card calls the model.", shown="the name of OUT")


@dataclass(kw_only=True)
class QuantizeOptions(OverwriteOptions):
    """A Hub folder whose linear layers have few bits."""

    model: str = required("Model to quantize: a folder or a Hub id with safetensors weights.", argument=True)
    out: Path = required("Folder to write.", argument=True)
    bits: Literal[8, 4, "fp8"] = option(
        8,
        "8: fast on a CPU, where activations are rounded as well. 4: small; only weights are rounded, in groups of 64. "
        "fp8: floats of 8 bits, fast on a GPU that multiplies such (activations are rounded as well), "
        "slow elsewhere.",
    )
    towers: bool = option(False, "Quantize vision towers and projector as well, not the language model alone.")
    dtype: SavedDtype | None = option(None, "Type of all other weights, and of the activations.", shown="as stored")
    max_shard_size: str = option("5GB", "Size of the largest weight file, and of the memory that is needed.")
    revision: str | None = option(None, "Branch, tag or commit, where MODEL is a Hub id.", shown="main")
    name: str | None = option(None, "What the model card calls the model.", shown="the name of OUT")
