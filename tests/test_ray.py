"""`openvla serve --ray` on this machine: replicas that die lose no request; `make test-ray`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


pytestmark = pytest.mark.ray
TESTS = Path(__file__).resolve().parent
ROBOTS, STEPS, KILLED_AT = 8, 60, 100  # answers after which a replica is killed
START = """
import sys
import ray_model
from openvla.options.serving import ServeOptions
from openvla.serving.ray import serve_with_ray
options = ServeOptions(port=int(sys.argv[1]), ray=True, replicas=2, device="cpu", max_batch=4)
sys.exit(not serve_with_ray(options, lambda line: print(line, flush=True), load=getattr(ray_model, sys.argv[2])))
"""


class Server:
    """`openvla serve --ray` with one of the models of ray_model.py, until it answers or has ended."""

    def __init__(self, load: str):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(TESTS), "RAY_AUTH_MODE": "disabled"}  # nothing is written to the home folder
        environment["RAY_agent_register_timeout_ms"] = "120000"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", START, str(self.port), load]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **output)
        self.said = ""
        while "by Ray at http://127.0.0.1" not in self.said and (line := self.process.stdout.readline()):
            self.said += line
        self.reader = threading.Thread(target=self.process.stdout.read, daemon=True)  # or Ray waits for the pipe
        self.reader.start()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@pytest.fixture
def started():
    pytest.importorskip("ray", reason="make test-ray installs it")
    servers = []

    def start(load: str) -> Server:
        for _ in range(4):
            servers.append(Server(load))
            if "timed out during startup" not in servers[-1].said:  # Ray waits 30 s for its own processes, and no more
                break
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def level(answer) -> int:
    return round(float(answer.actions[0, 0]) * 1000)


async def robot(number: int, url: str, answers: dict, refusals: Counter, pids: Counter, answered: asyncio.Event):
    """Asks for each step until it is answered: inference may be repeated, what is executed is one answer."""
    from openvla_client import NoAnswer, NotReached, Refused, connect_async

    async with await connect_async(url, wait=60, timeout=20) as client:
        for step in range(STEPS):
            asked = (number * STEPS + step) % 256
            until = time.monotonic() + 90
            while True:
                try:
                    answer = await client.act(np.full((8, 8, 3), asked, np.uint8), "open the drawer", step=step)
                    break
                except (NotReached, NoAnswer, Refused) as error:
                    assert time.monotonic() < until, error
                    refusals[f"{type(error).__name__}: {str(error)[:80]}"] += 1
                    await asyncio.sleep(0.1)
            assert level(answer) == asked, "the answer to another request"
            assert (number, step) not in answers, "answered twice"
            answers[number, step] = int(answer.timing["pid"])
            pids[int(answer.timing["pid"])] += 1
            if len(answers) >= KILLED_AT:
                answered.set()


async def ask_while_one_dies(port: int) -> tuple[dict, Counter, Counter, int]:
    answers: dict = {}
    refusals: Counter = Counter()
    pids: Counter = Counter()
    answered = asyncio.Event()
    urls = (f"ws://127.0.0.1:{port}", f"http://127.0.0.1:{port}")
    robots = [
        asyncio.create_task(robot(number, urls[number % 2], answers, refusals, pids, answered))
        for number in range(ROBOTS)
    ]
    waiting = asyncio.create_task(answered.wait())
    await asyncio.wait({waiting, *robots}, return_when=asyncio.FIRST_COMPLETED)
    assert waiting.done() and len(pids) == 2, (pids, refusals, robots)
    killed = min(pids)
    os.kill(killed, signal.SIGKILL)
    await asyncio.gather(*robots)
    return answers, refusals, pids, killed


def test_a_replica_is_killed_under_load(started):
    server = started("load")
    assert "serving" in server.said
    with pytest.raises(urllib.error.HTTPError) as nothing:
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60)
    assert nothing.value.code == 404 and b"With --ray there is no page" in nothing.value.read()
    answers, refusals, pids, killed = asyncio.run(ask_while_one_dies(server.port))
    print(f"{len(answers)} answers by {dict(pids)}, of which {killed} was killed; asked again: {dict(refusals)}")
    assert len(answers) == ROBOTS * STEPS  # each once, and the right one
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as metrics:
        assert b'openvla_ready{replica="' in metrics.read()
    assert pids[killed] < sum(pids.values()) / 2 and refusals  # what was in flight there was asked again
    assert server.stop() == 0


def test_a_model_that_cannot_be_loaded(started):
    server = started("load_broken")
    assert server.stop() == 1
    assert "weights are missing" in server.said and "No replica could be started" in server.said
