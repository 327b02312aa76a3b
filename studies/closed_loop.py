"""A policy in closed loop: how late its actions may come, what quantization costs, what it has to be better than.

    python studies/closed_loop.py docs/results/closed_loop --tasks mt10 --episodes 20
    python studies/closed_loop.py docs/results/closed_loop --other "Diffusion Policy=runs/diffusion_policy"

Three studies, each of evaluations as `openvla evaluate` runs them:

- latency: success against the seconds from an observation to its action, with the world going on (real time) at its own
  rate; blocking for reference, where success stays and episodes take longer instead.
- quantization: float32, bfloat16, int8 and int4, int8 and nf4 of bitsandbytes; blocking, in real time with the latency
  measured here, and of those of the paper in real time at the rates of its section 5.4; beside its table 2. More of it:
  `quantization.py`.
- policies: the model, the scripted expert, random and mean actions, and other evaluations (folders with an
  episodes.jsonl).

Writes report.md, report.json and a picture for each study to OUT. Evaluations are kept in --runs: the same command goes
on where a stopped one was, and repeats nothing that is there. Each study can be run by itself; the report shows those
whose runs are there.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from openvla.evaluation import make_environment
from openvla.evaluation.begun import SETTINGS
from openvla.evaluation.control import effective_delays
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.latency import single_latency
from openvla.evaluation.report import EpisodeResult, read_results, summarize
from openvla.options.prediction import EMBEDDED_POLICY
from openvla.policy import OpenVLAPolicy


STUDIES = ("latency", "quantization", "policies")
# Name -> how the weights are loaded. As in the paper, what bitsandbytes leaves alone is bfloat16; ours is
# meant for CPUs, whose fast type is float32.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int4": {"dtype": "float32", "quantization": "int4"},
    "bnb-int8": {"dtype": "bfloat16", "quantization": "bnb-int8"},
    "bnb-nf4": {"dtype": "bfloat16", "quantization": "bnb-nf4"},
}
# arXiv 2406.09246, section 5.4 and table 2, eight BridgeData V2 tasks: success % with its standard error and GB in
# real-time control at 5 Hz; predictions in a second on an A5000; success % in blocking control (appendix).
PAPER: dict[str, dict[str, Any]] = {
    "bfloat16": {"success": 71.3, "error": 4.8, "memory": 16.8, "rate": None, "blocking": 70.0},
    "bnb-int8": {"success": 58.1, "error": 5.1, "memory": 10.2, "rate": 1.2, "blocking": 74.4},
    "bnb-nf4": {"success": 71.9, "error": 4.7, "memory": 7.0, "rate": 3.0, "blocking": 68.8},
}
PAPER_HZ = 5.0
MEASURED = "precisions.json"  # latency and size of each precision, in the folder of the runs
ROUNDS = 5  # in which latency is measured
STEADY = 200  # steps, of which the second half tells how old observations are in the long run
REALTIME, BLOCKING, REFERENCE = "tab:blue", "tab:gray", "tab:orange"


# Running ----------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, name: str, **options: Any) -> list[EpisodeResult]:
    """Records of one evaluation, kept in the folder `name` of the runs."""
    folder = arguments.runs / name
    common = {
        "tasks": arguments.tasks,
        "env": arguments.env,
        "episodes": arguments.episodes,
        "videos": arguments.videos,
    }
    common |= {"max_steps": arguments.max_steps, "unnorm_key": arguments.unnorm_key, "workers": arguments.workers}
    common |= {"device": arguments.device} | ({"camera": arguments.camera} if arguments.camera else {})
    if options.get("policy", "model") != "model" and not arguments.videos:
        common["render"] = False  # nobody looks
    print(f"{name}:", flush=True)
    evaluate(model=arguments.model, output=folder, **{**common, **options})
    return read_results(folder / "episodes.jsonl")


def run_latency(arguments: argparse.Namespace) -> None:
    run(arguments, "blocking", policy=arguments.policy)
    for latency in arguments.latencies:
        options = {"control": "realtime", "hz": arguments.hz, "latency": latency}
        run(arguments, f"latency_{latency:g}", policy=arguments.policy, **options)


def run_quantization(arguments: argparse.Namespace) -> None:
    measured = measure(arguments)
    for name, precision in PRECISIONS.items():
        run(arguments, f"{name}_blocking", **precision)
        late = {"control": "realtime", "hz": arguments.hz, "latency": measured[name]["latency"]}
        run(arguments, f"{name}_realtime", **precision, **late)
        rate = PAPER.get(name, {}).get("rate")
        if rate is not None:
            late = {"control": "realtime", "hz": PAPER_HZ, "latency": 1 / rate}
            run(arguments, f"{name}_paper", **precision, **late)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each precision the seconds of one prediction and the megabytes of its weights, kept in the runs.

    The median of rounds over all precisions, so that what else a machine does meets them alike.
    """
    file = arguments.runs / MEASURED
    if not file.exists():
        latencies: dict[str, list[float]] = {name: [] for name in PRECISIONS}
        megabytes = {}
        for name in [name for _ in range(ROUNDS) for name in PRECISIONS]:
            loading = {"device": arguments.device, "unnorm_key": arguments.unnorm_key, **PRECISIONS[name]}
            policy = OpenVLAPolicy.load(arguments.model, **loading)
            latencies[name].append(single_latency(policy, "pick up the puck and place it at the goal", 224))
            megabytes[name] = policy.model.get_memory_footprint() / 1e6
        found = {
            name: {
                "latency": round(float(np.median(times)), 4),
                "fastest": round(min(times), 4),
                "slowest": round(max(times), 4),
                "megabytes": round(megabytes[name], 2),
            }
            for name, times in latencies.items()
        }
        arguments.runs.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def run_policies(arguments: argparse.Namespace) -> None:
    run(arguments, "blocking", policy=arguments.policy)
    for name in ("expert", "random", "mean"):
        run(arguments, name, policy=name)


