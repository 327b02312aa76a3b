"""`openvla_client` and a process that serves: the same over both protocols, and safe while it is killed and started
again behind a network that delays, swallows and cuts."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import processes
import pytest
from faulty_proxy import FaultyProxy
from openvla_client import ActionSpec, NoAnswer, NotReached, Refused, connect


TESTS = Path(__file__).resolve().parent
PROGRAM = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from fake_serving import FakeModel
from openvla.options.serving import ServeOptions
from openvla.serving.server import serve
serve(ServeOptions(port=int(sys.argv[1])), load=lambda options: FakeModel(chunk=int(sys.argv[2])))
"""
SPEC = ActionSpec(("x", "y", "z", "roll", "pitch", "yaw", "gripper"), (True,) * 6 + (False,), (6,))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(port: int, chunk: int = 2, **environment) -> processes.Process:
    return processes.start(PROGRAM, port, chunk, env={**os.environ, **environment})


@contextmanager
def serving(*arguments, **environment):
    process = start(*arguments, **environment)
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def port():
    found = free_port()
    with serving(found):
        yield found


def gray(level: int) -> np.ndarray:
    return np.full((48, 64, 3), level, np.uint8)


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_a_real_server(scheme, port, monkeypatch):
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    with connect(f"{scheme}://127.0.0.1:{port}", wait=300) as client:
        assert (client.info.cameras, client.info.chunk, client.info.default_key) == (("image",), 2, "robot")
        assert client.info.datasets["robot"].spec.action_dim == 7 and not client.info.datasets["robot"].stated
        for form in ("raw", "jpeg", "png"):
            object.__setattr__(client._client.settings, "images", form)
            answer = client.act(gray(50), "open the drawer", step=4)
            assert answer.actions[:, :2].tolist() == [[0.05, 0.015]] * 2
            assert answer.probabilities is None and "infer_ms" in answer.timing
        answer = client.act({"image": gray(60)}, "go", unnorm_key="robot", details=True, committed=[[0.0] * 7])
        assert answer.probabilities.tolist() == [[0.75] * 7] * 2 and answer.normalized.shape == (2, 7)
        with pytest.raises(Refused, match="instruction") as caught:
            client.act(gray(50), "   ")
        assert caught.value.code == "bad_request"
        with pytest.raises(Refused, match="nobody knows|image"):
            client.act({"elbow_camera": gray(50), "image": gray(50)}, "go")
        session = client.session
        client.reset()
        assert client.session != session
        assert client.act(gray(70), "go").actions[0, 0] == pytest.approx(0.07)


def test_a_key(monkeypatch):
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    found = free_port()
    with serving(found, OPENVLA_API_KEY="right"):
        for scheme in ("ws", "http"):
            with connect(f"{scheme}://127.0.0.1:{found}", wait=300, key="right") as client:
                client.act(gray(50), "go")
            with pytest.raises(Refused, match="(?i)key") as caught:
                connect(f"{scheme}://127.0.0.1:{found}", key="wrong")
            assert caught.value.code == "unauthorized"


@pytest.mark.parametrize(
    "scheme, chunk",
    [("ws", 8), *(pytest.param(*way, marks=pytest.mark.slow) for way in (("ws", 1), ("http", 1), ("http", 8)))],
)
def test_killed_and_started_again_behind_a_bad_network(scheme, chunk):
    """By what was executed: the numbers of an action say which step asked for it."""
    period, found, start_pose = 0.02, free_port(), [0.0] * 6 + [1.0]
    lines, asked, faults = [], {}, []
    servers = [start(found, chunk)]
    again = threading.Timer(0.3, lambda: servers.append(start(found, chunk)))
    with (
        FaultyProxy(found, seed=chunk, delay=0.004).running() as proxy,
        connect(f"{scheme}://127.0.0.1:{proxy.port}", wait=300) as client,
    ):
        guard = client.guard(spec=SPEC, hz=1 / period, audit=lines.append, dead_after=600)
        guard.reset(start_pose)
        acted_after, step, end = 0, 0, time.monotonic() + 400
        while acted_after < 20 and time.monotonic() < end:
            asked[step] = time.monotonic()
            command = guard.step({"images": gray(step % 200), "instruction": "x" * (1 + step // 200)})
            acted_after += command.source == "answer" and len(faults) == 5
            if step in (30, 50):
                proxy.cut()
                faults.append("cut")
            proxy.frozen = 70 <= step < 100
            if step == 99:
                faults.append("half open")
            if step == 120:
                servers[0].kill()
                again.start()
                faults.append("killed")
            if step == 140:
                guard.reset(start_pose)
                faults.append("reset")
            step += 1
            time.sleep(max(0.0, asked[step - 1] + period - time.monotonic()))
        guard.close()
    again.join()
    servers[1].kill()

    assert len(lines) == step and len(faults) == 5 and acted_after == 20, (step, faults)
    done, first_of_episode = set(), 141
    for number, line in enumerate(lines):
        if line["source"] != "answer":
            assert line["action"][:6] == [0] * 6
            continue
        level, letters = (round(1000 * value) for value in line["action"][:2])
        seen = level + 200 * (letters - 1)
        assert seen in asked and (seen, line["index"]) not in done, "not asked, or done twice"
        assert line["clock"] - lines[seen]["clock"] - line["index"] * period <= 2 * period + 0.001, "stale"
        assert (number < first_of_episode) == (seen < first_of_episode), "of the episode before"
        done.add((seen, line["index"]))
    assert {"OK", "DEGRADED", "STALLED"} <= {line["state"] for line in lines}


def test_a_server_that_is_gone():
    found = free_port()
    with serving(found) as process:
        client = connect(f"ws://127.0.0.1:{found}", wait=300)
        client.act(gray(50), "go")
        process.kill()
        begin = time.monotonic()
        for _ in range(3):
            with pytest.raises((NotReached, NoAnswer)):
                client.act(gray(50), "go", timeout=0.5)
        assert time.monotonic() - begin < 10
        client.close()
