"""From frames to training samples: an image of each camera, the instruction and the normalized actions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..cameras_openvla import find_cameras, is_on_arm, not_colour, view_of
from ..image_processing_openvla import OpenVLAImageProcessor
from .augment import ImageAugmentation
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
    return next((name for name in colours if not is_on_arm(name)), colours[0])


def model_cameras(episode: Episode, camera_names: Sequence[str], camera: str | None = None) -> list[str]:
    """Cameras of an episode that a model sees (`config.camera_names`), in its order; `camera` is its "primary", if
    given."""
    primary = main_camera(episode, camera)
    scene = [name for name in camera_names if name == "primary" or (camera and view_of(name) == "primary")]
    if list(camera_names) == scene:
        return [primary]
    try:
        return find_cameras(episode.images, [primary if name in scene else name for name in camera_names])
    except ValueError as error:
        raise ValueError(f"{episode.origin or episode}: {error} {NAMED}") from error


class FrameSamples(Dataset):
    """`{"instruction", "actions", "image" (H, W, 3) uint8, "dataset"}` of `samples[position, frame]`; "image" of
    several cameras is `{camera: image}`, "state" (S,) is there where the frame has one, "action_is_pad" (K,) bool where
    its last steps are not recorded, "executed" (K, A) where a chunk is known not to be what the robot did.

    Frames are those of `Source.frames`: normalized actions of K steps, one image of each camera. An image is decoded
    and becomes what the model is to see (`OpenVLAImageProcessor.trained_pixels`); with an augmentation, whose random
    crop takes the place of the center crop, that is varied.

    Args:
        images: The image processor of the model.
        augmentation: Applied after the resize. Its randomness depends on the seed and the position in the stream alone:
            the same in every process, and after a resume.
        camera_names: Of the model: what it calls the cameras of a frame, in their order.
    """

    def __init__(
        self,
        images: OpenVLAImageProcessor,
        augmentation: ImageAugmentation | None = None,
        seed: int = 0,
        camera_names: Sequence[str] = ("primary",),
    ):
        self.images, self.augmentation, self.seed = images, augmentation, seed
        self.camera_names = camera_names

    def __getitem__(self, item: tuple[int, Episode]) -> dict[str, Any]:
        position, frame = item
        images, seen = {}, list(frame.images)
        if len(seen) != len(self.camera_names):  # not those of a source, which are chosen already
            seen = [main_camera(frame)]
        for number, (camera, name) in enumerate(zip(self.camera_names, seen, strict=True)):
            image = self.images.trained_pixels(
                frame.images[name][0], do_center_crop=self.augmentation is None, do_jpeg=False
            )
            if self.augmentation is not None:
                own = [number] if number else []  # each camera is varied by itself
                image = self.augmentation(image, np.random.default_rng([self.seed, position, *own]))
            images[camera] = image
        return {
            "instruction": frame.instruction,
            "actions": frame.actions[0] if len(frame.actions) == 1 else frame.actions,
            "image": images if len(images) > 1 else image,
            "dataset": frame.dataset_name,
            **({} if frame.state is None else {"state": frame.state[0]}),
            **({} if frame.executed is None or len(frame.executed) == 1 else {"executed": frame.executed}),
            **({"action_is_pad": np.arange(-len(frame.actions), 0) >= -frame.padded} if frame.padded else {}),
        }
