"""A robot, a network and a server that fail in every way, in simulated time; and a judge of what the robot executed.

What the simulation does is noted by itself (`Book`) and nothing of it by the guard: the judge reads the book, and the
audit that the guard wrote. An action says which request it answers and which of its chunk it is, so that the numbers
which were executed, not what the guard says of them, show where they come from.
"""

import heapq
import random
from dataclasses import dataclass, field, replace

import numpy as np
from openvla_client import ActionSpec, Guard, NoAction, Reply


# The numbers of an action: request (a place), index in the chunk (a change), and a gripper.
SPEC = ActionSpec(("request", "index", "gripper"), (False, True, False), (2,), hz=10)
PERIOD, MAX_AGE, WAIT = 0.1, 0.2, 0.05
START = [-1.0, 0.0, 0.5]


@dataclass(frozen=True)
class Faults:
    """Probabilities are of one message or one step; times are seconds."""

    delay: float = 0.02  # mean of each way, exponential
    slow: float = 0.0  # a message that takes up to two seconds, and so is overtaken
    loss: float = 0.0
    double: float = 0.0
    old: float = 0.0  # an answer comes a second time, up to a minute later
    half_open: float = 0.0  # begins in a step: messages vanish, and nobody is told
    kill: float = 0.0  # of the server, in a step: what it had is lost; it starts again after up to three seconds
    reconnect: float = 0.0
    reset: float = 0.0
    wrong: float = 0.0  # an answer that is no action
    held_up: float = 0.0  # the loop of the robot, up to half a second
    jump: float = 0.0  # of the robot's clock, in a step or in its middle
    service: float = 0.03


@dataclass
class Book:
    """What happened, in true time. generation: counts resets, reconnections and jumps back of the clock."""

    asked: dict[int, tuple[float, int, int]] = field(default_factory=dict)  # id -> true time, step, generation
    steps: list[tuple[float, float, int]] = field(default_factory=list)  # true begin and end, generation
    executed: list[list[float] | None] = field(default_factory=list)
    starts: set[int] = field(default_factory=set)  # steps that are the first after a reset
    faults: dict[str, int] = field(default_factory=dict)

    def count(self, fault: str) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + 1


WRONG = (
    [np.nan, 0.0, 0.5], [1.0, np.inf, 0.5], [1.0], np.zeros((0, 3)), None, "forward", {"action": [1, 2, 3]},
    np.zeros((2, 2, 3)), OSError("gone"), [[1.0, 2.0, 3.0], [1.0, 2.0]], [[7.0, 0.0, 0.5]] * 3 + [[7.0, 0.0, -np.inf]],
)  # fmt: skip


