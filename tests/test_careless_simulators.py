"""What simulators of a user's own may give that is no observation: said before anything is done with it."""

import errno
import io
import os
import signal
from dataclasses import replace
from unittest.mock import MagicMock

import careless
import numpy as np
import pytest
from careless import Breaks, Gymnasium, Seeing
from toy import FromPixels

from openvla.data import open_dataset
from openvla.evaluation import make_environment
from openvla.evaluation.demo import demo
from openvla.evaluation.environment import check_observation, check_step, choose_variations, file_name
from openvla.evaluation.expert_episode import record_episode
from openvla.evaluation.loop import Job, run_episodes
from openvla.evaluation.record import RecordingBroke, _run, record
from openvla.evaluation.report import NoEpisodes
from openvla.evaluation.workers import EnvironmentFailure, EnvironmentProcess
from openvla.observation import Observation
from openvla.options.evaluation import RecordOptions


IMAGE = np.zeros((4, 4, 3), np.uint8)
SEEN = Observation({"front": IMAGE}, np.zeros(1, np.float32), "go")


@pytest.mark.parametrize(
    "found, said",
    [
        ((SEEN, {}), "reset() gave a tuple, expected an Observation"),  # as Gymnasium has it
        ({"images": {"front": IMAGE}}, "gave a dict"),
        (None, "gave a NoneType"),
        (replace(SEEN, images=IMAGE), "images is a ndarray, expected {camera: (H, W, 3) uint8}"),
        (replace(SEEN, images={"front": IMAGE / 255.0}), "the image of 'front' is (4, 4, 3) of float64"),
        (replace(SEEN, images={"front": IMAGE[..., 0]}), "(4, 4) of uint8, expected (H, W, 3) uint8"),
        (replace(SEEN, images={"front": np.zeros((4, 4, 4), np.uint8)}), "(4, 4, 4)"),
        (replace(SEEN, images={"front": IMAGE[:0]}), "(0, 4, 3)"),
        (replace(SEEN, images={"front": [[1]]}), "(1, 1) of list"),
        (replace(SEEN, instruction=None), "instruction=None, expected a text"),
        (replace(SEEN, state=None), "state=None, expected finite numbers (S,)"),
        (replace(SEEN, state=np.array([0, np.nan])), "expected finite numbers"),
        (replace(SEEN, state=np.float32(1)), "expected finite numbers (S,)"),
    ],
)
def test_what_is_no_observation(found, said):
    with pytest.raises(ValueError) as refused:
        check_observation(found)
    assert said in str(refused.value)
    with pytest.raises(ValueError, match=r"step\(\)"):
        check_step((found, False))


@pytest.mark.parametrize(
    "found, said",
    [
        ((SEEN, 0.0, False, False, {}), "step() gave a tuple of 5, expected (Observation, success)"),
        (SEEN, "step() gave a Observation"),
        ((SEEN, None), "success=None, expected true or false"),
        ((SEEN, np.array([True, False])), "expected true or false"),
        ((SEEN, {"success": True}), "expected true or false"),
    ],
)
def test_what_is_no_step(found, said):
    with pytest.raises(ValueError) as refused:
        check_step(found)
    assert said in str(refused.value)


def test_what_is_one():
    assert check_observation(SEEN) is SEEN
    assert check_observation(replace(SEEN, images={}, state=np.zeros(0))).images == {}
    for true in (True, 1, np.bool_(True), np.array(True)):
        assert check_step([SEEN, true]) == (SEEN, True) and check_step((SEEN, not true))[1] is False


def test_it_breaks_its_episode_and_no_other(tmp_path, capfd):
    (record,) = run_episodes(FromPixels(), Gymnasium, [Job("left", 0, 1)], tmp_path, progress=False)
    assert record.error == "ValueError: step() gave a tuple of 5, expected (Observation, success)."
    assert "left, episode 0 broke: ValueError: step() gave" in capfd.readouterr().err
    with pytest.raises(ValueError, match="step.. gave a tuple of 5"):
        record_episode(Gymnasium(), "left", 1)


