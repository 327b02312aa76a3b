"""Recording: experts' episodes as a data set, the same whoever records it and however often it is interrupted."""

import itertools
import json
from contextlib import suppress
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import processes
import pytest
import torch
from toy import TwoArms
from typer.testing import CliRunner

from openvla import OpenVLAConfig
from openvla.action_spec import ActionSpec, usual_spec
from openvla.cli import app
from openvla.data import open_dataset
from openvla.data.open_source import open_source
from openvla.data.source import statistics_with_spec
from openvla.data.writers.hdf5 import write_hdf5
from openvla.data.writers.lerobot import write_lerobot
from openvla.evaluation import RECORDING_SEEDS, make_environment, recorder
from openvla.evaluation import record as record_module
from openvla.evaluation.environment import standstill
from openvla.evaluation.expert_episode import LateAnswers, is_episode, load_episode, record_episode, save_episode
from openvla.evaluation.record import published, record
from openvla.evaluation.recorder import Recorder
from openvla.folders import locked
from openvla.observation import Observation
from openvla.options.evaluation import RecordOptions


TASK = "reach-v3"


class Point:
    """A point that is to reach 0, which it does from positive seeds only. Keeps what is executed."""

    tasks, max_steps, frequency, state_names = ("go",), 40, 20.0, ("x",)

    def instructions(self, task, *, held_out=False):
        return ("go home", "return", "come back", "move to zero")

    def reset(self, seed, task, variation=""):
        self.position, self.stuck, self.executed = 1.0, seed < 10_000, []
        return self._observe()

    def _observe(self):
        image = np.full((8, 8, 3), int(abs(self.position) * 100) % 256, np.uint8)
        return Observation({"image": image}, np.array([self.position], np.float32), "go home")

    def expert_action(self):
        return np.array([-np.clip(self.position, -0.1, 0.1), 0, 0, 0, 0, 0, 1.0])

    def step(self, action):
        self.executed.append(action)
        self.position += 0 if self.stuck else float(action[0])
        return self._observe(), abs(self.position) < 0.05

    def close(self):
        pass


