"""The head of OpenVLA: each number of an action is one token of the language model, and they follow one another.

What a head is, see `action_heads_openvla`. Shapes: `batch` samples, `length` prompt tokens, K `action_chunk`, A
`action_dim`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from .action_tokenizer import ActionTokenizer
from .configuration_openvla import OpenVLAConfig
from .decoding_openvla import check_finite, decode_tokens
from .graphs_openvla import open_prediction, without_graphs
from .inputs_openvla import ModelInputs
from .outputs_openvla import ActionPrediction
from .patches_openvla import IGNORE_INDEX
from .sampling_openvla import Choice


@dataclass
class Comparison:
    """Actions of a training batch as predicted and as recorded, normalized, (batch, K, A) each.

    correct: Of actions that are tokens, whether the right one was the most probable; None of others.
    decided: (batch, K) bool, steps that were given and not learned; None: no step.
    """

    predicted: torch.Tensor
    wanted: torch.Tensor
    correct: torch.Tensor | None = None
    decided: torch.Tensor | None = None


class TokenHead:
    """Each number of an action is one token; those of a chunk follow one another, step by step (arXiv 2406.09246).

    Attributes:
        parallel: Whether all answers come out of one pass, `model(..., first_action=...)`.
        one_pass: Whether predictions are one pass over the sequence of `open_sequence`, of which graphs can be made.
        takes_drafts: Whether tokens are decoded one after the other, so that guesses of them save passes.
        wants_actions: Whether `loss` needs the normalized `actions` (batch, K, A) of the collator.
        wants_executed: The same of `executed`, what the robot did where it differs.
        margin: Of `unnormalize_actions`.
    """

    parallel = one_pass = False
    takes_drafts = True
    wants_actions = False
    wants_executed = False
    margin = 0.0

    def __init__(self, tokenizer: ActionTokenizer, config: OpenVLAConfig | None = None):
        self.tokenizer = tokenizer

    # Training ---------------------------------------------------------------------------------------------------------

    def num_targets(self, shape: tuple[int, int]) -> int:
        """Tokens that follow a prompt in training: K * A, and the end of the sequence."""
        return self.num_tokens(shape) + 1

    def targets(self, actions: np.ndarray, end_token_id: int) -> list[int]:
        """What follows a prompt in training, and is learned.

        Args:
            actions: (K, A), or (A,) of one step, normalized to [-1, 1].
            end_token_id: That ends a sequence.
        """
        return [*self.tokenizer.encode(np.asarray(actions)).reshape(-1).tolist(), end_token_id]

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `logits_to_keep`: how many positions at its end see every label predicted.

        All others, image patches first of all, would cost memory of the size of the vocabulary each. Reads labels:
        before they are on a device.
        """
        first = int((batch["labels"] != IGNORE_INDEX).any(dim=0).int().argmax())
        return {**batch, "logits_to_keep": batch["labels"].shape[1] - first + 1}

    def draw(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A training batch with what decides how much is learned of it, where that is drawn."""
        return batch

    def num_learned(self, batch: dict[str, Any]) -> int:
        """How many terms the `loss` of a batch is the mean of: batches of one update, or one evaluation, count by it.
        Reads values, as `prepare`."""
        return int((learned_labels(batch["labels"], batch.get("action_is_pad")) != IGNORE_INDEX).sum())

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean cross entropy over the labels, as `model(**batch).loss`, but those of steps that are padding
        (`action_is_pad`).

        Args:
            batch: Of `ActionCollator`, after `prepare`.

        Returns:
            The loss, and for `compare` the logits kept (batch, kept, vocab_size) and the labels of these positions
            (batch, kept): the logits at position i predict label i + 1.
        """
        labels = batch["labels"][:, -batch["logits_to_keep"] :]
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "action_is_pad")}
        logits = model(**inputs, use_cache=False).logits.float()
        learned = learned_labels(labels, batch.get("action_is_pad"))
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), learned[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        return loss, {"logits": logits, "labels": labels}

    def compare(self, logits: torch.Tensor, labels: torch.Tensor, shape: tuple[int, int]) -> Comparison:
        """Actions as predicted with the tokens before them given (teacher forcing), and as recorded.

        Args:
            logits, labels: Of `loss`; every row holds its K * A action tokens in a row.
        """
        predicted, wanted = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
        first = (wanted != IGNORE_INDEX).int().argmax(dim=1, keepdim=True)
        index = first + torch.arange(self.num_tokens(shape), device=first.device)
        predicted, wanted = (tokens.gather(1, index).unflatten(1, shape) for tokens in (predicted, wanted))
        return Comparison(self.tokenizer.decode(predicted), self.tokenizer.decode(wanted), predicted == wanted)

    # Prediction -------------------------------------------------------------------------------------------------------

    def num_tokens(self, shape: tuple[int, int]) -> int:
        """Positions that actions take after a prompt."""
        return shape[0] * shape[1]

    def committed_tokens(self, inputs: ModelInputs) -> np.ndarray:
        """(batch, n * A) tokens of the actions that are decided already; (batch, 0) without any."""
        if inputs.committed is None:
            return np.zeros((len(inputs.prompts), 0), dtype=np.int64)
        # Two tokens are decoded to the last bin center; that of 1.0 is the one of most recorded actions there.
        last = self.tokenizer.bin_centers[-1]
        actions = np.where(inputs.committed >= last - 1e-6, 1.0, inputs.committed)
        return np.asarray(self.tokenizer.encode(actions)).reshape(len(inputs.prompts), -1)

    def actions(self, model: Any, inputs: ModelInputs, shape: tuple[int, int], choice: Choice) -> ActionPrediction:
        """Normalized actions with what is known of their tokens, all (batch, K, A); see `ActionPrediction`.

        Args:
            model: An `OpenVLAForActionPrediction`.

        Raises:
            ValueError: If a prompt is empty or too long, or the model computed something that is not finite.
        """
        decided, num_tokens = self.committed_tokens(inputs), self.num_tokens(shape)
        count = num_tokens - decided.shape[1]
        token_range = self.tokenizer.token_range if choice.constrained else (0, None)
        with open_prediction(model, inputs, num_tokens, decided.tolist() if decided.size else (), token_range) as (
            steps,
            finite,
        ):
            guesses = None
            if choice.draft is not None and steps.verifies:
                guesses = self.guesses(choice.draft, decided.shape[1], count)
            decoded = decode_tokens(steps, finite, count, token_range[0], choice.sampling, guesses)
            chosen = (decoded.token_ids, decoded.probabilities, decoded.entropies, decoded.passes)
            return self.prediction(
                decided, chosen, shape, model, decoded.distributions if choice.distributions else None
            )

    def difference_of_graphs(
        self, model: Any, inputs: ModelInputs, shape: tuple[int, int], tolerance: float
    ) -> str | None:
        """What differs between predictions from graphs and without, None if nothing does: by more than a share
        `tolerance` of the probability, or than kernels for other numbers of rows differ. Without a draft, with a right
        one and with a wrong one, which need different graphs.

        Raises:
            ValueError: If the model computes something that is not finite.
        """

        def predict(draft: list[list[int]] | None) -> tuple[np.ndarray, np.ndarray]:
            found: Any = self.actions(model, inputs, shape, Choice(draft=draft, distributions=True))
            tokens = found.token_ids.reshape(len(found.token_ids), -1)
            return tokens, found.token_distributions.reshape(*tokens.shape, -1)

        with without_graphs():
            expected = predict(None)
            drafted = predict(expected[0].tolist())
        rounding = max(tolerance, 4 * moved(drafted, expected))
        first, end = self.tokenizer.token_range
        wrong = np.where(expected[0] == first, end - 1, first)
        for draft in (None, expected[0].tolist(), wrong.tolist()):
            if (share := moved(predict(draft), expected)) > rounding:
                return f"{share:.0%} of the probability went to other tokens"
        return None

    def guesses(self, draft: list[list[int]], decided: int, count: int) -> list[list[int]]:
        """(batch, count - 1) of a draft of the complete chunk, of which `decided` tokens are known. What it does not
        say is guessed to be the middle of its range: 2.8 passes of 7 in closed loop by that alone (docs/LOG.md)."""
        rows = [row[decided : decided + count - 1] for row in draft]
        if all(len(row) == count - 1 for row in rows):
            return rows
        middle = int(self.tokenizer.encode(np.zeros(1))[0])
        return [[*row, *[middle] * (count - 1 - len(row))] for row in rows]

    def prediction(
        self,
        decided: np.ndarray,
        chosen: Sequence[torch.Tensor],
        shape: tuple[int, int],
        model: Any,
        distributions: torch.Tensor | None = None,
    ) -> ActionPrediction:
        """From tokens to normalized actions.

        Args:
            decided: (batch, n * A) tokens that were given, of probability 1.
            chosen: Tokens after them, their probabilities, entropies and passes, (batch, K * A - n * A) each;
                probabilities are NaN where the model computed something that is not finite.
            model: That computed them.
            distributions: (batch, K * A - n * A, tokens) that the tokens were chosen from, where they are asked for.
        """
        # One transfer for all of them: float32 holds every token id.
        found = torch.stack([values.float() for values in chosen]).cpu().numpy()
        check_finite(found[1], model)
        if decided.size:
            before = np.zeros((len(found), *decided.shape), np.float32)
            before[0], before[1] = decided, 1.0  # certain: no entropy, and no pass was needed
            found = np.concatenate([before, found], axis=2)
        token_ids, probabilities, entropies, passes = found.reshape(len(found), -1, *shape)
        token_ids, known = token_ids.astype(np.int64), {}
        if distributions is not None:
            given = np.zeros((*decided.shape, distributions.shape[-1]), np.float32)
            first = 0 if given.shape[-1] > self.tokenizer.n_bins else self.tokenizer.token_range[0]
            np.put_along_axis(given, decided[..., None] - first, 1.0, axis=-1)
            both = np.concatenate([given, distributions.cpu().numpy()], axis=1)
            known["token_distributions"] = both.reshape(-1, *shape, both.shape[-1])
        return ActionPrediction(
            normalized_actions=self.tokenizer.decode(token_ids),
            token_ids=token_ids,
            token_probabilities=probabilities,
            token_entropies=entropies,
            token_passes=passes.astype(np.int64),
            **known,
        )


def moved(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> float:
    """The largest share of probability that went to other tokens, of tokens (batch, n) with distributions (batch, n,
    tokens), where all tokens before are the same."""
    same = (found[0] == expected[0]).cumprod(axis=1)
    told = np.concatenate([np.ones_like(same[:, :1]), same[:, :-1]], axis=1).astype(bool)
    return float(np.abs(found[1] - expected[1]).sum(axis=-1)[told].max() / 2)


def learned_labels(labels: torch.Tensor, is_pad: torch.Tensor | None) -> torch.Tensor:
    """Labels without those of steps that are not recorded. After them come only such steps and the end, so that no
    action that is learned sees them.

    Args:
        labels: (batch, length); each row holds its K * A action tokens and the end, one after the other.
        is_pad: (batch, K) bool; None: all are recorded.
    """
    if is_pad is None:
        return labels
    answer = labels != IGNORE_INDEX
    place, chunk = answer.cumsum(dim=1) - 1, is_pad.shape[1]
    action_dim = (answer.sum(dim=1, keepdim=True) - 1) // chunk
    step = place.clamp(min=0) // action_dim
    left_out = is_pad.gather(1, step.clamp(max=chunk - 1)) & (step < chunk)  # the end is learned
    return labels.masked_fill(left_out, IGNORE_INDEX)


__all__ = ["Comparison", "TokenHead", "learned_labels", "moved"]
