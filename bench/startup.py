"""What loading takes, from the start of a program to its first action, and whether memory stays flat while it predicts:
in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..options.benchmark import BenchOptions


PREDICTIONS = 5  # after the first one, of `load`
PARTS = (0.01, 0.1, 0.25, 0.5, 1.0)  # of the predictions of `memory`, after which memory is looked at
DISTINCT = 8  # frames of `memory`, again and again: hundreds of them would be memory themselves
MARK = "openvla-bench "  # before the figures, among what libraries print
REFUSED = "refused"  # in place of the figures: what is wrong with the model or the options
PROGRAM = """
import importlib, sys, time
begun = time.time()
for name in sys.argv[2:]:
    importlib.import_module(name)
from openvla.bench.startup import measure
measure(sys.argv[1], begun)
"""


def startup(options: BenchOptions) -> dict[str, Any]:
    """Load a model and predict in a new process.

    Returns:
        load: Seconds of imports, of loading, and of the first and a later action. memory: Seconds of loading and of so
        many of the predictions, and what memory grew by after the first tenth of them (`growth_mb`). Both: memory in MB
        after each, and the largest so far: of the process (pages of a mapped file of weights are in it, and not in
        `without_files_mb`), on a GPU of torch's allocator as well.

    Raises:
        ValueError: If the process fails; its own words are in the error stream.
    """
    from ..action_heads_openvla import HEADS

    settings, ours = json.dumps(asdict(options), default=str), f"{__package__.partition('.')[0]}."
    others = {kind.__module__ for kind in HEADS.values() if not kind.__module__.startswith(ours)}  # openvla --import
    arguments = [sys.executable, "-c", PROGRAM, settings, *sorted(others)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if done.returncode or line is None:
        raise ValueError(f"The process that was measured ended with {done.returncode}, see above.")
    report = json.loads(line.removeprefix(MARK))
    if REFUSED in report:
        raise ValueError(report[REFUSED])
    return report


def measure(settings: str, begun: float) -> None:
    """What the process does; prints its figures, or what a user has to change."""
    try:
        report = _measure(settings, begun)
    except KeyError as error:
        report = {REFUSED: str(error.args[0])}
    except (ValueError, OSError) as error:
        report = {REFUSED: str(error)}
    print(MARK + json.dumps(report), flush=True)


def _measure(settings: str, begun: float) -> dict[str, Any]:
    import torch

    from .clock import described
    from .subject import PresetInputs, frames_of, open_subject
    from .throughput import predict_batch

    options = BenchOptions(**{**json.loads(settings), "output": None})
    stages: dict[str, dict[str, float]] = {}

    def note(name: str, seconds: float) -> None:
        stages[name] = {"seconds": seconds, **memory(torch)}

    note("imports", time.time() - begun)
    started = time.perf_counter()
    model, key = open_subject(options)
    note("loading", time.perf_counter() - started)
    preset = PresetInputs(options.preset, model) if options.preset else None
    count = options.frames if options.what == "memory" else 1 + PREDICTIONS
    frames = frames_of(options, model, key, min(count, DISTINCT))

    def predict(number: int) -> None:
        predict_batch(model, key, [frames[number % len(frames)]], preset)

    if options.what == "memory":
        many(predict, count, note)
        report = {"predictions": count, **growth(stages, count)}
    else:
        first_and_later(predict, count, note)
        report = {}
    return {**described(options, model), **report, "stages": stages}


Note = Callable[[str, float], None]


def first_and_later(predict: Callable[[int], None], count: int, note: Note) -> None:
    for number in range(count):
        started = time.perf_counter()
        predict(number)
        note("later action" if number else "first action", time.perf_counter() - started)


def many(predict: Callable[[int], None], count: int, note: Note) -> None:
    looks, started = {max(1, round(part * count)) for part in PARTS}, time.perf_counter()
    for number in range(count):
        predict(number)
        if number + 1 in looks:
            note(f"{number + 1} actions", time.perf_counter() - started)


def growth(stages: dict[str, dict[str, float]], count: int) -> dict[str, float]:
    """MB that came after the first tenth of the predictions; nothing of a single one, or where the system does not
    tell."""
    first, last = (stages[f"{max(1, round(part * count))} actions"] for part in (0.1, 1.0))
    name = "without_files_mb"
    return {"growth_mb": round(last[name] - first[name], 1)} if count > 1 and name in last else {}


def memory(torch: Any) -> dict[str, float]:
    """MB of this process now, and at most so far."""
    found: dict[str, float] = {}
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found = {"memory_mb": _mb(fields["VmRSS"]), "peak_mb": _mb(fields["VmHWM"])}
        found["without_files_mb"] = _mb(fields["RssAnon"])
    if torch.cuda.is_initialized():
        found["gpu_mb"] = torch.cuda.memory_allocated() / 1e6
        found["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return {name: round(value, 1) for name, value in found.items()}


def _mb(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) * 1024 / 1e6


def table(report: dict[str, Any]) -> str:
    from .clock import headline

    names = [name for name in report["stages"]["loading"] if name != "seconds"]
    lines = [headline(report), " ".join([f"{'':<14}  seconds", *(f"{name.replace('_', ' '):>17}" for name in names)])]
    for stage, row in report["stages"].items():
        values = (f"{row[name]:17.1f}" if name in row else " " * 17 for name in names)
        lines.append(" ".join([f"{stage:<14} {row['seconds']:8.3f}", *values]))
    if "growth_mb" in report:
        lines.append(f"{report['growth_mb']} MB more after the first tenth of {report['predictions']} predictions")
    return "\n".join(lines)
