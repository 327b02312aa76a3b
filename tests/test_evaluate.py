"""Evaluations in Meta-World from beginning to end, without pictures: experts, references, modes, resume."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from openvla import OpenVLAForActionPrediction
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.policies import trained_with_crops


pytest.importorskip("metaworld", reason="Meta-World needs the [sim] extra")

ROOT = Path(__file__).resolve().parents[1]
TASKS = "drawer-open-v3,button-press-topdown-v3"


def run(output: Path, **options):
    values = {"tasks": TASKS, "episodes": 2, "render": False, "videos": 0, "progress": False, "workers": 2, **options}
    return evaluate(model=str(ROOT), output=output, **values)


def episodes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> list[tuple]:
    return sorted((entry["task"], entry["seed"], entry["success"], entry["steps"]) for entry in episodes(folder))


def test_the_expert_succeeds_and_references_do_not(tmp_path):
    assert run(tmp_path / "expert", policy="expert")["mean_success"] == 1.0
    assert {entry["seed"] for entry in episodes(tmp_path / "expert")} == {1_000_000, 1_000_001}
    for policy in ("random", "mean"):
        assert run(tmp_path / policy, policy=policy, max_steps=30)["mean_success"] == 0.0
    report = (tmp_path / "expert" / "report.md").read_text()
    assert "| drawer-open-v3 | 100% |" in report and "policy: `expert`" in report
    assert "model: `embedded policy`" in report and str(ROOT) not in report  # a report is published


def test_modes_and_resume(tmp_path):
    run(tmp_path / "blocking", policy="expert")
    run(tmp_path / "prompt", policy="expert", control="realtime", latency=0.0)
    assert outcome(tmp_path / "prompt") == outcome(tmp_path / "blocking")
    late = {"policy": "expert", "control": "realtime", "hz": 5.0, "latency": 0.8}
    run(tmp_path / "late", **late)
    assert outcome(tmp_path / "late") != outcome(tmp_path / "blocking")

    folder = tmp_path / "late"
    before, lines = outcome(folder), (folder / "episodes.jsonl").read_text().splitlines()
    (folder / "episodes.jsonl").write_text(lines[0] + "\n" + lines[1][:20])  # killed
    run(folder, **late)
    assert outcome(folder) == before
    with pytest.raises(ValueError, match="hz was 5.0, is 10.0"):
        run(folder, **{**late, "hz": 10.0})
    with pytest.raises(ValueError, match="dtype was None, is 'bfloat16'"):
        run(folder, **late, dtype="bfloat16")


def test_a_policy_of_another_kind(tmp_path):
    class Up:
        def act(self, observations):
            return np.tile([0.0, 0, 1, 0, 0, 0, 1], (len(observations), 2, 1))  # two steps each

        def __repr__(self):
            return "up and away"

    assert run(tmp_path, policy=Up(), max_steps=5, episodes=1)["mean_success"] == 0.0
    assert [entry["predictions"] for entry in episodes(tmp_path)] == [3, 3]
    assert "policy: `up and away`" in (tmp_path / "report.md").read_text()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'expert'"):
        run(tmp_path, policy="experts")
    with pytest.raises(ValueError, match="Did you mean 'drawer-open-v3'"):
        run(tmp_path, tasks="drawer-opn-v3")
    with pytest.raises(ValueError, match="episodes=0"):
        run(tmp_path, episodes=0)


def test_a_fresh_policy_has_short_prompts_and_can_be_asked(tmp_path, monkeypatch):
    """Where the training of the embedded policy begins."""
    sizes = ["--patch", "56", "--width", "32", "--depth", "2", "--hidden", "32", "--layers", "1"]
    monkeypatch.setattr("sys.argv", ["fresh_policy.py", str(tmp_path / "fresh"), *sizes])
    runpy.run_path(str(ROOT / "examples" / "fresh_policy.py"), run_name="__main__")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "fresh")
    model.norm_stats = {"mine": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    prompt = model.processor.format_prompt("pick up the puck and bring it to the goal")
    assert len(model.processor.tokenizer(prompt).input_ids) <= 24  # a word, a token
    assert model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer").shape == (7,)


def test_models_trained_with_crops_are_shown_crops(tmp_path):
    assert not trained_with_crops(str(tmp_path))
    (tmp_path / "finetune.json").write_text(json.dumps({"image_aug": True}))
    assert trained_with_crops(str(tmp_path))
