"""Demonstrations by scripted experts: successful episodes of a simulator, written as a data set."""

import contextlib
import json
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..action_spec import ActionSpec, spec_of
from ..action_tokenizer import resolve_unnorm_key
from ..data.writers.hdf5 import write_hdf5
from ..data.writers.lerobot import write_lerobot
from ..files_openvla import read_json
from ..folders import locked, named_in_errors, read_settings, with_version, write_json
from ..hub import config_of, file_digests, model_folder, published_name
from ..options.evaluation import RecordOptions
from ..options.fields import decisive
from . import recorder
from .attributes import instructions_of
from .environment import (
    Environment,
    action_spec_of,
    asks_for_wrist,
    check_dimensions,
    check_state,
    choose_tasks,
    file_name,
    has_other_rate,
    renders,
    tasks_with,
    warn_of_other_units,
)
from .expert_episode import is_episode, load_episode
from .rendering import opengl_backend
from .workers import EnvironmentFailure, EnvironmentProcess


ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
PLAN = "options.json"  # of an unfinished recording: what is recorded
COMPLETE = "whole"  # in it: the data set that is being written; a recording of version 0.1.0 continues
SLOWEST_EPISODE = 3600.0  # seconds, all attempts together


class RecordingBroke(OSError):
    """A worker failed. The message says why; what was recorded before is kept."""

    exit_code = 1  # of the command line


def record(options: RecordOptions, *, progress: bool = True) -> dict[str, Any]:
    """Record episodes; one that was interrupted continues where it stopped, also with more episodes, and one that is
    there is left alone.

    Returns:
        What `OUTPUT/recording.json` says: `options`, and for each of the `tasks` its `episodes`, `failed_attempts` of
        the expert and mean `steps`.

    Raises:
        ValueError: If a task is unknown, the environment has no expert, an episode fails 20 times, or another
            recording was begun in the same place.
        FileExistsError: If the folder holds something else, or `OUTPUT.partial` does.
        FileNotFoundError: If there is no OpenGL to render with, or no such student.
        BlockingIOError: If another process records to the same place.
        RecordingBroke: If a worker of several died, or raised something, an error of this list as well.
    """
    given = Path(options.output).expanduser().absolute()
    output = given.resolve()  # of a link the folder that it stands for is replaced
    begun, part = (path.with_name(f"{path.name}.partial") for path in (given, output))
    with locked(output):
        if (begun / PLAN).is_file() and not part.exists():  # earlier versions kept it beside the link, and failed there
            shutil.move(begun, part)
        return _record(options, output, progress)


def _record(options: RecordOptions, output: Path, progress: bool) -> dict[str, Any]:
    part = output.with_name(output.name + ".partial")
    content, plan = published(options), part / PLAN
    if (output / "recording.json").exists():
        _check_same(content, read_settings(output / "recording.json")[0].get("options", {}), output)
        _remove(part, content)  # of a run that was killed after its last step but one
        return read_json(output / "recording.json")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty: give a new folder.")
    _check_part(part)
    environment = recorder.open_environment(options, render=False)
    chosen = choose_tasks(environment, options.tasks)
    varied = [(task, axis) for axis in options.axes for task in tasks_with(environment, chosen, axis)]
    tasks = dict.fromkeys(task for task, _ in varied)
    if options.student is not None:
        check_student(options, environment, options.student)
    if renders(environment):
        opengl_backend()
    if plan.exists():
        begun = read_settings(plan)[0]
        fewer = isinstance(begun.get("episodes"), int) and begun["episodes"] < content["episodes"]
        # Each depends on its number alone, so that there may be more of them.
        _check_same({**content, "episodes": begun["episodes"]} if fewer else content, begun, part)
    part.mkdir(exist_ok=True)
    write_json(plan, with_version(content))  # first: it tells a recording from a folder of the user's
    (part / "episodes").mkdir(exist_ok=True)

    numbers = range(options.seed, options.seed + options.episodes)
    jobs = [(task, axis, number) for task, axis in varied for number in numbers]
    files = {job: part / "episodes" / f"{file_name(*job[:2], f'{job[2]:05d}')}.npz" for job in jobs}
    if len(set(files.values())) < len(jobs):
        raise ValueError(f"{', '.join(tasks)}: episodes of several of these would be one file. Record them alone.")
    differs = bool(options.noise or options.delay or options.student)  # what is executed from what is recorded
    there = {job: is_episode(file, executed=differs) for job, file in files.items()}
    missing = [(job, file) for job, file in files.items() if not there[job]]
    missing.sort(key=lambda each: each[0][2] != options.seed)  # one of each task first: they may not go together
    shown: dict[str, dict[str, Any]] = {}  # of each task, by its first episode

    def look(job: tuple[str, str, int], file: Path) -> None:
        if options.format == "lerobot" and job[2] == options.seed:
            images = load_episode(file, options.env).images
            shown["_".join(filter(None, job[:2]))] = {camera: frames[0].shape for camera, frames in images.items()}
            _check_alike(shown, options.env)

    for job in filter(there.get, jobs):
        look(job, files[job])
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="episode", disable=not progress) as bar:

        def done(*episode: Any) -> None:
            bar.update()
            look(*episode)

        _run(partial(recorder.Recorder, options), missing, options.workers, done)

    complete = part / COMPLETE
    shutil.rmtree(complete, ignore_errors=True)  # of a run that was stopped while it wrote
    summary = with_version({"options": content, "tasks": {task: _summary(files, task) for task in tasks}})
    summary |= {"unit": unit} if (unit := action_spec_of(environment).unit) else {}
    stated: ActionSpec | None = getattr(environment, "action_spec", None)
    summary |= (
        {"action_spec": stated.to_dict()} if stated else {"usual_actions": True}
    )  # no guess: its contract says so
    with named_in_errors(complete):
        _write(options, environment, files, varied, complete)
        (complete / "recording.json").write_text(json.dumps(summary, indent=1))
    environment.close()
    complete.replace(output)  # also where `output` is an empty folder
    _remove(part, content)
    return summary


