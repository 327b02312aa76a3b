"""A layer of the library's Llama as compiled functions, for graphs of kernels on a GPU.

Between two products of matrices everything becomes one kernel, with the roundings of half precision that the library
has; products of the same input become one, of weights that lie side by side in memory. See `prepare_for_inference`.

Shapes: `batch` samples, n positions, `hidden` width of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama import modeling_llama as llama

from .float8_linear_openvla import Float8Linear, product_of_float8, unit_scale
from .int4_linear_openvla import Int4Linear, product_of_tiles
from .int8_linear_openvla import Int8Linear
from .llama_openvla import Layer, LlamaSteps, as_function, is_plain, kept_of, norm, rotated
from .products_openvla import Product
from .quantized_linear_openvla import FLOAT8


Weights = tuple[torch.Tensor, ...]  # (weight,), and of few bits what else their product takes
SHAPES = 256  # that a function is compiled for: two or three for each graph
BACKEND = "inductor"


def why_not_compiled(language_model: Any) -> str:
    """Why the layers of a plain Llama cannot be compiled; empty where they can."""
    for layer in language_model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if type(mlp) is llama.LlamaMLP:
            linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if type(mlp) is not llama.LlamaMLP or mlp.config.hidden_act != "silu":
            return "its MLP is not the one of Llama"
        plain = all(as_function(module) is not module for module in linears)
        if not (plain or all(map(is_fast, linears))) or any(module.bias is not None for module in linears):
            return "its linear layers are quantized in a way without fast kernels, adapted, watched or have biases"
        kinds = [nn.Linear if plain else type(module) for module in linears]
        if len({(kind, part.weight.dtype, part.weight.device) for kind, part in zip(kinds, linears)}) > 1:
            return "its weights are of several types or on several devices"
    return ""


class CompiledLayer(Layer):
    """A `Layer` of linear layers without biases, plain ones or ours of few bits. Plain weights are moved in memory:
    parts of one tensor for all products of the same input."""

    def __init__(self, layer: Any, cache: torch.Tensor, product: Product = linear):
        super().__init__(layer, cache, product)
        attention, mlp = layer.self_attn, layer.mlp
        self.inputs = weights_of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.widths = [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.gate_up = weights_of(mlp.gate_proj, mlp.up_proj)
        self.outputs, self.down = weights_of(attention.o_proj), weights_of(mlp.down_proj)
        self.sums = self.outputs[0][0].dtype == torch.int8

    def _given(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, ...]:
        """What `_attention_inputs` takes."""
        before = self.before_attention
        norm = (before.weight.data, before.variance_epsilon)
        return hidden, cos, sin, *norm, self.inputs, self.widths, self.head_dim

    def attention_inputs(self, hidden, cos, sin, kept):
        query, keys, values = _compiled(_attention_inputs)(*self._given(hidden, cos, sin))
        return kept_of(query, kept, 2), keys, values

    def after_attention(self, hidden, attended):
        before = self.before_mlp
        return _compiled(_after_attention, self.sums and hidden.shape[:2].numel() == 1)(
            hidden, attended, self.outputs, before.weight.data, before.variance_epsilon, self.gate_up, self.down
        )

    def one_token(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, place: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """What becomes of one position, (batch, 1, hidden).

        Args:
            place: (1,) of the cache, where its key and value are written.
            seen: (batch or 1, 1, places) bool, the places that it sees.
        """
        attended = _compiled(_attended_by_one, self.sums)(
            self.keys, self.values, place, seen, self.scaling, *self._given(hidden, cos, sin)
        )
        return self.after_attention(hidden, attended)


class CompiledSteps(LlamaSteps):
    """Steps of compiled layers."""

    make_layer = CompiledLayer

    def step(self, token_ids, begin):
        """One token alone looks at the whole cache, so that every place has the same kernels."""
        if token_ids.shape[1] > 1:
            return super().step(token_ids, begin)
        position = self.length + begin
        place = torch.full((1,), position, device=token_ids.device)
        seen = self.mask[:, :, position]
        seen = seen == 0 if seen.is_floating_point() else seen.clone()
        cos, sin = self.cos[:, :, position : position + 1], self.sin[:, :, position : position + 1]
        hidden = self.embed(token_ids)
        for layer in self.layers:
            hidden = layer.one_token(hidden, cos, sin, place, seen)
        return self.logits(norm(self.norm, hidden)).float()


@contextmanager
def compiling() -> Iterator[None]:
    """Where layers are called for the first time with shapes that they were not compiled for."""
    from torch._dynamo import config as dynamo_config  # half a second

    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    with dynamo_config.patch({limit: SHAPES}):
        yield


def is_fast(module: Any) -> bool:
    """Whether a quantized layer has compiled kernels here, and nothing watches it."""
    if not isinstance(module, (Float8Linear, Int8Linear, Int4Linear)) or not is_plain(module):
        return False
    device = module.weight.device
    if isinstance(module, Float8Linear):
        return module.is_fast(device)
    if device.type != "cuda" or not module.may_pack:
        return False
    return isinstance(module, Int8Linear) or module.has_known_tiles()


def weights_of(*modules: Any) -> list[Weights]:
    """What `_product` takes of some layers with the same input."""
    kind = type(modules[0])
    if kind is Float8Linear:
        return [(module.weight.data, module.scale, unit_scale(module.scale.device)) for module in modules]
    if kind is Int8Linear:
        return [(module.weight.data, module.weight_scale) for module in modules]
    if kind is Int4Linear:
        return [(module.packed_in_tiles().data, module.scale_and_zero) for module in modules]
    return [(side_by_side(modules),)]


def side_by_side(modules: Sequence[nn.Linear]) -> torch.Tensor:
    """(all out_features, in_features): the weights of some layers, which become parts of this tensor, once."""
    weights = [module.weight.data for module in modules]
    first, rows = weights[0], sum(len(weight) for weight in weights)
    places = [first.data_ptr() + first.element_size() * first.shape[1] * number for number in _begins(weights)]
    storage = first.untyped_storage()
    together = all(
        weight.data_ptr() == place
        and weight.is_contiguous()
        and weight.untyped_storage().data_ptr() == storage.data_ptr()
        for weight, place in zip(weights, places)
    )
    if together:
        return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
    with torch.inference_mode(modules[0].weight.is_inference()):  # others may learn later
        merged = first.new_empty(rows, first.shape[1])
    for module, begin in zip(modules, _begins(weights)):
        part = merged[begin : begin + module.out_features]
        part.copy_(module.weight.data)
        module.weight.data = part
    return merged


def _begins(weights: Sequence[torch.Tensor]) -> list[int]:
    return [sum(len(weight) for weight in weights[:number]) for number in range(len(weights))]


_FUNCTIONS: dict[tuple[Callable, str, bool], Callable] = {}


def _compiled(function: Callable, tuned: bool = False) -> Callable:
    """`tuned`: with kernels that are tried in several sizes; sums need it (bfloat16: 37.4 ms an action, else 44.7)."""
    key = (function, BACKEND, tuned)
    if key not in _FUNCTIONS:
        options: Any = {"emulate_precision_casts": True, "coordinate_descent_tuning": tuned}
        _FUNCTIONS[key] = torch.compile(
            function, fullgraph=True, dynamic=False, backend=BACKEND, options=options if BACKEND == "inductor" else None
        )
    return _FUNCTIONS[key]


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As the library's module rounds."""
    values = hidden.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * values.to(hidden.dtype)


