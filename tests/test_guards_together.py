"""Several robots of one client, and a server, or what stands before it, that answers others, twice, late and wrongly:
judged by the numbers that were executed, which say whose request they answer."""

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
from openvla_client import ActionSpec, NoAction, connect
from scripted_server import Scripted, metadata


CHUNK, SPEC = 4, ActionSpec(("session", "step", "index"), (True,) * 3, ())
IMAGE = np.zeros((8, 8, 3), np.uint8)


class Adversary:
    """Half of what it answers is right: (the number of the session, the step, the index)."""

    def __init__(self, seed: int):
        self.random, self.sessions, self.last, self.lies = random.Random(seed), [], {}, Counter()

    def __call__(self, message: dict):
        session, step = message["session"], message["step"]
        if session not in self.sessions:
            self.sessions.append(session)
        names = ("request_id", "unnorm_key", "session", "step")
        rows = [[self.sessions.index(session), step, index] for index in range(CHUNK)]
        right = {"actions": np.array(rows, float), **{name: message[name] for name in names}}
        other = self.last.get(self.random.choice(self.sessions), right)
        self.last[session] = right
        lies = {
            "of another": other,
            "an old one first": [other, right],
            "twice": [right, right],
            "of another session": {**right, "session": self.random.choice(self.sessions) + "0"},
            "of another step": {**right, "step": step + 1},
            "of another request": {**right, "request_id": -1},
            "of another model": {**right, "digest": "two"},
            "short": {**right, "actions": right["actions"][:1]},
            "not finite": {**right, "actions": right["actions"] * np.nan},
            "refused": '{"error": "no", "code": "late"}',
            "nonsense": b"\xc1",
        }
        if self.random.random() < 0.5:
            return right
        lie = self.random.choice([*lies])
        self.lies[lie] += 1
        return lies[lie]


class Robot:
    """Steps, and now and then begins again, with the same guard or another one."""

    def __init__(self, client, seed: int, adversary: Adversary):
        self.client, self.random, self.adversary = client, random.Random(seed), adversary
        self.wrong, self.own, self.done, self.acted = Counter(), set(), set(), 0

    def run(self, steps: int) -> None:
        guard = None
        for _ in range(steps):
            if guard is None or self.random.random() < 0.05:
                if guard is not None:
                    guard.close()
                guard = self.client.guard(
                    spec=SPEC, hz=50, max_age=2.0, stalled_after=2.0, ask_every=self.random.choice([1, 3]), wait=0.05,
                    commit=self.random.choice([0, 2]), fallback=self.random.choice(["hold", "raise"]),
                )  # fmt: skip
                own = set()
            if self.random.random() < 0.1:
                self.random.choice([guard.reset, guard.reconnected])()
            begin = time.monotonic()
            try:
                command = guard.step({"images": IMAGE, "instruction": "go"})
            except NoAction as error:
                command = error.command
            if command.source == "answer":
                self.judge(command, guard, own)
            time.sleep(max(0.0, begin + guard.period - time.monotonic()))
        guard.close()

    def judge(self, command, guard, own: set) -> None:
        session, step, index = map(int, command.answered)
        _, guards, epoch = self.adversary.sessions[session].split("-")
        own.add(guards)
        self.own.add(guards)
        self.wrong["of another guard"] += len(own) > 1
        self.wrong["of another epoch"] += int(epoch) != guard.epoch
        self.wrong["of another place"] += index != command.index
        self.wrong["doubled"] += (session, step, index) in self.done
        self.done.add((session, step, index))
        self.acted += 1


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_each_robot_executes_its_own_answers_once(scheme):
    adversary = Adversary(0)
    with Scripted(metadata(CHUNK, 3), adversary).running() as server, connect(server.url(scheme)) as client:
        robots = [Robot(client, seed, adversary) for seed in range(3)]
        threads = [threading.Thread(target=robot.run, args=(40,)) for robot in robots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not +sum((robot.wrong for robot in robots), Counter()) and all(robot.acted > 3 for robot in robots)
    assert len(set.union(*(robot.own for robot in robots))) == sum(len(robot.own) for robot in robots)
    assert len(adversary.lies) > 5