def _write(
    options: RecordOptions,
    environment: Environment,
    files: Mapping[tuple[str, str, int], Path],
    varied: Sequence[tuple[str, str]],
    folder: Path,
) -> None:
    """The data set of all episodes."""
    stated: ActionSpec | None = getattr(environment, "action_spec", None)
    if options.format == "lerobot":
        numbers = dict.fromkeys(number for *_, number in files)
        write_lerobot(
            # Tasks take turns: whatever part of the episodes is held out has all of them
            (load_episode(files[*case, number], options.env) for number in numbers for case in varied),
            folder,
            fps=environment.frequency,
            robot_type=environment.robot,
            action_names=stated.names if stated else ACTION_NAMES,
            state_names=environment.state_names,
        )
        return
    tasks = dict.fromkeys(task for task, _ in varied)
    words = {task: file_name(instructions_of(environment, task)[0].replace(" ", "_")) for task in tasks}
    said, names = Counter(words.values()), set[str]()
    for task in tasks:
        name = words[task] if said[words[task]] == 1 else f"{words[task]}_{task}"  # words of several tasks
        while name in names:  # and those of another one
            name = f"{name}_{task}"
        names.add(name)
        write_hdf5(
            (load_episode(file, options.env) for job, file in files.items() if job[0] == task),
            folder / f"{file_name(name, 'demo')}.hdf5",
            env_name=task,
            frequency=environment.frequency,
        )


def check_student(options: RecordOptions, environment: Environment, student: str) -> None:
    """Raise a `ValueError` for a student of other actions, another state or a camera that is not recorded, before
    anything is: it would say so at its first act. Another rate is a warning."""
    known, key = recorder.student_units(options, environment)
    warn_of_other_units(environment, known, options.unnorm_key, student, options.env)
    key, config = resolve_unnorm_key(known, key), config_of(model_folder(student))
    check_dimensions(known[key]["action"], student, options.env, action_spec_of(environment))
    check_state(config.proprio_dim, student, options.env, environment.state_names)
    if not options.wrist and asks_for_wrist(options.env, config.camera_names):
        raise ValueError(
            f"student='{student}' sees {', '.join(config.camera_names)}: record the camera on the gripper as well "
            "(--wrist)."
        )
    has_other_rate(spec_of(known, key).hz, environment, student, options.env)


def _check_part(part: Path) -> None:
    """Raise a `FileExistsError` if the folder of an unfinished recording is none, but something of the user's."""
    if part.is_symlink() or (part.exists() and not part.is_dir()):
        raise FileExistsError(f"{part} is in the way, where a recording waits until it is complete: move it away.")
    if not part.is_dir() or (part / PLAN).is_file():
        return
    # The plan comes first and goes last: of episodes without one, nobody knows with which options they were recorded.
    if any(path.is_file() and path.name != f"{PLAN}.part" for path in part.rglob("*")):
        raise FileExistsError(
            f"{part}, where a recording waits until it is complete, holds files and no {PLAN}, which says what is "
            "recorded: move it away, or give another output."
        )


