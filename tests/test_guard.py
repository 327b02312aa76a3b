"""`openvla_client.Guard`: what acts, what is refused, what is executed instead. Faults of the network:
test_guard_faults.py."""

import ctypes
import dataclasses
import gc
import io
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from array import array
from collections import deque
from pathlib import Path

import numpy as np
import openvla_client
import pytest
from openvla_client import ActionSpec, Audit, Guard, Limits, NoAction, Reply, State, ThreadTransport, digest
from openvla_client.sleep import Sleep
from PIL import Image


POSE = ActionSpec(("x", "y", "z", "gripper"), (True, True, True, False), (3,), hz=10)
JOINTS = ActionSpec(("a", "b", "gripper"), (False, False, False), (2,), hz=10)


class Bench:
    """A clock that tests move, and a transport whose replies they give."""

    connection = 0

    def __init__(self, spec=POSE, start=None, **options):
        self.now, self.asked, self.replies, self.lines = 100.0, [], [], []
        options = {"clock": lambda: self.now, "audit": self.lines.append, **options}
        self.guard = Guard(self, spec, **options)
        self.guard.reset(start)

    def submit(self, ask):
        self.asked.append(ask)

    def poll(self, timeout):
        if self.replies:
            return self.replies.pop(0)
        self.now += timeout
        return None

    def close(self):
        pass

    def answer(self, actions, ask=-1):
        ask = self.asked[ask]
        if ask.committed is not None:  # models give back what they continue
            actions = [*ask.committed.tolist(), *actions[len(ask.committed) :]]
        self.replies.append(Reply(ask.epoch, ask.id, actions))

    def fail(self, after=0.1, **more):
        """A step whose request is refused."""
        command, ask = self.step(after, **more), self.asked[-1]
        self.replies.append(Reply(ask.epoch, ask.id, error=TimeoutError()))
        return command

    def step(self, after=0.1, **more):
        """A step that comes `after` seconds behind the last."""
        begin = self.now
        command = self.guard.step({"image": b"..."}, **more)
        self.now = max(self.now, begin + after)
        return command


def still(gripper=1.0):
    return [0, 0, 0, gripper]


# What acts ------------------------------------------------------------------------------------------------------------


def test_an_answer_acts_once_and_then_the_fallback():
    bench = Bench(start=still(), wait=0)
    assert bench.step().source == "hold"
    bench.answer([0.1, 0, 0, 0])
    bench.answer([0.1, 0, 0, 0])  # a duplicate
    command = bench.step()
    assert (command.source, command.state, command.id, command.index) == ("answer", State.OK, 0, 0)
    assert command.action.tolist() == [0.1, 0, 0, 0] and command.age == pytest.approx(0.1)
    command = bench.step()
    assert command.source == "hold" and "executed" in command.reason
    assert command.action.tolist() == [0, 0, 0, 0]  # no motion, the gripper as it was told last
    assert [one["refused"] for one in bench.lines[1]["arrived"]] == ["", "not asked for, or answered before"]


def test_the_answer_to_this_very_observation_is_waited_for():
    bench = Bench(start=still())  # half a period
    bench.poll = lambda timeout: bench.now_answered() if timeout else None
    bench.now_answered = lambda: Reply(bench.asked[-1].epoch, bench.asked[-1].id, [0.2, 0, 0, 1])
    command = bench.step()
    assert command.source == "answer" and command.age == 0


def test_no_longer_than_told():
    bench = Bench(start=still(), wait=0.03)
    bench.step(after=0)
    assert bench.now == pytest.approx(100.03)


@pytest.mark.parametrize("late, acts", [(1, True), (2, True), (3, False)])
def test_max_age_is_two_periods(late, acts):
    bench = Bench(start=still(), wait=0)
    for _ in range(late):
        bench.step()
    bench.answer([0.1, 0, 0, 1], ask=0)
    command = bench.step()
    assert (command.source == "answer") is acts
    assert acts or "max_age" in command.reason


def test_a_chunk_is_good_for_as_many_steps_and_no_longer():
    bench = Bench(start=still(), wait=0, stalled_after=0.5, dead_after=1.0)
    bench.step()
    bench.answer([[i / 100, 0, 0, 1] for i in range(8)])
    commands = [bench.step() for _ in range(20)]
    assert [command.index for command in commands[:7]] == [*range(1, 8)]  # action 0 was for the step before
    assert [command.state for command in commands[:2]] == [State.OK] * 2
    assert {command.state for command in commands[2:7]} == {State.DEGRADED}
    assert {command.source for command in commands[7:]} == {"hold"}
    assert [commands[i].state for i in (11, 12, 16, 17)] == [
        State.DEGRADED, State.STALLED, State.STALLED, State.DEAD,
    ]  # fmt: skip


def test_a_newer_answer_takes_over_at_its_own_step_and_an_older_one_never():
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)], ask=1)
    assert bench.step().action[0] == 1  # step 2: action 1 of the answer to step 1
    bench.answer([[10 + i, 0, 0, 1] for i in range(8)], ask=0)
    bench.answer([[20 + i, 0, 0, 1] for i in range(8)], ask=2)
    command = bench.step()
    assert (command.action[0], command.id, command.index) == (21, 2, 1)
    assert bench.lines[-1]["arrived"][0]["refused"]


def test_a_loop_that_was_held_up_leaves_out_what_it_missed():
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    assert bench.step(after=0.35).index == 1
    assert bench.step().index == 4  # 0.45 s after the observation
    assert bench.step().index == 5


def test_steps_that_come_too_fast_do_not_run_ahead():
    bench = Bench(start=still(), wait=0)
    bench.step(after=0.01)
    bench.answer([[i, 0, 0, 1] for i in range(20)])
    commands = [bench.step(after=0.01) for _ in range(10)]
    assert [command.index for command in commands if command.source == "answer"] == [1, 2]
    assert "faster" in commands[-1].reason


def test_a_loop_that_is_too_fast_moves_the_robot_no_faster():
    """Each of its observations is answered at once: without a limit an arm would move ten times as fast."""
    bench = Bench(start=still(), wait=0)
    bench.step(after=0.01)
    acted = 0
    for _ in range(200):
        bench.answer([0.1, 0, 0, 1])
        command = bench.step(after=0.01)
        acted += command.source == "answer"
    assert acted == 2 + 20 and "faster" in command.reason and command.action[0] == 0
    bench.now += 1
    bench.step(after=0)  # a timer that makes up for what it missed
    steps = []
    for _ in range(5):
        bench.answer([0.1, 0, 0, 1])
        steps.append(bench.step(after=0).source)
    assert steps == ["answer", "answer", "answer", "hold", "hold"]


@pytest.mark.parametrize("event", ["connection", "reset"])
def test_nor_does_one_that_begins_an_epoch_again_and_again(event):
    """A proxy that closes each connection: a robot moved as often as its loop ran, ten times as fast."""
    bench, acted = Bench(start=still(), wait=0), 0
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([0.1, 0, 0, 1]))
    for number in range(200):
        if number % 3 == 0 and event == "reset":
            bench.guard.reset(still())
        bench.connection += number % 3 == 0 and event == "connection"
        acted += bench.step(after=0.01).source == "answer"
    assert acted <= 3 + 20
    bench.now -= 1000  # the clock that was counted by is another one now
    assert [bench.step().source for _ in range(5)].count("answer") >= 4


def test_a_loop_in_time_loses_nothing():
    bench, jitter = Bench(start=still(), wait=0), np.random.default_rng(0).uniform(-0.045, 0.045, 500)
    bench.step(after=0)
    for number, late in enumerate(jitter, 1):
        bench.now = 100 + number / 10 + late
        bench.answer([0.1, 0, 0, 1])
        assert bench.step(after=0).source == "answer"


