"""One episode, whatever file it came from.

Shapes: T steps, A action dimensions, S state dimensions.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..files_openvla import check_file
from .images import decode_image


EXECUTED = "executed_action"  # its name in files that openvla record writes; LeRobot takes "action..." for an action
COPY_AGAIN = "it was damaged or cut off, copy or download it again"


class DamagedDataError(ValueError):
    """A record that cannot be read as an episode; the message names the file and the record."""


class MissingKeyError(DamagedDataError):
    """A record without a field that was asked for."""


def check_data_file(path: str | os.PathLike, what: str) -> Path:
    """`path`, if it is a file with content and no Git LFS pointer; a DamagedDataError that says so if not."""
    try:
        return check_file(path, what)
    except (OSError, ValueError) as error:
        raise DamagedDataError(str(error)) from error


class CameraImages(Sequence):
    """The images of one camera: `frames[t]` decodes step t to (H, W, 3) uint8; a slice is again a sequence that holds
    only its own steps, still encoded. Subclasses implement `__len__`, `_decode` and `_select`."""

    def _decode(self, step: int) -> np.ndarray:
        raise NotImplementedError

    def _select(self, steps: slice) -> "CameraImages":
        raise NotImplementedError

    @overload
    def __getitem__(self, step: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, step: slice) -> "CameraImages": ...
    def __getitem__(self, step):
        if isinstance(step, slice):
            return self._select(step)
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._decode(int(step) % len(self))


class EncodedImages(CameraImages):
    """Images kept as JPEG or PNG bytes. `origin` names file and record in errors."""

    def __init__(self, encoded: Sequence[bytes], origin: str = ""):
        self.encoded = encoded
        self.origin = origin

    def __len__(self) -> int:
        return len(self.encoded)

    def _select(self, steps: slice) -> "EncodedImages":
        # a list of its own: a view of an object array would keep the complete episode in memory
        return EncodedImages(list(self.encoded[steps]), self.origin)

    def _decode(self, step: int) -> np.ndarray:
        try:
            return decode_image(self.encoded[step])
        except ValueError as error:
            raise DamagedDataError(f"{self.origin}, image of step {step}: {error}") from error


class PixelImages(CameraImages):
    """Images that are pixels already: (T, H, W, 3) uint8."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def _select(self, steps: slice) -> "PixelImages":
        return PixelImages(np.array(self.pixels[steps]))

    def _decode(self, step: int) -> np.ndarray:
        return np.array(self.pixels[step])


class CheckedImages(CameraImages):
    """Images from a sequence of the user's own making, which need not know slices; checked when they are looked at."""

    def __init__(self, frames: Sequence[Any], origin: str, steps: range | None = None):
        self.frames, self.origin = frames, origin
        self.steps = range(len(frames)) if steps is None else steps

    def __len__(self) -> int:
        return len(self.steps)

    def _select(self, steps: slice) -> "CheckedImages":
        chosen = self.steps[steps]
        if isinstance(self.frames, list | tuple):  # in memory, and looked at: a part holds only its own
            return CheckedImages([np.array(self.frames[step]) for step in chosen], self.origin)
        return CheckedImages(self.frames, self.origin, chosen)

    def _decode(self, step: int) -> np.ndarray:
        return _pixels(self.frames[self.steps[step]], f"{self.origin}, step {self.steps[step]}")


