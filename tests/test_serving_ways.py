"""One request in every form that a server reads: it is the same request, or refused, in all of them."""

import base64
import json
import random

import numpy as np
from fake_serving import FakeModel, warm
from starlette.testclient import TestClient

from openvla.serving import wire
from openvla.serving.app import create_app
from openvla.serving.engine import Engine


LETTERS = ["a", "é", "抽", "🤖", " ", "\n", "\r\n", "\t", '"', "\\", "--", "\u2028", "\x00", "&", "%", "null", "{", "1"]
NAMES = ["s", "é", "a b", "1", "null", "[1]", "true"]


class Seen(FakeModel):
    """Keeps what it is asked."""

    def _answer(self, request):
        seen = request.observation
        images = {name: image.tobytes() for name, image in seen.images.items()}
        committed = None if seen.committed is None else seen.committed.tolist()
        self.seen = (
            seen.instruction,
            seen.state.tolist(),
            committed,
            images,
            request.unnorm_key,
            request.session,
            seen.step,
        )
        return super()._answer(request)


def drawn(draw: random.Random) -> tuple[dict, dict]:
    """What is asked, and its images."""
    number = lambda: draw.choice([0, 1, -1, 0.1, 1e-30, 1e30, 3])  # noqa: E731
    asked = {
        "instruction": "".join(draw.choices(LETTERS, k=draw.randint(1, 9))), "unnorm_key": draw.choice(["a", "b"]),
        "session": draw.choice(NAMES), "step": draw.randint(0, 10**6), "request_id": draw.choice(NAMES),
        "state": [number() for _ in range(3)],
    }  # fmt: skip
    if draw.random() < 0.5:
        asked["committed"] = [[number() for _ in range(7)] for _ in range(draw.randint(1, 2))]
    noise = np.random.default_rng(draw.randrange(2**32))
    sizes = {name: (draw.randint(5, 20), draw.randint(5, 20), 3) for name in ("primary", "wrist")}
    return asked, {name: noise.integers(0, 256, size).astype(np.uint8) for name, size in sizes.items()}


def ways(server, socket, asked: dict, images: dict):
    """Name of each form, and the answer in it, or None."""
    files = {name: wire.picture_file(image, "PNG") for name, image in images.items()}
    written = {**asked, **{name: base64.b64encode(file).decode() for name, file in files.items()}}
    arrays = wire.to_json({**asked, **images})
    for name, text in {
        "base64": json.dumps(written),
        "base64 in UTF-8": json.dumps(written, ensure_ascii=False).encode(),
        "base64 in UTF-16": json.dumps(written).encode("utf-16"),
        "json-numpy": wire.to_json({**asked, "observation": {"images": images}, "details": True}),
        "encoded twice": json.dumps({"encoded": arrays}),
    }.items():
        answer = server.post("/act", content=text, headers={"Content-Type": "application/json"})
        yield name, answer.json() if answer.status_code == 200 else None
    answer = server.post(
        "/act", data={name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()},
        files={name: (name, file, "image/png") for name, file in files.items()},
    )  # fmt: skip
    yield "form", answer.json() if answer.status_code == 200 else None
    packed = wire.pack({**asked, **images})
    answer = server.post("/act", content=packed, headers={"Content-Type": "application/msgpack"})
    yield "msgpack", wire.unpack(answer.content) if answer.status_code == 200 else None
    socket.send_bytes(wire.pack({**asked, **files}))
    frame = socket.receive()
    yield "websocket", wire.unpack(frame["bytes"]) if frame.get("bytes") else None


def test_a_request_is_the_same_in_every_form():
    model = Seen(("primary", "wrist"), chunk=3, state_dim=3, keys=("a", "b"))
    with TestClient(create_app(Engine(model)), base_url="http://localhost") as server:
        with warm(server).websocket_connect("ws://localhost/") as socket:
            socket.receive_bytes()
            refused, draw = 0, random.Random(0)
            for _ in range(40):
                asked, images = drawn(draw)
                found = {}
                for name, answer in ways(server, socket, asked, images):
                    found[name] = None if answer is None else model.seen
                    if isinstance(answer, dict):
                        assert [answer[one] for one in ("request_id", "session", "step")] == [
                            asked[one] for one in ("request_id", "session", "step")
                        ], name
                assert all(one == found["base64"] for one in found.values()), (asked, found)
                refused += found["base64"] is None
            assert 0 < refused < 20
