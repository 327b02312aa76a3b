"""The loss of fine-tuning."""

from typing import Any

import torch
from torch.nn import functional

from ..data.collate import IGNORE_INDEX


def with_logits_to_keep(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `logits_to_keep`: how many positions at its end see every label predicted.

    All others, image patches first of all, would cost memory of the size of the vocabulary each.
    """
    first = int((batch["labels"] != IGNORE_INDEX).any(dim=0).int().argmax())
    return {**batch, "logits_to_keep": batch["labels"].shape[1] - first + 1}


def action_loss(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross entropy over the labels, as `model(**batch).loss`.

    Args:
        batch: Of `ActionCollator`, with `logits_to_keep`.

    Returns:
        The loss, the logits kept (N, kept, vocab_size), and the labels of these positions (N, kept): the logits at
        position i predict label i + 1.
    """
    kept = batch["logits_to_keep"]
    labels = batch["labels"][:, -kept:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    return loss, logits, labels
