"""Steps of a Llama: the library's weights and formulas, with a cache of fixed size that is kept between predictions.

It saves what the library's forward does for every use of a model that a prediction does not have: masks of tokens that
are all seen, a cache that grows, the last layer of positions that nobody asks, logits of tokens that cannot be chosen.
All linear layers are called as modules: adapters and quantized weights compute as ever. Any other language model, and a
Llama that is watched or changed, has the library's own steps (`EagerSteps`).

Shapes: `batch` samples, `length` tokens and patches of a prompt, `hidden` width of the language model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from .decoding_openvla import EagerSteps, Prefix, Steps, check_rows
from .forks_openvla import lock_over_forks
from .products_openvla import LINEAR, Product, fits, of_library, product_for


LENGTH_STEP = 64  # caches have a multiple of so many positions, to serve prompts of several lengths
MOST_IDLE = 4  # caches of a model that wait for the next prediction: one for each thread that predicts
_POOLING = lock_over_forks()


class CachePool:
    """Key/value caches of one language model, (layers, 2, batch, key/value heads, positions, head_dim).

    Each serves one prediction at a time, and any that is not larger. They hold nothing of the weights, so that nothing
    but their type and device can be out of date.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """One that is at least as large, of the type and on the device of `like`."""
        with _POOLING:
            self._free = [cache for cache in self._free if cache.dtype == like.dtype and cache.device == like.device]
            for place, cache in enumerate(self._free):
                if all(there >= wanted for there, wanted in zip(cache.shape, shape)) and cache.shape[-1] == shape[-1]:
                    return self._free.pop(place)
            # A smaller one makes room for one that serves both, unless that is more memory than both: the largest batch
            # in the largest length, where the one was of many short prompts and the other of a long one.
            if self._free:
                other = self._free[-1].shape
                together = tuple(max(sizes) for sizes in zip(shape, other))
                if math.prod(together) <= math.prod(shape) + math.prod(other):
                    shape = together
                    self._free.pop()
        with torch.inference_mode(False):  # to be written into in any mode
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def give_back(self, cache: torch.Tensor) -> None:
        with _POOLING:
            self._free = [*self._free, cache][-MOST_IDLE:]


_POOLS: WeakKeyDictionary[nn.Module, CachePool] = WeakKeyDictionary()


def pool_of(language_model: nn.Module) -> CachePool:
    """The caches that a language model has."""
    with _POOLING:
        return _POOLS.setdefault(language_model, CachePool())


def cache_shape(language_model: Any, batch: int, length: int) -> tuple[int, ...]:
    """Of a cache for `length` positions, see `CachePool`."""
    config, positions = language_model.config, -(-length // LENGTH_STEP) * LENGTH_STEP
    head_dim = language_model.model.layers[0].self_attn.head_dim
    return (config.num_hidden_layers, 2, batch, config.num_key_value_heads, positions, head_dim)


@contextmanager
def open_steps(
    language_model: Any, prefix: Prefix, num_tokens: int, token_range: tuple[int, int | None]
) -> Iterator[Steps]:
    """The fastest steps that a language model has.

    Args:
        num_tokens: How many will be decoded.
        token_range: First id that may be chosen, and the end of those.
    """
    if not is_plain_llama(language_model):
        yield EagerSteps(language_model, prefix, num_tokens, token_range)
        return
    pool = pool_of(language_model)
    embeds = prefix.inputs_embeds
    cache = pool.take(cache_shape(language_model, len(embeds), embeds.shape[1] + num_tokens), embeds)
    try:
        yield LlamaSteps(language_model, prefix, num_tokens, token_range, cache)
    finally:
        pool.give_back(cache)


def is_plain_llama(language_model: Any) -> bool:
    """Whether its modules are those of the library's Llama, and nothing watches or replaces the calls that are left
    out here."""
    if any_global_hooks() or any_replaced_calls():
        return False
    if type(language_model) is not llama.LlamaForCausalLM or type(language_model.model) is not llama.LlamaModel:
        return False
    model = language_model.model
    if type(model.rotary_emb) is not llama.LlamaRotaryEmbedding or model.rotary_emb.rope_type not in STATIC_ROPE:
        return False
    if not getattr(model.config, "is_causal", True):  # the library lets positions see what comes after them
        return False
    modules = [language_model, model, model.norm]
    layers = used_layers(model)
    for layer in layers:
        modules += [layer, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm]
    kinds = {llama.LlamaForCausalLM, llama.LlamaModel, *LAYER}
    return all(type(module) in kinds and is_plain(module) for module in modules) and all(
        layer.self_attn.is_causal and layer.self_attn.config._attn_implementation in ("sdpa", "eager")
        for layer in layers
    )


LAYER = (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaRMSNorm)
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of a sequence


def used_layers(model: Any) -> list[Any]:
    """Those that the library runs; a slice of the modules would be made as a module."""
    return [*islice(model.layers, model.config.num_hidden_layers)]


def any_global_hooks() -> bool:
    """Whether hooks watch the calls of all modules: torch 2.6 has no function for it."""
    module = nn.modules.module
    forward = module._global_forward_pre_hooks or module._global_forward_hooks
    return bool(forward or module._global_backward_pre_hooks or module._global_backward_hooks)


def calls_of_llama() -> list[Callable]:
    """What the library calls by the name of a class or function, and is left out here."""
    kinds = (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaMLP, *LAYER, nn.Linear)
    return [
        *(kind.forward for kind in kinds),
        llama.apply_rotary_pos_emb,
        ALL_ATTENTION_FUNCTIONS.get("eager", llama.eager_attention_forward),
        ALL_ATTENTION_FUNCTIONS["sdpa"],
    ]


CALLS = [call for call in calls_of_llama() if of_library(call)]  # some may have been replaced already


def any_replaced_calls() -> bool:
    """Whether functions of others stand in for those, as research on faster attention replaces them."""
    return calls_of_llama() != CALLS


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward and no more."""
    return not ("forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after a module."""
    # The library leaves hooks behind that do nothing until hidden states are asked for.
    return bool(module._forward_pre_hooks) or any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
        for hook in module._forward_hooks.values()
    )


