"""Hundreds of bad requests over each protocol: refused in words, no 5xx, no action; thousands: `make test-fuzz`."""

import itertools
import json

import numpy as np
import pytest
from bad_requests import GOOD, bodies, damaged, packed
from fake_serving import FakeModel
from starlette.testclient import TestClient

from openvla.serving import wire
from openvla.serving.app import create_app
from openvla.serving.engine import Engine
from openvla.serving.websocket import REALTIME


COUNT = 300


@pytest.fixture(scope="module")
def server():
    app = create_app(Engine(FakeModel(("primary",))))
    with TestClient(app, base_url="http://localhost") as client:

        async def warm():
            await app.state.service.warm

        client.portal.call(warm)
        yield client


def answered(server) -> int:
    return server.app.state.service.engine.outcomes["answered"]


def test_bodies(server):
    before = answered(server)
    for kind, body in itertools.islice(bodies(np.random.default_rng(1)), COUNT):
        answer = server.post("/act", content=body, headers={"Content-Type": kind})
        assert answer.status_code in (400, 413), (kind, body[:300], answer.text[:300])
        assert answer.json()["code"] in ("bad_request", "too_large") and len(answer.text) < 4000
    assert answered(server) == before


@pytest.mark.parametrize("path", ["/", REALTIME])
def test_messages(server, path):
    before = answered(server)
    with server.websocket_connect(f"ws://localhost{path}") as socket:
        socket.receive_bytes()
        for data in itertools.islice(packed(np.random.default_rng(2)), COUNT):
            socket.send_bytes(data)
            frame = socket.receive()
            assert frame.get("text") is not None, (data[:300], frame)
            assert json.loads(frame["text"])["code"] in ("bad_request", "too_large"), (data[:300], frame)
        assert answered(server) == before
        socket.send_bytes(wire.pack(GOOD))
        assert "bytes" in socket.receive()


def test_damaged_messages_are_answered_or_refused(server):
    rng = np.random.default_rng(3)
    good, text = wire.pack(GOOD), wire.to_json(GOOD).encode()
    with server.websocket_connect("ws://localhost/") as socket:
        socket.receive_bytes()
        for _ in range(COUNT):
            socket.send_bytes(damaged(rng, good))
            frame = socket.receive()
            if frame.get("text") is not None:
                assert json.loads(frame["text"])["code"] in ("bad_request", "too_large")
            else:
                assert np.isfinite(wire.unpack(frame["bytes"])["actions"]).all()
            answer = server.post("/act", content=damaged(rng, text), headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 413), answer.text
