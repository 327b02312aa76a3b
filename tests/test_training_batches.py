"""From the demonstrations of each format to a batch: several cameras, states, chunks and what heads learn from."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FIXTURES, TINY

from openvla import ActionTokenizer, OpenVLAConfig, normalize_actions, unnormalize_actions
from openvla.action_heads_openvla import HEADS, Comparison, TokenHead, head_without_weights
from openvla.data import PythonDataset, open_sources
from openvla.data.augment import ImageAugmentation
from openvla.data.collate import ActionCollator
from openvla.data.filters import select_steps
from openvla.data.samples import FrameSamples
from openvla.data.source import CHUNK_ENDS
from openvla.data.sources import open_source
from openvla.data.statistics import compute_statistics, statistics_table
from openvla.data.writers.hdf5 import write_hdf5
from openvla.options.training import FinetuneOptions
from openvla.training import finetune
from openvla.training.preparation import prepare


ROOT = Path(__file__).resolve().parents[1]
DEMOS = FIXTURES / "demos"
OFT_CAMERAS = ("full_image", "wrist_image")


def in_memory(episodes: int = 3, steps: int = 12, dims: int = 7, states: bool = True) -> PythonDataset:
    """Demonstrations in memory; the last dimension of an action is a gripper that closes halfway."""
    rng = np.random.default_rng(0)

    def episode() -> dict:
        actions = rng.normal(size=(steps, dims))
        actions[:, -1] = np.arange(steps) < steps // 2
        images = {name: rng.integers(0, 256, (steps, 20, 24, 3), dtype=np.uint8) for name in ("front", "wrist")}
        state = {"state": rng.normal(size=(steps, 3)) * [1, 5, 0]} if states else {}
        return {"actions": actions, "instruction": "open the drawer", "images": images, **state}

    return PythonDataset([episode() for _ in range(episodes)], "mine")


FORMATS = {
    "rlds": (DEMOS / "rlds" / "metaworld_demo", {"split": "val"}, ["image", "wrist_image"], 8),
    "lerobot": (DEMOS / "lerobot_video", {}, ["image", "wrist_image"], 8),
    "hdf5": (DEMOS / "hdf5", {}, ["agentview_rgb", "eye_in_hand_rgb"], 8),
    "python": (in_memory(), {}, ["front", "wrist"], 3),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_two_cameras_and_the_state(format):
    place, options, cameras, dims = FORMATS[format]
    source = open_source(place, camera_names=OFT_CAMERAS, held_out=0, **options)
    episode = source.dataset[0]
    frames = list(source.frames(episode))[:3]
    assert all(list(frame.images) == cameras for frame in frames) and source.state_dim == dims
    processor = TINY[0].processor()
    processor.camera_names = list(OFT_CAMERAS)
    images = processor.image_processor
    samples = FrameSamples(images, camera_names=OFT_CAMERAS)
    batch = ActionCollator(processor, proprio=True)([samples[position, frame] for position, frame in enumerate(frames)])
    # One image after the other, in the order of the config
    single = [images(images.trained_pixels(episode.images[name][2]), return_tensors="pt") for name in cameras]
    assert torch.equal(batch["pixel_values"][2:], torch.cat([image["pixel_values"] for image in single], dim=1))
    # Formula of the published training; what never changes is 0
    stats = {name: np.array(value) for name, value in source.statistics["proprio"].items()}
    scaled = 2 * (episode.state[:3] - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-8) - 1
    expected = np.where(stats["min"] == stats["max"], 0, np.clip(scaled, -1, 1)).astype(np.float32)
    assert batch["proprio"].dtype == torch.float32 and np.array_equal(batch["proprio"].numpy(), expected)
    assert not {"actions", "action_is_pad"} & batch.keys()  # tokens are learned from their labels
    every = np.concatenate([part.state for dataset in source.everything for part in dataset])
    np.testing.assert_allclose(stats["mean"], every.mean(0), rtol=1e-4, atol=1e-6)


def test_each_camera_is_varied_by_itself():
    source = open_source(in_memory(), camera_names=OFT_CAMERAS)
    frame = next(source.frames(source.dataset[0]))
    alike = {name: frame.images["front"] for name in frame.images}
    frame = type(frame)(**{**vars(frame), "images": alike})
    images = TINY[0].processor().image_processor
    varied = FrameSamples(images, ImageAugmentation(), seed=3, camera_names=OFT_CAMERAS)
    first, again, later = (varied[position, frame]["image"] for position in (0, 0, 1))
    assert list(first) == list(OFT_CAMERAS)
    assert not np.array_equal(first["full_image"], first["wrist_image"])
    for name in OFT_CAMERAS:
        assert np.array_equal(first[name], again[name]) and not np.array_equal(first[name], later[name])
    alone = FrameSamples(images, ImageAugmentation(), seed=3)[
        0, type(frame)(**{**vars(frame), "images": {"a": alike["front"]}})
    ]
    assert np.array_equal(alone["image"], first["full_image"])  # a further camera changes nothing in the first


def test_a_camera_that_was_named_is_seen_whatever_it_is_called():
    """The name of an infrared image once stopped a run at its first batch, after its weights were read."""
    episode = {"actions": np.eye(7), "instruction": "go", "images": {"thermal": np.full((7, 8, 8, 3), 9, np.uint8)}}
    source = open_source([episode], camera="thermal", held_out=0)
    sample = FrameSamples(TINY[0].processor().image_processor)[0, next(source.frames(source.dataset[0]))]
    assert (sample["image"] == 9).all()


# Statistics -----------------------------------------------------------------------------------------------------------


def test_the_table_shows_states():
    source = open_source(in_memory())
    table = statistics_table(source.statistics, source.names, ["x", "y", "z"])
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines["gripper"].endswith("no") and lines["y"].endswith("yes") and lines["z"].endswith("(never changes)")
    assert table.splitlines()[0].startswith("actions ") and table.index("\ngripper ") < table.index(
        "\nstates\n"
    ) < table.rindex("\ny ")
    assert "proprio[1]" in statistics_table(source.statistics)
    none = compute_statistics([np.ones((4, 2))])
    assert "proprio" not in statistics_table(none) and "states" not in statistics_table(none)


def test_a_dataset_without_states_gives_none(tmp_path):
    source = open_source(in_memory(states=False))
    assert source.state_dim == 0 and next(source.frames(source.dataset[0])).state is None
    given = open_source(in_memory()).statistics  # of states that are not here
    assert given["proprio"] and open_source(in_memory(states=False), statistics=given).state_dim == 0
    options = FinetuneOptions(dataset="x", output=str(tmp_path), strategy="last_layer", proprio=True)
    with pytest.raises(ValueError, match=r"'mine' has no states \(--state-key names them\)"):
        prepare(options, data=in_memory(states=False))


def test_bounds_scale_by_min_and_max():
    demonstrations = in_memory(steps=60)
    demonstrations.episodes[0]["actions"][7, 0] = 40.0
    demonstrations.episodes[0]["state"][7, 0] = 40.0
    by_quantiles, by_bounds = (open_source(demonstrations, normalization=mode) for mode in ("bounds_q99", "bounds"))
    stats = by_bounds.statistics
    assert stats == by_quantiles.statistics  # a file has both
    for part in ("actions", "state"):
        values = {
            source.normalization: np.array([getattr(frame, part)[0] for frame in source.frames(demonstrations[0])])
            for source in (by_quantiles, by_bounds)
        }
        assert values["bounds"][:, 0].argmax() == 7 and np.sort(values["bounds"][:, 0])[-2] < 0
        assert np.sort(values["bounds_q99"][:, 0])[-2] > 0.5  # clipped, the outlier leaves others their range
        raw, key = getattr(demonstrations[0], part), {"actions": "action", "state": "proprio"}[part]
        expected = normalize_actions(raw, stats[key], "bounds").astype(np.float32)
        assert np.array_equal(values["bounds"], expected)
    back = unnormalize_actions(values["bounds"], stats["proprio"], "bounds")
    np.testing.assert_allclose(back[:, :2], raw[:, :2], rtol=1e-4, atol=1e-4)
    action = stats["action"]
    scale = (np.array(action["max"]) - action["min"]) / 2
    assert np.array_equal(by_bounds.action_scale, np.where(action["mask"], scale, 1.0))
    # A limit on outliers is one of normalized values: nothing is beyond min and max
    assert open_source(demonstrations, max_action=2.0).removed["max_action"]["episodes"] == 1
    assert open_source(demonstrations, max_action=2.0, normalization="bounds").removed["max_action"]["episodes"] == 0


def test_a_normalization_for_each_dataset(tmp_path):
    demonstrations = in_memory()
    assert open_source(demonstrations, normalization={"mine": "bounds"}).normalization == "bounds"
    assert open_source(demonstrations, normalization={"other": "bounds"}).normalization == "bounds_q99"
    with pytest.raises(ValueError, match="normalization='bound' is unknown. Did you mean 'bounds'"):
        open_source(demonstrations, normalization="bound")
    without = {"action": {name: [0.0] * 7 for name in ("q01", "q99")}}
    with pytest.raises(ValueError, match="mine: the action statistics given have no min and max"):
        open_source(demonstrations, normalization="bounds", statistics=without)
    (tmp_path / "both.yaml").write_text(
        f"a: {{path: {DEMOS / 'hdf5'}, normalization: bounds}}\nb: {{path: {DEMOS / 'lerobot_image'}}}\n"
    )
    assert [source.normalization for source in open_sources(tmp_path / "both.yaml")] == ["bounds", "bounds_q99"]
    made = {"output": str(tmp_path / "run"), "strategy": "last_layer"}
    run = prepare(FinetuneOptions(dataset=str(tmp_path / "both.yaml"), **made))
    assert run.config.normalization == {"a": "bounds"}
    run = prepare(FinetuneOptions(dataset="x", normalization="bounds", **made), data=demonstrations)
    assert run.config.normalization == {"mine": "bounds"}


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_end", CHUNK_ENDS)
def test_the_end_of_an_episode(chunk_end):
    steps, chunk = 6, 4
    demonstrations = in_memory(steps=steps)
    source = open_source(demonstrations, action_chunk=chunk, chunk_end=chunk_end)
    single = normalize_actions(demonstrations[0].actions, source.statistics["action"]).astype(np.float32)
    frames = list(source.frames(source.dataset[0]))
    for step, frame in enumerate(frames):
        inside = min(chunk, steps - step)
        assert frame.actions.shape == (chunk, 7) and np.array_equal(frame.actions[:inside], single[step:][:inside])
        assert frame.padded == (chunk - inside if chunk_end == "repeat" else 0)
        for beyond in frame.actions[inside:]:
            assert beyond[-1] == single[-1, -1]  # the gripper stays
            assert np.array_equal(beyond, single[-1]) == (chunk_end == "repeat")
    assert len(frames) == (steps - chunk + 1 if chunk_end == "drop" else steps)
    gone = {"steps": 3 * (chunk - 1), "episodes": 0}
    assert source.removed.get("chunk_end") == (gone if chunk_end == "drop" else None)
    assert source.num_frames == 3 * len(frames)


@pytest.mark.parametrize("chunk_end", CHUNK_ENDS)
def test_a_chunk_ends_with_its_instruction(chunk_end):
    """What follows was done for another one: it is never what an instruction asks for."""
    chunk, told = 4, in_memory(1, 7).episodes[0]
    told["instruction"] = ["open the drawer"] * 3 + ["close it"] * 4
    one = PythonDataset([told], "mine")
    apart = PythonDataset([one[0][:3], one[0][3:]], "mine")
    sources = [open_source(data, action_chunk=chunk, chunk_end=chunk_end, held_out=0) for data in (one, apart)]
    frames, expected = ([f for episode in s.dataset for f in s.frames(episode)] for s in sources)
    assert len(frames) == len(expected) == (1 if chunk_end == "drop" else 7)
    for frame, other in zip(frames, expected, strict=True):
        assert frame.instruction == other.instruction and frame.padded == other.padded
        assert np.array_equal(frame.actions, other.actions)


def test_chunks_of_several_instructions_are_counted():
    """As if an episode had one: a run of which nothing was left began, and ended at its first batch."""
    told = in_memory(3, 10).episodes
    for words, episode in zip((["a"] * 4 + ["b"] * 6, ["a"] * 5 + [""] * 5, ["a"] * 10), told):
        episode["instruction"] = words
    data = PythonDataset(told, "mine")
    for unlabeled, expected in ((False, 2 + 1 + 6), (True, 2 + 1 + 1 + 6)):
        options = {"action_chunk": 5, "chunk_end": "drop", "keep_unlabeled": unlabeled, "held_out": 0}
        source = open_source(data, **options)
        frames = [frame for episode in source.dataset for frame in source.frames(episode)]
        assert source.num_frames == len(frames) == expected
    said = r"(?s)Nothing is left to train on.*removed 15 steps, of these 2.*shorter than a chunk: chunk_end='repeat'"
    with pytest.raises(ValueError, match=said):
        open_source(PythonDataset(told[:2], "mine"), action_chunk=7, chunk_end="drop", held_out=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"action_chunk": 0}, "action_chunk=0: expected a positive integer"),
        ({"action_chunk": "8"}, "action_chunk='8': expected a positive integer"),
        ({"camera_names": "primary"}, "camera_names='primary': expected names of cameras, each once"),
        ({"camera_names": ["wrist", "wrist"]}, "expected names of cameras, each once"),
        ({"camera_names": []}, r"camera_names=\[\]: expected names"),
        ({"camera_names": 3}, "camera_names=3: expected names"),
        ({"held_out": None}, "held_out=None: expected a part of the episodes"),
        ({"chunk_end": ["still"]}, r"chunk_end=\['still'\]: expected text"),
        ({"absolute_dims": "0,9"}, "mine: absolute_dims=9, but actions have 7 dimensions"),
        ({"hz": "fast"}, "hz='fast': expected a number"),
        ({"hz": -1}, "hz=-1.0, expected actions in a second"),
        ({"unit": 3}, "unit=3: expected text"),
        ({"split": "val"}, "split='val': an object in Python has all its episodes"),
        ({"format": "rlds"}, "format='rlds': an object in Python has all its episodes and no format"),
    ],
)
def test_what_cannot_be_is_said_by_its_name(options, message):
    """Before anything is trained; some were never looked at, others stood in an error under another name."""
    with pytest.raises(ValueError, match=message):
        open_source(in_memory(), **options)


def test_episodes_that_are_shorter_than_a_chunk():
    with pytest.raises(ValueError, match=r"(?s)Nothing is left to train on.*chunk_end: removed 18 steps, of these 3"):
        open_source(in_memory(steps=6), action_chunk=7, chunk_end="drop")
    source = open_source(in_memory(steps=6), action_chunk=9, chunk_end="repeat")
    assert [frame.padded for frame in source.frames(source.dataset[0])] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="chunk_end='pad' is unknown"):
        open_source(in_memory(), chunk_end="pad")


def noisy(steps: int = 6) -> PythonDataset:
    """Of which other actions were executed; the last number is a gripper, 1: closed."""
    clean = in_memory(episodes=1, steps=steps)[0]
    executed = clean.actions + np.float32(0.5) * (np.arange(7) < 3)
    return PythonDataset([replace(clean, executed=executed)], "mine")


def test_what_was_executed_is_read_and_the_answer_learned():
    source = open_source(noisy(), action_chunk=3, gripper="open-is-0")
    processor = TINY[0].processor()
    samples, collator = FrameSamples(processor.image_processor), ActionCollator(processor)
    frame = next(source.frames(source.dataset[0]))
    assert frame.executed.shape == frame.actions.shape == (3, 7)
    assert (frame.executed != frame.actions)[:, :3].any() and np.array_equal(
        frame.executed[:, 3:], frame.actions[:, 3:]
    )
    whole = source.dataset[0]
    expected = normalize_actions(whole.executed[:3], source.statistics["action"]).astype(np.float32)
    np.testing.assert_array_equal(frame.executed, expected)
    batch = collator([samples[0, frame]])
    answer = batch["labels"][0] != -100
    tokenizer = collator.head.tokenizer
    learned, read = (batch[name][0][answer][:-1].numpy().reshape(3, 7) for name in ("labels", "input_ids"))
    np.testing.assert_array_equal(learned, tokenizer.encode(frame.actions))
    np.testing.assert_array_equal(read, tokenizer.encode(frame.executed))
    assert "executed" not in batch
    collator.head.wants_executed = True
    np.testing.assert_array_equal(collator([samples[0, frame]])["executed"].numpy()[0], frame.executed)


def test_what_was_executed_is_the_beginning_that_a_diffusion_continues():
    pytest.importorskip("diffusers", reason="its schedule needs the [oft] extra")
    head = head_without_weights(OpenVLAConfig(action_head="diffusion", action_dim=2, action_chunk=3))
    head.draw_prefixes = lambda model, batch: torch.tensor([[2]])
    seen = []

    def model(noisy_actions, **inputs):
        assert "executed" not in inputs
        seen.append(noisy_actions)
        return SimpleNamespace(predicted=torch.zeros(1, 3, 2))

    model.training = True
    batch = {"actions": torch.zeros(1, 3, 2), "labels": torch.zeros(1, 7, dtype=torch.long)}
    head.loss(model, {**batch, "executed": torch.full((1, 3, 2), 0.5)})
    assert (seen[0][:, :2] == 0.5).all() and (seen[0][:, 2] != 0.5).all()


def test_steps_that_are_selected_keep_what_was_executed():
    episode, steps = noisy()[0], np.array([0, 3, 5])
    np.testing.assert_array_equal(select_steps(episode, steps).executed, episode.executed[steps])


def test_what_was_executed_is_read_beside_the_actions_it_differs_from(tmp_path):
    write_hdf5(noisy(), tmp_path / "lift_demo.hdf5")
    for key, known in ((None, True), ("actions", True), ("executed_action", False)):
        source = open_source(tmp_path / "lift_demo.hdf5", action_key=key)
        assert (source.dataset[0].executed is not None) == known


def test_single_actions_are_learned_as_before():
    """Tokens of one action follow each other; noise between them would only hide them from each other."""
    source, processor = open_source(noisy()), TINY[0].processor()
    sample = FrameSamples(processor.image_processor)[0, next(source.frames(source.dataset[0]))]
    batch = ActionCollator(processor)([sample])
    answer = batch["labels"][0] != -100
    assert torch.equal(batch["labels"][0][answer], batch["input_ids"][0][answer])


class Numbers(TokenHead):
    """Learns from numbers, as heads of regression do; so that little has to be written, its tokens answer."""

    wants_actions = True
    seen: list[dict] = []

    def loss(self, model, batch):
        numbers = {name: batch[name] for name in ("actions", "action_is_pad") if name in batch}
        self.seen.append(numbers)
        tokens = {name: value for name, value in batch.items() if name not in numbers}
        loss, answer = super().loss(model, tokens)
        return loss, {**answer, "actions": numbers["actions"]}

    def compare(self, logits, labels, actions, shape):
        found = super().compare(logits, labels, shape)
        return Comparison(found.predicted, actions)


def test_a_head_is_given_numbers():
    source = open_source(in_memory(steps=6), action_chunk=3, chunk_end="repeat")
    processor = TINY[0].processor()
    samples, head = FrameSamples(processor.image_processor), Numbers(ActionTokenizer(processor.tokenizer))
    frames = list(source.frames(source.dataset[0]))
    collator = ActionCollator(processor, head)
    batch = collator([samples[0, frame] for frame in frames])
    assert batch["actions"].dtype == torch.float32 and batch["actions"].shape == (6, 3, 7)
    assert np.array_equal(batch["actions"].numpy(), np.stack([frame.actions for frame in frames]))
    assert batch["action_is_pad"].tolist() == [[False] * 3] * 4 + [[False, False, True], [False, True, True]]
    assert "action_is_pad" not in collator([samples[0, frame] for frame in frames[:3]])  # nothing is padded
    single = open_source(in_memory())
    one = collator([samples[0, next(single.frames(single.dataset[0]))]])
    assert one["actions"].shape == (1, 1, 7)


def test_a_head_of_numbers_is_trained(small_policy, monkeypatch, tmp_path):
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    made = {"model": str(small_policy), "dataset": "mine", "output": str(tmp_path / "run"), "strategy": "last_layer"}
    options = {**made, "steps": 2, "batch_size": 8, "logging": "none", "action_chunk": 4}
    assert {source.chunk_end for source in prepare(FinetuneOptions(**options), data=in_memory()).sources} == {"repeat"}
    monkeypatch.setitem(HEADS, "tokens", Numbers)
    Numbers.seen.clear()
    finetune(FinetuneOptions(**options), data=in_memory(steps=5))
    assert all(batch["actions"].shape == (8, 4, 7) for batch in Numbers.seen)
    log = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())[
        "log_history"
    ]
    assert "action_l1" in log[-1] and "action_accuracy" not in log[-1]  # of tokens alone
    assert any("action_is_pad" in batch for batch in Numbers.seen)
    Numbers.seen.clear()
    finetune(
        FinetuneOptions(**{**options, "output": str(tmp_path / "drop")}, chunk_end="drop"), data=in_memory(steps=5)
    )
    assert not any("action_is_pad" in batch for batch in Numbers.seen)


@pytest.mark.parametrize("name", ["tokens", "parallel_tokens"])
def test_padding_is_not_in_the_loss_of_tokens(name):
    """Nor what the model answers there, nor what is repeated there; the end is."""
    source = open_source(in_memory(steps=6), action_chunk=3, chunk_end="repeat")
    processor = TINY[0].processor()
    tokenizer = ActionTokenizer(processor.tokenizer)
    head = HEADS[name](tokenizer)
    samples, frames = FrameSamples(processor.image_processor), list(source.frames(source.dataset[0]))
    batch = head.prepare(ActionCollator(processor, head)([samples[0, frame] for frame in frames]))
    assert batch["action_is_pad"].sum() == 3 and "actions" not in batch
    length = batch["labels"].shape[1] if name == "tokens" else 3 * 7 + 1
    kept = batch.get("logits_to_keep", length)
    answer = torch.randn(6, kept, 32064, generator=torch.Generator().manual_seed(0))
    recorded = batch["labels"][batch["labels"] != -100].view(6, -1)  # (6, 3 * 7 + 1)

    def model(**inputs):
        assert "action_is_pad" not in inputs and "labels" not in inputs
        return SimpleNamespace(logits=answer.clone())

    model.training = False
    loss, _ = head.loss(model, batch)
    found = answer
    if name == "tokens":  # at position i stands what is said of label i + 1
        place = (batch["labels"][:, -kept:] != -100).int().argmax(dim=1)[:, None] - 1 + torch.arange(3 * 7 + 1)
        found = answer.gather(1, place[..., None].expand(-1, -1, answer.shape[2]))
    learned = torch.cat([~batch["action_is_pad"].repeat_interleave(7, dim=1), torch.ones(6, 1, dtype=torch.bool)], 1)
    expected = torch.nn.functional.cross_entropy(found[learned], recorded[learned])
    torch.testing.assert_close(loss, expected)
    shown = head.compare(**head.loss(model, batch)[1], shape=(3, 7))
    assert torch.equal(shown.wanted, tokenizer.decode(recorded[:, :-1].unflatten(1, (3, 7))))  # of all steps


@pytest.mark.parametrize("name", ["l1_regression", "diffusion"])
def test_padding_is_not_in_the_loss(name):
    if name == "diffusion":
        pytest.importorskip("diffusers", reason="its schedule needs the [oft] extra")
    head = head_without_weights(OpenVLAConfig(action_head=name, action_dim=2, action_chunk=3))
    actions, is_pad = torch.zeros(2, 3, 2), torch.tensor([[False] * 3, [False, True, True]])
    answer = torch.tensor([1.0, 2.0, 4.0])[None, :, None].expand(2, 3, 2).clone()

    def model(**inputs):
        assert "action_is_pad" not in inputs and "actions" not in inputs
        return SimpleNamespace(predicted=answer)

    model.training = False
    batch = {"actions": actions, "labels": torch.zeros(2, 7, dtype=torch.long)}
    loss, _ = head.loss(model, {**batch, "action_is_pad": is_pad})
    complete, _ = head.loss(model, batch)
    if name == "l1_regression":
        assert complete == answer.mean() and loss == 2.0  # (1 + 2 + 4 + 1) / 4
    answer[1, 1:] = 100.0
    assert torch.equal(loss, head.loss(model, {**batch, "action_is_pad": is_pad})[0])
    assert not torch.equal(complete, head.loss(model, batch)[0])
