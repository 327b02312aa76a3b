"""The closed loop: many environments side by side, one batched prediction for all that wait for one."""

import math
import numbers
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
        videos: Episodes of each task to film, the first ones, in `folder/videos`.

    Returns:
        Records of all episodes of the folder, in the order of `jobs`.

    Raises:
        ValueError: If the policy gives something that is no action, nothing is executed then; or if the folder holds an
            episode of `jobs` from another seed.
    """
    chunk = chunk_of(policy)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / EPISODES
    before = [record for record in read_results(file) if record.error is None]
    records = {(record.variation, record.task, record.episode): record for record in before}
    for job in jobs:
        if job.key in records and (seed := records[job.key].seed) != job.seed:
            raise ValueError(
                f"'{file}' holds episode {job.episode} of {job.task} from seed {seed}, and {job.seed} is asked for: "
                "choose another folder."
            )
    rewrite(file, list(records.values()))
    waiting = [job for job in jobs if job.key not in records]
    slots = [Slot(EnvironmentProcess(make)) for _ in range(min(workers, len(waiting)))]
    said: set[str] = set()  # why environments broke, each once
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="episode", disable=not progress)

    def finish(slot: Slot, success: bool, error: str | None = None) -> None:
        assert slot.job is not None
        record = EpisodeResult(
            task=slot.job.task,
            episode=slot.job.episode,
            seed=slot.job.seed,
            instruction=slot.instruction,
            success=success,
            steps=slot.step,
            predictions=len(slot.seconds),
            latency=float(np.mean(slot.seconds)) if slot.seconds else 0.0,
            error=None if error is None else without_paths(error),
            variation=slot.job.variation,
            jerk=mean_jerk(np.array(slot.executed), spec),
            passes=float(np.mean(slot.passes)) if slot.passes else None,
        )
        if slot.video is not None:
            slot.video.save(success, slot.observation) if error is None else slot.video.save(None)
        append_result(file, record)
        records[slot.job.key] = record
        if error is not None and error not in said:
            said.add(error)
            tqdm.write(f"{record.task}, episode {record.episode} broke: {error}", file=sys.stderr)
        slot.job = slot.observation = slot.video = None
        bar.update()
        finished = [known.success for known in records.values() if known.error is None]
        bar.set_postfix(success=f"{np.mean(finished):.0%}" if finished else "")

    def answers(asked: Sequence[Slot]) -> Iterator[tuple[Slot, Any]]:
        for slot in asked:
            try:
                yield slot, slot.process.answer()
            except EnvironmentFailure as failure:
                finish(slot, success=False, error=str(failure))

    def ask(slot: Slot, method: str, *arguments: Any) -> bool:
        try:
            slot.process.ask(method, *arguments)
        except EnvironmentFailure as failure:
            finish(slot, success=False, error=str(failure))
            return False
        return True

    try:
        while waiting or any(slot.job for slot in slots):
            # 1. Episodes begin where a slot is free
            begun = []
            for slot in slots:
                if slot.job is None and waiting:
                    slot.job, slot.control, slot.step, slot.instruction = waiting.pop(0), control(), 0, ""
                    slot.seconds, slot.passes, slot.executed = [], [], []
                    if ask(slot, "reset", slot.job.seed, slot.job.task, slot.job.variation):
                        begun.append(slot)
            for slot, observation in answers(begun):
                assert slot.job is not None
                slot.observation, slot.instruction = observation, observation.instruction
                if policy is not None:
                    begin_episode(policy, slots.index(slot))
                if slot.job.episode < videos and observation.images:
                    slot.video = EpisodeVideo(slot.job.film(folder), observation, spec.names, spec.hz)
            if stands:
                there = [slot for slot in begun if slot.observation is not None and ask(slot, "standstill")]
                for slot, start in answers(there):
                    slot.control.begin_at(start)

            # 2. One answer of the policy for all that wait for one
            running = [slot for slot in slots if slot.observation is not None]
            due = [slot for slot in running if slot.control.wants_action(slot.step)]
            started = time.perf_counter()
            if due and policy is None:
                asked = [slot for slot in due if ask(slot, "expert_action")]
                decided = list(answers(asked))
            elif due and policy is not None:
                seen = []
                for slot in due:
                    assert slot.observation is not None  # it is running
                    expected = slot.last_seconds if latency is None else latency
                    decided_already = slot.control.committed(slot.step, expected, chunk)
                    about = {"step": slot.step, "slot": slots.index(slot), "committed": decided_already}
                    seen.append(replace(slot.observation, **about))
                decided = list(zip(due, checked(policy.act(seen), len(seen), spec.action_dim)))
                for slot, passes in zip(due, counted_passes(policy, len(due))):
                    slot.passes.append(passes)
            else:
                decided = []
            elapsed = time.perf_counter() - started
            for slot, action in decided:
                slot.seconds.append(elapsed)
                slot.last_seconds = elapsed
                slot.control.give(slot.step, np.asarray(action), elapsed if latency is None else latency)

            # 3. Every world makes a step
            stepped = []
            for slot in [slot for slot in running if slot.job is not None]:
                action = slot.control.action(slot.step)
                if slot.video is not None and slot.observation is not None:
                    slot.video.add(slot.observation, action)
                slot.executed.append(np.asarray(action))
                if ask(slot, "step", action):
                    stepped.append(slot)
            for slot, (observation, success) in answers(stepped):
                slot.observation, slot.step = observation, slot.step + 1
                if success or slot.step >= max_steps:
                    finish(slot, bool(success))
    finally:
        bar.close()
        for slot in slots:
            slot.process.stop()
    return [records[job.key] for job in jobs]


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
