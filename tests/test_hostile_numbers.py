"""Numbers that are none, of clients and guards, and images that nobody can read."""

import io
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from fake_serving import FakeModel
from openvla_client import ActionSpec, Guard, Limits, Reply
from openvla_client.messages import read_info, request
from PIL import Image

from openvla.options.serving import Limits as ServerLimits
from openvla.options.training import FinetuneOptions
from openvla.serving.contract import BadRequest
from openvla.serving.model import OpenVLAModel
from openvla.serving.names import Reader
from openvla.serving.service import metadata


IMAGE = np.zeros((8, 8, 3), np.uint8)
ANGLE = ActionSpec(("yaw", "grip"), (False, False), (1,))


@pytest.mark.parametrize("state", [[True, 0.2, 0.3], [0.1, [0.2, False]], (0.1, 0.2, True), [np.bool_(True), 1, 2]])
def test_true_and_false_are_no_numbers(state):
    """An open gripper among positions was the number 1."""
    model = FakeModel(chunk=4, state_dim=3, dims=3)
    message = {"image": IMAGE, "instruction": "open", "state": state}
    with pytest.raises(BadRequest, match="state: expected numbers"):
        Reader(model.info, ServerLimits()).read(message)
    with pytest.raises(BadRequest, match="committed: expected numbers"):
        Reader(model.info, ServerLimits()).read({**message, "state": [1, 2, 3], "committed": [state]})
    info = read_info(metadata(model.info))
    for name in ("state", "committed"):
        with pytest.raises(ValueError, match=f"{name}=.*expected numbers"):
            request(info, IMAGE, "open", **{name: state})
    guard = Guard(lambda seen: [0, 0, 0], ActionSpec(("a", "b", "c"), (False,) * 3), 10)
    with pytest.raises(ValueError, match="start=.*expected 3 finite numbers"):
        guard.reset(start=state)
    guard.close()


@pytest.mark.parametrize(
    "last, action, allowed", [(-3.10, np.float32(math.pi), -3.11), (np.float32(math.pi), 3.0, 3.131593)]
)
def test_pi_of_float32_is_no_angle_that_is_counted_from_zero(last, action, allowed):
    """It is above that of float64: the next angle was 3.173, a turn from where the robot stood."""
    limits = Limits(step={"yaw": 0.01}, turn={"yaw": 2 * math.pi})
    found, cut = limits.apply(np.array([action, 1.0], float), ANGLE, np.array([last, 1.0], float), None)
    assert found[0] == pytest.approx(allowed, abs=1e-6) and cut == ["yaw"]


def test_an_image_that_cannot_be_read_ends_no_control_loop():
    """The audit names what was seen, and a file that was closed has no pixels any more."""
    stream = io.BytesIO()
    Image.fromarray(IMAGE).save(stream, "PNG")
    image = Image.open(stream)
    image.close()
    stream.close()
    lines = []
    guard = Guard(lambda seen: [0.1, 1], ANGLE, 10, audit=lines.append, wait=2)
    guard.reset(start=[0, 1])
    command = guard.step({"images": image})
    guard.close()
    assert command.source == "answer" and lines[0]["seen"].startswith("unreadable: ")


def test_what_was_not_compiled_is_said(caplog):
    """`openvla serve --compile` on a CPU went on as if it had been."""
    made = SimpleNamespace(compiled=False, reason="the model is on cpu: graphs are of CUDA devices")
    served = object.__new__(OpenVLAModel)
    served.info, served.compile = FakeModel().info, True
    served.policy = SimpleNamespace(model=SimpleNamespace(prepare_for_inference=lambda *sizes, **given: made))
    served.act = lambda requests: None
    with caplog.at_level(logging.WARNING):
        served.warm_up((1,))
    assert "Nothing was compiled (--compile): the model is on cpu" in caplog.text


@pytest.mark.parametrize("recipe", [[], {}, None, 3])
def test_a_recipe_is_a_name(recipe):
    with pytest.raises(ValueError, match="recipe=.* is unknown"):
        FinetuneOptions(output="out", dataset="data", recipe=recipe)


def test_what_will_be_too_old_is_not_announced():
    """A model was told of an action that was stale once its answer had been waited for: the robot stood still."""

    class Slow:
        connection, now = 0, 100.0
        asked, replies = [], []

        def submit(self, ask):
            self.asked.append(ask)

        def poll(self, timeout):
            if self.replies:
                return self.replies.pop()
            self.now += timeout
            return None

        def close(self):
            pass

    slow = Slow()
    guard = Guard(slow, ANGLE, 10, commit=1, wait=0.05, clock=lambda: slow.now, slept=lambda: 0.0)
    guard.reset(start=[0, 1])
    guard.step({})
    slow.replies = [Reply(slow.asked[0].epoch, 0, [[0.1, 1], [0.2, 1]])]
    slow.now = 100.28  # the last action was due 0.18 s ago, and acts for 0.02 s more
    command = guard.step({})
    assert len(slow.asked) == 2 and slow.asked[1].committed is None
    assert command.source == "hold" and "old" in command.reason
