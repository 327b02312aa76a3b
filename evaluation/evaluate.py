"""An evaluation from beginning to end: which episodes, who is in control, what the report says."""

import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenizer import get_action_stats
from ..configuration_openvla import check_choice
from ..modeling_openvla import OpenVLAForActionPrediction
from .control import BlockingControl, RealtimeControl
from .environment import EVALUATION_SEEDS, Observation, choose_tasks, choose_variations, make_environment, tasks_with
from .loop import Job, run_episodes
from .policies import ConstantPolicy, OpenVLAPolicy, Policy, RandomPolicy
from .report import write_report


POLICIES = ("model", "expert", "random", "mean")
SETTINGS = "evaluation.json"
PACKAGE = Path(__file__).resolve().parents[1]  # whose root is a model, too
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
        The summary of the report.

    Raises:
        ValueError: If an option is impossible, or the folder holds an evaluation with other ones.
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
    make = partial(make_environment, env, **options)
    here = make_environment(env, **{**options, "render": False})
    chosen = choose_tasks(here, tasks)
    variations = choose_variations(here, chosen, variations)
    varied = [(variation, task) for variation in variations for task in tasks_with(here, chosen, variation)]
    max_steps = here.max_steps if max_steps is None else max_steps
    hz = here.frequency if hz is None else hz
    here.close()
    actor: Policy | None = None
    if not isinstance(policy, str):
        actor, policy = policy, repr(policy)
    elif policy in ("random", "mean"):
        config = OpenVLAForActionPrediction.config_class.from_pretrained(model)
        actor = reference_policy(policy, get_action_stats(read_statistics(model, config), unnorm_key))
    elif policy == "model":
        loading: dict[str, Any] = {"quantization": quantization, "unnorm_key": unnorm_key, "crop": center_crop}
        actor = OpenVLAPolicy.load(model, device=device, dtype=dtype, **loading)
    make_control: Any = BlockingControl
    if control == "realtime":
        make_control = partial(RealtimeControl, hz, STANDSTILL)
        if latency is None:
            latency = single_latency(actor, chosen[0], options.get("size", 224)) if actor is not None else 0.0

    folder = Path(output)
    # Reports are published: they do not say where on this machine the package lies.
    shown = "embedded policy" if Path(model).resolve() == PACKAGE else model
    about = {"env": env, "tasks": tasks, "episodes": episodes, "policy": policy, "model": shown, "control": control}
    named = "" if variations == ("",) else ", ".join(name or "none" for name in variations)
    about |= {"variations": named, "quantization": quantization, "max_steps": max_steps}
    about |= {"dtype": None if dtype == "auto" else dtype, "unnorm_key": unnorm_key, "center_crop": center_crop}
    about |= options
    if control == "realtime":
        about |= {"hz": hz, "latency": round(float(latency or 0.0), 4)}
    about = {name: value for name, value in about.items() if value not in (None, "")}
    settings = folder / SETTINGS
    if settings.exists():
        before = json.loads(settings.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)!r}, is {about.get(name)!r}"
            for name in sorted(before.keys() | about.keys())
            if before.get(name) != about.get(name) and name not in ("latency", "episodes")
        ]
        if changed:
            raise ValueError(f"'{folder}' holds another evaluation: {'; '.join(changed)}. Choose another folder.")
        if control == "realtime":
            latency = before["latency"]  # a resumed run is one with the first
            about["latency"] = latency
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(about, indent=2) + "\n")

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
        workers=min(8, os.cpu_count() or 1) if workers is None else workers,
        videos=videos,
        progress=progress,
    )
    return write_report(folder, records, about)


def read_statistics(model: str, config: Any) -> dict[str, Any]:
    """Statistics of a model folder, without its weights."""
    file = Path(model) / "dataset_statistics.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else config.norm_stats


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
