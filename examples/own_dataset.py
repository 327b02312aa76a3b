"""Demonstrations in a format of your own: any class with `__len__` and `__getitem__` will do.

    python examples/own_dataset.py
    python examples/own_dataset.py --finetune outputs/own

Writes three small episodes as .npz files, opens them through a class of ten lines, and reads them as training does;
with --finetune it trains the small policy on them for a few steps.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from openvla.data import EpisodeStream, frames, open_dataset


class NpzEpisodes:
    """One .npz file per episode."""

    name = "my_robot"

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.npz"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        with np.load(self.files[index]) as file:
            return {
                "instruction": str(file["instruction"]),  # "" where there is none
                "actions": file["actions"],  # (T, A)
                "state": file["state"],  # (T, S), optional
                # (T, H, W, 3) uint8 per camera; a list of T JPEG or PNG images as bytes is as good and smaller
                "images": {"front": file["front"]},
            }


def record(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number, instruction in enumerate(["open the drawer", "close the drawer", "lift the lid"]):
        steps = 4 + number
        np.savez(
            folder / f"{number:04d}.npz",
            instruction=instruction,
            actions=np.hstack([rng.uniform(-1, 1, (steps, 6)), rng.integers(0, 2, (steps, 1))]),  # gripper: 1 open
            state=rng.uniform(-1, 1, (steps, 8)),
            front=rng.integers(0, 256, (steps, 64, 64, 3), dtype=np.uint8),
        )


def train(dataset: NpzEpisodes, output: str) -> None:
    from openvla.training import FinetuneOptions, finetune

    root = str(Path(__file__).resolve().parents[1])  # the small policy; on a GPU "openvla/openvla-7b"
    options = FinetuneOptions(model=root, dataset=dataset.name, output=output, steps=5, batch_size=4)
    finetune(options, data=dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", metavar="OUTPUT", help="also train for a few steps, into this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
        dataset = open_dataset(NpzEpisodes(Path(folder)))
        for episode in dataset:
            print(episode)
        stream = EpisodeStream(dataset, shuffle=True, expand=frames, buffer_size=8)
        print(f"{sum(1 for _ in stream)} frames; the first ones in shuffled order:")
        for frame, _ in zip(stream, range(3)):
            print(f"  {frame.instruction:<18} {frame.images['front'][0].shape} {frame.actions[0, :3].round(2)} ...")
        if arguments.finetune:
            train(NpzEpisodes(Path(folder)), arguments.finetune)


if __name__ == "__main__":
    main()
