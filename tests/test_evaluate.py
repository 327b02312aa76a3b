"""Evaluations in Meta-World from beginning to end, without pictures: experts, references, modes, resume."""

import json
import math
import runpy
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction
from openvla.cli import app
from openvla.evaluation import begun, candidate, latency
from openvla.evaluation import evaluate as evaluate_module
from openvla.evaluation.candidate import reference_policy
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.loop import run_episodes
from openvla.evaluation.rendering import NoOpenGL
from openvla.evaluation.report import EpisodeResult
from openvla.folders import locked
from openvla.hub import file_digests
from openvla.options.evaluation import DemoOptions, EvaluateOptions
from openvla.quantization_openvla import OpenVLAQuantizationConfig


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
    assert "embedded policy" not in report  # which did not act
    report = (tmp_path / "mean" / "report.md").read_text()  # of its statistics
    assert "model: `embedded policy`" in report and str(ROOT) not in report  # a report is published


def test_random_actions_are_those_of_the_model():
    """What -1 and 1 stand for: min and max of a model that was trained with them."""
    stats = {"q01": [-1.0, 0.0], "q99": [1.0, 2.0], "min": [-3.0, -1.0], "max": [5.0, 9.0]}
    for mode, low, high in (("bounds_q99", "q01", "q99"), ("bounds", "min", "max")):
        policy = reference_policy("random", stats, mode)
        assert (policy.low.tolist(), policy.high.tolist()) == (stats[low], stats[high])


def test_modes_and_resume(tmp_path):
    short = {"policy": "expert", "episodes": 1, "max_steps": 150}
    run(tmp_path / "blocking", **short)
    run(tmp_path / "prompt", **short, control="realtime", latency=0.0)
    assert outcome(tmp_path / "prompt") == outcome(tmp_path / "blocking")
    assert all(success for _, _, success, _ in outcome(tmp_path / "blocking"))
    late = {**short, "control": "realtime", "hz": 5.0, "latency": 0.8}
    run(tmp_path / "late", **late)
    assert outcome(tmp_path / "late") != outcome(tmp_path / "blocking")

    folder = tmp_path / "late"
    before, lines = outcome(folder), (folder / "episodes.jsonl").read_text().splitlines()
    (folder / "episodes.jsonl").write_text(lines[0] + "\n" + lines[1][:20])  # killed
    run(folder, **late)
    assert outcome(folder) == before
    with pytest.raises(ValueError, match="hz was 5.0, is 10.0"):
        run(folder, **{**late, "hz": 10.0})
    with pytest.raises(ValueError, match="late was None, is 'still'"):
        run(folder, **late, late="still")
    with pytest.raises(ValueError, match="latency was 0.8, is 0.4. Leave it out to continue"):
        run(folder, **{**late, "latency": 0.4})  # was taken for the first, silently
    run(folder, **{**late, "latency": None})
    assert json.loads((folder / "evaluation.json").read_text())["latency"] == 0.8
    report = (folder / "report.md").read_text()
    assert "- chunking: `switch`" in report and "- late: `repeat`" in report  # also where they were not given


@pytest.mark.parametrize("policy", ["random", "model"])
def test_a_run_that_goes_on_draws_other_numbers(tmp_path, monkeypatch, policy):
    """Its episodes had the noise of the first ones again, so that they counted twice."""
    drawn = []

    def run_nothing(acting, make, jobs, folder, **options):
        moves = acting.act([None])[0] if policy == "random" else np.zeros(0)
        drawn.append([torch.rand(1).item(), *moves[moves != 0.0].tolist()])
        return run_episodes(acting, make, [], folder, **options)

    monkeypatch.setattr(evaluate_module, "run_episodes", run_nothing)
    monkeypatch.setattr(evaluate_module, "write_report", lambda *arguments, **options: {})
    one = EpisodeResult("drawer-open-v3", 0, 1_000_000, "open it", True, 10, 10, 0.01)
    for known in ([], [], [one], [one, replace(one, episode=1)], [one, replace(one, episode=1, error="broke")]):
        monkeypatch.setattr(evaluate_module, "read_results", lambda file, known=known: known)
        run(tmp_path / "out", policy=policy)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[4]
    assert not {*drawn[0]} & {*drawn[2]} and not {*drawn[2]} & {*drawn[3]} and not {*drawn[0]} & {*drawn[3]}