def options(tmp_path, **more) -> RecordOptions:
    return RecordOptions(**{"output": str(tmp_path / "out"), "tasks": TASK, "episodes": 2, "size": 32} | more)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_episode_is_what_was_seen_before_each_action_and_goes_on_after_success():
    episode = record_episode(Point(), "go", 10_000, after_success=3, image_format="png")
    assert len(episode) == 10 + 3
    np.testing.assert_allclose(episode.state[:4, 0], [1.0, 0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(episode.actions[0], [-0.1, 0, 0, 0, 0, 0, 1], rtol=1e-6)
    assert episode.images["image"][0][0, 0, 0] == 100 and episode.images["image"][2][0, 0, 0] in (79, 80)
    assert episode.instruction == "go home"


def test_a_simulator_that_gives_one_array_for_all_states():
    """All states of an episode were its last one."""

    class InPlace(Point):
        def _observe(self):
            self.state = getattr(self, "state", np.zeros(1, np.float32))
            self.state[0] = self.position
            return replace(super()._observe(), state=self.state)

    expected = record_episode(Point(), "go", 10_000).state
    np.testing.assert_array_equal(record_episode(InPlace(), "go", 10_000).state, expected)


def test_noise_is_executed_and_the_clean_answer_is_recorded():
    point = Point()
    episode = record_episode(point, "go", 10_000, noise=0.05)
    executed = np.stack(point.executed)
    difference = executed - episode.actions
    assert difference[:, :3].any(axis=1).all() and not difference[:, 3:].any()
    np.testing.assert_allclose(episode.actions[:, 0], -np.clip(episode.state[:, 0], -0.1, 0.1), rtol=1e-5)
    np.testing.assert_array_equal(episode.executed, executed)
    again = record_episode(Point(), "go", 10_000, noise=0.05)
    np.testing.assert_array_equal(again.state, episode.state)
    assert record_episode(Point(), "go", 10_000).executed is None  # what was executed is what was recorded


def test_late_answers_are_executed_and_what_was_seen_is_answered():
    """`delay` 3: at most steps the newest answer, else one of the three before it, for one to three steps; before the
    first answer the robot stands still."""
    ages = []
    for seed in range(10_000, 10_040):
        point = Point()
        point.action_spec, point.frequency = usual_spec(7), 20.0
        episode = record_episode(point, "go", seed, delay=3, after_success=20)
        executed = np.stack(point.executed)
        np.testing.assert_allclose(episode.actions[:, 0], -np.clip(episode.state[:, 0], -0.1, 0.1), rtol=1e-5)
        np.testing.assert_array_equal(episode.executed, executed)
        for step, action in enumerate(executed):
            could = [age for age in range(4) if age <= step and np.array_equal(action, episode.actions[step - age])]
            could += [-1] if step < 3 and np.array_equal(action, standstill(point)) else []
            assert could, (seed, step)
            ages.append(could[0])
    assert 0 < ages.count(-1) < 80 and set(ages) == {-1, 0, 1, 2, 3}
    again = record_episode(point, "go", seed, delay=3, after_success=20)
    np.testing.assert_array_equal(again.executed, episode.executed)


def test_late_answers_last_as_long_as_is_said():
    generator = np.random.default_rng(0)
    spells, between, oldest = set(), set(), set()
    for _ in range(200):
        late = LateAnswers(3, np.full(1, -1.0), generator)
        ages = [step - int(late.executed([np.array([n]) for n in range(step + 1)])[0]) for step in range(40)]
        runs = [(age, len(list(run))) for age, run in itertools.groupby(ages[4:-4])][1:-1]
        spells |= {length for age, length in runs if age}
        between |= {length for age, length in runs if not age}
        oldest.add(max(ages[4:]))
    assert spells == {1, 2, 3} and max(oldest) == 3 and between == {1, 2, 3, 4, 5, 6}


def test_a_late_student_continues_what_is_executed():
    """Of a student that takes up to 0.2 s, the world sees what `RealtimeControl` makes of it; it is asked again when it
    is free, and told what is executed until its answer is there."""

    class Student:
        action_chunk = 8

        def act(self, observations):
            (observation,) = observations
            self.asked.append((observation.step, observation.committed))
            return np.array([[[-0.001 * (observation.step + 1), 0, 0, 0, 0, 0, 0.5]] * 8])

    most, waited = set(), set()
    for seed in range(10_000, 10_020):
        point, student = Point(), Student()
        point.action_spec, point.frequency, student.asked = usual_spec(7), 20.0, []
        record_episode(point, "go", seed, student=student, latency=0.2)
        executed = np.stack(point.executed)
        driven = next((step for step, action in enumerate(executed) if action[0] == np.float32(-0.1)), len(executed))
        for (before, _), (step, committed) in itertools.pairwise(student.asked):
            waited.add(step - before)
            last = min(step + len(committed), driven)  # then the expert has it
            np.testing.assert_array_equal(committed[: last - step], executed[step:last])
            most.add(len(committed))
        if student.asked:
            step, committed = student.asked[0]  # nothing is there yet: it stands still, and is told so
            assert step == 0 and 1 <= len(committed) <= 4
            np.testing.assert_array_equal(committed, [standstill(point)] * len(committed))
            last = min(len(committed), driven)
            np.testing.assert_array_equal(committed[:last], executed[:last])
    assert most == {1, 2, 3, 4} and waited == {1, 2, 3}  # what an answer needs beyond whole steps adds up


def test_each_episode_draws_its_own_noise_up_to_the_strongest():
    """Standard deviations of y and z, which nothing else moves: uniform between 0 and `noise`."""
    strengths = []
    for seed in range(10_000, 10_100):
        point = Point()
        if record_episode(point, "go", seed, noise=0.02, after_success=200) is not None:
            strengths.append(np.stack(point.executed)[:, 1:3].std())
    assert len(strengths) > 75 and max(strengths) < 0.02 * 1.15  # 400 samples: within 15%
    np.testing.assert_allclose(np.quantile(strengths, [0.25, 0.5, 0.75]), [0.005, 0.01, 0.015], atol=0.002)


def test_a_student_acts_and_the_expert_answers():
    """The student walks away from 0, for as many steps as were drawn; the expert brings it back, and is recorded."""

    class Student:
        told: list[str] = []

        def act(self, observations):
            self.told += [observation.instruction for observation in observations]
            return np.tile([0.1, 0, 0, 0, 0, 0, 1.0], (len(observations), 1))

    driven = set()
    for seed in range(10_000, 10_020):
        point, student = Point(), Student()
        student.told = []
        episode = record_episode(point, "go", seed, student=student, paraphrases=True)
        if episode is None:  # walked too far to be back in time
            continue
        steps = len(student.told)
        assert set(student.told) == {episode.instruction}
        np.testing.assert_allclose(np.stack(point.executed)[:steps, 0], 0.1)
        assert (episode.actions[:steps, 0] < 0).all() and episode.state[steps, 0] == pytest.approx(1 + 0.1 * steps)
        driven.add(steps)
    assert len(driven) > 4 and max(driven) <= Point.max_steps // 2 + 1

    class Broken:
        def act(self, observations):
            return np.full((1, 7), np.nan)

    with pytest.raises(ValueError, match="expected finite numbers"):
        record_episode(Point(), "go", 10_000, student=Broken())


def test_what_a_student_draws_is_of_its_episode(tmp_path, monkeypatch):
    """A head that begins with noise: an episode is the same, whatever was recorded before it in this process."""

    class Diffusion:
        def act(self, observations):
            return np.array([[*torch.randn(3).tolist(), 0, 0, 0, 1.0]]) / 100

    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: Point())
    monkeypatch.setattr(recorder, "statistics_of", lambda folder: {"mine": {}})
    monkeypatch.setattr(recorder.OpenVLAPolicy, "load", lambda model, **given: Diffusion())
    one = Recorder(options(tmp_path, student=str(tmp_path)))
    for name in ("first", "second"):
        one.record("go", "", 3, tmp_path / f"{name}.npz")
    first, second = (load_episode(tmp_path / f"{name}.npz", "") for name in ("first", "second"))
    assert first.executed[0, 1] != 0
    np.testing.assert_array_equal(first.executed, second.executed)


def test_trying_without_pictures_first_changes_nothing_in_what_is_recorded(tmp_path, monkeypatch):
    """With noise the expert fails for some seeds: the same seed is found, and the same episode of it."""
    tried = []

    class Seeing(Point):
        def __init__(self, render=True):
            self.render = render

        def reset(self, seed, task, variation=""):
            tried.append((self.render, seed))
            return super().reset(seed, task, variation)

        def _observe(self):
            seen = super()._observe()
            return seen if self.render else replace(seen, images={})

    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: Seeing(**more))
    blind_first = Recorder(options(tmp_path, noise=0.05))
    blind_first.record("go", "", 3, tmp_path / "blind_first.npz")
    assert tried == [(False, 3), (False, RECORDING_SEEDS[10_003]), (True, RECORDING_SEEDS[10_003])]
    seeing = Recorder(options(tmp_path, noise=0.05))
    seeing.blind = None
    seeing.record("go", "", 3, tmp_path / "seeing.npz")
    assert (tmp_path / "blind_first.npz").read_bytes() == (tmp_path / "seeing.npz").read_bytes()


