"""From episodes to training samples: one camera image, the instruction and the normalized action of every frame."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from ..action_tokenizer import normalize_actions
from .augment import ImageAugmentation, resize_image
from .episode import Episode
from .stream import EpisodeStream


def main_camera(episode: Episode, camera: str | None = None) -> str:
    """The camera that the model looks through: the one asked for, or the only or first one that is not on the wrist.

    Raises:
        ValueError: If `camera` is unknown, or the episode has none.
    """
    names = list(episode.images)
    if camera is not None:
        if camera not in names:
            raise ValueError(
                f"{episode.source or episode}: no camera '{camera}'; there are {', '.join(names) or 'none'}."
            )
        return camera
    if not names:
        raise ValueError(f"{episode.source or episode}: no camera image, and OpenVLA acts on what it sees.")
    return next((name for name in names if "wrist" not in name and "hand" not in name), names[0])


class FrameSamples(IterableDataset):
    """`{"instruction", "actions" (A,) in [-1, 1], "image" (H, W, 3) uint8}` of every frame of a stream of frames.

    Args:
        stream: An `EpisodeStream` that expands episodes to frames.
        stats: `"action"` entry of the dataset's statistics.
        camera: See `main_camera`.
        size: (height, width) of the model's input; images are resized as in the published training.
        augmentation: Applied after the resize, or None.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        stream: EpisodeStream,
        stats: Mapping[str, Any],
        camera: str | None = None,
        size: tuple[int, int] = (224, 224),
        augmentation: ImageAugmentation | None = None,
        seed: int = 0,
    ):
        self.stream, self.stats, self.camera, self.size = stream, stats, camera, size
        self.augmentation, self.seed = augmentation, seed

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position, frame in enumerate(self.stream):
            image = resize_image(frame.images[main_camera(frame, self.camera)][0], self.size)
            if self.augmentation is not None:
                # Keyed on what the frame is and where it comes, not on a generator that a resumed run would lack.
                key = [self.seed, position, frame.index, int(np.abs(frame.actions[0]).sum() * 1e6) % 2**31]
                image = self.augmentation(image, np.random.default_rng(key))
            yield {
                "instruction": frame.instruction,
                "actions": normalize_actions(frame.actions[0], self.stats),
                "image": image,
            }
