"""How well actions are predicted: loss, token accuracy, L1 in [-1, 1] and in the units of the dataset."""

from collections.abc import Sequence

import torch

from ..action_text import action_names
from ..action_tokenizer import ActionTokenizer
from ..data.collate import IGNORE_INDEX


class ActionMetrics:
    """Sums over batches, kept on the device of the logits so that nothing waits for them until `compute`.

    Args:
        tokenizer: Says which tokens are actions and what they mean.
        action_dim: Numbers of one action, A.
    """

    def __init__(self, tokenizer: ActionTokenizer, action_dim: int):
        self.tokenizer, self.action_dim = tokenizer, action_dim
        self._sums: torch.Tensor | None = None

    def update(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> None:
        """Add a batch.

        Args:
            loss: () mean of the batch.
            logits: (N, length, vocab_size) of the text, aligned with `labels`: position i predicts label i + 1.
            labels: (N, length), -100 where nothing is wanted; every row holds its A action tokens in a row.
            scale: (N, A) units of the dataset in one unit of normalized action.
        """
        predicted, wanted = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
        first = (wanted != IGNORE_INDEX).int().argmax(dim=1, keepdim=True)
        index = first + torch.arange(self.action_dim, device=first.device)
        predicted, wanted = predicted.gather(1, index), wanted.gather(1, index)
        distance = (self.tokenizer.decode(predicted) - self.tokenizer.decode(wanted)).abs().to(torch.float64)
        rows = torch.ones((), dtype=torch.float64, device=loss.device) * len(labels)
        new = torch.cat(
            [
                torch.stack([rows, loss.detach().to(torch.float64) * rows]),
                (predicted == wanted).to(torch.float64).sum(0),
                distance.sum(0),
                (distance * scale).sum(0),
            ]
        )
        self._sums = new if self._sums is None else self._sums + new

    def compute(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """Means over the batches of all processes since the last call, and start anew.

        Returns:
            `loss`, `action_accuracy` and `action_l1` (normalized) over all dimensions, `l1/x`... in the units of the
            dataset, `l1_normalized/x`... in [0, 2]. Empty where nothing was added.
        """
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if sums is not None:
                torch.distributed.all_reduce(sums)
        if sums is None:
            return {}
        values = (sums[1:] / sums[0]).tolist()
        loss, (correct, distance, units) = (
            values[0],
            (values[1 + part * self.action_dim : 1 + (part + 1) * self.action_dim] for part in range(3)),
        )
        names = names or action_names(self.action_dim)
        return {
            "loss": loss,
            "action_accuracy": sum(correct) / self.action_dim,
            "action_l1": sum(distance) / self.action_dim,
            **{f"l1/{name}": value for name, value in zip(names, units)},
            **{f"l1_normalized/{name}": value for name, value in zip(names, distance)},
        }
