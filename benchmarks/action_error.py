"""How far predicted actions are from demonstrated ones, frame by frame, outside of training.

    python benchmarks/action_error.py MODEL DATASET [--held-out-only] [--pixels published|libero]

Every frame goes through `predict_action`, which decodes its own tokens. Prints the L1 of each action dimension,
of a chunk that of its first action, normalized and in the units of the dataset, and of predicting the mean action.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from openvla import OpenVLAForActionPrediction, normalize_actions
from openvla.action_spec import action_names
from openvla.action_tokenizer import resolve_unnorm_key
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
    if model.config.proprio_dim is not None:
        parser.error(f"{arguments.model} sees the state, which nothing here shows it.")
    key, names = resolve_unnorm_key(model.norm_stats, arguments.unnorm_key), model.camera_names
    stats, mode = model.norm_stats[key]["action"], model.normalization.get(key, "bounds_q99")
    (source,) = open_sources(
        arguments.dataset, split=arguments.split, statistics={"action": stats}, normalization=mode, camera_names=names
    )
    if arguments.pixels:
        model.processor = model.processor.with_pixels(**PIXELS[arguments.pixels])
    parts = [source.held_out] if arguments.held_out_only else [source.dataset, source.held_out]
    frames = [frame for part in parts if part is not None for episode in part for frame in source.frames(episode)]

    predicted = []
    for start in tqdm(range(0, len(frames), arguments.batch_size)):
        batch = frames[start : start + arguments.batch_size]
        shown = [dict(zip(names, (views[0] for views in frame.images.values()), strict=True)) for frame in batch]
        images = [next(iter(views.values())) for views in shown] if len(names) == 1 else shown
        found = model.predict_action(images, [frame.instruction for frame in batch], unnorm_key=key)
        first = found.reshape(len(batch), -1, found.shape[-1])[:, 0]  # of a chunk
        predicted.append(normalize_actions(first, stats, mode))
    wanted = np.stack([frame.actions[0] for frame in frames])
    error = np.abs(np.concatenate(predicted) - wanted).mean(axis=0)
    mean = np.abs(normalize_actions(np.asarray(stats["mean"]), stats, mode) - wanted).mean()
    low, high = ("q01", "q99") if mode == "bounds_q99" else ("min", "max")
    half = np.where(stats["mask"], (np.asarray(stats[high]) - np.asarray(stats[low])) / 2, 1.0)
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