def test_a_simulator_without_pictures_goes_the_same_way(opengl):
    """What the blind first try stands on, in Meta-World with noise."""
    episodes = []
    for render in (True, False):
        environment = make_environment("metaworld", size=32, render=render)
        episodes.append(record_episode(environment, "drawer-open-v3", 4, noise=0.3, paraphrases=True))
        environment.close()
    seeing, blind = episodes
    np.testing.assert_array_equal(seeing.actions, blind.actions)
    np.testing.assert_array_equal(seeing.state, blind.state)
    assert seeing.instruction == blind.instruction and list(seeing.images) == ["image"] and not blind.images


def test_paraphrases_are_drawn_by_the_seed():
    texts = [record_episode(Point(), "go", seed, paraphrases=True).instruction for seed in range(10_000, 10_030)]
    assert set(texts) == set(Point().instructions("go"))

    class Reworded(Point):
        def reset(self, seed, task, variation=""):
            return replace(super().reset(seed, task), instruction="unheard words")

    assert record_episode(Reworded(), "go", 10_000, paraphrases=True).instruction == "unheard words"


def test_a_failed_attempt_is_counted_and_the_next_seed_tried(tmp_path, monkeypatch):
    assert record_episode(Point(), "go", 3) is None
    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: Point())
    Recorder(options(tmp_path)).record("go", "", 3, tmp_path / "file.npz")
    with np.load(tmp_path / "file.npz") as file:
        assert (int(file["failed"]), int(file["seed"])) == (1, RECORDING_SEEDS[10_003])
    monkeypatch.setattr(recorder, "ATTEMPTS", 1)
    with pytest.raises(ValueError, match="failed 1 times at 'go'"):
        Recorder(options(tmp_path)).record("go", "", 3, tmp_path / "other.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file.npz"]


def test_an_episode_survives_its_file(tmp_path):
    episode = record_episode(Point(), "go", 10_000)
    save_episode(episode, tmp_path / "file.npz", seed=1, failed=0)
    found = load_episode(tmp_path / "file.npz", "made")
    np.testing.assert_array_equal(found.actions, episode.actions)
    np.testing.assert_array_equal(found.state, episode.state)
    assert found.images["image"].encoded == episode.images["image"].encoded
    assert found.instruction == episode.instruction
    noisy = record_episode(Point(), "go", 10_000, noise=0.05)
    save_episode(noisy, tmp_path / "noisy.npz", seed=1, failed=0)
    np.testing.assert_array_equal(load_episode(tmp_path / "noisy.npz", "made").executed, noisy.executed)
    assert is_episode(tmp_path / "noisy.npz", executed=True)
    # What was recorded by a version that did not keep it is recorded again where it is needed.
    assert is_episode(tmp_path / "file.npz") and not is_episode(tmp_path / "file.npz", executed=True)