def test_ask_every_and_execute():
    bench = Bench(start=still(), wait=0, ask_every=4, execute=6)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    indices = [bench.step().index for _ in range(7)]
    assert indices == [1, 2, 3, 4, 5, None, None]
    assert [ask.step for ask in bench.asked] == [0, 4, 6, 7]  # at once where nothing is left


def test_what_is_committed_goes_with_the_request():
    bench = Bench(start=still(), wait=0, commit=3)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(6)])
    for _ in range(6):
        bench.fail()
    committed = [ask.committed[:, 0].tolist() for ask in bench.asked]
    assert committed == [[0, 0, 0], [0, 0, 3], [0, 3, 4], [3, 4, 5], [4, 5, 0], [5, 0, 0], [0, 0, 0]]


def test_before_the_first_answer_what_holds_the_robot_is_committed():
    """A model that is told nothing takes the robot for one that moves while it thinks: places would jump."""
    bench = Bench(JOINTS, start=[0.3, -0.2, 1], wait=0, commit=2, limits=Limits(place={"a": (-1, 1)}))
    executed = [bench.step().action.tolist() for _ in range(2)]
    bench.answer([[1, 1, 0]] * 4, ask=0)
    executed += [bench.step().action.tolist() for _ in range(2)]
    assert bench.asked[0].committed.tolist() == [[0.3, -0.2, 1]] * 2 == executed[:2]
    assert executed[2:] == [[1, 1, 0]] * 2  # the action of its step, which goes on from there
    in_time = Bench(JOINTS, start=[0.3, -0.2, 1], commit=2)
    in_time.submit = lambda ask: (in_time.asked.append(ask), in_time.answer([[1, 1, 0]] * 4))
    assert [in_time.step().source for _ in range(4)] == ["answer"] * 4  # also where it is there at once
    assert in_time.asked[0].committed.tolist() == [[0.3, -0.2, 1]] * 2
    again = Bench(POSE, start=still(0), wait=0, commit=2)
    again.step()
    again.answer([[1, 1, 1, 1]] * 4)
    for _ in range(9):  # nothing more is answered
        last = again.step()
    assert last.source == "hold" and again.asked[-1].committed.tolist() == [[0, 0, 0, 1]] * 2


@pytest.mark.parametrize("options", [{"start": None}, {"start": still(), "fallback": "raise"}])
def test_nothing_is_committed_where_nobody_knows_what_is_executed(options):
    bench = Bench(wait=0, commit=2, **options)
    with pytest.raises(NoAction):
        bench.step()
    assert bench.asked[0].committed is None


def test_nothing_is_committed_by_a_loop_that_is_too_fast():
    """What is left of the chunk acts later, nobody knows when."""
    bench = Bench(start=still(), wait=0, commit=2)
    bench.step(after=0.01)
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    steps = [bench.fail(after=0.01) for _ in range(4)]
    assert "rate" in steps[-1].reason and bench.asked[-1].committed is None


def told_and_executed(bench, steps, **more):
    """Each committed action that was sent for a step, and what was executed in it."""
    executed = [bench.fail(**more).action for _ in range(steps)]
    told = [
        (ask.step + i, action) for ask in bench.asked[1:] if ask.committed is not None
        for i, action in enumerate(ask.committed) if ask.step + i < len(executed) + 1
    ]  # fmt: skip
    return [(action.tolist(), executed[step - 1].tolist()) for step, action in told]


def test_what_is_committed_is_what_will_be_executed():
    bench = Bench(JOINTS, start=[0, 0, 0], wait=0, commit=3, limits=Limits(step={"a": 0.25}))
    bench.step()
    bench.answer([[i, -i, 0.5] for i in range(6)])
    pairs = told_and_executed(bench, 5)
    assert len(pairs) == 3 + 3 + 3 + 2 + 1 and all(told == done for told, done in pairs)
    assert bench.asked[3].committed[:, 0].tolist() == [0.25, 0.5, 0.75]  # each from where the one before leads
    assert bench.asked[3].committed[:, 1].tolist() == [-3, -4, -5]


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("ask_every", [1, 2])
@pytest.mark.parametrize("commit", [1, 2, 3])
def test_what_is_committed_is_executed_until_the_answer_is_there(late, ask_every, commit):
    """While one request was on its way, the next one was told what the answer to the first would change: the model then
    continued actions that were never executed."""
    bench, executed, acted = Bench(start=still(), wait=0, commit=commit, ask_every=ask_every), [], {}
    for step in range(40):
        command = bench.step()
        executed.append(command.action.tolist())
        acted.setdefault(command.id, step)
        for number, ask in enumerate(bench.asked):
            if ask.step == step + 1 - late:  # the first number says which answer it is of
                bench.answer([[number + i / 10, 0, 0, 1] for i in range(8)], number)
    told = [ask for ask in bench.asked if ask.id in acted]
    assert len(told) >= 40 // max(late + 1, ask_every) - 2
    for ask in told:
        ahead = ask.committed.tolist()[: acted[ask.id] - ask.step]
        assert ahead == executed[ask.step : ask.step + len(ahead)], ask.step


def test_a_request_that_is_lost_is_followed_by_another_one():
    """Its answer, if it comes after all, is none to what was asked since."""
    bench = Bench(start=still(), wait=0, commit=1)
    for _ in range(9):
        bench.step()
    assert [ask.step for ask in bench.asked] == [0, 5]  # stalled_after
    bench.answer([still()] * 4, ask=0)
    bench.step()
    assert bench.lines[-1]["arrived"][0]["refused"] == "not asked for, or answered before"
    bench.guard.reset(still())
    bench.step()
    assert bench.asked[-1].step == 0  # of the episode before


def test_what_may_not_be_executed_is_not_committed():
    refusing = Bench(start=still(), wait=0, commit=3, limits=Limits(step={"x": 2.5}, refuse=True))
    refusing.step()
    refusing.answer([[i - 3, 0, 0, 1] for i in range(8)])
    pairs = told_and_executed(refusing, 5)
    assert [told[0] for told, _ in pairs[-6:]] == [0, 1, 2, 1, 2, 2]
    assert all(told == done for told, done in pairs)
    placed = Bench(start=still(), wait=0, commit=3, limits=Limits(place={"z": (0.1, 0.5)}))
    for position, expected in (([0, 0, 0.2, 0], [[1, 0, 0.3, 1]]), (None, None)):
        placed.guard.reset(still())
        placed.step()
        placed.replies.append(Reply(placed.asked[-1].epoch, placed.asked[-1].id, [[i, 0, 1, 1] for i in range(6)]))
        placed.step(position=position)  # where it stands in the steps after that, nobody knows
        committed = placed.asked[-1].committed
        assert (committed if committed is None else committed.round(9).tolist()) == expected


def test_what_a_loop_that_was_held_up_leaves_out_is_not_committed():
    bench = Bench(start=still(), wait=0, commit=2)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(6)])
    bench.now += 0.2
    assert bench.step().action[0] == 2 and bench.asked[-1].committed[:, 0].tolist() == [2, 3]