class Layer:
    """What a pass calls of one layer of the library's Llama, looked up once for all passes of a prediction."""

    def __init__(self, layer: Any, cache: torch.Tensor, product: Product = functional.linear):
        attention, mlp = layer.self_attn, layer.mlp
        self.keys, self.values = cache
        self.query, self.key, self.value, self.output = (
            as_function(getattr(attention, name), product) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.mlp = mlp
        if type(mlp) is llama.LlamaMLP and is_plain(mlp):
            gate, up, down = (
                as_function(getattr(mlp, name), product) for name in ("gate_proj", "up_proj", "down_proj")
            )
            self.mlp = lambda hidden: down(mlp.act_fn(gate(hidden)) * up(hidden))
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.groups, self.eager = attention.num_key_value_groups, attention.config._attn_implementation == "eager"

    def heads(self, vectors: torch.Tensor) -> torch.Tensor:
        """(batch, n, width) -> (batch, heads, n, head_dim)."""
        return vectors.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attention_inputs(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kept: "Kept"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of some positions, keys and values of all n, (batch, heads, ..., head_dim) each."""
        normed = norm(self.before_attention, hidden)
        keys, values = rotated(self.heads(self.key(normed)), cos, sin), self.heads(self.value(normed))
        normed, cos, sin = kept_of(normed, kept, 1), kept_of(cos, kept, 2), kept_of(sin, kept, 2)
        return rotated(self.heads(self.query(normed)), cos, sin), keys, values

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(batch, n, hidden) with what was seen, (batch, heads, n, head_dim), and what the MLP makes of it."""
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(norm(self.before_mlp, hidden))


Kept = int | torch.Tensor | None  # positions that are asked for: the last ones, (batch, n) indices, or all


def kept_of(vectors: torch.Tensor, kept: Kept, dim: int) -> torch.Tensor:
    """Those of some positions, which `dim` counts; the first dimension counts samples, or has one entry for all."""
    if kept is None:
        return vectors
    if isinstance(kept, int):
        return vectors.narrow(dim, vectors.shape[dim] - kept, kept)
    vectors = vectors.expand(len(kept), *vectors.shape[1:])
    index = kept.view(len(kept), *[1] * (dim - 1), -1, *[1] * (vectors.ndim - dim - 1))
    sizes = list(vectors.shape)
    sizes[dim] = kept.shape[1]
    return vectors.gather(dim, index.expand(sizes))


class LlamaSteps(Steps):
    """Steps over the library's Llama weights. See `open_steps`.

    Args:
        cache: Of a `CachePool`, (layers, 2, at least batch, heads, at least length + num_tokens, head_dim).
    """

    verifies = True
    make_layer: type[Layer] = Layer  # of one of the library and its part of the cache

    def __init__(
        self,
        language_model: Any,
        prefix: Prefix,
        num_tokens: int,
        token_range: tuple[int, int | None],
        cache: torch.Tensor,
    ):
        model, first, end = language_model.model, *token_range
        batch, self.length = prefix.inputs_embeds.shape[:2]
        self.prefix, self.embed, self.norm = prefix, model.embed_tokens, model.norm
        product, layers = product_for(prefix.inputs_embeds), used_layers(model)
        self.layers: list[Any] = [
            self.make_layer(layer, part[:, :batch], product) for layer, part in zip(layers, cache)
        ]
        lm_head = language_model.lm_head

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            of_all = lm_head(hidden)
            check_rows(of_all.shape[-1], end)
            return of_all[..., first:end]

        self.logits: Callable[[torch.Tensor], torch.Tensor] = logits
        if type(lm_head) in LINEAR and lm_head.bias is None and is_plain(lm_head):
            check_rows(len(lm_head.weight), end)
            rows = lm_head.weight[first:end]
            of_rows = product if fits(rows) else functional.linear
            self.logits = lambda hidden: of_rows(hidden, rows)
        self.total = self.length + num_tokens - 1  # the last token is not read
        padding = prefix.attention_mask
        self.ends: torch.Tensor | None = None  # (batch, 1) places of the last tokens of prompts that are padded behind
        if prefix.pads_right and padding is not None:
            self.ends = padding.sum(dim=1, keepdim=True) - 1
        if padding is None:
            position_ids = torch.arange(self.total, device=cache.device)[None]
        else:
            padding = functional.pad(padding.to(cache.device), (0, num_tokens - 1), value=1)
            position_ids = (padding.cumsum(dim=1) - 1).clamp(min=0)
        cos, sin = model.rotary_emb(prefix.inputs_embeds, position_ids)
        half = cos.shape[-1] // 2
        # For a product with the halves of a vector in the other order; the library changes the sign of the first one.
        self.cos, self.sin = cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, None]
        self.padding: torch.Tensor | None = padding
        self._mask: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """(batch or 1, 1, total, total): who sees whom, as the attention of the model takes it."""
        if self._mask is None:
            mask = torch.ones(self.total, self.total, dtype=torch.bool, device=self.cos.device).tril()[None, None]
            if self.padding is not None:  # which sees itself: the softmax of nothing is NaN
                own = torch.eye(self.total, dtype=torch.bool, device=mask.device)
                mask = mask & self.padding.bool()[:, None, None] | own
            if self.layers[0].eager:
                least = torch.finfo(self.cos.dtype).min
                mask = torch.zeros_like(mask, dtype=self.cos.dtype).masked_fill(~mask, least)
            self._mask = mask
        return self._mask

    def prefill(self, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        embeds, count = self.prefix.inputs_embeds, 0
        if token_ids is not None and token_ids.shape[1]:
            embeds, count = torch.cat([embeds, self.embed(token_ids)], dim=1), token_ids.shape[1]
        if self.ends is None:
            return self._pass(embeds, 0, 1 + count)
        behind = torch.arange(self.length, self.length + count, device=embeds.device)
        return self._pass(embeds, 0, torch.cat([self.ends, behind.expand(len(embeds), -1)], dim=1))

    def step(self, token_ids: torch.Tensor, begin: int) -> torch.Tensor:
        return self._pass(self.embed(token_ids), self.length + begin, None)

    def _pass(self, hidden: torch.Tensor, begin: int, kept: Kept) -> torch.Tensor:
        """Logits of what follows the positions from `begin` on that are `kept`."""
        stop = begin + hidden.shape[1]
        cos, sin = self.cos[:, :, begin:stop], self.sin[:, :, begin:stop]
        for layer in self.layers:
            of_layer = kept if layer is self.layers[-1] else None
            query, keys, values = layer.attention_inputs(hidden, cos, sin, of_layer)
            layer.keys[:, :, begin:stop], layer.values[:, :, begin:stop] = keys, values
            attended = self._attended(layer, query, stop, of_layer)
            hidden = layer.after_attention(kept_of(hidden, of_layer, 1), attended)
        return self.logits(norm(self.norm, hidden)).float()

    def _attended(self, layer: Layer, query: torch.Tensor, stop: int, kept: Kept) -> torch.Tensor:
        """(batch, heads, n, head_dim) of the last n of `stop` positions, or of such places."""
        count, keys, values = query.shape[2], layer.keys[:, :, :stop], layer.values[:, :, :stop]
        if layer.groups > 1:
            keys, values = (part.repeat_interleave(layer.groups, dim=1) for part in (keys, values))
        # Without padding one position alone sees all before it, and for all positions there is a kernel: no token sees
        # what stands behind it, padding among it.
        padded = self.padding is not None and (self.ends is None or stop > self.length or kept is not None)
        masked = padded or (count > 1 and (layer.eager or count < stop))
        mask = None
        if masked:
            mask = kept_of(self.mask[..., :stop, :stop], count if kept is None else kept, 2)
        if not layer.eager:
            return functional.scaled_dot_product_attention(
                query, keys, values, mask, is_causal=not masked and count > 1, scale=layer.scaling
            )
        weights = query @ keys.transpose(2, 3) * layer.scaling
        weights = weights if mask is None else weights + mask
        return functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype) @ values


def as_function(module: nn.Module, product: Product = functional.linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a call of a linear layer does, without the way through the module where nothing happens on it."""
    if isinstance(module, nn.Linear) and type(module) in LINEAR and is_plain(module):
        weight, bias = module.weight, module.bias
        return partial(product if fits(weight, bias) else functional.linear, weight=weight, bias=bias)
    return module


def rotated(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(batch, heads, n, head_dim) with the rotary embedding of their positions, see `LlamaSteps`."""
    swapped = vectors.roll(vectors.shape[-1] // 2, dims=-1)
    return (vectors * cos).add_(swapped.mul_(sin))


def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The library's RMS norm; in float32 as one call, in half precision with its roundings."""
    weight = module.weight
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32:
        return module(hidden)
    return torch.rms_norm(hidden, weight.shape, weight, module.variance_epsilon)


__all__ = [
    "CachePool",
    "LlamaSteps",
    "any_global_hooks",
    "calls_of_llama",
    "cache_shape",
    "has_hooks",
    "is_plain_llama",
    "open_steps",
    "pool_of",
]
