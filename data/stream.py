"""Episodes, or what is cut from them, as streams: shared out over ranks and workers, shuffled, mixed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

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

    Rank and world size come from torch.distributed unless given. Parts differ in length by an episode; `repeat=True`
    never ends. `set_epoch` sets the order of the next pass; the passes after it count on (workers that do not persist
    start again each pass: call it before every pass there).
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
        """Set the number of the next pass, by which its order is drawn."""
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

    def _indices(self, epoch: int, part: int, parts: int) -> list[int]:
        runs = self.dataset.runs()
        if self.shuffle:
            runs = [runs[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(runs))]
        start, stop = len(self.dataset) * part // parts, len(self.dataset) * (part + 1) // parts
        indices: list[int] = []
        position = 0
        for run in runs:
            indices += run[max(0, start - position) : max(0, stop - position)]
            position += len(run)
        return indices

    def __iter__(self) -> Iterator[Any]:
        all_of_it = False
        while True:
            if self._counted_from != int(self._epoch):
                self._counted_from, self._passes = int(self._epoch), 0
            epoch = self._counted_from + self._passes
            self._passes += 1
            part, parts = self._part() if not all_of_it else (0, 1)
            indices, came = self._indices(epoch, part, parts), 0
            items: Iterable[Any] = self.dataset.read(indices)
            if self.expand:
                items = (item for episode in items for item in self.expand(episode))
            if self.buffer_size:
                items = shuffled(items, self.buffer_size, np.random.default_rng([self.seed, epoch, part, 1]))
            for item in items:
                came += 1
                yield item
            if not (self.repeat and indices):
                return
            if all_of_it and not came:
                raise ValueError(f"{self.dataset.name}: nothing is left of its {len(self.dataset)} episodes.")
            all_of_it = not came  # filters can take all of one part, while others have plenty


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


class FrameSource(Protocol):
    """What a mixture draws from: `data.source.Source`."""

    @property
    def dataset(self) -> EpisodeDataset: ...

    def frames(self, episode: Episode) -> Iterable[Episode]: ...


MAX_LANES = 64
EPISODES_PER_LANE = 32  # fewer would make the shares of long and short episodes unequal


class MixtureStream:
    """`(position, frame)` of a mixture, endless: the sequence of all ranks together does not depend on their number.

    The sequence is dealt from `lanes`: sample i is the next of lane i mod lanes. A lane is a shuffled mixture of its
    own over its part of every dataset, so that a rank reads only the lanes that its samples come from (rank r of W
    takes the samples i with i mod W = r). Small datasets make one lane, which every rank reads; images are decoded
    later, by the rank that trains on them. Every frame comes once before any comes again, within its lane.

    Args:
        sources: Datasets with their frames.
        probabilities: (N,) how likely each is drawn; see `mixture_probabilities`.
        buffer_size: Frames that wait to be shuffled, over all lanes and sources; their images stay encoded.
        start: Samples of all ranks that were taken before; what they came from is read again, undecoded.
        lanes: Default: a power of two by the number of episodes, at most 64.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        probabilities: Sequence[float] | np.ndarray,
        *,
        buffer_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
    ):
        if not 0 <= rank < world_size or start < 0:
            raise ValueError(f"rank={rank}, world_size={world_size}, start={start}: expected 0 <= rank < world_size")
        if not sources or len(sources) != len(probabilities):
            raise ValueError(f"{len(probabilities)} probabilities for {len(sources)} datasets: give one for each.")
        self.sources, self.probabilities = sources, np.asarray(probabilities, dtype=np.float64)
        self.buffer_size, self.seed = buffer_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size
        self.lanes = lanes or _power_of_two(sum(len(source.dataset) for source in sources) // EPISODES_PER_LANE)

    def __iter__(self) -> Iterator[tuple[int, Episode]]:
        streams = [self._lane(lane) for lane in range(self.lanes)]
        taken = [0] * self.lanes
        position = self.start + (self.rank - self.start) % self.world_size
        while True:
            turn, lane = divmod(position, self.lanes)
            while taken[lane] < turn:  # samples of other ranks, and those before the start
                next(streams[lane])
                taken[lane] += 1
            taken[lane] += 1
            yield position, next(streams[lane])
            position += self.world_size

    def _lane(self, lane: int) -> Iterator[Episode]:
        streams = []
        for index, (source, share) in enumerate(zip(self.sources, self.probabilities)):
            parts = min(self.lanes, _power_of_two(len(source.dataset) // EPISODES_PER_LANE))
            stream = EpisodeStream(
                source.dataset,
                shuffle=True,
                buffer_size=math.ceil(self.buffer_size * share / self.lanes),
                expand=source.frames,
                repeat=True,
                seed=int(np.random.SeedSequence([self.seed, lane // parts, index]).generate_state(1)[0]),
                rank=lane % parts,
                world_size=parts,
            )
            streams.append(iter(stream))
        if len(streams) == 1:
            yield from streams[0]
        draws = np.random.default_rng([self.seed, lane])
        while True:
            for index in draws.choice(len(streams), size=1024, p=self.probabilities):
                yield next(streams[index])


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit` and MAX_LANES; 1 at least."""
    return 1 << (min(max(limit, 1), MAX_LANES).bit_length() - 1)


class Batches:
    """`count` lists of `batch_size` items of an endless stream: a batch sampler whose "indices" are the frames
    themselves, so that one process reads and DataLoader workers decode."""

    def __init__(self, stream: Iterable[Any], batch_size: int, count: int):
        self.stream, self.batch_size, self.count = stream, batch_size, count

    def __iter__(self) -> Iterator[list[Any]]:
        items = iter(self.stream)
        for _ in range(self.count):
            yield [next(items) for _ in range(self.batch_size)]
