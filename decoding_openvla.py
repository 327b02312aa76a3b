"""Token decoding: functions over one step object, which computes the next logits however it likes.

Greedy decoding reads one token after the other. With a draft, guesses of the tokens to come, several are read in one
pass, and what the model would have chosen itself says which of them were right (speculative decoding, without a draft
model): the tokens are those of greedy decoding.

Shapes: `batch` samples, `length` tokens and patches of a prompt, `hidden` width of the language model, `tokens` those
that may be chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from .outputs_openvla import CACHE
from .sampling_openvla import Sampling
from .stages_openvla import stage


@dataclass
class Prefix:
    """What the language model reads before it acts: prompts with their image patches.

    inputs_embeds: (batch, length, hidden), rows padded on the left.
    attention_mask: (batch, length), 0 marks padding; None without any, which is also the fastest attention.
    finite: (batch, 1) bool, False for a sample with a feature that is NaN or infinite.
    pads_right: Rows are padded on the right instead: for `LlamaSteps`.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    finite: torch.Tensor
    pads_right: bool = False


@dataclass
class Decoded:
    """Tokens of an answer, (batch, num_tokens) each.

    token_ids: int64.
    probabilities: Of these tokens, float32; all of a sample are NaN if a feature or a logit of it is not finite, for
        `check_finite`, which reads them on the host, where they go anyway.
    entropies: Of their distributions, in nats, float32.
    passes: In which pass of the language model each was decided, from 1.
    distributions: (batch, num_tokens, tokens) float32 probabilities of all tokens that could have been chosen.
    """

    token_ids: torch.Tensor
    probabilities: torch.Tensor
    entropies: torch.Tensor
    passes: torch.Tensor
    distributions: torch.Tensor


