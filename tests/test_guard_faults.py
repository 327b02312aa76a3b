"""Faults of network, server, clock and loop, over 10,000 steps: not one stale or doubled action.

Simulated time, seeds, and a judge that knows nothing of the guard (faulty_network.py). With real sockets and a server
that is killed: test_client_faults.py.
"""

import json

import numpy as np
import pytest
from faulty_network import MAX_AGE, PERIOD, SPEC, WAIT, Book, Faults, Simulation, judge
from openvla_client import Audit, Command, Guard, State


SCENARIOS = {
    "quiet": Faults(),
    "delay": Faults(delay=0.15, slow=0.1),
    "loss": Faults(loss=0.3),
    "duplication": Faults(double=0.5, old=0.2),
    "reordering": Faults(slow=0.4, double=0.2),
    "half-open": Faults(half_open=0.02),
    "server killed": Faults(kill=0.01, reconnect=0.01),
    "clock jumps": Faults(jump=0.02),
    "loop held up": Faults(held_up=0.1),
    "wrong answers": Faults(wrong=0.3),
    "resets": Faults(reset=0.05, slow=0.3, old=0.3),
    "everything": Faults(
        delay=0.05, slow=0.1, loss=0.1, double=0.1, old=0.1, half_open=0.005, kill=0.002, reconnect=0.01, reset=0.005,
        wrong=0.1, held_up=0.02, jump=0.005,
    ),
}  # fmt: skip


def run(name: str, chunk: int, steps: int, folder) -> None:
    simulation = Simulation(seed=chunk, faults=SCENARIOS[name], chunk=chunk)
    audit = Audit(folder / "audit.jsonl")

    def note(line):  # simulated steps come faster than a disk writes
        audit.write(line)
        if line["step"] % 1000 == 0:
            assert audit.flush(60)

    guard = Guard(simulation, SPEC, wait=WAIT, max_age=MAX_AGE, clock=simulation.clock, audit=note)
    book = simulation.run(guard, steps)
    audit.close(60)
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    verdict = judge(book, lines)
    assert len(lines) == steps and not verdict.wrong
    expected = {fault for fault, value in vars(SCENARIOS[name]).items() if value} - {"delay", "service"}
    assert book.faults.keys() == expected, "a fault that never came"
    share = verdict.acted / steps
    least = 0.1 if (name, chunk) == ("delay", 1) else 0.6 if name == "quiet" else 0.3
    assert share > least, f"{share:.0%} of the steps acted by an answer"


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("name", SCENARIOS)
def test_not_one_stale_or_doubled_action(name, chunk, tmp_path):
    run(name, chunk, 10_000 if name == "everything" else 1000, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("name", SCENARIOS)
def test_not_one_of_each_fault_over_ten_thousand_steps(name, chunk, tmp_path):
    run(name, chunk, 10_000, tmp_path)


class Unguarded:
    """A loop that executes what came last, as clients without a guard do."""

    def __init__(self, simulation: Simulation, lines: list):
        self.simulation, self.lines, self.state = simulation, lines, State.OK
        self.ids, self.queue = 0, []

    def reset(self, start):
        self.last = start

    def reconnected(self):
        pass

    def step(self, observation):
        from openvla_client import Ask

        self.simulation.submit(Ask(0, self.ids, 0, observation))
        self.ids += 1
        while (reply := self.simulation.poll(0.0)) is not None:
            actions = np.atleast_2d(np.asarray(reply.actions, float)) if reply.error is None else None
            self.queue = self.queue if actions is None else list(actions)
        source = "answer" if self.queue else "hold"
        if self.queue:
            self.last = self.queue[0].tolist()
            self.queue = self.queue[1:] or self.queue  # the last one is repeated
        command = Command(np.array(self.last), source, State.OK, 0.0)
        self.lines.append({"action": command.action.tolist(), "source": source})
        return command


@pytest.mark.parametrize("fault", ["delay", "duplication", "reordering", "half-open", "resets", "server killed"])
def test_without_a_guard_the_same_faults_do_act(fault):
    """The judge sees what it has to see."""
    simulation, lines = Simulation(seed=1, faults=SCENARIOS[fault], chunk=8), []
    book = simulation.run(Unguarded(simulation, lines), 1000)
    wrong = judge(book, lines).wrong
    assert wrong.get("stale", 0) + wrong.get("doubled", 0) > 10, wrong


def test_the_judge_judges():
    book = Book(
        asked={0: (0.0, 0, 0), 1: (0.1, 1, 0)},
        steps=[(0.0, 0.0, 0), (0.1, 0.1, 0), (0.5, 0.5, 0), (0.6, 0.6, 1), (0.7, 0.9, 1)],
        executed=[[0.0, 0.0, 0.5], [1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [5.0, 0.0, 0.5], [5.0, 1.0, 0.5]],
        starts={0},
    )
    lines = [{"action": action, "source": "answer"} for action in book.executed]
    lines[4]["source"] = "hold"
    wrong = judge(book, lines, wait=0.1).wrong
    assert wrong == {"stale": 1, "doubled": 1, "unknown": 1, "not_held": 1, "blocked": 1}
    lines[0]["action"] = [1, 2, 3]
    assert judge(book, lines).wrong["not_logged"] == 1


@pytest.mark.parametrize("chunk", [1, 8])
def test_after_an_outage_it_acts_again(chunk):
    """What the network does to the state, and back."""
    simulation, states = Simulation(seed=0, faults=Faults(delay=0.001, service=0.001), chunk=chunk), []
    guard = Guard(simulation, SPEC, wait=WAIT, clock=simulation.clock, audit=states.append)
    simulation._dark_until = 0.0
    simulation.run(guard, 20)
    simulation._dark_until = simulation.now + 2.0
    simulation.random.seed(3)
    for _ in range(40):
        guard.step({})
        simulation._messages_until(simulation.now + PERIOD)
    seen = [line["state"] for line in states[20:]]
    order = [state for state, before in zip(seen, ["", *seen]) if state != before]
    assert order == ["OK", "DEGRADED", "STALLED", "OK"]
