"""An evaluation from beginning to end: which episodes, who is in control, what the report says."""

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..action_spec import spec_of
from ..action_tokenizer import get_action_stats, resolve_unnorm_key, scale_of
from ..device import torch_device
from ..extras import require
from ..files_openvla import read_json
from ..folders import MARKS, locked, read_settings, with_version, write_json
from ..hub import config_of, file_digests, model_folder, published_name, statistics_of, variant_of
from ..observation import Observation
from ..options.evaluation import EvaluateOptions, names_of
from ..options.fields import decisive
from ..policy import PIXELS, OpenVLAPolicy, Policy, begin_episode, quantization_of
from ..processor_files_openvla import STARTED
from .control import BlockingControl, RealtimeControl
from .environment import (
    EVALUATION_SEEDS,
    POLICY_SEED,
    Environment,
    action_spec_of,
    asks_for_wrist,
    check_dimensions,
    check_state,
    choose_tasks,
    choose_variations,
    dataset_of,
    environment_options,
    file_name,
    has_other_rate,
    make_environment,
    renders,
    standstill,
    tasks_with,
    usual_tasks,
    warn_of_other_units,
)
from .loop import EPISODES, Job, run_episodes
from .policies import ConstantPolicy, RandomPolicy
from .rendering import opengl_backend
from .report import REPORT, NoEpisodes, read_results, without_paths, write_report
from .workers import EnvironmentFailure, EnvironmentProcess


