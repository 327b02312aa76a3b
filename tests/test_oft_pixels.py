"""Images as OpenVLA-OFT's evaluation shows them: JPEG, lanczos3, center crop, each step equal to the original's."""

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import FIXTURES

from openvla import OpenVLAImageProcessor
from openvla.data.episode import Episode
from openvla.data.samples import FrameSamples
from openvla.jpeg_openvla import through_jpeg
from openvla.pixels_openvla import center_crop, resize_lanczos3
from openvla.policy import PIXELS


IMAGES = FIXTURES / "oft" / "images"
GOLDENS = json.loads((IMAGES / "sha256.json").read_text())  # of TensorFlow's pixels


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def raw(index: int) -> np.ndarray:
    return np.asarray(Image.open(IMAGES / f"raw{index}.png").convert("RGB"))


@pytest.mark.parametrize("index", range(len(GOLDENS)))
def test_every_step_is_the_originals(index):
    """Six sizes; one is that of the model and left alone."""
    image, golden = raw(index), GOLDENS[index]
    decoded = through_jpeg(image, 95)
    assert digest(decoded) == golden["decoded_jpeg"]
    resized = image if image.shape == (224, 224, 3) else resize_lanczos3(decoded)
    assert digest(resized) == golden["resized"]
    assert digest(center_crop(resized, 0.9)) == golden["cropped"]
    images = OpenVLAImageProcessor(**PIXELS["oft"])
    assert digest(images.trained_pixels(image)) == golden["cropped"]
    images.center_crop = None  # as users switch it off
    assert digest(images.trained_pixels(image)) == golden["resized"]


def test_the_field_is_saved_only_where_it_is_set(tmp_path):
    OpenVLAImageProcessor(**PIXELS["libero"]).save_pretrained(tmp_path)
    assert "jpeg_quality" not in (tmp_path / "preprocessor_config.json").read_text()
    OpenVLAImageProcessor(**PIXELS["oft"]).save_pretrained(tmp_path)
    assert OpenVLAImageProcessor.from_pretrained(tmp_path).jpeg_quality == 95


def test_demonstrations_do_not_go_through_jpeg_again():
    frame = Episode("open the drawer", np.zeros((1, 7), np.float32), {"image": [raw(5)]}, None, "mine", 0)
    sample = FrameSamples(OpenVLAImageProcessor(**PIXELS["oft"]))[0, frame]
    np.testing.assert_array_equal(sample["image"], center_crop(resize_lanczos3(raw(5)), 0.9))


def test_no_other_decoder_takes_its_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ModuleNotFoundError, match=r"simplejpeg.*openvla\[oft\].*Pillow's decoder gives other pixels"):
        OpenVLAImageProcessor(**PIXELS["oft"]).trained_pixels(raw(0))


@pytest.mark.parametrize("value", [0, 101, True, "95", 95.0])
def test_wrong_quality(value):
    with pytest.raises(ValueError, match="jpeg_quality=.*whole number from 1 to 100"):
        OpenVLAImageProcessor(jpeg_quality=value)


def test_a_crop_that_was_set_to_nonsense():
    images = OpenVLAImageProcessor(**PIXELS["oft"])
    images.center_crop = 90
    with pytest.raises(ValueError, match="center_crop=90: expected a share of the area"):
        images.trained_pixels(raw(1))
