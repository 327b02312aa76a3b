"""The closed loop: many environments side by side, one batched prediction for all that wait for one."""

import math
import numbers
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..action_spec import ActionSpec, usual_spec
from ..observation import Observation
from ..policy import Policy, begin_episode, check_numbers, check_reach, chunk_of
from .control import BlockingControl, RealtimeControl
from .environment import Environment, file_name
from .report import EpisodeResult, append_result, read_results, without_paths
from .smoothness import mean_jerk
from .video import EpisodeVideo
from .workers import EnvironmentFailure, EnvironmentProcess


EPISODES = "episodes.jsonl"  # one record a line, in the folder of an evaluation
SEVEN = usual_spec(7)


@dataclass(frozen=True)
class Job:
    """One episode to run."""

    task: str
    episode: int
    seed: int
    variation: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.variation, self.task, self.episode

    def film(self, folder: Path) -> Path:
        """Of the episode, in the folder of an evaluation."""
        return folder / "videos" / f"{file_name(self.task, self.variation, f'{self.episode:03d}')}.mp4"


@dataclass
class Slot:
    """An environment process and the episode it is in."""

    number: int
    process: EnvironmentProcess
    job: Job | None = None
    control: Any = None
    observation: Observation | None = None
    instruction: str = ""
    step: int = 0
    seconds: list[float] = field(default_factory=list)  # of each prediction
    last_seconds: float = 0.0  # of the last prediction, also of the episode before
    passes: list[float] = field(default_factory=list)  # of the language model in each, where they are counted
    executed: list[np.ndarray] = field(default_factory=list)  # the action of each step
    video: EpisodeVideo | None = None

    def begin(self, job: Job, control: BlockingControl | RealtimeControl) -> None:
        self.job, self.control, self.step, self.instruction = job, control, 0, ""
        self.seconds, self.passes, self.executed = [], [], []

    def record(self, spec: ActionSpec, success: bool, error: str | None) -> EpisodeResult:
        """The episode as it went."""
        assert self.job is not None
        return EpisodeResult(
            task=self.job.task,
            episode=self.job.episode,
            seed=self.job.seed,
            instruction=self.instruction,
            success=success,
            steps=self.step,
            predictions=len(self.seconds),
            latency=float(np.mean(self.seconds)) if self.seconds else 0.0,
            error=None if error is None else without_paths(error),
            variation=self.job.variation,
            jerk=mean_jerk(np.array(self.executed), spec),
            passes=float(np.mean(self.passes)) if self.passes else None,
        )

    def end(self) -> None:
        self.job = self.observation = self.video = None


