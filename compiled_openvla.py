"""A layer of the library's Llama as two compiled functions, for graphs of kernels on a GPU.

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

from .llama_openvla import Layer, as_function, is_plain, rotated
from .quantized_linear_openvla import Float8Linear, product_of_float8


Weights = tuple[torch.Tensor, ...]  # (weight,), or (weight, scale) in fp8
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
        if not (plain or all(is_float8(module) for module in linears)) or any(one.bias is not None for one in linears):
            return "its linear layers are quantized, adapted, watched or have biases"
        if len({(module.weight.dtype, module.weight.device) for module in linears}) > 1:
            return "its weights are of several types or on several devices"
    return ""


class CompiledLayer(Layer):
    """A `Layer` of plain linear layers without biases, or of such in fp8. Plain weights are moved in memory: parts of
    one tensor for all products of the same input."""

    def __init__(self, layer: Any, cache: torch.Tensor):
        super().__init__(layer, cache)
        attention, mlp = layer.self_attn, layer.mlp
        self.inputs = weights_of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.widths = [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.gate_up = weights_of(mlp.gate_proj, mlp.up_proj)
        self.outputs, self.down = weights_of(attention.o_proj), weights_of(mlp.down_proj)

    def attention_inputs(self, hidden, cos, sin, last):
        before = self.before_attention
        query, keys, values = _compiled(_attention_inputs)(
            hidden, cos, sin, before.weight.data, before.variance_epsilon, self.inputs, self.widths, self.head_dim
        )
        return query[:, :, -last:], keys, values

    def after_attention(self, hidden, attended):
        before = self.before_mlp
        return _compiled(_after_attention)(
            hidden, attended, self.outputs, before.weight.data, before.variance_epsilon, self.gate_up, self.down
        )


@contextmanager
def compiling() -> Iterator[None]:
    """Where layers are called for the first time with shapes that they were not compiled for."""
    from torch._dynamo import config as dynamo_config  # half a second

    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    with dynamo_config.patch({limit: SHAPES}):
        yield


def is_float8(module: nn.Module) -> bool:
    """Whether a layer multiplies floats of 8 bits, and nothing watches it."""
    return type(module) is Float8Linear and module.is_fast(module.weight.device) and is_plain(module)


def weights_of(*modules: Any) -> list[Weights]:
    """What `_product` takes of some layers with the same input."""
    if type(modules[0]) is Float8Linear:
        return [(module.weight.data, module.scale) for module in modules]
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
    with torch.inference_mode(False):  # they may learn later
        merged = first.new_empty(rows, first.shape[1])
    for module, begin in zip(modules, _begins(weights)):
        part = merged[begin : begin + module.out_features]
        part.copy_(module.weight.data)
        module.weight.data = part
    return merged


def _begins(weights: Sequence[torch.Tensor]) -> list[int]:
    return [sum(len(weight) for weight in weights[:number]) for number in range(len(weights))]


_FUNCTIONS: dict[tuple[Callable, str], Callable] = {}


def _compiled(function: Callable) -> Callable:
    key = (function, BACKEND)
    if key not in _FUNCTIONS:
        options: Any = {"emulate_precision_casts": True} if BACKEND == "inductor" else None
        _FUNCTIONS[key] = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, options=options)
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
    rows = values.flatten(0, -2)
    products = [product_of_float8(rows, weight, scale) for weight, scale in weights]
    return [product.unflatten(0, values.shape[:-1]).to(values.dtype) for product in products]


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


__all__ = ["CompiledLayer", "compiling", "side_by_side", "why_not_compiled"]
