"""An evaluation from beginning to end: which episodes, who is in control, what the report says."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenizer import get_action_stats
from ..choices_openvla import check_choice
from ..files_openvla import read_json
from ..folders import locked, write_json
from ..hub import file_digests, model_folder, published_name, statistics_of
from .control import BlockingControl, RealtimeControl
from .environment import (
    ACTION_DIM,
    EVALUATION_SEEDS,
    Observation,
    choose_tasks,
    choose_variations,
    make_environment,
    tasks_with,
)
from .loop import EPISODES, Job, run_episodes
from .policies import ConstantPolicy, OpenVLAPolicy, Policy, RandomPolicy
from .rendering import opengl_backend
from .report import REPORT, write_report


POLICIES = ("model", "expert", "random", "mean")
SETTINGS = "evaluation.json"
STANDSTILL = np.array([0.0, 0, 0, 0, 0, 0, 1.0])  # until the first action is there: the gripper stays open


def evaluate(
    *,
    model: str,
    output: str | Path,
    env: str = "metaworld",
    tasks: str = "mt10",
    episodes: int = 50,
    policy: str | Policy = "model",
    control: str = "blocking",
    hz: float | None = None,
    latency: float | None = None,
    variations: Sequence[str] = ("none",),
    max_steps: int | None = None,
    unnorm_key: str | None = None,
    center_crop: bool | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    quantization: str | None = None,
    workers: int | None = None,
    videos: int = 1,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Run every task for some episodes and write episodes.jsonl, report.json, report.md, report.png and videos.

    The same call goes on where a stopped one was. Seeds are those of `EVALUATION_SEEDS`, which recording never uses.

    Args:
        model: Folder or Hub id; also of whose statistics "random" and "mean" are.
        policy: "model", or to compare with: "expert" (scripted), "random" (between q01 and q99), "mean" action, or a
            policy of another kind, whose repr goes into the report; `model` is only written down then.
        control: "blocking" or "realtime", see `control`; `hz` and `latency` (seconds; default: the median of ten single
            predictions here) are of the latter.
        variations: Of the environment; "all" for each axis, "none" or "" for episodes as recorded. Each is run for
            those of the tasks that have it.
        center_crop: Default: whether the model was fine-tuned with image augmentation.
        quantization: "int8" or "int4".
        workers: Environments side by side. Default: one for each core, at most 8.
        options: Of the environment.

    Returns:
        The summary of the report, see `report.summarize`; `mean_success` is None where every episode broke.

    Raises:
        ValueError: If an option is impossible, the actions of the model are not those of the environment, or the folder
            holds an evaluation with other options, or of other weights.
        BlockingIOError: If another process evaluates into the same folder.
        NoOpenGL: If there is nothing to render with.
    """
    if isinstance(policy, str):
        check_choice("policy", policy, POLICIES)
    check_choice("control", control, ("blocking", "realtime"))
    if episodes < 1 or videos < 0:
        raise ValueError(f"episodes={episodes}, videos={videos}: expected at least one episode, and 0 videos or more.")
    for option, value, least in (("max_steps", max_steps, 1), ("workers", workers, 1), ("latency", latency, 0)):
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{option}={value}: expected at least {least}.")
    if hz is not None and not 0 < hz < float("inf"):
        raise ValueError(f"hz={hz}: the world needs a rate above 0.")
    if control == "blocking" and (hz is not None or latency is not None):
        raise ValueError(f"hz={hz}, latency={latency}: they are options of control='realtime'; blocking waits.")
    make = partial(make_environment, env, **options)
    here = make_environment(env, **{**options, "render": False})
    chosen = choose_tasks(here, tasks)
    variations = choose_variations(here, chosen, variations)
    varied = [(variation, task) for variation in variations for task in tasks_with(here, chosen, variation)]
    max_steps = here.max_steps if max_steps is None else max_steps
    hz = here.frequency if hz is None else hz
    here.close()
    RealtimeControl(hz, STANDSTILL)  # refuses a rate that is none
    if options.get("render", True):
        opengl_backend()

    about = {"env": env, "tasks": tasks, "episodes": episodes}
    about |= {"policy": policy if isinstance(policy, str) else repr(policy), "model": published_name(model)}
    named = "" if variations == ("",) else ", ".join(name or "none" for name in variations)
    about |= {"control": control, "variations": named, "quantization": quantization, "max_steps": max_steps}
    about |= {"dtype": None if dtype == "auto" else dtype, "unnorm_key": unnorm_key, "center_crop": center_crop}
    about |= {name: value for name, value in options.items() if name != "assets"}  # a place on this machine
    if control == "realtime":
        about |= {"hz": hz}
    about = {name: value for name, value in about.items() if value not in (None, "")}

    folder = Path(output).expanduser()
    with locked(folder):
        digests: dict[str, str] = {}
        stats: dict[str, Any] = {}
        if isinstance(policy, str) and policy != "expert":
            source = model_folder(model)
            if folder.resolve() == source.resolve():
                raise ValueError(f"output='{folder}' is the model: give a folder of its own, it may lie inside.")
            stats = get_action_stats(statistics_of(source), unnorm_key)
            check_dimensions(stats, model, env)
            digests = file_digests(source, weights=policy == "model")
        before = earlier_settings(folder, {**about, "digests": digests}, model)

        actor: Policy | None = None
        if not isinstance(policy, str):
            actor = policy
        elif policy in ("random", "mean"):
            actor = reference_policy(policy, stats)
        elif policy == "model":
            loading: dict[str, Any] = {"quantization": quantization, "unnorm_key": unnorm_key, "crop": center_crop}
            actor = OpenVLAPolicy.load(str(source), device=device, dtype=dtype, **loading)
        make_control: Any = BlockingControl
        if control == "realtime":
            make_control = partial(RealtimeControl, hz, STANDSTILL)
            if "latency" in before:
                latency = before["latency"]  # a resumed run is one with the first
            elif latency is None:
                latency = single_latency(actor, chosen[0], options.get("size", 224)) if actor is not None else 0.0
            about["latency"] = round(float(latency or 0.0), 4)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, {**about, **({"digests": digests} if digests else {})})

        jobs = [
            Job(task, episode, EVALUATION_SEEDS[episode], variation)
            for variation, task in varied
            for episode in range(episodes)
        ]
        records = run_episodes(
            actor,
            make,
            jobs,
            folder,
            control=make_control,
            latency=latency if control == "realtime" else None,
            max_steps=max_steps,
            workers=workers or min(8, os.cpu_count() or 1),
            videos=videos,
            progress=progress,
        )
        return write_report(folder, records, about)


