"""Episodes, or what is cut from them, as a torch IterableDataset: shared out over ranks and workers, and shuffled."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import EpisodeDataset
from .episode import Episode


def frames(episode: Episode) -> Iterator[Episode]:
    """The episode step by step, each an episode of length 1."""
    for step in range(len(episode)):
        yield episode[step : step + 1]


class EpisodeStream(IterableDataset):
    """Every episode exactly once per pass over all ranks and DataLoader workers together.

    Every worker of every rank gets one contiguous part of the dataset, so that it opens few files; with `shuffle` the
    runs (see `EpisodeDataset.runs`) change places from pass to pass first. `expand` cuts what an episode is to give,
    for instance `frames`; that, or the episode, goes through a shuffle buffer of `buffer_size` items. Images stay
    encoded in the buffer.

    Rank and world size come from torch.distributed unless given: give `rank=0, world_size=1` where something else (such
    as accelerate's IterableDatasetShard) already shares out the items. Parts differ in length by an episode;
    `repeat=True` never ends, which training on several ranks needs. `set_epoch` sets the order of the next pass; the
    passes after it count on (workers that do not persist start anew each pass: call it before every pass there).
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        *,
        shuffle: bool = False,
        buffer_size: int = 0,
        expand: Callable[[Episode], Iterable[Any]] | None = None,
        repeat: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if buffer_size < 0:
            raise ValueError(f"buffer_size={buffer_size}: expected 0 (no buffer) or a number of items")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size}: give both or neither")
        self.dataset, self.shuffle, self.buffer_size, self.expand = dataset, shuffle, buffer_size, expand
        self.repeat, self.seed, self._rank, self._world_size = repeat, seed, rank, world_size
        # shared memory: set_epoch reaches workers that live on from pass to pass
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counted_from, self._passes = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def _part(self) -> tuple[int, int]:
        """This worker's number and the number of all workers of all ranks."""
        rank, world_size = self._rank, self._world_size
        if rank is None or world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            world_size = torch.distributed.get_world_size() if distributed else 1
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        return rank * workers + number, world_size * workers

    def _indices(self, epoch: int) -> list[int]:
        runs = self.dataset.runs()
        if self.shuffle:
            runs = [runs[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(runs))]
        part, parts = self._part()
        start, stop = len(self.dataset) * part // parts, len(self.dataset) * (part + 1) // parts
        indices: list[int] = []
        position = 0
        for run in runs:
            indices += run[max(0, start - position) : max(0, stop - position)]
            position += len(run)
        return indices

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self._counted_from != int(self._epoch):
                self._counted_from, self._passes = int(self._epoch), 0
            epoch = self._counted_from + self._passes
            self._passes += 1
            indices = self._indices(epoch)
            items: Iterable[Any] = self.dataset.read(indices)
            if self.expand:
                items = (item for episode in items for item in self.expand(episode))
            if self.buffer_size:
                items = shuffled(items, self.buffer_size, np.random.default_rng([self.seed, epoch, self._part()[0], 1]))
            yield from items
            if not (self.repeat and indices):
                return


def shuffled(items: Iterable[Any], buffer_size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Shuffle a stream with `buffer_size` items in memory: each new item takes the place of a random one."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
        else:
            place = int(rng.integers(buffer_size))
            leaving, buffer[place] = buffer[place], item
            yield leaving
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
