"""The fine-tuning strategies side by side: `openvla finetune` with each on one dataset, a table and curves.

    python studies/compare_strategies.py DATASET docs/results/strategies --steps 300 --batch-size 16

Writes OUT.md (what was run, loss, accuracy, L1, trainable parameters, peak memory, time) and OUT.png (curves). Every
strategy runs in a process of its own, so that its memory is its own; runs that are finished are not repeated. Further
options are handed to every run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from openvla.training import STRATEGIES
from openvla.training.curves import plot_curves


# The same for all would be unfair: adapters and a few layers take larger steps than the complete model.
LEARNING_RATES = {"full": "1e-4", "frozen_vision": "1e-4", "sandwich": "1e-4", "last_layer": "1e-4"}


def run(strategy: str, arguments: argparse.Namespace, rest: list[str], folder: Path) -> dict:
    """One run; what it took is kept in `folder`, where a second call of the same command finds it."""
    taken = folder / "taken.json"
    command = [sys.executable, "-m", "openvla.cli", "finetune", "--strategy", strategy, "--dataset", arguments.dataset]
    command += ["--output", str(folder / "run"), "--steps", str(arguments.steps), "--save-every", str(arguments.steps)]
    command += ["--logging", "none", *rest]  # no --resume: time and memory would be those of the last part
    if strategy in LEARNING_RATES:
        command += ["--learning-rate", LEARNING_RATES[strategy]]
    if taken.exists():
        result = json.loads(taken.read_text())
        if result.get("command") != command[1:]:
            raise SystemExit(
                f"'{folder}' holds the run of another command ({shlex.join(result.get('command', ['unknown']))}): its "
                "numbers would stand under this one. Give another folder (--runs), or remove it."
            )
        return result
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{(folder / 'output.txt').read_text()[-2000:]}")
    last = folder / "run" / "checkpoints" / f"checkpoint-{arguments.steps}"
    state = json.loads((last / "trainer_state.json").read_text())
    found = re.search(r"trains +([\d.]+M)", (folder / "output.txt").read_text())
    result = {
        "command": command[1:],
        "strategy": strategy,
        "trainable": found.group(1) if found else "?",
        "seconds": time.perf_counter() - started,
        "peak_mib": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        "log": state["log_history"],
    }
    taken.write_text(json.dumps(result))
    return result


def table(results: list[dict]) -> str:
    lines = [
        "| strategy | trainable | loss | token accuracy | L1, training | L1, held out before | after | memory | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        last = [entry for entry in result["log"] if "loss" in entry][-1]
        held_out = [entry["eval_action_l1"] for entry in result["log"] if "eval_action_l1" in entry]
        before, after = (f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}") if held_out else ("", "")
        lines.append(
            f"| {result['strategy']} | {result['trainable']} | {last['loss']:.3f} | {last['action_accuracy']:.1%} | "
            f"{last['action_l1']:.4f} | {before} | {after} | {result['peak_mib']:.0f} MiB | {result['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="demonstrations, as `openvla finetune` takes them")
    parser.add_argument("out", type=Path, help="path of the table and the picture, without ending")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run; default: %(default)s")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), help="default: all")
    parser.add_argument(
        "--runs", type=Path, default=Path("outputs/strategies"), help="folder for the runs; default: %(default)s"
    )
    arguments, rest = parser.parse_known_args()
    results = [run(name, arguments, rest, arguments.runs / name) for name in arguments.strategies]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    plot_curves({result["strategy"]: result["log"] for result in results}, arguments.out.with_suffix(".png"))
    text = table(results)
    head = f"# Fine-tuning strategies\n\n`python {shlex.join(sys.argv)}`"
    picture = f"![curves]({arguments.out.name}.png)"
    arguments.out.with_suffix(".md").write_text(f"{head}\n\n{text}\n\n{picture}\n")
    print(text)


if __name__ == "__main__":
    main()
