"""A Hub folder -> graphs that run without torch: `packages/openvla-runtime` (import `openvla_runtime`) acts with them.

vision.onnx: towers, projector and, where the model sees it, the state. language_model.onnx: one graph for the prompt,
single steps and verify passes over a draft; what a position sees is an input. runtime.json: all else that a prediction
needs.
"""

import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..adapters_openvla import find_adapter
from ..choices_openvla import check_choice
from ..configuration_openvla import OpenVLAConfig
from ..extras import require
from ..folders import new_folder, write_json
from ..frames_openvla import PIXEL_FIELDS
from ..hub import model_folder, published_name, statistics_of
from ..modeling_openvla import OpenVLAForActionPrediction
from ..outputs_openvla import CACHE
from ..processing_openvla import OpenVLAProcessor
from .hub_folder import check_replaced


FORMAT_VERSION = 1  # of runtime.json
RUNTIME_FILE, VISION_FILE, LANGUAGE_MODEL_FILE = "runtime.json", "vision.onnx", "language_model.onnx"
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}  # int8: made of float32
CONFIG_FIELDS = (
    "llm_max_length", "pad_token_id", "image_token_id", "empty_token_id", "action_vocab_size", "n_action_bins",
    "action_chunk", "proprio_dim",
)  # fmt: skip
TEXT_FIELDS = ("model_type", "bos_token_id", "eos_token_id", "vocab_size")
OPSET = 20


