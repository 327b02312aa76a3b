"""examples/ros2_node.py without ROS: stand-ins for what it imports, and a scripted server."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripted_server import Scripted, metadata, right


FILE = Path(__file__).resolve().parents[1] / "examples/ros2_node.py"


class Node:
    """What of `rclpy.node.Node` the example uses."""

    given: dict = {}

    def __init__(self, name):
        self.name, self.published, self.subscribed, self.timers = name, {}, {}, []

    def declare_parameter(self, name, default):
        value = self.given.get(name, default)
        assert type(value) is type(default), f"{name}: ROS does not let a parameter change its type"
        return SimpleNamespace(value=value)

    def create_publisher(self, kind, topic, depth):
        self.published[topic] = []
        return SimpleNamespace(publish=self.published[topic].append)

    def create_subscription(self, kind, topic, callback, qos):
        self.subscribed[topic] = callback
        assert qos == 1 or (qos.depth, qos.reliability) == (1, "best effort")

    def create_timer(self, period, callback, *, clock):
        assert clock.clock_type == "steady"  # that of the system, the usual one, may be set back
        self.timers.append((period, callback))


@pytest.fixture
def example(monkeypatch):
    """The module, imported beside stand-ins for ROS."""

    def message(**fields):
        return SimpleNamespace(**fields)

    contents = {
        "rclpy": {"init": None, "spin": None},
        "rclpy.clock": {"Clock": message, "ClockType": SimpleNamespace(STEADY_TIME="steady")},
        "rclpy.node": {"Node": Node},
        "rclpy.qos": {"QoSProfile": message, "ReliabilityPolicy": SimpleNamespace(BEST_EFFORT="best effort")},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": message},
        "std_msgs": {},
        "std_msgs.msg": {"Empty": message, "Float64MultiArray": message, "String": message},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ros2_node", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image(level: int, encoding: str = "rgb8", padding: int = 4) -> SimpleNamespace:
    """Rows may be longer than their pixels."""
    rows = np.full((6, 8 * 3 + padding), level, np.uint8)
    rows[:, 0 : 8 * 3 : 3] = 7
    return SimpleNamespace(height=6, width=8, step=rows.shape[1], encoding=encoding, data=rows.tobytes())


def test_the_node(example, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(example, "time", SimpleNamespace(monotonic=lambda: now[0]))
    answer = lambda message: {**right(message, 1, 7), "actions": np.full((1, 7), 0.1)}  # noqa: E731
    with Scripted(metadata(dims=7, chunk=1), answer).running() as scripted:
        monkeypatch.setattr(
            Node, "given", {"url": scripted.url("ws"), "audit": str(tmp_path / "audit.jsonl"), "wait": 30.0}
        )
        node = example.OpenVLANode()
        node.guard._clock, node.guard.wait = lambda: now[0], 30
        ((period, step),) = node.timers
        assert period == pytest.approx(0.2)

        step()
        node.subscribed["image"](image(90))
        step()
        assert not scripted.messages and not node.published["action"]  # nobody said what to do
        node.subscribed["instruction"](SimpleNamespace(data="open the drawer"))

        step()
        (sent,) = scripted.messages
        assert sent["instruction"] == "open the drawer" and sent["images"]["image"][:2] == b"\xff\xd8"
        (action,) = node.published["action"]
        assert action.data == [0.05, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1]  # cut to the limits of a step
        assert node.published["state"][-1].data == "OK"

        for _ in range(8):  # the camera stands still: the arm as well
            now[0] += 0.2
            step()
        held = [message.data for message in node.published["action"][-3:]]
        assert held == [[0.0] * 6 + [0.1]] * 3
        assert node.published["state"][-1].data.startswith("STALLED")

        node.subscribed["image"](image(40, "bgr8"))
        assert node.image[0, 0].tolist() == [40, 40, 7]
        step()
        assert node.published["state"][-1].data == "OK"
        with pytest.raises(ValueError, match="mono8"):
            node.subscribed["image"](image(0, "mono8"))

        now[0] += 60.0  # the node was held up: a program that goes on to its next instruction moves nothing
        for said in ("open the drawer", "close the drawer"):
            node.subscribed["instruction"](SimpleNamespace(data=said))
            node.subscribed["image"](image(50))
            step()
            assert node.published["state"][-1].data.startswith("DEAD")
            assert node.published["action"][-1].data == [0.0] * 6 + [0.1]
            now[0] += 0.2
        node.subscribed["reset"](SimpleNamespace())
        node.subscribed["image"](image(60))
        step()
        assert node.published["state"][-1].data == "OK" and scripted.messages[-1]["instruction"] == "close the drawer"
        node.guard.close()
        node.client.close()
    node.audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines].count("answer") >= 2


@pytest.mark.parametrize("silence", ["loop held up", "sleep", "no answers"])
def test_an_instruction_wakes_nobody_even_before_the_next_step(example, tmp_path, monkeypatch, silence):
    """What a program says is often the first that a node hears after it was held up, a step before the guard sees it;
    and one that speaks every few seconds kept a robot from being DEAD that nothing had moved for minutes."""
    now, slept, mute = [1000.0], [0.0], []
    monkeypatch.setattr(example, "time", SimpleNamespace(monotonic=lambda: now[0]))
    answer = lambda message: "busy" if mute else {**right(message, 1, 7), "actions": np.full((1, 7), 0.1)}  # noqa: E731
    with Scripted(metadata(dims=7, chunk=1), answer).running() as scripted:
        given = {"url": scripted.url("ws"), "audit": str(tmp_path / "audit.jsonl"), "wait": 30.0, "instruction": "one"}
        monkeypatch.setattr(Node, "given", given)
        node = example.OpenVLANode()
        node.guard._clock, node.guard._slept, node.guard.wait = (
            lambda: now[0],
            lambda: slept.pop() if slept else 0.0,
            30,
        )
        said = iter(range(100))

        def step(instruction=None):
            now[0] += 0.2
            if instruction:
                node.subscribed["instruction"](SimpleNamespace(data=instruction))
            node.subscribed["image"](image(next(said)))
            node.timers[0][1]()
            return node.published["state"][-1].data.split()[0]

        assert [step(), step("two"), step("three")] == ["OK"] * 3
        if silence == "no answers":
            mute.append(True)
            assert [step(f"word {number // 10}") for number in range(40)][-1] == "DEAD"
            mute.clear()
        elif silence == "sleep":
            slept.append(3600.0)
        else:
            now[0] += 60.0
        assert step("four") == "DEAD" and scripted.messages[-1]["instruction"] != "four"
        node.subscribed["reset"](SimpleNamespace())
        assert step() == "OK" and scripted.messages[-1]["instruction"] == "four"
        node.guard.close()
        node.client.close()
    node.audit.close()


def test_zeros_are_held_only_where_they_are_no_motion(example, tmp_path, monkeypatch):
    places, guessed = metadata(dims=7, chunk=1), metadata(dims=7, chunk=1)
    places["datasets"]["robot"]["relative"] = [False] * 7
    guessed["datasets"]["robot"]["spec_stated"] = False
    percent = metadata(dims=7, chunk=1)
    percent["datasets"]["robot"]["as_recorded"] = [6]  # 1 of 100 is closed
    for number, first in enumerate((places, percent, guessed)):
        with Scripted(first, lambda message: "no").running() as scripted:
            given = {"url": scripted.url("ws"), "audit": str(tmp_path / f"{number}.jsonl"), "wait": 30.0}
            monkeypatch.setattr(Node, "given", given)
            if first is places:
                with pytest.raises(ValueError, match="are places and no changes"):
                    example.OpenVLANode()
                continue
            if first is percent:
                with pytest.raises(ValueError, match="-p gripper:=95.0"):
                    example.OpenVLANode()
                given["gripper"] = 95.0
                node = example.OpenVLANode()
                assert node.start.tolist() == [0] * 6 + [95]
                node.client.close()
                node.audit.close()
                continue
            node = example.OpenVLANode()
            node.subscribed["image"](image(90))
            node.subscribed["instruction"](SimpleNamespace(data="open the drawer"))
            node.timers[0][1]()
            assert not node.published["action"] and node.published["state"][-1].data.startswith("DEGRADED")
            node.guard.close()
            node.client.close()
            node.audit.close()
