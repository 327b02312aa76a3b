"""One episode at a time in a simulator, driven by the model that is served, for the page to show.

What simulates is handed in (`Simulator`): `serving` knows no simulator. The model is asked as robots ask it, in the
same queue. Who watches gets the newest step and never a queue of old ones.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..cameras_openvla import find_cameras, order_cameras
from ..observation import Observation
from .contract import Answer, BadRequest, Busy, Engine, Refusal, Request
from .live import JPEG_QUALITY
from .threads import in_daemon
from .wire import picture_file


logger = logging.getLogger(__name__)
SESSION = "simulator of the page"
MOST_WATCHERS = 32  # that wait for the next step; further ones get the last one at once
PATIENCE = 30.0  # seconds that an episode waits for one answer
CLOSING = 10.0  # seconds that a simulator may take to close
MOST_LETTERS = 1000  # of an instruction


class World(Protocol):
    """A simulated robot. Its methods block; a `RuntimeError` says in words for people why it broke."""

    def reset(self, seed: int, task: str) -> Observation: ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action (A,): what is seen then, and whether the task is done."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Simulator:
    """What episodes there can be.

    Args:
        make: Makes a world that shows what the cameras of a model see.
        tasks: Name -> its usual instruction.
        max_steps: After which an episode has failed.
        frequency: Actions in a second.
        seeds: Those that demonstrations do not have; people count them from 0.
        unnorm_keys: Datasets that were recorded in it: the first that the model knows gives the units.
    """

    name: str
    make: Callable[[Sequence[str]], World]
    tasks: Mapping[str, str]
    max_steps: int
    frequency: float
    seeds: range
    unnorm_keys: tuple[str, ...] = ()


@dataclass
class Step:
    """What a viewer gets. `number` grows with everything that is new, `episode` with each that begins."""

    number: int = 0
    episode: int = 0
    running: bool = False
    task: str = ""
    seed: int = 0
    instruction: str = ""
    unnorm_key: str = ""
    step: int = 0
    max_steps: int = 0
    success: bool | None = None
    message: str = ""  # what it waits for, or why it ended
    action: list[float] = field(default_factory=list)  # (A,) that was executed last
    latency_ms: float | None = None  # of the last answer
    jpeg: bytes = b""  # of the first camera


class Episodes:
    """The episode that runs, or the last one. All methods belong to the event loop.

    Args:
        engine: Whose model acts.
    """

    def __init__(self, simulator: Simulator, engine: Engine):
        self.simulator, self.engine, self.info = simulator, engine, engine.info
        self.last = Step(max_steps=simulator.max_steps)
        self._task: asyncio.Task[None] | None = None
        self._stopped, self._reworded = False, False
        self._session = SESSION
        self._news, self._watchers = asyncio.Event(), 0

    def start(self, task: str, seed: int = 0, instruction: str = "") -> None:
        """Begin an episode; without an instruction with the usual one of its task.

        Raises:
            Busy: If one is running.
            BadRequest: If there is no such task or seed, or the units are not clear.
        """
        if self._task is not None and not self._task.done():
            raise Busy("An episode is running: stop it, or wait for its end.", retry_after=5.0)
        tasks, seeds = self.simulator.tasks, self.simulator.seeds
        if task not in tasks:
            raise BadRequest(f"task={task!r:.100}: expected one of {', '.join(tasks)}.")
        if not 0 <= seed < len(seeds):
            raise BadRequest(f"seed={seed}: expected 0 to {len(seeds) - 1}.")
        known = (key for key in self.simulator.unnorm_keys if key in self.info.datasets)
        count = self.last.episode + 1
        self.last = Step(
            self.last.number, count, running=True, task=task, seed=seed,
            instruction=check_words(instruction or tasks[task]), unnorm_key=self.info.key(next(known, None)),
            max_steps=self.simulator.max_steps,
        )  # fmt: skip
        self._stopped, self._reworded, self._session = False, False, f"{SESSION}, episode {count}"
        self._show(message="The simulator starts.")
        self._task = asyncio.create_task(self._run(task, seeds[seed]))

    def reword(self, instruction: str) -> None:
        """Ask for something else from the next step on; the rest of a chunk is dropped.

        Raises:
            BadRequest: If none is running, or the instruction is empty or too long.
        """
        if not self.last.running:
            raise BadRequest("No episode is running: start one with this instruction.")
        self._reworded = True
        self._show(instruction=check_words(instruction))

    def stop(self) -> None:
        """End the episode after the step it is in; nothing where none is running."""
        self._stopped = True

    async def close(self, patience: float = 10.0) -> None:
        """Stop, and wait for the end."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=patience)

    async def after(self, number: int, patience: float = 1.0) -> Step:
        """The newest step as soon as there is one beyond `number`; else the last one, after `patience` seconds."""
        if self.last.number <= number and self._watchers < MOST_WATCHERS:
            self._watchers += 1
            try:
                await asyncio.wait_for(self._news.wait(), patience)
            except TimeoutError:
                pass
            finally:
                self._watchers -= 1
        return self.last

    def _show(self, **news: Any) -> None:
        self.last = replace(self.last, number=self.last.number + 1, **news)
        self._news.set()
        self._news = asyncio.Event()

    async def _run(self, task: str, seed: int) -> None:
        world: World | None = None
        said = "The episode broke; the log of the server says why."
        try:
            world = await in_daemon(self.simulator.make, self.info.cameras)
            observation = await in_daemon(world.reset, seed, task)
            self._show(message="", jpeg=_picture(observation))
            said = await self._drive(world, observation)
        except (Refusal, RuntimeError) as error:
            said = str(error)
        except Exception:  # of whatever a simulator raises
            logger.exception("An episode of task %r broke.", task)
        finally:
            await self._close(world)
            self._show(running=False, message=said)

    async def _close(self, world: World | None) -> None:
        try:
            if world is not None:
                async with asyncio.timeout(CLOSING):
                    await in_daemon(world.close)
        except Exception:  # it is over all the same
            logger.exception("A simulator could not be closed.")

    async def _drive(self, world: World, observation: Observation) -> str:
        """Steps until the end; what became of it, in words."""
        actions: list[np.ndarray] = []  # of the last answer, not executed yet
        for step in range(self.simulator.max_steps):
            begun = time.monotonic()
            if not actions or self._reworded:
                self._reworded = False
                answer = await self._answer(observation, step)
                actions = list(answer.actions)
                self._show(latency_ms=1000 * (time.monotonic() - begun))
            if self._stopped:
                return "Stopped."
            action = actions.pop(0)
            observation, done = await in_daemon(world.step, action)
            self._show(step=step + 1, action=action.tolist(), jpeg=_picture(observation))
            if done:
                self._show(success=True)
                return f"Success after {step + 1} steps."
            await asyncio.sleep(max(0.0, 1 / self.simulator.frequency - (time.monotonic() - begun)))
        self._show(success=False)
        return f"Not done after {self.simulator.max_steps} steps."

    async def _answer(self, observation: Observation, step: int) -> Answer:
        """Asks again while the server is busy: robots come first."""
        last = time.monotonic() + PATIENCE
        seen = self._seen(replace(observation, instruction=self.last.instruction, step=step))
        while True:
            try:
                return await self.engine.act(Request(seen, self.last.unnorm_key, session=self._session, deadline=last))
            except Busy as busy:
                if self._stopped or time.monotonic() + busy.retry_after > last:
                    raise
                await asyncio.sleep(busy.retry_after)

    def _seen(self, observation: Observation) -> Observation:
        """As the model takes it: its cameras, its state or none."""
        wanted, given = self.info.datasets[self.last.unnorm_key].state_dim, observation.state
        if wanted is not None and given.shape != (wanted,):
            raise BadRequest(f"The model takes a state of {wanted} numbers, {self.simulator.name} has {len(given)}.")
        try:
            found = find_cameras(order_cameras(list(observation.images)), self.info.cameras)
        except ValueError as error:
            raise BadRequest(f"{self.simulator.name} does not show what the model sees. {error}") from error
        images = {name: observation.images[camera] for name, camera in zip(self.info.cameras, found)}
        return replace(observation, images=images, state=given[: wanted or 0])


def check_words(instruction: str) -> str:
    """`instruction`; a `BadRequest` if it is empty or too long."""
    if not instruction.strip():
        raise BadRequest("instruction is empty: say what to do, for example 'open the drawer'.")
    if len(instruction) > MOST_LETTERS:
        raise BadRequest(f"instruction has {len(instruction)} letters: at most {MOST_LETTERS} are taken.")
    return instruction


def _picture(observation: Observation) -> bytes:
    images = list(observation.images.values())
    return picture_file(images[0], quality=JPEG_QUALITY) if images else b""
