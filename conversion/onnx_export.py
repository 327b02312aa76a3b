"""A Hub folder -> graphs that run without torch: `packages/openvla-runtime` (import `openvla_runtime`) acts with them.

vision.onnx: towers, projector and, where the model sees it, the state. language_model.onnx: one graph for the prompt,
single steps and verify passes over a draft; what a position sees is an input. runtime.json: all else that a prediction
needs.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from ..adapters_openvla import find_adapter
from ..choices_openvla import check_choice
from ..configuration_openvla import OpenVLAConfig
from ..extras import require
from ..files_openvla import file_digest
from ..folders import new_folder, write_json
from ..frames_openvla import PIXEL_FIELDS
from ..hub import model_folder, published_name, statistics_of
from ..llama_openvla import STATIC_ROPE
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from ..quantization_openvla import METHOD, OpenVLAQuantizationConfig
from ..quantized_linear_openvla import all_finite
from .hub_folder import check_replaced
from .onnx_graphs import write_language_model, write_products_of_8_bits, write_vision


FORMAT_VERSION = 1  # of runtime.json
RUNTIME_FILE, VISION_FILE, LANGUAGE_MODEL_FILE = "runtime.json", "vision.onnx", "language_model.onnx"
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}  # int8: made of float32
MINIMUM_TORCH = (2, 9)  # 2.6 cannot trace these graphs
CONFIG_FIELDS = (
    "llm_max_length", "pad_token_id", "image_token_id", "empty_token_id", "action_vocab_size", "n_action_bins",
    "action_chunk", "proprio_dim",
)  # fmt: skip
WINDOWS = (  # how far a position sees, as language models call it
    "sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size",
)  # fmt: skip
TEXT_FIELDS = ("model_type", "bos_token_id", "eos_token_id", "vocab_size")


def export_onnx(
    weights: str | os.PathLike, output: str | os.PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Write a folder that `openvla_runtime.OnnxPolicy` takes: two graphs, tokenizer and runtime.json.

    Takes at most 1.3 times the memory of the weights as they are exported, beside pages of their files, which are
    mapped. A 7B from a folder in float16 took 12.9 GB in float16 and 11.5 GB in int8.

    Args:
        weights: Folder or Hub id, published layout or ours; a model whose actions are tokens, one after the other.
        output: Folder to write; it appears complete or not at all.
        dtype: "float32" (default: tokens are those of the model), "float16", or "int8": the language model in 8 bits,
            rounded as `openvla quantize` rounds it. Default of a folder that is in 8 bits already: those.
        overwrite: Replace the files of an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: If the model is an adapter, quantized otherwise, or one that these graphs cannot stand for, if its
            weights are not finite or become so in `dtype`, or torch is too old.
        ModuleNotFoundError: If a library of the extra `onnx` is missing.
    """
    if dtype is not None:
        check_choice("dtype", dtype, PRECISIONS, "Of an ONNX export; bfloat16 is not known to ONNX Runtime on a CPU.")
    require("onnx", "onnxscript", purpose="export to ONNX", preferred="onnx")
    if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
        raise ValueError(
            f"Export to ONNX needs torch {'.'.join(map(str, MINIMUM_TORCH))} or later, found {torch.__version__}: "
            "pip install -U torch."
        )
    source, output = model_folder(weights), Path(output)
    check_replaced(output, source, None, "an ONNX export")
    if find_adapter(source) is not None:
        raise ValueError(f"'{weights}' is an adapter: merge it first (`openvla merge RUN OUT`), then export OUT.")
    config = OpenVLAConfig.from_pretrained(source)
    check_exportable(config)
    stored = has_8_bits(config)
    if stored and dtype not in (None, "int8"):
        raise ValueError(f"'{weights}' holds weights of 8 bits, which are exported in int8: leave dtype='{dtype}' out.")
    dtype = "int8" if stored else dtype or "float32"
    statistics = statistics_of(source, config)
    processor = OpenVLAProcessor.from_pretrained(source)
    # The towers keep their weights: a small part, and what is lost there every action sees.
    rounding = {"quantization_config": OpenVLAQuantizationConfig(8)} if dtype == "int8" and not stored else {}
    model = OpenVLAForActionPrediction.from_pretrained(source, dtype=PRECISIONS[dtype], **rounding).eval()
    check_finite(model, dtype)
    write_products_of_8_bits(model)
    if model.config.empty_token_id is None:
        model.config.empty_token_id = processor.empty_token_id
    processor.check_fits(model.config)
    with new_folder(output, overwrite) as folder:
        write_vision(folder / VISION_FILE, model)
        write_language_model(folder / LANGUAGE_MODEL_FILE, model)
        write_runtime(folder, model, processor, statistics, name=published_name(weights), dtype=dtype)
    return output


