"""What weights of fewer bits cost and save: memory, time by stage, actions, success.

    openvla record --tasks mt10 --episodes 1 --seed 300 --output outputs/frames
    python studies/quantization.py docs/results/quantization --frames-of outputs/frames
    python studies/closed_loop.py OUT --studies quantization --runs RUNS     # first, for the columns of the closed loop
    python studies/quantization.py docs/results/quantization --only --closed-loop RUNS

- actions: the embedded policy on frames of the scripted experts; tokens and actions against its own in float32.
- memory: each precision in a process of its own, of a model with random weights whose size matters ("mid", 0.25 B).
- time: all precisions in one process, interleaved, the least of all rounds; wall clock and CPU time of the thread,
  which a loaded machine stretches less.

Writes report.md, report.json and report.png to OUT. `--only` and `--precisions` measure a part again; the others are
kept.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from closed_loop import PRECISIONS, quantization_rows, success, table
from matplotlib.figure import Figure

from openvla import OpenVLAForActionPrediction
from openvla.bench.mid import mid_model
from openvla.bench.startup import memory
from openvla.data.samples import main_camera
from openvla.data.sources import open_sources
from openvla.folders import write_json
from openvla.int8_linear_openvla import largest_activation
from openvla.options.prediction import EMBEDDED_POLICY
from openvla.policy import load_model
from openvla.quantization_openvla import OpenVLAQuantizationConfig


Precisions = dict[str, dict[str, Any]]  # name -> options of `load_model`
PARTS = ("actions", "memory", "time")
STAGES = ("towers", "projector", "prefill", "decode")


def mid_inputs(model: Any) -> dict[str, torch.Tensor]:
    """20 prompt tokens and an image, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30000, (1, 20), generator=generator)
    ids[:, 0] = model.config.text_config.bos_token_id
    pixels = torch.randn(1, 3 * len(model.config.timm_model_ids), 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}


# Actions ----------------------------------------------------------------------------------------------------------


def measure_actions(model: str, precisions: Precisions, dataset: str, count: int) -> dict[str, dict[str, float]]:
    """Of each precision: what it shares with float32 on frames of demonstrations, and how far both are from these."""
    plain = load_model(model, dtype="float32")
    key = next(iter(plain.norm_stats))
    stats = plain.norm_stats[key]["action"]
    (source,) = open_sources(dataset, statistics={"action": stats})
    parts = [part for part in (source.dataset, source.held_out) if part is not None]
    frames = [frame for part in parts for episode in part for frame in source.frames(episode)]
    frames = [frames[index] for index in np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]
    # What the demonstration did is in the normalized form of training.
    low, high, mask = (np.asarray(stats[name]) for name in ("q01", "q99", "mask"))
    wanted = np.stack([frame.actions[0] for frame in frames])
    wanted = np.where(mask, (wanted + 1) / 2 * (high - low) + low, wanted)
    found: dict[str, Any] = {}
    for name, precision in {"float32": PRECISIONS["float32"], **precisions}.items():
        policy = load_model(model, **precision)
        predictions = [
            policy.predict_action(
                frame.images[main_camera(frame)][0], frame.instruction, unnorm_key=key, return_dict=True
            )
            for frame in frames
        ]
        found[name] = (
            np.stack([np.asarray(each.actions) for each in predictions]),
            np.stack([np.asarray(each.token_ids) for each in predictions]),
        )
        print(f"actions, {name}: {len(frames)} frames", flush=True)
    actions, tokens = found["float32"]
    return {
        name: {
            "frames": len(frames),
            "identical_actions": float((theirs == tokens).all(1).mean()),
            "identical_tokens": float((theirs == tokens).mean()),
            "l1_to_float32": float(np.abs(numbers - actions).mean()),
            "l1_to_demonstrations": float(np.abs(numbers - wanted).mean()),
        }
        for name, (numbers, theirs) in found.items()
    }


# Memory -----------------------------------------------------------------------------------------------------------


def report_memory(folder: str, precision: dict[str, Any]) -> None:
    """In a process of its own: print what a model takes while it is loaded, and after predictions."""
    before = memory(torch)["memory_mb"]
    model = load_model(folder, **precision)
    loaded = memory(torch)["peak_mb"] - before
    inputs = mid_inputs(model)
    model.predict_action(**inputs, unnorm_key="bridge_orig")
    now = memory(torch)
    figures = {"peak_while_loading": loaded, "after_prediction": now["memory_mb"] - before}
    figures["peak"] = now["peak_mb"] - before
    print(json.dumps({**figures, "weights": model.get_memory_footprint() / 1e6}))