def _remove(part: Path, content: Mapping[str, Any]) -> None:
    """An unfinished recording of `content`, and nothing else that may be there. Its plan goes last."""
    try:
        ours = not part.is_symlink() and read_settings(part / PLAN)[0] == content
    except (OSError, ValueError):
        ours = False
    if ours:
        shutil.rmtree(part / COMPLETE, ignore_errors=True)
        for file in (*part.glob("episodes/*.npz"), *part.glob("episodes/*.part")):
            file.unlink()
    with contextlib.suppress(OSError):  # one that is not empty, or is not there
        (part / "episodes").rmdir()
    if ours:
        (part / PLAN).unlink()
    with contextlib.suppress(OSError):
        part.rmdir()


def published(options: RecordOptions) -> dict[str, Any]:
    """The options that decide what is recorded, as they are written down: a student is known by its name and the
    digests of what decides its actions, not by a path."""
    content = options.content()
    if options.student is not None:
        folder = model_folder(options.student)
        content["student"] = published_name(options.student)
        content |= {f"student_{kind}": digest for kind, digest in file_digests(folder).items()}
    return content


def _check_same(content: dict[str, Any], found: Any, folder: Path) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{folder} says options={found!r:.100}, which no recording writes: give another output.")
    if isinstance(found.get("student"), str) and "student_weights" not in found:  # paths were written down
        found = {**found, "student": published_name(found["student"])}
    if "student_config" not in found:  # older versions wrote down no more of a student than its weights
        found = {**{name: value for name, value in content.items() if name.startswith("student_")}, **found}
    found = {**decisive(RecordOptions), **found}  # what older versions did not know was as it is by default
    names = dict.fromkeys([*content, *(name for name in found if name.startswith("student_"))])
    other = {name: content.get(name) for name in names if found.get(name) != content.get(name)}
    if other:
        raise ValueError(
            f"{folder} was recorded with other options: "
            + ", ".join(f"{name} {found.get(name)!r}, not {value!r}" for name, value in other.items())
            + ". Give those, or another output"
            + _more(found, other)
        )


def _more(found: dict[str, Any], other: dict[str, Any]) -> str:
    """How a complete recording gets more episodes, where nothing else is asked for: its own are not kept one by one."""
    known = found["episodes"]
    if other.keys() != {"episodes"} or not isinstance(known, int) or other["episodes"] <= known:
        return "."
    return (
        f": for more episodes record the others there (--seed {found['seed'] + found['episodes']} --episodes "
        f"{other['episodes'] - found['episodes']}), and train on a mixture of both."
    )


def _check_alike(shown: Mapping[str, Mapping[str, Any]], env: str) -> None:
    """Raise a `ValueError` where tasks show images of other sizes, or of other cameras: LeRobot has one form for all,
    and else it is said when all episodes are recorded."""
    (first, expected), *others = list(shown.items())
    for task, found in others:
        if found != expected:
            raise ValueError(
                f"'{env}' shows {dict(found)} in '{task}' and {dict(expected)} in '{first}', and in a LeRobot data set "
                "all episodes have one form: record them into folders of their own, or give --format hdf5."
            )


def _run(
    make: Callable[[], Any],
    jobs: Sequence[tuple[tuple[str, str, int], Path]],
    workers: int,
    done: Callable[[tuple[str, str, int], Path], Any],
) -> None:
    """Record all jobs, in this process or in others; the first failure ends it."""
    if workers == 1 or len(jobs) < 2:
        own = make()
        for episode, file in jobs:
            own.record(*episode, file)
            done(episode, file)
        own.close()
        return
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    failures: list[BaseException] = []
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        process = EnvironmentProcess(make, timeout=SLOWEST_EPISODE)
        try:
            while not failures:
                episode, file = waiting.get_nowait()
                process.ask("record", *episode, file)
                process.answer()
                done(episode, file)
        except queue.Empty:
            pass
        except BaseException as failure:  # raised again by the thread that waits
            failures.append(failure)
        finally:
            process.stop()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt as interrupt:
        failures.insert(0, interrupt)  # before what it did to the workers
        for thread in threads:
            thread.join()
    if failures and isinstance(failures[0], EnvironmentFailure):
        raise RecordingBroke(str(failures[0])) from failures[0]
    if failures:
        raise failures[0]


def _summary(files: dict[tuple[str, str, int], Path], task: str) -> dict[str, Any]:
    def read() -> Iterator[tuple[int, int]]:
        for (name, *_), file in files.items():
            if name == task:
                with np.load(file) as arrays:
                    yield int(arrays["failed"]), len(arrays["actions"])

    found = list(read())
    return {
        "episodes": len(found),
        "failed_attempts": sum(failed for failed, _ in found),
        "steps": round(float(np.mean([steps for _, steps in found])), 1),
    }