def test_latency_is_measured_on_what_is_seen_and_used_as_it_is_written_down(tmp_path, monkeypatch):
    """States of the simulator, whatever they are: eight zeros suit some models only."""
    seen, used = [], []
    monkeypatch.setattr(latency, "median_latency", lambda policy, observation: seen.append(observation) or 0.10003)
    monkeypatch.setattr(
        evaluate_module,
        "run_episodes",
        lambda *args, latency, **more: used.append(latency) or run_episodes(*args, **more),
    )
    short = {"policy": Still(), "episodes": 1, "max_steps": 1, "control": "realtime"}
    for _ in range(2):
        run(tmp_path, **short)
    assert used == [0.1, 0.1] and len(seen) == 1  # beside 0.1 s an answer would come one step of 20 later
    assert seen[0].state.any() and seen[0].instruction == "open the drawer"


def test_ways_of_chunks_that_are_none_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(candidate.OpenVLAPolicy, "load", lambda *a, **k: Still())
    late = {"policy": "model", "control": "realtime", "latency": 0.1, "episodes": 1, "max_steps": 1}
    with pytest.warns(UserWarning, match="chunking='prefix': .* predicts one step at once, so that all ways are"):
        run(tmp_path / "prefix", **late, chunking="prefix")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "usual", **late)


def test_another_rate_than_that_of_the_demonstrations_is_said(tmp_path):
    short = {"policy": "mean", "episodes": 1, "max_steps": 1, "tasks": "reach-v3"}
    with pytest.warns(UserWarning, match="recorded at 20 a second, and 'metaworld' takes 10"):
        run(tmp_path, **short, frequency=10)
    assert "- recorded_hz: `20.0`" in (tmp_path / "report.md").read_text()


def test_units_of_other_demonstrations_are_said(tmp_path, monkeypatch):
    """A model of one suite of LIBERO acted in another in the units of its own, and nobody was told."""
    monkeypatch.setattr("openvla.evaluation.metaworld.MetaWorld.unnorm_keys", ("goal", "goal_no_noops"), raising=False)
    short = {"policy": "mean", "episodes": 1, "max_steps": 1, "tasks": "reach-v3"}
    with pytest.warns(UserWarning, match="units of 'metaworld', the only dataset .* called goal or goal_no_noops"):
        run(tmp_path / "other", **short)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path / "chosen", **short, unnorm_key="metaworld")
        monkeypatch.setattr("openvla.evaluation.metaworld.MetaWorld.unnorm_keys", ("goal", "metaworld"))
        run(tmp_path / "known", **short)


def test_episodes_that_repeat_others_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr("openvla.evaluation.metaworld.MetaWorld.initial_states", 1, raising=False)
    with pytest.warns(UserWarning, match="episodes=2: each task of 'metaworld' begins in 1 states"):
        run(tmp_path, policy="expert", max_steps=1, tasks="reach-v3")


def test_a_policy_of_another_kind(tmp_path):
    class Up:
        def act(self, observations):
            return np.tile([0.0, 0, 1, 0, 0, 0, 1], (len(observations), 2, 1))  # two steps each

        def __repr__(self):
            return "up and away"

    assert run(tmp_path, policy=Up(), max_steps=5, episodes=1)["mean_success"] == 0.0
    assert [entry["predictions"] for entry in episodes(tmp_path)] == [3, 3]
    assert "policy: `up and away`" in (tmp_path / "report.md").read_text()
    loading = {"dtype": "float32", "quantization": "int4", "decoding": "mean", "pixels": "oft", "unnorm_key": "mine"}
    for name, value in {**loading, "action_head": "parallel_tokens", "action_chunk": 8}.items():  # stood in the report
        with pytest.raises(ValueError, match=f"{name}={value!r}: the policy given .Up. acts as it is"):
            run(tmp_path / "other", policy=Up(), **{name: value})
    del Up.__repr__
    with (
        pytest.warns(UserWarning, match="Give Up a __repr__ that says what it is"),
        pytest.raises(ValueError, match="another evaluation: policy was 'up and away'"),
    ):
        run(tmp_path, policy=Up(), max_steps=5, episodes=1)


def small_model(folder: Path) -> Path:
    """As much of a model folder as reference policies read, with weights that are none."""
    folder.mkdir()
    for name in ("config.json", "dataset_statistics.json"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "model.safetensors").write_text("weights")
    return folder


class Still:
    """In place of a model, of a folder with 8 bits."""

    config = SimpleNamespace(quantization_config=OpenVLAQuantizationConfig(8))
    model = SimpleNamespace(dtype=torch.bfloat16, config=config)

    def __repr__(self):
        return "still"

    def act(self, observations):
        return np.zeros((len(observations), 7))


