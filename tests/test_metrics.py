"""Metrics of predicted actions, against the obvious computation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvla import ActionTokenizer
from openvla.action_heads_openvla import Comparison, TokenHead
from openvla.training.metrics import ActionMetrics
from openvla.training.trainer import ActionTrainer


class Pairs:
    def __getitem__(self, key):
        return float(key[1])


TOKENIZER = ActionTokenizer(1000)


def batch(wanted: np.ndarray, predicted: np.ndarray, before: list[int]):
    """Labels and logits of rows whose actions begin after `before` ignored positions."""
    rows, dims = wanted.shape
    length = max(before) + dims + 1
    labels = torch.full((rows, length), -100)
    logits = torch.zeros(rows, length, 1000)
    for row, start in enumerate(before):
        labels[row, start : start + dims] = torch.from_numpy(TOKENIZER.encode(wanted[row]))
        labels[row, start + dims] = 2
        logits[row, torch.arange(start - 1, start + dims - 1), torch.from_numpy(TOKENIZER.encode(predicted[row]))] = 9.0
    return logits, labels


def test_means_over_batches_of_unlike_size():
    rng = np.random.default_rng(0)
    metrics, head = ActionMetrics(3), TokenHead(TOKENIZER)
    distances, equal, losses = [], [], []
    for rows, loss in ((2, 1.0), (5, 3.0)):
        wanted = rng.uniform(-1, 1, (rows, 3))
        predicted = np.where(rng.random((rows, 3)) < 0.5, wanted, rng.uniform(-1, 1, (rows, 3)))
        logits, labels = batch(wanted, predicted, [1 + row for row in range(rows)])
        actions = head.compare(logits, labels, (1, 3))
        metrics.update(torch.tensor(loss), actions, torch.tensor([[2.0, 1.0, 0.5]]).expand(rows, 3))
        tokens = TOKENIZER.encode(wanted), TOKENIZER.encode(predicted)
        distances.append(abs(TOKENIZER.decode(tokens[0]) - TOKENIZER.decode(tokens[1])))
        equal.append(tokens[0] == tokens[1])
        losses += [loss] * rows
    found = metrics.compute(["x", "y", "gripper"])
    distance = np.concatenate(distances)
    assert found["loss"] == pytest.approx(np.mean(losses))
    assert found["action_accuracy"] == pytest.approx(np.concatenate(equal).mean())
    assert found["action_l1"] == pytest.approx(distance.mean())
    assert found["l1/x"] == pytest.approx(2 * distance[:, 0].mean())
    assert found["l1/gripper"] == pytest.approx(0.5 * distance[:, 2].mean())
    assert found["l1_normalized/y"] == pytest.approx(distance[:, 1].mean())
    assert metrics.compute() == {}  # begun again


def test_first_steps_of_chunks_and_those_after_them():
    """Steps that are no record count in neither."""
    wanted = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 9.0]])[..., None].expand(2, 3, 2)
    is_pad = torch.tensor([[False, False, True], [False, True, True]])
    metrics, scale = ActionMetrics(2), torch.ones(2, 2)
    metrics.update(torch.tensor(1.0), Comparison(predicted, wanted), scale)
    found = metrics.compute()
    assert (found["action_l1_current"], found["action_l1_next"]) == (3.0, (2 + 3 + 7 + 9) / 4)
    metrics.update(torch.tensor(1.0), Comparison(predicted, wanted), scale, is_pad)
    found = metrics.compute()
    assert (found["action_l1_current"], found["action_l1_next"]) == (3.0, 2.0)
    metrics.update(torch.tensor(1.0), Comparison(predicted, wanted), scale, torch.tensor([[False, True, True]] * 2))
    assert "action_l1_next" not in metrics.compute()
    metrics.update(torch.tensor(1.0), Comparison(predicted[:, :1], wanted[:, :1]), scale)
    assert not {"action_l1_current", "action_l1_next"} & metrics.compute().keys()


def test_rows_that_were_decided_count_in_no_mean():
    """With given steps at the end of an episode: 0 was counted for them, and the L1 of the log was too small."""
    wanted, decided = torch.zeros(2, 3, 1), torch.tensor([[True, True, False], [False, False, False]])
    is_pad = torch.tensor([[False, False, True], [False, False, False]])
    metrics = ActionMetrics(1)
    metrics.update(
        torch.tensor(4.0), Comparison(wanted + 0.5, wanted, decided=decided), torch.full((2, 1), 2.0), is_pad
    )
    found = metrics.compute(["x"])
    assert (found["loss"], found["action_l1"], found["l1/x"], found["l1_normalized/x"]) == (4.0, 0.5, 1.0, 0.5)


def test_every_held_out_frame_counts_once_whatever_the_ranks():
    """Up to ranks - 1 of them were left out, and where there were fewer than ranks one counted for each."""
    scale = torch.ones(1, 1)
    for frames, ranks, size in ((5, 2, 2), (7, 3, 4), (1, 3, 2), (6, 3, 1), (4, 1, 3)):
        sums, turns = torch.zeros(1), set()
        for rank in range(ranks):
            args = SimpleNamespace(process_index=rank, world_size=ranks, per_device_eval_batch_size=size)
            trainer = SimpleNamespace(
                args=args,
                held_out=[*range(1, frames + 1)],
                eval_samples=Pairs(),
                batches=lambda found: {"found": found},
            )
            batches = [*ActionTrainer._held_out_batches(trainer)]
            turns.add(len(batches))
            metrics = ActionMetrics(1)
            for batch in batches:
                found = torch.tensor(batch["found"])[:, None, None]
                actions = Comparison(found, torch.zeros_like(found))
                metrics.update(found.mean(), actions, scale.expand(len(found), 1), counts=batch.get("counts", True))
            sums = sums + metrics._sums[:4]
        assert len(turns) == 1
        assert sums.tolist() == [frames, frames * (frames + 1) / 2, frames, 0], (frames, ranks)