def export_onnx(
    weights: str | os.PathLike, output: str | os.PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Write a folder that `openvla_runtime.OnnxPolicy` takes: two graphs, tokenizer and runtime.json.

    The complete model is in memory, in float32 or float16 as it is exported.

    Args:
        weights: Folder or Hub id, published layout or ours; a model whose actions are tokens, one after the other.
        output: Folder to write; it appears complete or not at all.
        dtype: "float32" (default: tokens are those of the model), "float16", or "int8" (weights of matrix products in 8
            bits, their inputs quantized as they come; not exact).
        overwrite: Replace the files of an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: If the model is an adapter, quantized, or one that these graphs cannot stand for.
        ModuleNotFoundError: If a library of the extra `onnx` is missing.
    """
    dtype = dtype or "float32"
    check_choice("dtype", dtype, PRECISIONS, "Of an ONNX export; bfloat16 is not known to ONNX Runtime on a CPU.")
    require("onnx", "onnxscript", "onnxruntime", purpose="export to ONNX", preferred="onnx")
    source, output = model_folder(weights), Path(output)
    check_replaced(output, source, "openvla_runtime", "an ONNX export")
    if find_adapter(source) is not None:
        raise ValueError(f"'{weights}' is an adapter: merge it first (`openvla merge RUN OUT`), then export OUT.")
    config = OpenVLAConfig.from_pretrained(source)
    check_exportable(config)
    statistics = statistics_of(source, config)
    processor = OpenVLAProcessor.from_pretrained(source)
    model = OpenVLAForActionPrediction.from_pretrained(source, dtype=PRECISIONS[dtype]).eval()
    with new_folder(output, overwrite) as folder:
        write_runtime(folder, model, processor, statistics, name=published_name(weights), dtype=dtype)
        write_graphs(folder, model, quantized=dtype == "int8")
    return output


def check_exportable(config: OpenVLAConfig) -> None:
    """Raise a `ValueError` for a model that the graphs cannot stand for."""
    text = config.text_config
    positions = getattr(text, "max_position_embeddings", None) or config.llm_max_length
    window = getattr(text, "sliding_window", None)
    problem = None
    if config.action_head != "tokens":
        problem = f"action_head='{config.action_head}': only token heads ('tokens') are exported"
    elif getattr(config, "quantization_config", None) is not None:
        problem = "its weights are quantized: export the model they were made of, with dtype='int8'"
    elif config.use_film:
        problem = "its towers have FiLM, which sees the words of the prompt"
    elif window is not None and window < positions:
        problem = f"its language model sees {window} positions back only (sliding_window)"
    elif set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        problem = (
            f"its language model has layers of {sorted(set(text.layer_types))}, which have no plain key/value cache"
        )
    if problem:
        raise ValueError(f"This model cannot be exported to ONNX: {problem}. Predict with openvla itself.")


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
    """tokenizer.json and runtime.json.

    Args:
        name: Of the model, for people.
        dtype: One of `PRECISIONS`: whether drafts change nothing. The graphs themselves say the types of their inputs.
    """
    config, text = model.config, model.config.text_config
    if config.empty_token_id is None:
        config.empty_token_id = processor.empty_token_id
    processor.check_fits(config)
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
        },
    )


# Graphs ---------------------------------------------------------------------------------------------------------------


class VisionGraph(nn.Module):
    """Images (and the state) to what the language model sees of them."""

    def __init__(self, model: OpenVLAForActionPrediction):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, cameras * 3 * towers, height, width) and (batch, proprio_dim) -> (batch, num_patches, hidden)."""
        return self.model._encode(pixel_values, state)


class LanguageModelGraph(nn.Module):
    """Tokens, and before the second of them image features, to logits of action tokens, over a key/value cache.

    Steps and verify passes give no features, (1, 0, hidden). A position of the cache that turned out wrong need not be
    cut off: `attention_mask` says what is seen.
    """

    def __init__(self, model: OpenVLAForActionPrediction):
        super().__init__()
        self.language_model = model.language_model
        self.dtype = next(model.language_model.parameters()).dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits (1, rows, n_action_bins) float32, then key and value of each layer, what was given included.

        Args:
            input_ids: (1, length).
            features: (1, patches, hidden), or (1, 0, hidden); `new` is length + patches.
            position_ids: (1, new).
            attention_mask: (1, 1, new, old + new) bool: which positions (columns) a position sees.
            rows: Indices in [0, new) of the positions whose logits are wanted.
            past: Key and value of each layer, (1, heads, old, head_dim) each.
        """
        words = self.language_model.get_input_embeddings()(input_ids)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2])):
            cache.update(keys, values, layer)
        seen = torch.zeros((), dtype=self.dtype)
        logits = self.language_model(
            inputs_embeds=torch.cat([words[:, :1], features.to(self.dtype), words[:, 1:]], dim=1),
            position_ids=position_ids,
            attention_mask=torch.where(attention_mask, seen, torch.finfo(self.dtype).min),
            use_cache=True,
            logits_to_keep=rows,
            **{CACHE: cache},
        ).logits
        return (logits.float(), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def keep_action_rows(model: OpenVLAForActionPrediction) -> None:
    """Let the language model compute logits of action tokens only: no other may be chosen."""
    first, end = model.action_tokenizer.token_range
    head: Any = model.get_output_embeddings()
    rows = nn.Linear(head.in_features, end - first, bias=head.bias is not None, dtype=head.weight.dtype)
    rows.weight = nn.Parameter(head.weight[first:end].detach().clone())
    if head.bias is not None:
        rows.bias = nn.Parameter(head.bias[first:end].detach().clone())
    model.set_output_embeddings(rows)


@torch.no_grad()
def write_graphs(folder: Path, model: OpenVLAForActionPrediction, quantized: bool = False) -> None:
    """Both graphs, with their weights in files beside them. Changes the model: it knows action tokens only afterwards.

    Args:
        quantized: Weights of matrix products of the language model in 8 bits. The towers keep theirs: they are a small
            part, and what is lost there every action sees.
    """
    keep_action_rows(model)
    images = torch.zeros(
        1, len(model.camera_names) * model.vision_backbone.input_shape[0], *model.vision_backbone.image_size
    )
    state = () if model.config.proprio_dim is None else (torch.zeros(1, model.config.proprio_dim),)
    _write_graph(
        folder / VISION_FILE,
        VisionGraph(model),
        (images, *state),
        ["pixel_values", "state"][: 1 + len(state)],
        ["features"],
        None,
    )

    text, dtype = model.config.text_config, next(model.language_model.parameters()).dtype
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    words, patches, old = 3, 5, 4  # of an example; none of them stays fixed
    new = words + patches
    past = [torch.zeros(1, heads, old, head_dim, dtype=dtype) for _ in range(2 * text.num_hidden_layers)]
    names = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    example = (
        torch.ones(1, words, dtype=torch.long),
        torch.zeros(1, patches, text.hidden_size, dtype=dtype),
        torch.arange(old, old + new)[None],
        torch.ones(1, 1, new, old + new, dtype=torch.bool),
        torch.tensor([new - 2, new - 1]),
        past,
    )
    free = torch.export.Dim.DYNAMIC
    target = folder / LANGUAGE_MODEL_FILE
    place = folder / "float32" if quantized else folder
    place.mkdir(exist_ok=True)
    _write_graph(
        place / LANGUAGE_MODEL_FILE,
        LanguageModelGraph(model),
        example,
        ["input_ids", "features", "position_ids", "attention_mask", "rows", *(f"past.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
        ({1: free}, {1: free}, {1: free}, {2: free, 3: free}, {0: free}, [{2: free}] * len(past)),
    )
    if quantized:
        quantize(place / LANGUAGE_MODEL_FILE, target)
        shutil.rmtree(place)


def _write_graph(
    file: Path, module: nn.Module, example: tuple, inputs: list[str], outputs: list[str], free: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about names of free sizes
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs,
            dynamic_shapes=free, verbose=False,
        )  # fmt: skip
    assert program is not None  # with dynamo=True
    program.model.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file on this machine it comes from
    program.save(file, external_data=True)


def quantize(file: Path, target: Path) -> None:
    """Weights of matrix products in 8 bits (one scale for each column), their inputs quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )  # fmt: skip
    data = target.with_name(f"{target.name}.data")
    data.chmod(target.stat().st_mode)  # written for nobody else to read


__all__ = ["RUNTIME_FILE", "check_exportable", "export_onnx"]
