"""What a checkpoint holds, and adapters added to their base."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..folders import write_json
from ..model_card import model_card
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor


STARTED = "finetune.json"  # the options of a run, written before it begins
ADAPTER_NOTE = """
This folder holds a LoRA adapter of [{base}](https://huggingface.co/{base}); `openvla merge` adds it to its base.
"""


def write_checkpoint(
    model: Any,
    folder: Path,
    processor: OpenVLAProcessor,
    statistics: dict[str, Any],
    card: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Weights in the published layout (or the adapter), configuration, processor, model card, and last the statistics,
    without which a folder is not finished.

    Args:
        model: The model, or the `PeftModel` around it.
        card: Text of README.md.
        state_dict: Whole weights where those of `model` are sharded or of another type.
        dtype: That type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without this PEFT stores whole embeddings because the output layer has an adapter.
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=state_dict, **options)
    if dtype is not None:  # the library writes that of the model in memory
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / "dataset_statistics.json", statistics)


def merge_adapter(folder: str | Path, output: str | Path, dtype: str = "auto") -> float:
    """Add the adapter of a finished lora or qlora run to its base, and write one plain checkpoint.

    Returns:
        The largest difference between logits with the adapter and merged, relative to the largest logit.

    Raises:
        FileNotFoundError: If `folder` holds no adapter.
        FileExistsError: If `output` is not empty.
    """
    from peft import PeftConfig, PeftModel

    folder, output = Path(folder), Path(output)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"'{folder}' holds no adapter (adapter_config.json): is it the output of a lora run?")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty: choose another folder.")
    base = OpenVLAForActionPrediction.from_pretrained(
        PeftConfig.from_pretrained(folder).base_model_name_or_path, dtype=dtype
    )
    base.norm_stats = json.loads((folder / "dataset_statistics.json").read_text(encoding="utf-8"))
    processor = OpenVLAProcessor.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder).eval()
    height, width = base.vision_backbone.image_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inputs = processor(processor.format_prompt("pick up the cup"), image)
    with torch.inference_mode():
        before = model(**inputs).logits
        merged = model.merge_and_unload()
        after = merged(**inputs).logits
    difference = ((after - before).abs().max() / before.abs().max()).item()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder_in_work:
        work = Path(folder_in_work) / "merged"
        card = model_card(output.name, merged.config, base.norm_stats)
        write_checkpoint(merged, work, processor, base.norm_stats, card)
        if (folder / STARTED).is_file():
            shutil.copyfile(folder / STARTED, work / STARTED)  # how it was trained, image augmentation above all
        os.replace(work, output)
    return difference
