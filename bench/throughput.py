"""Actions a second by how many samples are predicted at once."""

import time
from typing import Any

from tqdm import tqdm

from ..device import synchronize
from ..options.benchmark import BenchOptions
from .clock import QUANTILES, WARM_UP, described, headline, quantiles
from .subject import Frame, PresetInputs, frames_of, numbers, open_subject, prepare


def throughput(options: BenchOptions) -> dict[str, Any]:
    """Predict batches of different frames, all sizes in turns, from raw images to actions.

    Returns:
        For each size quantiles of a batch, and by its median the share of one sample, and actions a second (each step
        of a chunk is one).
    """
    sizes = numbers("batch_sizes", options.batch_sizes)
    model, key = open_subject(options)
    frames = frames_of(options, model, key, max(sizes))
    if len(frames) < max(sizes):
        raise ValueError(
            f"'{options.dataset}' holds {len(frames)} frame(s), fewer than the largest of batch_sizes='"
            f"{options.batch_sizes}': give smaller ones, or a dataset of more."
        )
    rounds = -(-options.frames // max(sizes)) + WARM_UP
    preset = PresetInputs(options.preset, model) if options.preset else None
    prepared = prepare(options, model, key, frames, sizes)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for number in tqdm(range(rounds), unit="round", disable=None):
        for size in sizes:
            batch = [frames[(number + place) % len(frames)] for place in range(size)]
            synchronize(model.device)
            started = time.perf_counter()
            predict_batch(model, key, batch, preset)
            synchronize(model.device)
            if number >= WARM_UP:
                times[size].append(1000 * (time.perf_counter() - started))
    report = {
        **described(options, model),
        **prepared,
        "rounds": rounds - WARM_UP,
        "batches": {
            str(size): {
                **quantiles(found),
                "ms_per_sample": quantiles(found)["p50_ms"] / size,
                "actions_per_second": 1000 * size * model.action_chunk / quantiles(found)["p50_ms"],
            }
            for size, found in times.items()
        },
    }
    return report


def predict_batch(model: Any, key: str, frames: list[Frame], preset: PresetInputs | None) -> Any:
    more: dict[str, Any] = {} if frames[0].state is None else {"state": [frame.state for frame in frames]}
    if preset is None:
        more |= {"image": [frame.images for frame in frames]}
        more |= {"instruction": [frame.instruction for frame in frames]}
    else:
        more |= preset(frames)
    return model.predict_action(**more, unnorm_key=key)


def table(report: dict[str, Any]) -> str:
    rounds = f"{headline(report)}, {report['rounds']} round(s)"  # of so many are the quantiles
    lines = [rounds, "batch    min ms      p50      p90      p99   ms/sample  actions/s"]
    for size, row in report["batches"].items():
        times = " ".join(f"{row[part]:8.2f}" for part in QUANTILES)
        lines.append(f"{size:>5}  {times} {row['ms_per_sample']:11.2f} {row['actions_per_second']:10.1f}")
    return "\n".join(lines)
