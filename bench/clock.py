"""Milliseconds: of a prediction, and of its stages."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..device import synchronize
from ..options.benchmark import BenchOptions
from ..policy import quantization_of
from ..stages_openvla import watch_stages


QUANTILES = {"min_ms": 0, "p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
WARM_UP = 3  # predictions that are not counted


def quantiles(milliseconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(milliseconds, part)) for name, part in QUANTILES.items()}


@contextmanager
def staged(device: torch.device, found: dict[str, float]) -> Iterator[None]:
    """Add the milliseconds of every stage to `found`; the device is waited for at the borders."""

    @contextmanager
    def watcher(name: str) -> Iterator[None]:
        synchronize(device)
        started = time.perf_counter()
        yield
        synchronize(device)
        found[name] = found.get(name, 0.0) + 1000 * (time.perf_counter() - started)

    with watch_stages(watcher):
        yield


@contextmanager
def timed(device: torch.device, found: dict[str, float], name: str = "total") -> Iterator[None]:
    synchronize(device)
    started = time.perf_counter()
    yield
    synchronize(device)
    found[name] = 1000 * (time.perf_counter() - started)


def described(options: BenchOptions, model: Any) -> dict[str, Any]:
    """What every report says first."""
    device = model.device
    return {
        "model": options.preset or Path(options.model).resolve().name,
        "weights": "random" if options.preset else "loaded",
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization_of(model),  # a folder may be stored so
        "attention": model.language_model.config._attn_implementation,
        "action_head": model.config.action_head,
        "action_chunk": model.action_chunk,
        "cameras": list(model.camera_names),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers)},
    }


def headline(report: dict[str, Any]) -> str:
    frames = f"{report['frames']} frames, " if "frames" in report else ""
    kind = ", ".join(part for part in (report["quantization"], report["dtype"]) if part)
    return f"{report['model']}: {frames}{kind} on {report['device']}, {report['threads']} thread(s)"
