"""`openvla serve` as a process: listens, says where, answers, stops well. The model is a fake one."""

import asyncio
import json
import os
import shlex
import signal
import socket
import struct
import threading
import urllib.error
import urllib.request
import warnings
from contextlib import suppress
from email.message import Message
from random import Random
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from fake_serving import FakeModel
from processes import start
from uvicorn.protocols.http.h11_impl import H11Protocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from openvla.action_spec import usual_spec
from openvla.options.serving import Limits, ServeOptions
from openvla.serving import server as serving
from openvla.serving import sockets, wire
from openvla.serving.app import create_app
from openvla.serving.contract import Dataset, ModelInfo
from openvla.serving.engine import Engine
from openvla.serving.worker import Worker


PROGRAM = """
import gc, json, sys, time
sys.path.insert(0, sys.argv[1])
from fake_serving import FakeModel
from openvla.options.serving import ServeOptions
from openvla.serving.server import serve

class Model(FakeModel):
    def act(self, requests):
        time.sleep(float(sys.argv[2]))
        return super().act(requests)

    def warm_up(self, batch_sizes):
        if sys.argv[3] == "broken":
            raise RuntimeError("no kernels")

say = lambda line: print(line, flush=True)
gc.freeze = lambda: print("what is loaded is kept", file=sys.stderr)
options = ServeOptions(port=0, **json.loads(sys.argv[4]))
sys.exit(0 if serve(options, say, load=lambda options: Model(("primary",))) else 1)
"""
GOOD = {"image": np.full((8, 8, 3), 100, np.uint8), "instruction": "go"}


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Server:
    def __init__(self, *, seconds: float = 0.0, options: dict | None = None, **environment):
        read, write = os.pipe()
        folder = os.path.dirname(__file__)
        env = {name: value for name, value in os.environ.items() if name != "OPENVLA_API_KEY"} | environment
        self.process = start(PROGRAM, folder, seconds, "works", json.dumps(options or {}), stdout=write, env=env)
        os.close(write)
        with os.fdopen(read) as lines:
            self.line = lines.readline()
        self.port = int(self.line.partition("http://127.0.0.1:")[2].partition(",")[0])

    def metric(self, name: str) -> float:
        """0 before it is counted."""
        return float((self.get("/metrics")[1].decode().partition(f"\n{name} ")[2].split() or [0])[0])

    def get(self, path: str, **headers) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, message: dict) -> tuple[int, bytes, Message]:
        body, headers = wire.to_json(message).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{self.port}/act", body, headers), timeout=60
            ) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def connect(self, **more):
        return connect(f"ws://127.0.0.1:{self.port}/", max_size=None, **more)


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.process.kill()


def test_it_says_where_it_listens_and_how_to_try_it(server):
    address = f"http://127.0.0.1:{server.port}"
    assert server.line == (
        f"serving fake at {address}, a page in a browser; try: curl -s {address}/act -F primary=@frame.png "
        "-F instruction='open the drawer'\n"
    )
    assert server.get("/healthz") == (200, b"OK\n") and server.get("/readyz")[0] == 200
    status, page = server.get("/")
    assert status == 200 and b"<html" in page


def test_robots_are_answered(server):
    with server.connect(compression=None) as robot:
        assert wire.unpack(robot.recv())["model"] == "fake"
        robot.send(wire.pack(GOOD))
        assert wire.unpack(robot.recv())["actions"].shape == (1, 7)


def test_nothing_is_compressed(server):
    """A message that grows a thousandfold is not even taken."""
    with server.connect(compression="deflate") as robot:
        assert "permessage-deflate" not in robot.response.headers.get("Sec-WebSocket-Extensions", "")


def test_a_message_above_the_limit_closes_the_connection(server):
    with server.connect(compression=None) as robot:
        robot.recv()
        with pytest.raises(ConnectionClosed):  # with 1009, where that arrives before the end
            robot.send(bytes(wire.MOST_BYTES + 1))
            robot.recv()
    assert server.get("/readyz")[0] == 200


