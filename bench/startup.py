"""From the start of a program to its first action, and the memory that it takes: in a process of their own."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..options.benchmark import BenchOptions


PREDICTIONS = 5
MARK = "openvla-bench "  # before the figures, among what libraries print
PROGRAM = (
    "import sys, time; begun = time.time(); from openvla.bench.startup import measure; measure(sys.argv[1], begun)"
)


def startup(options: BenchOptions) -> dict[str, Any]:
    """Load a model and predict in a new process.

    Returns:
        Seconds of imports, of loading, and of the first and a later action; memory in MB after each, and the largest so
        far: of the process (pages of a mapped file of weights are in it, and not in `without_files_mb`), on a GPU of
        torch's allocator as well.

    Raises:
        ValueError: If the process fails; its own words are in the error stream.
    """
    settings = json.dumps(asdict(options), default=str)
    done = subprocess.run([sys.executable, "-c", PROGRAM, settings], stdout=subprocess.PIPE, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if done.returncode or line is None:
        raise ValueError(f"The process that was measured ended with {done.returncode}, see above.")
    report = json.loads(line.removeprefix(MARK))
    return report


def measure(settings: str, begun: float) -> None:
    """What the process does; prints its figures."""
    import torch

    from .clock import described
    from .subject import PresetInputs, frames_of, open_subject
    from .throughput import predict_batch

    options = BenchOptions(**{**json.loads(settings), "output": None, "onnx": None})
    stages: dict[str, dict[str, float]] = {}

    def note(name: str, seconds: float) -> None:
        stages[name] = {"seconds": seconds, **memory(torch)}

    note("imports", time.time() - begun)
    started = time.perf_counter()
    model, key = open_subject(options)
    note("loading", time.perf_counter() - started)
    preset = PresetInputs(options.preset, model) if options.preset else None
    for number, frame in enumerate(frames_of(options, model, key, 1 + PREDICTIONS)):
        started = time.perf_counter()
        predict_batch(model, key, [frame], preset)
        note("first action" if number == 0 else "later action", time.perf_counter() - started)
    print(MARK + json.dumps({**described(options, model), "stages": stages}), flush=True)


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
    return "\n".join(lines)