def check_dimensions(stats: Mapping[str, Any], model: str, env: str) -> None:
    """Raise a `ValueError` if the actions of a model are not those of the environment, before its weights are read."""
    dims = len(stats["q01"])
    if dims != ACTION_DIM:
        raise ValueError(
            f"The actions of '{model}' have {dims} dimensions, those of '{env}' {ACTION_DIM}: another unnorm_key, or a "
            "model that was trained for this environment?"
        )


def earlier_settings(folder: Path, now: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The settings `folder` was begun with; empty where it is new.

    Raises:
        ValueError: If they are not those of `now`; says what changed. The number of episodes may, and the latency,
            which is kept. Folders of older versions hold no digests, and maybe the path of `model`.
    """
    if not (folder / SETTINGS).exists():
        if there := [name for name in (EPISODES, *REPORT, "videos") if (folder / name).exists()]:
            raise ValueError(
                f"'{folder}' holds {'episodes' if EPISODES in there else there[0]} but no {SETTINGS}, so nothing says "
                "what was evaluated: choose another folder."
            )
        return {}
    before = read_json(folder / SETTINGS)
    if before.get("model") == model:
        before["model"] = now.get("model")
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in ("latency", "episodes", "digests")
    ]
    if changed:
        raise ValueError(f"'{folder}' holds another evaluation: {'; '.join(changed)}. Choose another folder.")
    known, found = before.get("digests") or now["digests"], now["digests"]
    kinds = (known.keys() | found.keys()) - ({"base"} - known.keys())  # older versions did not look at it
    other = [name for name in sorted(kinds) if known.get(name) != found.get(name)]
    if other:
        raise ValueError(
            f"'{folder}' holds episodes of '{model}' with other {' and '.join(other)}: the files have changed since. "
            "Choose another output folder for the model as it is now."
        )
    return before


def reference_policy(name: str, stats: dict[str, Any]) -> Policy:
    """What a policy has to be better than: random or mean actions of the demonstrations."""
    if name == "random":
        return RandomPolicy(np.asarray(stats["q01"]), np.asarray(stats["q99"]))
    return ConstantPolicy(np.asarray(stats["mean"]))


def single_latency(policy: Policy, instruction: str, size: int) -> float:
    """Median seconds of ten predictions for one observation, after two to warm up."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    observation = Observation({"image": image}, np.zeros(8, dtype=np.float32), instruction)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        policy.act([observation])
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))