def test_text_is_refused_whatever_it_holds(server):
    with server.connect() as robot:
        robot.recv()
        for text in ("{}", b"\xff\xfe"):
            robot.send(text, text=True)
            assert "send msgpack" in json.loads(robot.recv())["error"]


def test_a_message_has_so_many_fragments(server):
    """Empty ones have no bytes that could be too many."""
    with server.connect(compression=None) as robot:
        robot.recv()
        robot.send([wire.pack(GOOD), *[b""] * 1000])
        assert wire.unpack(robot.recv(timeout=60))["actions"].shape == (1, 7)
        with pytest.raises(ConnectionClosed) as closed:
            robot.send(b"" for _ in range(10**6))
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    assert server.get("/readyz")[0] == 200


def test_messages_that_are_coming_in_take_room_already(request):
    server = Server(options={"bodies_bytes": 5000, "message_bytes": 4000, "ahead": 1})
    request.addfinalizer(server.process.kill)
    message, ending = wire.pack({**GOOD, "image": np.zeros((24, 24, 3), np.uint8)}), threading.Event()

    def slowly():
        yield bytes(3900)
        ending.wait(60)
        yield b" "

    with server.connect(compression=None) as slow, server.connect(compression=None) as robot:
        slow.recv(), robot.recv()
        sender = threading.Thread(target=lambda: slow.send(slowly()))
        sender.start()
        while server.metric("openvla_bodies_bytes") < 3900:
            pass
        robot.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(timeout=60)
        assert closed.value.rcvd.code == 1013  # try again later
        ending.set()
        assert json.loads(slow.recv(timeout=60))["code"] == "bad_request"
        sender.join()
    while server.metric("openvla_bodies_bytes"):
        pass
    with server.connect(compression=None) as robot:
        robot.recv()
        robot.send(message)
        assert wire.unpack(robot.recv(timeout=60))["actions"].shape == (1, 7)


def test_messages_without_bytes_take_room_as_well(request):
    """Each takes 200 bytes of memory, on its way from 6 of the network."""
    server = Server(options={"bodies_bytes": 20_000, "message_bytes": 20_000})
    request.addfinalizer(server.process.kill)
    with server.connect(compression=None) as robot:
        robot.recv()
        robot.send(bytes(20_000))  # one that may be so large has room
        assert json.loads(robot.recv(timeout=60))["code"] == "bad_request"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
        robot.sendall(UPGRADE)
        robot.recv(4096)
        robot.sendall(bytes([0x82, 0x80, 0, 0, 0, 0]) * 1000)
        came = b""
        while piece := robot.recv(4096):
            came += piece
        assert bytes([0x03, 0xF5]) + b"Too much" in came  # 1013, try again later


