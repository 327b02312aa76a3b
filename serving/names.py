"""From a message of whatever client to a request: which image is which camera, what is the state, what the instruction.

Names are those of this package, and without any option those that clients of openpi (DROID, LIBERO, ALOHA), vllm-omni,
AgiBot and OpenVLA-OFT use. Where a message could mean two things, or says what nobody knows, it is refused: a model
that sees the wrong camera still gives an action.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..choices_openvla import closest
from ..observation import Observation
from ..options.serving import Limits
from ..prompts_openvla import has_words
from .contract import BadRequest, ModelInfo, Refusal, Request, TooLarge
from .values import is_quick, numbers, pixels, short_text
from .wire import shown


# View -> names of its image, without what stands before them ("observation/", "images/", also with dots).
VIEWS: dict[str, tuple[str, ...]] = {
    "primary": (
        "primary", "image", "full_image", "base_image", "primary_image", "image_primary", "exterior_image_1_left",
        "cam_high", "top_head", "agentview", "agentview_image",
    ),
    "secondary": ("secondary", "secondary_image", "image_secondary", "exterior_image_2_left", "cam_low"),
    "wrist": ("wrist", "wrist_image", "image_wrist", "wrist_image_left", "robot0_eye_in_hand_image"),
    "left_wrist": ("left_wrist", "left_wrist_image", "cam_left_wrist", "hand_left"),
    "right_wrist": ("right_wrist", "right_wrist_image", "cam_right_wrist", "hand_right"),
}  # fmt: skip
VIEW_OF = {name: view for view, names in VIEWS.items() for name in names}
INSTRUCTION = ("instruction", "prompt", "task", "task_description", "language_instruction")
STATE = ("state", "proprio")
STATE_PARTS = ("joint_position", "gripper_position")  # of DROID: one after the other they are the state
SESSION = ("session", "session_id")
OPTIONS = ("unnorm_key", "step", "committed", "timeout_ms", "request_id", "details", "distributions", "endpoint")
IGNORED = ("task_name", "eef/left", "eef/right")  # AgiBot's clients send them beside the rest
PREFIXES = ("observation/", "images/", "image/")
MOST_STEPS = 2**31
QUICK_PIXELS = 512 * 512  # of pictures that are decoded where they came


@dataclass(frozen=True)
class Call:
    """What a client asks.

    Args:
        details: Whether it wants normalized actions and probabilities as well.
    """

    request: Request
    request_id: str | int | None = None
    details: bool = False


@dataclass(frozen=True)
class Reset:
    """A client says that its episode has ended."""

    session: str | None
    request_id: str | int | None = None


class Reader:
    """Messages for one model.

    Args:
        mapping: Further names, {name in the message: camera, "state", "instruction", or "" for what is to be ignored}.

    Raises:
        ValueError: If `mapping` leads to what the model does not take.
    """

    def __init__(self, info: ModelInfo, limits: Limits, mapping: Mapping[str, str] | None = None):
        self.info, self.limits = info, limits
        self.mapping: dict[str, str] = {}
        known = (*info.cameras, STATE[0], INSTRUCTION[0], "")
        for name, target in (mapping or {}).items():
            if target not in known:
                raise ValueError(
                    f"mapping={name}={target} (--map): it leads to '{target}'.{closest(target, known)} This model "
                    f"takes {', '.join(known[:-1])}; {name}= lets what comes under that name be ignored."
                )
            if self.mapping.setdefault(_plain(name), target) != target:
                raise ValueError(
                    f"mapping={name}={target} (--map): '{_plain(name)}' is mapped already, to "
                    f"'{self.mapping[_plain(name)]}'. What stands before a name ({', '.join(PREFIXES)}) tells nothing."
                )

    def read(self, message: Any, session: str | None = None, arrived: float | None = None) -> Call | Reset:
        """What a message asks.

        Args:
            message: As `wire` reads it: arrays, or image files as bytes or base64.
            session: Of messages that name none.
            arrived: When it came, `time.monotonic()`; default: now.

        Raises:
            BadRequest, TooLarge: With what this model takes.
        """
        if not isinstance(message, dict):
            raise BadRequest(f"a {type(message).__name__} came: expected a map. {self.expected()}")
        request_id = self._request_id(message.get("request_id"))
        try:
            return self._read(
                self._sort(message), request_id, session, time.monotonic() if arrived is None else arrived
            )
        except Refusal as refusal:
            refusal.request_id = request_id
            raise

    def _read(
        self, found: Mapping[str, Any], request_id: str | int | None, session: str | None, arrived: float
    ) -> Call | Reset:
        session = short_text("session", found.get("session"), self.limits) or session
        endpoint = found.get("endpoint", "infer")
        if endpoint == "reset":
            return Reset(session, request_id)
        if endpoint != "infer":
            raise BadRequest(f"endpoint={shown(endpoint)}: expected 'infer' or 'reset'.")
        key = self.info.key(short_text("unnorm_key", found.get("unnorm_key"), self.limits))
        instruction = self._instruction(found.get("instruction"))
        state = self._state(found, self.info.datasets[key].state_dim)
        committed = self._committed(found.get("committed"), self.info.datasets[key].spec.action_dim)
        step = _plain_int(found.get("step"))
        if step is not None and not (type(step) is int and 0 <= step < MOST_STEPS):
            raise BadRequest(f"step={shown(step)}: expected the number of the step in its episode, from 0 on.")
        deadline = self._deadline(found.get("timeout_ms"), arrived)
        flags = {name: found.get(name, False) for name in ("details", "distributions")}
        for name, value in flags.items():
            if not isinstance(value, (bool, np.bool_)):
                raise BadRequest(f"{name}={shown(value)}: expected true or false.")
        images = {camera: pixels(name, image, self.limits) for camera, (name, image) in self._cameras(found).items()}
        request = Request(
            Observation(images, state, instruction, committed, step),
            key,
            session,
            deadline,
            distributions=bool(flags["distributions"]),
        )
        return Call(request, request_id, bool(flags["details"]))

    def is_quick(self, message: Any) -> bool:
        """Whether to read it takes about a millisecond: there is no large picture to decode in it."""
        values = (value for _, value in _flat(message)) if isinstance(message, dict) else ()
        return is_quick(values, QUICK_PIXELS)

    def expected(self) -> str:
        """What a message has to hold, in words."""
        cameras = [
            f"'{camera}' (also {', '.join(name for name in VIEWS.get(VIEW_OF.get(camera, ''), ()) if name != camera)})"
            if camera in VIEW_OF
            else f"'{camera}'"
            for camera in self.info.cameras
        ]
        dims = {dataset.state_dim for dataset in self.info.datasets.values()} - {None}
        state = f"; 'state' of {' or '.join(map(str, sorted(dims)))} numbers" if dims else ""  # type: ignore[type-var]
        return (
            f"This model takes: images {', '.join(cameras)}{state}; 'instruction' (also {', '.join(INSTRUCTION[1:])}); "
            f"and, if wanted, {', '.join((SESSION[0], *OPTIONS))}. Names that differ: openvla serve --map "
            f"NAME={self.info.cameras[0]}."
        )

    # Names ------------------------------------------------------------------------------------------------------------

    def _sort(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """{one name for each thing: value}; images by the name that came, under "images"."""
        found: dict[str, Any] = {"images": {}}
        origin: dict[str, str] = {}
        for given, value in _flat(message):
            target = self.mapping.get(_plain(given))
            name = target or self._own_camera(given) or _plain(given)
            if target == "" or name in IGNORED:
                continue
            place = next((group[0] for group in (INSTRUCTION, STATE, SESSION) if name in group), name)
            if name in VIEW_OF or name in self.info.cameras:
                place, kept = name, found["images"]
            elif place in (INSTRUCTION[0], STATE[0], SESSION[0], *STATE_PARTS, *OPTIONS):
                kept = found
            else:
                known = (*self.info.cameras, *VIEW_OF, *INSTRUCTION, *STATE, *SESSION, *OPTIONS)
                raise BadRequest(
                    f"'{given:.100}': nobody knows that name.{closest(name[:100], known)} {self.expected()}"
                )
            if place in kept and not (isinstance(value, str) and isinstance(kept[place], str) and kept[place] == value):
                raise BadRequest(f"'{origin[place]:.100}' and '{given:.100}' both say what '{place}' is: send one.")
            kept[place], origin[place] = value, given
        return found

    def _own_camera(self, given: str) -> str | None:
        """The camera of the model that is called so to the letter, as "observation.images.front" may be."""
        while given not in self.info.cameras:
            prefix = next((prefix for prefix in PREFIXES if given.startswith(prefix)), None)
            if prefix is None:
                return None
            given = given.removeprefix(prefix)
        return given

    def _cameras(self, found: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
        """{camera of the model: (name that came, image)}."""
        images, cameras = found["images"], self.info.cameras
        if len(cameras) == len(images) == 1:  # a camera of a name of its own sees the scene
            view, name = VIEW_OF.get(cameras[0], "primary"), next(iter(images))
            if name == cameras[0] or VIEW_OF[name] == view:
                return dict(zip(cameras, images.items()))
        chosen = {}
        for camera in cameras:
            view = VIEW_OF.get(camera, camera)
            names = [camera] if camera in images else [name for name in images if VIEW_OF.get(name, name) == view]
            if len(names) != 1:
                came = ", ".join(images) or "none"
                problem = f"{' and '.join(names)} could be" if names else "there is none for"
                raise BadRequest(f"images: {problem} '{camera}'; these came: {came}. {self.expected()}")
            chosen[camera] = (names[0], images[names[0]])
        return chosen

    # Values -----------------------------------------------------------------------------------------------------------

    def _request_id(self, value: Any) -> str | int | None:
        value = _plain_int(value)
        if type(value) is not int:
            return short_text("request_id", value, self.limits)
        if abs(value) >= MOST_STEPS:
            raise BadRequest(f"request_id={shown(value)}: expected text, or a number below {MOST_STEPS}.")
        return value

    def _instruction(self, value: Any) -> str:
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"is {type(value).__name__} and no text"
            raise BadRequest(f"instruction {problem}. {self.expected()}")
        if len(value) > self.limits.instruction_letters:
            raise TooLarge(f"instruction: {len(value)} letters, at most {self.limits.instruction_letters}.")
        if any("\ud800" <= letter <= "\udfff" for letter in value) or not has_words(value):
            raise BadRequest("instruction: it says nothing. Expected words, such as 'open the drawer'.")
        return value

    def _state(self, found: Mapping[str, Any], state_dim: int | None) -> np.ndarray:
        """(state_dim,) float32; empty for a model that takes none, whatever came: robots send theirs to every model."""
        parts = [name for name in STATE_PARTS if name in found]
        if parts and STATE[0] in found:
            raise BadRequest(f"'{STATE[0]}' and '{parts[0]}' both say what the state is: send one.")
        if state_dim is None:
            return np.zeros(0, np.float32)
        if missing := [name for name in STATE_PARTS if parts and name not in found]:
            raise BadRequest(
                f"'{parts[0]}' came without '{missing[0]}': DROID's state is both, and what one alone is to a model of "
                f"{state_dim} numbers is not clear. Send both, or 'state' (or openvla serve --map {parts[0]}=state)."
            )
        values = [found[name] for name in parts] or ([found[STATE[0]]] if STATE[0] in found else [])
        if not values:
            raise BadRequest(f"state is missing: this model takes {state_dim} numbers. {self.expected()}")
        rows = [np.atleast_1d(numbers("state", value, self.limits.state_numbers)) for value in values]
        if any(row.ndim != 1 for row in rows) or sum(map(len, rows)) != state_dim:
            shapes = " and ".join(str(row.shape) for row in rows)
            raise BadRequest(f"state: shape {shapes} came, expected ({state_dim},).")
        with np.errstate(over="ignore"):
            state = np.concatenate(rows).astype(np.float32)
        if not np.isfinite(state).all():
            raise BadRequest("state: it holds numbers that float32 does not.")
        return state

    def _committed(self, value: Any, action_dim: int) -> np.ndarray | None:
        if value is None:
            return None
        steps = numbers("committed", value, self.info.chunk * action_dim)
        if steps.size == 0:
            return None
        if steps.ndim != 2 or steps.shape[1] != action_dim or len(steps) >= self.info.chunk:
            raise BadRequest(
                f"committed: shape {steps.shape} came, expected (n, {action_dim}) with n below {self.info.chunk}, the "
                "actions of an answer."
            )
        return steps

    def _deadline(self, value: Any, arrived: float) -> float | None:
        if value is None:
            return None
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not (number and 0 < value <= self.limits.timeout_ms):
            most = f"{self.limits.timeout_ms:g}"
            raise BadRequest(f"timeout_ms={shown(value)}: expected a number above 0 and up to {most}.")
        return arrived + float(value) / 1000


def _flat(message: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in message.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _plain_int(value: Any) -> Any:
    """A whole number of numpy's, as loops over `np.arange` count with, as one of Python's."""
    return int(value) if isinstance(value, np.integer) else value


def _plain(name: str) -> str:
    """A name without what stands before it."""
    name = name.replace(".", "/")
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix) and name != prefix), None):
        name = name.removeprefix(prefix)
    return name