@pytest.mark.parametrize("gone", [False, True])
def test_a_worker_that_is_interrupted_ends_without_a_word(gone, capfd):
    """Ctrl-C reaches all processes of a terminal; the one that asked says that it was stopped."""
    process = EnvironmentProcess(Seeing)
    process.ask("instructions", "open/it")
    process.answer()
    os.kill(process._process.pid, signal.SIGINT)
    if gone:
        process._process.join(10)
    with pytest.raises(EnvironmentFailure, match="died .exit code -2"):
        process.ask("instructions", "open/it")
        process.answer()
    process.ask("instructions", "open/it")  # and the process that asked goes away
    process._connection.close()
    process._process.join(10)
    assert process._process.exitcode == 0 and capfd.readouterr().err == ""


def test_a_recording_in_several_processes_says_what_broke_it(tmp_path, monkeypatch):
    jobs = [(("go", "", number), tmp_path / f"{number}.npz") for number in range(2)]
    with pytest.raises(RecordingBroke, match="^ValueError: The expert failed 20 times.$"):
        _run(Breaks, jobs, 2, lambda *done: None)
    assert RecordingBroke.exit_code == 1
    monkeypatch.setattr("threading.Thread.join", interrupt := MagicMock(side_effect=[KeyboardInterrupt, None, None]))
    with pytest.raises(KeyboardInterrupt):
        _run(Breaks, jobs, 2, lambda *done: None)
    assert interrupt.call_count == 3


def test_where_nothing_is_seen_nothing_is_filmed(tmp_path):
    with pytest.raises(NoEpisodes, match="'careless:Blind' shows no images: there is nothing to make a video of"):
        demo(env="careless:Blind", policy="expert", workers=1, output=tmp_path / "videos", progress=False)
    options = RecordOptions(env="careless:Blind", tasks="open/it", episodes=1, size=16, output=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="'careless:Blind' shows no images, and nobody learns from a recording with"):
        record(options, progress=False)
    assert not (tmp_path / "data").exists()


def test_tasks_of_images_of_other_sizes_are_said_at_the_start(tmp_path):
    """When LeRobot was written, all episodes had been recorded."""
    mine = {"env": "careless:Sizes", "tasks": "near,far", "episodes": 3, "size": 16}
    output = tmp_path / "data"
    said = "shows {'front': .8, 8, 3.} in 'far' and {'front': .16, 16, 3.} in 'near', and in a LeRobot .* hdf5"
    for more in ({}, {"workers": 2}):  # where two are there already
        with pytest.raises(ValueError, match=said):
            record(RecordOptions(**mine, **more, output=str(output)), progress=False)
        assert len([*(tmp_path / "data.partial" / "episodes").glob("*.npz")]) == 2
    record(RecordOptions(**mine, format="hdf5", output=str(tmp_path / "hdf5")), progress=False)


