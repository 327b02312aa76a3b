"""Statistics, filters and the collator, against what the original computed."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import FIXTURES, golden_image

from openvla import normalize_actions, unnormalize_actions
from openvla.data import Episode
from openvla.data.collate import ActionCollator
from openvla.data.filters import (
    apply_filters,
    keep_labeled,
    keep_moving,
    keep_nonzero,
    removal_report,
    select_steps,
)
from openvla.data.statistics import collect, compute_statistics, plot_statistics, statistics_table


def episode(actions, instruction="open the drawer", state=None, index=0) -> Episode:
    actions = np.asarray(actions, dtype=np.float32)
    images = {"image": [np.full((4, 4, 3), step, np.uint8) for step in range(len(actions))]}
    return Episode(instruction, actions, images, state, "test", index)


# Statistics


def test_statistics_are_those_of_numpy():
    generator = np.random.default_rng(0)
    parts = [generator.normal(size=(length, 7)).astype(np.float32) for length in (5, 11, 2)]
    stats = compute_statistics(*collect([episode(part, index=index) for index, part in enumerate(parts)]))
    values = np.concatenate(parts)
    for name, expected in {
        "mean": values.mean(0),
        "std": values.std(0),
        "min": values.min(0),
        "max": values.max(0),
    }.items():
        assert stats["action"][name] == expected.tolist()
    for name, q in {"q01": 0.01, "q99": 0.99}.items():
        np.testing.assert_allclose(stats["action"][name], np.quantile(values.astype(float), q, axis=0), rtol=1e-7)
    assert stats["proprio"]["max"] == [0.0] * 7  # no states: zeros of the shape of an action
    assert (stats["num_transitions"], stats["num_trajectories"]) == (18, 3)
    assert stats["action"]["mask"] == [True] * 7
    json.dumps(stats)


def test_a_gripper_in_0_to_1_is_not_scaled():
    actions = np.array([[0.3, -2.0, 1.0], [0.1, 2.0, 0.0]])
    assert compute_statistics([actions])["action"]["mask"] == [True, True, False]
    assert compute_statistics([actions], mask=[True, False, True])["action"]["mask"] == [True, False, True]


def test_a_gripper_that_never_moves_comes_back():
    """Always open in the data: open again after training on zeros, and not closed."""
    actions = np.column_stack([np.linspace(-1, 1, 20), np.ones(20)])
    stats = compute_statistics([actions])["action"]
    normalized = normalize_actions(actions, stats)
    assert (normalized[:, 1] == 0).all()
    assert (unnormalize_actions(normalized, stats)[:, 1] == 1).all()


def test_statistics_errors():
    with pytest.raises(ValueError, match="no episodes"):
        collect([])
    with pytest.raises(ValueError, match="6 dimensions"):
        collect([episode(np.zeros((2, 7))), episode(np.zeros((2, 6)))])
    with pytest.raises(ValueError, match="mask has 2"):
        compute_statistics([np.zeros((2, 7))], mask=[True, True])


def test_states_are_described_too():
    state = np.arange(6, dtype=np.float32).reshape(3, 2)
    stats = compute_statistics(*collect([episode(np.ones((3, 7)), state=state)]))
    assert stats["proprio"]["max"] == [4.0, 5.0]


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the [demo] extra")
    actions = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    actions[:, 1] = 0
    stats = compute_statistics([actions])
    table = statistics_table(stats, ["x", "y", "gripper"])
    assert "never changes" in table.splitlines()[2] and "1 episode, 50 steps" in table
    plot_statistics(actions, stats, tmp_path / "plots" / "actions.png")
    assert (tmp_path / "plots" / "actions.png").stat().st_size > 5000


# Filters


def test_no_ops_of_libero():
    with np.load(FIXTURES / "pipeline" / "libero_is_noop.npz") as archive:
        arrays = dict(archive)
    sequences = sorted({name.split("|")[0] for name in arrays if name.startswith("seq")})
    assert sequences
    for name in sequences:
        example = episode(np.zeros((len(arrays[f"{name}|actions"]), 7)))
        object.__setattr__(example, "actions", arrays[f"{name}|actions"])  # float64, as the goldens
        assert np.flatnonzero(keep_moving(example)).tolist() == arrays[f"{name}|kept_indices"].tolist()


def test_filters_count_what_they_remove():
    paused = np.array([[1.0] * 7, [0.0] * 6 + [1.0], [1.0] * 7])
    filters = {"unlabeled": keep_labeled, "no-ops": keep_moving}
    removed = {name: Counter() for name in filters}
    given = [episode(np.ones((3, 7))), episode(np.ones((3, 7)), instruction=" "), episode(paused)]
    kept = [apply_filters(one, filters, removed) for one in given]
    assert [len(part) for part in kept] == [3, 0, 2]
    assert removed == {"unlabeled": {"steps": 3, "episodes": 1}, "no-ops": {"steps": 1}}
    assert removal_report(removed).splitlines() == [
        "unlabeled: removed 3 steps, of these 1 complete episodes",
        "no-ops: removed 1 steps",
    ]
    assert [int(kept[2].images["image"][step][0, 0, 0]) for step in range(2)] == [0, 2]
    assert keep_nonzero(episode(paused)).tolist() == [True, False, True]


def test_select_steps_keeps_what_belongs_together():
    state = np.arange(4, dtype=np.float32)[:, None]
    picked = select_steps(episode(np.arange(28).reshape(4, 7), state=state), np.array([1, 3]))
    assert picked.state[:, 0].tolist() == [1, 3] and picked.actions[:, 0].tolist() == [7, 21]
    assert len(picked.images["image"]) == 2 and picked.images["image"][-1][0, 0, 0] == 3


# Collator


def test_the_golden_training_batch(tiny_checkpoint, tiny_processor):
    golden, summary = tiny_checkpoint.arrays("train_batch.npz"), tiny_checkpoint.json("train.json")
    instructions = [
        "pick up the carrot",
        "wipe the plate next to the eggplant and then lift the silver pot next to the toy café",
    ]
    for instruction, text in zip(instructions, summary["texts"]):
        assert instruction in text
    samples = [
        {"instruction": instruction, "actions": np.array(actions), "image": golden_image(image)}
        for instruction, actions, image in zip(instructions, summary["actions"], summary["images"])
    ]
    batch = ActionCollator(tiny_processor)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    for name in ("input_ids", "attention_mask", "labels"):
        np.testing.assert_array_equal(batch[name].numpy(), golden[name], err_msg=name)
    torch.testing.assert_close(batch["pixel_values"], torch.from_numpy(golden["pixel_values"]), rtol=0, atol=1e-6)


def test_labels_are_the_actions_and_the_end(tiny_processor):
    collator = ActionCollator(tiny_processor)
    image = np.zeros((8, 8, 3), np.uint8)
    actions = np.linspace(-1, 1, 7)
    batch = collator([{"instruction": "stop", "actions": actions, "image": image}])
    labels = batch["labels"][0]
    assert (labels != -100).sum() == 8
    assert labels[-1] == tiny_processor.tokenizer.eos_token_id
    decoded = collator.head.tokenizer.decode(labels[-8:-1].numpy())
    assert np.abs(decoded - actions).max() <= 1 / 255 + 1e-9