def test_episodes_that_a_student_drove_and_others_make_one_data_set(tmp_path):
    """A student answers in float64, the expert in float32: files that mixed them could not be written."""

    class Student:
        def act(self, observations):
            return np.array([[-0.01, 0, 0, 0, 0, 0, 1.0]])

    episodes = [record_episode(Point(), "go", seed, student=Student()) for seed in range(10_000, 10_060)]
    drove = [np.float32(-0.01) in episode.executed[:, 0] for episode in filter(None, episodes)]
    assert any(drove) and not all(drove)
    assert {episode.executed.dtype for episode in filter(None, episodes)} == {np.dtype(np.float32)}
    write_lerobot(filter(None, episodes), tmp_path / "data", fps=20)
    assert len(open_dataset(tmp_path / "data")) == len(drove)


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_what_was_executed_comes_back_from_files(format, tmp_path):
    noisy = [record_episode(Point(), "go", seed, noise=0.05, image_format="png") for seed in (10_000, 10_003)]
    if format == "lerobot":
        write_lerobot(noisy, tmp_path / "data", fps=20)
    else:
        write_hdf5(noisy, tmp_path / "data" / "go_demo.hdf5", env_name="go", frequency=20)
    for episode, found in zip(noisy, open_dataset(tmp_path / "data"), strict=True):
        np.testing.assert_array_equal(found.executed, episode.executed)
        assert (found.executed != found.actions).any()
        np.testing.assert_array_equal(found[3:5].executed, episode.executed[3:5])
    # Asked for as the action, it is one like any other.
    other = open_dataset(tmp_path / "data", action_key="executed_action")
    np.testing.assert_array_equal(other[0].actions, noisy[0].executed)
    assert other[0].executed is None


def test_a_recording_is_a_data_set_whose_actions_solve_the_task(tmp_path, opengl):
    summary = record(options(tmp_path, tasks=f"{TASK},drawer-close-v3"), progress=False)
    assert {task: counts["episodes"] for task, counts in summary["tasks"].items()} == {TASK: 2, "drawer-close-v3": 2}
    assert not (tmp_path / "out.partial").exists()
    dataset = open_dataset(tmp_path / "out")
    assert [episode.instruction for episode in dataset] == ["reach the goal", "close the drawer"] * 2
    assert dataset.info["fps"] == 20 and dataset.info["robot_type"] == "sawyer"
    episode = dataset[3]
    assert episode.images["image"][0].shape == (32, 32, 3)
    environment = make_environment("metaworld", render=False)
    states, successes = [environment.reset(RECORDING_SEEDS[1], "drawer-close-v3").state], []
    for action in episode.actions:
        observation, success = environment.step(action)
        states.append(observation.state)
        successes.append(success)
    environment.close()
    np.testing.assert_array_equal(np.stack(states[:-1]), episode.state)
    assert successes.index(True) == len(episode) - 6


SLIDE = """
import numpy as np
from openvla.observation import Observation

class Slide:
    tasks, task_sets, max_steps, frequency, robot, state_names = ("go", "come"), {}, 20, 12.5, "point", ("x",)
    dims = 7
    def instructions(self, task, *, held_out=False): return ("go home",)
    def variations(self, task): return ()
    def __init__(self, size=8): pass
    def reset(self, seed, task, variation=""):
        self.x = 1.0
        return self.see()
    def see(self):
        return Observation({"image": np.zeros((8, 8, 3), np.uint8)}, np.array([self.x], np.float32), "go home")
    def expert_action(self): return np.array([-0.5] + [0.0] * (self.dims - 1))
    def step(self, action):
        self.x += action[0]
        return self.see(), self.x < 0.1
    def close(self): pass

class Short(Slide):
    dims = 4
"""


def test_a_simulator_without_a_size(tmp_path, monkeypatch):
    """Nobody gave one, and the command was refused for it."""
    (tmp_path / "sizeless_simulator.py").write_text(SLIDE.replace("def __init__(self, size=8): pass", ""))
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"env": "sizeless_simulator:Slide", "tasks": "go", "after_success": 1}
    record(RecordOptions(output=str(tmp_path / "out"), episodes=1, **mine), progress=False)
    with pytest.raises(ValueError, match="option of sizeless_simulator:Slide='size' is unknown"):
        record(options(tmp_path, output=str(tmp_path / "other"), size=8, **mine), progress=False)