@pytest.mark.parametrize("how", ["goodbye", "reset"])
def test_a_message_that_breaks_off_gives_its_room_back(server, how):
    """As where the network goes while a robot sends a picture: its share was kept, and after 256 MiB of such halves
    everybody was refused until the server was started again."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
        robot.sendall(UPGRADE)
        robot.recv(4096)
        robot.sendall(bytes([0x82, 0xFF]) + struct.pack("!Q4x", 1_000_000) + bytes(500_000))
        while server.metric("openvla_bodies_bytes") < 500_000:
            pass
        if how == "reset":
            robot.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while server.metric("openvla_websockets"):
        pass
    assert server.metric("openvla_bodies_bytes") == 0


async def a_robot(port: int, random: Random, wrong: list) -> None:
    """Asks ahead, over connections that break now and then, in the middle of a message too."""
    for _ in range(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        await frame(reader)
        asked = []
        for _ in range(random.randrange(1, 12)):
            level, words, number = random.randrange(256), "a" * random.randrange(1, 99), random.randrange(2**20)
            pixels = np.full((random.choice((8, 300, 700)),) * 2 + (3,), level, np.uint8)
            more = {"session": f"robot {random.randrange(6)}"} if random.random() < 0.7 else {}
            data = wire.pack({"image": pixels, "instruction": words, "request_id": number, "step": level, **more})
            message = bytes([0x82, 0xFF]) + struct.pack("!Q4x", len(data)) + data
            if random.random() < 0.1:
                writer.write(message[: random.randrange(len(message))])
                break
            writer.write(message)
            asked.append((number, level, len(words)))
            if len(asked) == 4 or random.random() < 0.3:
                for expected in asked:
                    answer = await frame(reader)
                    if "error" in answer:
                        found = (answer["request_id"], *expected[1:]) if answer["code"] != "failed" else answer
                    else:
                        x, y = np.round(answer["actions"][0, :2] * 1000)
                        found = (answer["request_id"], x, y)
                    wrong.extend([] if found == expected else [(found, expected)])
                asked.clear()
        writer.transport.abort() if random.random() < 0.5 else writer.close()


async def frame(reader: asyncio.StreamReader):
    first, size = await reader.readexactly(2)
    if size >= 126:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
    data = await reader.readexactly(size)
    return wire.unpack(data) if first & 15 == 2 else json.loads(data)


def test_every_answer_is_of_its_request_and_nothing_is_kept_of_robots_that_have_gone(server):
    async def ask():
        wrong: list = []
        await asyncio.wait_for(asyncio.gather(*(a_robot(server.port, Random(seed), wrong) for seed in range(12))), 120)
        return wrong

    before = server.metric("openvla_batch_size_count")
    assert asyncio.run(ask()) == [] and server.metric("openvla_batch_size_count") > before + 50
    while server.metric("openvla_websockets"):
        pass
    assert server.metric("openvla_bodies_bytes") == server.metric("openvla_queue") == 0


def test_who_sends_without_end_is_read_no_further_than_ahead(request):
    server = Server(seconds=1e5, options={"ahead": 2})
    request.addfinalizer(server.process.kill)
    message, sent = wire.pack({**GOOD, "image": np.zeros((600, 600, 3), np.uint8)}), []

    def endlessly():
        with suppress(ConnectionClosed):
            for number in range(1000):
                robot.send(message)
                sent.append(number)

    with server.connect(compression=None) as robot:
        robot.recv()
        sender = threading.Thread(target=endlessly)
        sender.start()
        came = 'openvla_requests_total{protocol="websocket"}'
        while server.metric(came) < 4:  # the one that is sent next, two in its wake, one that waits for their place
            pass
        assert [server.metric(came) for _ in range(20)] == [4] * 20
        assert server.metric("openvla_bodies_bytes") <= 5 * len(message) and len(sent) < 50
        server.process.kill()
        sender.join(60)


def test_a_key_of_the_environment_is_asked():
    server = Server(OPENVLA_API_KEY="a key")
    try:
        assert server.get("/info")[0] == 401 and server.get("/")[0] == 200 and server.get("/page/about")[0] == 401
        assert server.get("/info", Authorization="Bearer a key")[0] == 200
        assert '-H "Authorization: Bearer $OPENVLA_API_KEY"' in server.line and "a key" not in server.line
    finally:
        server.process.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_what_is_in_flight_is_answered_before_it_stops(stop, request):
    server = Server(seconds=0.5)
    request.addfinalizer(server.process.kill)
    found = []

    def ask():
        found.append(wire.from_json(server.post({**GOOD, "details": True})[1]))

    with server.connect(compression=None) as robot:
        robot.recv()
        other = threading.Thread(target=ask)
        other.start()
        robot.send(wire.pack(GOOD))
        while b'openvla_requests_total{protocol="websocket"} 1.0' not in server.get("/metrics")[1]:
            pass
        while b'openvla_requests_total{protocol="rest"} 1.0' not in server.get("/metrics")[1]:
            pass
        os.kill(server.process.pid, stop)
        assert wire.unpack(robot.recv(timeout=60))["actions"].shape == (1, 7)
        with pytest.raises(ConnectionClosed) as closed:
            robot.recv(timeout=60)
        assert closed.value.rcvd.code == 1012  # it restarts, says the protocol
    other.join(timeout=60)
    assert found[0]["actions"].shape == (1, 7)
    assert server.process.wait(timeout=60) == 0


def test_a_second_ctrl_c_waits_for_nothing(request):
    server = Server(seconds=1e5)
    request.addfinalizer(server.process.kill)
    with server.connect(compression=None) as robot:
        robot.recv()
        robot.send(wire.pack(GOOD))
        while not server.metric("openvla_predicting_seconds"):
            pass
        os.kill(server.process.pid, signal.SIGINT)
        while server.get("/readyz")[0] == 200:
            pass
        os.kill(server.process.pid, signal.SIGINT)
        assert json.loads(robot.recv(timeout=20))["code"] == "busy"
    done = server.process.done(timeout=20)  # of 30 s that it would have given the model
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_model_that_hangs_is_told_and_does_not_keep_the_process(request):
    server = Server(seconds=1e5, options={"hang_after_s": 0.05})
    request.addfinalizer(server.process.kill)
    with server.connect(compression=None) as robot:
        robot.recv()
        robot.send(wire.pack(GOOD))
        assert json.loads(robot.recv(timeout=60))["code"] == "hung"
        robot.send(wire.pack(GOOD))  # the connection is still there
        assert json.loads(robot.recv(timeout=60))["retry_after"] > 0
        status, said, headers = server.post(GOOD)
        assert status == 503 and b"hangs" in said and int(headers["Retry-After"]) > 0
        status, said = server.get("/readyz")
        assert status == 503 and json.loads(said)["ready"] is False and "hangs" in json.loads(said)["error"]
        assert server.metric("openvla_ready") == 0 and server.metric("openvla_predicting_seconds") > 0.05
        assert server.metric('openvla_refusals_total{code="hung",protocol="websocket"}') == 2
        os.kill(server.process.pid, signal.SIGTERM)
    done = server.process.done(timeout=60)  # its thread never returned
    assert done.returncode == 0 and "what is loaded is kept" in done.stderr and "not returned for 0.05 s" in done.stderr


def test_a_model_that_still_computes_does_not_abort_the_process(monkeypatch):
    """Ctrl-C while it warmed up: Python stopped its thread within torch, "terminate called", exit code 134."""
    codes, returned = [], threading.Event()
    monkeypatch.setattr(os, "_exit", codes.append)
    model = FakeModel(("primary",))
    monkeypatch.setattr(model, "end_session", lambda session: returned.wait(60))
    others = threading.enumerate()
    worker = Worker(model, 1)
    own = [thread for thread in threading.enumerate() if thread not in others]
    monkeypatch.setattr(threading, "enumerate", lambda: own)  # models of other tests may still be there
    worker.end_session("it takes long")
    worker.close()
    serving.leave(3, patience=0.01)
    assert codes == [3]
    with monkeypatch.context() as patch:  # one more Ctrl-C, while it waits
        patch.setattr(threading.Thread, "join", Mock(side_effect=KeyboardInterrupt))
        serving.leave(4, patience=60)
    assert codes == [3, 4]
    returned.set()
    serving.leave(5, patience=60)
    assert codes == [3, 4]


def test_a_model_that_cannot_be_warmed_up_ends_the_server():
    done = start(PROGRAM, os.path.dirname(__file__), 0, "broken", "{}").done(timeout=120)
    assert done.returncode == 1 and "no kernels" in done.stderr and not done.stdout


def test_who_has_no_key_is_one_clear_line_in_the_log():
    """uvicorn said of each WebSocket that an ASGI callable had returned without completing a handshake."""
    server = Server(OPENVLA_API_KEY="secret")
    for _ in range(3):
        with pytest.raises(InvalidStatus, match="401"):
            server.connect()
    assert server.get("/info")[0] == 401 and server.get("/info", Origin="http://elsewhere")[0] == 403
    # Of a body that is none; a traceback for each, and two for HEAD
    for method, status, waits in ((b"POST", b"400", False), (b"HEAD", b"400", False), (b"POST", b"401", True)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
            robot.sendall(
                method
                + b" /act HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                + (not waits) * b"x\r\n"
            )
            assert robot.recv(1000).startswith(b"HTTP/1.1 " + status)
            with suppress(ConnectionError):
                robot.sendall(b"x\r\n")
                while robot.recv(1000):
                    pass
    os.kill(server.process.pid, signal.SIGTERM)
    lines = [line for line in server.process.done(timeout=60).stderr.splitlines() if line != "what is loaded is kept"]
    assert [line[:58] for line in lines] == [
        "A client at 127.0.0.1 is refused (unauthorized): Send the ",
        "A client at 127.0.0.1 is refused (forbidden): A page of an",
    ]


def test_what_is_sent_after_a_broken_frame_is_no_mistake_of_the_server():
    """uvicorn logged a traceback of 60 lines: whoever sends nonsense fills no disk."""
    protocol = object.__new__(sockets.CountedSocket)
    protocol.close_sent = True
    with pytest.raises(OSError):  # which starlette takes for a client that has gone
        asyncio.run(protocol.send({"type": "websocket.send", "bytes": b""}))


def test_the_head_of_a_request_has_an_end(server):
    """httptools, which uvicorn takes by itself where it is installed, reads headers as long as they come."""
    app = create_app(Engine(FakeModel()))
    assert issubclass(serving.Server(app, Limits(), lambda: None).config.http, H11Protocol)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot, suppress(ConnectionError):
        robot.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(10):
            robot.sendall(b"X-More: " + 10_000 * b"x" + b"\r\n")
        assert robot.recv(100).startswith(b"HTTP/1.1 400") or not robot.recv(100)


@pytest.mark.parametrize("more", [b"Content-Length: 2", b"X: " + 9000 * b"x", b"\r\n".join([b"X: x"] * 200)])
def test_what_begins_no_websocket_is_answered(server, more):
    """It kept its place for ever: so many of them, and nobody else is let in."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
        head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        robot.sendall(head + more + b"\r\n\r\n")
        head, _, said = b"".join(iter(lambda: robot.recv(1000), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and f"Content-Length: {len(said)}".encode() in head


def test_who_has_said_all_and_listens_on_is_answered_and_who_has_gone_keeps_no_place(request):
    """`nc -N` got no answer: it looked like a robot that has gone."""
    body = wire.to_json({**GOOD, "details": True}).encode()
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answering, hanging = Server(seconds=0.3), Server(seconds=1e5)
    for server in (answering, hanging):
        request.addfinalizer(server.process.kill)
    with socket.create_connection(("127.0.0.1", answering.port), timeout=60) as robot:
        robot.sendall(head % len(body) + body)
        robot.shutdown(socket.SHUT_WR)
        came = b"".join(iter(lambda: robot.recv(1000), b"")).split(b"HTTP/1.1 ")[1:]
    assert {one[:3] for one in came[:-1]} == {b"100"}  # which says nothing, and which every client leaves out
    assert came[-1].startswith(b"200") and wire.from_json(came[-1].partition(b"\r\n\r\n")[2])["actions"].shape == (1, 7)
    for said in (body, body[:-1]):
        with socket.create_connection(("127.0.0.1", hanging.port), timeout=60) as robot:
            robot.sendall(head % len(body) + said)
    while hanging.metric('openvla_refusals_total{code="gone",protocol="rest"}') < 2:
        pass


def test_a_body_has_one_length(server):
    """Behind a proxy that goes by the other one, the answer to what was left went to the next robot."""
    body = wire.to_json(GOOD).encode()
    left = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = b"%x\r\n%b\r\n0\r\n\r\n%b" % (len(body), body, left)
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
        robot.sendall(head + b"Content-Length: %d\r\n\r\n" % len(sent) + sent)
        came = b""
        with suppress(ConnectionError):  # it is closed while this is on its way
            came = b"".join(iter(lambda: robot.recv(1000), b""))
        assert not came or (came.startswith(b"HTTP/1.1 400") and came.count(b"HTTP/1.1") == 1)


def test_a_body_has_so_many_small_pieces(server):
    """Those of one byte kept the server busy for a second a megabyte, whether their sender may ask or not."""
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = wire.to_json(GOOD).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
        robot.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        robot.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert robot.recv(100).startswith(b"HTTP/1.1 200")
    for told in (b"", b"Origin: http://elsewhere\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as robot:
            robot.sendall(head + told + b"Transfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    robot.sendall(1000 * b"1\r\nx\r\n")
    assert server.post(GOOD)[0] == 200


def test_pictures_write_no_lines():
    """One of 60 kB whose EXIF has 5,000 entries that point nowhere wrote a warning for each."""
    with warnings.catch_warnings(record=True) as said:
        serving.make_app(ServeOptions(), FakeModel(), None)
        warnings.warn_explicit("Tag data larger than file", UserWarning, "x.py", 1, "PIL.TiffImagePlugin", {})
        warnings.warn_explicit("all else", UserWarning, "x.py", 1, "torch", {})
    assert [str(one.message) for one in said] == ["all else"]


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ServeOptions(port=taken.getsockname()[1])
        with pytest.raises(OSError, match=f"port={options.port}.*give another port"):
            serving.serve(options, load=None)
    with pytest.raises(OSError, match="host=nowhere.invalid"):
        serving.listen("nowhere.invalid", 8000)


def test_an_address_that_others_reach_is_refused_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENVLA_API_KEY.*--insecure"):
        serving.serve(ServeOptions(host="0.0.0.0"), load=None)
    monkeypatch.setenv("OPENVLA_API_KEY", "")
    with pytest.raises(ValueError, match="empty"):
        serving.serve(ServeOptions(), load=None)


def test_a_name_that_leads_elsewhere_is_refused_without_a_key(monkeypatch):
    """What "localhost" is, decides a file of the machine."""
    monkeypatch.delenv("OPENVLA_API_KEY", raising=False)
    elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: elsewhere)
    with pytest.raises(ValueError, match="host=0.0.0.0: everyone who reaches it"):
        serving.serve(ServeOptions(host="localhost", port=0), load=None)


def test_a_name_that_is_both_is_listened_at_by_ipv4(monkeypatch):
    """On Debian and Ubuntu localhost is ::1 first, and whoever asked 127.0.0.1 found nobody."""
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: both)
    with serving.listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    if socket.has_ipv6:
        both[1] = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))  # that of a router
        with serving.listen("robots.example", 0) as listener:
            assert listener.getsockname()[0] == "::1"
    with pytest.raises(OSError, match="host=robots.example, port=0.*give an address of this machine"):
        both[0] = both[1]
        serving.listen("robots.example", 0)