def check_exportable(config: OpenVLAConfig) -> None:
    """Raise a `ValueError` for a model that the graphs cannot stand for."""
    text = config.text_config
    positions = getattr(text, "max_position_embeddings", None) or config.llm_max_length
    windows = {name: getattr(text, name, None) for name in WINDOWS}
    narrow = next((name for name, size in windows.items() if isinstance(size, int) and 0 < size < positions), "")
    if narrow == "window_size" and "local" not in getattr(text, "attention_layers", ["local"]):
        narrow = ""  # of GPT-Neo, where no layer has it
    problem = None
    if config.action_head != "tokens":
        problem = f"action_head='{config.action_head}': only token heads ('tokens') are exported"
    elif getattr(config, "quantization_config", None) is not None and not has_8_bits(config):
        problem = "its weights are quantized, and not in 8 bits of ours: export the model they were made of"
    elif config.use_film:
        problem = "its towers have FiLM, which sees the words of the prompt"
    elif changing := rope_types(text) - {*STATIC_ROPE}:
        problem = f"its rotary embedding depends on the length of a sequence (rope_type='{min(changing)}')"
    elif not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None):
        problem = "its language model sees behind a position as well (is_causal, use_bidirectional_attention)"
    elif narrow:
        problem = f"its language model sees {windows[narrow]} positions back only ({narrow})"
    elif set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        problem = (
            f"its language model has layers of {sorted(set(text.layer_types))}, which have no plain key/value cache"
        )
    if problem:
        raise ValueError(f"This model cannot be exported to ONNX: {problem}. Predict with openvla itself.")


def has_8_bits(config: OpenVLAConfig) -> bool:
    """Whether the weights beside a config.json are in 8 bits of ours."""
    stored = getattr(config, "quantization_config", None) or {}
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    return (fields.get("quant_method"), fields.get("bits")) == (METHOD, 8)


def check_finite(model: OpenVLAForActionPrediction, dtype: str) -> None:
    """Raise a `ValueError` if a weight is NaN or infinite: such a graph is refused by the robot at the earliest."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not all_finite(weight):
            raise ValueError(
                f"{name} has numbers that float16 cannot hold, or that were damaged before: take --dtype float32."
                if dtype == "float16"
                else f"{name} holds NaN or infinite values: it was damaged, or its training diverged."
            )


def rope_types(config: Any) -> set[str]:
    """Of a language model; some have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return {kind.get("rope_type") or "default" for kind in kinds}


# runtime.json ---------------------------------------------------------------------------------------------------------


def write_runtime(
    folder: Path,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    statistics: dict[str, Any],
    *,
    name: str,
    dtype: str,
) -> None:
    """tokenizer.json, and runtime.json with the digests of all files that `folder` holds then.

    Args:
        name: Of the model, for people.
        dtype: One of `PRECISIONS`: whether drafts change nothing. The graphs themselves say the types of their inputs.
    """
    config, text = model.config, model.config.text_config
    tokenizer = copy.deepcopy(processor.tokenizer.backend_tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    positions = getattr(text, "max_position_embeddings", None)
    write_json(
        folder / RUNTIME_FILE,
        {
            "format_version": FORMAT_VERSION,
            "model": name,
            "dtype": dtype,
            "action_head": config.action_head,
            "config": {
                **{field: getattr(config, field) for field in CONFIG_FIELDS},
                "text_config": {
                    **{field: getattr(text, field) for field in TEXT_FIELDS},
                    **({} if positions is None else {"max_position_embeddings": positions}),
                },
            },
            "num_patches": model.num_patches,
            "camera_names": list(model.camera_names),
            "normalization": dict(model.normalization),
            "constant_state": model.constant_state,
            "pixels": {field: getattr(processor.image_processor, field) for field in PIXEL_FIELDS},
            "prompt_template": processor.prompt_template,
            "statistics": statistics,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        },
    )


__all__ = ["RUNTIME_FILE", "check_exportable", "export_onnx"]