class Records:
    """The records of an evaluation: `episodes.jsonl` in its folder, without those of episodes that broke.

    Raises:
        ValueError: If the folder holds an episode of `jobs` from another seed.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / EPISODES
        before = [record for record in read_results(self.file) if record.error is None]
        self._known = {(record.variation, record.task, record.episode): record for record in before}
        for job in jobs:
            if job.key in self._known and (seed := self._known[job.key].seed) != job.seed:
                raise ValueError(
                    f"'{self.file}' holds episode {job.episode} of {job.task} from seed {seed}, and {job.seed} is "
                    "asked for: choose another folder."
                )
        rewrite(self.file, list(self._known.values()))

    def __contains__(self, job: Job) -> bool:
        return job.key in self._known

    def __getitem__(self, job: Job) -> EpisodeResult:
        return self._known[job.key]

    def add(self, job: Job, record: EpisodeResult) -> None:
        append_result(self.file, record)
        self._known[job.key] = record

    def success(self) -> float | None:
        """Of all episodes that did not break."""
        finished = [record.success for record in self._known.values() if record.error is None]
        return float(np.mean(finished)) if finished else None


def run_episodes(
    policy: Policy | None,
    make: Callable[[], Environment],
    jobs: Sequence[Job],
    folder: Path,
    *,
    spec: ActionSpec = SEVEN,
    control: Callable[[], BlockingControl | RealtimeControl] = BlockingControl,
    stands: bool = False,
    latency: float | None = None,
    max_steps: int = 200,
    workers: int = 2,
    videos: int = 1,
    progress: bool = True,
) -> list[EpisodeResult]:
    """Run the episodes that `folder/episodes.jsonl` does not hold yet, or holds as broken, and add them one by one.

    Args:
        policy: In control; None: the environment's scripted expert, which sees the state and shows what is possible.
            What answers chunks says its `action_chunk`: the standstill before the first one is committed then.
        make: Makes an environment; has to be picklable.
        spec: What the actions of the environment mean.
        control: Makes the control mode of one episode.
        stands: Ask each environment where its robot stands when an episode has begun, and let real-time control begin
            there: where actions are places, each episode may begin at another.
        latency: Seconds from an observation to its action in real-time control. Default: as measured.
        max_steps: After which an episode has failed.
        workers: Environments side by side.
        videos: Episodes of each task that have a video, the first ones, in `folder/videos`.

    Returns:
        Records of all episodes of the folder, in the order of `jobs`.

    Raises:
        ValueError: If the policy gives something that is no action, nothing is executed then; or if the folder holds an
            episode of `jobs` from another seed.
    """
    chunk = chunk_of(policy)
    records = Records(folder, jobs)
    waiting = [job for job in jobs if job not in records]
    slots = [Slot(number, EnvironmentProcess(make)) for number in range(min(workers, len(waiting)))]
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="episode", disable=not progress) as bar:
        films = {job: job.film(folder) for job in waiting if job.episode < videos}
        loop = Loop(policy, chunk, slots, records, films, spec, control, stands, latency, max_steps, bar)
        try:
            loop.run(waiting)
        finally:
            for slot in slots:
                slot.process.stop()
    return [records[job] for job in jobs]


@dataclass
class Loop:
    """Rounds in which every environment makes one step; arguments as those of `run_episodes`."""

    policy: Policy | None
    chunk: int  # steps of an answer of the policy
    slots: Sequence[Slot]
    records: Records
    films: Mapping[Job, Path]
    spec: ActionSpec
    control: Callable[[], BlockingControl | RealtimeControl]
    stands: bool
    latency: float | None
    max_steps: int
    bar: Any
    said: set[str] = field(default_factory=set)  # why environments broke, each once

    def run(self, waiting: Sequence[Job]) -> None:
        left = deque(waiting)
        while left or any(slot.job for slot in self.slots):
            self.begin(left)
            running = [slot for slot in self.slots if slot.observation is not None]
            self.decide([slot for slot in running if slot.control.wants_action(slot.step)])
            self.step([slot for slot in running if slot.job is not None])

    def begin(self, left: deque[Job]) -> None:
        """Episodes of `left` begin where a slot is free."""
        begun = []
        for slot in self.slots:
            if slot.job is None and left:
                job = left.popleft()
                slot.begin(job, self.control())
                if self.ask(slot, "reset", job.seed, job.task, job.variation):
                    begun.append(slot)
        for slot, observation in self.answers(begun):
            assert slot.job is not None
            slot.observation, slot.instruction = observation, observation.instruction
            if self.policy is not None:
                begin_episode(self.policy, slot.number)
            if slot.job in self.films and observation.images:
                slot.video = EpisodeVideo(self.films[slot.job], observation, self.spec.names, self.spec.hz)
        if self.stands:
            there = [slot for slot in begun if slot.observation is not None and self.ask(slot, "standstill")]
            for slot, start in self.answers(there):
                slot.control.begin_at(start)

    def decide(self, due: Sequence[Slot]) -> None:
        """One answer of the policy for all that wait for one."""
        started = time.perf_counter()
        decided = self.of_expert(due) if self.policy is None else self.of_policy(self.policy, due)
        elapsed = time.perf_counter() - started
        for slot, action in decided:
            slot.seconds.append(elapsed)
            slot.last_seconds = elapsed
            slot.control.give(slot.step, np.asarray(action), elapsed if self.latency is None else self.latency)

    def of_expert(self, due: Sequence[Slot]) -> list[tuple[Slot, Any]]:
        asked = [slot for slot in due if self.ask(slot, "expert_action")]
        return list(self.answers(asked))

    def of_policy(self, policy: Policy, due: Sequence[Slot]) -> list[tuple[Slot, Any]]:
        if not due:
            return []
        seen = []
        for slot in due:
            assert slot.observation is not None  # it is running
            expected = slot.last_seconds if self.latency is None else self.latency
            committed = slot.control.committed(slot.step, expected, self.chunk)
            seen.append(replace(slot.observation, step=slot.step, slot=slot.number, committed=committed))
        actions = checked(policy.act(seen), len(seen), self.spec.action_dim)
        for slot, passes in zip(due, counted_passes(policy, len(due))):
            slot.passes.append(passes)
        return list(zip(due, actions))

    def step(self, running: Sequence[Slot]) -> None:
        """Every world makes a step."""
        stepped = []
        for slot in running:
            action = slot.control.action(slot.step)
            if slot.video is not None and slot.observation is not None:
                slot.video.add(slot.observation, action)
            slot.executed.append(np.asarray(action))
            if self.ask(slot, "step", action):
                stepped.append(slot)
        for slot, (observation, success) in self.answers(stepped):
            slot.observation, slot.step = observation, slot.step + 1
            if success or slot.step >= self.max_steps:
                self.finish(slot, bool(success))

    def ask(self, slot: Slot, method: str, *arguments: Any) -> bool:
        """Whether the environment could be asked; the episode is over where it could not."""
        try:
            slot.process.ask(method, *arguments)
        except EnvironmentFailure as failure:
            self.finish(slot, success=False, error=str(failure))
            return False
        return True

    def answers(self, asked: Sequence[Slot]) -> Iterator[tuple[Slot, Any]]:
        """Of those that answer; the episodes of others are over."""
        for slot in asked:
            try:
                yield slot, slot.process.answer()
            except EnvironmentFailure as failure:
                self.finish(slot, success=False, error=str(failure))

    def finish(self, slot: Slot, success: bool, error: str | None = None) -> None:
        assert slot.job is not None
        record = slot.record(self.spec, success, error)
        if slot.video is not None:
            slot.video.save(success, slot.observation) if error is None else slot.video.save(None)
        self.records.add(slot.job, record)
        if error is not None and error not in self.said:
            self.said.add(error)
            tqdm.write(f"{record.task}, episode {record.episode} broke: {error}", file=sys.stderr)
        slot.end()
        self.bar.update()
        success_so_far = self.records.success()
        self.bar.set_postfix(success="" if success_so_far is None else f"{success_so_far:.0%}")


def checked(actions: np.ndarray, count: int, dims: int) -> np.ndarray:
    """Actions (N, A) or chunks (N, K, A) of a policy, float64; a `ValueError` where they are something else, not
    finite, or beyond `FARTHEST`."""
    given = check_numbers(actions)
    if given.ndim not in (2, 3) or not given.size or len(given) != count or given.shape[-1] != dims:
        raise ValueError(
            f"The policy gave numbers of shape {given.shape} for {count} observations: expected finite "
            f"({count}, {dims}) or ({count}, K, {dims}) numbers, as the environment executes them."
        )
    return check_reach(given)


def counted_passes(policy: Policy, count: int) -> Sequence[float]:
    """`passes` of the last answer of a policy, one for each of `count` observations; empty where it counts none. A
    record with what is no number would be none when it is read, and its episode would run again."""
    found = getattr(policy, "passes", None)
    if not isinstance(found, Sequence) or len(found) != count:
        return ()
    real = all(isinstance(one, numbers.Real) and 0 <= float(one) < math.inf for one in found)
    return [float(one) for one in found] if real else ()


def rewrite(file: Path, records: Sequence[EpisodeResult]) -> None:
    """The complete records of a file, without a line that a killed run left half written."""
    if file.exists():
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)
        for record in records:
            append_result(part, record)
        part.touch()
        part.replace(file)