@pytest.mark.parametrize("old", [0.0, 0.06, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("answered_after", [0.0, 0.03, 0.049, 0.1])
def test_what_is_committed_is_executed_of_a_camera_that_is_late_as_well(old, answered_after):
    """Actions are due by the time of their picture, and what is committed begins with this step: of a picture of more
    than a period ago one that was announced was left out, and the next one executed in its place."""
    bench = Bench(start=still(), wait=0.05, commit=2, max_age=0.35)
    on_its_way = []

    def poll(timeout):
        end = bench.now + timeout
        if not on_its_way or on_its_way[0][0] > end + 1e-9:
            bench.now = end
            return None
        at, ask = on_its_way.pop(0)
        bench.now = max(bench.now, at)
        ahead = [] if ask.committed is None else ask.committed.tolist()
        return Reply(ask.epoch, ask.id, [*ahead, *([ask.id + i / 100, 0, 0, 1] for i in range(len(ahead), 8))])

    bench.poll = poll
    bench.submit = lambda ask: (bench.asked.append(ask), on_its_way.append((bench.now + answered_after, ask)))
    executed, at = [], 100.0
    for _ in range(30):
        bench.now = at
        executed.append(bench.step(after=0, seen_at=at - old).action.tolist())
        at += 0.1
    told = [ask for ask in bench.asked if ask.committed is not None]
    assert len(told) > 5 if old <= 0.1 else not told
    for ask in told:
        ahead = ask.committed.tolist()[: 30 - ask.step]
        assert ahead == executed[ask.step : ask.step + len(ahead)], ask.step


def test_a_function_and_short_chunks_commit_nothing():
    with pytest.raises(ValueError, match="commit=2: a function is given observations alone"):
        Guard(lambda seen: still(), POSE, commit=2)
    with pytest.raises(ValueError, match="commit=2, execute=2: nothing of an answer would be new"):
        Bench(commit=2, execute=2)
    bench = Bench(start=still(), wait=0, commit=3)  # of a transport of one's own, whose chunks nobody knows before
    bench.step()
    bench.replies.append(Reply(bench.asked[0].epoch, bench.asked[0].id, [[1, 0, 0, 1], [2, 0, 0, 1]]))
    bench.step()
    assert bench.asked[-1].committed[:, 0].tolist() == [2]


# What never acts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "actions",
    [
        [0.1, np.nan, 0, 1],
        [0.1, np.inf, 0, 1],
        [0.1, 0, 1],
        [[0.1, 0, 0, 1, 1]],
        [[[0.1, 0, 0, 1]]],
        [],
        [[]],
        np.zeros((0, 4)),
        np.zeros((5000, 4)),
        0.5,
        None,
        "motion",
        ["0.1", "0", "0", "1"],
        [True, False, False, True],
        [0.1, 0, 0, True],
        deque([0.1, 0, 0, True]),
        np.ma.masked_array([0.1, 0, 0, 1], [True, False, False, False]),  # a number of which nothing is known
        [np.ma.masked_array([0.1, 0, 0, 1], [True, False, False, False])],
        [1 + 2j, 0, 0, 0],
        [[0, 0, 0, 1], [0, 0]],
        {"actions": [0, 0, 0, 1]},
        np.array([0, 0, 0, None]),
        [[0, 0, 0, 1], [0, 0, 0, np.nan]],  # nothing of an answer that is wrong further on
    ],
    ids=repr,
)
def test_what_is_no_action_never_acts(actions):
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.answer(actions)
    command = bench.step()
    assert command.source == "hold" and command.action.tolist() == still()
    assert (said := bench.lines[-1]["arrived"][0]["refused"]) and "float64 (4,), expected numbers (4,)" not in said
    bench.answer([0.1, 0, 0, 1])  # to the next observation
    assert bench.step().source == "answer"


def test_an_error_in_place_of_an_answer():
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.replies.append(Reply(bench.asked[0].epoch, bench.asked[0].id, error=TimeoutError("no answer in 1 s")))
    assert bench.step().source == "hold"
    assert bench.lines[-1]["arrived"][0]["refused"] == "TimeoutError: no answer in 1 s"


@pytest.mark.parametrize("again", ["reset", "reconnected", "connection"])
def test_an_answer_from_before_never_acts(again):
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    assert bench.step().source == "answer"
    if again == "connection":
        bench.connection += 1
    else:
        getattr(bench.guard, again)(*[still()] * (again == "reset"))
    assert bench.step().source == "hold"  # the rest of the chunk
    bench.answer([0.5, 0, 0, 1], ask=1)  # asked before
    command = bench.step()
    assert command.source == "hold" and "epoch" in bench.lines[-1]["arrived"][0]["refused"]
    bench.answer([0.5, 0, 0, 1])
    assert bench.step().source == "answer"


def test_a_request_that_was_never_made():
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.replies.append(Reply(bench.guard.epoch, 99, [0.1, 0, 0, 1]))
    assert bench.step().source == "hold"


def test_a_clock_that_goes_back_begins_an_epoch():
    bench = Bench(start=still(), wait=0)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    assert bench.step().source == "answer"
    bench.now -= 50
    command = bench.step()
    assert command.source == "hold" and "clock" in command.reason
    bench.answer([0.1, 0, 0, 1])
    assert bench.step().source == "answer"


def test_sleep_begins_an_epoch():
    """The clock did not count it: what was asked and seen before looks young."""
    slept = [0.0]
    bench = Bench(start=still(), wait=0, slept=lambda: slept.pop() if slept else 0.0, dead_after=60)
    bench.step()
    bench.answer([[i, 0, 0, 1] for i in range(8)])
    assert bench.step().source == "answer"
    before = bench.now
    slept.append(3.0)
    command = bench.step(seen_at=before)
    assert command.source == "hold" and "sleep" in command.reason and command.age > 3
    bench.answer([0.1, 0, 0, 1])  # to what was asked before
    assert bench.step(seen_at=before).source == "hold" and len(bench.asked) == 2
    bench.step()
    bench.answer([0.2, 0, 0, 1])
    assert bench.step().source == "answer"
    slept.append(3600.0)
    assert bench.step().state is State.DEAD  # somebody has to look first
    before = bench.now
    slept.append(3600.0)
    bench.guard.reset(still())
    asked = len(bench.asked)
    assert bench.step(seen_at=before).state is not State.DEAD and len(bench.asked) == asked  # an old picture
    bench.step()
    assert len(bench.asked) == asked + 1


def test_sleep_is_told_from_a_thread_that_was_stopped():
    times = iter([(10.0, 10.0, 10.0), (11.0, 16.0, 16.0), (17.0, 20.0, 17.0), (18.0, 21.0, 23.0), (24.0, 37.5, 24.5),
                  (25.0, 38.0, 25.0)])  # fmt: skip
    clocks: list[float] = []

    def read() -> float:
        if not clocks:
            clocks.extend(next(times))
        return clocks.pop(0)

    sleep = Sleep(read, read)
    assert [sleep.since_last() for _ in range(6)] == [0.0, 0.0, 3.0, 0.0, 10.0, 0.0]
    real = Sleep()
    assert not any(real.since_last() for _ in range(2000))
    assert Guard(lambda seen: None, POSE)._slept.__name__ == "since_last"


def test_a_clock_that_stands_still_ages_by_steps():
    bench = Bench(start=still(), wait=0)
    bench.step(after=0)
    bench.answer([[i, 0, 0, 1] for i in range(3)])
    commands = [bench.step(after=0) for _ in range(60)]
    assert [command.index for command in commands[:3]] == [1, 2, None]
    assert commands[-1].state is State.DEAD


def test_times_of_another_clock_are_refused():
    bench = Bench(start=still(), wait=0)
    for seen_at in (bench.now + 1, 1.7e9, 0.0, float("nan")):
        command = bench.step(seen_at=seen_at)
        assert command.source == "hold" and "seen_at" in command.reason
    assert not bench.asked
    bench.step(seen_at=bench.now - 0.15)
    bench.answer([0.1, 0, 0, 1])
    assert bench.step().age == pytest.approx(0.25) and "max_age" in bench.lines[-1]["reason"]


def test_what_was_seen_once_moves_once():
    """A camera that is slower than the loop: the change that was executed is not in its picture yet."""
    bench = Bench(start=still(), wait=0)
    bench.step(seen_at=100.0)
    bench.answer([0.1, 0, 0, 1])
    assert [bench.step(seen_at=100.0).source for _ in range(2)] == ["answer", "hold"]
    bench.step(seen_at=100.25)
    bench.answer([0.1, 0, 0, 1])
    assert bench.step(seen_at=100.25).source == "answer"
    assert len(bench.asked) == 2
    bench.step(seen_at=100.2)  # older than what was asked
    bench.step(seen_at=100.25)
    assert len(bench.asked) == 2 and "nothing new was seen" in bench.lines[-1]["reason"]
    bench.guard.reconnected()
    bench.step(seen_at=100.25)
    assert len(bench.asked) == 2
    seen_at = bench.now
    bench.step(seen_at=seen_at)
    bench.guard.reset(still())  # as at the next instruction: the picture is that from before the last motion
    bench.step(seen_at=seen_at)
    assert len(bench.asked) == 3 and "nothing new was seen" in bench.lines[-1]["reason"]
    bench.step(seen_at=bench.now)
    assert len(bench.asked) == 4
    bench.now -= 50
    bench.guard.reset(still())  # times of the clock as it went before say nothing
    bench.step(seen_at=bench.now)
    assert len(bench.asked) == 5


def test_what_another_guard_asked_never_acts():
    """Two robots on one transport, or a program that was started again before the answer came."""
    one, other = Bench(start=still(), wait=0), Bench(start=still(), wait=0)
    one.step()
    other.step()
    assert one.asked[0].id == other.asked[0].id
    one.answer([0.5, 0, 0, 1])
    other.replies = one.replies
    assert other.step().source == "hold" and "epoch" in other.lines[-1]["arrived"][0]["refused"]


# States, fallback -----------------------------------------------------------------------------------------------------


def test_dead_until_somebody_looks():
    bench = Bench(start=still(), wait=0, dead_after=1.0)
    states = [bench.step().state for _ in range(12)]
    assert states == [State.DEGRADED] * 6 + [State.STALLED] * 5 + [State.DEAD]
    asked = len(bench.asked)
    bench.answer([0.1, 0, 0, 1])
    command = bench.step()
    assert command.state is State.DEAD and command.source == "hold" and len(bench.asked) == asked
    bench.guard.reset(still())
    bench.step()
    bench.answer([0.1, 0, 0, 1])
    assert bench.step().state is State.OK


@pytest.mark.parametrize("silence", ["loop held up", "sleep"])
def test_an_answer_at_once_wakes_nobody(silence):
    """A server that answers in the same step hides how long nothing moved: the age is judged before it is asked."""
    slept = [0.0]
    bench = Bench(start=still(), wait=0.05, slept=lambda: slept.pop() if slept else 0.0)
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([0.1, 0, 0, 1]))
    bench.now += 60  # between `reset` and the first step: the episode begins with the step
    assert [bench.step().source for _ in range(3)] == ["answer"] * 3
    if silence == "sleep":
        slept.append(3600.0)
    else:
        bench.now += 60
    asked = len(bench.asked)
    commands = [bench.step() for _ in range(3)]
    assert [(command.state, command.source) for command in commands] == [(State.DEAD, "hold")] * 3
    assert commands[0].age > 60 and len(bench.asked) == asked
    bench.guard.reset(still())
    assert bench.step().source == "answer"


