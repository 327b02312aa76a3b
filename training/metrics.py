"""How well actions are predicted: loss, token accuracy, L1 in [-1, 1] and in the units of the dataset."""

from collections.abc import Sequence

import torch

from ..action_heads_openvla import Comparison
from ..action_spec import action_names


class ActionMetrics:
    """Sums over batches, kept on the device of the actions so that nothing waits for them until `compute`.

    Args:
        action_dim: Numbers of one action, A.
    """

    def __init__(self, action_dim: int):
        self.action_dim = action_dim
        self._sums: torch.Tensor | None = None
        self._has_tokens = False
        self._has_chunks = False

    def update(
        self,
        loss: torch.Tensor,
        actions: Comparison,
        scale: torch.Tensor,
        is_pad: torch.Tensor | None = None,
        terms: int | None = None,
        counts: bool = True,
    ) -> None:
        """Add a batch.

        Args:
            loss: () mean of the batch.
            actions: (N, K, A) as predicted and as recorded; the steps of a chunk count alike.
            scale: (N, A) units of the dataset in one unit of normalized action.
            is_pad: (N, K) bool, steps that do not count, beside those that were `decided`. Default: all count.
            terms: What the loss is the mean of, by which it counts beside that of other batches. Default: N.
            counts: Whether the batch counts; one that does not still says that this process takes part.
        """
        left_out = [steps for steps in (is_pad, actions.decided) if steps is not None]
        is_pad = torch.stack(left_out).any(dim=0) if left_out else None
        distance = _mean((actions.predicted - actions.wanted).abs(), is_pad)
        self._has_tokens, self._has_chunks = actions.correct is not None, actions.wanted.shape[1] > 1
        correct = torch.zeros_like(distance) if actions.correct is None else _mean(actions.correct, is_pad)
        rows = torch.full((), len(distance), dtype=torch.float64, device=loss.device)
        weight = rows if terms is None else torch.full_like(rows, terms)
        # Where all that is recorded was decided already, nothing was predicted: such a row is none of the means below.
        predicted = rows if is_pad is None else (~is_pad).any(dim=1).sum().to(rows)
        new = torch.cat(
            [
                torch.stack([weight, loss.detach().to(torch.float64) * weight, predicted]),
                correct.sum(0),
                distance.sum(0),
                (distance * scale).sum(0),
                _now_and_next(actions, is_pad),
            ]
        )
        new = new * counts
        self._sums = new if self._sums is None else self._sums + new

    def compute(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """Means over the batches of all processes since the last call, and start again.

        Returns:
            `loss`, `action_accuracy` (of a head of tokens) and `action_l1` (normalized) over all dimensions, `l1/x`...
            in the units of the dataset, `l1_normalized/x`... in [0, 2]; of chunks also `action_l1_current`, of their
            first step, and `action_l1_next`, of the others that are recorded. Empty where nothing was added.
        """
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if sums is not None:
                torch.distributed.all_reduce(sums)
        if sums is None:
            return {}
        loss = (sums[1] / sums[0].clamp(min=1)).item()
        values = (sums[3:] / sums[2].clamp(min=1)).tolist()
        *_, first, first_share, following, share = values
        correct, distance, units = (values[part * self.action_dim : (part + 1) * self.action_dim] for part in range(3))
        names = names or action_names(self.action_dim)
        return {
            "loss": loss,
            **({"action_accuracy": sum(correct) / self.action_dim} if self._has_tokens else {}),
            "action_l1": sum(distance) / self.action_dim,
            **({"action_l1_current": first / first_share} if self._has_chunks and first_share else {}),
            **({"action_l1_next": following / share} if self._has_chunks and share else {}),
            **{f"l1/{name}": value for name, value in zip(names, units)},
            **{f"l1_normalized/{name}": value for name, value in zip(names, distance)},
        }


def _now_and_next(actions: Comparison, is_pad: torch.Tensor | None) -> torch.Tensor:
    """(4,) float64: sums over the batch of the L1 of first steps that count and how many these are; the same of later
    ones."""
    distance = (actions.predicted - actions.wanted).abs().to(torch.float64).mean(dim=2)
    real = torch.ones_like(distance) if is_pad is None else (~is_pad).to(distance)
    sums, counts = distance * real, real
    return torch.stack([sums[:, 0].sum(), counts[:, 0].sum(), sums[:, 1:].sum(), counts[:, 1:].sum()])


def _mean(values: torch.Tensor, is_pad: torch.Tensor | None) -> torch.Tensor:
    """(N, A) float64, the mean over the steps of (N, K, A) that are no padding."""
    values = values.to(torch.float64)
    if is_pad is None:
        return values.mean(dim=1)
    real = (~is_pad)[..., None].to(torch.float64)
    return (values * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)  # 0 of a row of which nothing counts
