"""Chunks in real time: success and smoothness by latency, by what one prediction is and by what is done with it.

    python studies/chunks.py docs/results/chunks --policies outputs/chunks      # trained by studies/chunks.sh

Evaluations as `openvla evaluate` runs them, of each policy that is there: blocking (all actions of a chunk, half of
them, or the first, before the model looks again), and in real time at each latency with each way of using chunks.
Writes report.md, report.json and report.png to OUT. Evaluations are kept in --runs: the same command goes on where a
stopped one was.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from closed_loop import outcome, spread, success, table
from matplotlib.figure import Figure

from openvla.evaluation import choose_tasks, make_environment
from openvla.evaluation.control import CHUNKING
from openvla.evaluation.evaluate import evaluate
from openvla.evaluation.latency import single_latency
from openvla.policy import OpenVLAPolicy


# Folder of a policy, or of a policy with the mean of its distributions -> what it is.
MEAN = "_mean"
POLICIES = {
    "one": "tokens, chunk 1",
    "one_mean": "tokens, chunk 1, mean",
    "tokens": "tokens, chunk 8",
    "tokens_mean": "tokens, chunk 8, mean",
    "l1": "L1, chunk 8",
    "l1_wrist": "L1, chunk 8, wrist camera and state",
}
CHUNK = 8
WAYS = {
    "hold": "its first action, repeated",
    "switch": "the newest chunk, from the action of its step on",
    "ensemble": "the mean of all chunks for a step",
    "prefix": "the model continues the actions that are executed while it thinks",
}
COLORS = {"hold": "tab:gray", "switch": "tab:orange", "ensemble": "tab:green", "prefix": "tab:blue"}
ROUNDS = 3


def ways(policy: str) -> tuple[str, ...]:
    """Of one action at a time there is one use; of means those that tokens can win with."""
    if is_single(policy):
        return ("hold",)
    return ("hold", "prefix") if policy.endswith(MEAN) else CHUNKING


def is_single(policy: str) -> bool:
    return policy.removesuffix(MEAN) == "one"


def cells(policies: list[str], latencies: list[float]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(policy, folder of its evaluation, options): first what waits, then one latency after the other."""
    decoding = {policy: {"decoding": "mean"} if policy.endswith(MEAN) else {} for policy in policies}
    for policy in policies:
        yield policy, f"{policy}_blocking", decoding[policy]
        if not is_single(policy):
            yield policy, f"{policy}_blocking_half", {"execute": CHUNK // 2, **decoding[policy]}
            yield policy, f"{policy}_blocking_first", {"execute": 1, **decoding[policy]}
    for latency in latencies:
        for policy in policies:
            for way in ways(policy):
                late = {"control": "realtime", "latency": latency, "chunking": way}
                yield policy, f"{policy}_{way}_{latency:g}", {**late, **decoding[policy]}


def measure(arguments: argparse.Namespace, policies: list[str]) -> dict[str, float]:
    """Milliseconds of one prediction of each policy: the median of each round, of which the least. Kept in the runs."""
    file = arguments.runs / "milliseconds.json"
    if not file.exists():
        folders = [name for name in policies if not name.endswith(MEAN)]
        times: dict[str, list[float]] = {name: [] for name in folders}
        loaded = {name: load(arguments, name) for name in folders}
        for name in folders * ROUNDS:
            times[name].append(1000 * single_latency(loaded[name], "open the drawer", 224))
        arguments.runs.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: round(min(ms), 1) for name, ms in times.items()}) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def load(arguments: argparse.Namespace, policy: str) -> OpenVLAPolicy:
    return OpenVLAPolicy.load(str(arguments.policies / policy), dtype="float32", unnorm_key=arguments.unnorm_key)


def jerk(row: dict[str, Any] | None) -> str:
    return "" if row is None or row["jerk"] is None else f"{row['jerk']:.2f}"


