"""The closed loop on a world whose outcome is known: modes, failures, resume, videos, reports."""

import importlib
import json
import pickle
import sys
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from toy import FromPixels, Imports, ToPose, make_line

import openvla_console
import openvla_light
from openvla.evaluation.control import RealtimeControl
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.loop import Job, run_episodes
from openvla.evaluation.report import append_result, read_results, summarize, write_report
from openvla.evaluation.workers import EnvironmentProcess, _preload


ROOT = Path(__file__).resolve().parents[1]
START = np.array([0, 0, 0, 0, 0, 0, 1.0])
JOBS = [Job(task, episode, seed=100 + episode) for task in ("left", "right") for episode in range(4)]


def run(folder, jobs=JOBS, policy=None, **options):
    options = {"videos": 0, "progress": False, "max_steps": 40, **options}
    return run_episodes(policy or FromPixels(), make_line, jobs, folder, **options)


def test_a_policy_that_sees_succeeds_and_is_asked_in_batches(tmp_path):
    policy = FromPixels()
    records = run(tmp_path, policy=policy, workers=3)
    assert [(record.task, record.episode, record.seed) for record in records] == [
        (job.task, job.episode, job.seed) for job in JOBS
    ]
    assert all(record.success and record.error is None for record in records)
    starts = [abs(np.random.default_rng(job.seed).uniform(-1, 1)) for job in JOBS]
    for record, start in zip(records, starts):
        assert record.steps == record.predictions == pytest.approx(np.ceil((start - 0.06) / 0.1), abs=1)
        assert record.instruction == f"move to the goal ({record.task})" and record.latency > 0
    assert max(policy.batches) == 3


def test_the_expert_and_a_limit_of_steps(tmp_path):
    assert all(
        record.success for record in run_episodes(None, make_line, JOBS[:2], tmp_path / "expert", progress=False)
    )
    short = run(tmp_path / "short", max_steps=1)
    assert {record.steps for record in short} == {1} and not all(record.success for record in short)


def test_real_time_without_latency_is_blocking(tmp_path):
    blocking = run(tmp_path / "blocking")
    realtime = run(tmp_path / "realtime", control=partial(RealtimeControl, 5.0, START), latency=0.0)
    outcome = [(record.success, record.steps, record.predictions) for record in blocking]
    assert [(record.success, record.steps, record.predictions) for record in realtime] == outcome


def test_late_actions_cost_steps(tmp_path):
    """0.8 s at 5 Hz: the point goes past the goal and back."""
    prompt = run(tmp_path / "prompt")
    late = run(tmp_path / "late", control=partial(RealtimeControl, 5.0, START), latency=0.8)
    assert sum(record.steps for record in late) > sum(record.steps for record in prompt)
    assert all(record.predictions <= record.steps / 4 + 1 for record in late)


def test_an_environment_that_breaks_breaks_nothing_else(tmp_path):
    jobs = [Job("raise", 0, 100), Job("left", 0, 100), Job("die", 0, 101), *JOBS[1:4]]
    records = run(tmp_path, jobs)
    assert [record.error for record in records].count(None) == 4
    assert "the arm fell off in arm.xml" in records[0].error  # no path of this machine: others read it
    assert "exit code 3" in records[2].error
    assert summarize(records)["errors"] == 2 and all(record.success for record in records if record.error is None)


def test_simulators_import_neither_torch_nor_transformers():
    process = EnvironmentProcess(Imports)
    process.ask("heavy")
    assert process.answer() == []
    process.stop()