def test_states_without_a_name_for_each_number(tmp_path, monkeypatch):
    """It was said when all episodes were recorded."""
    (tmp_path / "slide_simulator.py").write_text(SLIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("slide_simulator.Slide.state_names", ("x", "y"))
    mine = options(tmp_path, env="slide_simulator:Slide", tasks="go", size=8, after_success=1)
    with pytest.raises(ValueError, match=r"gives states of 1 numbers and 2 state_names \(x, y\)"):
        record(mine, progress=False)
    assert not list((tmp_path / "out.partial" / "episodes").iterdir())


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_what_a_simulator_states_of_its_actions_reaches_the_model(format, tmp_path):
    """Of fourteen places two became grippers and the others changes, of which 0 stands still: a robot that was to hold
    moved to 0."""
    mine = RecordOptions(env="toy:TwoArms", tasks="pose", episodes=1, format=format, output=str(tmp_path / "out"))
    record(mine, progress=False)
    source = open_source(tmp_path / "out")
    assert source.action_spec == ActionSpec(TwoArms.state_names, (False,) * 14, hz=10.0)
    assert source.statistics["action"]["mask"] == [True] * 14
    (file,) = (tmp_path / "out").glob("*.hdf5") if format == "hdf5" else [tmp_path / "out"]
    given = statistics_with_spec(source)
    assert open_source(file, absolute_dims="0", gripper_dims="1").action_spec.relative == (False, False, *[True] * 12)
    (tmp_path / "out" / "recording.json").unlink()
    spec = open_source(file, statistics=given, name=source.name).action_spec
    assert not any(spec.relative) and not spec.grippers


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_what_wins_over_what_a_simulator_states(format, tmp_path, monkeypatch):
    """The rate is that of the recording, statistics of an earlier recording that stated nothing make no changes of
    places, a key that says what is read anyway leaves it, and so does a unit of its own."""
    monkeypatch.setattr(TwoArms, "frequency", 5.0)
    monkeypatch.setattr(TwoArms, "unit", "1 is half a turn", raising=False)
    out, mine = tmp_path / "out", {"env": "toy:TwoArms", "tasks": "pose", "episodes": 1, "format": format}
    record(RecordOptions(output=str(out), **mine), progress=False)
    stated = open_source(out).action_spec
    assert (stated.hz, stated.unit) == (5.0, "1 is half a turn")
    assert open_source(out, action_key="action" if format == "lerobot" else ["actions"]).action_spec == stated
    said = json.loads((out / "recording.json").read_text())
    (out / "recording.json").unlink()
    old = statistics_with_spec(open_source(out, unit="radians", hz=7))
    assert any(old["action_spec"]["relative"])
    (out / "recording.json").write_text(json.dumps(said))
    spec = open_source(out, statistics=old).action_spec
    assert not any(spec.relative) and not spec.grippers and (spec.unit, spec.hz) == ("radians", 7.0)
    said["action_spec"]["names"].pop(), said["action_spec"]["relative"].pop()
    (out / "recording.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="recording.json beside it is of actions of 13 numbers, and these have 14"):
        open_source(out)
    (out / "recording.json").write_text(json.dumps({**said, "action_spec": {"names": ["x"], "relative": [0]}}))
    with pytest.raises(ValueError, match=r"recording.json': action_spec: relative=\[0\], expected true or false"):
        open_source(out)


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_any_rate_and_tasks_with_the_same_words(format, tmp_path, monkeypatch):
    """The unit that the simulator states reaches the model: without it a prediction would be called metres."""
    (tmp_path / "slide_in_mm.py").write_text(SLIDE + "Slide.unit = '1 is 5 mm'\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = options(tmp_path, env="slide_in_mm:Slide", tasks="go,come", size=8, format=format, after_success=1)
    record(mine, progress=False)
    assert open_source(tmp_path / "out").action_spec.unit == "1 is 5 mm"
    assert open_source(tmp_path / "out", unit="metres").action_spec.unit == "metres"
    said = json.loads((tmp_path / "out" / "recording.json").read_text())
    del said["unit"]  # as of LIBERO, which says no more than the contract of environments
    (tmp_path / "out" / "recording.json").write_text(json.dumps(said))
    assert open_source(tmp_path / "out").action_spec.stated
    (tmp_path / "out" / "recording.json").write_text("[]")
    assert open_source(tmp_path / "out").action_spec.unit is None
    dataset = open_dataset(tmp_path / "out")
    assert len(dataset) == 4 and {episode.instruction for episode in dataset} == {"go home"}
    if format == "lerobot":
        assert dataset.info["fps"] == dataset.hz == 12.5  # was rounded: another rate in every policy made of it


def test_an_expert_of_other_numbers_is_refused_at_its_first_step(tmp_path, monkeypatch):
    """It was, when all episodes were recorded and the names of their numbers were to be written."""
    (tmp_path / "slide_simulator.py").write_text(SLIDE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="The expert of Short: .*expected 7 finite numbers.*need an action_spec"):
        record(options(tmp_path, env="slide_simulator:Short", tasks="go"), progress=False)


def test_interrupted_recordings_go_on_and_end_the_same(tmp_path, monkeypatch):
    """That Meta-World begins again in a second process: test_two_workers_record_what_one_does."""
    (tmp_path / "slide_simulator.py").write_text(SLIDE)
    monkeypatch.syspath_prepend(tmp_path)
    slide = {"env": "slide_simulator:Slide", "tasks": "go", "size": 8, "noise": 0.1, "episodes": 3}
    whole = options(tmp_path, output=str(tmp_path / "whole"), **slide)
    record(whole, progress=False)
    stopped = replace(whole, output=str(tmp_path / "stopped"), episodes=2)
    once = Recorder.record

    def interrupted(self, task, axis, number, file):
        if number == 1:
            raise KeyboardInterrupt
        once(self, task, axis, number, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "record", interrupted)
        record(stopped, progress=False)
    assert not (tmp_path / "stopped").exists()
    (tmp_path / "stopped.partial" / "whole").mkdir()  # as if the second stop came later
    with pytest.raises(ValueError, match="other options: noise 0.1, not 0.2"):
        record(replace(stopped, noise=0.2, episodes=3), progress=False)
    with pytest.raises(ValueError, match="other options: episodes 2, not 1. Give those, or another output.$"):
        record(replace(stopped, episodes=1), progress=False)
    stopped, numbers = replace(stopped, episodes=3), []
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", lambda self, *job: (numbers.append(job[2]), once(self, *job)))
        record(stopped, progress=False)
    assert numbers == [1, 2]
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_a_finished_recording_is_left_alone(tmp_path, monkeypatch, opengl):
    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: pytest.fail("recorded again"))
    (tmp_path / "out").mkdir()
    found = {"options": options(tmp_path).content(), "tasks": {}}
    (tmp_path / "out" / "recording.json").write_text(json.dumps(found))
    assert record(options(tmp_path, workers=2)) == found
    with pytest.raises(ValueError, match=r"other options: episodes 2, not 3.* \(--seed 2 --episodes 1\), and train on"):
        record(options(tmp_path, episodes=3))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        record(options(tmp_path, output=str(tmp_path / "else")))


def test_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: pytest.fail("recorded twice"))
    (tmp_path / "out.partial" / "episodes").mkdir(parents=True)
    with locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="Another process"):
        record(options(tmp_path))
    assert (tmp_path / "out.partial" / "episodes").is_dir()


