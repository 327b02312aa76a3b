"""An evaluation from beginning to end: which episodes, who is in control, what the report says."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..action_spec import ActionSpec
from ..device import torch_device
from ..extras import require
from ..folders import locked, with_version, write_json
from ..hub import published_name
from ..options.evaluation import EvaluateOptions, names_of
from ..policy import Policy
from .begun import SETTINGS, check_older_pixels, earlier_settings
from .candidate import Candidate, check_own
from .control import BlockingControl, RealtimeControl
from .environment import (
    EVALUATION_SEEDS,
    POLICY_SEED,
    Environment,
    action_spec_of,
    choose_tasks,
    choose_variations,
    environment_options,
    file_name,
    make_environment,
    renders,
    standstill,
    tasks_with,
    usual_tasks,
    with_cameras,
)
from .latency import decide_latency
from .loop import EPISODES, Job, run_episodes
from .policies import RandomPolicy
from .rendering import opengl_backend
from .report import read_results, write_report


UNSAID: tuple[Any, ...] = (None, "", "auto", "none", {})  # values of options that a report leaves out
OF_THIS_MACHINE = ("assets",)  # options of simulators that are places here: neither saved nor compared


def evaluate(
    options: EvaluateOptions | None = None,
    *,
    policy: str | Policy | None = None,
    progress: bool = True,
    **given: Any,
) -> dict[str, Any]:
    """Run every task for some episodes and write episodes.jsonl, report.json, report.md, report.png and videos.

    The same call continues a stopped one. Seeds are those of `EVALUATION_SEEDS`, which recording never uses; torch's
    global generator is seeded with `POLICY_SEED`, and by how many episodes were run before.

    Args:
        options: What is evaluated; or its fields and options of the simulator as keywords, see `SimulatorOptions.of`.
        policy: Instead of that of the options: one of its names, or a policy of another kind, whose repr goes into the
            report; the model is only written down then, and how one is loaded and decoded may not be said.

    Returns:
        The summary of the report, see `report.summarize`; `mean_success` is None where every episode broke.

    Raises:
        ValueError: If an option is impossible, the actions of the model are not those of the environment, or the folder
            holds an evaluation with other options, or of other weights.
        BlockingIOError: If another process evaluates into the same folder.
        NoOpenGL, ModuleNotFoundError: If there is nothing to render with, or to write videos.
    """
    named = {"policy": policy} if isinstance(policy, str) else {}
    if options is None:
        options = EvaluateOptions.of(**given, **named)
    elif given or named:
        raise ValueError(f"{', '.join(given | named)}: give the options as one object, or all of them as keywords.")
    acting: Policy | None = None if policy is None or isinstance(policy, str) else policy
    if acting is not None:
        check_own(acting, options)
    device = torch_device(options.device)
    plan = EvaluationPlan.of(options)
    control, said = plan.control(options)
    plan.here.close()
    plan.check_pictures(options)
    about = settings_of(options, plan, options.policy if acting is None else repr(acting))

    folder, latency, candidate = Path(options.output).expanduser(), None, None
    with locked(folder):
        # 1. The model as files: what does not fit is said before weights are read
        if acting is None and options.policy != "expert":
            candidate = Candidate.beside(plan.here, plan.spec, options)
            if candidate.unnorm_key is not None:
                about["unnorm_key"] = candidate.unnorm_key
            said |= {"recorded_hz": candidate.recorded_hz} if candidate.recorded_hz else {}
        digests = candidate.digests if candidate else {}
        before = earlier_settings(folder, {**about, "digests": digests}, options.model)

        # 2. Who acts, and how late
        environment = plan.environment_options
        if candidate and options.policy == "model":
            environment = with_cameras(environment, options.env, candidate.config.camera_names)
            acting = model = candidate.load(options, device)
            said |= candidate.said(model)
            about["device"] = ", ".join(dict.fromkeys([*filter(None, [before.get("device")]), device]))
            if "center_crop" in before:
                check_older_pixels(before["center_crop"], candidate.source, model, getattr(plan.here, "size", None))
        elif candidate:
            acting = candidate.reference(options.policy)
        make: Any = partial(make_environment, options.env, **environment)
        if options.control == "realtime":
            about["latency"] = latency = decide_latency(options.latency, before, acting, make, plan.varied[0], folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, with_version({**about, **({"digests": digests} if digests else {})}))

        # 3. Episodes that are not there yet, and the report of all
        known = {(one.variation, one.task, one.episode) for one in read_results(folder / EPISODES) if one.error is None}
        jobs = plan.jobs(options.episodes)
        warn_of_videos([job for job in jobs if job.key in known], options.videos, folder)
        drawn = POLICY_SEED + len(known)  # a run that goes on draws other numbers than it began with
        torch.manual_seed(drawn)
        if options.policy == "random" and isinstance(acting, RandomPolicy):
            acting.seed(drawn)
        records = run_episodes(
            acting,
            make,
            jobs,
            folder,
            spec=plan.spec,
            control=control,
            stands=options.control == "realtime" and plan.stands,
            latency=latency,
            max_steps=plan.max_steps,
            workers=options.workers or min(8, os.cpu_count() or 1),
            videos=options.videos,
            progress=progress,
        )
        # Of a model whose folder was not looked at, nothing acted: an expert's report does not name it.
        reported = {name: value for name, value in about.items() if name != "model" or candidate}
        reported |= {name: value for name, value in said.items() if name not in about}
        return write_report(folder, records, reported)


@dataclass(frozen=True)
class EvaluationPlan:
    """What an environment is asked before any episode: one in this process, which renders nothing."""

    here: Environment
    environment_options: Mapping[str, Any]  # of those that run episodes
    tasks: str  # as chosen, or as it is usual
    variations: tuple[str, ...]
    varied: tuple[tuple[str, str], ...]  # variation and task: a row of the report each
    max_steps: int
    hz: float
    spec: ActionSpec
    stands: bool  # whether it says where its robot stands, which the loop asks in each episode

    @classmethod
    def of(cls, options: EvaluateOptions) -> "EvaluationPlan":
        """Raise a `ValueError` for tasks, variations or options that the environment does not have; what makes a report
        say less than it seems to is a warning."""
        asked = environment_options(options.env, options.environment_options)
        here = make_environment(options.env, **{**asked, "render": False})
        tasks = usual_tasks(here) if options.tasks is None else options.tasks
        chosen = choose_tasks(here, tasks)
        variations = choose_variations(here, chosen, names_of(options.axis))
        varied = tuple((one, task) for one in variations for task in tasks_with(here, chosen, one))
        max_steps = here.max_steps if options.max_steps is None else options.max_steps
        hz = here.frequency if options.hz is None else options.hz
        spec, stands = action_spec_of(here), hasattr(here, "standstill")
        if options.episodes > (different := getattr(here, "initial_states", options.episodes)):
            warnings.warn(
                f"episodes={options.episodes}: each task of '{options.env}' begins in {different} states, and further "
                "episodes repeat them: they say little that is new, and the intervals of the report are too narrow.",
                stacklevel=3,
            )
        if options.chunking == "ensemble" and spec.absolute_angles:
            warnings.warn(
                f"chunking='ensemble': {', '.join(spec.names[dim] for dim in spec.absolute_angles)} are angles and no "
                "changes, and are averaged as numbers: where they pass half a turn, the mean of 179 and -179 degrees "
                "is 0. Take switch or prefix there.",
                stacklevel=3,
            )
        return cls(here, asked, tasks, tuple(variations), varied, max_steps, hz, spec, stands)

    def control(self, options: EvaluateOptions) -> tuple[Callable[[], Any], dict[str, Any]]:
        """What makes the control mode of one episode, and what of it was decided by default, for the report."""
        if options.control == "blocking":
            return partial(BlockingControl, options.execute), {}
        chunking, late = options.chunking or "switch", options.late or "repeat"
        start = np.zeros(self.spec.action_dim) if self.stands else standstill(self.here)
        relative = np.array(self.spec.relative)
        make = partial(RealtimeControl, self.hz, start, late, relative, chunking, options.execute)
        make()  # refuses a rate that is none
        return make, {"chunking": chunking, "late": late}

    def check_pictures(self, options: EvaluateOptions) -> None:
        """Raise an error where videos or pictures cannot be made."""
        if options.videos:
            require("av", purpose="A video (--videos)")
            if len({file_name(task, variation) for variation, task in self.varied}) < len(self.varied):
                tasks = ", ".join(dict.fromkeys(task for _, task in self.varied))
                raise ValueError(
                    f"{tasks}: videos of several of these would be one file. Give videos=0, or run them alone."
                )
        if self.environment_options.get("render", renders(self.here)):
            opengl_backend()

    def jobs(self, episodes: int) -> list[Job]:
        return [
            Job(task, episode, EVALUATION_SEEDS[episode], variation)
            for variation, task in self.varied
            for episode in range(episodes)
        ]


def settings_of(options: EvaluateOptions, plan: EvaluationPlan, policy: str) -> dict[str, Any]:
    """What is saved in evaluation.json, and has to be the same when the evaluation is continued."""
    about = options.content() | {"tasks": plan.tasks, "episodes": options.episodes, "max_steps": plan.max_steps}
    about |= {"model": published_name(options.model), "axis": ",".join(name or "none" for name in plan.variations)}
    about |= {"policy": policy, "hz": plan.hz if options.control == "realtime" else None}
    kept = {name: plan.environment_options[name] for name in options.env_options if name not in OF_THIS_MACHINE}
    return {name: value for name, value in {**about, "env_options": kept}.items() if value not in UNSAID}


def warn_of_videos(done: list[Job], videos: int, folder: Path) -> None:
    """Warn of episodes that are `done` and were to have a video. By default one has: whoever leaves it at that did not
    ask for more videos than before."""
    unseen = [job for job in done if job.episode < videos and not job.film(folder).exists()]
    if videos > 1 and unseen:
        warnings.warn(
            f"videos={videos}: {len(unseen)} of these episodes were run before without a video, and are not run "
            "again for one. For videos of them give another folder.",
            stacklevel=3,
        )