def test_the_start_line_of_any_model():
    datasets = {"a b": Dataset(usual_spec(7), 2), "c": Dataset(usual_spec(7), 2)}
    info = ModelInfo("me/robot", datasets, None, ("primary", "wrist"), 8, (224, 224))
    line = serving.start_line(info, "::1", 8000, key=True)
    assert line.startswith(
        "serving me/robot at http://[::1]:8000, a page in a browser; try: curl -s http://[::1]:8000/act -H "
    )
    assert line.endswith(
        "-F primary=@frame.png -F wrist=@frame.png -F instruction='open the drawer' -F state='[0, 0]' "
        "-F unnorm_key='a b'"
    )
    assert "127.0.0.1:9" in serving.start_line(info, "0.0.0.0", 9, key=False)
    odd = ModelInfo("me/robot", datasets, "c", ("the hand's",), 8, (224, 224))
    words = shlex.split(serving.start_line(odd, "::1", 8000, key=False).partition("try: ")[2])
    assert words[words.index("-F") + 1] == "the hand's=@frame.png"  # as a shell reads it


def test_connections_that_ask_nothing_are_ended():
    app = create_app(Engine(FakeModel()))
    made = serving.Server(app, Limits(head_seconds=40), lambda: None)
    aborted = []

    def connection(name, closing=False, **more):
        transport = SimpleNamespace(is_closing=lambda: closing, abort=lambda: aborted.append(name))
        flow = SimpleNamespace(write_paused=False)
        return type(name, (), {"transport": transport, **({"flow": flow} if "cycle" in more else {}), **more})()

    def writable(now):
        return SimpleNamespace(is_set=lambda: now)

    done, begun = SimpleNamespace(response_complete=True), SimpleNamespace(response_complete=False)
    again = connection("asks_again", cycle=done)
    made.server_state.connections = {
        again, connection("silent", cycle=None), connection("done", cycle=done), connection("asking", cycle=begun),
        connection("socket", writable=writable(True)), connection("never_reads", closing=True, cycle=begun),
        connection("takes_no_answer", cycle=begun, flow=SimpleNamespace(write_paused=True)),
        connection("takes_no_message", writable=writable(False)),
    }  # fmt: skip
    for now in range(0, 41, 10):
        made._end_silent(now)
    assert not aborted
    again.cycle = SimpleNamespace(response_complete=True)  # asked and answered between two looks
    made._end_silent(41)
    assert sorted(aborted) == ["done", "never_reads", "silent", "takes_no_answer", "takes_no_message"]
    made.server_state.connections = {again}
    made._end_silent(82)
    assert aborted.count("asks_again") == 1 and len(made._silent) == 1