@pytest.mark.parametrize("ask_every", [1, 100])
def test_a_loop_that_paused_is_dead_with_a_long_chunk_as_well(ask_every):
    """Its last action is due long after the pause: neither it nor a new answer moves a robot that stood still."""
    bench = Bench(start=still(), wait=0.05, ask_every=ask_every)
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([[0.1, 0, 0, 1]] * 100))
    assert [bench.step().source for _ in range(3)] == ["answer"] * 3
    bench.now += 4.5
    assert bench.step().source == "answer"  # what it missed is left out
    bench.now += 5.0
    commands = [bench.step() for _ in range(3)]
    assert [(command.state, command.source) for command in commands] == [(State.DEAD, "hold")] * 3
    bench.guard.reset(still())
    assert bench.step().source == "answer"


@pytest.mark.parametrize("silence", ["loop held up", "sleep", "dead", "no answers"])
def test_a_reset_at_which_nobody_looks_wakes_nobody(silence):
    slept = []
    bench = Bench(start=still(), wait=0.05, slept=lambda: slept.pop() if slept else 0.0)
    bench.guard.reset(still(), wake=False)  # before the first step there is no silence
    at_once = lambda ask: (bench.asked.append(ask), bench.answer([0.1, 0, 0, 1]))  # noqa: E731
    bench.submit = at_once
    bench.now += 60
    for _ in range(3):
        assert [bench.step().source for _ in range(3)] == ["answer"] * 3
        before = bench.asked[-1].epoch
        bench.guard.reset(still(0), wake=False)
        assert bench.guard.epoch > before and bench.guard.state is State.DEGRADED
    if silence == "sleep":
        slept.append(3600.0)
    elif silence == "no answers":
        bench.submit = bench.asked.append
        states = []
        for _ in range(60):
            states.append(bench.step().state)
            bench.guard.reset(still(0), wake=False)
        assert 49 <= states.index(State.DEAD) <= 52
        bench.submit = at_once
    else:
        bench.now += 60
        assert silence != "dead" or bench.step().state is State.DEAD
    bench.guard.reset(still(0), wake=False)
    command = bench.step()
    assert (command.state, command.source, command.action.tolist()) == (State.DEAD, "hold", still(0))
    bench.guard.reset(still())
    assert bench.step().source == "answer"


def test_a_step_that_was_held_up_itself_is_dead_as_well():
    bench = Bench(start=still(), wait=0.05)
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([[0.1, 0, 0, 1]] * 100))
    bench.step()
    poll, bench.poll = bench.poll, lambda timeout: (setattr(bench, "now", bench.now + 6 * (timeout > 0)), poll(0))[1]
    command = bench.step()
    assert (command.state, command.source) == (State.DEAD, "hold")


@pytest.mark.parametrize("event", ["connection", "connection with an answer", "clock"])
def test_silence_counts_from_the_last_action_that_was_executed(event):
    """An epoch that begins in the middle of a long chunk: the robot moved a step ago."""
    bench = Bench(start=still(), wait=0, ask_every=80)
    bench.step()
    bench.answer([[i / 100, 0, 0, 1] for i in range(100)])
    assert [bench.step().source for _ in range(60)] == ["answer"] * 60
    if event == "connection":
        bench.connection += 1
    elif event == "clock":
        bench.now -= 1000
    else:  # which is answered before anybody sees it, of a loop that asks again
        bench.guard.ask_every = 1
        bench.submit = lambda ask: (
            bench.asked.append(ask),
            bench.answer([still()] * 8),
            setattr(bench, "connection", 1),
        )
        assert bench.step().source == "hold"
        bench.submit = bench.asked.append
    states = [bench.step().state for _ in range(60)]
    assert states[0] is State.DEGRADED and [states.index(one) for one in ("STALLED", "DEAD")] in ([5, 50], [6, 51])
    bench.guard.reset(still())  # of the episode before nothing counts
    states = [bench.step().state for _ in range(60)]
    assert [states.index(one) for one in ("STALLED", "DEAD")] == [6, 51]


def test_a_connection_that_comes_and_goes_gets_dead_as_well():
    bench = Bench(start=still(), wait=0, dead_after=1.0)
    for _ in range(12):
        bench.guard.reconnected()
        state = bench.step().state
    assert state is State.DEAD


def test_stalled_recovers_by_itself():
    bench = Bench(start=still(), wait=0)
    for _ in range(10):
        command = bench.step()
    assert command.state is State.STALLED
    bench.answer([0.1, 0, 0, 1])
    assert bench.step().state is State.OK