SETTINGS = "evaluation.json"
UNSAID: tuple[Any, ...] = (None, "", "auto", "none", {})  # values of options that a report leaves out
OLDER_QUANTIZATIONS = {"int8": "bnb-int8", "int4": "bnb-nf4"}  # names until format_version 1
OF_A_LOADED_MODEL = ("unnorm_key", "dtype", "quantization", "decoding", "pixels", "action_head", "action_chunk")
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
        NoOpenGL, ModuleNotFoundError: If there is nothing to render with, or to write films.
    """
    named = {"policy": policy} if isinstance(policy, str) else {}
    if options is None:
        options = EvaluateOptions.of(**given, **named)
    elif given or named:
        raise ValueError(f"{', '.join(given | named)}: give the options as one object, or all of them as keywords.")
    acting: Policy | None = None if policy is None or isinstance(policy, str) else policy
    if acting is not None:
        check_own(acting, options)

    # 1. Tasks, rate and units, asked of an environment in this process that renders nothing
    control, device = options.control, torch_device(options.device)
    of_environment = environment_options(options.env, options.environment_options)
    here = make_environment(options.env, **{**of_environment, "render": False})
    tasks = usual_tasks(here) if options.tasks is None else options.tasks
    chosen = choose_tasks(here, tasks)
    variations = choose_variations(here, chosen, names_of(options.axis))
    varied = [(variation, task) for variation in variations for task in tasks_with(here, chosen, variation)]
    max_steps = here.max_steps if options.max_steps is None else options.max_steps
    hz = here.frequency if options.hz is None else options.hz
    spec = action_spec_of(here)
    if options.episodes > (different := getattr(here, "initial_states", options.episodes)):
        warnings.warn(
            f"episodes={options.episodes}: each task of '{options.env}' begins in {different} states, and further "
            "episodes repeat them: they say little that is new, and the intervals of the report are too narrow.",
            stacklevel=2,
        )
    if options.chunking == "ensemble" and spec.absolute_angles:
        warnings.warn(
            f"chunking='ensemble': {', '.join(spec.names[dim] for dim in spec.absolute_angles)} are angles and no "
            "changes, and are averaged as numbers: where they pass half a turn, the mean of 179 and -179 degrees is 0. "
            "Take switch or prefix there.",
            stacklevel=2,
        )

    # 2. Control, films and rendering
    make_control: Any = partial(BlockingControl, options.execute)
    said: dict[str, Any] = {}  # in the report alone: what was decided by default, or by the model
    stands = control == "realtime" and hasattr(here, "standstill")
    if control == "realtime":
        late, relative = options.late or "repeat", np.array(spec.relative)
        chunking = options.chunking or "switch"
        said = {"chunking": chunking, "late": late}
        # A robot whose environment says where it stands may stand elsewhere in each episode: the loop asks then.
        start = np.zeros(spec.action_dim) if stands else standstill(here)
        make_control = partial(RealtimeControl, hz, start, late, relative, chunking, options.execute)
        make_control()  # refuses a rate that is none
    here.close()
    if options.videos:
        require("av", purpose="A film (--videos)")
        films = {file_name(task, variation) for variation, task in varied}
        if len(films) < len(varied):
            raise ValueError(
                f"{', '.join(chosen)}: films of several of these would be one file. Give videos=0, or run them alone."
            )
    if of_environment.get("render", renders(here)):
        opengl_backend()

    # 3. What is saved in evaluation.json, and has to be the same when the evaluation is continued
    about = options.content() | {"tasks": tasks, "episodes": options.episodes, "max_steps": max_steps}
    about |= {"model": published_name(options.model), "axis": ",".join(name or "none" for name in variations)}
    about |= {"policy": options.policy if acting is None else repr(acting), "hz": hz if control == "realtime" else None}
    kept = {name: of_environment[name] for name in options.env_options if name not in OF_THIS_MACHINE}
    about = {name: value for name, value in {**about, "env_options": kept}.items() if value not in UNSAID}

    folder, latency, unnorm_key = Path(options.output).expanduser(), None, options.unnorm_key
    with locked(folder):
        # 4. The model as files: units, state and cameras fit the environment before weights are read
        digests: dict[str, str] = {}
        stats: dict[str, Any] = {}
        if acting is None and options.policy != "expert":
            source = model_folder(options.model)
            if folder.resolve() == source.resolve():
                raise ValueError(f"output='{folder}' is the model: give a folder of its own, it may lie inside.")
            statistics = statistics_of(source)
            warn_of_other_units(here, statistics, unnorm_key, options.model, options.env)
            if unnorm_key is None and len(statistics) > 1:
                about["unnorm_key"] = unnorm_key = dataset_of(here, statistics)
            stats = get_action_stats(statistics, unnorm_key)
            variant = variant_of(source, options.action_head, options.action_chunk)
            config = config_of(source, **variant)
            check_dimensions(stats, options.model, options.env, spec)
            recorded = spec_of(statistics, resolve_unnorm_key(statistics, unnorm_key)).hz
            if has_other_rate(recorded, here, options.model, options.env, "; --hz changes no action"):
                said["recorded_hz"] = recorded
            if options.policy == "model":
                if (options.execute or 1) > config.action_chunk:
                    raise ValueError(
                        f"execute={options.execute}: '{options.model}' predicts {config.action_chunk} step(s) at once, "
                        "of which so many are executed at most."
                    )
                if options.chunking is not None and config.action_chunk == 1:
                    warnings.warn(
                        f"chunking='{options.chunking}': '{options.model}' predicts one step at once, so that all ways "
                        "are the same, and nothing is continued.",
                        stacklevel=2,
                    )
                check_state(config.proprio_dim, options.model, options.env, here.state_names)
                of_environment = with_cameras(of_environment, options.env, config.camera_names)
            digests = file_digests(source, weights=options.policy == "model")
        before = earlier_settings(folder, {**about, "digests": digests}, options.model)

        # 5. Who acts, and how late
        if acting is None and options.policy in ("random", "mean"):
            key = resolve_unnorm_key(statistics, unnorm_key)
            acting = reference_policy(options.policy, stats, config.normalization.get(key, "bounds_q99"))
        elif acting is None and options.policy == "model":
            acting = OpenVLAPolicy.load(
                str(source),
                device=device,
                dtype=options.dtype,
                quantization=options.quantization,
                unnorm_key=unnorm_key,
                pixels=options.pixels,
                variant=variant,
                decoding=options.decoding or "mode",
            )
            said |= {"unnorm_key": resolve_unnorm_key(statistics, unnorm_key)}
            said |= {"dtype": str(acting.model.dtype).removeprefix("torch.")}
            stored = quantization_of(acting.model)
            said |= {"quantization": stored} if stored else {}
            said |= {"action_chunk": config.action_chunk} if config.action_chunk > 1 else {}
            about["device"] = ", ".join(dict.fromkeys([*filter(None, [before.get("device")]), device]))
            if "center_crop" in before:
                check_older_pixels(before["center_crop"], source, acting, getattr(here, "size", None))
        make: Any = partial(make_environment, options.env, **of_environment)
        if control == "realtime":
            about["latency"] = latency = decide_latency(options.latency, before, acting, make, varied[0], folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, with_version({**about, **({"digests": digests} if digests else {})}))

        # 6. Episodes that are not there yet, and the report of all
        jobs = [
            Job(task, episode, EVALUATION_SEEDS[episode], variation)
            for variation, task in varied
            for episode in range(options.episodes)
        ]
        known = {(one.variation, one.task, one.episode) for one in read_results(folder / EPISODES) if one.error is None}
        unseen = [job for job in jobs if job.key in known and job.episode < options.videos]
        # By default one is filmed: whoever leaves it at that did not ask for more films than before.
        if options.videos > 1 and (unseen := [job for job in unseen if not job.film(folder).exists()]):
            warnings.warn(
                f"videos={options.videos}: {len(unseen)} of the episodes to film were run before without a film, and "
                "are not run again for one. For films of them give another folder.",
                stacklevel=2,
            )
        drawn = POLICY_SEED + len(known)  # a run that goes on draws other numbers than it began with
        torch.manual_seed(drawn)
        if options.policy == "random" and isinstance(acting, RandomPolicy):
            acting.seed(drawn)
        records = run_episodes(
            acting,
            make,
            jobs,
            folder,
            spec=spec,
            control=make_control,
            stands=stands,
            latency=latency,
            max_steps=max_steps,
            workers=options.workers or min(8, os.cpu_count() or 1),
            videos=options.videos,
            progress=progress,
        )
        # Of a model whose folder was not looked at, nothing acted: an expert's report does not name it.
        reported = {name: value for name, value in about.items() if name != "model" or stats}
        reported |= {name: value for name, value in said.items() if name not in about}
        return write_report(folder, records, reported)


def check_own(policy: Policy, options: EvaluateOptions) -> None:
    """Raise a `ValueError` for options that a policy given as an object never sees: they would be in its report."""
    kind = type(policy).__name__
    known = decisive(EvaluateOptions)
    for name in OF_A_LOADED_MODEL:
        if (value := getattr(options, name)) != known[name]:
            raise ValueError(f"{name}={value!r}: the policy given ({kind}) acts as it is, leave it out.")
    if hex(id(policy)) in repr(policy):
        warnings.warn(
            f"policy={policy!r}: that is its place in memory, another one each time, so that an evaluation which is "
            f"stopped cannot be continued. Give {kind} a __repr__ that says what it is.",
            stacklevel=3,
        )


def with_cameras(of_environment: dict[str, Any], env: str, sees: Sequence[str]) -> dict[str, Any]:
    """Options of the environment, with the camera on the gripper where the model sees it and nothing was said."""
    return {"wrist": True, **of_environment} if asks_for_wrist(env, sees) else of_environment


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
        if there := [name for name in (STARTED, *MARKS) if (folder / name).exists()]:
            raise ValueError(
                f"'{folder}' holds {there[0]}, so it is a model or a training run: give a folder of its own, it may "
                "lie inside."
            )
        return {}
    before, version = read_settings(folder / SETTINGS)
    check_saved(before, folder)
    if version == 0:
        before = {**_from_version_0(before), "pixels": now.get("pixels")}  # compared in `check_older_pixels`
    if version < 2:  # "int8" and "int4" were those of bitsandbytes
        before["quantization"] = OLDER_QUANTIZATIONS.get(before.get("quantization", ""))
    if before.get("model") == model:
        before["model"] = now.get("model")
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in decisive(EvaluateOptions)
        if before.get(name) != now.get(name)
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


def check_saved(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise a `ValueError` for saved settings that no evaluation writes: somebody edited them. Options that are only
    compared may be anything; those that are read here may not."""
    texts = dict.fromkeys(("device", "quantization", "axis"), (str,))
    kinds: dict[str, tuple[type, ...]] = {"digests": (dict,), "latency": (int, float), **texts}
    for name, kind in kinds.items():
        value = settings.get(name)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and (not good or (name == "latency" and not 0 <= value < math.inf)):
            raise ValueError(
                f"'{folder / SETTINGS}' says {name}={value!r:.100}, which no evaluation writes: the file was edited. "
                "Choose another folder."
            )