def report(arguments: argparse.Namespace, policies: list[str], milliseconds: dict[str, float]) -> str:
    """The tables, of what was run."""
    found = {name: outcome(arguments.runs / name) for _, name, _ in cells(policies, arguments.latencies)}
    environment = make_environment("metaworld", render=False)  # sets of tasks are as many episodes as they have tasks
    wanted = arguments.episodes * len(choose_tasks(environment, arguments.tasks))
    environment.close()
    found = {name: row if row is not None and row["episodes"] >= wanted else None for name, row in found.items()}
    waiting, late = [], []
    for policy in policies:
        blocking = [found.get(f"{policy}_blocking{part}") for part in ("", "_half", "_first")]
        executed, taken = 1 if is_single(policy) else CHUNK, milliseconds.get(policy)
        times = ["", ""] if taken is None else [f"{taken:.0f} ms", f"{taken / executed:.1f} ms"]
        waiting.append([POLICIES[policy], *(f"{success(row)} {jerk(row)}".strip() for row in blocking), *times])
        for way in ways(policy):
            rows = [found[f"{policy}_{way}_{latency:g}"] for latency in arguments.latencies]
            late.append([POLICIES[policy], way, *(f"{success(row)} {jerk(row)}".strip() for row in rows)])
    header = [
        "policy",
        "all actions of a chunk",
        "half of them",
        "the first",
        "a prediction",
        "an action",
    ]
    named = "\n".join(f"- {way}: {what}" for way, what in WAYS.items())
    note = f" {arguments.note}" if arguments.note else ""
    text = [
        "# Chunks in real time",
        f"Trained by `studies/chunks.sh`, evaluated by `studies/chunks.py`.{note}\n\n"
        f"Tasks: {arguments.tasks}. Success over "
        f"{wanted} episodes with its 95% interval (Wilson), empty where they were not run. Jerk: mean third difference "
        "of the places that actions command, in units of the action; the lower, the smoother. Seeds are those that "
        "recording never uses.",
        "## The world waits",
        table(header, waiting),
        "Success, its interval, jerk, by how many actions are executed before the model looks again. mean: what is "
        "executed is the mean of each token's distribution (`--decoding mean`), not its most probable bin. An action: "
        "of a chunk of which all are executed. One thread, the least of three medians.",
        "## The world goes on",
        f"Twenty steps in a second. What becomes of a chunk:\n\n{named}",
        table(["policy", "use", *(f"{latency:g} s" for latency in arguments.latencies)], late),
        "Success, its interval, jerk.",
        "![success and jerk against latency](report.png)",
    ]
    rows = {name: row for name, row in found.items() if row is not None}
    content = {"tasks": arguments.tasks, "milliseconds": milliseconds, "evaluations": rows}
    (arguments.output / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(arguments, policies, rows)
    return "\n\n".join(text) + "\n"


def plot(arguments: argparse.Namespace, policies: list[str], rows: dict[str, dict[str, Any]]) -> None:
    """A column for each policy with chunks, chunk 1 in all of them: success above, jerk below."""
    columns = [name for name in policies if not is_single(name)]
    figure = Figure(figsize=(4 * len(columns), 6), layout="constrained")
    panels = np.atleast_2d(figure.subplots(2, len(columns), sharey="row", sharex=True, squeeze=False))
    for column, policy in enumerate(columns):
        above, below = panels[:, column]
        single = "one_mean" if policy.endswith(MEAN) else "one"
        lines = [(single, "hold", "chunk 1", "black")] + [(policy, way, way, COLORS[way]) for way in ways(policy)]
        for name, way, label, color in lines:
            run = [latency for latency in arguments.latencies if f"{name}_{way}_{latency:g}" in rows]
            shown = [rows[f"{name}_{way}_{latency:g}"] for latency in run]
            if f"{name}_blocking" in rows and way in ("hold", "prefix"):  # without latency: the world waits
                run, shown = [0.0, *run], [rows[f"{name}_blocking"], *shown]
            if not shown:
                continue
            rates, intervals = spread(shown)
            above.errorbar(run, rates, yerr=intervals, marker="o", markersize=4, capsize=2, color=color, label=label)
            below.plot(run, [row["jerk"] for row in shown], marker="o", markersize=4, color=color)
        above.set(title=POLICIES[policy], ylim=(0, 1.02))
        above.legend(frameon=False, fontsize=8)
        below.set(xlabel="latency (s); 0: the world waits", ylim=(0, None))
    panels[0, 0].set_ylabel("success")
    panels[1, 0].set_ylabel("jerk")
    figure.savefig(arguments.output / "report.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = {"help": "default: %(default)s"}
    parser.add_argument("output", type=Path, help="folder of the report")
    parser.add_argument("--policies", type=Path, default=Path("outputs/chunks"), help="folder of the policies")
    parser.add_argument("--runs", type=Path, help="folder of the evaluations; default: loop in that of the policies")
    parser.add_argument("--tasks", default="drawer-open-v3,push-v3,button-press-topdown-v3", **shown)
    parser.add_argument("--episodes", type=int, default=20, help="of each task and evaluation; default: %(default)s")
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.1, 0.2, 0.05, 0.4], help="seconds, in order")
    parser.add_argument("--unnorm-key", default="metaworld", **shown)
    parser.add_argument("--only", nargs="+", choices=POLICIES, help="run these policies and write no report")
    parser.add_argument("--workers", type=int, default=2, help="environments side by side; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="where the model runs; default: %(default)s")
    parser.add_argument("--note", default="", help="a sentence at the head of the report")
    parser.add_argument("--report", action="store_true", help="write the report of what was run, run nothing")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or arguments.policies / "loop"
    there = [name for name in POLICIES if (arguments.policies / name.removesuffix(MEAN) / "config.json").exists()]
    if not arguments.report:
        common = {name: getattr(arguments, name) for name in ("tasks", "episodes", "workers", "device")}
        for policy, name, options in cells(arguments.only or there, arguments.latencies):
            print(f"{name}:", flush=True)
            folder, model = str(arguments.runs / name), str(arguments.policies / policy.removesuffix(MEAN))
            what = {"unnorm_key": arguments.unnorm_key, "dtype": "float32", "videos": 0}
            evaluate(model=model, output=folder, **what, **common, **options)
    if not arguments.only:
        arguments.latencies.sort()
        arguments.output.mkdir(parents=True, exist_ok=True)
        text = report(arguments, there, measure(arguments, there))
        (arguments.output / "report.md").write_text(text, encoding="utf-8")
        print(f"wrote {arguments.output / 'report.md'}")


if __name__ == "__main__":  # each simulator imports this file again
    main()
