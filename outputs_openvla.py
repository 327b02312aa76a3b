"""What the model returns, and the one place that knows the two names of the key/value cache.

transformers 5.24 calls it `cache` in every output and forward, `past_key_values` before; from 5.40 on it does not know
the old name. Here both names work on every version and without a warning, and the library is given the one it knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput


CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given, under either name."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one thing: give one of them.")
    return past_key_values if cache is None else cache


def _known(name):
    """The name that the installed library has for a field."""
    return CACHE if isinstance(name, str) and name in CACHE_NAMES else name


class BothCacheNames:
    """Mixin of an output of the library: attribute, key, `get` and `in` find the cache under either name."""

    def __getitem__(self, name):
        return super().__getitem__(_known(name))  # type: ignore[misc]

    def __setitem__(self, name, value):
        super().__setitem__(_known(name), value)  # type: ignore[misc]

    def __contains__(self, name):
        return super().__contains__(_known(name))  # type: ignore[misc]

    def __setattr__(self, name, value):
        super().__setattr__(_known(name), value)

    def get(self, name, default=None):
        return super().get(_known(name), default)  # type: ignore[misc]


for _name in set(CACHE_NAMES) - {CACHE}:
    setattr(BothCacheNames, _name, property(lambda output: getattr(output, CACHE)))


@dataclass(init=False)
class OpenVLAOutput(BothCacheNames, CausalLMOutputWithPast):
    """Output of `OpenVLAForActionPrediction.forward`.

    loss: Mean cross entropy over labels that are not -100, if labels were given.
    logits: (batch, num_patches + length, vocab_size), or the last `logits_to_keep` positions of it.
    cache (also called past_key_values), hidden_states, attentions: As in every causal language model of the library.
    projector_features: (batch, num_patches, hidden), if an image was given.
    predicted: (batch, action_chunk, action_dim) of a head with weights: normalized actions, or the noise in them.
    """

    projector_features: torch.Tensor | None = None
    predicted: torch.Tensor | None = None

    def __init__(
        self,
        loss=None,
        logits=None,
        past_key_values=None,
        hidden_states=None,
        attentions=None,
        projector_features=None,
        cache=None,
        predicted=None,
    ):
        if isinstance(loss, Mapping):  # as outputs of the library, of the items of another: accelerate does so in bf16
            self.__init__(**loss)  # type: ignore[misc]
            return
        cache = {CACHE: one_cache(cache, past_key_values)}
        super().__init__(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions, **cache)
        self.projector_features = projector_features
        self.predicted = predicted


class OpenVLAGenerateOutput(BothCacheNames, GenerateDecoderOnlyOutput):
    """Output of `generate(..., return_dict_in_generate=True)`, that of the library."""


class OpenVLAGenerateBeamOutput(BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """The same of a beam search."""


def with_both_names(generated):
    """What `generate` of the library returned, the cache under both names."""
    ours = {
        GenerateDecoderOnlyOutput: OpenVLAGenerateOutput,
        GenerateBeamDecoderOnlyOutput: OpenVLAGenerateBeamOutput,
    }.get(type(generated))
    return generated if ours is None else ours(**generated)


@dataclass
class ActionPrediction(ModelOutput):
    """Output of `predict_action(..., return_dict=True)`; all arrays are (action_dim,) or (batch, action_dim), of models
    that predict chunks (action_chunk, action_dim) or (batch, action_chunk, action_dim).

    actions: float64, in the units of the dataset (un-normalized where its mask is True).
    normalized_actions: float64 in [-1, 1].
    token_ids: int64 ids of the chosen tokens.
    token_probabilities: float32 probability of each chosen token among those that could have been chosen.
    token_entropies: float32 entropy of that distribution in nats; log(256) = 5.5 means no idea.
    token_passes: int64 number of the pass of the language model in which each token was decided, from 1 on (0: before,
        see `committed`). The largest of a sample says how many it took: without a draft one for each token.
    token_distributions: With `return_distributions`: float32 probabilities of all tokens that could have been chosen,
        one axis more, in the order of their ids (ids of action tokens grow as actions fall).

    Heads that give numbers and no tokens leave what is of tokens out (None).
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    token_probabilities: np.ndarray | None = None
    token_entropies: np.ndarray | None = None
    token_passes: np.ndarray | None = None
    token_distributions: np.ndarray | None = None


__all__ = ["ActionPrediction", "OpenVLAOutput"]
