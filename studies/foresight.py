"""What chunks can gain at best: the use of a chunk by a policy that makes no mistake.

    python studies/foresight.py docs/results/chunks/foresight.md --episodes 10

The policy is the scripted expert, which tries the next eight steps in the simulator itself, and takes them back. What
fails then, fails for the way in which late chunks are used: with "switch", "hold" and "ensemble" a chunk begins as if
it was executed at once, with "prefix" with what is executed until it is there. In Meta-World, without pictures.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from closed_loop import table

from openvla.evaluation.control import CHUNKING, RealtimeControl
from openvla.evaluation.environment import EVALUATION_SEEDS, standstill
from openvla.evaluation.metaworld import MetaWorld


CHUNK = 8
EVERYTHING = mujoco.mjtState.mjSTATE_INTEGRATION


@contextmanager
def taken_back(environment: MetaWorld) -> Iterator[None]:
    """What is done to the world inside is undone at the end."""
    simulator = environment._simulator()
    world = simulator.world
    state = np.empty(mujoco.mj_stateSize(world.model, EVERYTHING))
    mujoco.mj_getState(world.model, world.data, state, EVERYTHING)
    plain = (np.ndarray, float, int, str, list, dict, type(None))  # not the model, its data, the renderer
    remembered = copy.deepcopy({name: value for name, value in vars(world).items() if isinstance(value, plain)})
    seen, failed = simulator.seen.copy(), simulator._failed
    yield
    mujoco.mj_setState(world.model, world.data, state, EVERYTHING)
    mujoco.mj_forward(world.model, world.data)
    vars(world).update(remembered)
    simulator.seen, simulator._failed = seen, failed


def foresee(environment: MetaWorld, committed: np.ndarray | None) -> np.ndarray:
    """(CHUNK, A): what is committed, (n, A), and what the expert does after it."""
    actions = [] if committed is None else list(committed)
    with taken_back(environment):
        for step in range(CHUNK):
            if step == len(actions):
                actions.append(np.clip(environment.expert_action(), -1, 1))
            environment.step(actions[step])
    return np.stack(actions)


def succeeds(environment: MetaWorld, task: str, seed: int, latency: float, chunking: str) -> bool:
    environment.reset(seed, task)
    control = RealtimeControl(environment.frequency, standstill(environment), chunking=chunking)
    for step in range(environment.max_steps):
        if control.wants_action(step):
            control.give(step, foresee(environment, control.committed(step, latency, CHUNK)), latency)
        if environment.step(np.clip(control.action(step), -1, 1))[1]:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the table, a file")
    parser.add_argument("--tasks", default="drawer-open-v3,push-v3,button-press-topdown-v3", help="joined by commas")
    parser.add_argument("--episodes", type=int, default=10, help="of each task")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="seconds")
    arguments = parser.parse_args()
    environment, tasks = MetaWorld(render=False), arguments.tasks.split(",")
    rows: list[list[Any]] = []
    for chunking in CHUNKING:
        row = [chunking]
        for latency in arguments.latencies:
            won = {
                task: sum(
                    succeeds(environment, task, EVALUATION_SEEDS[number], latency, chunking)
                    for number in range(arguments.episodes)
                )
                for task in tasks
            }
            print(chunking, latency, won, flush=True)
            total = sum(won.values()) / arguments.episodes / len(tasks)
            row.append(f"{total:.0%} ({', '.join(map(str, won.values()))})")
        rows.append(row)
    environment.close()
    text = [
        "# What chunks can gain at best",
        f"By `studies/foresight.py`: an expert that foresees its next {CHUNK} actions without a mistake, twenty steps "
        f"in a second. Success, and successes of {arguments.episodes} episodes each of {', '.join(tasks)}.",
        table(["use", *(f"{latency:g} s" for latency in arguments.latencies)], rows),
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
