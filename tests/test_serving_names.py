"""What each client's observation is read as; what could mean two things is refused."""

import base64
import struct
import tracemalloc

import numpy as np
import pytest
from fake_serving import FakeModel

from openvla.options.serving import Limits
from openvla.serving import wire
from openvla.serving.contract import BadRequest, TooLarge
from openvla.serving.names import Call, Reader, Reset


def image(level: int, shape=(6, 9, 3)) -> np.ndarray:
    return np.full(shape, level, np.uint8)


def reader(*cameras: str, mapping=None, limits=None, **model) -> Reader:
    return Reader(FakeModel(cameras or ("primary",), **model).info, limits or Limits(), mapping)


def read(made: Reader, message: dict, **given) -> Call:
    call = made.read(message, **given)
    assert isinstance(call, Call)
    return call


def levels(made: Reader, message: dict) -> dict[str, int]:
    """Which gray each camera of the model sees."""
    images = read(made, message).request.observation.images
    assert all(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 for pixels in images.values())
    return {camera: int(pixels[0, 0, 0]) for camera, pixels in images.items()}


DROID = {
    "observation/exterior_image_1_left": image(1),
    "observation/wrist_image_left": image(3),
    "observation/joint_position": np.arange(7.0),
    "observation/gripper_position": np.array([0.5]),
    "prompt": "open the drawer",
}
LIBERO = {
    "observation/image": image(1),
    "observation/wrist_image": image(3),
    "observation/state": np.arange(8.0),
    "prompt": "open the drawer",
}
ALOHA = {
    "images": {
        "cam_high": image(1, (3, 6, 9)),
        "cam_low": image(2, (3, 6, 9)),
        "cam_left_wrist": image(4, (3, 6, 9)),
        "cam_right_wrist": image(5, (3, 6, 9)),
    },
    "state": np.arange(14.0),
    "prompt": "open the drawer",
}
AGIBOT = {
    "images": {
        "top_head": image(1, (3, 6, 9)),
        "hand_left": image(4, (3, 6, 9)),
        "hand_right": image(5, (3, 6, 9)),
    },
    "state": np.arange(14.0),
    "eef": {"left": np.zeros(7), "right": np.zeros(7)},
    "prompt": "open the drawer",
    "task_name": "drawers",
    "endpoint": "infer",
    "session_id": "robot 1",
}
VLA_EVAL = {
    "images": {"agentview": image(1), "wrist": image(3)},
    "task_description": "open the drawer",
    "state": np.arange(8.0),
}
OFT = {"full_image": image(1), "wrist_image": image(3), "state": np.arange(8.0), "instruction": "open the drawer"}
LEROBOT = {
    "observation.images.primary": image(1),
    "observation.images.wrist": image(3),
    "observation.state": np.arange(8.0),
    "task": "open the drawer",
}
CLIENTS = {
    "droid": DROID,
    "libero": LIBERO,
    "aloha": ALOHA,
    "agibot": AGIBOT,
    "vla_eval": VLA_EVAL,
    "oft": OFT,
    "lerobot": LEROBOT,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_model_of_one_camera_sees_the_scene(client):
    made = reader("primary")
    assert levels(made, CLIENTS[client]) == {"primary": 1}
    observation = read(made, CLIENTS[client]).request.observation
    assert observation.instruction == "open the drawer" and observation.state.shape == (0,)


@pytest.mark.parametrize("client", ["droid", "libero", "oft", "vla_eval", "lerobot"])
@pytest.mark.parametrize("cameras", [("primary", "wrist"), ("wrist_image", "full_image")])
def test_a_model_of_two_sees_scene_and_wrist(client, cameras):
    made = reader(*cameras, state_dim=8)
    expected = {"primary": 1, "full_image": 1, "wrist": 3, "wrist_image": 3}
    assert levels(made, CLIENTS[client]) == {camera: expected[camera] for camera in cameras}
    state = read(made, CLIENTS[client]).request.observation.state
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state, [*range(7), 0.5] if client == "droid" else range(8))