@pytest.mark.parametrize(
    "first, ask",
    [(b"", b"GET /page/page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"), (UPGRADE, bytes([0x89, 0xFD, *bytes(129)]))],
    ids=["requests", "pings"],
)
def test_who_asks_and_takes_no_answer_takes_neither_a_place_nor_memory(first, ask, request):
    """Requests one behind the other waited for ever, in a place, for room for their answers; pings did not wait, and
    their answers filled the memory."""
    server = Server(options={"head_seconds": 1})
    request.addfinalizer(server.process.kill)
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(first)
        assert not first or b"101" in client.recv(100)
        with pytest.raises(ConnectionError):  # it is read no further, and ended a second later
            while sent < 64 * 2**20:
                client.sendall(ask * 1000)
                sent += 1000 * len(ask)
    assert server.get("/readyz")[0] == 200


@pytest.mark.parametrize("kind", [sockets.CountedRequests, sockets.CountedSocket])
@pytest.mark.parametrize("gone", [False, True])
def test_bytes_are_acknowledged_before_they_are_read(kind, gone, monkeypatch):
    """Who sends a head and a body one after the other, without TCP_NODELAY, waited 40 ms for each answer."""
    done = []

    def setsockopt(*given):
        done.append(given)
        if gone:
            raise OSError("the connection has gone")

    monkeypatch.setattr(sockets, "QUICK_ACKNOWLEDGEMENT", 12)  # as on Linux
    monkeypatch.setattr(kind.__mro__[1], "data_received", lambda self, data: done.append(data))
    monkeypatch.setattr(kind, "_count", lambda self: None, raising=False)
    protocol = object.__new__(kind)
    protocol.transport = SimpleNamespace(get_extra_info=lambda name: SimpleNamespace(setsockopt=setsockopt))
    protocol.data_received(b"GET")
    assert done == [(socket.IPPROTO_TCP, 12, 1), b"GET"]
    monkeypatch.setattr(sockets, "QUICK_ACKNOWLEDGEMENT", None)  # where there is no such option
    protocol.data_received(b"GET")
    assert done[2:] == [b"GET"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 2}, "only with --ray"),
        ({"max_replicas": 2}, "only with --ray"),
        ({"bodies_bytes": 2**20}, "would never find room"),
        ({"ray": True, "sim": True}, "is of one process"),
        ({"ray": True, "replicas": 3, "max_replicas": 2}, "expected at least replicas=3"),
    ],
)
def test_options_of_replicas(given, message):
    with pytest.raises(ValueError, match=message):
        ServeOptions(**given)
    assert ServeOptions(ray=True, replicas=2, max_replicas=8).ray