def test_places_hold_their_last_target():
    bench = Bench(JOINTS, start=[1.0, 2.0, 0.5], wait=0)
    assert bench.step().action.tolist() == [1.0, 2.0, 0.5]
    bench.answer([1.1, 2.1, 0.0])
    assert bench.step().source == "answer"
    assert bench.step().action.tolist() == [1.1, 2.1, 0.0]


def test_without_a_start_there_is_nothing_to_hold():
    bench = Bench(JOINTS, wait=0)
    with pytest.raises(NoAction, match="start") as caught:
        bench.step()
    assert caught.value.command.action is None and bench.lines[-1]["source"] == "none"
    bench.answer([1.1, 2.1, 0.0])
    assert bench.step().source == "answer"
    assert bench.step().source == "hold"
    bench.guard.reset()  # whatever was executed, the robot was moved since
    with pytest.raises(NoAction):
        bench.step()


def test_an_unknown_contract_raises():
    bench = Bench(None, hz=10, wait=0)
    with pytest.raises(NoAction, match="DEGRADED"):
        bench.step()
    bench.answer([1.0, 2.0])
    assert bench.step(after=0).action.tolist() == [1.0, 2.0]
    with pytest.raises(NoAction):
        bench.step()
    bench.answer([1.0, 2.0, 3.0])  # another robot's
    with pytest.raises(NoAction):
        bench.step()


# Limits ---------------------------------------------------------------------------------------------------------------


def test_limits_cut_and_report():
    bench = Bench(start=still(), wait=0, limits=Limits(step={"x": 0.05}, place={"z": (0.1, 0.5)}))
    bench.step(position=[0, 0, 0.3, 0])
    bench.answer([0.2, 9, -0.3, 0])
    command = bench.step(position=[np.nan, np.nan, 0.3, np.nan])
    assert command.limited == ("x", "z") and command.source == "answer"
    assert command.action == pytest.approx([0.05, 9, -0.2, 0]) and command.answered.tolist() == [0.2, 9, -0.3, 0]
    assert bench.lines[-1]["limited"] == ("x", "z")


def test_limits_refuse():
    bench = Bench(start=still(), wait=0, limits=Limits(step={"x": 0.05}, refuse=True))
    bench.step()
    bench.answer([0.2, 0, 0, 0])
    command = bench.step()
    assert command.source == "hold" and "limits of x" in command.reason and command.action.tolist() == still()
    bench.answer([0.04, 0, 0, 0])
    assert bench.step().source == "answer"


def test_limits_that_cannot_be_checked_refuse():
    bench = Bench(start=still(), wait=0, limits=Limits(place={"z": (0.1, 0.5)}))
    bench.step()
    bench.answer([0, 0, 0.01, 0])
    assert "position" in bench.step().reason
    bench = Bench(JOINTS, wait=0, limits=Limits(step={"a": 0.05}))
    with pytest.raises(NoAction):
        bench.step()
    bench.answer([1, 1, 1])
    with pytest.raises(NoAction, match="start or position"):
        bench.step()
    bench.answer([1, 1, 1])
    assert bench.step(position=[0.9, 0, 0]).action == pytest.approx([0.95, 1, 1])
    bench.answer([-1, 1, 1])
    assert bench.step(position=[5, 0, 0]).action == pytest.approx([0.90, 1, 1])  # from the last target, not from 5


@pytest.mark.parametrize(
    "here, change, allowed", [(0.6, 0.1, 0.0), (0.6, -0.2, -0.2), (0.0, -0.1, 0.0), (0.0, 0.2, 0.2)]
)
def test_outside_of_the_workspace_only_inwards(here, change, allowed):
    action, _ = Limits(place={"z": (0.1, 0.5)}).apply(
        np.array([0, 0, change, 1]), POSE, None, np.array([0, 0, here, 0])
    )
    assert action[2] == pytest.approx(allowed)


def test_an_arm_that_stopped_by_its_own_means_is_not_pulled_back():
    """Its step was measured from a target that it had left since, and the cut made a jump of it."""
    bench = Bench(
        JOINTS, start=[0, 0, 1], wait=0, limits=Limits(step={"a": 0.05}, place={"b": (-1, 1)}), fallback="raise"
    )
    with pytest.raises(NoAction):
        bench.step()
    bench.now += 0.1
    for position, action, expected in (
        ([0.5, 0, 1], 0.52, 0.52),
        ([0.5, 0, 1], 0.6, 0.57),  # it follows: from the target before, not from where it is on its way
        ([np.nan, 0, 1], 0.57, 0.57),
    ):
        bench.answer([action, 0, 1])
        assert bench.step(position=position).action[0] == pytest.approx(expected)
    with pytest.raises(NoAction):
        bench.step()
    bench.now += 0.1
    bench.answer([0.3, 0, 1])
    assert bench.step(position=[np.nan, 0, 1]).action[0] == pytest.approx(0.52)  # nobody knows better


@pytest.mark.parametrize("step", [{}, {"a": 0.2}])
@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("start", [1.5, None])
def test_a_place_comes_back_into_the_workspace_as_it_is_told(start, refuse, step):
    """It jumped to the edge, and with `refuse` nothing brought it back."""
    limits = Limits(place={"a": (-1, 1)}, step=step, refuse=refuse)
    bench = Bench(JOINTS, start=None if start is None else [start, 0, 1], wait=0, limits=limits, fallback="hold")
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([next(asked), 0, 1]))
    bench.guard.wait = 0.05
    asked = iter([1.5, 1.4, 1.3, 1.1, 0.95, 1.05, 0.9])
    executed = [bench.step(position=[1.5, np.nan, np.nan]).action[0] for _ in range(7)]
    assert executed == pytest.approx([1.5, 1.4, 1.3, 1.1, 0.95, 0.95 if refuse else 1.0, 0.9])
    allowed, cut = limits.apply(np.array([1.6, 0, 1]), JOINTS, np.array([1.5, 0, 1]), None)
    assert (allowed[0], cut) == (1.5, ["a"])


@pytest.mark.parametrize(
    ("turn", "last", "action", "allowed"),
    [
        (None, 179.0, -179.0, 176.0),  # a number as any other: the long way round
        (360, 179.0, -179.0, -179.0),  # two degrees
        (360, 179.0, -170.0, -178.0),
        (360, -179.0, 170.0, 178.0),
        (360, 1.0, 359.0, 359.0),  # counted from 0 on
        (360, 359.0, 8.0, 2.0),
        (360, 3.0, 352.0, 0.0),
        (360, 10.0, 20.0, 13.0),
        (360, 10.0, 13.0, 13.0),
        (2 * np.pi, 3.1, -3.1, -3.1),
    ],
)
def test_an_angle_turns_the_short_way_round(turn, last, action, allowed):
    limits = Limits(step={"a": 3.0}, turn={} if turn is None else {"a": turn})
    limits.check(JOINTS)
    found, cut = limits.apply(np.array([action, 5, 0]), JOINTS, np.array([last, 0, 0]), None)
    assert found.tolist() == pytest.approx([allowed, 5, 0]) and (cut == ["a"]) == (allowed != action)
    with pytest.raises(ValueError, match="turn of x: a change is no angle"):
        Limits(step={"x": 1}, turn={"x": 360}).check(POSE)


@pytest.mark.parametrize("last, action", [(90, 92), (0.5, 30), (-90, 0), (350, 352)])
def test_an_angle_beyond_its_turn_is_not_executed(last, action):
    """Of degrees beside radians: a step from 90 to 92 was cut to 3.07, and the robot would have jumped there."""
    limits = Limits(step={"a": 1.0}, turn={"a": 6.28})
    with pytest.raises(ValueError, match="beyond its full turn of 6.28: of another unit"):
        limits.apply(np.array([action, 0.0, 0.0]), JOINTS, np.array([last, 0.0, 0.0]), None)
    bench = Bench(JOINTS, start=[last, 0, 1], wait=0, limits=limits)
    bench.step()
    bench.answer([[action, 0, 1]])
    command = bench.step()
    assert (command.source, command.action[0]) == ("hold", last) and "another unit" in command.reason