class Simulation:
    """A transport for the guard, and everything behind it."""

    def __init__(self, seed: int, faults: Faults, chunk: int):
        self.random, self.faults, self.chunk = random.Random(seed), faults, chunk
        self.now, self.offset, self.generation, self.connection = 0.0, 1000.0, 0, 0
        self.book, self.global_step = Book(), 0
        self._messages: list = []  # (time it arrives, count, kind, content)
        self._count = 0
        self._server_free = self._server_up = self._dark_until = 0.0
        self._server_life = 0

    # The guard's side -------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now + self.offset

    def submit(self, ask) -> None:
        self.book.asked[ask.id] = (self.now, self.global_step, self.generation)
        self._send("request", ask)

    def poll(self, timeout: float):
        end = self.now + timeout
        while self._messages and self._messages[0][0] <= end:
            at, _, kind, content = heapq.heappop(self._messages)
            self.now = max(self.now, at)
            if self._chance("jump", share=0.02):
                self.jump()
            if kind == "request":
                self._serve(content)
            elif kind == "served":
                self._served(*content)
            else:
                return content
        self.now = end
        return None

    def close(self) -> None:
        pass

    # Network and server -----------------------------------------------------------------------------------------------

    def _chance(self, fault: str, share: float = 1.0) -> bool:
        happened = self.random.random() < getattr(self.faults, fault) * share
        if happened:
            self.book.count(fault)
        return happened

    def _put(self, after: float, kind: str, content) -> None:
        self._count += 1
        heapq.heappush(self._messages, (self.now + after, self._count, kind, content))

    def _send(self, kind: str, content) -> None:
        if self.now < self._dark_until or self._chance("loss"):
            return
        for _ in range(1 + self._chance("double")):
            late = self.random.uniform(0, 2) if self._chance("slow") else 0.0
            self._put(self.random.expovariate(1 / self.faults.delay) + late, kind, content)
        if kind == "reply" and self._chance("old"):
            self._put(self.random.uniform(0, 60), kind, content)

    def _serve(self, ask) -> None:
        if self.now < self._server_up:
            return
        self._server_free = max(self.now, self._server_free) + self.random.expovariate(1 / self.faults.service)
        self._put(self._server_free - self.now, "served", (ask, self._server_life))

    def _served(self, ask, life: int) -> None:
        if life != self._server_life:
            return  # it was killed in between
        actions = [[float(ask.id), float(index), self.random.random()] for index in range(self.chunk)]
        reply = Reply(ask.epoch, ask.id, actions[0] if self.chunk == 1 else actions)
        if self._chance("wrong"):
            wrong = self.random.choice(WRONG)
            reply = replace(reply, error=wrong) if isinstance(wrong, OSError) else replace(reply, actions=wrong)
        self._send("reply", reply)

    def kill_server(self) -> None:
        self._server_life += 1
        self._server_up = self._server_free = self.now + self.random.uniform(0.2, 3)

    # The robot --------------------------------------------------------------------------------------------------------

    def jump(self) -> None:
        """Of the robot's clock, by more than a step can take."""
        far = self.random.choice((-1, 1)) * self.random.uniform(2, 500)
        self.offset += far
        self.generation += far < 0

    def run(self, guard: Guard, steps: int) -> Book:
        guard.reset(START)
        self.book.starts.add(0)
        due = 0.0
        for self.global_step in range(steps):
            self._between_steps(guard)
            begin = self.now
            try:
                command = guard.step({"step": self.global_step})
                self.book.executed.append(command.action.tolist())
            except NoAction:
                self.book.executed.append(None)
            self.book.steps.append((begin, self.now, self.generation))
            late = self.random.uniform(0.1, 0.5) if self._chance("held_up") else 0.0
            due = max(due + PERIOD, self.now) + late
            self._messages_until(due + self.random.uniform(-0.01, 0.01))
        return self.book

    def _messages_until(self, time: float) -> None:
        """What the network and the server do while the robot sleeps; replies wait for it."""
        waiting = []
        while self.now < time:
            reply = self.poll(time - self.now)
            if reply is not None:
                waiting.append(reply)
        for reply in waiting:
            self._put(0.0, "reply", reply)

    def _between_steps(self, guard: Guard) -> None:
        if self._chance("half_open"):
            self._dark_until = self.now + self.random.uniform(0.2, 4)
        if self._chance("kill"):
            self.kill_server()
        if self._chance("jump"):
            self.jump()
        if self._chance("reconnect"):
            if self.random.random() < 0.5:
                guard.reconnected()
            else:
                self.connection += 1
            self.generation += 1
        if self._chance("reset") or guard.state == "DEAD":
            guard.reset(START)
            self.generation += 1
            self.book.starts.add(self.global_step)


# The judge ------------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    stale: int = 0
    early: int = 0
    doubled: int = 0
    backwards: int = 0
    old_epoch: int = 0
    unknown: int = 0
    not_held: int = 0
    not_logged: int = 0
    blocked: int = 0
    acted: int = 0  # the only one that may be above 0

    @property
    def wrong(self) -> dict[str, int]:
        return {name: count for name, count in vars(self).items() if count and name != "acted"}


def judge(book: Book, lines: list[dict], max_age: float = MAX_AGE, wait: float = WAIT) -> Verdict:
    """What was executed, by the book of the simulation."""
    verdict, done, newest, before = Verdict(), set(), -1, None
    verdict.not_logged += abs(len(lines) - len(book.executed))
    for step, (executed, (begin, end, generation), line) in enumerate(zip(book.executed, book.steps, lines)):
        verdict.not_logged += line["action"] != executed
        verdict.blocked += end - begin > wait + 1e-9
        if step in book.starts:
            before = START
        if executed is None:
            verdict.not_held += 1  # there always is something to hold here
            continue
        if line["source"] != "answer":  # then it has to be the fallback: places and gripper as before, no change
            verdict.not_held += executed != [before[0], 0.0, before[2]]
            continue
        verdict.acted += 1
        request, index = int(executed[0]), int(executed[1])
        before = executed
        if request not in book.asked:
            verdict.unknown += 1
            continue
        asked_at, asked_step, asked_generation = book.asked[request]
        by_time, by_steps = end - asked_at - index * PERIOD, (step - asked_step - index) * PERIOD
        verdict.stale += max(by_time, by_steps) > max_age + 1e-6
        verdict.early += by_time < -max_age - 1e-6
        verdict.doubled += (request, index) in done
        verdict.backwards += (request, index) < (newest, -1)
        verdict.old_epoch += asked_generation != generation
        done.add((request, index))
        newest = max(newest, request)
    return verdict