@pytest.mark.parametrize("client", ["aloha", "agibot"])
def test_a_model_of_two_arms_sees_both_wrists(client):
    made = reader("primary", "left_wrist", "right_wrist", state_dim=14)
    assert levels(made, CLIENTS[client]) == {"primary": 1, "left_wrist": 4, "right_wrist": 5}
    assert read(made, CLIENTS[client]).request.observation.state.shape == (14,)


@pytest.mark.parametrize(
    "name",
    ["image", "observation/image", "observation.image", "observation/exterior_image_1_left", "base_image",
     "primary_image", "full_image", "primary"],
)  # fmt: skip
@pytest.mark.parametrize("camera", ["primary", "image", "front"])
def test_one_image_alone_under_any_name_of_the_scene_is_the_camera(name, camera):
    assert levels(reader(camera), {name: image(7), "instruction": "go"}) == {camera: 7}


@pytest.mark.parametrize("camera, name", [
    ("primary", "wrist_image"), ("image", "hand_left"), ("front", "wrist_image"), ("wrist", "image"),
    ("image", "cam_low"),
])  # fmt: skip
def test_one_image_alone_of_another_view_is_refused(camera, name):
    with pytest.raises(BadRequest, match=f"there is none for '{camera}'; these came: {name}"):
        levels(reader(camera), {name: image(7), "instruction": "go"})
    assert levels(reader(camera, mapping={name: camera}), {name: image(7), "instruction": "go"}) == {camera: 7}


def test_nested_names_are_those_with_strokes():
    assert levels(reader(), {"observation": {"image": image(7), "prompt": "go"}}) == {"primary": 7}


@pytest.mark.parametrize("name", ["prompt", "instruction", "task", "task_description", "language_instruction"])
def test_an_instruction_has_many_names(name):
    call = read(reader(), {"image": image(0), name: "lift the lid"})
    assert call.request.observation.instruction == "lift the lid"


def test_the_same_instruction_twice_is_one():
    assert read(reader(), {"image": image(0), "prompt": "go", "task": "go"}).request.observation.instruction == "go"


def test_a_camera_that_is_called_as_data_sets_call_theirs():
    """The name of the model itself was one that nobody knew, and the answer said to send it."""
    names = ("observation.images.front", "images/hand")
    for sent in (dict(zip(names, (image(1), image(2)))), {"images": dict(zip(names, (image(1), image(2))))}):
        seen = read(reader(*names), {**sent, "prompt": "go"}).request.observation.images
        assert {name: pixels[0, 0, 0] for name, pixels in seen.items()} == {names[0]: 1, names[1]: 2}


def test_a_name_is_mapped_once():
    """Of two that are the same without what stands before them the last one counted, silently."""
    with pytest.raises(ValueError, match="'cam' is mapped already, to 'primary'"):
        reader("primary", "wrist", mapping={"observation/cam": "primary", "images/cam": "wrist"})
    assert reader("primary", "wrist", mapping={"observation/cam": "primary", "cam": "primary"})


def test_all_else_that_a_request_holds():
    made = reader(chunk=4)
    given = {"step": 3, "committed": np.zeros((2, 7)), "timeout_ms": 50, "request_id": "a", "session": "one"}
    flags = {"details": True, "distributions": True}
    call = read(made, {"image": image(0), "prompt": "go", **given, **flags}, arrived=100.0)
    assert (call.request_id, call.details, call.request.distributions) == ("a", True, True)
    assert (call.request.session, call.request.deadline, call.request.unnorm_key) == ("one", 100.05, "robot")
    assert call.request.observation.step == 3 and call.request.observation.committed.shape == (2, 7)
    assert read(made, {"image": image(0), "prompt": "go"}, session="own").request.session == "own"
    assert made.read({"endpoint": "reset", "session_id": "one", "request_id": 4}) == Reset("one", 4)
    call = read(made, {"image": image(0), "prompt": "go", "step": np.int64(3), "request_id": np.uint8(4)})
    assert (call.request.observation.step, call.request_id) == (3, 4)
    assert type(call.request.observation.step) is type(call.request_id) is int  # which JSON has


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_files_are_pictures(kind):
    data = wire.picture_file(image(128), kind)
    assert levels(reader(), {"image": data, "prompt": "go"})["primary"] == pytest.approx(128, abs=1)


