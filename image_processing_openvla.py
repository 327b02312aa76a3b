"""The image processor: camera frames, resized and normalized for each vision tower. Training, prediction and evaluation
pass here with what a model was trained on.

Pixel values equal those of the published `processing_prismatic.py` (transformers 4.40.1, timm 0.9.10).
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .choices_openvla import nearest
from .files_openvla import read_json
from .frames_openvla import PIXEL_FIELDS, PixelSteps


if TYPE_CHECKING:  # of a local folder transformers 5.4 and 5.5 copy no more files than this one names
    from .cameras_openvla import find_cameras  # noqa: F401
    from .forks_openvla import lock_over_forks  # noqa: F401
    from .jpeg_openvla import PictureFile  # noqa: F401
    from .pixels_openvla import load_image  # noqa: F401
    from .tensors_openvla import is_tensor  # noqa: F401


class OpenVLAImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    use_fused_vision_backbone: bool
    image_resize_strategy: str
    input_sizes: list
    interpolations: list
    means: list
    stds: list
    resize_filter: str | None
    center_crop: float | int | None
    jpeg_quality: int | None


# Not for a single call: what a model was trained to see, and what the library's own image processors know beside it
OF_PROCESSOR = (
    "use_fused_vision_backbone", "input_sizes", "interpolations", "means", "stds", "resize_filter", "center_crop",
    "jpeg_quality",
)  # fmt: skip
OF_LIBRARY = {
    "size": "input_sizes", "crop_size": "input_sizes", "resample": "interpolations", "image_mean": "means",
    "image_std": "stds", "do_center_crop": "center_crop",
}  # fmt: skip
OF_CALL = ("do_center_crop",)  # among these, what a single call may ask for


class OpenVLAImageProcessor(PixelSteps, BaseImageProcessor):
    """Resizes and normalizes images for one or two vision towers, the channels of both stacked.

    Reads the published `preprocessor_config.json` of `PrismaticImageProcessor`; its `tvf_*` fields repeat what the
    fields below say and are not kept.

    Args:
        use_fused_vision_backbone: Published field; two towers are described by lists of length two.
        image_resize_strategy: `"resize-naive"` (both sides to the input size), `"resize-crop"` (shorter side, then
            center crop) or `"letterbox"` (padded to a square with the mean color, that of the last of two towers).
        input_sizes: One (channels, height, width) per tower.
        interpolations: One of "bicubic", "bilinear", "lanczos", "nearest" per tower.
        means, stds: One triple per tower, for pixels in [0, 1].
        do_resize, do_rescale, rescale_factor, do_normalize: As in every image processor of the library.
        resize_filter: What the model was trained to see: `"lanczos3"`, both sides to the input size first, as in the
            original's training; None for the published way alone.
        center_crop: Share of the area, in (0, 1], that is cut out of the middle of an image and stretched to its size:
            0.9 for a model trained with random crops of 0.9; None for none.
        jpeg_quality: Images of another size than the input's are written as JPEG of this quality and read again before
            they are resized, as OpenVLA-OFT evaluates (95): its demonstrations were stored so. None for none.

    Raises:
        ValueError: If a field is none of these, or the towers are not described alike.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = OpenVLAImageProcessorKwargs

    def to_dict(self) -> dict[str, Any]:
        """As in every image processor; what the model was trained to see is said also where it is null."""
        fields = {**super().to_dict(), "resize_filter": self.resize_filter, "center_crop": self.center_crop}
        if self.jpeg_quality is None:  # as in files of versions before the field
            fields.pop("jpeg_quality", None)
        if "auto_map" in fields:  # of code that is saved with it: the library lists only the processor (5.4 to 5.24)
            own = {"AutoImageProcessor": "image_processing_openvla.OpenVLAImageProcessor"}
            fields["auto_map"] = own | fields["auto_map"]
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in every image processor; where a processor_config.json is in the folder, which counts, it is changed
        too."""
        file = Path(save_directory) / "processor_config.json"
        processor = read_json(file) if file.is_file() else {}
        if "image_processor" in processor:
            kept = {name: value for name, value in processor["image_processor"].items() if name == "auto_map"}
            processor["image_processor"] = kept | json.loads(self.to_json_string())
            file.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in every image processor, but a name that is none of the fields is refused where it is nearly one, or the
        library's for one: it would be left out silently, and the model be shown other pixels than in training."""
        for name in (*image_processor_dict, *kwargs):
            near = nearest(name, (*PIXEL_FIELDS, "prompt_template"))
            if near and name not in (near, *OF_LIBRARY):
                raise ValueError(f"{name} is no field of the image processor. Did you mean '{near}'?")
            if name in OF_LIBRARY and kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}={kwargs[name]!r}: here it is {OF_LIBRARY[name]}, give that field of the image processor."
                )
        return super().from_dict(image_processor_dict, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """Model inputs of images.

        Args:
            images: Whatever `load_image` reads, a list of such, or a batched array.
            return_tensors: `"pt"` for a tensor, else a numpy array.
            kwargs: `do_resize`, `do_center_crop`, `do_rescale`, `rescale_factor`, `do_normalize`,
                `image_resize_strategy`, each for this call only.

        Returns:
            `pixel_values`: (N, 3 * towers, height, width) float32.

        Raises:
            ValueError: If an image cannot be read, or `kwargs` ask for another thing that the model was trained to see.
        """
        for name in OF_PROCESSOR:
            if name in kwargs and kwargs[name] != (own := getattr(self, name)):
                raise ValueError(
                    f"{name}={kwargs[name]!r}: the image processor has {own!r}. What a model was trained to see is no "
                    f"option of a call: load another one, OpenVLAProcessor.from_pretrained(FOLDER, {name}=...)."
                )
        for name, field in OF_LIBRARY.items():
            if name not in OF_CALL and kwargs.get(name) is not None:
                raise ValueError(f"{name}={kwargs[name]!r}: here it is {field}, a field of the image processor.")
        return BatchFeature(data={"pixel_values": self.normalized(images, **kwargs)}, tensor_type=return_tensors)

    def apply_transform(self, img: Image.Image):
        """Published name: (3 * towers, height, width) float32 of one image."""
        return self.preprocess(img, return_tensors="pt")["pixel_values"][0]


__all__ = ["OpenVLAImageProcessor", "OpenVLAImageProcessorKwargs"]
