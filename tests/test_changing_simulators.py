"""A simulator of a user's own that changes what it shows or answers breaks one episode, before anything acts on it."""

from dataclasses import replace

import numpy as np
import pytest
from changing import Expert, Seen, Two
from tiny import TINY
from toy import FromPixels, Line, ToPose

from openvla import OpenVLAConfig
from openvla.action_spec import ActionSpec
from openvla.evaluation.environment import check_dimensions
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.expert_episode import record_episode
from openvla.evaluation.loop import Job, run_episodes
from openvla.evaluation.record import record
from openvla.evaluation.workers import Checked
from openvla.options.evaluation import EvaluateOptions, RecordOptions


def shows(**changes):
    """A simulator whose second episode, and each second step, is otherwise."""

    class Changing(Line):
        count = 0

        def _observe(self):
            self.count += 1
            seen = super()._observe()
            return replace(seen, **changes) if self.count % 2 == 0 else seen

    return Checked(Changing())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"images": {}}, "shows the cameras none, and before front"),
        ({"images": {"side": np.zeros((4, 4, 3), np.uint8)}}, "shows the cameras side, and before front"),
        ({"state": np.zeros(3)}, "gave a state of 3 numbers, and before of 1"),
    ],
)
def test_other_cameras_and_states(changes, said):
    for method, *arguments in (("step", np.zeros(7)), ("reset", 2, "left")):
        environment = shows(**changes)
        environment.call("reset", 1, "left")
        with pytest.raises(ValueError, match=said) as refused:
            environment.call(method, *arguments)
        assert str(refused.value).startswith(f"{method}()")
    environment = shows(**changes)
    environment.call("reset", 1, "left")
    environment.call("reset", 1, "right")  # another task may show others


@pytest.mark.parametrize("answer", [np.full(7, np.nan), np.zeros(5), np.zeros((3, 7)), None, "left", np.full(7, 1e9)])
def test_what_is_no_answer_of_an_expert(answer):
    class Wrong(Line):
        def expert_action(self):
            return answer

    environment = Checked(Wrong())
    environment.call("reset", 1, "left")
    with pytest.raises(ValueError, match="The expert of Wrong: action"):
        environment.call("expert_action")


def test_it_breaks_its_episode_and_no_other(tmp_path):
    """The evaluation ended there, each time the command was given again."""
    jobs = [Job("left", number, number) for number in range(3)]
    for make, policy, said in ((Seen, FromPixels(), "shows the cameras wrist"), (Expert, None, "The expert of Expert")):
        found = run_episodes(policy, make, jobs, tmp_path / make.__name__, videos=0, progress=False)
        assert [record.error is None for record in found] == [True, False, True] and said in found[1].error


def test_a_recording_of_changing_cameras_is_refused():
    class Timed(Seen):
        max_steps, frequency = 40, 20.0

    with pytest.raises(ValueError, match="shows the cameras wrist, and before front"):
        record_episode(Timed(), "left", 1)


def test_a_recording_of_changing_sizes_is_refused_at_its_first_episode():
    """It was when all episodes were recorded, and the data set was written."""

    class Grows(Line):
        max_steps, frequency = 40, 20.0

        def step(self, action):
            observation, success = super().step(action)
            taller = {"front": np.repeat(observation.images["front"], 2, axis=0)}
            return replace(observation, images=taller), success

    with pytest.raises(ValueError, match=r"shows 'front' as .32, 16, 3., and reset.. as .16, 16, 3."):
        record_episode(Grows(), "left", 2)


def test_actions_of_fewer_numbers_than_a_place_has():
    """Noise is of translation: three numbers were added to two."""
    point = Two()
    episode = record_episode(point, "go", 3, noise=0.05)
    executed = np.stack(point.executed)
    assert episode.actions.shape == executed.shape and executed.shape[1] == 2
    assert (executed[:, 0] != episode.actions[:, 0]).any() and (executed[:, 1] == 1).all()  # no noise on the gripper


def test_a_student_of_other_actions_is_refused_before_it_acts(tmp_path):
    """It was only at its first act, when the weights were read."""
    student = str(TINY[0].folder)
    options = RecordOptions(env="changing:Two", tasks="all", student=student, unnorm_key="bridge_orig", size=16,
                            episodes=1, output=str(tmp_path / "data"))  # fmt: skip
    with pytest.raises(ValueError, match="have 7 dimensions, those of 'changing:Two' 2"):
        record(options, progress=False)
    assert not list(tmp_path.glob("data*"))
    check_dimensions({"q01": [0, 0]}, student, "changing:Two", Two.action_spec)


@pytest.mark.parametrize(
    "field, said",
    [
        ({"proprio_dim": 3}, "sees a state of 3 numbers, and 'changing:Two' gives 1"),
        ({"camera_names": ["primary", "wrist"]}, "sees primary, wrist: record the camera on the gripper .*--wrist"),
    ],
)
def test_a_student_of_another_state_or_of_a_camera_that_is_not_recorded(tmp_path, field, said):
    stats = {"toy": {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 1.0]}}}
    OpenVLAConfig(norm_stats=stats, **field).save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").write_text("weights")
    options = RecordOptions(env="changing:Two", tasks="all", student=str(tmp_path / "student"), size=16, episodes=1,
                            output=str(tmp_path / "data"))  # fmt: skip
    with pytest.raises(ValueError, match=said):
        record(options, progress=False)
    assert not list(tmp_path.glob("data*"))


def test_options_that_say_nothing_are_refused():
    for given in ({"execute": 2}, {"action_chunk": 8}, {"control": "realtime", "chunking": "prefix"}):
        with pytest.raises(ValueError, match="policy='expert' has no use for it"):
            EvaluateOptions(output="out", policy="expert", **given)
    with pytest.raises(ValueError, match="execute=4: chunking='hold' executes the first action"):
        EvaluateOptions(output="out", control="realtime", chunking="hold", execute=4)


@pytest.mark.parametrize("world", ["Anywhere", "LetGo"])
def test_where_a_robot_stands_is_asked_in_each_episode(tmp_path, world):
    """It was asked once, before any episode: of a world that begins elsewhere each time that was another place, a
    motion that nobody decided. Whether it can be asked was looked at when it was closed."""
    given = {"tasks": "all", "episodes": 3, "videos": 0, "workers": 2, "progress": False, "policy": ToPose()}
    late = {"control": "realtime", "latency": 0.25}
    summary = evaluate(env=f"changing:{world}", output=tmp_path / "out", **given, **late)
    assert summary["mean_success"] == 1.0 and not summary["errors"]


def test_a_place_to_stand_of_other_numbers(tmp_path):
    given = {"tasks": "all", "episodes": 3, "videos": 0, "workers": 2, "progress": False, "policy": ToPose()}
    late = {"control": "realtime", "latency": 0.25}
    summary = evaluate(env="changing:Nowhere", output=tmp_path / "seven", **given, **late)
    assert summary["errors"] == 3 and "standstill() of Nowhere: action" in next(iter(summary["reasons"]))


def test_means_of_angles_are_said(tmp_path):
    spec = ActionSpec(("x", "yaw", "grip"), (False, False, False), (2,))
    assert spec.absolute_angles == (1,) and not replace(spec, relative=(False, True, False)).absolute_angles
    more = {"control": "realtime", "latency": 0.1, "episodes": 1, "videos": 0, "output": tmp_path / "out"}
    with (
        pytest.warns(UserWarning, match="yaw are angles and no changes"),
        pytest.raises(ValueError, match="dimensions"),
    ):
        evaluate(env="changing:Turning", chunking="ensemble", tasks="all", progress=False, **more)
