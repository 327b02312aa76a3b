"""The two graphs of an ONNX export: what goes in and out of them, and how they are written."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.llama import modeling_llama as llama

from ..int8_linear_openvla import Int8Linear, quantize_rows
from ..llama_openvla import is_plain_llama
from ..modeling_openvla import OpenVLAForActionPrediction
from ..outputs_openvla import CACHE


LARGEST = 127  # of a rounded activation: the runtime asks for kernels that hold its products (`needs_wide_sums`)


class VisionGraph(nn.Module):
    """Images (and the state) to what the language model sees of them."""

    def __init__(self, model: OpenVLAForActionPrediction):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, cameras * 3 * towers, height, width) and (batch, proprio_dim) -> (batch, num_patches, hidden)."""
        return self.model._encode(pixel_values, state)


class Int8Product(nn.Module):
    """A layer of 8 bits of ours (`Int8Linear`) with the whole numbers of ONNX: each position has a step of its own, so
    that nothing depends on what is read together."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, layer: Int8Linear):
        super().__init__()
        self.register_buffer("weight", layer.plain().T.contiguous())
        self.register_buffer("weight_scale", layer.weight_scale)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features) float32."""
        whole, step = quantize_rows(x, LARGEST)
        if torch.compiler.is_exporting():
            zero, shape = torch.tensor(LARGEST + 1, dtype=torch.uint8), (*x.shape[:-1], self.weight.shape[1])
            found = torch.onnx.ops.symbolic("MatMulInteger", [whole, self.weight, zero], dtype=torch.int32, shape=shape)
        else:  # `_checked_graph`
            found = (whole.float() - (LARGEST + 1)) @ self.weight.float()
        step = step + 0 * x.sum(-1, keepdim=True)  # the largest number of ONNX Runtime passes over NaN, a sum does not
        found = found.float() * self.weight_scale * step
        return found if self.bias is None else found + self.bias


def write_products_of_8_bits(model: nn.Module) -> None:
    """Let layers of 8 bits be written as `Int8Product`. They run as slow as plain ones afterwards."""
    names = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    for name in names:  # weights of one layer are there twice at a time
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, Int8Product(layer))


