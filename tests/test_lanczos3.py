"""Resizing against TensorFlow's, where the last bit of a weight decides a level."""

import hashlib

import numpy as np
import pytest

from openvla.pixels_openvla import resize_lanczos3


# SHA-256 of tf.image.resize(image, (224, 224), "lanczos3", antialias=True), rounded (tensorflow-cpu 2.15.0)
RESIZED = [
    ((256, 256), 2, "ab57fc84018db848"),
    ((480, 640), 4, "299898e9adb142f8"),
    ((8, 8), 3, "3ee0adc5f27012a5"),
    ((33, 31), 1, "13afcf017733441b"),
]


@pytest.mark.parametrize(("shape", "seed", "expected"), RESIZED)
def test_levels_that_depend_on_the_last_bit_of_a_sine(shape, seed, expected):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert hashlib.sha256(resize_lanczos3(image).tobytes()).hexdigest().startswith(expected)