def test_a_full_disk_keeps_no_part_of_an_episode(tmp_path, monkeypatch):
    """It stayed, and filled the disk; no file was named."""

    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = RecordOptions(env="careless:Seeing", tasks="open/it", episodes=1, size=16, output=str(tmp_path / "data"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: .*open-it_00000.npz'"):
        patch.setattr("numpy.savez", full)
        record(options, progress=False)
    assert not [*(tmp_path / "data.partial" / "episodes").iterdir()]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: .*data.partial/whole'"):
        patch.setattr("openvla.evaluation.record.write_lerobot", lambda *_, **__: full(io.BytesIO()))
        record(options, progress=False)
    record(options, progress=False)


def test_tasks_whose_words_are_one_name_of_a_file(tmp_path):
    """One of them was not written to HDF5."""
    options = {"env": "careless:Slashes", "tasks": "up,down,other", "episodes": 1, "size": 16, "format": "hdf5"}
    record(RecordOptions(**options, output=str(tmp_path / "data")), progress=False)
    assert {path.name for path in (tmp_path / "data").glob("*.hdf5")} == {
        "up-down_up_demo.hdf5",
        "up-down_down_demo.hdf5",
        "up-down_up_other_demo.hdf5",
    }


def test_names_of_tasks_become_names_of_files(tmp_path, monkeypatch):
    assert file_name("open/it", "visual:light", "000") == "open-it_visual-light_000" and file_name("a", "") == "a"
    pytest.importorskip("av", reason="videos need the [data] extra")
    here = "careless:Seeing"
    demo(env=here, policy="expert", workers=1, output=tmp_path / "videos", progress=False)
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"open-it.mp4", "demo.gif"}
    options = {"env": here, "tasks": "open/it", "episodes": 1, "size": 16}
    for format in ("lerobot", "hdf5"):
        record(RecordOptions(**options, format=format, output=str(tmp_path / format)), progress=False)
    assert (tmp_path / "hdf5" / "move_to_the_goal_demo.hdf5").is_file()
    twins = {**options, "env": "careless:Twins", "tasks": "open/it,open-it"}
    with pytest.raises(ValueError, match="open/it, open-it: episodes of several of these would be one file"):
        record(RecordOptions(**twins, output=str(tmp_path / "twins")), progress=False)
    with pytest.raises(ValueError, match="open/it, open-it: videos of several of these would be one file"):
        demo(env=twins["env"], tasks=twins["tasks"], policy="expert", output=tmp_path / "twins", progress=False)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"tasks": "open"}, "tasks is 'open', expected several texts"),  # were the tasks o, p, e and n
        ({"tasks": ()}, "has no tasks"),
        ({"task_sets": {"all": "open/it"}}, "task_sets\\['all'\\] is 'open/it', expected several texts"),
        ({"task_sets": {"all": ["close"]}}, "holds 'close', which is none of its tasks"),
        ({"task_sets": None}, "task_sets is a NoneType"),
        ({"state_names": "x"}, "state_names is 'x', expected several texts"),
        ({"unnorm_keys": "mine"}, "unnorm_keys is 'mine', expected several texts"),
        ({"max_steps": 0}, "max_steps is 0, expected a whole number"),  # failed after one step
        ({"max_steps": None}, "max_steps is None, expected a whole number"),
        ({"frequency": float("nan")}, "frequency is nan, expected actions in a second"),
        ({"action_spec": {"names": ["x"]}}, "action_spec is a dict, expected an ActionSpec"),
    ],
    ids=str,
)
def test_what_a_simulator_says_of_itself(wrong, said, monkeypatch):
    for name, value in wrong.items():
        monkeypatch.setattr(careless.Blind, name, value, raising=False)
    with pytest.raises(ValueError, match=f"simulator 'careless:Blind'.*{said}"):
        make_environment("careless:Blind", size=8)


def test_words_that_are_a_text_and_no_list(tmp_path, monkeypatch):
    """A paraphrase was one letter of it."""
    monkeypatch.setattr(careless.Seeing, "instructions", lambda self, task, held_out=False: "move to the goal")
    with pytest.raises(ValueError, match="instructions.'left'. of Seeing is 'move to the goal', expected several"):
        record_episode(careless.Seeing(size=8), "left", 1, paraphrases=True)
    monkeypatch.setattr(careless.Seeing, "variations", lambda self, task: "visual:light")
    with pytest.raises(ValueError, match="variations.'left'. of Seeing is 'visual:light'"):
        choose_variations(careless.Seeing(size=8), ["left"], ["all"])


def test_what_a_simulator_needs():
    with pytest.raises(ValueError, match="needs path: --env-option path=..."):
        make_environment("careless:Needs", size=8)


@pytest.mark.parametrize("format", ["lerobot", "hdf5"])
def test_tasks_of_many_words(format, tmp_path):
    """All was recorded, and then no file could be called so."""
    options = {"env": "careless:Wordy", "tasks": ",".join(careless.Wordy.tasks), "episodes": 1, "size": 16}
    record(RecordOptions(**options, format=format, output=str(tmp_path / "data")), progress=False)
    told = [episode.instruction for episode in open_dataset(tmp_path / "data")]
    assert len(told) == 2 and all(text.startswith("move to the goal (把杯子") for text in told)
    fits = "x" * 240  # as it was before names were cut: what was begun is found again
    assert file_name(fits) == fits and len(file_name(fits + "x")) == 240
    films = {Job(task, 0, 0).film(tmp_path).name for task in careless.Wordy.tasks}
    assert len(films) == 2 and all(len(name.encode()) < 250 for name in films)
