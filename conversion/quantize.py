"""A Hub folder whose linear layers have 8 or 4 bits."""

import os
from functools import lru_cache, partial
from pathlib import Path

import torch

from ..choices_openvla import check_choice
from ..modeling_openvla import OpenVLAForActionPrediction
from ..quantization_openvla import (
    LINEARS,
    NEVER_QUANTIZED,
    NOT_QUANTIZED,
    OpenVLAQuantizationConfig,
    linears_to_quantize,
    rounded,
)
from .hub_folder import (
    DTYPES,
    LazyTensor,
    as_stored,
    check_unquantized,
    check_weights,
    new_model_folder,
    open_model_folder,
    read_weights,
    write_weights,
)


def quantize_checkpoint(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    bits: int | str = 8,
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
        bits: 8, 4 or "fp8", see `quantization_openvla`.
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
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    source, config, processor, statistics = open_model_folder(model, revision, "which can be quantized")
    check_unquantized(config, model)
    tensors = read_weights(source)
    check_weights(config, {key: tensor.shape for key, tensor in tensors.items()}, f"'{source}'")

    config.quantization_config = OpenVLAQuantizationConfig(bits, list(NEVER_QUANTIZED if towers else NOT_QUANTIZED))
    with torch.device("meta"):
        empty = OpenVLAForActionPrediction(config)
    layers = linears_to_quantize(empty, config.quantization_config)
    _, modules = as_stored(empty, tensors)
    if apart := layers.keys() - {name.removesuffix(".weight") for name in modules.values()}:
        raise ValueError(
            f"The weight files of '{source}' hold {min(apart)}.weight in one tensor with others, which cannot be "
            "rounded: leave quantization out, or take bitsandbytes while loading (--quantization bnb-int8)."
        )

    @lru_cache(maxsize=1)  # weight and scales of one layer are written one after the other
    def matrix(key: str) -> dict[str, torch.Tensor]:
        return rounded(LINEARS[bits], key, tensors[key].read())

    def stored(key: str, place: str) -> torch.Tensor:
        return matrix(key)[place]

    kept = None if dtype is None else DTYPES[dtype]
    written: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        layer = layers.get(modules.get(key, "").removesuffix(".weight")) if key.endswith(".weight") else None
        if layer is None:
            written[key] = tensor._replace(dtype=kept)
        else:
            for part, (shape, kind) in LINEARS[bits].stored(layer.in_features, layer.out_features).items():
                place = f"{key.removesuffix('weight')}{part}"
                written[place] = LazyTensor(shape, partial(stored, key, place), kind)
    if kept is not None:
        config.dtype = kept

    described = (config, processor, statistics)
    with new_model_folder(output, source, model, *described, name=name, overwrite=overwrite) as folder:
        write_weights(folder, written, None, max_shard_size)
    return Path(output)
