"""What can be in control: an OpenVLA model, and what it is measured against."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import BitsAndBytesConfig

from ..action_tokenizer import resolve_unnorm_key
from ..choices_openvla import check_choice
from ..data.augment import center_crop, resize_image
from ..extras import require
from ..files_openvla import read_json
from ..modeling_openvla import OpenVLAForActionPrediction
from ..pixels_openvla import load_image
from .environment import Observation


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


class Policy(Protocol):
    """Observations in, actions out; for several environments at once."""

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """(N, A) actions in the units of the environment; or (N, K, A), K for each to be executed one after another."""
        ...


class OpenVLAPolicy:
    """A model behind the pixels it was trained on: images resized as in training, cropped at the center where it was
    trained with random crops.

    Args:
        camera: Which image of the observation it sees. Default: the first.
        crop: Show it the center of the image.
    """

    def __init__(
        self,
        model: OpenVLAForActionPrediction,
        unnorm_key: str | None = None,
        camera: str | None = None,
        crop: bool = False,
    ):
        self.model, self.camera, self.crop = model, camera, crop
        self.unnorm_key = resolve_unnorm_key(model.norm_stats, unnorm_key)
        self.size = model.vision_backbone.image_size

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        quantization: str | None = None,
        crop: bool | None = None,
        **options: Any,
    ) -> "OpenVLAPolicy":
        """From a folder or Hub id; `options` of the class.

        Args:
            quantization: "int8" or "int4" (bitsandbytes).
            crop: Default: as it was fine-tuned.
        """
        options["crop"] = trained_with_crops(folder) if crop is None else crop
        if quantization is None:
            # Not by `device_map`, which needs accelerate.
            return cls(OpenVLAForActionPrediction.from_pretrained(folder, dtype=dtype).to(device).eval(), **options)
        check_choice("quantization", quantization, QUANTIZATIONS)
        require("bitsandbytes", "accelerate", purpose=f"quantization='{quantization}'", preferred="quant")
        loading = {"dtype": dtype, "quantization_config": BitsAndBytesConfig(**QUANTIZATIONS[quantization])}
        model = OpenVLAForActionPrediction.from_pretrained(folder, device_map={"": device}, **loading)
        return cls(model.eval(), **options)

    def _image(self, observation: Observation) -> np.ndarray:
        images = observation.images
        if self.camera is not None and self.camera not in images:
            raise ValueError(f"No camera '{self.camera}' in the observation; there are {', '.join(images)}.")
        if not images:
            raise ValueError("The observation holds no image: OpenVLA acts on what it sees.")
        image = resize_image(np.asarray(load_image(images[self.camera or next(iter(images))])), self.size)
        return center_crop(image, size=self.size) if self.crop else image

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        images = [self._image(observation) for observation in observations]
        instructions = [observation.instruction for observation in observations]
        with torch.inference_mode():
            return np.asarray(self.model.predict_action(images, instructions, unnorm_key=self.unnorm_key))


def trained_with_crops(model: str) -> bool:
    """Whether `openvla finetune` made the model with image augmentation; False where nothing is known."""
    made = Path(model) / "finetune.json"
    return made.is_file() and bool(read_json(made).get("image_aug"))


class RandomPolicy:
    """Uniform actions between `low` and `high`, each (A,)."""

    def __init__(self, low: np.ndarray, high: np.ndarray, seed: int = 0):
        self.low, self.high, self.generator = low, high, np.random.default_rng(seed)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        return self.generator.uniform(self.low, self.high, (len(observations), len(self.low)))


class ConstantPolicy:
    """One action, (A,), whatever is seen: the mean of the demonstrations, for comparison."""

    def __init__(self, action: np.ndarray):
        self.action = np.asarray(action, dtype=np.float64)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        return np.tile(self.action, (len(observations), 1))