class AskedPositions(nn.Module):
    """The last layer of the library's Llama: keys and values of all positions, all else of those in `rows` alone, whose
    logits are wanted. Of a prompt these are a few of hundreds."""

    rows: torch.Tensor  # set by `LanguageModelGraph` before each pass

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """(1, new, hidden) -> (1, rows, hidden)."""
        layer, attention, rows = self.layer, self.layer.self_attn, self.rows
        normed, (cos, sin) = layer.input_layernorm(hidden_states), position_embeddings
        asked = normed.index_select(1, rows)

        def heads(vectors: torch.Tensor) -> torch.Tensor:
            return vectors.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        keys, _ = llama.apply_rotary_pos_emb(*[heads(attention.k_proj(normed))] * 2, cos, sin)
        queries, _ = llama.apply_rotary_pos_emb(
            *[heads(attention.q_proj(asked))] * 2, cos.index_select(1, rows), sin.index_select(1, rows)
        )
        keys, values = kwargs[CACHE].update(keys, heads(attention.v_proj(normed)), attention.layer_idx)
        keys, values = (llama.repeat_kv(part, attention.num_key_value_groups) for part in (keys, values))
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attention_mask.index_select(2, rows), scale=attention.scaling
        )
        hidden = hidden_states.index_select(1, rows) + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class LanguageModelGraph(nn.Module):
    """Tokens, and before the second of them image features, to logits of action tokens, over a key/value cache.

    Steps and verify passes give no features, (1, 0, hidden). A position of the cache that turned out wrong need not be
    cut off: `attention_mask` says what is seen.
    """

    def __init__(self, model: OpenVLAForActionPrediction):
        super().__init__()
        self.language_model = model.language_model
        self.dtype = next(model.language_model.parameters()).dtype
        self.last: Any = None
        if is_plain_llama(self.language_model):
            layers = self.language_model.model.layers
            self.last = layers[-1] = AskedPositions(layers[-1])

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
        if self.last is not None:
            self.last.rows = rows
        logits = self.language_model(
            inputs_embeds=torch.cat([words[:, :1], features.to(self.dtype), words[:, 1:]], dim=1),
            position_ids=position_ids,
            attention_mask=torch.where(attention_mask, seen, torch.finfo(self.dtype).min),
            use_cache=True,
            logits_to_keep=rows if self.last is None else 0,
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
def write_vision(file: Path, model: OpenVLAForActionPrediction) -> None:
    """Towers, projector and, where the model sees it, the state; weights in a file beside it."""
    channels, *size = model.vision_backbone.input_shape
    example, names = [torch.zeros(1, len(model.camera_names) * channels, *size)], ["pixel_values"]
    if model.config.proprio_dim is not None:
        example.append(torch.zeros(1, model.config.proprio_dim))
        names.append("state")
    _write_graph(file, VisionGraph(model), tuple(example), names, ["features"])


@torch.no_grad()
def write_language_model(file: Path, model: OpenVLAForActionPrediction) -> None:
    """The language model; weights in a file beside it. Changes the model, which predicts no more afterwards."""
    keep_action_rows(model)
    text, dtype = model.config.text_config, next(model.language_model.parameters()).dtype
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    words, patches, old = 3, 5, 4  # of an example; none of them stays fixed
    new = words + patches
    past = [torch.zeros(1, heads, old, head_dim, dtype=dtype) for _ in range(2 * text.num_hidden_layers)]
    example = (
        torch.ones(1, words, dtype=torch.long),
        torch.zeros(1, patches, text.hidden_size, dtype=dtype),
        torch.arange(old, old + new)[None],
        torch.ones(1, 1, new, old + new, dtype=torch.bool),
        torch.tensor([new - 2, new - 1]),
        past,
    )
    cache = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    inputs = ["input_ids", "features", "position_ids", "attention_mask", "rows", *(f"past.{name}" for name in cache)]
    outputs = ["logits", *(f"present.{name}" for name in cache)]
    free = torch.export.Dim.DYNAMIC
    sizes = ({1: free}, {1: free}, {1: free}, {2: free, 3: free}, {0: free}, [{2: free}] * len(past))
    empty = [tensor[:, :, :0] for tensor in past]
    _write_graph(file, _checked_graph(model, empty), example, inputs, outputs, sizes)


def _checked_graph(model: OpenVLAForActionPrediction, empty: list[torch.Tensor]) -> LanguageModelGraph:
    """The graph of a language model, after it was seen that passes over a cache with wrong positions in it, which the
    mask hides, give what the library computes of the right ones at once.

    Args:
        empty: Keys and values of no position.

    Raises:
        ValueError: If they do not: the model looks at places in the cache, where the graph tells positions.
    """
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, model.config.text_config.vocab_size, (1, 8), generator=generator)
    table: Any = model.get_input_embeddings().weight
    features = torch.randn(1, 5, model.llm_dim, generator=generator).to(table.dtype) * table[:99].float().std().to(
        table
    )
    embeds = model.get_input_embeddings()(words)
    embeds = torch.cat([embeds[:, :1], features, embeds[:, 1:]], dim=1)
    read, new = 3 + 5, 5  # positions of the prompt, and those after it

    def passes(wrong: int) -> torch.Tensor:
        """Logits of the last position of the prompt, read with so many wrong ones behind it, and of those after it."""
        before = torch.ones(read + wrong, read + wrong, dtype=torch.bool).tril()
        seen = torch.ones(new, read + wrong + new, dtype=torch.bool).tril(read + wrong)
        seen[:, read : read + wrong] = False
        prompt, *past = graph(
            torch.cat([words[:, :3], words[:, 8 - wrong :]], dim=1), features, torch.arange(read + wrong)[None],
            before[None, None], torch.tensor([read - 1]), empty,
        )  # fmt: skip
        rest, *_ = graph(
            words[:, 3:], features[:, :0], torch.arange(read, read + new)[None], seen[None, None],
            torch.arange(new), past,
        )  # fmt: skip
        return torch.cat([prompt, rest], dim=1)

    try:
        expected = model.language_model(inputs_embeds=embeds, use_cache=False).logits[:, read - 1 :].float()
        graph = LanguageModelGraph(model).eval()
        found = passes(0), passes(2)
    except (RuntimeError, ValueError, TypeError, IndexError):  # the exporter says it of the same graph
        return LanguageModelGraph(model)
    rounding, far = (float((logits - expected).abs().max() / expected.abs().max()) for logits in found)
    if rounding > 0.1 or far > max(1e-3, 3 * rounding):
        raise ValueError(
            "This model cannot be exported to ONNX: its language model depends on where a position lies in the cache "
            f"(logits differ by {max(far, rounding):.1%} of the largest). Predict with openvla itself."
        )
    return graph


def _write_graph(
    file: Path, module: nn.Module, example: tuple, inputs: list[str], outputs: list[str], free: Any = None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about names of free sizes
        try:
            program = torch.onnx.export(
                module.eval(), example, dynamo=True, input_names=inputs, output_names=outputs, dynamic_shapes=free,
                verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"This model cannot be exported to ONNX: torch {torch.__version__} makes no graph of it ({file.name}; "
                f"{type(cause).__name__}: {str(cause).strip()[:300]}). Predict with openvla itself."
            ) from error
    assert program is not None  # with dynamo=True
    program.model.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file on this machine it comes from
    with _named(file):
        program.save(file, external_data=True)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of writing, of which a full disk is most, with the file: numpy and onnx tell which element it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"Cannot write '{file}': {error.strerror or error}. Make room, or give another disk.") from error