def test_an_output_that_is_a_link(tmp_path, monkeypatch):
    """All was recorded, and the link could not be replaced."""

    def broken(*_, **__):
        raise OSError("could not be replaced")

    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    mine = RecordOptions(env="toy:TwoArms", tasks="pose", episodes=1, output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("openvla.evaluation.record.write_lerobot", broken)
        with pytest.raises(OSError, match="could not be replaced"):
            record(mine, progress=False)
    (tmp_path / "disk" / "data.partial").rename(tmp_path / "out.partial")  # where it was kept then
    monkeypatch.setattr(recorder.Recorder, "record", broken)  # what is there is not recorded again
    record(mine, progress=False)
    assert (tmp_path / "out").is_symlink() and len(open_dataset(tmp_path / "out")) == 1
    assert [path.name for path in (tmp_path / "disk").iterdir() if not path.name.startswith(".")] == ["data"]


def test_a_run_killed_after_its_data_set_appeared_leaves_nothing_behind(tmp_path):
    (tmp_path / "out").mkdir()
    found = {"options": options(tmp_path).content(), "tasks": {}}
    (tmp_path / "out" / "recording.json").write_text(json.dumps(found))
    (tmp_path / "out.partial" / "episodes").mkdir(parents=True)
    assert record(options(tmp_path)) == found and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_student_is_written_down_by_name_and_weights(tmp_path):
    student = tmp_path / "my_robot"
    student.mkdir()
    (student / "model.safetensors").write_text("weights")
    (student / "config.json").write_text("{}")
    content = published(options(tmp_path, student=str(student)))
    assert content["student"] == "my_robot" and str(tmp_path) not in json.dumps(content)
    before = {name: value for name, value in content.items() if not name.startswith("student_")}
    record_module._check_same(content, {**before, "student": str(student)}, tmp_path)  # as older versions wrote it
    before["student_weights"] = content["student_weights"]
    record_module._check_same(content, before, tmp_path)
    changes = {"model.safetensors": "weights", "dataset_statistics.json": "statistics", "config.json": "config"}
    for file, kind in changes.items():  # it acts otherwise, also in other units or on other pixels
        content = published(options(tmp_path, student=str(student)))
        (student / file).write_text("changed")
        with pytest.raises(ValueError, match=f"other options: student_{kind}"):
            record_module._check_same(published(options(tmp_path, student=str(student))), content, tmp_path)
    content = published(options(tmp_path, student=str(student)))
    (student / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="other options: student_statistics"):
        record_module._check_same(published(options(tmp_path, student=str(student))), content, tmp_path)


def test_two_workers_record_what_one_does(tmp_path, opengl):
    one = options(tmp_path, output=str(tmp_path / "one"), format="hdf5")
    record(one, progress=False)
    record(replace(one, output=str(tmp_path / "two"), workers=2), progress=False)
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [file.name for file in files[0]] == ["reach_the_goal_demo.hdf5", "recording.json"]
    for first, second in zip(*(open_dataset(tmp_path / name) for name in ("one", "two")), strict=True):
        np.testing.assert_array_equal(first.actions, second.actions)
        np.testing.assert_array_equal(first.images["agentview_rgb"][7], second.images["agentview_rgb"][7])


@pytest.mark.parametrize(
    "wrong",
    [
        {"episodes": 0},
        {"workers": 0},
        {"noise": -0.1},
        {"noise": float("nan")},
        {"seed": -1},
        {"seed": 9_999, "episodes": 2},
    ],
)
def test_impossible_options_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        options(tmp_path, **wrong)


def test_the_verb(tmp_path):
    found = CliRunner().invoke(app, ["record", "--tasks", "reach-v4", "--output", str(tmp_path / "x")])
    assert found.exit_code == 2 and "Did you mean 'reach-v3'" in found.output
    assert not list(tmp_path.iterdir())


# The folder of an unfinished recording


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("files", [["notes.txt"], ["episodes/mine.npz"], ["options.json", "notes.txt"], "a link"])
def test_a_folder_of_the_user_is_never_removed(files, finished, tmp_path, monkeypatch):
    """`OUTPUT.partial` that is no recording, or one of other options, when the data set is recorded or is there."""
    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: pytest.fail("recorded"))
    part = tmp_path / "out.partial"
    if files == "a link":
        (tmp_path / "elsewhere").mkdir()
        part.symlink_to(tmp_path / "elsewhere")
        (part / "options.json").write_text(json.dumps(options(tmp_path).content()))
    else:
        for name in files:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text('{"mine": true}')
    before = contents(part)
    if finished:
        (tmp_path / "out").mkdir()
        found = {"options": options(tmp_path).content(), "tasks": {}}
        (tmp_path / "out" / "recording.json").write_text(json.dumps(found))
        assert record(options(tmp_path)) == found
    elif "options.json" in files:
        monkeypatch.setattr(recorder, "open_environment", lambda options, **more: make_environment("metaworld", **more))
        monkeypatch.setattr(record_module, "opengl_backend", lambda: "none")
        with pytest.raises(ValueError, match="recorded with other options"):
            record(options(tmp_path))
    else:
        with pytest.raises(FileExistsError, match="out.partial.* move it away"):
            record(options(tmp_path))
    assert contents(part) == before