def test_an_action_at_its_limit_is_not_beyond_it():
    limits = Limits(step={"a": 0.1}, place={"a": (0.0, 0.8)}, refuse=True)
    for last, action, cut in ((0.7, 0.8, []), (0.3, 0.2, []), (0.1, 0.0, []), (0.7, 0.8 + 1e-6, ["a"])):
        assert limits.apply(np.array([action, 5, 0]), JOINTS, np.array([last, 0, 0]), None)[1] == cut


@pytest.mark.parametrize(
    "given, message",
    [
        ({"place": {"a": (float("inf"), float("inf"))}}, "lowest, highest"),  # to which an action would be cut
        ({"place": {"a": (-float("inf"), -float("inf"))}}, "lowest, highest"),
        ({"place": {"a": ("0", "1")}}, "lowest, highest"),  # an error of the first step, with the arm on
        ({"place": {"a": "01"}}, "lowest, highest"),
        ({"place": {"a": 1}}, "lowest, highest"),
        ({"step": {"a": "0.1"}}, "largest change"),
        ({"step": 0.1}, "expected a mapping"),
        ({"refuse": "no"}, "True or False"),
        ({"step": {"a": 10}, "turn": {"a": 6.28}}, "limits nothing"),  # degrees beside radians
    ],
)
def test_limits_that_would_limit_nothing(given, message):
    with pytest.raises(ValueError, match=message):
        Limits(**given)


def test_a_cut_of_whole_numbers_is_no_whole_number():
    """An array of whole numbers took 0.5 as 0: for a place a step beyond its limit."""
    limits = Limits(step={"a": 0.5})
    for last, action, expected in ((2, 5, 2.5), (-2, -5, -2.5), (2, 0, 1.5)):
        found, cut = limits.apply(np.array([action, 0, 0]), JOINTS, np.array([last, 0, 0]), None)
        assert (found[0], cut) == (expected, ["a"])


def test_limits_of_float32_are_as_fine_as_others():
    """A place of a million, as of micrometres, moved by 0.125 in a step of 0.1."""
    step, spec = {"x": np.float32(0.1)}, ActionSpec(("x",), (False,), ())
    for more in ({"turn": {"x": np.float32(1e7)}}, {"place": {"x": np.array([-1e7, 1e7], np.float32)}}):
        moved, _ = Limits(step=step, **more).apply(np.array([1e6 + 5]), spec, np.array([1e6]), None)
        assert moved[0] - 1e6 == pytest.approx(0.1, abs=1e-6)
    moved, _ = Limits(place={"x": (0, 1e6 + 0.1)}).apply(np.array([2e6], np.float32), spec, np.array([1e6]), None)
    assert moved[0] == 1e6 + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a number that float16 cannot hold
        assert Limits(place={"x": (np.float16(0), 100_000)}).place == {"x": (0.0, 100_000.0)}


def test_limits_stay_what_was_checked():
    step, place = {"x": 0.1}, {"z": np.array([0.0, 0.5])}
    limits = Limits(step=step, place=place)
    step["x"], place["z"][:] = np.nan, np.nan  # would be executed as they are
    allowed, cut = limits.apply(np.array([5.0, 0, 0, 1]), POSE, np.array(still()), np.zeros(4))
    assert cut == ["x"] and allowed.tolist() == [0.1, 0, 0, 1]


# Audit ----------------------------------------------------------------------------------------------------------------


def test_one_line_for_each_step(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    bench = Bench(start=still(), wait=0, audit=audit.write)
    for _ in range(5):
        bench.step()
        bench.answer([0.1, 0, 0, float("nan")])
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(5)] and audit.lost == 0
    assert lines[1]["arrived"] == [{"epoch": bench.guard.epoch, "id": 0, "refused": "actions that are not finite"}]
    assert lines[0]["seen"] == digest({"image": b"..."}) and lines[0]["state"] == "DEGRADED"


