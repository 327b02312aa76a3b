"""`--recipe oft`: the defaults of OpenVLA-OFT's training, and what overrides them."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction, cli
from openvla.options.training import RECIPES, FinetuneOptions, FinetuneVerb
from openvla.training import finetune
from openvla.training.begun import differences
from openvla.training.prepared_run import learning_rate
from openvla.training.schedule import step_decay


DATA = Path(__file__).parent / "fixtures" / "demos" / "lerobot_image"
OLDER = Path(__file__).parent / "fixtures" / "older_settings" / "finetune.json"
SMALL = {"steps": 2, "batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine"}
SMALL |= {"logging": "none", "eval_every": 0, "dtype": "float32"}


def options(**changes) -> FinetuneOptions:
    return FinetuneOptions(**{"dataset": str(DATA), "output": "o", "logging": "none", **changes})


def rates(warmup_steps: int, decay_after: int, steps: int, done: int = 0) -> list[float]:
    """Learning rate of each update; with `done`, of a scheduler that was saved after so many and loaded again."""

    def begin():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
        return optimizer, step_decay(optimizer, warmup_steps, decay_after)

    found, (optimizer, schedule) = [], begin()
    for step in range(steps):
        if done and step == done:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = begin()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rate_of_each_step():
    assert rates(0, 3, 6) == pytest.approx([5e-4] * 3 + [5e-5] * 3)
    assert rates(2, 3, 6) == pytest.approx([0, 2.5e-4, 5e-4, 5e-5, 5e-5, 5e-5])
    # A decay within the warmup: both count
    assert rates(4, 2, 6) == pytest.approx([0, 1.25e-4, 2.5e-5, 3.75e-5, 5e-5, 5e-5])
    for done in (1, 3, 4):
        assert rates(2, 3, 6, done) == rates(2, 3, 6)


def test_what_a_recipe_decides():
    plain, oft = options(), options(recipe="oft")
    assert (plain.head, plain.action_chunk, plain.chunk_end) == (None, None, "repeat")
    assert (plain.schedule, plain.decay_after, plain.weight_decay, plain.max_grad_norm) == ("constant", None, 0.0, 1.0)
    assert (oft.head, oft.action_chunk, oft.chunk_end) == ("l1_regression", 8, "drop")
    assert (oft.schedule, oft.decay_after, oft.weight_decay, oft.max_grad_norm) == ("step", 100_000, 0.01, 0.0)
    assert (oft.strategy, oft.rank, oft.alpha, oft.dropout, learning_rate(oft)) == ("lora", 32, None, 0.0, 5e-4)
    assert all(values.keys() <= {item.name for item in fields(FinetuneOptions)} for values in RECIPES.values())


@pytest.mark.parametrize(
    "given",
    [
        {"head": "diffusion"},
        {"action_chunk": 1},
        {"chunk_end": "still"},
        {"schedule": "constant"},
        {"decay_after": 7},
        {"weight_decay": 0.0},
        {"max_grad_norm": 1.0},
        {"learning_rate": 0.0},
        {"rank": 8, "alpha": 8},
    ],
    ids=str,
)
def test_what_is_given_overrides_it(given):
    before, found = asdict(options(recipe="oft")), asdict(options(recipe="oft", **given))
    others = {"decay_after"} if "schedule" in given else set()
    assert {name for name in before if before[name] != found[name]} == given.keys() | others
    assert given.items() <= found.items()
    # The verb hands the run what it has been given
    verb = FinetuneVerb(dataset=str(DATA), output="o", logging="none", recipe="oft", **given)
    assert asdict(verb.run) == found


def test_what_is_refused():
    with pytest.raises(ValueError, match="recipe='ofd' is unknown. Did you mean 'oft'"):
        options(recipe="ofd")
    with pytest.raises(ValueError, match="decay_after=3: schedule='constant' has no such step, give schedule='step'"):
        options(decay_after=3)
    with pytest.raises(ValueError, match="decay_after=0"):
        options(schedule="step", decay_after=0)


def test_settings_of_other_runs_are_compared_by_values():
    """A run of an older version, which had no recipes, continues; so does one whose recipe is written out."""
    older = {**json.loads(OLDER.read_text()), "chunk_end": "repeat"}  # of single actions nothing else was known
    now = {**asdict(options(rank=4)), **{name: older[name] for name in ("dataset", "learning_rate", "model")}}
    assert differences(older, {**now, "global_batch": 2}) == []
    oft = asdict(options(recipe="oft"))
    written = RECIPES["oft"] | {"decay_after": 100_000}
    assert differences(oft, asdict(options(**written, steps=9))) == []
    assert differences(oft, asdict(options(recipe="oft", decay_after=5))) == ["decay_after was 100000, is 5"]


def test_the_command_line_shows_it(small_policy, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    pytest.importorskip("peft", reason="training needs the [train] extra")

    def plan(*more):
        arguments = ["finetune", "--dataset", DATA, "--output", tmp_path / "run", "--dry-run"]
        arguments += ["--model", small_policy, *more]
        found = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert found.exit_code == 0, found.output
        return found.stdout

    text = plan("--recipe", "oft", "--state", "--warmup-steps", "10")
    assert (
        "predicts  chunks of 8 (past the end of an episode: drop) with l1_regression from primary, a state of" in text
    )
    assert "lora, adamw 0.0005 step (a tenth after 100000, which is not reached), warmup 10, weight decay 0.01" in text
    assert "not clipped" in text
    # What the other runs need is not counted: a second each
    monkeypatch.setattr("openvla.training.plan.estimate", lambda *_, **__: SimpleNamespace(describe=lambda: ""))
    text = plan("--recipe", "oft", "--chunk", "3", "--decay-after", "500", "--max-grad-norm", "2", "--steps", "900")
    assert "chunks of 3" in text and "step (a tenth after 500)" in text and "clipped at 2" in text
    text = plan()
    assert "predicts  single actions with tokens from primary\n" in text and "0.0005 constant, warmup 0" in text
    shown = " ".join(CliRunner().invoke(cli.app, ["finetune", "--help"]).stdout.split())
    assert "0.01 with --recipe oft" in shown and "1.0; 0.0 with --recipe oft" in shown and "constant; step" in shown


def test_it_is_trained_and_resumed(small_policy, tmp_path):
    """Two steps, and two more of the same run after the decay: the rates of both, and metrics of the original."""
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    pytest.importorskip("peft", reason="training needs the [train] extra")
    made = {**SMALL, "recipe": "oft", "proprio": True, "decay_after": 2, "warmup_steps": 1, "save_every": 2}
    made |= {"model": str(small_policy), "output": str(tmp_path / "run"), "log_every": 1}
    finetune(options(**made))
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "run")
    state, image = model.norm_stats["mine"]["proprio"]["mean"], np.zeros((64, 64, 3), dtype=np.uint8)
    assert model.config.action_head == "l1_regression"
    assert model.predict_action(image, "open the drawer", state=np.array(state)).shape == (8, 7)
    finetune(options(**{**made, "steps": 4}), resume=True)
    trained = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    log = [entry for entry in trained["log_history"] if "loss" in entry]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0, 5e-4, 5e-5, 5e-5])
    for entry in log:
        # Two samples, both of complete chunks
        assert entry["action_l1"] == pytest.approx((entry["action_l1_current"] + 7 * entry["action_l1_next"]) / 8)
    saved = json.loads((tmp_path / "run" / "finetune.json").read_text())
    expected = {"recipe": "oft", "head": "l1_regression", "weight_decay": 0.01, "chunk_end": "drop"}
    assert expected.items() <= saved.items()
