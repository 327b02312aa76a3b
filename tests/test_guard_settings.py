"""A guard with any settings, any pace of its loop and any camera: what was executed, judged by what is promised.

Settings and events are drawn by seeds. As in faulty_network.py an action says which request it answers, and the judge
(`World.judge`) looks at the numbers that were executed, the clock and what was asked, never at what the guard says.
"""

import heapq
import math
import random
from collections import Counter

import numpy as np
import pytest
from openvla_client import ActionSpec, Guard, Limits, NoAction, Reply, State, guard, plan
from openvla_client.plan import Plan


NAMES = ("request", "index", "joint", "yaw", "x", "gripper")
SPEC = ActionSpec(NAMES, (False, True, False, False, True, False), (5,), hz=10)
PERIOD, START = 0.1, [-1.0, 0.0, 0.0, 0.0, 0.0, 0.5]
STEP, PLACE = {"joint": 0.2, "yaw": 0.3, "x": 0.1}, {"joint": (-1, 1), "x": (-0.5, 0.5)}
EVENTS = (
    "reconnected",
    "connection",
    "reset",
    "reset without start",
    "reset and nobody looks",
    "pause",
    "sleep",
    "jump",
)


class World:
    """A robot, its camera and clock, a network and a server; a transport for its guard."""

    def __init__(self, seed: int):
        choice = (draw := random.Random(seed)).choice
        self.random, self.now, self.offset, self.slept, self.connection = draw, 0.0, 1000.0, 0.0, 0
        self.delay, self.loss, self.wrong = choice([0.001, 0.03, 0.3]), choice([0, 0.2]), choice([0, 0.1])
        self.lengths = choice([[1], [8], [1, 2, 8], [3, 12], [80]])  # of an answer; they may change
        self.pace, self.events = choice([1, 1, 0.2, 1.3, None]), choice([0, 0.03, 0.2])
        self.camera, self.late = choice([None, 0.033, 0.1, 0.25]), choice([0, 0.03, 0.12, 0.25])
        self.far = choice([0.03, 1])  # how far actions go
        self.refuse, self.limited = choice([False, True]), choice([False, True])
        self.fallback, self.wait = choice(["hold", "raise"]), choice([0, 0.05, 0.15])
        self.execute, self.max_age = choice([None, 6]), choice([None, 0.05, 0.5])
        limits = Limits(STEP, PLACE, self.refuse, turn={"yaw": 2 * math.pi}) if self.limited else None
        self.lines: list[dict] = []
        self.guard = Guard(
            self, SPEC, wait=self.wait, max_age=self.max_age, ask_every=choice([1, 2, 30]), execute=self.execute,
            commit=choice([0, 0, 3]), fallback=self.fallback, limits=limits, dead_after=choice([2, 5]),
            audit=self.lines.append, clock=lambda: self.now + self.offset, slept=self.slept_since,
        )  # fmt: skip
        self._messages: list = []
        self.asked: dict[int, tuple[float, int, int]] = {}  # id -> when its picture was seen, step, generation
        self.answers: dict[int, list[list[float]]] = {}
        self.pictures: list[float] = []  # that were asked
        self.generation = self.step = 0
        self.done: set[tuple[int, int]] = set()
        self.times: list[float] = []  # of answers that were executed, by the clock
        self.wrongs: Counter[str] = Counter()
        self.x = 0.0
        self.reset(START)

    def slept_since(self) -> float:
        slept, self.slept = self.slept, 0.0
        return slept

    # The transport ----------------------------------------------------------------------------------------------------

    def submit(self, ask) -> None:
        self.asked[ask.id] = (self.seen, self.step, self.generation)
        if self.camera is not None:
            self.wrongs["picture asked twice"] += self.seen in self.pictures
            self.pictures.append(self.seen)
        if self.random.random() >= self.loss:
            for _ in range(self.random.choice([1, 1, 2])):
                at = self.now + self.random.expovariate(1 / self.delay)
                heapq.heappush(self._messages, (at, len(self._messages), self.random.random(), ask))

    def poll(self, timeout: float):
        end = self.now + timeout
        if not self._messages or self._messages[0][0] > end:
            self.now = end
            return None
        at, _, _, ask = heapq.heappop(self._messages)
        self.now = max(self.now, at)
        if self.random.random() < self.wrong:
            return Reply(ask.epoch, ask.id, [[math.nan] * 6])
        between, far = self.random.uniform, self.far
        if ask.id not in self.answers:
            self.answers[ask.id] = [
                [ask.id, i, far * between(-3, 3), far * between(-3, 3), far * between(-0.3, 0.3), between(0, 1)]
                for i in range(self.random.choice(self.lengths))
            ]
        return Reply(ask.epoch, ask.id, self.answers[ask.id])

    def close(self) -> None:
        pass

    # The robot --------------------------------------------------------------------------------------------------------

    def reset(self, start, wake: bool = True) -> None:
        self.guard.reset(start, wake=wake)
        self.last, self.stopped = start, False  # what was executed last
        self.generation += 1
        if wake:
            self.ended, self.silent = None, False  # when the last step ended; whether nothing may move it any more

    def happen(self) -> None:
        event = self.random.choice(EVENTS)
        self.generation += event in ("reconnected", "connection", "sleep")
        if event == "reconnected":
            self.guard.reconnected()
        elif event == "connection":
            self.connection += 1
        elif event.startswith("reset"):
            self.reset(None if event == "reset without start" else START, event != "reset and nobody looks")
        elif event == "pause":
            self.now += self.random.choice([0.15, 0.5, 2.2, 6, 20])
        elif event == "sleep":
            self.slept = self.random.choice([0.5, 3, 100])
        else:
            far = self.random.choice([-1, 1]) * self.random.uniform(3, 50)
            self.offset += far
            if far < 0:  # nothing that was timed before can be compared
                self.generation, self.ended, self.times, self.pictures = self.generation + 1, None, [], []

    def run(self, steps: int) -> None:
        due = 0.0
        for self.step in range(steps):
            if self.random.random() < self.events:
                self.happen()
            if self.guard.state is State.DEAD and self.random.random() < 0.1:
                self.reset(START)
            self.one_step()
            due = max(due + PERIOD * (self.pace or self.random.uniform(0.2, 2)), self.now)
            self.now = due + self.random.choice([0, self.random.uniform(0, 0.01)])

    def one_step(self) -> None:
        begin, clock = self.now, self.now + self.offset
        if self.ended is not None:
            self.silent |= max(clock - self.ended, self.slept) > self.guard.dead_after + 1e-6
        seen_at = None if self.camera is None else clock - self.late - self.now % self.camera
        self.seen = clock if seen_at is None else seen_at
        here = [math.nan] * 4 + [self.x, math.nan]
        here[2:4] = self.random.choice([[math.nan] * 2, [self.random.uniform(-1, 1)] * 2])
        here = None if self.random.random() < 0.2 else here
        try:
            command = self.guard.step(self.step, seen_at=seen_at, position=here)
        except NoAction as error:
            command = error.command
        self.ended = self.now + self.offset
        executed = None if command.action is None else command.action.tolist()
        wrongs = [*self.judge(executed, command, here), *(["blocked"] if self.now - begin > self.wait + 1e-9 else [])]
        self.wrongs.update(wrongs)
        self.stopped = executed is None
        if executed is not None:
            self.last, self.x = executed, (self.x + executed[4]) * (0.5 if abs(self.x) > 1 else 1)

    # The judge --------------------------------------------------------------------------------------------------------

    def judge(self, executed, command, here):
        line = self.lines[-1]
        if (line["action"], line["source"]) != (executed, command.source):
            yield "another line in the audit"
        if command.source == "answer":
            request, index = int(executed[0]), int(executed[1])
            yield from self.judge_answer(request, index)
            yield from self.judge_limits(executed, self.answers[request][index], here)
        elif executed is not None:
            if (
                self.fallback == "raise"
                or self.last is None
                or executed != [self.last[0], 0, *self.last[2:4], 0, self.last[5]]
            ):
                yield "not held"
        elif self.fallback == "hold" and self.last is not None:
            yield "nothing to execute"

    def judge_answer(self, request, index):
        seen, step, generation = self.asked[request]
        if self.silent:
            yield "moved after a long silence"
        if (request, index) in self.done or any(request < other for other, _ in self.done):
            yield "doubled, or of an older answer"
        if generation != self.generation:
            yield "of another epoch"
        age, most = self.ended - seen - index * PERIOD, self.guard.max_age
        if max(age, (self.step - step - index) * PERIOD) > most + 1e-6 or age < -most - 1e-6:
            yield "stale or early"
        if self.execute is not None and index >= self.execute:
            yield "beyond execute"
        self.done.add((request, index))
        self.times.append(self.ended)
        if any(count > (self.ended - time) / PERIOD + 4 for count, time in enumerate(reversed(self.times), 1)):
            yield "faster than the control rate"

    def judge_limits(self, executed, answered, here):
        if not self.limited:
            if executed != answered:
                yield "changed without limits"
            return
        if self.refuse and not np.allclose(executed, answered, atol=1e-9):
            yield "cut in place of refused"
        x, joint, yaw = self.x, *(self.last or [math.nan] * 4)[2:4]
        if here is not None and (self.last is None or self.stopped):
            joint, yaw = (place if math.isfinite(place) else before for place, before in zip(here[2:4], (joint, yaw)))
        if not (here and math.isfinite(joint) and math.isfinite(yaw)):
            yield "not checked"
        turned = abs((executed[3] - yaw + math.pi) % (2 * math.pi) - math.pi)
        if abs(executed[2] - joint) > 0.2 + 1e-9 or turned > 0.3 + 1e-9 or abs(executed[4]) > 0.1 + 1e-9:
            yield "beyond the limit of a step"
        for before, after, edge in ((joint, executed[2], 1), (x, x + executed[4], 0.5)):
            if abs(after) > max(edge, abs(before)) + 1e-9:
                yield "out of the workspace"


