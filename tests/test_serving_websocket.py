"""openpi's form: what the server says first, answers in order, refusals that close nothing."""

import asyncio
import json
import threading

import numpy as np
import pytest
from fake_serving import FakeModel, warm
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from openvla.options.serving import Limits
from openvla.serving import wire
from openvla.serving.app import create_app
from openvla.serving.engine import Engine
from openvla.serving.websocket import REALTIME


ROOT = "ws://localhost/"
GOOD = {"observation/image": np.full((8, 8, 3), 100, np.uint8), "prompt": "open the drawer"}


class SlowModel(FakeModel):
    """Answers when it is told to."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.asked, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def act(self, requests):
        self.asked.release()
        assert self.go.acquire(timeout=30)
        return super().act(requests)


def made(model=None, limits=None, **engine) -> TestClient:
    app = create_app(Engine(model or FakeModel(("primary",)), **engine), limits)
    return TestClient(app, base_url="http://localhost")


@pytest.fixture(scope="module")
def server():
    with made() as client:
        yield warm(client)


def ask(socket, message):
    socket.send_bytes(wire.pack(message))
    return heard(socket)


def heard(socket):
    """An answer, or the content of a refusal as JSON."""
    frame = socket.receive()
    return json.loads(frame["text"]) if frame.get("text") is not None else wire.unpack(frame["bytes"])


def test_the_server_speaks_first_and_says_what_it_is(server):
    with server.websocket_connect(ROOT) as socket:
        first = heard(socket)
    assert (first["model"], first["unnorm_keys"], first["cameras"]) == ("fake", ["robot"], ["primary"])
    assert (first["state_dim"], first["action_dim"], first["chunk"], first["hz"]) == (None, 7, 1, None)
    assert first["action_names"][-1] == "gripper"


def test_an_observation_gets_a_chunk_of_actions():
    with made(FakeModel(("primary",), chunk=5)) as client, warm(client).websocket_connect(ROOT) as socket:
        assert heard(socket)["chunk"] == 5
        answer = ask(socket, GOOD)
        assert answer["actions"].shape == (5, 7) and answer["actions"][0, 0] == pytest.approx(0.1)
        assert answer["unnorm_key"] == "robot" and answer["session"].startswith("connection ")
        assert {"infer_ms", "queue_ms", "read_ms", "total_ms"} <= answer["server_timing"].keys()
        assert "probabilities" not in answer
        more = ask(socket, {**GOOD, "details": True, "distributions": True, "request_id": 4, "session": "a", "step": 2})
        assert more["probabilities"].shape == more["normalized"].shape == (5, 7)
        assert more["distributions"].shape == (5, 7, 256)
        assert (more["request_id"], more["session"], more["step"]) == (4, "a", 2)


WRONG = {
    "no message": b"\xc1",
    "text": "hello",
    "list": wire.pack([1]),
    "no image": wire.pack({"prompt": "go"}),
    "unknown name": wire.pack({**GOOD, "front": GOOD["observation/image"]}),
    "empty": b"",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_refusal_says_what_is_expected_and_closes_nothing(server, name):
    with server.websocket_connect(ROOT) as socket:
        heard(socket)
        sent = WRONG[name]
        socket.send_text(sent) if isinstance(sent, str) else socket.send_bytes(sent)
        refusal = heard(socket)
        assert refusal["code"] == "bad_request" and "This model takes: images 'primary'" in refusal["error"]
        assert ask(socket, GOOD)["actions"].shape == (1, 7)


def test_another_address_is_not_taken_for_a_missing_key(server):
    with pytest.raises(WebSocketDenialResponse) as raised, server.websocket_connect(f"{ROOT}ws"):
        pass
    assert raised.value.status_code == 404 and REALTIME in raised.value.json()["error"]


def test_a_refusal_says_which_request_it_is_of(server):
    with server.websocket_connect(ROOT) as socket:
        heard(socket)
        assert ask(socket, {"prompt": "go", "request_id": 9})["request_id"] == 9


def test_a_model_that_fails_is_not_explained(server, monkeypatch):
    async def broken(request):
        raise RuntimeError("secret")

    monkeypatch.setattr(server.app.state.service, "ask", broken)
    with server.websocket_connect(ROOT) as socket:
        heard(socket)
        refusal = ask(socket, {**GOOD, "request_id": "x"})
        assert refusal["code"] == "failed" and refusal["request_id"] == "x" and "secret" not in refusal["error"]


def test_vllm_omni_s_clients_get_bare_arrays():
    with (
        made(FakeModel(("primary", "wrist"), chunk=3)) as client,
        warm(client).websocket_connect(ROOT[:-1] + REALTIME) as socket,
    ):
        first = heard(socket)
        assert (first["image_resolution"], first["n_external_cameras"], first["needs_wrist_camera"]) == (
            [8, 8],
            1,
            True,
        )
        message = {**GOOD, "observation/wrist_image": GOOD["observation/image"], "session_id": "one"}
        actions = ask(socket, {**message, "endpoint": "infer"})
        assert isinstance(actions, np.ndarray) and actions.shape == (3, 7) and actions.dtype == np.float32
        socket.send_bytes(wire.pack({"endpoint": "reset", "session_id": "one"}))
        assert socket.receive_text() == "reset successful"
        assert ask(socket, {"prompt": "go"})["code"] == "bad_request"


def test_an_episode_ends_where_it_is_said_and_where_the_connection_does():
    model = FakeModel(("primary",))
    with made(model) as client:
        with warm(client).websocket_connect(ROOT) as socket:
            heard(socket)
            own = ask(socket, GOOD)["session"]
            assert ask(socket, {"endpoint": "reset", "session": "a"}) == {"reset": True}
            assert ask(socket, {"endpoint": "reset"}) == {"reset": True}
            ask(socket, GOOD)
        wait(lambda: model.ended == ["a", own, own])


def test_answers_come_in_order_and_the_newest_observation_wins():
    model = SlowModel(("primary",))
    with made(model, max_batch=1) as client, warm(client).websocket_connect(ROOT) as socket:
        heard(socket)
        socket.send_bytes(wire.pack({**GOOD, "request_id": 0}))
        assert model.asked.acquire(timeout=30)  # the model has the first
        for number in (1, 2):
            socket.send_bytes(wire.pack({**GOOD, "request_id": number}))
            wait(lambda: client.app.state.service.metrics._requests.labels("websocket")._value.get() == number + 1)  # noqa: B023
            wait(lambda: client.app.state.service.engine.waiting() == 1)
        wait(lambda: client.app.state.service.engine.outcomes["superseded"] == 1)
        model.go.release(2)
        assert heard(socket)["request_id"] == 0
        assert (found := heard(socket))["code"] == "superseded" and found["request_id"] == 1
        assert heard(socket)["request_id"] == 2


def test_a_large_observation_is_not_taken_for_a_newer_one(monkeypatch):
    """The second is read while the first still is."""
    model, reading = SlowModel(("primary",)), threading.Event()
    with made(model, max_batch=1) as client, warm(client).websocket_connect(ROOT) as socket:
        service = client.app.state.service
        read = service.read

        async def slowly(decode, size, *given):
            found = await read(decode, size, *given)
            if found.request_id == 1:
                reading.set()
                await asyncio.sleep(0.1)
            return found

        monkeypatch.setattr(service, "read", slowly)
        heard(socket)
        socket.send_bytes(wire.pack({**GOOD, "request_id": 0}))
        assert model.asked.acquire(timeout=30)  # the model has the first
        socket.send_bytes(wire.pack({**GOOD, "request_id": 1}))
        assert reading.wait(30)
        socket.send_bytes(wire.pack({**GOOD, "request_id": 2}))
        wait(lambda: service.engine.outcomes["superseded"] == 1)
        model.go.release(2)
        codes = {found["request_id"]: found.get("code") for found in (heard(socket), heard(socket), heard(socket))}
        assert codes == {0: None, 1: "superseded", 2: None}


@pytest.mark.parametrize("how", ["gone", "does not read"])
def test_who_takes_no_answers_keeps_no_place(how):
    """As uvicorn tells it: sending raises, or does not return. More waits than the server reads ahead."""
    sent: list[dict] = []

    async def talk():
        engine = Engine(FakeModel(("primary",)))
        app = create_app(engine, Limits(ahead=1, send_seconds=0.05))
        service = app.state.service
        service.start()
        await service.warm
        messages = [{"type": "websocket.connect"}]
        messages += [{"type": "websocket.receive", "bytes": wire.pack({**GOOD, "session": str(i)})} for i in range(6)]

        async def receive():
            return messages.pop(0) if messages else await asyncio.Future()

        async def send(message):
            sent.append(message)
            if message["type"] == "websocket.send" and len(sent) > 2:
                if how == "gone":
                    raise OSError
                await asyncio.Future()

        scope = {"type": "websocket", "path": "/", "headers": [(b"host", b"localhost")], "query_string": b""}
        async with asyncio.timeout(30):
            await app(scope, receive, send)
        assert service.open == 0 and service.metrics._sockets._value.get() == 0
        await service.stop()

    asyncio.run(talk())
    assert [message["type"] for message in sent[:3]] == ["websocket.accept", "websocket.send", "websocket.send"]


def test_who_leaves_waits_no_more():
    model = SlowModel(("primary",))
    with made(model, max_batch=1) as client:
        engine = warm(client).app.state.service.engine
        with client.websocket_connect(ROOT) as first, client.websocket_connect(ROOT) as second:
            heard(first), heard(second)
            first.send_bytes(wire.pack(GOOD))
            assert model.asked.acquire(timeout=30)
            second.send_bytes(wire.pack(GOOD))
            wait(lambda: engine.waiting() == 1)
            second.close()
            wait(lambda: engine.waiting() == 0)
            gone = 'openvla_refusals_total{code="gone",protocol="websocket"} 1.0'
            wait(lambda: gone in client.get("/metrics").text)  # or it would be one of those that were answered
            model.go.release()
            assert heard(first)["actions"].shape == (1, 7)
        assert model.batches == [1]


def test_a_silent_connection_is_closed():
    with made(limits=Limits(idle_seconds=0.01)) as client, warm(client).websocket_connect(ROOT) as socket:
        heard(socket)
        with pytest.raises(WebSocketDisconnect):
            socket.receive_bytes()


def test_there_is_room_for_so_many_bytes():
    with (
        made(limits=Limits(bodies_bytes=100, message_bytes=100)) as client,
        warm(client).websocket_connect(ROOT) as socket,
    ):
        heard(socket)
        assert ask(socket, GOOD)["code"] == "busy"


def test_what_is_in_flight_is_answered_when_the_server_stops():
    model = SlowModel(("primary",))
    with made(model) as client, warm(client).websocket_connect(ROOT) as socket:
        heard(socket)
        socket.send_bytes(wire.pack(GOOD))
        assert model.asked.acquire(timeout=30)
        stopped = client.portal.start_task_soon(client.app.state.service.stop)
        wait(lambda: not client.app.state.service.engine.ready)
        socket.send_bytes(wire.pack({**GOOD, "session": "late"}))
        model.go.release()
        assert heard(socket)["actions"].shape == (1, 7)
        assert heard(socket)["code"] == "busy"
        stopped.result(timeout=30)


def wait(condition) -> None:
    """Until something has happened in the server's thread."""

    async def look():
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    asyncio.run(look())