# What came out ----------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any] | None:
    """Success over all episodes with its interval, steps and latency; None where nothing was run."""
    records = read_results(folder / "episodes.jsonl")
    records = [record for record in records if record.error is None and not record.variation]
    if not records:
        return None
    summary = summarize(records)
    file = folder / SETTINGS
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings.pop("model", None)  # where it was, on the machine it was run on
    return {
        **{name: value for name, value in summary["axes"][0].items() if name not in ("axis", "errors")},
        "mean_steps": float(np.mean([record.steps for record in records])),
        "mean_predictions": float(np.mean([record.predictions for record in records])),
        "by_task": {row["task"]: row["success"] for row in summary["rows"]},
        "settings": settings,
    }


def latency_rows(runs: Path, hz: float) -> list[dict[str, Any]]:
    """One for each latency that was run. `seconds`: of the world in real time; `blocking_seconds`: the same policy with
    a world that waits, its steps and the time of its predictions one after the other."""
    blocking = outcome(runs / "blocking")
    rows = []
    for folder in sorted(runs.glob("latency_*"), key=lambda folder: float(folder.name.partition("_")[2])):
        found = outcome(folder)
        if found is None:
            continue
        latency, hz = found["settings"]["latency"], found["settings"]["hz"]
        delays = [delay for delay in effective_delays(hz, latency, STEADY)[STEADY // 2 :] if delay is not None]
        row = {**found, "latency": latency, "hz": hz, "seconds": found["mean_steps"] / hz}
        row["delay"] = float(np.mean(delays)) if delays else None
        if blocking is not None:
            row["blocking_success"] = blocking["success"]
            row["blocking_seconds"] = blocking["mean_steps"] / hz + blocking["mean_predictions"] * latency
        rows.append(row)
    return rows


def quantization_rows(runs: Path) -> list[dict[str, Any]]:
    rows = []
    for name in PRECISIONS:
        modes = {mode: outcome(runs / f"{name}_{mode}") for mode in ("blocking", "realtime", "paper")}
        if modes["blocking"] is not None:
            file = runs / MEASURED
            measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            rows.append({"precision": name, **measured.get(name, {}), **modes, "published": PAPER.get(name)})
    return rows


def policy_rows(runs: Path, model: str, others: dict[str, Path]) -> list[dict[str, Any]]:
    folders = {model: runs / "blocking", **{name: runs / name for name in ("expert", "random", "mean")}, **others}
    found = {name: outcome(folder) for name, folder in folders.items()}
    for name, folder in others.items():
        if found[name] is None:
            raise FileNotFoundError(f"{folder} holds no episodes.jsonl with a complete episode: give an evaluation.")
    return [{"policy": name, **row} for name, row in found.items() if row is not None]


def differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What of the other policies was not run as the first one was."""
    first, notes = rows[0], []
    for row in rows[1:]:
        if set(row["by_task"]) != set(first["by_task"]):
            notes.append(f"{row['policy']} was run on other tasks: {', '.join(sorted(row['by_task']))}")
        for name in ("env", "max_steps", "control", "hz", "latency", "camera", "env_options"):
            mine, theirs = (one["settings"].get(name) for one in (first, row))
            if name == "env_options":  # pictures that nobody looks at change nothing
                mine, theirs = ({k: v for k, v in (one or {}).items() if k != "render"} for one in (mine, theirs))
            if row["settings"] and mine != theirs:
                notes.append(f"{row['policy']} was run with {name} {theirs}, not {mine}")
    return notes


# Tables -----------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def success(row: dict[str, Any] | None) -> str:
    """ "62% (48% to 75%)"."""
    return "" if row is None else f"{row['success']:.0%} ({row['low']:.0%} to {row['high']:.0%})"


def latency_text(rows: Sequence[dict[str, Any]], blocking: dict[str, Any] | None) -> str:
    lines = [
        [
            f"{row['latency']:g} s",
            "" if row["delay"] is None else f"{row['delay'] / row['hz']:.2f} s",
            success(row),
            "" if row["steps_of_successes"] is None else f"{row['steps_of_successes']:.0f}",
            f"{row['seconds']:.1f} s",
            success(blocking),
            f"{row['blocking_seconds']:.1f} s" if "blocking_seconds" in row else "",
        ]
        for row in rows
    ]
    header = ["latency", "age of what an action answers", "real time", "steps of successes", "an episode takes"]
    text = f"The world makes {rows[0]['hz']:g} steps in a second. " + (
        "In real time it continues while the model thinks, and the last action is held; the model looks again as soon "
        "as it is done, so that an action answers what was seen up to two latencies ago. Blocking, it waits: success "
        "does not depend on latency, but an episode takes the time of all predictions on top. Episode times are means "
        "over all episodes, failures with their full length."
    )
    return f"{text}\n\n{table([*header, 'blocking', 'an episode takes, blocking'], lines)}"


def quantization_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        paper = row["published"] or {}
        lines.append(
            [
                row["precision"],
                f"{row['megabytes']:.1f} MB",
                f"{row['latency'] * 1000:.0f} ms ({row['fastest'] * 1000:.0f} to {row['slowest'] * 1000:.0f})",
                success(row["blocking"]),
                success(row["realtime"]),
                success(row["paper"]),
                f"{paper['blocking']}%" if paper else "",
                f"{paper['success']}% ± {paper['error']}" if paper else "",
                f"{paper['memory']} GB" if paper else "",
            ]
        )
    header = ["precision", "weights", "one prediction", "blocking", "real time", "real time at the paper's rate"]
    return (
        f"Real time: with the latency of one prediction, measured here (median, fastest and slowest of {ROUNDS} "
        "rounds). At the paper's rate: 5 Hz control, 1.2 (bnb-int8) or 3 (bnb-nf4) predictions in a second, as on its "
        "A5000. Paper: the 7B model, eight BridgeData V2 tasks (arXiv 2406.09246, table 2), where int8 loses because "
        "it is slow, not because it is coarse.\n\n"
        + table([*header, "paper, blocking", "paper, real time", "paper, memory"], lines)
    )


def policies_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["policy"],
            success(row),
            f"{row['successes']} of {row['episodes']}",
            "" if row["steps_of_successes"] is None else f"{row['steps_of_successes']:.0f}",
        ]
        for row in rows
    ]
    tasks = sorted({task for row in rows for task in row["by_task"]})
    by_task = [
        [task, *(f"{row['by_task'][task]:.0%}" if task in row["by_task"] else "" for row in rows)] for task in tasks
    ]
    notes = "".join(f"\n- {note}" for note in differences(rows))
    return "\n\n".join(
        [
            table(["policy", "success", "episodes", "steps of successes"], lines),
            table(["task", *(row["policy"] for row in rows)], by_task),
            *([f"Not the same for all:\n{notes}"] if notes else []),
        ]
    )


# Pictures ---------------------------------------------------------------------------------------------------------


def spread(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Rates (N,), and how far their intervals go down and up from them (2, N)."""
    rates = np.array([row["success"] for row in rows])
    bounds = np.array([(row["low"], row["high"]) for row in rows])
    return rates, abs(bounds - rates[:, None]).T


def plot_latency(rows: Sequence[dict[str, Any]], blocking: dict[str, Any] | None, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    latencies = [row["latency"] for row in rows]
    rates, intervals = spread(rows)
    left.errorbar(latencies, rates, yerr=intervals, marker="o", capsize=3, color=REALTIME, label="real time")
    right.plot(latencies, [row["seconds"] for row in rows], marker="o", color=REALTIME, label="real time")
    if blocking is not None:
        left.axhline(blocking["success"], color=BLOCKING, linestyle="--", label="blocking")
        left.axhspan(blocking["low"], blocking["high"], color=BLOCKING, alpha=0.15, linewidth=0)
        waiting = [row["blocking_seconds"] for row in rows]
        right.plot(latencies, waiting, marker="s", linestyle="--", color=BLOCKING, label="blocking")
    left.set(xlabel="latency (s)", ylabel="success", ylim=(0, 1.02), title="success")
    right.set(xlabel="latency (s)", ylabel="seconds", title="an episode takes", ylim=(0, None))
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=100)


def plot_quantization(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True)
    modes = {"blocking": BLOCKING, "realtime": REALTIME, "paper": REFERENCE}
    labels = {"blocking": "blocking", "realtime": "real time", "paper": "real time, 5 Hz, the paper's rates"}
    for offset, (mode, color) in enumerate(modes.items()):
        there = [(index, row[mode]) for index, row in enumerate(rows) if row[mode] is not None]
        if there:
            rates, intervals = spread([row for _, row in there])
            beside = [index + 0.27 * (offset - 1) for index, _ in there]
            ours.bar(beside, rates, 0.25, yerr=intervals, color=color, ecolor="dimgray", capsize=2, label=labels[mode])
    ours.set_xticks(range(len(rows)), [f"{row['precision']}\n{row['latency'] * 1000:.0f} ms" for row in rows])
    ours.set(ylim=(0, 1.02), ylabel="success", title="this policy, in simulation")
    names, published = list(PAPER), list(PAPER.values())
    places = np.arange(len(names))
    theirs.bar(places - 0.14, [row["blocking"] / 100 for row in published], 0.25, color=BLOCKING)
    late, errors = ([row[field] / 100 for row in published] for field in ("success", "error"))
    theirs.bar(places + 0.14, late, 0.25, yerr=errors, color=REALTIME, ecolor="dimgray", capsize=2)
    theirs.set_xticks(places, names)
    theirs.set_title("the paper's 7B, on a robot (± standard error)")
    figure.legend(*ours.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def plot_policies(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    rates, intervals = spread(rows)
    names = [row["policy"] for row in rows]
    axes.barh(names, rates, xerr=intervals, color=REALTIME, ecolor="dimgray", capsize=3, height=0.6)
    for place, row in enumerate(rows):  # each task a dot, so that a mean of easy and hard ones shows as such
        values = sorted(row["by_task"].values())
        axes.scatter(values, place + np.linspace(-0.2, 0.2, len(values)), s=12, color="black", alpha=0.5, zorder=3)
    axes.set(xlim=(-0.01, 1.02), xlabel="success (dots: tasks)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=100)


# ------------------------------------------------------------------------------------------------------------------


def write(arguments: argparse.Namespace) -> str:
    """Tables and pictures of all that is in the runs; the text of the report."""
    out, runs = arguments.out, arguments.runs
    out.mkdir(parents=True, exist_ok=True)
    blocking = outcome(runs / "blocking")
    others = {name: Path(folder) for name, _, folder in (other.partition("=") for other in arguments.other)}
    name = arguments.name if arguments.policy == "model" else arguments.policy
    studies = {
        "latency": latency_rows(runs, arguments.hz),
        "quantization": quantization_rows(runs),
        "policies": policy_rows(runs, name, others),
    }
    parts = []
    if studies["latency"]:
        plot_latency(studies["latency"], blocking, out / "latency.png")
        text = latency_text(studies["latency"], blocking)
        parts.append(f"## Success against latency\n\n{text}\n\n![success against latency](latency.png)")
    if studies["quantization"]:
        plot_quantization(studies["quantization"], out / "quantization.png")
        text = quantization_text(studies["quantization"])
        parts.append(f"## Quantization\n\n{text}\n\n![success by precision](quantization.png)")
    if len(studies["policies"]) > 1:
        plot_policies(studies["policies"], out / "policies.png")
        parts.append(f"## Policies\n\n{policies_text(studies['policies'])}\n\n![success by policy](policies.png)")
    asked = {"tasks": arguments.tasks, "episodes": arguments.episodes, "max_steps": arguments.max_steps or "the usual"}
    asked |= blocking["settings"] if blocking else {}
    device = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{platform.machine()} {arguments.device.upper()}"
    )
    about = (
        f"`python {shlex.join(sys.argv)}`\n\n{asked['episodes']} episodes of each task (`{asked['tasks']}`), "
        f"at most {asked['max_steps']} steps, seeds that recording never uses. "
        f"Intervals are 95% (Wilson), over all episodes. {device}, "
        f"{torch.get_num_threads()} torch threads, torch {torch.__version__.partition('+')[0]}."
    )
    (out / "report.json").write_text(json.dumps(studies, indent=1, default=str) + "\n", encoding="utf-8")
    report = "\n\n".join(["# In closed loop", about, *parts]) + "\n"
    (out / "report.md").write_text(report, encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the report")
    parser.add_argument(
        "--runs", type=Path, default=Path("outputs/closed_loop"), help="folder of the evaluations; default: %(default)s"
    )
    parser.add_argument(
        "--studies",
        nargs="*",
        default=list(STUDIES),
        choices=STUDIES,
        help="studies to run; default: all; none after it: only the report",
    )
    parser.add_argument("--model", default=EMBEDDED_POLICY, help="default: the policy of the repository")
    parser.add_argument("--name", default="this policy", help="what the report calls the model; default: %(default)s")
    parser.add_argument(
        "--policy", default="model", help="what acts in latency and policies: model, or expert to try the studies out"
    )
    parser.add_argument("--env", default="metaworld", help="simulator; default: %(default)s")
    parser.add_argument(
        "--tasks", default="mt10", help="tasks and sets of them, joined by commas; default: %(default)s"
    )
    parser.add_argument("--episodes", type=int, default=20, help="episodes of each task; default: %(default)s")
    parser.add_argument("--max-steps", type=int, help="after which an episode has failed; default: the simulator's")
    parser.add_argument("--hz", type=float, help="steps of the world in a second; default: the environment's")
    parser.add_argument(
        "--latencies",
        type=float,
        nargs="+",
        default=[0, 0.05, 0.1, 0.2, 0.4, 0.8],
        help="latencies in seconds; default: %(default)s",
    )
    parser.add_argument("--other", action="append", default=[], metavar="NAME=FOLDER", help="an evaluation to compare")
    parser.add_argument("--camera", help="camera of the simulator; default: its own")
    parser.add_argument(
        "--unnorm-key", help="dataset in whose units actions are; default: the model's, if it has only one"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="environments side by side; default: one for each core, at most 8")
    parser.add_argument(
        "--videos",
        type=int,
        default=0,
        help="episodes of each task to record as videos, in each evaluation; default: %(default)s",
    )
    arguments = parser.parse_args()
    if any("=" not in other for other in arguments.other):
        parser.error("--other wants NAME=FOLDER")
    if arguments.hz is None:
        environment = make_environment(arguments.env, render=False)
        arguments.hz = environment.frequency
        environment.close()
    steps = {"latency": run_latency, "quantization": run_quantization, "policies": run_policies}
    for study in arguments.studies:
        steps[study](arguments)
        write(arguments)  # what is there can be read while the rest runs
    print("\n" + write(arguments))


if __name__ == "__main__":
    main()
