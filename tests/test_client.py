"""`openvla_client`: the same call over both protocols, and nothing that comes back is believed unseen.

Against the app of `openvla serve` with a model without torch (fake_serving.py), and against a server that answers what
it is told (scripted_server.py).
"""

import asyncio
import dataclasses
import gc
import io
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import openvla_client
import pytest
from aiohttp import WSMsgType, web
from fake_serving import FakeModel
from openvla_client import (
    Audit,
    BadAnswer,
    Command,
    NoAction,
    NoAnswer,
    NotReached,
    Refused,
    State,
    connect,
    connect_async,
    digest,
    messages,
)
from openvla_client.async_client import AsyncClient
from openvla_client.connection import Address
from openvla_client.messages import picture, read_info
from openvla_client.wire import pack, picture_file, unpack
from PIL import Image, ImageFile
from scripted_server import Scripted, metadata, right

from openvla.options.serving import Limits
from openvla.pixels_openvla import load_image
from openvla.serving import service


SCHEMES = ("ws", "http")
IMAGE = np.full((8, 8, 3), 90, np.uint8)


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)


@contextmanager
def asking(scripted: Scripted, scheme: str, **options):
    with scripted.running(), connect(scripted.url(scheme), **options) as client:
        yield client


# What is sent ---------------------------------------------------------------------------------------------------------


def test_a_call(scheme):
    scripted = Scripted()
    with asking(scripted, scheme, key="secret") as client:
        assert (client.info.model, client.info.cameras, client.info.chunk) == ("scripted", ("image",), 2)
        answer = client.act(IMAGE, "open the drawer", state=[1, 2], step=3, committed=[[0.1, 0, 0]], details=True)
    assert answer.actions.tolist() == [[0.25] * 3] * 2 and answer.actions.dtype == np.float64
    assert answer.actions.flags.writeable and answer.timing == {"infer_ms": 1.5} and 0 < answer.seconds < 10
    (sent,) = scripted.messages
    assert np.array_equal(sent["images"]["image"], IMAGE) and sent["instruction"] == "open the drawer"
    assert sent["state"].tolist() == [1, 2] and sent["committed"].tolist() == [[0.1, 0, 0]]
    assert (sent["unnorm_key"], sent["step"], sent["details"]) == ("robot", 3, True)
    assert 0 < sent["timeout_ms"] <= 10_000 and sent["session"]
    assert scripted.headers[0]["Authorization"] == "Api-Key secret"


def test_pictures_of_any_mode_are_seen_as_the_model_s_own_reader_sees_them():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)
    rgb, turned = Image.fromarray(pixels[..., :3]), Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    rgb.save(file, "JPEG", exif=turned)
    deep = Image.fromarray((pixels[..., 0].astype(np.uint16) + 1) * 250)
    for image in (
        rgb, Image.fromarray(pixels), deep, Image.open(file), rgb.convert("P"), rgb.convert("L"), rgb.convert("LA"),
        rgb.convert("1"), rgb.convert("CMYK"), rgb.convert("YCbCr"),
    ):  # fmt: skip
        sent = picture(image, "raw", 95)
        np.testing.assert_array_equal(np.asarray(load_image(sent)), np.asarray(load_image(image)), image.mode)
    for mode in ("F", "I"):
        with pytest.raises(ValueError, match=f"mode {mode}: expected RGB"):
            picture(rgb.convert(mode), "raw", 95)


def test_a_file_that_two_threads_look_at_is_decoded_by_one(monkeypatch):
    """By both at once it became other pixels, without an error."""
    usual, inside, most = ImageFile.ImageFile.load, [], []

    def load(self):
        if not self.tile:  # it is decoded
            return usual(self)
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return usual(self)
        finally:
            inside.remove(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    opened, found = Image.open(io.BytesIO(picture_file(IMAGE, "PNG"))), []
    looks = [lambda: found.append(picture(opened, "raw", 95)), lambda: digest(opened)]
    threads = [threading.Thread(target=look) for look in looks * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] and all((one == IMAGE).all() for one in found) and len(found) == 2


def test_pictures_that_cannot_be_read_are_told_before_anything_is_asked():
    exif, cut, closed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    noise = Image.effect_noise((64, 64), 90)
    noise.save(exif, "PNG", exif=b"Exif\0\0MM")
    noise.save(cut, "PNG")
    noise.save(closed, "PNG")
    cut.truncate(1000)
    gone = Image.open(closed)
    closed.close()
    for image in (Image.open(exif), Image.open(cut), gone):
        with pytest.raises(ValueError, match=r"An image of \(64, 64\) cannot be read"):
            picture(image, "raw", 95)


def test_a_server_is_not_asked_to_wait_longer_than_it_would():
    scripted = Scripted()
    with asking(scripted, "ws", timeout=3600) as client:
        client.act(IMAGE, "go")
    assert [message["timeout_ms"] for message in scripted.messages] == [Limits().timeout_ms]


@pytest.mark.parametrize("form", ["raw", "jpeg", "png"])
def test_images(form, tmp_path):
    scripted = Scripted()
    gradient = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "frame.png")
    with asking(scripted, "ws", images=form) as client:
        for image in (gradient, Image.fromarray(gradient), tmp_path / "frame.png", gradient[:, ::-1]):
            client.act({"image": image}, "go")
    sent = [message["images"]["image"] for message in scripted.messages]
    assert sent[2] == (tmp_path / "frame.png").read_bytes()
    if form == "raw":
        assert np.array_equal(sent[0], gradient) and np.array_equal(sent[3], gradient[:, ::-1])
    else:
        assert sent[0] == sent[1] and sent[0][:4] == (b"\x89PNG" if form == "png" else b"\xff\xd8\xff\xe0")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"images": np.zeros((8, 8, 3))}, "float64"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"\(8, 8\)"),
        ({"images": b"no picture"}, "JPEG"),
        ({"images": None}, "NoneType"),
        ({"images": np.ma.masked_equal(np.zeros((8, 8, 3), np.uint8), 0)}, "masked"),
        ({"state": np.ma.masked_equal([0.0, 1.0], 0)}, "expected numbers"),
        ({"images": np.zeros((4000, 4000, 3), np.uint8)}, "jpeg"),
        ({"unnorm_key": "bridge"}, "robot"),
        ({"timeout": 0}, "timeout"),
        ({"state": "high"}, "state='high': expected numbers"),
    ],
)
def test_what_is_wrong_before_it_is_sent(given, message):
    scripted = Scripted()
    with asking(scripted, "ws") as client:
        with pytest.raises(ValueError, match=message):
            client.act(**{"images": IMAGE, "instruction": "go", **given})
        with pytest.raises(FileNotFoundError, match="No image file at 'nowhere.png'. Give a local file"):
            client.act("nowhere.png", "go")
        assert not scripted.messages
        client.act(IMAGE, "go")
    assert scripted.connections == 1