def _from_version_0(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were saved before they had a version: variations were called so, and joined by ", "; options of the
    simulator stood among the others; whether images were cropped was `center_crop`, see `check_older_pixels`."""
    known = {item.name for item in fields(EvaluateOptions)} | {"digests", "center_crop"}
    renamed = {"axis" if name == "variations" else name: value for name, value in settings.items()}
    renamed = {name: str(value).replace(", ", ",") if name == "axis" else value for name, value in renamed.items()}
    own = {name: value for name, value in renamed.items() if name in known}
    more = {name: value for name, value in renamed.items() if name not in known}
    return {"center_crop": None, **own, **({"env_options": more} if more else {})}


def check_older_pixels(crop: bool | None, folder: Path, policy: OpenVLAPolicy, size: int | None) -> None:
    """Raise a `ValueError` if an evaluation that was begun before pixels were stored with a model, when all images were
    resized with lanczos3, showed others than those that `policy` is shown now.

    Args:
        crop: Whether it was asked for the center of images; None: as finetune.json said in `image_aug`.
        folder: Of the model.
        size: Width and height of the images, where it is known.
    """
    started = folder / "finetune.json"
    if crop is None:
        crop = started.is_file() and bool(read_json(started).get("image_aug"))
    then = {**PIXELS["libero"], "jpeg_quality": None}
    if not crop:
        then["center_crop"] = None
    images = policy.model.processor.image_processor
    now = {name: getattr(images, name) for name in then}
    if images.input_sizes[0][1:] == [size, size]:  # nothing to resize
        now |= {"resize_filter": then["resize_filter"], "jpeg_quality": None}
    if now != then:
        raise ValueError(
            f"The evaluation was begun by an older version, which showed the model other pixels ({then}, now {now}): "
            "choose another output folder."
        )


def reference_policy(name: str, stats: dict[str, Any], normalization: str) -> Policy:
    """What a policy has to be better than: random or mean actions of the demonstrations.

    Args:
        normalization: What -1 and 1 of the model stand for; random actions are drawn between.
    """
    if name == "random":
        return RandomPolicy(*scale_of(stats, normalization))
    return ConstantPolicy(np.asarray(stats["mean"]))


def decide_latency(
    given: float | None,
    before: Mapping[str, Any],
    policy: Policy | None,
    make: Callable[[], Environment],
    first: tuple[str, str],
    folder: Path,
) -> float:
    """Seconds that a prediction takes, as they are written down: those of the settings that the folder was begun with,
    those given, or measured on what is seen first.

    Args:
        first: Variation and task of the first episode.

    Raises:
        ValueError: If others are given than the folder was begun with.
    """
    known = before.get("latency")
    if known is not None and given is not None and round(given, 4) != known:
        raise ValueError(
            f"'{folder}' holds another evaluation: latency was {known:g}, is {given:g}. Leave it out to continue, or "
            "choose another folder."
        )
    if known is not None:
        return float(known)
    if given is None and policy is not None:
        variation, task = first
        process = EnvironmentProcess(make)
        try:
            process.ask("reset", EVALUATION_SEEDS[0], task, variation)
            given = median_latency(policy, process.answer())
        except EnvironmentFailure as failure:
            raise NoEpisodes(f"No latency can be measured: {without_paths(str(failure))}.") from failure
        finally:
            process.stop()
    return round(float(given or 0.0), 4)


def single_latency(policy: Policy, instruction: str, size: int) -> float:
    """`median_latency` of an observation that nothing has seen: noise, and a state of eight zeros."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    images = {"image": image, "wrist_image": image}
    return median_latency(policy, Observation(images, np.zeros(8, dtype=np.float32), instruction))


def median_latency(policy: Policy, observation: Observation) -> float:
    """Median seconds of ten predictions for one observation, after two to warm up; each the first of an episode, as a
    policy that keeps its last action would have it easy with the same observation again."""
    times = []
    for _ in range(12):
        begin_episode(policy)
        started = time.perf_counter()
        policy.act([observation])
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))
