"""From camera frames to pixel values, with the steps that a model was trained with; and which frames those are.

numpy and Pillow alone: the image processor of the library and the runtime without torch are both made of this. Pixel
values equal those of the published `processing_prismatic.py` (transformers 4.40.1, timm 0.9.10).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .cameras_openvla import find_cameras
from .choices_openvla import IMAGE_RESIZE_STRATEGIES, check_choice
from .jpeg_openvla import through_jpeg
from .pixels_openvla import (
    INTERPOLATIONS,
    RESIZE_FILTERS,
    as_image_list,
    center_crop,
    crop_to_size,
    is_image_list,
    load_image,
    normalize,
    pad_to_square,
    resize,
    resize_shorter_side,
)


PIXEL_FIELDS = (
    "use_fused_vision_backbone", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds", "do_resize",
    "do_rescale", "rescale_factor", "do_normalize", "resize_filter", "center_crop", "jpeg_quality",
)  # fmt: skip


class PixelSteps:
    """What images of any form go through before one or two vision towers see them. Fields and errors are those of
    `OpenVLAImageProcessor`, which is made of it."""

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: list | None = None,
        interpolations: list | None = None,
        means: list | None = None,
        stds: list | None = None,
        do_resize: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        resize_filter: str | None = None,
        center_crop: float | None = None,
        jpeg_quality: int | None = None,
        **kwargs,
    ):
        # The code that `auto_map` names is that of the folder it came from, not of the one this will be saved to.
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("tvf_") and key != "auto_map"}
        super().__init__(**kwargs)
        check_choice("image_resize_strategy", image_resize_strategy, IMAGE_RESIZE_STRATEGIES)
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        sizes = _triples("input_sizes", input_sizes) if input_sizes else [[3, 224, 224]]
        self.input_sizes = [[*map(int, row)] for row in sizes]  # 224.0 is what some write for 224
        if self.input_sizes != sizes:
            raise ValueError(f"input_sizes={sizes}: expected whole numbers, [channels, height, width] of each tower.")
        towers = len(sizes)
        if not isinstance(interpolations, (list, tuple, type(None))):
            raise ValueError(f"interpolations={interpolations!r}: expected a list, one name per tower.")
        self.interpolations = list(interpolations) if interpolations else ["bicubic"] * towers
        self.means = _triples("means", means) if means else [[0.5, 0.5, 0.5]] * towers
        self.stds = _triples("stds", stds) if stds else [[0.5, 0.5, 0.5]] * towers
        for field in ("interpolations", "means", "stds"):
            if len(getattr(self, field)) != towers:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} entries, input_sizes {towers}: one per tower."
                )
        if min(map(min, self.stds + self.input_sizes)) <= 0:
            raise ValueError(f"stds={self.stds}, input_sizes={self.input_sizes}: expected numbers above 0.")
        for interpolation in self.interpolations:
            check_choice("interpolation", interpolation, list(INTERPOLATIONS))
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        self.rescale_factor = rescale_factor
        if resize_filter is not None:
            check_choice("resize_filter", resize_filter, list(RESIZE_FILTERS))
        _check_share(center_crop)
        if jpeg_quality is not None and (
            isinstance(jpeg_quality, bool) or not isinstance(jpeg_quality, int) or not 1 <= jpeg_quality <= 100
        ):
            raise ValueError(f"jpeg_quality={jpeg_quality!r}: expected a whole number from 1 to 100, or null.")
        self.resize_filter, self.jpeg_quality = resize_filter, jpeg_quality
        # The library has a method of this name, for its own way of cropping.
        self.center_crop: float | None = center_crop

    def trained_pixels(
        self, image: np.ndarray, do_resize: bool = True, do_center_crop: bool = True, do_jpeg: bool = True
    ) -> np.ndarray:
        """What `jpeg_quality`, `resize_filter` and `center_crop` make of an image; the image itself without them.
        Training and prediction have this step in common, and the published way comes after it.

        Args:
            image: (H, W, 3) uint8.
            do_center_crop: False where random crops take its place.
            do_jpeg: False for images of demonstrations, which went through JPEG when they were stored.

        Returns:
            (height, width, 3) uint8 of the input size with a filter, else (H, W, 3).
        """
        _, *size = self.input_sizes[0]
        if do_resize and do_jpeg and self.jpeg_quality is not None and list(image.shape[:2]) != size:
            image = through_jpeg(image, self.jpeg_quality)
        if do_resize and self.resize_filter is not None:
            image = RESIZE_FILTERS[self.resize_filter](image, (size[0], size[1]))
        if do_center_crop and self.center_crop is not None:
            _check_share(self.center_crop)  # may have been set since
            image = center_crop(image, self.center_crop)
        return image

    def _seen(self, image: Image.Image, options: dict[str, Any]) -> list[np.ndarray]:
        """What each tower sees of one RGB image, (3, height, width) float32."""
        steps = {name: options[name] for name in ("do_resize", "do_center_crop")}
        if any(value is not None for value in (self.jpeg_quality, self.resize_filter, self.center_crop)):
            seen = np.asarray(image)
            if (shown := self.trained_pixels(seen, **steps)) is not seen:
                image = Image.fromarray(shown)
        strategy = options["image_resize_strategy"] if options["do_resize"] else None
        if strategy == "letterbox":
            image = pad_to_square(image, self.means[-1])  # of the last of two towers, as in the published code
        resized: dict[tuple, Image.Image] = {}  # towers of one size and interpolation share the work
        towers: list[np.ndarray] = []
        for (_, height, width), interpolation, mean, std in zip(
            self.input_sizes, self.interpolations, self.means, self.stds
        ):
            key = (height, width, interpolation)
            if key not in resized:
                resized[key] = image
                if strategy == "resize-naive":
                    resized[key] = resize(image, height, width, interpolation)
                elif strategy is not None:
                    resized[key] = crop_to_size(resize_shorter_side(image, width, interpolation), height, width)
            towers.append(
                normalize(
                    resized[key],
                    mean if options["do_normalize"] else None,
                    std if options["do_normalize"] else None,
                    options["rescale_factor"] if options["do_rescale"] else None,
                )
            )
        return towers

    def normalized(self, images: Any, **chosen: Any) -> np.ndarray:
        """(N, 3 * towers, height, width) float32 of images; see `OpenVLAImageProcessor.preprocess`."""
        options = {
            name: getattr(self, name) if chosen.get(name) is None else chosen[name]
            for name in ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_resize_strategy")
        }
        options["do_center_crop"] = chosen.get("do_center_crop") is not False
        check_choice("image_resize_strategy", options["image_resize_strategy"], IMAGE_RESIZE_STRATEGIES)
        singles = as_image_list(images)
        if not singles:
            raise ValueError("No image given: the list is empty.")
        towers = np.stack([tower for image in singles for tower in self._seen(load_image(image), options)])
        return towers.reshape(len(singles), -1, *towers.shape[2:])


def _check_share(center_crop: Any) -> None:
    is_number = isinstance(center_crop, (int, float)) and not isinstance(center_crop, bool)
    if center_crop is not None and not (is_number and 0 < center_crop <= 1):
        raise ValueError(f"center_crop={center_crop!r}: expected a share of the area above 0 and up to 1, or null.")


def _triples(field: str, rows: Any) -> list[list]:
    """One list of three numbers (at most 10,000) for each tower."""
    if isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 3 for row in rows):
        if all(isinstance(number, (int, float)) and abs(number) <= 1e4 for row in rows for number in row):
            return [list(row) for row in rows]
    raise ValueError(f"{field}={rows!r}: expected three numbers for each tower, [[., ., .], ...].")


# Which frames --------------------------------------------------------------------------------------------------------


def read_samples(image: Any, instruction: Any) -> tuple[bool, list[Any], list[Any]]:
    """Whether a single sample was given, its images and its instructions, as many of the one as of the other.

    Raises:
        ValueError: If there is no image or no instruction, or not one for each.
    """
    if image is None:
        raise ValueError("No image given: OpenVLA acts on what it sees. Give predict_action(image, instruction).")
    if isinstance(image, Mapping) and "pixel_values" in image:
        raise ValueError("Model inputs instead of an image: give them as predict_action(**inputs).")
    if instruction is None:
        raise ValueError("No instruction given: say what to do, for example 'open the drawer'.")
    single = isinstance(instruction, str)
    instructions = [instruction] if single else instruction
    if not isinstance(instructions, (list, tuple)) or not instructions:
        raise ValueError(
            f"instruction must be a string or a list of at least one, got {instruction!r:.100}. The image comes first."
        )
    images = as_image_list(image)
    single = single and not is_image_list(image)
    if len(images) != len(instructions):
        cameras = " Those of several cameras are {camera: image}, one sample." if len(instructions) == 1 else ""
        raise ValueError(f"{len(images)} image(s) for {len(instructions)} instruction(s): give one for each.{cameras}")
    return single, images, list(instructions)


def camera_images(images: Any, camera_names: Sequence[str]) -> list[list[Any]]:
    """Images of samples, those of the cameras that a model sees in its order; see `OpenVLAProcessor.__call__`.

    Raises:
        ValueError: If a camera is missing or shows several images, may be either of two, or an image does not say which
            camera it is of and the model sees several.
    """
    samples = []
    for entry in as_image_list(images):
        if isinstance(entry, Mapping):
            if "pixel_values" in entry:
                raise ValueError("Model inputs instead of images: give them as predict_action(**inputs).")
            if entry.keys() == {"bytes", "path"}:
                raise ValueError("An image that was not decoded (of the library datasets): give its bytes or its path.")
            if not all(isinstance(name, str) for name in entry):
                raise ValueError(
                    f"Images are given by the names of their cameras, got {list(entry)}: {{camera: image}}."
                )
            found = find_cameras(list(entry), camera_names, ordered=False)
            samples.append([_single(name, entry[name]) for name in found])
        elif len(camera_names) > 1:
            raise ValueError(
                f"The model sees {', '.join(camera_names)}: give {{camera: image}} with one of each, not one image."
            )
        else:
            samples.append([entry])
    return samples


def _single(camera: str, image: Any) -> Any:
    """The one image of a camera: of several, one might be taken for that of the next camera."""
    images = as_image_list(image)
    if len(images) != 1 or is_image_list(image):
        raise ValueError(
            f"The camera '{camera}' shows {len(images)} image(s) in a list, expected one: for a batch give a list of "
            "{camera: image}, one for each sample."
        )
    return images[0]


__all__ = ["PIXEL_FIELDS", "PixelSteps", "camera_images", "read_samples"]
