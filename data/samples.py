"""From frames to training samples: one camera image, the instruction and the normalized action."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..cameras_openvla import find_cameras, not_colour
from .augment import ImageAugmentation, center_crop, resize_image
from .episode import Episode


NAMED = "What is called or marked depth, mask or infrared, and gray images, are read only where cameras=... names them."


def main_camera(episode: Episode, camera: str | None = None) -> str:
    """The camera that the model looks through: the one asked for, or the only or first one that is not on the wrist.

    Raises:
        ValueError: If `camera` is unknown, or the episode has none.
    """
    names = list(episode.images)
    if camera is not None:
        if camera not in names:
            raise ValueError(
                f"{episode.origin or episode}: no camera '{camera}'; there are {', '.join(names) or 'none'}. {NAMED}"
            )
        return camera
    if not names:
        raise ValueError(f"{episode.origin or episode}: no camera image, and OpenVLA acts on what it sees. {NAMED}")
    colours = [name for name in names if not not_colour(name)]
    if not colours:
        raise ValueError(
            f"{episode.origin or episode}: {', '.join(names)} is {not_colour(names[0])} by name; give camera to use it."
        )
    return next((name for name in colours if "wrist" not in name and "hand" not in name), colours[0])


def model_cameras(episode: Episode, camera_names: Sequence[str], camera: str | None = None) -> list[str]:
    """Cameras of an episode that a model sees (`config.camera_names`), in its order; `camera` is its "primary", if
    given."""
    primary = main_camera(episode, camera)
    if list(camera_names) == ["primary"]:
        return [primary]
    try:
        return find_cameras(episode.images, [primary if name == "primary" else name for name in camera_names])
    except ValueError as error:
        raise ValueError(f"{episode.origin or episode}: {error} {NAMED}") from error


class FrameSamples(Dataset):
    """`{"instruction", "actions", "image" (H, W, 3) uint8, "dataset"}` of `samples[position, frame]`.

    Frames have one step, one camera and normalized actions, (A,) or (chunk, A). An image is decoded and resized as in
    the published training, then augmented, or cropped at the center (`crop`) as augmented models are evaluated.

    Args:
        size: (height, width) of the model's input.
        augmentation: Applied after the resize. Its randomness hangs on the seed and the position in the stream alone:
            the same in every process, and after a resume.
        crop: Cut out the center box of 0.9 of the area instead.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        augmentation: ImageAugmentation | None = None,
        crop: bool = False,
        seed: int = 0,
    ):
        self.size, self.augmentation, self.crop, self.seed = size, augmentation, crop, seed

    def __getitem__(self, item: tuple[int, Episode]) -> dict[str, Any]:
        position, frame = item
        image = resize_image(frame.images[main_camera(frame)][0], self.size)
        if self.augmentation is not None:
            image = self.augmentation(image, np.random.default_rng([self.seed, position]))
        elif self.crop:
            image = center_crop(image, size=self.size)
        return {
            "instruction": frame.instruction,
            "actions": frame.actions[0] if len(frame.actions) == 1 else frame.actions,
            "image": image,
            "dataset": frame.dataset_name,
        }
