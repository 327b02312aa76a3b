"""Statistics that a LeRobot data set keeps of each feature, per episode and of all together."""

from collections.abc import Sequence
from typing import Any

import numpy as np


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MOST_IMAGES = 100  # of one episode that are looked at, spread evenly


class FeatureStatistics:
    """Statistics of one feature that grow episode by episode.

    min, max, mean, std (of the population), count and quantiles, in the shapes of the real library: one number for each
    dimension; for images (3, 1, 1) with colours from 0 to 1. Those of all together are exact, where the real library
    averages the quantiles of episodes.
    """

    def __init__(self, dtype: str):
        self.dtype = dtype
        self._values: list[np.ndarray] = []
        self._histogram = np.zeros((3, 256), dtype=np.int64)
        self._images = 0

    def add(self, values: np.ndarray | Sequence[np.ndarray]) -> dict[str, Any]:
        """Take an episode in, (T,) or (T, D) numbers or T images (H, W, 3) uint8; returns its own statistics."""
        if self.dtype == "image":
            histogram, images = image_histogram(values)
            self._histogram += histogram
            self._images += images
            return of_histogram(histogram, images)
        numbers = np.asarray(values).reshape(len(values), -1)
        self._values.append(numbers)
        return of_numbers(numbers)

    def complete(self) -> dict[str, Any]:
        """Of everything so far."""
        if self.dtype == "image":
            return of_histogram(self._histogram, self._images)
        return of_numbers(np.concatenate(self._values))


def image_histogram(images: Sequence[np.ndarray] | np.ndarray) -> tuple[np.ndarray, int]:
    """(3, 256) how often each level of each colour occurs, and the number of images that were counted."""
    steps = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).round().astype(int))
    histogram = np.zeros((3, 256), dtype=np.int64)
    for step in steps:
        image = images[int(step)]
        histogram += [np.bincount(image[..., colour].ravel(), minlength=256) for colour in range(3)]
    return histogram, len(steps)


def of_numbers(numbers: np.ndarray) -> dict[str, Any]:
    """(N, D) -> statistics with D entries each."""
    wide = numbers.astype(np.float64)
    found = {
        "min": numbers.min(axis=0).tolist(),
        "max": numbers.max(axis=0).tolist(),
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "count": [len(numbers)],
    }
    return found | {name: np.quantile(wide, part, axis=0).tolist() for name, part in QUANTILES.items()}


def of_histogram(histogram: np.ndarray, images: int) -> dict[str, Any]:
    """(3, 256) -> statistics of shape (3, 1, 1); a quantile is the lowest level that so many pixels do not exceed."""
    levels = np.arange(256) / 255
    pixels = histogram.sum(axis=1)
    mean = histogram @ levels / pixels
    spread = np.sqrt(np.maximum(histogram @ levels**2 / pixels - mean**2, 0))
    cumulative = histogram.cumsum(axis=1)
    found = {
        "min": np.array([levels[np.flatnonzero(row)[0]] for row in histogram]),
        "max": np.array([levels[np.flatnonzero(row)[-1]] for row in histogram]),
        "mean": mean,
        "std": spread,
    }
    quantiles = {
        name: np.array([levels[np.searchsorted(row, part * row[-1])] for row in cumulative])
        for name, part in QUANTILES.items()
    }
    shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in (found | quantiles).items()}
    return {**{name: shaped[name] for name in found}, "count": [images], **{name: shaped[name] for name in quantiles}}