def _product(values: torch.Tensor, weights: list[Weights], widths: Sequence[int]) -> Sequence[torch.Tensor]:
    """(batch, n, in) -> (batch, n, width) for each of `widths`."""
    if len(weights[0]) == 1:
        return linear(values, weights[0][0]).split(widths, dim=-1)
    rows, kind = values.flatten(0, -2), weights[0][0].dtype
    kinds: dict[torch.dtype, Callable[..., torch.Tensor]] = {
        FLOAT8: product_of_float8, torch.int8: _product_of_int8, torch.int32: product_of_tiles
    }  # fmt: skip
    products = [kinds[kind](rows, *weight) for weight in weights]
    return [product.unflatten(0, values.shape[:-1]).to(values.dtype) for product in products]


def _product_of_int8(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, in) -> (rows, out). One row as sums, so that no more is read than the weights: cuBLAS knows no product of
    floats with whole numbers."""
    if len(rows) == 1:
        return (weight.float() * rows.float()).sum(dim=-1, keepdim=True).T * scale
    return linear(rows, (weight * scale[:, None]).to(rows.dtype))


def _attention_inputs(
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weight: torch.Tensor,
    epsilon: float,
    weights: list[Weights],
    widths: list[int],
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    projected = _product(_rms_norm(hidden, norm_weight, epsilon), weights, widths)
    query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in projected)
    return rotated(query, cos, sin), rotated(key, cos, sin), value


def _attended_by_one(
    keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor, seen: torch.Tensor, scaling: float, *given: Any
) -> torch.Tensor:
    """(batch, heads, 1, head_dim) that one position sees, of the cache in which it is written: see
    `CompiledLayer.one_token`. Attention as sums, in float32: for one position the fused kernels of torch, and the mask
    they are given, take twice as long (29 and 14 microseconds on an H200).

    Args:
        given: Of `_attention_inputs`.
    """
    query, key, value = _attention_inputs(*given)
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    hidden_places, count = ~seen[:, :, None], seen.shape[-1]
    keys, values = (part[:, :, None, :count].float() for part in (keys, values))  # (batch, heads, 1, count, head_dim)
    scores = (query.unflatten(1, (keys.shape[1], -1)).float() * keys).sum(dim=-1) * scaling
    shares = scores.masked_fill(hidden_places, -torch.inf).softmax(dim=-1)
    # Zeros where nothing is seen: what an earlier prediction left there may be NaN.
    attended = (shares[..., None] * values.masked_fill(hidden_places[..., None], 0.0)).sum(dim=-2)
    return attended.flatten(1, 2)[:, :, None].to(query.dtype)


def _after_attention(
    hidden: torch.Tensor,
    attended: torch.Tensor,
    outputs: list[Weights],
    norm_weight: torch.Tensor,
    epsilon: float,
    gate_up: list[Weights],
    down: list[Weights],
) -> torch.Tensor:
    width = hidden.shape[-1]
    hidden = hidden + _product(attended.transpose(1, 2).flatten(2), outputs, [width])[0]
    rows = sum(len(weights[0]) for weights in gate_up)
    gate, up = _product(_rms_norm(hidden, norm_weight, epsilon), gate_up, [rows // 2] * 2)
    return hidden + _product(nn.functional.silu(gate) * up, down, [width])[0]


__all__ = ["CompiledLayer", "CompiledSteps", "compiling", "side_by_side", "why_not_compiled"]