def test_a_package_that_is_put_off_is_executed_when_it_is_asked_for_a_name(tmp_path, monkeypatch):
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "__init__.py").write_text("from .part import value\nname = 'executed'\n")
    (tmp_path / "later" / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = openvla_light.put_off("later")
    part = importlib.import_module("later.part")
    with pytest.raises(AttributeError, match="'later' has no attribute '__wrapped__'"):
        package.__wrapped__  # noqa: B018
    assert part.value == 1 and "name" not in vars(package)
    from later import name

    assert name == "executed" and package.value == 1
    with pytest.raises(AttributeError):
        package.other  # noqa: B018


@pytest.mark.parametrize(
    "main, expected",
    [
        ({}, "openvla_light"),
        ({"__file__": "/usr/bin/openvla", "main": openvla_console.main}, "openvla_light"),
        ({"__file__": "mine.py"}, "openvla"),
        ({"__spec__": ModuleSpec("pytest.__main__", None)}, "openvla_light"),
        ({"__spec__": ModuleSpec("mine", None), "__file__": "mine.py"}, "openvla"),
    ],
)
def test_a_script_that_each_simulator_executes_again_finds_its_imports(main, expected, monkeypatch):
    """Once for all processes, instead of once in each."""
    module = ModuleType("__main__")
    vars(module).update(main)
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert _preload()[0] == expected


def test_a_killed_run_goes_on_and_reports_the_same(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", JOBS[:3])
    file = tmp_path / "killed" / "episodes.jsonl"
    with file.open("a") as stream:
        stream.write('{"task": "left", "epi')
    policy = FromPixels()
    resumed = run(tmp_path / "killed", policy=policy)
    same = [(r.task, r.episode, r.success, r.steps) for r in whole]
    assert [(r.task, r.episode, r.success, r.steps) for r in resumed] == same
    assert sum(policy.batches) == sum(record.predictions for record in resumed[3:])  # only what was missing was run
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == len(JOBS)


def test_an_episode_of_another_seed_is_not_taken_for_this_one(tmp_path):
    run(tmp_path, JOBS[:2])
    held = (tmp_path / "episodes.jsonl").read_text()
    with pytest.raises(ValueError, match="holds episode 1 of left from seed 101, and 7 is asked for"):
        run(tmp_path, [JOBS[0], replace(JOBS[1], seed=7)])
    assert (tmp_path / "episodes.jsonl").read_text() == held


def test_a_simulator_that_cannot_be_started(tmp_path):
    """What was in the way was hidden: the process, which never began, could not be stopped."""
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        run_episodes(FromPixels(), lambda: None, JOBS[:1], tmp_path, progress=False)


def test_what_broke_gets_another_try(tmp_path):
    (whole, other) = run(tmp_path, JOBS[:2])
    append_result(tmp_path / "episodes.jsonl", replace(whole, episode=2, success=False, error="the arm fell off"))
    append_result(tmp_path / "episodes.jsonl", whole)  # of a file that was put together of two
    policy = FromPixels()
    records = run(tmp_path, JOBS[:3], policy=policy)
    assert records[:2] == [whole, other] and records[2].success and records[2].error is None
    assert sum(policy.batches) == records[2].predictions
    assert read_results(tmp_path / "episodes.jsonl") == records


@pytest.mark.parametrize(
    "answer",
    [
        np.full((1, 7), np.nan),
        np.zeros(7),
        np.zeros((2, 7)),
        np.zeros((1, 6)),
        np.zeros((1, 14)),
        np.zeros((1, 0, 7)),
        np.full((1, 7), 1e9),
        np.full((1, 3, 7), -np.inf),
        np.array([["0"] * 7]),
        None,
    ],
)
def test_what_is_no_action_is_not_executed(answer, tmp_path):
    class Broken:
        def act(self, observations):
            return answer

    with pytest.raises(ValueError, match="expected (finite )?"):
        run(tmp_path, JOBS[:1], policy=Broken())
    assert not (tmp_path / "episodes.jsonl").exists()


@pytest.mark.parametrize(
    "says, said",
    [
        ({"reset": lambda self: None}, "reset of Says: .* Expected reset.slot.: several episodes"),
        ({"action_chunk": None}, "action_chunk=None of Says: expected the steps of an answer"),
    ],
)
def test_what_a_policy_says_of_itself(says, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(tmp_path, JOBS[:1], policy=type("Says", (FromPixels,), says)())


@pytest.mark.parametrize("passes", [[float("nan")], None, 3, [1, 2], [-1]], ids=str)
def test_passes_that_are_none_do_not_spoil_a_record(passes, tmp_path):
    """The record was none when it was read again, and the episode ran again."""
    policy = type("Says", (FromPixels,), {"passes": passes})()
    (record,) = run(tmp_path, JOBS[:1], policy=policy)
    assert record.passes is None and read_results(tmp_path / "episodes.jsonl") == [record]


def test_why_environments_broke_is_said_once_and_reported_without_paths(tmp_path, capfd):
    records = run(tmp_path, [Job("raise", 0, 100), Job("raise", 1, 101), Job("left", 0, 100)], workers=1)
    assert capfd.readouterr().err.count("the arm fell off") == 1
    records.append(replace(records[0], episode=2, error="FileNotFoundError: no meshes in '/home/me/data/meshes'"))
    summary = write_report(tmp_path, records, {})
    assert summary["errors"] == 3 and summary["episodes"] == 1
    assert next(iter(summary["reasons"].items())) == ("RuntimeError: the arm fell off in arm.xml", 2)
    for file in ("report.md", "report.json"):
        text = (tmp_path / file).read_text()
        assert "the arm fell off" in text and "no meshes in 'meshes'" in text and "/home" not in text
    assert not list(tmp_path.glob("*.part"))


def test_films(tmp_path):
    av = pytest.importorskip("av", reason="videos need the [data] extra")
    run(tmp_path, JOBS[:2], videos=1)
    (film,) = (tmp_path / "videos").iterdir()
    assert film.name == "left_000.mp4"
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (record, _) = run(tmp_path, JOBS[:2])
    assert len(frames) == record.steps + 20 and frames[0].shape[1] == 448
    border = frames[-1][200, 1].astype(int)
    assert border[1] > border[0] + 50  # green: success
    inside = [round(float(frame[200, 224].mean())) for frame in (frames[record.steps - 1], frames[-1])]
    assert inside[1] != inside[0] and abs(inside[1] - 120) <= 5  # the outcome is seen where it came about: at the goal
    run(tmp_path / "broken", [Job("raise", 0, 100)], videos=1)
    with av.open(str(tmp_path / "broken" / "videos" / "raise_000.mp4")) as container:
        *_, last = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    border = last[200, 1].astype(int)
    assert max(border) - min(border) < 20  # gray: it broke, which is no failure


def test_a_policy_is_told_when_an_episode_begins_and_whose_observations_it_sees(tmp_path):
    """What it keeps between two steps of an episode, it keeps by slot: others go on at the same time."""

    class Counts(FromPixels):
        def __init__(self):
            super().__init__()
            self.steps, self.begun = {}, 0

        def reset(self, slot=0):
            self.steps[slot], self.begun = 0, self.begun + 1

        def act(self, observations):
            for observation in observations:
                self.steps[observation.slot] += 1
            return super().act(observations)

    policy = Counts()
    records = run(tmp_path, policy=policy, workers=3)
    assert policy.begun == len(JOBS) and sorted(policy.steps) == [0, 1, 2]
    last = {record.predictions for record in records}
    assert set(policy.steps.values()) <= last


@pytest.mark.parametrize(
    "options",
    [{}, {"control": "realtime", "latency": 0.15}, {"control": "realtime", "latency": 0.35, "late": "still"}],
    ids=["blocking", "realtime", "still"],
)
def test_fourteen_numbers_drive_in_every_mode(options, tmp_path):
    """Joint positions of two arms: places, of which standing still is no zero."""
    given = {"env": "toy:TwoArms", "tasks": "all", "episodes": 2, "videos": 0, "workers": 2, "progress": False}
    summary = evaluate(model=str(ROOT), output=tmp_path, policy=ToPose(), **given, **options)
    assert summary["mean_success"] == 1.0
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    assert settings.get("late") == options.get("late")
    with pytest.raises(ValueError, match=r"expected finite \(\d+, 14\)"):
        evaluate(model=str(ROOT), output=tmp_path / "seven", policy=FromPixels7(), **given)
    with pytest.raises(ValueError, match="have 7 dimensions, those of 'toy:TwoArms' 14"):
        evaluate(model=str(ROOT), output=tmp_path / "model", **given)


def test_films_that_come_too_late_are_said(tmp_path):
    pytest.importorskip("av", reason="videos need the [data] extra")
    given = {"env": "toy:TwoArms", "tasks": "all", "workers": 1, "progress": False, "policy": ToPose()}
    evaluate(output=tmp_path, episodes=1, videos=0, **given)
    with pytest.warns(UserWarning, match="videos=2: 1 of these episodes were run before without a video"):
        evaluate(output=tmp_path, episodes=2, videos=2, **given)
    assert [film.name for film in (tmp_path / "videos").iterdir()] == ["pose_001.mp4"]


class FromPixels7:
    def __repr__(self):
        return "seven zeros"

    def act(self, observations):
        return np.zeros((len(observations), 7))


def test_late_is_an_option_of_real_time(tmp_path):
    with pytest.raises(ValueError, match="late=still: only for control='realtime'"):
        evaluate(model=str(ROOT), output=tmp_path, env="toy:TwoArms", tasks="all", late="still")
