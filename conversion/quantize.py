"""A Hub folder whose linear layers have 8 or 4 bits."""

import os
from functools import lru_cache, partial
from pathlib import Path

import torch

from ..configuration_openvla import OpenVLAConfig
from ..folders import new_folder
from ..hub import model_folder, statistics_of
from ..modeling_openvla import OpenVLAForActionPrediction
from ..oft_openvla import find_oft
from ..processing_openvla import OpenVLAProcessor
from ..quantization_openvla import (
    NEVER_QUANTIZED,
    NOT_QUANTIZED,
    OpenVLAQuantizationConfig,
    linears_to_quantize,
    rounded,
)
from ..quantized_linear_openvla import LINEARS
from .hub_folder import (
    DTYPES,
    LazyTensor,
    check_replaced,
    check_unquantized,
    check_weights,
    read_weights,
    write_companions,
    write_weights,
)


def quantize_checkpoint(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    bits: int = 8,
    towers: bool = False,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that is loaded as every other one, with weights of few bits; it carries its own code.

    One weight file of the result is in memory at a time, and one matrix of the source.

    Args:
        model: Folder or Hub id with safetensors weights, published layout or ours.
        output: Folder to write; it appears complete or not at all.
        bits: 8 or 4, see `quantized_linear_openvla`.
        towers: Quantize vision towers and projector as well as the language model.
        dtype: Of all other weights, and of the activations. Default: as stored.
        revision: Branch, tag or commit of a Hub id.
        name: What the model card calls the model. Default: the name of `output`.
        overwrite: Replace the model files of an existing folder.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If weights, configuration or tokenizer are missing.
        ValueError: If the model is quantized already, its weights are not finite or do not fit the configuration, or
            `output` is not empty.
    """
    source = model_folder(model, revision)
    if find_oft(source) is not None:
        raise ValueError(
            f"'{model}' is a checkpoint of OpenVLA-OFT: `openvla convert FOLDER OUT` makes one model of its parts, "
            "which can be quantized."
        )
    config = OpenVLAConfig.from_pretrained(source)
    check_unquantized(config, model)
    statistics = statistics_of(source, config)
    processor = OpenVLAProcessor.from_pretrained(source)
    tensors = read_weights(source)
    check_weights(config, {key: tensor.shape for key, tensor in tensors.items()}, f"'{source}'")

    config.quantization_config = OpenVLAQuantizationConfig(bits, list(NEVER_QUANTIZED if towers else NOT_QUANTIZED))
    with torch.device("meta"):
        layers = linears_to_quantize(OpenVLAForActionPrediction(config), config.quantization_config)

    @lru_cache(maxsize=1)  # weight and scales of one layer are written one after the other
    def matrix(key: str) -> dict[str, torch.Tensor]:
        return rounded(LINEARS[bits], key, tensors[key].read())

    def stored(key: str, place: str) -> torch.Tensor:
        return matrix(key)[place]

    kept = None if dtype is None else DTYPES[dtype]
    written: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if layer is None:
            written[key] = tensor._replace(dtype=kept)
        else:
            for part, (shape, kind) in LINEARS[bits].stored(layer.in_features, layer.out_features).items():
                place = f"{key.removesuffix('weight')}{part}"
                written[place] = LazyTensor(shape, partial(stored, key, place), kind)
    if kept is not None:
        config.dtype = kept

    output = Path(output)
    check_replaced(output, source, "model_type", "a model")
    with new_folder(output, overwrite) as folder:
        write_weights(folder, written, None, max_shard_size)
        write_companions(
            folder,
            config,
            processor,
            statistics,
            name=name or output.resolve().name,
            source=None if Path(model).is_dir() else str(model),
            model_folder=source,
        )
    return output