@dataclass(frozen=True, eq=False, repr=False)
class Episode:
    """A demonstration. `episode[a:b]` is the part from step a to before b; `episode[t : t + 1]` is one frame, which
    keeps no more of the episode in memory than its own encoded images."""

    instruction: str  # of the first step; "" where the recording has none
    actions: np.ndarray  # (T, A) float32
    images: Mapping[str, Sequence[np.ndarray]]  # camera -> T images, (H, W, 3) uint8, decoded on access
    state: np.ndarray | None  # (T, S) float32
    dataset_name: str
    index: int  # within its dataset
    step_instructions: tuple[str, ...] | None = None  # only where they change along the way
    origin: str = ""  # file and record, for messages
    padded: int = (
        0  # of a training frame, whose actions are a chunk (K, A): its last steps, where they are not recorded
    )
    executed: np.ndarray | None = None  # like actions, where the robot did something else: noise, a student

    def __len__(self) -> int:
        return len(self.actions)

    def __repr__(self) -> str:
        state = None if self.state is None else self.state.shape
        return (
            f"Episode({self.dataset_name!r}, index={self.index}, instruction={self.instruction!r}, "
            f"actions={self.actions.shape}, state={state}, images={list(self.images)})"
        )

    def __getitem__(self, steps: slice) -> "Episode":
        if not isinstance(steps, slice):
            raise TypeError(f"an episode is cut with a slice, such as episode[{steps}:{steps} + 1], not with {steps!r}")
        texts = self.step_instructions[steps] if self.step_instructions else None
        return Episode(
            instruction=texts[0] if texts else self.instruction,
            actions=self.actions[steps].copy(),
            images={camera: frames[steps] for camera, frames in self.images.items()},
            state=None if self.state is None else self.state[steps].copy(),
            dataset_name=self.dataset_name,
            index=self.index,
            step_instructions=texts if texts and len(set(texts)) > 1 else None,
            origin=self.origin,
            executed=None if self.executed is None else self.executed[steps].copy(),
        )


def make_episode(
    *,
    actions: Any,
    images: Mapping[str, Any],
    state: Any,
    instructions: Any,
    dataset_name: str,
    index: int,
    origin: str,
    action_dim: int | None = None,
    state_dim: int | None = None,
    executed: Any = None,
) -> Episode:
    """Check what a reader found and make the episode of it.

    `images` may hold `CameraImages`, pixels (T, H, W, 3) uint8, or T encoded images; `instructions` is one text or one
    per step (see `as_text`). Raises DamagedDataError for no steps, lengths that differ, values that are not finite and
    dimensions that are wrong.
    """
    actions = matrix(actions, "action", origin)
    length = len(actions)
    if length == 0:
        raise DamagedDataError(f"{origin}: the episode has no steps")
    if actions.shape[1] == 0:
        raise DamagedDataError(f"{origin}: its actions have no dimensions")
    if action_dim is not None and actions.shape[1] != action_dim:
        raise DamagedDataError(
            f"{origin}: actions have {actions.shape[1]} dimensions, those of the dataset {action_dim}"
        )
    if state is not None:
        state = matrix(state, "state", origin)
        if state_dim is not None and len(state) and state.shape[1] != state_dim:
            raise DamagedDataError(
                f"{origin}: states have {state.shape[1]} dimensions, those of the dataset {state_dim}"
            )
        if len(state) == length and not state.size:
            state = None  # of no numbers
    if executed is not None:
        executed = matrix(executed, "executed action", origin)
        if executed.shape != actions.shape:
            raise DamagedDataError(f"{origin}: executed actions are {executed.shape}, the actions {actions.shape}")
    frames = {camera: _as_images(value, f"{origin}, camera {camera!r}") for camera, value in images.items()}
    if not isinstance(instructions, str | bytes | Sequence | np.ndarray):
        raise DamagedDataError(f"{origin}: the instruction is {instructions!r}, expected a text, or one for each step")
    single = isinstance(instructions, str | bytes) or (isinstance(instructions, np.ndarray) and not instructions.ndim)
    texts = [as_text(text, origin) for text in ([instructions] if single else instructions)]
    lengths = {"state": length if state is None else len(state)} | {camera: len(f) for camera, f in frames.items()}
    if not single:
        lengths["instruction"] = len(texts)
    for what, found in lengths.items():
        if found != length:
            raise DamagedDataError(f"{origin}: {length} actions, but {found} entries of {what!r}")
    return Episode(
        instruction=texts[0],
        actions=actions,
        images=frames,
        state=state,
        dataset_name=dataset_name,
        index=index,
        step_instructions=tuple(texts) if len(set(texts)) > 1 else None,
        origin=origin,
        executed=executed,
    )