def measure_memory(folder: Path, precisions: Precisions, work: Path) -> dict[str, dict[str, float]]:
    """Of each precision, rounded while it is loaded; ours from folders of `openvla quantize` as well."""
    cases: dict[str, tuple[Path, dict[str, Any]]] = {name: (folder, options) for name, options in precisions.items()}
    for bits in (8, 4):
        if f"int{bits}" not in precisions:
            continue
        stored = OpenVLAForActionPrediction.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=OpenVLAQuantizationConfig(bits)
        )
        stored.save_pretrained(work / f"int{bits}")
        del stored
        cases[f"int{bits}, folder, bfloat16"] = (work / f"int{bits}", {"dtype": "bfloat16"})
    found = {}
    for name, (place, options) in cases.items():
        command = [sys.executable, __file__, "-", "--memory-of", str(place), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        found[name]["files"] = sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e6
        print(f"memory, {name}: {found[name]}", flush=True)
    return found


# Time -------------------------------------------------------------------------------------------------------------


def timed(model: Any, clock: Callable[[], float], predict: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds by stage of one prediction. A pass of the language model begins where its first layer does."""
    begun: dict[str, float] = {}
    spent: dict[str, float] = {}
    passes: list[float] = []
    first = model.get_decoder().layers[0].self_attn.q_proj
    parts = {"towers": model.vision_backbone, "projector": model.projector}
    handles = [first.register_forward_pre_hook(lambda *_: passes.append(clock()))]
    for name, part in parts.items():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: begun.update({name: clock()})))
        handles.append(part.register_forward_hook(lambda *_, name=name: spent.update({name: clock() - begun[name]})))
    start = clock()
    try:
        predict()
    finally:
        for handle in handles:
            handle.remove()
    end = clock()
    spent |= {"prefill": (passes + [end])[1] - passes[0], "decode": end - (passes + [end])[1], "total": end - start}
    return {name: 1000 * seconds for name, seconds in spent.items()}


def measure_time(models: dict[str, Any], predict: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """The least milliseconds of all rounds, by stage: of the wall clock, and of the CPU time of this thread."""
    clocks = {"ms": time.perf_counter, "cpu_ms": time.thread_time}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            for kind, clock in clocks.items():
                now = timed(model, clock, predict[name])
                if number:  # the first packs weights
                    before = found[name].setdefault(kind, now)
                    found[name][kind] = {stage: min(before[stage], now[stage]) for stage in now}
        print(f"time, round {number}", flush=True)
    return found


def time_embedded(model: str, precisions: Precisions, rounds: int) -> dict[str, Any]:
    models = {name: load_model(model, **precision) for name, precision in precisions.items()}
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    first = next(iter(models.values()))
    processor = first.processor
    inputs = processor(processor.format_prompt("open the drawer"), picture)
    key = next(iter(first.norm_stats))
    predict = {name: partial(each.predict_action, **inputs, unnorm_key=key) for name, each in models.items()}
    return measure_time(models, predict, rounds)


def time_mid(folder: Path, precisions: Precisions, rounds: int) -> dict[str, Any]:
    models = {name: load_model(str(folder), **precision) for name, precision in precisions.items()}
    predict = {}
    for name, model in models.items():
        predict[name] = partial(model.predict_action, **mid_inputs(model), unnorm_key="bridge_orig")
    return measure_time(models, predict, rounds)


# Report -----------------------------------------------------------------------------------------------------------


def report_text(found: dict[str, Any], closed: list[dict[str, Any]]) -> str:
    """All tables."""
    about = found["about"]
    lines = [
        "# Fewer bits",
        f"`{about['command']}`\n\n{about['machine']}, one thread, torch {about['torch']}, {about['date']}. int8 and "
        "int4 are ours (with float32 between the layers), bnb-int8 and bnb-nf4 those of bitsandbytes (with bfloat16). "
        f"Activations of int8 layers: up to {about['largest_activation']} in size"
        + (", as this CPU has no VNNI." if about["largest_activation"] == 63 else "."),
    ]
    if "actions" in found:
        rows = [
            [
                name,
                f"{row['identical_actions']:.0%}",
                f"{row['identical_tokens']:.1%}",
                f"{row['l1_to_float32']:.4f}",
                f"{row['l1_to_demonstrations']:.4f}",
            ]
            for name, row in found["actions"].items()
        ]
        frames = next(iter(found["actions"].values()))["frames"]
        header = ["precision", "identical actions", "identical tokens", "L1 to float32", "L1 to the demonstrations"]
        lines += [
            f"## Actions\n\nThe embedded policy on {frames} frames of the scripted experts of MT10, whose answers "
            "are the demonstrations; mean L1 in the units of the dataset, over all dimensions.",
            table(header, rows),
        ]
    if closed:
        rows = [[row["precision"], success(row["blocking"]), success(row["realtime"])] for row in closed]
        episodes = {row["blocking"]["episodes"] for row in closed}
        lines += [
            f"## Closed loop\n\nThe embedded policy on MT10, {'/'.join(map(str, sorted(episodes)))} episodes in all, "
            "95% intervals (Wilson). Real time: with the latency of one prediction. Empty: not run.",
            table(["precision", "blocking", "real time"], rows),
        ]
    for kind, title in (
        ("embedded", "the embedded policy (7.8 M parameters)"),
        ("mid", "mid (0.25 B, random weights)"),
    ):
        if times := found.get(f"time, {kind}"):
            rows = [
                [name, *(f"{row['ms'][stage]:.1f} ({row['cpu_ms'][stage]:.1f})" for stage in (*STAGES, "total"))]
                for name, row in times.items()
            ]
            lines += [
                f"## Time, {title}\n\nMilliseconds, least of {about['rounds']} interleaved rounds: wall clock (CPU "
                "time).",
                table(["precision", *STAGES, "total"], rows),
            ]
    if "memory" in found:
        names = ("weights", "peak_while_loading", "after_prediction", "peak", "files")
        rows = [[name, *(f"{row[part]:.0f}" for part in names)] for name, row in found["memory"].items()]
        header = ["precision", "weights", "peak while loading", "after a prediction", "peak", "files read"]
        lines += [
            "## Memory, mid\n\nMegabytes beyond those of the process before the model was loaded, each in a fresh "
            "process. Pages of mapped files count while they are read.",
            table(header, rows),
        ]
    return "\n\n".join([*lines, "![fewer bits](report.png)"]) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    times = {name: found[f"time, {name}"] for name in ("embedded", "mid") if f"time, {name}" in found}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (kind, rows) in zip(np.atleast_1d(figure.subplots(1, max(1, len(times)))), times.items()):
        left = np.zeros(len(rows))
        for stage in STAGES:
            widths = np.array([row["cpu_ms"][stage] for row in rows.values()])
            axes.barh(list(rows), widths, left=left, label=stage)
            left += widths
        axes.invert_yaxis()
        axes.set(xlabel="ms of CPU time", title=kind)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the report")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, help="parts to measure; default: all")
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS), help="default: all"
    )
    parser.add_argument("--model", default=EMBEDDED_POLICY, help="default: the policy of the repository")
    parser.add_argument("--frames-of", help="demonstrations of the model's tasks, as `openvla finetune` takes them")
    parser.add_argument("--frames", type=int, default=200, help="of demonstrations; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, help="of each time; default: %(default)s")
    parser.add_argument("--closed-loop", type=Path, help="runs of `closed_loop.py --studies quantization`")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        report_memory(arguments.memory_of[0], json.loads(arguments.memory_of[1]))
        return

    if "actions" in arguments.only and not arguments.frames_of:
        parser.error("actions wants --frames-of, demonstrations of the model's tasks")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "report.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    precisions = {name: PRECISIONS[name] for name in arguments.precisions}
    found["about"] = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})",
        "torch": torch.__version__.partition("+")[0],
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
        "largest_activation": largest_activation(),
    }
    with tempfile.TemporaryDirectory() as work:
        mid = mid_model(Path(work) / "mid") if {"memory", "time"} & set(arguments.only) else Path()
        measured: dict[str, Callable[[], Any]] = {}
        if "actions" in arguments.only:
            measured["actions"] = partial(
                measure_actions, arguments.model, precisions, arguments.frames_of, arguments.frames
            )
        if "time" in arguments.only:
            measured["time, embedded"] = partial(time_embedded, arguments.model, precisions, arguments.rounds)
            measured["time, mid"] = partial(time_mid, mid, precisions, arguments.rounds)
        if "memory" in arguments.only:
            measured["memory"] = partial(measure_memory, mid, precisions, Path(work))
        for name, measure in measured.items():
            found[name] = found.get(name, {}) | measure()
            write_json(file, found)
    if arguments.closed_loop:
        found["closed_loop"] = quantization_rows(arguments.closed_loop)
    write_json(file, json.loads(json.dumps(found, default=str)))
    plot(found, arguments.out / "report.png")
    (arguments.out / "report.md").write_text(report_text(found, found.get("closed_loop", [])), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
