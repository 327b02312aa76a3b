"""How far predicted actions are from demonstrated ones, frame by frame, outside of training.

    python benchmarks/action_error.py MODEL DATASET [--held-out-only] [--pixels published|libero]

Every frame goes through `predict_action`, which decodes its own tokens. Prints the L1 of each action dimension,
normalized and in the units of the dataset, and of predicting the mean action.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from openvla import OpenVLAForActionPrediction, normalize_actions
from openvla.action_spec import action_names
from openvla.data.samples import main_camera
from openvla.data.sources import open_sources
from openvla.policy import PIXELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("dataset", help="demonstrations, as `openvla finetune` takes them")
    parser.add_argument(
        "--unnorm-key", help="dataset in whose units actions are; default: the model's, if it has only one"
    )
    parser.add_argument("--split", default="train", help="split to read; default: %(default)s")
    parser.add_argument(
        "--held-out-only", action="store_true", help="only the episodes that training keeps back for evaluation"
    )
    parser.add_argument(
        "--pixels", choices=sorted(PIXELS), help="show other pixels than those that are stored with the model"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="frames predicted at once; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; default: %(default)s")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OpenVLAForActionPrediction.from_pretrained(arguments.model, dtype="auto").to(device).eval()
    key = arguments.unnorm_key or next(iter(model.norm_stats))
    stats = model.norm_stats[key]["action"]
    (source,) = open_sources(arguments.dataset, split=arguments.split, statistics={"action": stats})
    if arguments.pixels:
        model.processor = model.processor.with_pixels(**PIXELS[arguments.pixels])
    parts = [source.held_out] if arguments.held_out_only else [source.dataset, source.held_out]
    frames = [frame for part in parts if part is not None for episode in part for frame in source.frames(episode)]

    predicted = []
    for start in tqdm(range(0, len(frames), arguments.batch_size)):
        batch = frames[start : start + arguments.batch_size]
        images = [frame.images[main_camera(frame)][0] for frame in batch]
        found = model.predict_action(images, [frame.instruction for frame in batch], unnorm_key=key)
        predicted.append(normalize_actions(found, stats))
    wanted = np.stack([frame.actions[0] for frame in frames])
    error = np.abs(np.concatenate(predicted) - wanted).mean(axis=0)
    mean = np.abs(normalize_actions(np.asarray(stats["mean"]), stats) - wanted).mean()
    half = np.where(stats["mask"], (np.asarray(stats["q99"]) - np.asarray(stats["q01"])) / 2, 1.0)
    names = action_names(len(error))
    for name, value, unit in zip(names, error, error * half):
        print(f"{name:<10} {value:.4f} normalized, {unit:.4f} in units of {key}")
    print(f"all        {error.mean():.4f} normalized over {len(frames)} frames; predicting the mean action: {mean:.4f}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"l1_normalized": dict(zip(names, error)), "frames": len(frames)}) + "\n"
        )


if __name__ == "__main__":
    main()
