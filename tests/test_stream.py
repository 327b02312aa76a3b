"""The order of training: one sequence for any number of processes, resumed anywhere, nothing lost or seen twice."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from openvla.data import Episode, PythonDataset
from openvla.data.stream import Batches, MixtureStream


class Numbered:
    """Episodes of different lengths whose actions say which frame they are."""

    def __init__(self, episodes: int, name: str = "numbered", empty=()):
        self.dataset = PythonDataset(self, name=name)
        self.episodes, self.empty, self.name = episodes, empty, name

    def __len__(self):
        return self.episodes

    def length(self, index: int) -> int:
        return 3 + index % 3

    def __getitem__(self, index: int):
        steps = np.arange(self.length(index))
        return {"actions": np.column_stack([np.full_like(steps, index), steps]), "instruction": "go"}

    def frames(self, episode: Episode):
        if episode.index in self.empty:
            return
        for step in range(len(episode)):
            yield episode[step : step + 1]

    def all(self) -> Counter:
        return Counter(
            (index, step)
            for index in range(self.episodes)
            if index not in self.empty
            for step in range(self.length(index))
        )


def key(frame: Episode):
    return frame.dataset_name, int(frame.actions[0, 0]), int(frame.actions[0, 1])


def sequence(sources, shares, count, **options):
    stream = MixtureStream(sources, shares, buffer_size=50, seed=3, **options)
    return [(position, key(frame)) for position, frame in islice(stream, count)]


@pytest.mark.parametrize("episodes", [5, 200])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_see_the_sequence_of_one(episodes, world_size):
    sources, shares = [Numbered(episodes, "a"), Numbered(70, "b")], [0.7, 0.3]
    alone = sequence(sources, shares, 240)
    assert [position for position, _ in alone] == list(range(240))
    together = []
    for rank in range(world_size):
        together += sequence(sources, shares, 240 // world_size, rank=rank, world_size=world_size)
    assert sorted(together) == alone


@pytest.mark.parametrize("episodes", [5, 200])
def test_a_resumed_run_goes_on_with_the_same_samples(episodes):
    sources, shares = [Numbered(episodes, "a"), Numbered(9, "b")], [0.5, 0.5]
    alone = sequence(sources, shares, 120)
    assert sequence(sources, shares, 40, start=80) == alone[80:]
    # Even on another number of ranks
    resumed = [sequence(sources, shares, 20, start=80, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(resumed[0] + resumed[1]) == alone[80:]


def test_small_datasets_are_seen_whole_before_anything_comes_again():
    source = Numbered(10)
    frames = [frame[1:] for _, frame in sequence([source], [1.0], 2 * source.all().total())]
    half = len(frames) // 2
    assert Counter(frames[:half]) == source.all() == Counter(frames[half:])
    assert frames[:half] != frames[half:]


def test_large_datasets_are_shared_out_over_lanes():
    source = Numbered(256)
    stream = MixtureStream([source], [1.0], buffer_size=64)
    assert stream.lanes == 8
    seen = Counter(key(frame)[1:] for _, frame in islice(stream, source.all().total()))
    # Lanes are equally fast and not equally long: a frame may come once more before another comes at all.
    assert max(seen.values()) <= 2 and len(seen) > 0.97 * len(source.all())
    one_rank = MixtureStream([source], [1.0], buffer_size=64, rank=3, world_size=8)
    read = {key(frame)[1] for _, frame in islice(one_rank, 100)}
    assert len(read) <= 32  # an eighth of the episodes


def test_datasets_are_drawn_by_their_shares():
    drawn = Counter(name for _, (name, *_) in sequence([Numbered(40, "a"), Numbered(40, "b")], [0.8, 0.2], 4000))
    assert drawn["a"] / 4000 == pytest.approx(0.8, abs=0.03)


def test_filters_may_take_whole_parts_but_not_everything():
    source = Numbered(128, empty=range(64))
    seen = {frame[1] for _, frame in sequence([source], [1.0], 600)}
    assert seen <= set(range(64, 128)) and len(seen) > 60
    with pytest.raises(ValueError, match="nothing is left of its 4 episodes"):
        sequence([Numbered(4, empty=range(4))], [1.0], 1)


def test_batches_and_errors():
    batches = Batches(MixtureStream([Numbered(4)], [1.0], buffer_size=0), 3, count=2)
    assert [[position for position, _ in batch] for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="rank=2"):
        MixtureStream([Numbered(4)], [1.0], buffer_size=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="2 probabilities for 1"):
        MixtureStream([Numbered(4)], [0.5, 0.5], buffer_size=0)
