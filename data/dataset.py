"""What every reader offers: a sequence of episodes, with errors that name the record or skips that are counted."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..cameras_openvla import not_colour, order_cameras
from ..options.datasets import Keys
from .episode import DamagedDataError, Episode, make_episode


OnError = Literal["raise", "skip"]


class EpisodeDataset:
    """A sequence of episodes. Subclasses implement `__len__` and `_load`.

    `dataset[i]` raises DamagedDataError for a damaged record. Iteration does so as well, or with `on_error="skip"`
    warns, counts in `skipped` (each DataLoader worker for itself) and continues; when nothing at all could be read it
    raises nevertheless. Images are decoded later, where they are looked at: a damaged one raises there in either case.
    """

    splits: Sequence[str] = ("train",)  # what is recorded beside the split that was opened
    in_no_split: int = 0  # episodes of the recording that are in none of these
    action_names: list[str] | None = None  # of the dimensions, where the recording names them
    state_names: list[str] | None = None
    hz: float | None = None  # steps in a second, where the recording says so

    def __init__(self, name: str, on_error: OnError = "raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'")
        self.name = name
        self.on_error = on_error
        self.skipped = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def _load(self, index: int) -> Episode:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Episode:
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index} of {self.name}, which has {len(self)}")
        return self._load(int(index) % len(self))

    def __iter__(self) -> Iterator[Episode]:
        return self.read(range(len(self)))

    def runs(self) -> list[range]:
        """Episodes that lie together in one file and are best read one after the other; a stream shuffles the runs."""
        return [range(index, index + 1) for index in range(len(self))]

    def members(self) -> Sequence[Any] | None:
        """What the episodes are in the recording, whatever split was opened; None where splits share none."""
        return None

    def kind_of(self, index: int) -> tuple[str, ...] | None:
        """Names by which an episode tells that it has other images than others, as far as that is known without
        reading it; None where all have the same, or it is not known."""
        return None

    def check_files(self) -> None:
        """Raise a DamagedDataError if a file that training will look into is not there; of those alone that nobody
        opens before, as statistics are kept and look at no image."""

    def content_files(self) -> dict[str, Path] | None:
        """The files that decide actions, states and instructions, by a name that a copy elsewhere shares; None where
        they are not known."""
        return None

    def content_digest(self, path: Path) -> str:
        """A digest of what one of these files says about actions, states and instructions."""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, indices: Iterable[int]) -> Iterator[Episode]:
        """The episodes at `indices`, in order; see the class for damaged ones."""
        good, bad, first_error = 0, 0, None
        for index in indices:
            try:
                episode = self._load(index)
            except DamagedDataError as error:
                if self.on_error == "raise":
                    raise
                bad, first_error = bad + 1, first_error or error
                self._count(error)
                continue
            good += 1
            yield episode
        # A few damaged records may be all that a worker was given; many and nothing else mean a wrong option.
        if first_error and not good and bad >= min(len(self), 10):
            raise DamagedDataError(f"{self.name}: none of {bad} episodes could be read; the first: {first_error}")

    def _count(self, error: Exception) -> None:
        self.skipped += 1
        warnings.warn(f"{self.name}: {self.skipped} skipped so far; the last: {error}", RuntimeWarning, stacklevel=3)


class PartOfDataset(EpisodeDataset):
    """The episodes of another dataset from `episodes.start` to before `episodes.stop`; each keeps its `index`."""

    def __init__(self, dataset: EpisodeDataset, episodes: range):
        super().__init__(dataset.name, dataset.on_error)
        self.dataset, self.episodes = dataset, episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def _load(self, index: int) -> Episode:
        return self.dataset._load(self.episodes[index])

    def kind_of(self, index: int) -> tuple[str, ...] | None:
        return self.dataset.kind_of(self.episodes[index])

    def check_files(self) -> None:
        self.dataset.check_files()

    def runs(self) -> list[range]:
        first, end = self.episodes.start, self.episodes.stop
        parts = [range(max(run.start, first) - first, min(run.stop, end) - first) for run in self.dataset.runs()]
        return [part for part in parts if part]


FIELDS = ("actions", "instruction", "images", "state", "executed")  # of an episode in memory


class PythonDataset(EpisodeDataset):
    """Any object with `__len__` and `__getitem__` that gives `Episode`s or mappings with the fields `actions` (T, A),
    `instruction` (text, or one per step; "" without), `images` {camera: (T, H, W, 3) uint8, or T encoded images},
    `state` (T, S) and `executed` (T, A), what the robot did where it differs, of which only `actions` is required.
    Cameras are taken scene first, by name, as those of files (`order_cameras`)."""

    def __init__(self, episodes: Any, name: str | None = None, on_error: OnError = "raise"):
        super().__init__(name or getattr(episodes, "name", None) or type(episodes).__name__, on_error)
        self.episodes = episodes
        self._action_dim: int | None = None
        self._state_dim: int | None = None
        self._kinds: dict[int, tuple[str, ...]] = {}  # of the episodes that were read: all, for the statistics

    def __len__(self) -> int:
        return len(self.episodes)

    def kind_of(self, index: int) -> tuple[str, ...] | None:
        return self._kinds.get(index)

    def _load(self, index: int) -> Episode:
        where = f"{self.name}, episode {index}"
        try:
            found = self.episodes[index]
        except (KeyError, IndexError) as error:
            raise DamagedDataError(
                f"{where}: {type(self.episodes).__name__}[{index}] raises {error!r}; expected the episodes 0 to "
                f"{len(self) - 1} there"
            ) from error
        if isinstance(found, Episode):
            fields: Mapping = {name: getattr(found, name) for name in FIELDS}
            fields = {**fields, "instruction": found.step_instructions or found.instruction}
        elif isinstance(found, Mapping):
            fields = found
            if "actions" not in fields or set(fields) - set(FIELDS):
                there = sorted(map(str, fields))
                raise DamagedDataError(f"{where}: expected {', '.join(FIELDS)}; found {there}")
        else:
            raise DamagedDataError(f"{where}: expected an Episode or a mapping, found {type(found).__name__}")
        instruction, images = fields.get("instruction"), fields.get("images")
        images = {} if images is None else images
        if not isinstance(images, Mapping) or not all(isinstance(camera, str) for camera in images):
            raise DamagedDataError(f"{where}: images are {type(images).__name__}, expected {{camera: images}}")
        images = {camera: images[camera] for camera in order_cameras([*images])}  # as in files, and for a simulator
        episode = make_episode(
            actions=fields["actions"],
            images=images,
            state=fields.get("state"),
            instructions="" if instruction is None else instruction,
            dataset_name=self.name,
            index=index,
            origin=where,
            action_dim=self._action_dim,
            state_dim=self._state_dim,
            executed=fields.get("executed"),
        )
        self._action_dim = self._action_dim or episode.actions.shape[1]
        self._kinds[index] = tuple(images)
        if episode.state is not None:
            self._state_dim = self._state_dim or episode.state.shape[1]
        return episode


def name_cameras(cameras: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """{name in the episode: key in the file}; a key of its own is named by its last part."""
    if isinstance(cameras, str):
        cameras = [key.strip() for key in cameras.split(",") if key.strip()]
    if isinstance(cameras, Mapping):
        return dict(cameras)
    short = [key.replace(".", "/").rsplit("/", 1)[-1] for key in cameras]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, cameras)}


def warn_of_camera(dataset: str, key: str, kind: str | None = None) -> None:
    """Say what a camera is that was asked for by name, if that is something else than colours."""
    if kind := kind or not_colour(key):
        warnings.warn(
            f"{dataset}: the camera {key!r} is {kind}, by what it is called or marked; it is read like one of colours "
            "because it was asked for.",
            UserWarning,
            stacklevel=4,
        )


def key_list(keys: Keys) -> list[str | None]:
    """The keys one by one; a text may join several with commas, as on the command line."""
    parts = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else [keys] if keys is None else keys
    return [None if key is None or key.lower() in ("none", "") else key for key in parts]


def action_keys(keys: Keys, default: str) -> list[str | None]:
    """The keys of the action; a ValueError where there is none among them."""
    found = key_list(default if keys is None else keys)
    if not any(found):
        raise ValueError(f"action_key={keys!r} names nothing: an action needs at least one key.")
    return found