@pytest.mark.parametrize(
    "pixels",
    [image(9), image(9, (3, 6, 9)), image(9, (6, 9)), image(9, (1, 6, 9)), np.full((6, 9, 3), 9 / 255, np.float32)],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_pixels_come_in_any_order(pixels):
    call = read(reader(), {"image": pixels, "prompt": "go"})
    np.testing.assert_array_equal(call.request.observation.images["primary"], image(9))


def damaged() -> bytes:
    """A JPEG of whose middle a part is lost."""
    data = wire.picture_file(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    return data[: len(data) // 2] + data[-len(data) // 4 :]


GOOD = {"image": image(0), "prompt": "go"}
REFUSED = {
    "two scenes": ({**GOOD, "observation/exterior_image_1_left": image(1)}, "could be 'primary'"),
    "one name twice": ({**GOOD, "observation/image": image(1)}, "both say what 'image' is"),
    "unknown": ({**GOOD, "front_camera": image(1)}, "nobody knows that name"),
    "without a name": ({**GOOD, "": 1}, "nobody knows that name"),
    "unknown and empty": ({**GOOD, "imgae": {"left": {}}}, "nobody knows that name"),
    "unknown alone": ({"front_camera": image(1), "prompt": "go"}, "nobody knows that name"),
    "misspelt": ({"imgae": image(1), "prompt": "go"}, "Did you mean 'image'"),
    "none": ({"prompt": "go"}, "there is none for 'primary'"),
    "two instructions": ({**GOOD, "task": "stay"}, "both say what 'instruction' is"),
    "no instruction": ({"image": image(0)}, "instruction is missing"),
    "empty instruction": ({"image": image(0), "prompt": "  "}, "it says nothing"),
    "invisible": ({"image": image(0), "prompt": "\u200b\n"}, "it says nothing"),
    "no text": ({"image": image(0), "prompt": b"go"}, "no text"),
    "five axes": ({**GOOD, "image": image(0, (1, 1, 6, 9, 3))}, "expected .height, width, 3"),
    "two images in one": ({**GOOD, "image": image(0, (2, 6, 9, 3))}, "expected .height, width, 3"),
    "no colours": ({**GOOD, "image": image(0, (6, 9, 2))}, "expected .height, width, 3"),
    "which axis": ({**GOOD, "image": image(0, (3, 200, 3))}, "which axis"),
    "strip": ({**GOOD, "image": image(0, (1000, 5, 3))}, "strip"),
    "empty image": ({**GOOD, "image": image(0, (0, 9, 3))}, "empty"),
    "NaN pixels": ({**GOOD, "image": np.full((6, 9, 3), np.nan)}, "NaN"),
    "dark or bright": ({**GOOD, "image": np.full((6, 9, 3), 1.5)}, "do not tell"),
    "negative pixels": ({**GOOD, "image": np.full((6, 9, 3), -1)}, "expected 0 to 255"),
    "no file": ({**GOOD, "image": b"GIF89a"}, "no JPEG or PNG"),
    "damaged file": ({**GOOD, "image": damaged()}, "image 'image': .*it is damaged"),
    "no base64": ({**GOOD, "image": "frame.png"}, "base64"),
    "list": ({**GOOD, "image": [[0, 0], [0, 0]]}, "expected an array"),
    "no key": ({**GOOD, "unnorm_key": "bridge"}, "expected one of robot"),
    "key": ({**GOOD, "unnorm_key": 5}, "unnorm_key=5: expected text"),
    "step": ({**GOOD, "step": 1.5}, "step=1.5: .* from 0 on"),
    "a large step": ({**GOOD, "step": 10**4000}, "step=10{79}: .* from 0 on"),
    "flag": ({**GOOD, "details": [{}]}, "details=list: expected true or false"),
    "wait": ({**GOOD, "timeout_ms": "5"}, "timeout_ms='5': expected a number above 0"),
    "committed": ({**GOOD, "committed": np.zeros((1, 6))}, "with n below 4"),
    "all committed": ({**GOOD, "committed": np.zeros((4, 7))}, "with n below 4"),
    "committed NaN": ({**GOOD, "committed": np.full((1, 7), np.nan)}, "NaN"),
    "committed ragged": ({**GOOD, "committed": [[0.0], [0.0, 1.0]]}, "rows of one length"),
    "committed text": ({**GOOD, "committed": "abc"}, "expected numbers"),
    "session": ({**GOOD, "session": "a\n"}, r"session='a\\n': .* control characters"),
    "no session": ({**GOOD, "session": ""}, "session='': expected text that is not empty"),
    "request": ({**GOOD, "request_id": [1]}, "request_id=list: expected text"),
    "reset": ({**GOOD, "endpoint": "stop"}, "endpoint='stop': expected 'infer' or 'reset'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_words(name):
    message, expected = REFUSED[name]
    with pytest.raises(BadRequest, match=expected) as raised:
        reader(chunk=4).read({**message})
    assert len(str(raised.value)) < 1500
    for word in ("primary", "instruction"):
        assert word in str(raised.value) or "This model takes" not in str(raised.value)


def test_a_model_of_two_cameras_does_not_guess():
    made = reader("primary", "wrist")
    with pytest.raises(BadRequest, match="there is none for 'wrist'"):
        made.read({"image": image(0), "prompt": "go"})
    with pytest.raises(BadRequest, match="there is none for 'wrist'"):
        made.read(ALOHA)  # which of the two wrists?
    with pytest.raises(BadRequest, match="there is none for 'primary'"):
        made.read({"wrist": image(0), "hand_left": image(1), "prompt": "go"})


def test_a_camera_of_the_model_s_own_name_comes_first():
    assert levels(reader("front"), {"front": image(5), "image": image(1), "prompt": "go"}) == {"front": 5}
    assert levels(reader("primary"), {"primary": image(5), "image": image(1), "prompt": "go"}) == {"primary": 5}


STATES = {
    "missing": ({}, "state is missing"),
    "short": ({"state": np.zeros(7)}, r"shape \(7,\) came"),
    "rows": ({"state": np.zeros((1, 8))}, r"shape \(1, 8\) came"),
    "parts of another sum": ({"joint_position": np.zeros(6), "gripper_position": 0.5}, "expected .8,"),
    "NaN": ({"state": [0.0] * 7 + [float("nan")]}, "NaN"),
    "infinite": ({"state": [0.0] * 7 + [float("inf")]}, "NaN or infinite"),
    "beyond float32": ({"state": [0.0] * 7 + [1e300]}, "float32"),
    "huge": ({"state": [0] * 7 + [10**400]}, "expected numbers"),
    "text": ({"state": ["0"] * 8}, "expected numbers"),
    "true": ({"state": [True] * 8}, "expected numbers"),
    "nothing": ({"state": [0.0] * 7 + [None]}, "expected numbers"),
    "a map": ({"state": [{}] * 8}, "expected numbers"),
    "text of no letters": ({"state": [""] * 8}, "expected numbers"),
    "as many numbers by chance": ({"joint_position": np.zeros(8)}, "without 'gripper_position'.*--map joint_position="),
    "the other part alone": ({"observation/gripper_position": np.zeros(8)}, "without 'joint_position'.*8 numbers"),
    "both": ({"state": np.zeros(8), "joint_position": np.zeros(7)}, "send one"),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_none_are_refused(name):
    given, expected = STATES[name]
    with pytest.raises(BadRequest, match=expected):
        reader(state_dim=8).read({**GOOD, **given})


@pytest.mark.parametrize("letter", ["a", b"a"])
def test_texts_among_numbers_take_no_memory(letter):
    """An array has for each of them the room of the longest: 130 kB became 3.6 GB."""
    for value in ([letter * 20_000] + [letter] * 2000, [[letter * 20_000, *[letter] * 2000]]):
        tracemalloc.start()
        try:
            with pytest.raises(BadRequest, match="committed: expected numbers"):
                reader().read({**GOOD, "committed": value})
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_other_names_are_mapped():
    mapping = {"cam/front": "primary", "observation/q": "state", "say": "instruction", "depth": ""}
    made = reader("primary", state_dim=2, mapping=mapping)
    message = {"cam": {"front": image(5)}, "observation.q": [1, 2], "say": "go", "depth": image(0)}
    assert levels(made, message) == {"primary": 5}
    assert read(made, message).request.observation.state.tolist() == [1, 2]
    with pytest.raises(ValueError, match="--map.*takes primary, state, instruction"):
        reader(mapping={"front": "primari"})


def test_several_datasets_need_a_key():
    made = reader(keys=("a", "b"))
    with pytest.raises(BadRequest, match="unnorm_key is missing: expected one of a, b"):
        made.read(GOOD)
    assert read(made, {**GOOD, "unnorm_key": "b"}).request.unnorm_key == "b"


def test_committed_steps_have_a_limit_of_their_own():
    made = reader(chunk=100, limits=Limits(state_numbers=3))
    assert read(made, {**GOOD, "committed": np.zeros((99, 7))}).request.observation.committed.shape == (99, 7)
    with pytest.raises(TooLarge, match="at most 700"):
        made.read({**GOOD, "committed": np.zeros((101, 7))})


def test_limits_are_kept():
    assert (Limits().message_bytes, Limits().picture_pixels) == (wire.MOST_BYTES, wire.MOST_PIXELS)
    limits = Limits(picture_pixels=100, state_numbers=9, instruction_letters=5, name_letters=3)
    made = reader(limits=limits, state_dim=3)
    good = {**GOOD, "state": np.zeros(3)}
    read(made, good)
    for given in (
        {"image": image(0, (11, 11, 3))},
        {"image": wire.picture_file(image(0, (11, 11, 3)), "PNG")},
        {"state": np.zeros(10)},
        {"prompt": "gogogo"},
        {"session": "abcd"},
        {"request_id": "abcd"},
        {"unnorm_key": "abcd"},
    ):
        with pytest.raises(TooLarge):
            made.read({**good, **given})


def test_a_refusal_says_which_request_it_is_of():
    with pytest.raises(BadRequest) as raised:
        reader().read({"prompt": "go", "request_id": 12})
    assert raised.value.content()["request_id"] == 12


def test_what_takes_longer_to_read_is_told():
    made = reader()
    large = wire.picture_file(image(0, (600, 600, 3)), "PNG")
    assert made.is_quick(GOOD) and made.is_quick({**GOOD, "image": wire.picture_file(image(0), "PNG")})
    for picture in (
        large,
        base64.b64encode(large).decode(),
        "data:image/png;base64," + base64.b64encode(large).decode(),
    ):
        assert not made.is_quick({"images": {"primary": picture}, "prompt": "go"})
    small = wire.picture_file(image(0), "PNG")
    packed = small[:33] + struct.pack(">I4s3sI", 3, b"iCCP", b"a\0\0", 0) + small[33:]
    assert not made.is_quick({**GOOD, "image": packed})  # however few pixels it has
    assert not made.is_quick({**GOOD, **{f"image{number}": small for number in range(17)}})
    assert made.is_quick([]) and made.is_quick({**GOOD, "image": b"no file", "prompt": "go " * 100})
