"""Greedy decoding of action tokens over one graph: a draft is read together with the prompt, and kept as far as it is
what the model chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .action_tokenizer import ActionTokenizer
from .sessions import Session


@dataclass
class Decoded:
    """Tokens of an action, (num_tokens,) each.

    finite: Whether all logits were.
    passes: Runs of the graph.
    """

    token_ids: np.ndarray
    probabilities: np.ndarray
    entropies: np.ndarray
    finite: bool
    passes: int


class LanguageModel:
    """The language model of an export, see `LanguageModelGraph` of `openvla.conversion` for what goes in and out."""

    def __init__(self, session: Session):
        self._session = session
        self._empty = {
            name: np.zeros([size or 0 for size in shape], kind)
            for name, (shape, kind) in session.inputs.items()
            if name.startswith("past.")
        }
        shape, kind = session.inputs["features"]
        self._no_features = np.zeros((1, 0, shape[-1] or 0), kind)

    def decode(
        self,
        prompt: Sequence[int],
        features: np.ndarray,
        num_tokens: int,
        tokenizer: ActionTokenizer,
        draft: Sequence[int] = (),
    ) -> Decoded:
        """The most probable tokens, one after the other; with a draft in fewer passes, and the same.

        After a token that the draft had otherwise, those that the model chose behind the wrong one are tried next: it
        saw the image (Jacobi decoding, arXiv 2305.10427).

        Args:
            prompt: Token ids, without patches.
            features: (1, num_patches, hidden).
            draft: As many tokens as will be chosen, or none.

        Raises:
            ValueError: If the graph has other action tokens than `tokenizer`.
        """
        first = tokenizer.token_range[0]
        chosen: list[int] = []
        found: list[np.ndarray] = []  # logits of each
        cache, seen, passes = self._empty, np.zeros(0, bool), 0  # `seen`: which positions of the cache are right
        tokens, images, guesses = list(prompt), features, list(draft)
        while len(chosen) < num_tokens:
            tried, right = guesses[: num_tokens - 1 - len(chosen)], 0
            logits, cache = self._run([*tokens, *tried], images, cache, seen, len(tried) + 1)
            if logits.shape[1] != tokenizer.n_bins:  # others would stand for other numbers
                raise ValueError(
                    f"The graph of the language model chooses among {logits.shape[1]} action tokens, and runtime.json "
                    f"tells of {tokenizer.n_bins} (n_action_bins): export the model again."
                )
            best = [int(row.argmax()) + first for row in logits]
            for row, token, guess in zip(logits, best, [*tried, None], strict=True):
                chosen.append(token)
                found.append(row)
                if token != guess:
                    break
                right += 1
            read = len(tokens) + images.shape[1] + right
            seen = np.concatenate([seen, np.ones(read, bool), np.zeros(len(tried) - right, bool)])
            tokens, images, guesses, passes = chosen[-1:], self._no_features, best[right + 1 :], passes + 1
        return _decoded(np.array(chosen, np.int64), np.stack(found), first, passes)

    def _run(
        self, tokens: list[int], images: np.ndarray, cache: dict[str, np.ndarray], seen: np.ndarray, rows: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits of the last `rows` positions, (rows, n_action_bins) float32, and the cache with the new ones."""
        new, old, start = len(tokens) + images.shape[1], len(seen), int(seen.sum())
        mask = np.concatenate([np.broadcast_to(seen, (new, old)), np.tri(new, dtype=bool)], axis=1)
        given = {
            "input_ids": np.array([tokens], np.int64),
            "features": images,
            "position_ids": np.arange(start, start + new)[None],
            "attention_mask": mask[None, None],
            "rows": np.arange(new - rows, new),
            **cache,
        }
        found = self._session.run(given)
        kept = {name: found[name.replace("past.", "present.", 1)] for name in self._empty}
        return found["logits"][0], kept


def _decoded(token_ids: np.ndarray, logits: np.ndarray, first: int, passes: int) -> Decoded:
    """With probability of each token and entropy (nats) of its distribution; `logits` (num_tokens, n_action_bins)."""
    finite = bool(np.isfinite(logits).all())
    logits = logits if finite else np.zeros_like(logits)
    differences = logits - logits.max(axis=1, keepdims=True)
    logarithms = differences - np.log(np.exp(differences).sum(axis=1, keepdims=True))
    distribution = np.exp(logarithms)
    probabilities = distribution[np.arange(len(token_ids)), token_ids - first]
    return Decoded(token_ids, probabilities, -(distribution * logarithms).sum(axis=1), finite, passes)
