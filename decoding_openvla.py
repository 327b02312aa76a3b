"""Token decoding: functions over one step object, which computes the next logits however it likes.

Shapes: `batch` samples, `length` tokens and patches of a prompt, `hidden` width of the language model.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from .outputs_openvla import CACHE
from .sampling_openvla import Sampling


@dataclass
class Prefix:
    """What the language model reads before it acts: prompts with their image patches.

    inputs_embeds: (batch, length, hidden), rows padded on the left.
    attention_mask: (batch, length), 0 marks padding; None without any, which is also the fastest attention.
    finite: (batch, 1) bool, False for a sample with a feature that is NaN or infinite.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    finite: torch.Tensor


class Steps(Protocol):
    """Logits of one token after the other, (batch, vocab_size) float32 each. Nothing leaves the device."""

    def prefill(self) -> torch.Tensor:
        """Read the prompts: logits of the first token."""
        ...

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Read the tokens just chosen, (batch, 1): logits of the next."""
        ...


class EagerSteps:
    """Steps of a language model of the library, with a cache that grows.

    Args:
        num_tokens: How many will be decoded.
    """

    def __init__(self, language_model: Any, prefix: Prefix, num_tokens: int):
        self.language_model, self.prefix = language_model, prefix
        self.cache = DynamicCache(config=language_model.config)
        self.begin, self.stop = 0, prefix.inputs_embeds.shape[1]  # positions of the tokens that come next
        self.attention_mask = self.position_ids = None
        if prefix.attention_mask is not None:
            self.attention_mask = nn.functional.pad(prefix.attention_mask, (0, num_tokens), value=1)
            self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def prefill(self) -> torch.Tensor:
        return self._logits(inputs_embeds=self.prefix.inputs_embeds)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._logits(input_ids=token_ids)

    def _logits(self, **tokens: torch.Tensor) -> torch.Tensor:
        logits = self.language_model(
            **tokens,
            attention_mask=None if self.attention_mask is None else self.attention_mask[:, : self.stop],
            position_ids=None if self.position_ids is None else self.position_ids[:, self.begin : self.stop],
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.begin, self.stop = self.stop, self.stop + 1
        return logits.float()


def decode_tokens(
    steps: Steps, finite: torch.Tensor, num_tokens: int, token_range: tuple[int, int | None], sampling: Sampling | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exactly `num_tokens` tokens, one after the other; nothing leaves the device.

    Args:
        finite: (batch, 1) of the `Prefix`.
        token_range: First id that may be chosen, and the end of those.
        sampling: None for the most probable token.

    Returns:
        Token ids, their probabilities and the entropies (nats) of their distributions, each (batch, num_tokens). All
        probabilities of a sample are NaN if a feature or a logit of it is not finite: `check_finite` reads them on the
        host, where they go anyway.
    """
    first, end = token_range
    token_ids: list[torch.Tensor] = []
    probabilities, entropies = [], []
    for _ in range(num_tokens):
        logits = steps.step(token_ids[-1]) if token_ids else steps.prefill()
        finite = finite.to(logits.device) & logits.isfinite().all(dim=-1, keepdim=True)
        # Zeros instead of NaN, for which sampling on a GPU aborts the process.
        chosen, probability, entropy = choose_token(logits[:, first:end].masked_fill(~finite, 0.0), sampling)
        token_ids.append(chosen + first)
        probabilities.append(probability)
        entropies.append(entropy)
    marked = torch.cat(probabilities, dim=1).masked_fill(~finite, torch.nan)
    return torch.cat(token_ids, dim=1), marked, torch.cat(entropies, dim=1)


def choose_token(logits: torch.Tensor, sampling: Sampling | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the chosen token, its probability and the entropy (nats) of the distribution, each (batch, 1).

    Args:
        logits: (batch, number of tokens) float32, finite.
        sampling: None for the most probable token.
    """
    if sampling is not None:
        # Differences to the largest logit: no temperature makes them overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
        if sampling.top_k is not None:
            least = logits.topk(min(int(sampling.top_k), logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if sampling.top_p is not None:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
            logits = logits.masked_fill(
                (before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf
            )
    log_probabilities = logits.log_softmax(dim=-1)
    distribution = log_probabilities.exp()
    if sampling is None:
        chosen = logits.argmax(dim=-1, keepdim=True)
    else:
        chosen = torch.multinomial(distribution, num_samples=1, generator=sampling.generator)
    # 0 * -inf is 0 here: a token that cannot come adds nothing to the entropy.
    entropy = -(distribution * log_probabilities.clamp(min=-1e4)).sum(dim=-1, keepdim=True)
    return chosen, distribution.gather(1, chosen), entropy


def check_finite(probabilities: np.ndarray, dtype: torch.dtype) -> None:
    """Raise a `ValueError` if the model computed NaN or infinity: a NaN among `probabilities` (batch, tokens)."""
    broken = np.flatnonzero(~np.isfinite(probabilities).all(axis=1)).tolist()
    if broken:
        cause = "the weights are damaged (a diverged training, a broken download)"
        if dtype == torch.float16:
            cause = f"float16 overflowed (load the model with dtype=torch.bfloat16 or float32), or {cause}"
        raise ValueError(
            f"The model computed NaN or infinite values for sample {', '.join(map(str, broken))} of "
            f"{len(probabilities)}, so there is no action: {cause}."
        )


__all__ = ["EagerSteps", "Prefix", "Steps", "check_finite", "choose_token", "decode_tokens"]
