"""Two tiny checkpoints the original implementation saved, and the goldens it computed from them."""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

import openvla


FIXTURES = Path(__file__).parent / "fixtures"
GOLDENS = FIXTURES / "goldens"
# Pillow before 13 resizes portrait images along their height first and rounds up to 11 levels differently from the
# goldens. There the model's goldens start from golden pixel values.
ROUNDED_OTHERWISE = {2, 7} if int(PIL.__version__.split(".")[0]) < 13 else set()


@dataclass(frozen=True)
class TinyCheckpoint:
    """A published-layout folder and the goldens that belong to it."""

    name: str

    @property
    def folder(self) -> Path:
        return FIXTURES / self.name

    @cached_property
    def timm_model_kwargs(self) -> list[dict]:
        """Tower sizes, which the published config.json has no field for."""
        sizes = json.loads((self.folder / "tiny_vision_sizes.json").read_text())["overrides"]
        return [sizes[model_id] for model_id in json.loads((self.folder / "config.json").read_text())["timm_model_ids"]]

    def load(self, **kwargs) -> openvla.OpenVLAForActionPrediction:
        kwargs.setdefault("dtype", torch.float32)
        return openvla.OpenVLAForActionPrediction.from_pretrained(
            self.folder, timm_model_kwargs=self.timm_model_kwargs, **kwargs
        )

    def processor(self) -> openvla.OpenVLAProcessor:
        return openvla.OpenVLAProcessor.from_pretrained(self.folder)

    @cache  # noqa: B019 - for the life of the tests
    def pixel_values(self, processor: openvla.OpenVLAProcessor, index: int) -> torch.Tensor:
        """(1, 3 * towers, 224, 224) of a golden image, computed once: nothing changes it."""
        if index in ROUNDED_OTHERWISE:
            strategy = processor.image_processor.image_resize_strategy
            return torch.from_numpy(self.arrays(f"pixel_values_{strategy}.npz")[f"img{index}"])
        return processor.image_processor(golden_image(index), return_tensors="pt")["pixel_values"]

    def inputs(self, processor: openvla.OpenVLAProcessor, case: dict) -> dict[str, torch.Tensor]:
        """Model inputs of a golden case."""
        return {**processor(case["prompt"]), "pixel_values": self.pixel_values(processor, case["image"])}

    @cached_property
    def cases(self) -> list[dict]:
        return self.json("cases.json")

    def json(self, file: str):
        return json.loads((GOLDENS / self.name / file).read_text())

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        with np.load(GOLDENS / self.name / file) as archive:
            return dict(archive)


TINY = [TinyCheckpoint("tiny-openvla-fused"), TinyCheckpoint("tiny-openvla-siglip")]


@cache
def golden_image(index: int) -> Image.Image:
    """Decoded once, for all: no test changes one."""
    image = Image.open(GOLDENS / "images" / f"img{index}.png")
    image.load()
    return image