class Steps:
    """Logits of the tokens that may be chosen, (batch, n, tokens) float32. Nothing leaves the device.

    Attributes:
        verifies: Whether it reads several tokens in one pass, and reads again from an earlier place on.
    """

    verifies = False

    def prefill(self, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Read the prompts, and after them tokens (batch, n - 1): logits of the first n tokens."""
        raise NotImplementedError

    def step(self, token_ids: torch.Tensor, begin: int) -> torch.Tensor:
        """Read tokens (batch, n), the first of which is number `begin` of the answer: logits of the token after each.
        What was read at these places and behind them before is forgotten."""
        raise NotImplementedError

    def answer(self, num_tokens: int, first: int) -> torch.Tensor:
        """Greedy decoding: logits (batch, num_tokens, tokens) of an answer whose tokens are the most probable ones.

        Args:
            first: Id of the first token that may be chosen.
        """
        with stage("prefill"):
            logits = [self.prefill()]
        while len(logits) < num_tokens:
            with stage("decode"):
                logits.append(self.step(logits[-1].argmax(dim=-1) + first, len(logits) - 1))
        return torch.cat(logits, dim=1)


class EagerSteps(Steps):
    """Steps of a language model of the library, any of them, with a cache that grows.

    Args:
        num_tokens: How many will be decoded.
        token_range: First id that may be chosen, and the end of those.
    """

    def __init__(self, language_model: Any, prefix: Prefix, num_tokens: int, token_range: tuple[int, int | None]):
        self.language_model, self.prefix, self.token_range = language_model, prefix, token_range
        self.cache = DynamicCache(config=language_model.config)
        self.begin, self.stop = 0, prefix.inputs_embeds.shape[1]  # positions of the tokens that come next
        self.attention_mask = self.position_ids = None
        if prefix.attention_mask is not None:
            self.attention_mask = nn.functional.pad(prefix.attention_mask, (0, num_tokens), value=1)
            self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def prefill(self, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        assert token_ids is None  # it verifies nothing
        return self._logits(inputs_embeds=self.prefix.inputs_embeds)

    def step(self, token_ids: torch.Tensor, begin: int) -> torch.Tensor:
        return self._logits(input_ids=token_ids)

    def _logits(self, **tokens: torch.Tensor) -> torch.Tensor:
        logits = self.language_model(
            **tokens,
            attention_mask=None if self.attention_mask is None else self.attention_mask[:, : self.stop],
            position_ids=None if self.position_ids is None else self.position_ids[:, self.begin : self.stop],
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1:]
        self.begin, self.stop = self.stop, self.stop + 1
        first, end = self.token_range
        check_rows(logits.shape[-1], end)
        return logits[..., first:end].float()


def check_rows(rows: int, end: int | None) -> None:
    """Raise a `ValueError` if an output layer with so many rows lacks some of the tokens before `end`."""
    if end is not None and rows < end:
        raise ValueError(
            f"The output layer of the language model (lm_head) has {rows} rows, and action tokens end at {end}: give "
            "set_output_embeddings one with a row for every token."
        )


def decode_tokens(
    steps: Steps,
    finite: torch.Tensor,
    num_tokens: int,
    first: int,
    sampling: Sampling | None = None,
    draft: Sequence[Sequence[int]] | None = None,
) -> Decoded:
    """Exactly `num_tokens` tokens. Nothing leaves the device; with a draft the tokens of a pass do, once a pass.

    Args:
        finite: (batch, 1) of the `Prefix`.
        first: Id of the first token that may be chosen.
        sampling: None for the most probable token.
        draft: (batch, num_tokens - 1) guesses of the first tokens, any ids that the model knows. Right ones save
            passes; no guess changes a token. Without `sampling`, and for steps that verify.
    """
    if sampling is not None:
        return _sample(steps, finite, num_tokens, first, sampling)
    if draft is None:
        logits = steps.answer(num_tokens, first)
        passes = torch.arange(1, num_tokens + 1, device=logits.device).expand(len(logits), -1)
    else:
        logits, passes = _verify(steps, num_tokens, first, draft, finite.device)
    finite = finite.to(logits.device) & are_finite(logits)
    chosen, probabilities, entropies, distributions = choose_token(logits, None)
    probabilities = probabilities[..., 0].masked_fill(~finite, torch.nan)
    return Decoded(chosen[..., 0] + first, probabilities, entropies[..., 0], passes, distributions)


def are_finite(values: torch.Tensor) -> torch.Tensor:
    """(batch, ...) -> (batch, 1) bool: whether no value of a sample is NaN or infinite, which stay in a maximum."""
    return values.flatten(1).abs().amax(dim=1, keepdim=True) < torch.inf


def _verify(
    steps: Steps, num_tokens: int, first: int, draft: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens, several a pass: logits (batch, num_tokens, tokens) and passes (batch, num_tokens).

    A pass reads all that is not certain yet, of every row from the same place on. What the model chooses behind tokens
    that are certain is certain as well, and so on up to the first guess that it would not have chosen. What it chose
    behind that one are the guesses of the next pass: it saw the image, if after another token (Jacobi decoding, arXiv
    2305.10427; 2.5 passes of 7 in closed loop, 3.0 where the rest of the draft is tried again). A row that is ahead of
    others reads what it knows again, and keeps it.
    """
    rows = [[*row, -1] for row in draft]  # the last token is chosen and never read
    passes = [[0] * num_tokens for _ in rows]
    known = [0] * len(rows)  # how many tokens of each row are certain
    with stage("prefill"):
        logits = rest = steps.prefill(_ids(draft, device))
    begin = count = 0
    while True:
        count += 1
        if max(known) > begin:
            kept = [[place < ends for place in range(begin, num_tokens)] for ends in known]
            rest = torch.where(_ids(kept, device)[..., None] > 0, logits[:, begin:], rest)
        logits = torch.cat([logits[:, :begin], rest], dim=1) if begin else rest
        found = rest.argmax(dim=-1).tolist()  # the one time that a pass waits for the device
        for number, (row, places) in enumerate(zip(rows, found)):
            chosen, place, right = [token + first for token in places], known[number], True
            while right and place < num_tokens:
                right = row[place] == chosen[place - begin]
                passes[number][place] = count
                place += 1
            known[number], row[begin:] = place, chosen
        begin = min(known)
        if begin == num_tokens:
            return logits, _ids(passes, device)
        with stage("decode"):
            rest = steps.step(_ids([row[begin - 1 : -1] for row in rows], device), begin - 1)


def _ids(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Whole numbers on a device, which is not waited for."""
    return torch.tensor(rows, dtype=torch.long, device="cpu").to(device, non_blocking=True)


def _sample(steps: Steps, finite: torch.Tensor, num_tokens: int, first: int, sampling: Sampling) -> Decoded:
    token_ids: list[torch.Tensor] = []
    probabilities, entropies, distributions = [], [], []
    for number in range(num_tokens):
        with stage("decode" if number else "prefill"):
            logits = (steps.step(token_ids[-1], number - 1) if number else steps.prefill())[:, 0]
        finite = finite.to(logits.device) & logits.isfinite().all(dim=-1, keepdim=True)
        # Zeros instead of NaN, for which sampling on a GPU aborts the process.
        chosen, probability, entropy, distribution = choose_token(logits.masked_fill(~finite, 0.0), sampling)
        token_ids.append(chosen + first)
        probabilities.append(probability)
        entropies.append(entropy)
        distributions.append(distribution)
    passes = torch.arange(1, num_tokens + 1, device=finite.device).expand(len(finite), -1)
    marked = torch.cat(probabilities, dim=1).masked_fill(~finite, torch.nan)
    found = (torch.cat(token_ids, dim=1), marked, torch.cat(entropies, dim=1), passes)
    return Decoded(*found, torch.stack(distributions, dim=1))


def choose_token(
    logits: torch.Tensor, sampling: Sampling | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the chosen token, its probability and the entropy (nats) of the distribution, each (..., 1); and the
    distribution, (..., tokens).

    Args:
        logits: (..., tokens) float32, finite; (batch, tokens) for sampling.
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
    return chosen, distribution.gather(-1, chosen), entropy, distribution


def check_finite(probabilities: np.ndarray, model: Any) -> None:
    """Raise a `ValueError` if the model computed NaN or infinity: a NaN among `probabilities` (batch, tokens)."""
    finite = np.isfinite(probabilities)
    if not finite.all():
        broken = np.flatnonzero(~finite.all(axis=1)).tolist()
        cause = "the weights are damaged (a diverged training, a broken download)"
        if model.get_input_embeddings().weight.dtype == torch.float16:
            cause = f"float16 overflowed (load the model with dtype=torch.bfloat16 or float32), or {cause}"
        raise ValueError(
            f"The model computed NaN or infinite values for sample {', '.join(map(str, broken))} of "
            f"{len(probabilities)}, so there is no action: {cause}."
        )


__all__ = [
    "Decoded",
    "EagerSteps",
    "Prefix",
    "Steps",
    "are_finite",
    "check_finite",
    "check_rows",
    "choose_token",
    "decode_tokens",
]