def test_episodes_of_nobody_knows_which_options_are_not_taken(tmp_path, monkeypatch):
    """They were taken for episodes of whatever was asked for, and one data set held both."""
    monkeypatch.setattr(recorder, "open_environment", lambda options, **more: pytest.fail("recorded"))
    episode = record_episode(Point(), "go", 10_000, noise=0.05)
    (tmp_path / "out.partial" / "episodes").mkdir(parents=True)
    save_episode(episode, tmp_path / "out.partial" / "episodes" / "reach-v3_00000.npz", seed=0, failed=0)
    with pytest.raises(FileExistsError, match="holds files and no options.json, which says what is recorded"):
        record(options(tmp_path))


def test_what_the_user_put_beside_the_episodes_stays(tmp_path, monkeypatch):
    (tmp_path / "out.partial" / "episodes").mkdir(parents=True)
    (tmp_path / "out.partial" / "options.json").write_text(json.dumps(options(tmp_path).content()))
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    record_module._remove(tmp_path / "out.partial", options(tmp_path).content())
    assert contents(tmp_path) == {"out.partial/notes.txt": b"mine"}


KILLED = """
import os, random, signal, sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import openvla.data.writers.lerobot, openvla.data.writers.hdf5
from openvla.evaluation import record as record_module
from openvla.evaluation.environment import standstill
from openvla.evaluation import recorder
from openvla.observation import Observation
from openvla.options.evaluation import RecordOptions

@dataclass
class Point:
    render: bool = True
    tasks, task_sets, max_steps, frequency, robot, state_names = ("go",), {}, 9, 20.0, "point", ["x"]
    def instructions(self, task, *, held_out=False): return ("go home",)
    def variations(self, task): return ()
    def reset(self, seed, task, variation=""):
        self.position = 0.5 + seed / 100
        return self._observe()
    def _observe(self):
        image = np.full((8, 8, 3), int(abs(self.position) * 100) % 256, np.uint8)
        return Observation({"image": image}, np.array([self.position], np.float32), "go home")
    def expert_action(self): return np.array([-np.clip(self.position, -0.2, 0.2), 0, 0, 0, 0, 0, 1.0])
    def step(self, action):
        self.position += float(action[0])
        return self._observe(), abs(self.position) < 0.05
    def close(self): pass

recorder.open_environment = lambda options, **more: Point(**more)
record_module.opengl_backend = lambda: "none"
folder, form, tried, left = sys.argv[1], sys.argv[2], int(sys.argv[3]), 10**9

def killed(event, arguments):
    "Ends this process before its n-th change of a file."
    global left
    changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (event == "open" and arguments[2] & 1)
    if changes and folder in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def recorded(output, kill_at=10**9):
    "Exit code of a process that records, and how many changes it had left."
    global left
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        left = kill_at
        sys.addaudithook(killed)
        options = RecordOptions(output=output, env="point", tasks="go", episodes=2, format=form)
        record_module.record(options, progress=False)
        os.write(writing, str(kill_at - left).encode())
        os._exit(0)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, int(os.read(reading, 20) or 0)

def contents(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in Path(output).rglob("*") if path.is_file()}

code, changes = recorded(f"{folder}/whole")
assert code == 0
expected = contents(f"{folder}/whole")
points = random.Random(0).sample(range(1, changes + 1), min(tried, changes))
for kill_at in points:
    output = f"{folder}/killed-{kill_at}"
    assert recorded(output, kill_at)[0] == -signal.SIGKILL
    assert not Path(output).exists() or contents(output) == expected, kill_at
    if kill_at % 3 == 0:
        recorded(output, kill_at // 2)  # killed again on its way
    assert recorded(output)[0] == 0 and contents(output) == expected, kill_at
there = sorted(path.name for path in Path(folder).iterdir())
assert there == sorted(["whole", *(f"killed-{number}" for number in points)]), there
print(changes)
"""


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_killed_at_any_change_of_a_file_a_recording_goes_on_to_the_same_bytes(format, tmp_path):
    """Before some of them here; before every single one it was tried as well."""
    ran = processes.run(KILLED, tmp_path, format, 5)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 20  # changes


