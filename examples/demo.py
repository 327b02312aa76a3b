"""Predict actions on real frames of a simulated Sawyer arm, beside what the scripted expert did there.

    python examples/demo.py --output outputs          # what `make demo` runs

Loads the repository root as any Hub repository is loaded, prints the seven numbers of every frame and writes a picture.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from transformers import AutoModel

from openvla.action_spec import action_names


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen


ROOT = Path(__file__).resolve().parents[1]
FRAMES = Path(__file__).resolve().parent / "frames"
PREDICTED, EXPERT = "tab:blue", "tab:gray"
# Of this dataset: 1 moves the target of the gripper by 4 cm in a twentieth of a second; rotations stay 0.
UNITS = ["x 4 cm"] * 3 + ["rad"] * 3 + ["1 open, 0 closed"]


def draw(rows: list[dict], path: Path) -> None:
    """One row for each frame: the frame with its instruction, the motion as arrows, all seven numbers as bars."""
    figure, grid = plt.subplots(
        len(rows), 3, figsize=(11, 3.1 * len(rows)), layout="constrained", width_ratios=[1, 1, 1.5]
    )
    for (frame, motion, bars), row in zip(grid, rows):
        action, expert = row["action"], row["expert"]
        frame.imshow(row["frame"])
        frame.set_title(f"“{row['instruction']}”", fontsize=10)
        frame.set_axis_off()

        for values, color, label in ((expert, EXPERT, "expert"), (action, PREDICTED, "predicted")):
            x, y, z = values[:3]
            motion.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
            motion.annotate("", (1.35, z), (1.35, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
            motion.plot([], [], color=color, lw=2.5, label=f"{label}, gripper {describe_gripper(values[6])}")
        motion.set(xlim=(-1.2, 1.6), ylim=(-1.75, 1.2), xlabel="x (1 is 4 cm)", ylabel="y and z")
        motion.text(1.35, 1.05, "z", ha="center")
        motion.text(-1.1, 1.02, "x, y")
        motion.axvline(1.1, color="lightgray", lw=1)
        motion.axhline(0, color="lightgray", lw=1, zorder=0)
        motion.set_title("motion per step, and gripper", fontsize=10)
        motion.legend(loc="lower left", fontsize=7, frameon=False)

        names = action_names(len(action))
        position = np.arange(len(names))
        bars.barh(position - 0.2, action, 0.4, color=PREDICTED, label="predicted")
        bars.barh(position + 0.2, expert, 0.4, color=EXPERT, label="expert")
        bars.set_yticks(position, names)
        bars.invert_yaxis()
        bars.set_xlim(-1.1, 1.1)
        bars.axvline(0, color="lightgray", lw=1, zorder=0)
        bars.set_title("all seven numbers", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def describe_gripper(opening: float) -> str:
    return "open" if opening > 0.75 else "closed" if opening < 0.25 else f"{opening:.0%} open"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for the picture; default: %(default)s"
    )
    arguments = parser.parse_args()

    model = AutoModel.from_pretrained(str(ROOT), trust_remote_code=True).eval()
    rows = []
    for entry in json.loads((FRAMES / "frames.json").read_text()):
        with Image.open(FRAMES / entry["file"]) as file:
            frame = file.convert("RGB")
        prediction = model.predict_action(frame, entry["instruction"], return_dict=True)
        action, expert = prediction.actions, np.array(entry["action"])
        print(f"\n{entry['file']}: {entry['instruction']}")
        print("           predicted  expert  probability")
        for line in zip(action_names(len(action)), action, expert, prediction.token_probabilities, UNITS):
            print("  {:8} {:+9.3f} {:+7.3f}  {:10.0%}   {}".format(*line))
        rows.append({"frame": frame, "instruction": entry["instruction"], "action": action, "expert": expert})
    error = np.mean([np.abs(row["action"] - row["expert"]) for row in rows])
    picture = arguments.output / "demo.png"
    draw(rows, picture)
    print(f"\nmean |predicted - expert| {error:.3f} (x, y, z: 1 is 4 cm; gripper 0 to 1); picture: {picture}")


if __name__ == "__main__":
    main()