def test_several_cameras_are_named():
    with asking(Scripted(metadata(cameras=["full_image", "wrist_image"])), "ws") as client:
        with pytest.raises(ValueError, match="wrist_image"):
            client.act(IMAGE, "go")
        client.act({"full_image": IMAGE, "wrist_image": IMAGE}, "go")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://robot", "http://", "ws:8000", "", 5, None, b"ws://robot", "ws://robot:port",
    "ws://robot:99999", "ws://[::1", "ws://my robot:8000"],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="ws://"):
        connect(url)


def test_the_password_of_a_proxy_stands_in_no_message(scheme):
    with pytest.raises(NotReached) as error:
        connect(f"{scheme}://me:secret@127.0.0.1:9", timeout=2)
    assert "secret" not in str(error.value) and f"{scheme}://127.0.0.1:9" in str(error.value)
    assert "secret" not in repr(Address("ws://robot", "secret"))


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"images": "webp"}, {"quality": 0}, {"key": " "}, {"key": "a\nb"}, {"key": "ключ"},
                {"key": 5}, {"key": b"key"}, {"quality": True}],
)  # fmt: skip
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError):
        connect("ws://127.0.0.1:1", **options)


def test_the_key_of_the_environment(scheme, monkeypatch):
    monkeypatch.setenv("OPENVLA_API_KEY", "from-environment")
    scripted = Scripted()
    with asking(scripted, scheme) as client:
        client.act(IMAGE, "go")
    assert scripted.headers[-1]["Authorization"] == "Api-Key from-environment"


def test_addresses_as_people_write_them():
    scripted = Scripted()
    with asking(scripted, "ws") as client, connect(client._client.address.url.replace("ws", "WS")) as other:
        other.act(IMAGE, "go")
        assert scripted.connections == 2  # over a WebSocket as well
        with pytest.raises(ValueError, match="expected ws://HOST:PORT"):
            connect(" " + client._client.address.url)
        with connect(scripted.url("http") + "/act") as other:  # as curl is given it
            other.act(IMAGE, "go")
        with pytest.raises(Refused, match="Give the address alone, ws://HOST:PORT"):
            connect(scripted.url("ws") + "/ws")


def test_names_are_found_as_the_system_finds_them(scheme, monkeypatch):
    """Where aiodns is installed, aiohttp asked by it, which knows neither .local nor all of nsswitch.conf."""
    asked, real = [], socket.getaddrinfo

    def found(host, *given, **more):
        asked.append(host)
        return real("127.0.0.1", *given, **more)

    monkeypatch.setattr("aiohttp.connector.DefaultResolver", None)
    scripted = Scripted()
    with scripted.running():
        monkeypatch.setattr(socket, "getaddrinfo", found)
        with connect(scripted.url(scheme).replace("127.0.0.1", "gpu-box.local")) as client:
            client.act(IMAGE, "go")
    assert "gpu-box.local" in asked


def test_an_async_client_is_of_one_event_loop(scheme):
    scripted = Scripted()
    with scripted.running():
        loop = asyncio.new_event_loop()
        client = loop.run_until_complete(connect_async(scripted.url(scheme)))
        with pytest.raises(NotReached, match="of another event loop"):
            asyncio.run(client.act(IMAGE, "go"))
        loop.run_until_complete(client.close())
        loop.close()


def test_a_proxy_is_told_to_compress_nothing(scheme):
    """Compressed answers are not read; aiohttp says by itself that they are."""
    scripted = Scripted()
    with asking(scripted, scheme) as client:
        client.act(IMAGE, "go")
    assert {headers["Accept-Encoding"] for headers in scripted.headers} == {"identity"}


# What comes back ------------------------------------------------------------------------------------------------------


def changed(**content):
    return lambda message: {**right(message), **content}


