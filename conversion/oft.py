"""Folders of OpenVLA-OFT -> Hub folders of this package."""

import os
from pathlib import Path
from typing import Any

from ..action_tokenizer import read_statistics
from ..choices_openvla import check_choice
from ..configuration_openvla import OpenVLAConfig
from ..files_openvla import read_json
from ..hub import model_folder
from ..oft_openvla import find_oft
from ..options.conversion import ConvertOptions
from ..processing_openvla import OpenVLAProcessor
from ..processor_files_openvla import STARTED
from ..weights_openvla import read_tensors
from .hub_folder import DTYPES, LazyTensor, check_weights, new_model_folder, write_weights
from .prismatic import convert_prismatic_checkpoint


OFT_OPTIONS = ("action_head", "action_chunk", "camera_names", "normalization", "diffusion_steps")


def convert(options: ConvertOptions) -> Path:
    """What `openvla convert` does: a checkpoint of the original's training code or of OpenVLA-OFT, by what it holds.

    Raises:
        ValueError: If options are given that mean nothing for a checkpoint of its kind.
    """
    given = {name: value for name, value in options.without("checkpoint", "out").items() if value is not None}
    source = Path(options.checkpoint)
    is_run = source.suffix == ".pt" or not source.is_dir() or (source / "checkpoints").is_dir()
    if (source / STARTED).is_file():
        raise ValueError(
            f"'{source}' is a run of `openvla finetune`, with nothing in it to convert: its adapter is added to its "
            "base by `openvla merge RUN OUT`, complete weights are packaged by `openvla package OUT --weights RUN`."
        )
    is_hub = not source.exists() and source.suffix != ".pt" and str(source).count("/") == 1
    if not is_hub and (is_run or (find_oft(source, options.action_head) is None and not options.action_head)):
        if wrong := [name for name in OFT_OPTIONS if name in given]:
            raise ValueError(f"'{source}' is not of OpenVLA-OFT, which alone takes {wrong[0]}=...: leave it out.")
        config = source / "config.json"
        if not is_run and config.is_file() and read_json(config).get("model_type") == OpenVLAConfig.model_type:
            raise ValueError(
                f"'{source}' is a folder that loads as it is, with nothing in it to convert. If OpenVLA-OFT trained it "
                "on discrete actions, which nothing in a folder tells, say action_head='parallel_tokens'."
            )
        return convert_prismatic_checkpoint(source, options.out, **given)
    known = (*OFT_OPTIONS, "base", "dtype", "max_shard_size", "overwrite")
    if wrong := [name for name in given if name not in known]:
        raise ValueError(f"'{source}' is of OpenVLA-OFT, which does not take {wrong[0]}=...: leave it out.")
    if options.camera_names is not None:
        given["camera_names"] = [name.strip() for name in options.camera_names.split(",")]
    return convert_oft_checkpoint(source, options.out, **given)


def convert_oft_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    **fields: Any,
) -> Path:
    """Write a folder of OpenVLA-OFT as a self-contained Hub folder: one file of weights, a configuration that says all,
    the pixels of its evaluation in the processor.

    Args:
        checkpoint: Folder or Hub id. Adapters that were not merged are, and those of the towers in a FiLM folder.
        output: Folder to write; it appears complete or not at all.
        base: What the adapter was trained on, if it was not merged: a folder or Hub id.
        dtype: "bfloat16", "float16" or "float32". Default: each tensor as it is stored.
        max_shard_size: Largest weight file. Default: one file for all.
        overwrite: Replace the model files of an existing folder.
        fields: Of the configuration, as in `from_pretrained`: `action_head`, `action_chunk`, `camera_names`,
            `normalization`, ...

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If weights, statistics or files of the processor are missing.
        ValueError: If parts do not fit each other or do not say what they are, or `output` is not empty.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    for field in fields:
        check_choice("field", field, vars(OpenVLAConfig()))
    source, output = model_folder(checkpoint), Path(output)
    oft = find_oft(source, fields.get("action_head"))
    if oft is None:
        raise ValueError(
            f"'{checkpoint}' holds no parts of OpenVLA-OFT (action_head--*.pt, ...). One of its discrete variant is "
            "told by action_head='parallel_tokens'."
        )
    base = oft.find_base(base)
    config = OpenVLAConfig.from_pretrained(source, **({} if base is None else {"base": base}), **fields)
    file = source / "dataset_statistics.json"
    statistics = read_statistics(file) if file.is_file() else None
    oft.check_statistics(statistics, config)
    told = {"action_head": config.action_head, "camera_names": config.camera_names}
    processor = OpenVLAProcessor.from_pretrained(source, **told, **({} if base is None else {"base": base}))
    processor.check_fits(config)
    weights = oft.tensors(read_tensors(source if base is None else model_folder(base)))
    tensors = {name: LazyTensor.of(tensor) for name, tensor in weights.items()}
    check_weights(config, {name: tensor.shape for name, tensor in tensors.items()}, f"'{source}'")

    if dtype is not None:
        config.dtype = dtype
    described = (config, processor, statistics or {})
    with new_model_folder(output, source, checkpoint, *described, name=None, overwrite=overwrite) as folder:
        size = max_shard_size or sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) * 2
        write_weights(folder, tensors, None if dtype is None else DTYPES[dtype], size)
    return output