def wrongs_of(seeds, steps: int = 200) -> tuple[Counter, int]:
    """What the judge found, and how many actions of answers were executed."""
    found, acted = Counter(), 0
    for seed in seeds:
        world = World(seed)
        world.run(steps)
        assert len(world.lines) == steps
        found += world.wrongs
        acted += sum(line["source"] == "answer" for line in world.lines)
    return +found, acted


@pytest.mark.parametrize("part", range(4))
def test_what_is_promised_holds_with_any_settings(part):
    found, acted = wrongs_of(range(40 * part, 40 * part + 40))
    assert not found and acted > 1000


@pytest.mark.parametrize(
    "owner, name, broken, wrong",
    [
        (Guard, "_next_state", lambda guard, age: State.OK, "moved after a long silence"),
        (Guard, "_target", lambda guard, here: None if here is None else np.zeros(6), "beyond the limit of a step"),
        (Limits, "apply", lambda limits, action, *given: (action, []), "out of the workspace"),
        (Plan, "EARLY", 1000, "faster than the control rate"),
        (plan, "EPSILON", 0.3, "stale or early"),
        (guard, "held", lambda spec, last: np.zeros(6), "not held"),
    ],
)
def test_the_judge_judges(owner, name, broken, wrong, monkeypatch):
    monkeypatch.setattr(owner, name, broken)
    assert wrongs_of(range(30))[0][wrong] > 3
