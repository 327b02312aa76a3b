"""Demonstrations: readers of the usual formats, one Episode type.

for episode in open_dataset("bridge_orig/1.0.0"):
    episode.instruction, episode.actions, episode.images["image_0"][0]

`open_sources` gives what training draws from: standardized, split, filtered, normalized.
"""

from .dataset import EpisodeDataset, PythonDataset
from .episode import DamagedDataError, Episode
from .formats.open import open_dataset
from .images import decode_image
from .sources import Source, open_sources
from .stream import EpisodeStream, frames


__all__ = [
    "DamagedDataError",
    "Episode",
    "EpisodeDataset",
    "EpisodeStream",
    "PythonDataset",
    "Source",
    "decode_image",
    "frames",
    "open_dataset",
    "open_sources",
]
