"""A self-contained Hub folder: weights as they are, and around them everything needed to load them anywhere."""

import os
import shutil
from pathlib import Path

from ..weights_openvla import check_weight_file
from .hub_folder import (
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    check_weights,
    new_model_folder,
    open_model_folder,
    read_weights,
    weight_files,
)


def package_checkpoint(
    weights: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `AutoModel` and `AutoProcessor` load with `trust_remote_code=True`, without this package.

    Weight files are copied byte for byte, sharded or not; configuration, processor and tokenizer are written in today's
    layout, whatever that of the source.

    Args:
        weights: Folder or Hub id with safetensors weights, published layout or ours; a merged fine-tune as well.
        output: Folder to write; it appears complete or not at all.
        revision: Branch, tag or commit of a Hub id.
        name: What the model card calls the model. Default: the name of `output`.
        overwrite: Replace the model files of an existing folder.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If weights, configuration or tokenizer are missing.
        ValueError: If `output` is not empty, or the weights do not fit the configuration.
    """
    source, config, processor, statistics = open_model_folder(weights, revision, "which carries its own code as well")
    files = weight_files(source)
    if getattr(config, "quantization_config", None) is None:
        check_weights(config, {key: tensor.shape for key, tensor in read_weights(source).items()}, f"'{source}'")
    for file in files:  # packed weights have other names and shapes
        check_weight_file(file, whole_numbers=True)

    described = (config, processor, statistics)
    with new_model_folder(output, source, weights, *described, name=name, overwrite=overwrite) as folder:
        for file in files:
            target = folder / file.relative_to(source)  # as the index names it: may be in a folder below
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if files[0].name != WEIGHTS_FILE:
            shutil.copyfile(source / WEIGHTS_INDEX, folder / WEIGHTS_INDEX)
    return Path(output)