def test_episodes_of_other_files_are_not_taken_for_those_of_this_model(tmp_path, monkeypatch):
    model, loaded = small_model(tmp_path / "my_robot"), []
    monkeypatch.setattr(candidate.OpenVLAPolicy, "load", lambda *a, **k: loaded.append(a) or Still())
    options = {"tasks": "reach-v3", "episodes": 1, "max_steps": 1, "render": False, "videos": 0, "progress": False}

    def again(policy="model"):
        return evaluate(model=str(model), output=tmp_path / "out", policy=policy, workers=1, **options)

    again()
    for file in tmp_path.glob("out/*"):
        assert file.suffix == ".png" or str(tmp_path) not in file.read_text(), file
    assert "- quantization: `int8`" in (tmp_path / "out" / "report.md").read_text()  # as the folder is
    again()
    (model / "model.safetensors").write_text("trained further")
    with pytest.raises(ValueError, match="with other weights.*another output folder"):
        again()
    (model / "model.safetensors").write_text("weights")
    statistics = json.loads((model / "dataset_statistics.json").read_text())
    next(iter(statistics.values()))["action"]["q99"][0] *= 1.5
    (model / "dataset_statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="with other statistics"):
        again()
    assert len(loaded) == 2  # refused before the weights are read

    settings = tmp_path / "out" / "evaluation.json"  # of an older version: the path, no digests
    before = json.loads(settings.read_text())
    del before["digests"]
    settings.write_text(json.dumps({**before, "model": str(model)}))
    again()
    settings.unlink()
    with pytest.raises(ValueError, match="no evaluation.json"):
        again()


def test_an_adapter_is_known_by_its_base_as_well(tmp_path):
    """Other weights under an adapter make other actions."""
    base, adapter = small_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "../base"}')
    (adapter / "adapter_model.safetensors").write_text("adapter")
    before = file_digests(adapter)
    (base / "model.safetensors").write_text("other weights")
    after = file_digests(adapter)
    assert after["weights"] == before["weights"] and after["base"] != before["base"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps({"digests": before}))
    with pytest.raises(ValueError, match="episodes of 'mine' with other base"):
        begun.earlier_settings(tmp_path / "out", {"digests": after}, "mine")
    del before["base"]  # as older versions wrote it
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps({"digests": before}))
    begun.earlier_settings(tmp_path / "out", {"digests": after}, "mine")


@pytest.mark.parametrize(
    "edited",
    [{"digests": 3}, {"latency": "0.1"}, {"latency": math.nan}, {"device": 3}, {"quantization": ["int8"]}, {"axis": 1}],
    ids=str,
)
def test_settings_that_were_edited_are_refused_in_words(edited, tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=f"says {next(iter(edited))}=.*the file was edited. Choose another folder"):
        begun.earlier_settings(tmp_path, {"digests": {}}, "mine")


def test_pixels_are_compared_and_reported_where_they_were_given(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(candidate.OpenVLAPolicy, "load", lambda model, pixels, **more: loaded.append(pixels) or Still())
    monkeypatch.setattr(evaluate_module, "check_older_pixels", lambda *given: None)  # there are none to compare
    options = {"policy": "model", "tasks": "reach-v3", "episodes": 1, "max_steps": 1}
    run(tmp_path / "as_stored", **options)
    run(tmp_path / "given", **options, pixels="libero")
    for name, expected in (("as_stored", None), ("given", "libero")):
        assert json.loads((tmp_path / name / "evaluation.json").read_text()).get("pixels") == expected
        assert ("pixels: `libero`" in (tmp_path / name / "report.md").read_text()) == (expected is not None)
    with pytest.raises(ValueError, match="pixels was 'libero', is None"):
        run(tmp_path / "given", **options)
    with pytest.raises(ValueError, match="pixels='center'.*published, libero"):
        run(tmp_path / "other", **options, pixels="center")

    settings = tmp_path / "as_stored" / "evaluation.json"  # of an older version
    before = json.loads(settings.read_text())
    del before["format_version"]
    settings.write_text(json.dumps({**before, "center_crop": False}))
    run(tmp_path / "as_stored", **options)
    assert loaded == [None, "libero", None]
    assert "center_crop" not in json.loads(settings.read_text())


def test_files_of_somebody_else_are_not_replaced(tmp_path):
    options = {"render": False, "progress": False, "episodes": 1, "tasks": "reach-v3"}
    for name in ("report.md", "videos"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / name).touch()
        with pytest.raises(ValueError, match=f"holds {name} but no evaluation.json"):
            evaluate(policy="expert", output=tmp_path / name, **options)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    for name in ("finetune.json", "config.json"):  # a run, and a model that is not the one evaluated
        (tmp_path / f"of {name}").mkdir()
        (tmp_path / f"of {name}" / name).touch()
        with pytest.raises(ValueError, match=f"holds {name}, so it is a model or a training run: give a folder of its"):
            evaluate(policy="expert", output=tmp_path / f"of {name}", **options)
        assert [path.name for path in (tmp_path / f"of {name}").iterdir()] == [name]
    model = small_model(tmp_path / "model")
    with pytest.raises(ValueError, match="is the model: give a folder of its own"):
        evaluate(model=str(model), output=model, **options)


def test_a_model_of_another_robot_is_refused_before_its_weights_are_read(tmp_path):
    model = small_model(tmp_path / "my_robot")
    two_arms = {"action": {name: [-1.0 if name == "q01" else 1.0] * 14 for name in ("q01", "q99")}}
    (model / "dataset_statistics.json").write_text(json.dumps({"aloha": two_arms}))
    options = {"output": tmp_path / "out", "render": False}
    with pytest.raises(ValueError, match="have 14 dimensions, those of 'metaworld' 7"):
        evaluate(model=str(model), **options)
    with pytest.raises(KeyError, match="unnorm_key='bridge'"):
        evaluate(model=str(model), unnorm_key="bridge", **options)
    assert not (tmp_path / "out").exists()
    of_one_arm = small_model(tmp_path / "one_step")
    with pytest.raises(ValueError, match=r"execute=4: '.*one_step' predicts 1 step\(s\) at once"):
        evaluate(model=str(of_one_arm), execute=4, **options)
    # Nine numbers of a state, as robomimic records them, where the simulator gives eight
    model = small_model(tmp_path / "states")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "proprio_dim": 9}))
    with pytest.raises(ValueError, match=r"sees a state of 9 numbers, and 'metaworld' gives 8 \(x, y, z"):
        evaluate(model=str(model), **options)
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="Another process"):
        run(tmp_path / "out", policy="expert")