def test_a_student_of_another_rate_is_warned_of(tmp_path, monkeypatch):
    """As of a model that is evaluated: each of its actions lasts another time here."""
    bounds = {name: [value] * 7 for name, value in (("q01", -1.0), ("q99", 1.0))}
    meaning = usual_spec(7, hz=5.0).to_dict()
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps({"mine": {"action": bounds, "action_spec": meaning}}))
    (tmp_path / "model.safetensors").write_text("weights")
    OpenVLAConfig().save_pretrained(tmp_path)
    given = options(tmp_path / "out", student=str(tmp_path), env="careless:Seeing", tasks="open/it")
    monkeypatch.setattr(record_module, "_run", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.warns(UserWarning, match="at 5 a second, and 'careless:Seeing' takes 20"), suppress(KeyboardInterrupt):
        record(given, progress=False)
    file.write_text(json.dumps({"mine": {"action": bounds}}))
    with pytest.raises(KeyError, match="unnorm_key='other'"):  # before anything is recorded
        record(replace(given, unnorm_key="other", output=str(tmp_path / "other")), progress=False)


def test_a_student_of_several_datasets_acts_in_units_of_one(tmp_path, monkeypatch):
    """There was no way to say which, and so no way to record with it."""
    loaded = []
    monkeypatch.setattr(recorder, "statistics_of", lambda folder: {"mine": {}, "theirs": {}})
    monkeypatch.setattr(recorder.OpenVLAPolicy, "load", lambda model, **more: loaded.append(more["unnorm_key"]))
    simulator = Point()
    monkeypatch.setattr(recorder, "open_environment", lambda options: simulator)
    Recorder(options(tmp_path, student=str(tmp_path), unnorm_key="mine"))
    simulator.unnorm_keys = ("another", "theirs")
    Recorder(options(tmp_path, student=str(tmp_path)))
    assert loaded == ["mine", "theirs"]
    with pytest.raises(ValueError, match="unnorm_key='mine': of a student"):
        options(tmp_path, unnorm_key="mine")


def test_options_of_a_recording_that_were_edited(tmp_path):
    """A student that is no text was a traceback."""
    with pytest.raises(ValueError, match="recorded with other options: student 5, not None"):
        record_module._check_same({"student": None}, {"student": 5}, tmp_path)