def test_files_of_an_audit_rotate(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl", max_bytes=100, files=3)
    for step in range(40):
        audit.write({"step": step, "reason": "x" * 20})
    audit.close()
    audit.write({"step": 99})
    assert audit.lost == 1
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 100 for file in files)
    last = [json.loads(line)["step"] for file in reversed(files) for line in file.read_text().splitlines()]
    assert last == [*range(last[0], 40)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_robot(caplog):
    audit = Audit("/dev/full")
    bench = Bench(start=still(), wait=0, audit=audit.write)
    bench.step()
    bench.answer([0.1, 0, 0, 1])
    assert bench.step().source == "answer"
    assert audit.flush() and audit.lost == 2 and caplog.text.count("No space left") == 1
    audit.close()


def test_lines_after_one_that_was_cut_can_be_read(tmp_path, monkeypatch):
    """By a disk that was full in the middle of it, or a process that was killed."""
    (tmp_path / "audit.jsonl").write_text('{"step": 0}\n{"st')
    audit = Audit(tmp_path / "audit.jsonl")
    audit.write({"step": 1})
    assert audit.flush()
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", lambda *given, **more: (_ for _ in ()).throw(OSError(28, "full")))
        audit.write({"step": 2})
        assert audit.flush() and audit.lost == 1
    audit.write({"step": 3})
    audit.close()
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0}', '{"st', '{"step": 1}', '{"step": 3}']


def test_a_record_that_is_no_json_costs_its_own_line(tmp_path, caplog):
    """It ended the thread, and with it all lines that came after."""
    audit = Audit(tmp_path / "audit.jsonl")
    endless = {}
    endless["again"] = endless
    for record in (endless, {"step": 1}, {"step": Broken()}, {"step": np.float32("nan")}):
        audit.write(record)
    audit.close()
    assert audit.lost == 2 and "cannot be written" in caplog.text
    assert (tmp_path / "audit.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": "nan"}']


class Broken:
    def __str__(self):
        raise RuntimeError("no words")


def test_what_was_written_is_there_when_the_process_ends(tmp_path):
    program = "import sys, openvla_client; openvla_client.Audit(sys.argv[1]).write({'step': 1})"
    environment = {**os.environ, "PYTHONPATH": str(Path(openvla_client.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, tmp_path / "audit.jsonl"], env=environment, check=True)
    assert (tmp_path / "audit.jsonl").read_text() == '{"step": 1}\n'


def test_a_slow_disk_does_not_hold_up_a_step(tmp_path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(Audit, "_append", lambda self, lines: free.wait(60))
    monkeypatch.setattr(Audit, "WAITING", 3)
    audit = Audit(tmp_path / "audit.jsonl")
    for step in range(20):
        audit.write({"step": step})
    assert audit.lost >= 16 and not audit.flush(timeout=0.01)
    free.set()
    audit.close()


def test_a_digest_names_content():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seen = {"image": image, "words": "open", "state": [1.0, 2]}
    assert digest(seen) == digest(dict(reversed(seen.items()))) == digest({**seen, "image": image.copy(order="F")})
    others = [{**seen, "words": "opem"}, {**seen, "image": image.reshape(4, 1, 3)}, {**seen, "state": [1.0, 3]}, None]
    assert len({digest(one) for one in [seen, *others]}) == 5


# A thread of its own --------------------------------------------------------------------------------------------------


def test_a_function_that_blocks_is_asked_the_newest():
    """One call at a time; what came in between is replaced."""
    go, began = threading.Semaphore(0), threading.Semaphore(0)
    seen = []

    def answer(observation):
        seen.append(observation)
        began.release()
        assert go.acquire(timeout=60)
        if observation == 3:
            raise ConnectionError("the server is gone")
        return np.array([[observation, 0, 0, 1]])

    clock = [0.0]
    guard = Guard(answer, POSE, wait=0, clock=lambda: clock[0], max_age=10)
    guard.reset(still())
    for observation in (1, 2, 3):
        assert guard.step(observation).source == "hold"
        if observation == 1:
            assert began.acquire(timeout=60)
    go.release()
    assert began.acquire(timeout=60)  # 3 is asked
    go.release(2)
    guard.wait = 60
    command = guard.step(4)  # after 1 and the error of 3
    assert seen == [1, 3, 4] and command.action.tolist() == [4, 0, 0, 1]
    guard.close()


def test_what_a_thread_answers_comes_back():
    transport = ThreadTransport(lambda ask: ask.observation * 2)
    guard = Guard(transport, dataclasses.replace(POSE, hz=1), wait=30)
    command = guard.step(np.array([0.1, 0.2, 0.3, 0.5]))
    assert command.source == "answer" and command.action.tolist() == [0.2, 0.4, 0.6, 1.0]
    guard.close()


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Tensor:
    """As one of torch with gradients, or of a GPU."""

    def __array__(self, *given, **more):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(
    "wrong", [SystemExit(3), Wordless(), Tensor(), {"actions": 1}], ids=lambda wrong: type(wrong).__name__
)
def test_nothing_that_a_function_does_ends_the_loop(wrong):
    """sys.exit() in it ended its thread, and nothing was ever answered again; the others were raised by `step`."""

    def answer(observation):
        if observation == 1 and isinstance(wrong, BaseException):
            raise wrong
        return wrong if observation == 1 else still()

    guard = Guard(answer, dataclasses.replace(POSE, hz=1), wait=30)
    guard.reset(still())
    command = guard.step(1)
    assert command.source == "hold" and type(wrong).__name__ in command.reason
    assert guard.step(2).source == "answer"
    guard.close()
    bench = Bench(start=still(), wait=0)  # of a transport of one's own
    bench.step()
    error = wrong if isinstance(wrong, BaseException) else None
    bench.replies.append(Reply(bench.asked[0].epoch, bench.asked[0].id, wrong, error))
    assert bench.step().source == "hold"


def test_a_machine_that_has_no_thread_left_is_asked_again(monkeypatch):
    """The first step raised, and nothing was answered ever after."""
    guard = Guard(lambda observation: still(), dataclasses.replace(POSE, hz=1), wait=30)
    guard.reset(still())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start")))
        assert "can't start" in guard.step(1).reason
    assert guard.step(2).source == "answer"
    guard.close()


@pytest.mark.parametrize(
    "buffer",
    [np.zeros((1, 4)), [[0.0] * 4], [np.zeros(4)], (ctypes.c_double * 4 * 1)(), [memoryview(array("d", [0.0] * 4))]],
    ids=["array", "lists", "rows", "of a driver", "views"],
)
def test_a_function_may_write_into_what_it_gave(buffer):
    """It is asked the next observation before the loop has read the answer to the last one. Of lists half an action was
    executed, the rest of it of another observation."""
    now, asked = [0.0], threading.Semaphore(0)

    def answer(observation):
        buffer[0][:] = array("d", [observation] * 4)
        asked.release()
        return buffer if observation < 3 else openvla_client.Answer(buffer, "key")

    guard = Guard(answer, POSE, wait=0, clock=lambda: now[0], max_age=10)
    guard.reset(still())
    for observation in (1, 2, 3):
        guard.wait = 0
        guard._transport.submit(openvla_client.Ask(guard.epoch, observation, 0, observation))
        assert asked.acquire(timeout=60)
        reply = guard._transport.poll(60)
        buffer[0][:] = array("d", [np.nan] * 4)
        assert np.asarray(reply.actions).tolist() == [[observation] * 4]
    guard.close()


def test_a_picture_that_was_only_opened_is_decoded_before_a_thread_gets_it():
    """While it was sent it was named for the audit, and a fifth of what the model saw was other pixels."""
    bench, file = Bench(start=still(), wait=0), io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    opened, broken = Image.open(io.BytesIO(file.getvalue())), Image.open(io.BytesIO(file.getvalue()[:-500]))
    decoded = []
    bench.submit = lambda ask: decoded.append(not opened.tile)
    for seen in ({"images": {"left": opened}}, [opened, broken], broken):
        bench.guard.step(seen)
        bench.now += 0.1
    assert decoded == [True] * 3


@pytest.mark.parametrize("when", ["before", "in a step", "after"])
def test_nothing_acts_once_a_guard_is_closed(when):
    """The rest of a chunk moved the robot on, and so did further answers while the thread was busy."""
    bench = Bench(start=still(), wait=0.05)
    poll = bench.poll
    bench.submit = lambda ask: (bench.asked.append(ask), bench.answer([[0.1, 0, 0, 1]] * 8))
    bench.poll = lambda timeout: (when == "in a step" and timeout and bench.guard.close(), poll(timeout))[1]
    if when == "before":
        bench.guard.close()
    first = bench.step()
    assert first.source == ("answer" if when == "after" else "hold")
    bench.guard.close()
    commands, asked = [bench.step() for _ in range(3)], len(bench.asked)
    assert {command.source for command in commands} == {"hold"} and "closed" in commands[0].reason
    bench.guard.reset(still())
    assert bench.step().source == "hold" and len(bench.asked) == asked


@pytest.mark.parametrize("where", ["submit", "poll", "audit", "digest"])
@pytest.mark.parametrize("what", ["reset", "reconnected"])
def test_what_comes_in_a_step_of_the_same_thread_waits_for_its_end(what, where):
    """As from a signal, or of a transport that sees its connection go: the step waited for itself, for ever."""
    bench = Bench(start=still(), wait=0.05)
    bench.step()
    bench.answer([[0.1, 0, 0, 1]] * 8)
    owner, name = (bench, where) if hasattr(bench, where) else (bench.guard, f"_{where}")
    usual, epoch = getattr(owner, name), bench.guard.epoch

    def happens(*given):
        setattr(owner, name, usual)
        getattr(bench.guard, what)(*([still(0.5)] if what == "reset" else []))
        return usual(*given)

    setattr(owner, name, happens)
    command = bench.step()
    assert command.source == ("answer" if where == "audit" else "hold") and bench.guard.epoch == epoch + 1
    assert command.source == "answer" or "came in this step" in command.reason
    command = bench.step()  # nothing that was asked before acts
    assert command.source == "hold" and command.action[3] == (0.5 if what == "reset" else 1)
    assert bench.asked[-1].step == (0 if what == "reset" else 2)


def test_a_step_in_a_step_is_none():
    bench = Bench(start=still())
    bench.submit = lambda ask: bench.step()
    with pytest.raises(RuntimeError, match="within a step"):
        bench.step()
    bench.submit = bench.asked.append
    assert bench.step().source == "hold"


def test_a_closed_transport_asks_nothing_more():
    go, began, seen = threading.Semaphore(0), threading.Semaphore(0), []

    def answer(ask):
        seen.append(ask.id)
        began.release()
        assert go.acquire(timeout=60)

    transport = ThreadTransport(answer)
    transport.submit(openvla_client.Ask(0, 0, 0, None))
    assert began.acquire(timeout=60)
    transport.close()
    transport.submit(openvla_client.Ask(0, 1, 0, None))  # while the call that runs goes on
    go.release()
    transport._thread.join(60)
    assert seen == [0] and not transport._thread.is_alive()
    never = ThreadTransport(answer)
    never.close()
    never.submit(openvla_client.Ask(0, 2, 0, None))
    assert never._thread is None


def test_a_guard_of_another_process_says_so():
    transport = ThreadTransport(lambda ask: None)
    transport._thread = threading.Thread()  # that is none, as those of a process after a fork
    transport.submit(openvla_client.Ask(3, 4, 0, None))
    reply = transport.poll(0)
    assert (reply.epoch, reply.id) == (3, 4) and "of another process" in str(reply.error)


def test_a_chunk_acts_in_one_process(tmp_path):
    """The rest of it was executed in a fork as well; and where a thread was in a step, the fork waited for ever."""
    held = threading.Event()
    guard = Guard(lambda seen: np.arange(1, 9.0)[:, None] * [1, 0, 0, 1] if seen == 0 else held.wait(60), POSE, wait=30)
    audit, (reader, writer) = Audit(tmp_path / "audit.jsonl"), os.pipe()
    guard.reset(still())
    assert guard.step(0).action.tolist() == [1, 0, 0, 1]
    step = threading.Thread(target=guard.step, args=(1,))
    step.start()
    with audit._changed, guard._transport._changed:  # as another thread may hold them then
        child = os.fork()
    if not child:
        guard.wait = 0
        os.write(
            writer, json.dumps([guard.step(2).record(), guard.step(3).reason, audit.write({}), audit.lost]).encode()
        )
        os._exit(0)
    try:
        assert select.select([reader], [], [], 60)[0]
        first, reason, _, lost = json.loads(os.read(reader, 10_000))
        assert first["source"] == "hold" and "of another process" in reason and lost == 1
        held.set()
        step.join()
        assert guard.step(2).source == "answer"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        held.set()
        guard.close()
        audit.close()
        os.close(reader)
        os.close(writer)


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, options, message",
    [
        (None, {}, "hz"),
        (None, {"hz": 0}, "hz"),
        (None, {"hz": 10, "fallback": "hold"}, "spec"),
        (None, {"hz": 10, "limits": Limits()}, "spec"),
        (POSE, {"fallback": "stop"}, "fallback"),
        (POSE, {"max_age": -1}, "max_age"),
        (POSE, {"stalled_after": 0.1}, "stalled_after"),
        (POSE, {"dead_after": 0.1}, "dead_after"),
        (POSE, {"ask_every": 0}, "ask_every"),
        (POSE, {"execute": 0}, "execute"),
        (POSE, {"commit": -1}, "commit"),
        (POSE, {"execute": 2.0}, "execute=2.0: expected a whole number"),
        (POSE, {"ask_every": float("nan")}, "ask_every=nan"),
        (POSE, {"commit": True}, "commit=True"),
        (POSE, {"limits": Limits(step={"elbow": 1})}, "elbow"),
        (POSE, {"limits": {"x": 1}}, "limits={'x': 1}: expected Limits"),
        ("pose", {}, "spec='pose': expected an ActionSpec"),
        (POSE, {"audit": "log.jsonl"}, "audit='log.jsonl': expected a function"),
        (POSE, {"audit": io.StringIO()}, "audit=.*: expected a function, such as audit.write"),
        (POSE, {"clock": 5.0}, "clock=5.0: expected a function"),
    ],
)
def test_arguments_that_do_not_fit(spec, options, message):
    with pytest.raises(ValueError, match=message):
        Guard(lambda seen: None, spec, **options)


def test_something_that_cannot_be_asked():
    with pytest.raises(ValueError, match="submit, poll"):
        Guard(object(), POSE)


@pytest.mark.parametrize(
    "options",
    [
        {"step": {"x": 0}},
        {"step": {"x": float("nan")}},
        {"place": {"x": (2, 1)}},
        {"step": {"x": 1}, "turn": {"x": 0}},
        {"step": {"x": 1}, "turn": {"x": float("inf")}},
        {"turn": {"x": 360}},
        {"step": {"x": 1}, "place": {"x": (0, 1)}, "turn": {"x": 360}},
    ],
)
def test_limits_that_make_no_sense(options):
    with pytest.raises(ValueError, match="expected"):
        Limits(**options)


def test_a_step_of_another_shape_is_no_step():
    bench = Bench(start=still(), wait=0)
    hidden = np.ma.masked_array([1.0, 2, 3, 4], [False, False, False, True])
    for position in (
        [1, 2],
        [[1, 2, 3, 4]],
        hidden,
        ["1"] * 4,
        [True] * 4,
        [1j] * 4,
        [10**400] * 4,
        {"x": 1},
        "1234",
        4,
    ):
        with pytest.raises(ValueError, match="(?s)^position=.*: expected 4 numbers .x, y, z, gripper; NaN"):
            bench.step(position=position)
        with pytest.raises(ValueError, match="(?s)^start=.*: expected 4 finite numbers .x, y, z, gripper.\\.$"):
            bench.guard.reset(position)
    for seen_at in ("100", [100.0], np.datetime64("now"), np.timedelta64(100, "s"), True):
        with pytest.raises(ValueError, match="^seen_at=.*: expected seconds of the guard's clock"):
            bench.step(seen_at=seen_at)
    assert not bench.asked and not bench.lines
    with pytest.raises(ValueError, match="^start=5: expected finite numbers"):
        Guard(lambda observation: np.zeros(4), hz=10).reset(5)


def test_seconds_of_float32_are_those_of_the_clock():
    """A clock of a machine that ran for months has seconds that float32 does not tell apart: a loop that was too fast
    executed an action at each of its steps, and the robot moved so much faster."""
    bench = Bench(hz=np.float32(10), max_age=np.float32(0.2), start=still(), wait=np.float32(0))
    bench.now = 2.0**24
    for _ in range(100):
        bench.step(after=0.01)
        bench.answer([still()])
    assert 8 <= [line["source"] for line in bench.lines].count("answer") <= 14


def test_another_rate_than_the_contract_is_a_warning():
    with pytest.warns(UserWarning, match="hz=20: these actions are 10 a second.* 2 times as fast"):
        Guard(lambda observation: np.zeros(4), POSE, hz=20).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guard(lambda observation: np.zeros(4), POSE, hz=10).close()
        Guard(lambda observation: np.zeros(4), POSE).close()


def test_places_that_may_be_many_steps_away_are_a_warning():
    """The first action of a late chunk that acts is executed in one period, wherever it is."""
    with pytest.warns(UserWarning, match=r"^b: places without a limit.*Limits\(step="):
        Bench(JOINTS, limits=Limits(step={"a": 0.1}, place={"b": (0, 1)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bench(JOINTS, commit=1)  # what it answers goes on from where the robot stands
        Bench(POSE)
        bench = Bench(JOINTS, wait=0, fallback="raise", limits=Limits(step={"a": math.inf, "b": math.inf}))
    with pytest.raises(NoAction):
        bench.step()
    bench.answer([5, 6, 1])
    assert bench.step().action.tolist() == [5, 6, 1]  # from wherever it stands


@pytest.mark.parametrize("name", ["hz", "max_age", "wait", "stalled_after", "dead_after"])
@pytest.mark.parametrize(
    "given", ["20", np.nan, np.inf, -1, True, 1j, np.complex64(1), np.timedelta64(1, "s"), 10**400]
)
def test_seconds_and_rates_are_finite_numbers(name, given):
    options = {"hz": 10, name: given}
    with pytest.raises(ValueError, match=f"^{name}=.*expected"):
        Guard(lambda observation: np.zeros(4), POSE, **options)


def test_a_guard_that_nobody_holds_any_more_ends_its_thread():
    """A program that makes one for each episode had a thread more after each."""
    guard = Guard(lambda seen: [0.0], hz=10, wait=60, max_age=60)
    assert guard.step("seen").source == "answer"
    thread = guard._transport._thread
    del guard
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