def test_opengl_is_looked_for_before_weights_are_read(tmp_path, monkeypatch):
    def nothing():
        raise NoOpenGL("No OpenGL to render with. Install one of them, for example apt-get install libegl1")

    monkeypatch.setattr(evaluate_module, "opengl_backend", nothing)
    found = CliRunner().invoke(app, ["evaluate", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert found.exit_code == 3 and found.stderr.startswith("error: No OpenGL") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken, code", [(2, 1), (1, 0)])
def test_broken_episodes_are_said(broken, code, tmp_path, monkeypatch):
    record = EpisodeResult("reach-v3", 0, 1_000_000, "reach the goal", True, 5, 5, 0.1)
    records = [replace(record, episode=number) for number in range(2)]
    records[:broken] = [replace(entry, success=False, error="the arm fell off.") for entry in records[:broken]]
    monkeypatch.setattr(evaluate_module, "run_episodes", lambda *a, **k: records)
    monkeypatch.setattr(evaluate_module, "opengl_backend", lambda: "none")
    arguments = ["--policy", "expert", "--tasks", "reach-v3", "--episodes", "2", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(app, ["evaluate", *arguments])
    assert found.exit_code == code, found.output
    assert ("error: all 2 episodes" if code else "warning: 1 of 2 episodes") in found.stderr
    assert (
        "the arm fell off. The same command" in found.stderr
        and "the arm fell off" in (tmp_path / "out" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    "wrong",
    [{"max_steps": 0}, {"workers": 0}, {"latency": -1.0, "control": "realtime"}, {"hz": 5.0}, {"latency": 0.1}],
)
def test_options_that_would_be_taken_as_something_else(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        run(tmp_path / "out", policy="expert", **wrong)


def test_options_of_a_model_that_does_not_act_are_refused():
    """They stood in the report, as if the expert had been quantized."""
    own = {"model": "mine", "unnorm_key": "bridge"}
    of_model = {"dtype": "bfloat16", "quantization": "int8", "decoding": "mean", "pixels": "oft"}
    for policy, unused in (("expert", own | of_model), ("random", of_model), ("mean", of_model)):
        for name, value in unused.items():
            with pytest.raises(ValueError, match=f"{name}='{value}': policy='{policy}' has no use for it"):
                EvaluateOptions(output="out", policy=policy, **{name: value})
            if name != "pixels":
                with pytest.raises(ValueError, match=f"{name}='{value}'"):
                    DemoOptions(policy=policy, **{name: value})
    assert EvaluateOptions(output="out", policy="mean", **own) and EvaluateOptions(output="out", **own, **of_model)
    wrong = CliRunner().invoke(app, ["demo", "--policy", "expert", "--quantization", "int8"])
    assert wrong.exit_code == 2 and "--quantization 'int8': --policy 'expert' has no use for it" in wrong.output


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