def matrix(values: Any, what: str, origin: str) -> np.ndarray:
    """`values` as a finite (T, D) float32 array of its own; one number per step counts as D = 1."""
    if values is None:
        raise DamagedDataError(f"{origin}: there is no {what}, expected (steps, dimensions) numbers")
    try:
        if hasattr(values, "detach"):  # a tensor, whatever it is on, and whether it learns
            values = values.detach().cpu().float().numpy()
        if np.asarray(values).dtype.kind in "USmMVc":
            raise TypeError(f"it holds {np.asarray(values).dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, see below
            array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DamagedDataError(f"{origin}: {what} is not an array of numbers: {error}") from error
    array = array[:, None] if array.ndim == 1 and array.size else array
    if array.ndim != 2 and (array.size or array.ndim == 0):
        raise DamagedDataError(f"{origin}: {what} has shape {array.shape}, expected (steps, dimensions)")
    if not np.isfinite(array).all():
        step = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DamagedDataError(
            f"{origin}: {what} of step {step} is not finite: {array[step].tolist()}. Correct it, or leave the episode "
            "out (on_error='skip')"
        )
    return array


def as_text(value: Any, origin: str) -> str:
    """One instruction: text, bytes in UTF-8, or an array or list of these; None is "".

    Of several texts the first with words counts; single characters are one text (some LIBERO files hold such a list).
    Raises DamagedDataError for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DamagedDataError(f"{origin}: the instruction {value!r} is not UTF-8") from error
    if isinstance(value, np.ndarray | list | tuple):
        parts = [as_text(part, origin) for part in (value.ravel().tolist() if isinstance(value, np.ndarray) else value)]
        if len(parts) > 1 and all(len(part) == 1 for part in parts):
            return "".join(parts)
        return next((part for part in parts if part.strip()), "")
    raise DamagedDataError(f"{origin}: the instruction is {value!r} ({type(value).__name__}), expected text")


def _pixels(image: Any, origin: str) -> np.ndarray:
    """(H, W, 3) uint8, or a DamagedDataError."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise _no_colours(f"{origin}: expected (H, W, 3) uint8", image)
    return image


def _no_colours(expected: str, found: np.ndarray) -> DamagedDataError:
    hint = ""
    if found.dtype.kind == "f":
        hint = "; colours from 0 to 1 become (255 * image).round().astype(np.uint8)"
    elif found.dtype == np.uint8 and found.ndim > 2 and found.shape[-3] == 3:
        hint = "; move the colours to the end: np.moveaxis(image, -3, -1)"
    return DamagedDataError(f"{expected}, found {found.dtype} {found.shape}{hint}")


def _as_images(value: Any, origin: str) -> CameraImages:
    if isinstance(value, CameraImages):
        return value
    if (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 4
        and value.shape[-1] == 3
        and value.size
    ):
        return PixelImages(value)
    if isinstance(value, Sequence | np.ndarray) and len(value) and all(isinstance(item, bytes) for item in value):
        return EncodedImages(list(value), origin)
    if isinstance(value, list | tuple):  # in memory already: what is wrong is said now and not in training
        for step, image in enumerate(value):
            _pixels(image, f"{origin}, step {step}")
    if isinstance(value, Sequence) and not isinstance(value, bytes | str):
        return CheckedImages(value, origin)
    if isinstance(value, np.ndarray):
        raise _no_colours(f"{origin}: expected (T, H, W, 3) uint8 or T encoded images", value)
    raise DamagedDataError(f"{origin}: expected (T, H, W, 3) uint8 or T encoded images, found {type(value).__name__}")