WRONG = {
    "NaN": changed(actions=np.array([[0.1, np.nan, 0], [0, 0, 0]])),
    "infinity": changed(actions=np.full((2, 3), np.inf)),
    "one action": changed(actions=np.zeros(3)),
    "too few": changed(actions=np.zeros((1, 3))),
    "another robot": changed(actions=np.zeros((2, 7))),
    "a list": changed(actions=[[0.0] * 3] * 2),
    "text": changed(actions="forward"),
    "none": changed(actions=None),
    "another request": changed(request_id=77),
    "no request": lambda message: {name: value for name, value in right(message).items() if name != "request_id"},
    "another session": changed(session="another"),
    "another step": changed(step=8),
    "a step that is an array": changed(step=np.array([1, 1])),
    "another model": changed(digest=np.zeros(2)),
    "another dataset": changed(unnorm_key="bridge"),
    "probabilities of another shape": changed(probabilities=np.zeros((2, 2))),
    "probabilities that are none": changed(normalized=np.full((2, 3), np.nan)),
    "no map": lambda message: [1, 2, 3],
    "no msgpack": lambda message: b"\xc1\xff\xff",
    "objects": lambda message: (
        b"\x81\xa7actions\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08aaaaaaaa\xc4\x05dtype\xa3|O8"
        b"\xc4\x05shape\x91\x01"
    ),
    "too large": lambda message: bytes(17 * 2**20),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_none(name, scheme):
    answers = [WRONG[name], right]
    scripted = Scripted(answer=lambda message: answers.pop(0)(message))
    with asking(scripted, scheme) as client:
        with pytest.raises((BadAnswer, NotReached) if name == "too large" else BadAnswer):
            client.act(IMAGE, "go", step=1)
        assert client.act(IMAGE, "go", step=2).actions.shape == (2, 3)  # over another connection


def test_a_step_that_numpy_counted_comes_back_as_a_number(scheme):
    with asking(Scripted(answer=lambda message: {**right(message), "step": int(message["step"])}), scheme) as client:
        assert client.act(IMAGE, "go", step=np.int64(3)).actions.shape == (2, 3)


@pytest.mark.parametrize(
    "first",
    [
        {}, [], b"\x00", metadata(chunk=0), metadata(datasets={}), metadata(cameras=[]), metadata(image_size=7),
        metadata(image_size=[float("inf"), 8]), metadata(digest=[1]), metadata(default_unnorm_key=["robot"]),
        metadata(datasets={"robot": {"names": ["a", "b"], "relative": ["false", "true"]}}),
    ],
)  # fmt: skip
def test_a_server_that_is_none_of_ours(first, scheme):
    with Scripted(first).running() as scripted, pytest.raises(BadAnswer, match="openvla serve|cannot be read"):
        connect(scripted.url(scheme))


def test_nobody_is_led_to_another_server(scheme):
    with Scripted().running() as other, Scripted(web.HTTPFound(other.url("http"))).running() as scripted:
        with pytest.raises(Refused) as caught:
            connect(scripted.url(scheme), key="secret")
        assert caught.value.code == "http_302" and not other.headers


def test_a_refusal_says_why(scheme):
    said = json.dumps({"error": "instruction is missing.", "code": "bad_request", "retry_after": 1.5})
    answers = [said, right, "no json", right]

    def answer(message):
        found = answers.pop(0)
        return found if isinstance(found, str) else found(message)

    scripted = Scripted(answer=answer)
    with asking(scripted, scheme) as client:
        with pytest.raises(Refused, match="instruction is missing") as caught:
            client.act(IMAGE, "go")
        assert (caught.value.code, caught.value.retry_after) == ("bad_request", 1.5)
        client.act(IMAGE, "go")
        with pytest.raises(Refused, match="did not say why"):
            client.act(IMAGE, "go")
        client.act(IMAGE, "go")
    assert scripted.connections == (scheme == "ws")  # it stays open


@pytest.mark.parametrize("wait", ["NaN", "Infinity", "-1", "1" + "0" * 400, '"1"', "null"])
def test_no_time_is_believed_that_nobody_can_wait(wait):
    scripted = Scripted(answer=lambda message: f'{{"error": "full", "code": "busy", "retry_after": {wait}}}')
    with asking(scripted, "ws") as client:
        with pytest.raises(Refused, match="full") as caught:
            client.act(IMAGE, "go")
        assert caught.value.retry_after is None
        scripted.answer = changed(server_timing={"a": 2**63, "b": float("nan"), "infer_ms": 2.0, "c": -1, "d": [1]})
        assert client.act(IMAGE, "go").timing == {"infer_ms": 2.0}


def test_a_refusal_of_arrays_is_one():
    refused = messages.read_refusal({"error": np.zeros(3), "code": np.zeros(2), "retry_after": np.zeros(1)}, "http_400")
    assert "did not say why" in str(refused) and (refused.code, refused.retry_after) == ("http_400", None)


class TooHeavy(Refused):
    """Of a program: made of something else."""

    def __init__(self):
        super().__init__("too heavy", "heavy")
        self.add_note("of the left arm")


def test_errors_go_from_one_process_to_another():
    """A pool of processes waited for ever for what it could not read."""
    for error in (
        TooHeavy(),
        Refused("no", "late", 3.0),
        NotReached("none"),
        BadAnswer("other"),
        NoAction("still", Command(None, "none", State.DEAD, 7.0)),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_what_a_server_says_takes_little_memory():
    """16 MiB of JSON became 430 MiB of small maps."""
    with Scripted("[" + "{}," * 2**21 + "{}]").running() as scripted:
        tracemalloc.start()
        try:
            with pytest.raises(BadAnswer, match="openvla serve"):
                connect(scripted.url("http"))
            assert tracemalloc.get_traced_memory()[1] < 60 * 2**20  # both sides of it
        finally:
            tracemalloc.stop()


def test_a_late_answer_goes_to_nobody(scheme):
    """The classic of a socket that is kept open: the answer to the last request taken for that to this one."""
    scripted = Scripted(answer=lambda message: None)
    with asking(scripted, scheme) as client:
        with pytest.raises(NoAnswer, match="0.05 s"):
            client.act(IMAGE, "go", timeout=0.05)
        scripted.answer = right
        assert client.act(IMAGE, "go").actions.shape == (2, 3)
    assert scripted.connections == (2 if scheme == "ws" else 0)


def test_a_picture_that_a_network_did_not_take_in_time_is_sent_no_more(scheme):
    """It stayed in memory, with its connection, for a quarter of an hour or for ever, and went before newer ones."""
    given_up, ended = threading.Event(), threading.Event()

    class Slow(Scripted):
        async def _act(self, request):
            try:
                await asyncio.to_thread(given_up.wait, 30)
                self.messages.append(await request.read())
                return web.Response()
            finally:
                ended.set()

        async def _socket(self, request):
            socket = web.WebSocketResponse(max_msg_size=2**26)
            await socket.prepare(request)
            await self._send(socket, self.first)
            request.transport.pause_reading()
            try:
                await asyncio.to_thread(given_up.wait, 30)
                request.transport.resume_reading()
                self.messages.extend([message async for message in socket if message.type is WSMsgType.BINARY])
                return socket
            finally:
                ended.set()

    with asking(slow := Slow(), scheme) as client:
        with pytest.raises(NoAnswer):
            client.act(np.zeros((3000, 3000, 3), np.uint8), "go", timeout=0.3)
        time.sleep(0.5)  # for a goodbye
        given_up.set()
        assert ended.wait(30)
    assert not slow.messages


def test_answers_nobody_asked_for():
    scripted = Scripted(answer=lambda message: [right(message), right(message)])
    with asking(scripted, "ws") as client:
        for _ in range(5):  # a duplicate is either seen before the next request, or is the answer to another one
            try:
                client.act(IMAGE, "go")
            except (BadAnswer, NotReached):
                pass
        scripted.answer = right
        with pytest.raises((BadAnswer, NotReached)) if client._client._connection.closed is False else nothing():
            client.act(IMAGE, "go")
        client.act(IMAGE, "go")


def test_a_connection_that_brings_what_nobody_asked_for_is_closed():
    """It kept its place with the server until the next call."""
    scripted = Scripted(answer=lambda message: [right(message), right(message)])
    with asking(scripted, "ws") as client:
        client.act(IMAGE, "go")
        end = time.monotonic() + 30
        while scripted._sockets and time.monotonic() < end:
            time.sleep(0.01)
        assert not scripted._sockets and client._client._connection.closed


@contextmanager
def nothing():
    yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_in_another_process_nobody_waits_for_ever(tmp_path):
    """Threads do not come along: a call would never return, and lines never be written."""
    audit = Audit(tmp_path / "audit.jsonl")
    with asking(Scripted(), "ws") as client:
        reader, writer = os.pipe()
        with messages._decoding:  # as another thread may do then
            child = os.fork()
        if not child:
            try:
                digest(Image.open(io.BytesIO(picture_file(IMAGE, "PNG"))))
                client.act(IMAGE, "go")
            except NotReached as error:
                audit.write({})
                client.close()
                os.write(writer, f"{error} {audit.lost} lost".encode())
            os._exit(0)
        try:
            assert select.select([reader], [], [], 60)[0]
            said = os.read(reader, 1000).decode()
            assert "another process" in said and "1 lost" in said
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            os.close(writer)
        client.act(IMAGE, "go")
    audit.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_ends_no_connection_of_the_other_process(scheme):
    """Collected in the fork, one of HTTP was taken out of the selector that both have: nothing came from it again."""
    scripted = Scripted()
    with scripted.running():
        client, loop = connect(scripted.url(scheme)), asyncio.new_event_loop()
        other = loop.run_until_complete(connect_async(scripted.url(scheme)))
        client.act(IMAGE, "go")
        loop.run_until_complete(other.act(IMAGE, "go"))
        if not (child := os.fork()):
            try:
                client.close()
                asyncio.run(other.act(IMAGE, "go"))  # over a connection of its own
                asyncio.run(other.close())
                del client, other
                gc.collect()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == 0 and client.act(IMAGE, "go").seconds < 9
        loop.run_until_complete(other.act(IMAGE, "go"))
        sessions = [message["session"] for message in scripted.messages]
        assert len(set(sessions)) == 3 and sessions[-1] == other.session and sessions[2] not in sessions[:2]
        client.close()
        loop.run_until_complete(other.close())
        loop.close()


def test_a_robot_that_stands_still_is_told_why(scheme):
    for observation, reason in (
        (IMAGE, "observation is ndarray: expected what act takes"),
        ({"image": IMAGE, "instruction": "go"}, "unexpected keyword argument 'image'"),
        ({"images": IMAGE, "instruction": "go"}, "Refused: no key"),
    ):
        scripted = Scripted(answer=lambda message: '{"error": "no key", "code": "unauthorized"}')
        with asking(scripted, scheme) as client:
            guard = client.guard(hz=10, fallback="raise", wait=5)
            with pytest.raises(NoAction, match=f"nothing is answered yet .*{reason}"):
                guard.step(observation)


@pytest.mark.parametrize(
    "given",
    [{"state": "x"}, {"state": ["1"]}, {"state": {"x": 1}}, {"state": [10**400]}, {"state": [[1], [1, 2]]},
     {"state": 1j}, {"committed": [["1"] * 7]}, {"committed": [None]}, {"step": "3"}, {"step": 3.0}, {"step": True},
     {"step": -1}, {"step": 10**30}, {"unnorm_key": ["robot"]}, {"unnorm_key": ""}, {"timeout": "5"}],
    ids=str,
)  # fmt: skip
def test_what_a_caller_gives_is_checked_before_anything_is_asked(given):
    scripted = Scripted(metadata(dims=7))
    with asking(scripted, "http") as client:
        with pytest.raises(ValueError, match=f"^{next(iter(given))}=.*: expected"):
            client.act(IMAGE, "go", **given)
    assert not scripted.messages


def test_a_guard_commits_fewer_actions_than_an_answer_has():
    with asking(Scripted(metadata(dims=7)), "http") as client:
        with pytest.raises(ValueError, match="commit=2: this model answers 2 actions"):
            client.guard(commit=np.int64(2))
        assert client.guard(commit=1).commit == 1


# Connections ----------------------------------------------------------------------------------------------------------


def test_nobody_there(scheme):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        with pytest.raises(NotReached, match="openvla serve"):
            connect(f"{scheme}://127.0.0.1:{taken.getsockname()[1]}", timeout=600)
        assert time.monotonic() - begin < 300  # at once, and not when the time is over


def test_somebody_who_says_nothing(scheme):
    """Half open: the connection is there, and nothing comes over it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(NoAnswer, match="0.1 s"):
            connect(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1)


@pytest.mark.parametrize("status", [503, 502, 504])
def test_a_server_that_is_starting_is_waited_for(scheme, status):
    """Also behind a proxy, which says 502 where nobody listens yet: to wait was given up at once."""
    scripted = Scripted(ready=status)
    with scripted.running():
        with pytest.raises(Refused, match=f"HTTP status {status}. .*wait=60") as caught:
            connect(scripted.url(scheme))
        assert caught.value.code == "busy"
        threading.Timer(0.3, lambda: setattr(scripted, "ready", 200)).start()
        with connect(scripted.url(scheme), wait=30) as client:
            client.act(IMAGE, "go")


def test_a_server_that_comes_later(scheme):
    scripted = Scripted()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    found = []
    thread = threading.Thread(
        target=lambda: found.append(connect(f"{scheme}://127.0.0.1:{port}", wait=30)), daemon=True
    )
    thread.start()
    time.sleep(0.3)
    with scripted.running(port):
        thread.join(30)
        with found[0] as client:
            client.act(IMAGE, "go")


def test_a_server_that_is_started_again(scheme):
    scripted = Scripted()
    with scripted.running():
        client = connect(scripted.url(scheme), timeout=5)
        client.act(IMAGE, "go")
    with client:
        with pytest.raises((NotReached, NoAnswer)):
            client.act(IMAGE, "go", timeout=0.3)
        with scripted.running(scripted.port):
            client.act(IMAGE, "go")
            client.act(IMAGE, "go")


def test_attempts_to_connect_are_spaced_out():
    scripted = Scripted()
    with scripted.running():
        client = connect(scripted.url("ws"))
    with client, socket.create_server(("127.0.0.1", scripted.port), backlog=64) as closing:
        attempts = []

        def turn_away():
            while True:
                try:
                    accepted, _ = closing.accept()
                except OSError:
                    return
                attempts.append(time.monotonic())
                accepted.close()

        thread = threading.Thread(target=turn_away, daemon=True)
        thread.start()
        with pytest.raises((NotReached, NoAnswer)):  # it may still believe in the connection that broke
            client.act(IMAGE, "go", timeout=0.1)
        begin = time.monotonic()
        while len(attempts) < 3:
            with pytest.raises((NotReached, NoAnswer)):
                client.act(IMAGE, "go", timeout=1.5)
        # Each counts twice: the library tries once more
        assert len(attempts) <= 6 + 10 * (time.monotonic() - begin), len(attempts)
        closing.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_server_that_hangs_up_at_once_is_asked_no_more_often_than_one_that_is_not_there():
    """It was connected to 600 times a second, until the call had no time left."""
    scripted = Scripted()

    async def twice(socket, content):  # in one piece; nobody asked for the second
        frame = b"\x82\x7e" + len(data := pack(content)).to_bytes(2, "big") + data
        socket._req.transport.write(frame + frame)

    scripted._send = twice
    with scripted.running(), pytest.raises(NotReached, match="the connection broke"):
        connect(scripted.url("ws"), timeout=0.4)
    assert 1 <= scripted.connections <= 8


@pytest.mark.parametrize(
    "status, code, remedy", [(401, "unauthorized", "OPENVLA_API_KEY"), (403, "forbidden", "--allow-host")]
)
def test_a_handshake_that_is_refused(status, code, remedy):
    """Of a server that is asked under a name that it does not know, a key was asked in vain."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            for body in (
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status,
            ):
                accepted, _ = server.accept()
                with accepted:
                    accepted.recv(65536)
                    accepted.sendall(body.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(Refused, match=remedy) as caught:
            connect(f"ws://127.0.0.1:{server.getsockname()[1]}")
        assert caught.value.code == code
        thread.join(10)


def test_a_closed_client(scheme):
    scripted = Scripted()
    with asking(scripted, scheme) as client:
        client.close()
        client.close()
        with pytest.raises(NotReached, match="closed"):
            client.act(IMAGE, "go")


def test_closing_ends_calls_that_wait(scheme):
    asked, found = threading.Event(), []
    scripted = Scripted(answer=lambda message: asked.set())
    with scripted.running():
        client = connect(scripted.url(scheme), timeout=300)

        def wait():
            try:
                client.act(IMAGE, "go")
            except NotReached as error:
                found.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert asked.wait(30)
        client.close()
        thread.join(30)
    assert len(found) == 1


def test_threads_that_close_a_client_at_once(scheme):
    """Who came between the end and the last look at what is asked waited for ever."""
    with Scripted().running() as scripted:
        for _ in range(8):
            client = connect(scripted.url(scheme))
            threads = [threading.Thread(target=client.close, daemon=True) for _ in range(6)]
            for thread in threads:
                thread.start()
            with pytest.raises(NotReached, match="closed"):
                while True:
                    client.act(IMAGE, "go")
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()


def test_a_signal_that_closes_a_client_while_it_is_asked(scheme, monkeypatch):
    """What was handed to the loop between its last look and its end was answered never."""
    with asking(Scripted(), scheme) as client:

        def handed_over(work, loop):
            monkeypatch.undo()
            work.close()
            client.close()
            return Future()

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", handed_over)
        with pytest.raises(NotReached, match="closed"):
            client.act(IMAGE, "go")


def test_a_client_that_nobody_holds_any_more_is_closed(scheme):
    """Each kept its thread and its place at the server: after 64 episodes of a program that connects in each of them
    everybody was refused."""
    with Scripted().running() as scripted:
        for _ in range(3):
            client = connect(scripted.url(scheme))
            guard = client.guard(hz=10, fallback="raise", wait=30, max_age=60)
            assert guard.step({"images": IMAGE, "instruction": "go"}).source == "answer"
        names = ("openvla-client", "openvla-guard")
        threads = [thread for thread in threading.enumerate() if thread.name in names]
        del client, guard
        gc.collect()
        for thread in threads:
            thread.join(60)
        while scripted._sockets:
            time.sleep(0.01)
    assert not any(thread.is_alive() for thread in threads)


def test_a_program_that_closes_nothing_ends_without_a_word(scheme):
    program = "import sys, openvla_client as c; a = c.connect(sys.argv[1]); print(a.act(sys.argv[2], 'go').actions)"
    environment = {**os.environ, "PYTHONPATH": str(Path(openvla_client.__file__).parents[1])}
    frame = Path(__file__).parents[1] / "examples/frames/drawer-open-v3_step005.png"
    with Scripted().running() as scripted:
        command = [sys.executable, "-c", program, scripted.url(scheme), frame]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert ended.stdout.startswith(b"[[0.") and not ended.stderr


def test_threads_share_a_client(scheme):
    scripted = Scripted()
    with asking(scripted, scheme) as client:
        threads = [
            threading.Thread(target=lambda: [client.act(IMAGE, "go") for _ in range(5)], daemon=True) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(message["request_id"] for message in scripted.messages) == [*range(40)]


def test_with_await(scheme):
    async def ask(url):
        async with await connect_async(url) as client:
            answers = await asyncio.gather(*(client.act(IMAGE, "go", step=step) for step in range(4)))
            session = client.session
            await client.reset()
            assert client.session != session
            return answers

    scripted = Scripted(answer=lambda message: {"reset": True} if "endpoint" in message else right(message))
    with scripted.running():
        assert len(asyncio.run(ask(scripted.url(scheme)))) == 4
    assert scripted.messages[-1]["endpoint"] == "reset"
    assert scripted.messages[-1]["session"] == scripted.messages[0]["session"]


@pytest.mark.parametrize(
    ("form", "name", "image"), [("jpeg", "picture_file", IMAGE), ("raw", "_as_png", Image.new("RGBA", (8, 8)))]
)
def test_a_picture_is_compressed_beside_the_loop(scheme, form, name, image, monkeypatch):
    """Which may be the one that moves a robot: here it goes on while the picture waits for it."""
    others, compress = threading.Event(), getattr(messages, name)

    def waiting(*given):
        assert others.wait(30)
        return compress(*given)

    async def ask(url):
        async with await connect_async(url, images=form) as client:
            answer = asyncio.ensure_future(client.act({"primary": image}, "go"))
            await asyncio.sleep(0.05)
            others.set()
            return await answer

    monkeypatch.setattr(messages, name, waiting)
    scripted = Scripted()
    with scripted.running():
        assert asyncio.run(ask(scripted.url(scheme))).actions.shape[1]


# With a guard ---------------------------------------------------------------------------------------------------------


def test_a_guarded_client(scheme):
    scripted = Scripted(metadata(dims=7), answer=lambda message: right(message, dims=7))
    with asking(scripted, scheme) as client:
        guard = client.guard(wait=30)
        assert guard.fallback == "hold" and guard.period == 0.1
        guard.reset(start=[0] * 6 + [1])
        command = guard.step({"images": IMAGE, "instruction": "open the drawer"})
        assert command.source == "answer" and command.action.tolist() == [0.25] * 7
        guard.reset(start=[0] * 6 + [1])
        guard.step({"images": IMAGE, "instruction": "open the drawer"})
        guard.close()
        other = client.guard(wait=30)
        assert other.step({"images": IMAGE, "instruction": "open the drawer"}).source == "answer"
        other.close()
    sessions = [message["session"] for message in scripted.messages]
    assert len(set(sessions)) == 3 and [message["step"] for message in scripted.messages] == [0, 0, 0]


def test_a_robot_that_waits_in_vain_ends_no_connection_of_others(scheme):
    silent = lambda message: message["instruction"] == "wait"  # noqa: E731
    scripted = Scripted(metadata(dims=7), answer=lambda message: None if silent(message) else right(message, dims=7))
    with asking(scripted, scheme) as client:
        quick, slow = client.guard(wait=30), client.guard(wait=0.4, stalled_after=0.2, fallback="raise")
        assert quick.step({"images": IMAGE, "instruction": "go"}).source == "answer"
        epoch = quick.epoch
        with pytest.raises(NoAction, match="NoAnswer"):
            slow.step({"images": IMAGE, "instruction": "wait"})
        quick.reset([0] * 6 + [1])
        assert quick.step({"images": IMAGE, "instruction": "go"}).source == "answer" and quick.epoch == epoch + 1
        slow.close()
        third = client.guard(wait=30)  # takes the place of the second
        third.reset([0] * 6 + [1])
        third.step({"images": IMAGE, "instruction": "go"})
        assert third.step({"images": IMAGE, "instruction": "go"}).source == "answer"
        assert scripted.connections == (3 if scheme == "ws" else 0)


def test_a_client_that_connects_again_while_it_is_closed_leaves_no_connection(monkeypatch, scheme):
    """As of several guards whose server has gone; aiohttp says a page of each that is left."""
    usual = AsyncClient.close

    async def close(self):
        await usual(self)
        await asyncio.sleep(0.3)  # as for a goodbye that is not answered

    monkeypatch.setattr(AsyncClient, "close", close)
    scripted = Scripted()
    with asking(scripted, scheme) as client:

        def act():
            with suppress(NotReached):
                client.act(IMAGE, "go")

        asked, task = client._client, threading.Thread(target=act)
        asked._connection.closed, asked._not_before = True, time.monotonic() + 0.1
        task.start()
        while not asked._connecting.locked():
            time.sleep(0.001)
        client.close()
        task.join()
        assert asked._http is None and asked._connection is None


def test_robots_that_have_ended_take_no_places_of_a_server(scheme):
    """Each kept its connection until the client was closed: fifty of the 64 that a server has by itself."""
    scripted = Scripted(metadata(dims=7), answer=lambda message: right(message, dims=7))
    with asking(scripted, scheme) as client:
        guards = [client.guard(wait=30) for _ in range(4)]
        assert all(guard.step({"images": IMAGE, "instruction": "go"}).source == "answer" for guard in guards)
        assert len(client._clients) == 4
        for guard in guards[:3]:
            guard.close()
        del guard, guards  # the last one is collected
        end = time.monotonic() + 30
        while (len(client._clients) > 1 or len(scripted._sockets) > 1) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(client._clients) == 1 and len(scripted._sockets) == (scheme == "ws")
        assert client.guard(wait=30).step({"images": IMAGE, "instruction": "go"}).source == "answer"
        assert len(client._clients) == 1


def test_a_guard_that_was_made_for_another_model_is_not_told_of_it(scheme):
    """It took the connection of one that had ended, which still was of the model before."""
    digests = ["one"]
    answer = lambda message: {**right(message, dims=7), "digest": digests[0]}  # noqa: E731
    scripted = Scripted(metadata(dims=7, digest="one"), answer)
    step = lambda guard: guard.step({"images": IMAGE, "instruction": "go"}).source  # noqa: E731
    with scripted.running():
        client = connect(scripted.url(scheme))
        guards = [client.guard(wait=30, execute=1) for _ in range(3)]
        assert [step(guard) for guard in guards] == ["answer"] * 3
        for guard in guards[:2]:
            guard.close()
    with client:
        digests[0], scripted.first = "two", metadata(dims=7, digest="two")
        with scripted.running(scripted.port):
            while client.info.digest == "one":
                guards[2].reset([0] * 7)
                assert step(guards[2]) == "hold"
            new = [client.guard(wait=30) for _ in range(2)]
            assert [step(guard) for guard in new] == ["answer"] * 2
            with pytest.raises(BadAnswer, match="another model"):  # whoever asks by himself is told
                client.act(IMAGE, "go")


@pytest.mark.parametrize("change", ["places", "units", "name"])
def test_a_server_that_was_started_again_with_another_model(change):
    """Of the same numbers, which mean something else. Answers of one step: the second one of a chunk acts, in time."""
    scripted = Scripted(metadata(chunk=1, dims=7), answer=lambda message: right(message, chunk=1, dims=7))
    with scripted.running():
        client = connect(scripted.url("ws"))
        guard = client.guard(wait=30)
        seen = {"images": IMAGE, "instruction": "go"}
        assert guard.step(seen).source == "answer"
    with client:
        other = metadata(chunk=1, dims=7, **{"units": {"digest": "two"}, "name": {"model": "another"}}.get(change, {}))
        if change == "places":
            other["datasets"]["robot"]["relative"] = [False] * 7
        scripted.first = other
        with scripted.running(scripted.port):
            lines = []
            guard._audit = lines.append
            assert {guard.step(seen).source for _ in range(4)} == {"hold"}
        assert any("another model" in one["refused"] for line in lines for one in line["arrived"])
        guard.close()


def test_another_model_is_said_before_it_is_asked(scheme):
    """The next call connects again by itself: it would have moved the robot by numbers of another meaning."""
    scripted = Scripted(metadata(dims=7), answer=lambda message: right(message, dims=7))
    with scripted.running():
        client = connect(scripted.url(scheme))
        client.act(IMAGE, "go")
    with client:
        scripted.first, scripted.messages = metadata(dims=7, model="another"), []
        with scripted.running(scripted.port):
            if scheme == "http":  # which has no connection that could break
                client._client._connection.closed = True
            client.reset()  # which says nothing of a server
            scripted.messages.clear()
            with pytest.raises(BadAnswer, match="another model, and nothing was asked of it"):
                client.act(IMAGE, "go")
            assert client.info.model == "another" and not scripted.messages
            assert client.act(IMAGE, "go").actions.shape == (2, 7)
        with scripted.running(scripted.port):  # the same again
            client._client._connection.closed = True
            assert client.act(IMAGE, "go").actions.shape == (2, 7)


def test_another_model_is_said_to_each_robot_that_shares_a_client(scheme):
    """It was said to the first that asked, and the others moved by numbers of another meaning."""
    scripted = Scripted(metadata(dims=7), answer=lambda message: right(message, dims=7))
    with scripted.running():
        client = connect(scripted.url(scheme))
        for robot in ("left", "right"):
            client.act(IMAGE, "go", session=robot)
    with client:
        scripted.first = metadata(dims=7, model="another")
        with scripted.running(scripted.port):
            if scheme == "http":
                client._client._connection.closed = True
            for robot in ("left", "right"):
                with pytest.raises(BadAnswer, match="another model, and nothing was asked of it"):
                    client.act(IMAGE, "go", session=robot)
            for robot in ("left", "right", "new"):
                assert client.act(IMAGE, "go", session=robot).actions.shape == (2, 7)


def test_a_server_that_was_started_again_with_another_model_between_two_requests():
    """Over HTTP nothing of it is seen but what the answers say."""
    digests = ["one"]
    answer = lambda message: {**right(message, dims=7), "digest": digests[0]}  # noqa: E731
    scripted = Scripted(metadata(dims=7, digest="one"), answer)
    with asking(scripted, "http") as client:
        guard = client.guard(wait=30, execute=1, fallback="raise")
        seen = {"images": IMAGE, "instruction": "go"}
        assert guard.step(seen).source == "answer"
        digests[0], scripted.first = "two", metadata(dims=7, digest="two")
        scripted.first["datasets"]["robot"]["relative"] = [False] * 7
        for _ in range(2):
            with pytest.raises(NoAction):
                guard.step(seen)
        guard.close()
        assert client.info.digest == "two"


def test_another_model_between_two_requests_is_said_once():
    """It was said a second time, when the client had asked what the server is."""
    digests = ["one"]
    answer = lambda message: {**right(message, dims=7), "digest": digests[0]}  # noqa: E731
    scripted = Scripted(metadata(dims=7, digest="one"), answer)
    with asking(scripted, "http") as client:
        client.act(IMAGE, "go")
        digests[0], scripted.first = "two", metadata(dims=7, digest="two")
        with pytest.raises(BadAnswer, match="another model.*says what it is now"):
            client.act(IMAGE, "go")
        assert client.info.digest == "two"
        assert client.act(IMAGE, "go").actions.shape == (2, 7)


def test_what_a_server_says_is_read_as_it_is_meant():
    fake = FakeModel(cameras=("primary", "wrist"), chunk=4, state_dim=8, keys=("stated", "guessed"))
    stated = dataclasses.replace(fake.info.datasets["stated"], stated=True)
    info = dataclasses.replace(fake.info, datasets={**fake.info.datasets, "stated": stated})
    read = read_info(unpack(pack(service.metadata(info))))
    assert (read.cameras, read.chunk, read.default_key) == (info.cameras, info.chunk, None)
    assert read.digest == info.digest != fake.info.digest
    for key, dataset in info.datasets.items():
        found = read.datasets[key]
        assert (found.stated, found.state_dim) == (dataset.stated, dataset.state_dim)
        assert found.spec.to_dict() == dataset.spec.to_dict()


def test_a_guard_acts_in_no_other_units_than_it_was_made_for():
    datasets = metadata(dims=7)["datasets"]["robot"]
    several = metadata(dims=7, datasets={"robot": datasets, "other": datasets}, default_unnorm_key="robot")
    scripted = Scripted(several, answer=lambda message: right(message, dims=7))
    with asking(scripted, "ws") as client:
        guard = client.guard(wait=30, fallback="raise")
        seen = {"images": IMAGE, "instruction": "open the drawer"}
        with pytest.raises(NoAction):
            guard.step({**seen, "unnorm_key": "other"})
        assert guard.step({**seen, "unnorm_key": "robot"}).source == "answer"
        assert guard.step(seen).source == "answer"
        guard.close()
    assert [message["unnorm_key"] for message in scripted.messages] == ["robot", "robot"]


def test_a_guard_of_a_model_that_does_not_say_what_its_actions_mean():
    unstated = metadata(dims=7)
    unstated["datasets"]["robot"]["spec_stated"] = False
    with asking(Scripted(unstated, answer=lambda message: "no"), "ws") as client:
        for default in ({"fallback": None}, {}):  # None is the default of `Guard`, which held
            with pytest.warns(UserWarning, match="'robot': the model does not state .*raises NoAction .* Give spec="):
                guard = client.guard(**default)
            assert guard.fallback == "raise"
        with pytest.raises(NoAction):
            guard.step({"images": IMAGE, "instruction": "open the drawer"})
        assert guard.state is State.DEGRADED
        guard.close()
        with pytest.warns(UserWarning, match="fallback='hold' believes x, y, z, .*--absolute-dims"):
            assert client.guard(fallback="hold").fallback == "hold"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            client.guard(fallback="raise").close()
            client.guard(spec=client.info.datasets["robot"].spec).close()


@pytest.mark.parametrize(
    "options",
    [{"timeout": "10"}, {"timeout": 0}, {"timeout": np.nan}, {"timeout": 1e6}, {"wait": "60"}, {"wait": np.nan},
     {"wait": -1}, {"quality": "95"}, {"quality": 0}, {"images": "gif"}],
)  # fmt: skip
def test_options_of_a_client_are_checked_before_it_connects(options):
    """A wait of NaN never ended."""
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}=.*expected"):
        connect("ws://127.0.0.1:9", **options)
