"""What a checkpoint holds, and adapters added to their base."""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import cached_file

from ..adapters_openvla import (
    ADAPTER,
    KEY,
    belongings,
    check_base,
    find_adapter,
    find_base,
    of_processor,
    read_belongings,
    with_belongings,
)
from ..configuration_openvla import OpenVLAConfig
from ..data.collate import ActionCollator
from ..files_openvla import file_digest, read_json
from ..folders import new_folder, read_settings, save_processor, write_json
from ..model_card import model_card
from ..modeling_openvla import OpenVLAForActionPrediction
from ..parts_openvla import PARTS_FILE
from ..processing_openvla import OpenVLAProcessor
from ..processor_files_openvla import STARTED
from .strategies import merge_into_base


def write_checkpoint(
    model: Any,
    folder: Path,
    processor: OpenVLAProcessor,
    statistics: dict[str, Any],
    card: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    resumable: bool = False,
) -> None:
    """Weights in the published layout (or the adapter), configuration, processor, model card, and last the statistics,
    without which a folder is not finished.

    Args:
        model: The model, or the `PeftModel` around it.
        card: Text of README.md.
        state_dict: Complete weights where those of `model` are sharded or of another type.
        dtype: That type.
        resumable: Under the names that the model has in memory, by which training reads them again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without this PEFT stores complete embeddings because the output layer has an adapter.
    is_adapter = hasattr(model, "peft_config")
    # The library gives weights of some language models (GPT-NeoX) other names in files, and Trainer does not turn back.
    options = {"save_embedding_layers": False} if is_adapter else {"save_original_format": not resumable}
    try:
        model.save_pretrained(folder, state_dict=state_dict, **options)
    except SafetensorError as error:  # a full disk, mostly
        raise OSError(f"Cannot write '{folder}': {error}") from error
    if is_adapter:
        _write_parts(model.get_base_model(), folder, state_dict)
        _complete_adapter(model, folder, processor, statistics)
    if dtype is not None:  # the library writes that of the model in memory
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)
    save_processor(processor, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / "dataset_statistics.json", statistics)


def _write_parts(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """The parts of the model that learn beside an adapter, which PEFT does not know."""
    given = {name.removeprefix("base_model.model."): value for name, value in (state_dict or {}).items()}
    parts = {name: given.get(name, value).detach().contiguous() for name, value in model.added_parameters().items()}
    if parts:
        save_file(parts, folder / PARTS_FILE, metadata={"format": "pt"})


def _complete_adapter(model: Any, folder: Path, processor: OpenVLAProcessor, statistics: dict[str, Any]) -> None:
    """Into adapter_config.json what belongs to the adapter, which PEFT overwrites when it saves; beside it the
    configuration of the base, by which auto classes know what kind of model it is."""
    content = read_json(folder / ADAPTER)
    content["auto_mapping"] = {
        "base_model_class": "OpenVLAForActionPrediction",
        "parent_library": "openvla.modeling_openvla",
        KEY: {
            **belongings(model.peft_config["default"]),
            "norm_stats": statistics,
            "processor": of_processor(processor.to_dict()),
            "file_digests": {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))},
        },
    }
    write_json(folder / ADAPTER, content)
    config = OpenVLAConfig.from_pretrained(model.get_base_model().config.name_or_path)
    for field, value in content["auto_mapping"][KEY].get("model", {}).items():
        setattr(config, field, value)
    config.save_pretrained(folder)


def starting_point(model: str | os.PathLike) -> tuple[str, Path | None]:
    """Complete weights to begin with, a folder or Hub id, and the adapter to put on them, if `model` is one.

    Raises:
        FileNotFoundError: If the base of the adapter is not there.
    """
    adapter = find_adapter(model)
    return (os.fspath(model), None) if adapter is None else (find_base(adapter), adapter)


def card_folder(base: str | os.PathLike) -> Path | None:
    """Where the model card of a folder or Hub id is, whose licence what is made of it inherits; None without one."""
    card = cached_file(
        os.fspath(base),
        "README.md",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(card).parent if card else None


def starting_processor(base: str | os.PathLike, adapter: Path | None) -> OpenVLAProcessor:
    """The processor of `base`, with the pixels and the prompt form of the adapter."""
    brought = None if adapter is None else read_belongings(adapter).get("processor")
    return with_belongings(OpenVLAProcessor.from_pretrained(base), brought)


def check_merged(output: Path) -> None:
    """Raise a `FileExistsError` if a merged model cannot be written to `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"'{output}' is not empty: choose another folder.")


def merge_adapter(
    folder: str | Path, output: str | Path, dtype: str = "auto", base: str | os.PathLike | None = None
) -> float:
    """Add the adapter of a finished lora or qlora run to its base, and write one plain checkpoint.

    Args:
        base: Folder or Hub id of the base, where it is not found by itself. Other weights than those the adapter was
            trained on are then taken with a warning.

    Returns:
        The largest difference between what the head answers (logits, or numbers) with the adapter and merged, relative
        to the largest answer.

    Raises:
        FileNotFoundError: If `folder` holds no adapter, its statistics are missing, or its base is not found.
        FileExistsError: If `output` is not empty.
        ValueError: If the base has other weights than those the adapter was trained on, or the answers of the merged
            model are not finite.
        BlockingIOError: If another process is writing `output`.
    """
    from peft import PeftModel

    folder, output = Path(folder), Path(output)
    if not (folder / ADAPTER).is_file():
        found = "holds no adapter (adapter_config.json)" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"'{folder}' {found}: give the output of a lora or qlora run.")
    check_merged(output)
    brought = read_belongings(folder)
    if "norm_stats" not in brought:
        raise FileNotFoundError(
            f"'{folder}' has no dataset_statistics.json, so the actions of the merged model would have no units: put "
            "that of its training there."
        )
    if (folder / STARTED).is_file() and read_settings(folder / STARTED)[0].get("strategy") == "qlora":
        warnings.warn(
            f"'{folder}' learned on a base of 4 bits, and is merged into the base as stored: its actions are others "
            "than those of its training, however small the difference to the adapter on that base. Measure them "
            "(openvla evaluate).",
            stacklevel=2,
        )
    source = os.fspath(base) if base is not None else find_base(folder)
    model = OpenVLAForActionPrediction.from_pretrained(source, dtype=dtype)
    if base is None and (problem := check_base(source, brought.get("base_digest"))):
        raise ValueError(f"{problem}. Put its own base back, or say with --base which one to take nevertheless.")
    model.load_parts(folder, brought.get("model", {}))
    model = PeftModel.from_pretrained(model, folder).eval()
    processor = with_belongings(OpenVLAProcessor.from_pretrained(source), brought.get("processor"))
    batch = _probe(model.get_base_model(), processor)
    with torch.inference_mode():
        before = _answer(model.get_base_model(), batch)
        merged = merge_into_base(model)
        after = _answer(merged, batch)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    if not math.isfinite(difference):
        raise ValueError(
            f"'{folder}' added to '{source}' answers with NaN or infinity, so nothing is written: the weights are "
            f"damaged, or too large for their type (dtype='{dtype}'; bfloat16 and float32 hold more than float16)."
        )
    statistics = merged.norm_stats = brought["norm_stats"]
    with new_folder(output) as work:
        card = model_card(output.resolve().name, merged.config, statistics, model_folder=card_folder(source))
        write_checkpoint(merged, work, processor, statistics, card)
        if (folder / STARTED).is_file():
            shutil.copyfile(folder / STARTED, work / STARTED)  # how it was trained
    return difference


def _probe(model: Any, processor: OpenVLAProcessor) -> dict[str, Any]:
    """A training batch of one sample, for `model` to answer."""
    height, width = model.vision_backbone.image_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    action_dim = model.config.action_dim or model.get_action_dim(next(iter(model.norm_stats)))
    sample = {
        "instruction": "pick up the cup",
        "actions": np.zeros((model.action_chunk, action_dim)),
        "image": {name: image for name in model.camera_names},
        "state": np.zeros(model.config.proprio_dim or 0, dtype=np.float32),
    }
    processor.camera_names = list(model.camera_names)
    collator = ActionCollator(processor, model.action_head, model.config.proprio_dim is not None)
    return model.action_head.prepare(collator([sample]))


def _answer(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    _, found = model.action_head.loss(model, batch)
    return next(iter(found.values())).float()
