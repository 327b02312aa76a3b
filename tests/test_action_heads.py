"""The seam of the head: actions of several steps are trained, saved, predicted and driven like those of one."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import make_line

from openvla import ActionTokenizer, OpenVLAConfig, OpenVLAForActionPrediction
from openvla.action_heads_openvla import TokenHead, make_head
from openvla.data.sources import open_source
from openvla.evaluation.control import BlockingControl, RealtimeControl
from openvla.evaluation.loop import Job, run_episodes
from openvla.training import FinetuneOptions, finetune, merge_adapter, plan_run
from openvla.training.plan import estimate


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "fixtures" / "demos" / "lerobot_image"
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CHUNK = 3
BASE = ROOT  # until `small_base`
pytestmark = pytest.mark.usefixtures("small_base")


def options(output: Path, **changes) -> FinetuneOptions:
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    settings = {"steps": 2, "batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine", "logging": "none"}
    made = {"model": str(BASE), "dataset": str(DATA), "output": str(output), "action_chunk": CHUNK, **settings}
    return FinetuneOptions(**{**made, "dtype": "float32", **changes})


def act(model: OpenVLAForActionPrediction, **more):
    return model.eval().predict_action(IMAGE, "open the drawer", **more)


def test_targets_and_comparison():
    head = TokenHead(ActionTokenizer(1000))
    actions = np.random.default_rng(0).uniform(-1, 1, (2, CHUNK, 7))
    rows = [head.targets(row, 2) for row in actions]
    assert head.num_targets((CHUNK, 7)) == CHUNK * 7 + 1 == len(rows[0]) and rows[0][-1] == 2
    assert rows[0][:7] == head.targets(actions[0, 0], 2)[:-1]  # step after step
    labels = torch.full((2, CHUNK * 7 + 4), -100)
    logits = torch.zeros(*labels.shape, 1000)
    for row, (start, targets) in enumerate(zip((1, 3), rows)):
        labels[row, start : start + len(targets)] = torch.tensor(targets)
        logits[row, torch.arange(start - 1, start + len(targets) - 1), targets] = 9.0
    found = head.compare(logits, labels, (CHUNK, 7))
    assert found.predicted.shape == (2, CHUNK, 7) and found.correct.all()
    torch.testing.assert_close(found.wanted, torch.from_numpy(actions), atol=1 / 255, rtol=0)


def test_a_source_gives_the_steps_that_follow():
    source = open_source(DATA, action_chunk=CHUNK)
    episode = source.dataset[0]
    frames = list(source.frames(episode))
    single = [frame.actions for frame in source.frames(episode, action_chunk=1)]
    assert all(frame.actions.shape == (CHUNK, 7) for frame in frames)
    for step in range(len(frames) - CHUNK):
        assert np.array_equal(frames[step].actions, np.concatenate(single[step : step + CHUNK]))


@pytest.fixture(scope="module")
def trained(small_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chunk")
    finetune(options(folder / "full", strategy="last_layer", held_out=0.2))
    return folder / "full"


def test_a_chunk_is_trained_saved_and_predicted(trained):
    assert OpenVLAConfig.from_pretrained(trained).action_chunk == CHUNK
    model = OpenVLAForActionPrediction.from_pretrained(trained)
    prediction = act(model, return_dict=True)
    for name in ("actions", "normalized_actions", "token_ids", "token_probabilities", "token_entropies"):
        assert prediction[name].shape == (CHUNK, 7), name
    batch = model.predict_action([IMAGE] * 2, ["open the drawer"] * 2)
    assert batch.shape == (2, CHUNK, 7)
    np.testing.assert_allclose(batch[0], prediction.actions, atol=1e-6)
    # The first step is decoded as in a model of one
    model.config.action_chunk = 1
    assert np.array_equal(act(model), prediction.actions[0])
    with pytest.raises(ValueError, match="max_new_tokens=7: an action of these statistics has 21 tokens"):
        model.config.action_chunk = CHUNK
        act(model, max_new_tokens=7)


def test_an_adapter_brings_its_chunk(tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need the [train] extra")
    finetune(options(tmp_path / "run", strategy="lora"))
    with_adapter = OpenVLAForActionPrediction.from_pretrained(tmp_path / "run")
    expected = act(with_adapter)
    assert expected.shape == (CHUNK, 7)
    wrapped = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(BASE), tmp_path / "run")
    np.testing.assert_allclose(act(wrapped), expected, atol=1e-6)
    with wrapped.disable_adapter():
        assert act(wrapped).shape == (7,)
    assert merge_adapter(tmp_path / "run", tmp_path / "merged") < 1e-4
    merged = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged")
    assert merged.config.action_chunk == CHUNK and act(merged).shape == (CHUNK, 7)
    # Another run continues with it
    finetune(options(tmp_path / "again", model=str(tmp_path / "run"), strategy="lora", action_chunk=None))
    assert act(OpenVLAForActionPrediction.from_pretrained(tmp_path / "again")).shape == (CHUNK, 7)


def test_the_plan_counts_its_tokens(small_policy, tmp_path, monkeypatch):
    config = OpenVLAConfig.from_pretrained(small_policy)
    one, three = (
        estimate(config, "last_layer", batch_size=1, text_tokens=40, shape=(chunk, 7)) for chunk in (1, CHUNK)
    )
    width, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
    # Forward and backward of the output layer on 14 more positions
    assert three.flops_per_sample - one.flops_per_sample == 3 * 2 * 14 * width * vocabulary
    made = {"model": str(small_policy), "strategy": "last_layer"}
    counted = {(1, 7): one, (CHUNK, 7): three}
    monkeypatch.setattr("openvla.training.plan.estimate", lambda *_, shape, **__: counted.pop(shape))
    plans = [plan_run(options(tmp_path / "run", action_chunk=chunk, **made)) for chunk in (1, CHUNK)]
    assert plans[0].endswith(one.describe()) and plans[1].endswith(three.describe()) and not counted
    with pytest.raises(ValueError, match="action_chunk=0"):
        options(tmp_path / "run", action_chunk=0)


class InChunks:
    """Two steps to the goal at once, by what the picture shows."""

    def act(self, observations):
        seen = [float(observation.images["front"][0, 0, 0]) / 60 - 2 for observation in observations]
        return np.array([[[np.clip(-place, -0.1, 0.1), 0, 0, 0, 0, 0, 1.0]] * 2 for place in seen])


@pytest.mark.parametrize(
    ("control", "latency", "share"),
    [(BlockingControl, None, 0.6), (partial(RealtimeControl, 10, np.zeros(7)), 0.15, 1.0)],
    ids=["blocking", "realtime"],
)
def test_chunks_drive_in_both_modes(control, latency, share, tmp_path):
    jobs = [Job("left", number, seed) for number, seed in enumerate((100, 101, 104))]
    results = run_episodes(
        InChunks(), make_line, jobs, tmp_path, control=control, latency=latency, max_steps=60, videos=0, progress=False
    )
    assert all(result.success for result in results)
    assert all(result.predictions <= share * result.steps + 1 for result in results)


def test_a_head_that_is_not_known():
    with pytest.raises(ValueError, match="action_head='token' is unknown. Did you mean 'tokens'"):
        make_head(OpenVLAConfig(action_head="token"))
    with pytest.raises(ValueError, match="action_chunk=0: expected a positive integer"):
        OpenVLAConfig(action_chunk=0)
