"""`POST /act` and what a server says of itself: old clients get what their servers answered, nobody gets a 500."""

import asyncio
import base64
import io
import json
import logging
import threading

import json_numpy
import numpy as np
import pytest
from fake_serving import FakeModel, warm
from PIL import Image
from starlette.testclient import TestClient

from openvla.options.serving import Limits
from openvla.serving import rest, service, wire
from openvla.serving.app import create_app
from openvla.serving.contract import Busy, Late
from openvla.serving.engine import Engine
from openvla.serving.rest import example
from openvla.serving.wire import MOST_BYTES


IMAGE = np.full((8, 8, 3), 100, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
NUMPY = {"Content-Type": "application/json"}


def client(model=None, limits=None, **given) -> TestClient:
    app = create_app(Engine(model or FakeModel(("primary",))), limits, **given)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def server():
    with client() as made:
        yield warm(made)


@pytest.fixture(scope="module")
def chunks():
    with client(FakeModel(("full_image", "wrist_image"), chunk=4, state_dim=8, keys=("libero",))) as made:
        yield warm(made)


def png(image=IMAGE, kind="PNG") -> bytes:
    return wire.picture_file(image, kind)


# Clients that exist ---------------------------------------------------------------------------------------------------


def test_a_client_of_the_original_gets_one_encoded_array(server):
    sent = json_numpy.dumps({"image": IMAGE, "instruction": "open the drawer", "unnorm_key": "robot"})
    action = json_numpy.loads(server.post("/act", content=sent, headers=NUMPY).text)
    assert isinstance(action, np.ndarray) and action.shape == (7,) and action.dtype == np.float64
    assert action[0] == pytest.approx(0.1) and action[1] == pytest.approx(0.015)
    without_key = json_numpy.dumps({"image": IMAGE, "instruction": "open the drawer"})
    np.testing.assert_array_equal(
        json_numpy.loads(server.post("/act", content=without_key, headers=NUMPY).text), action
    )


def test_the_very_lines_of_the_original_s_client(server, monkeypatch):
    """It patches the JSON of the process, and looks at nothing but what comes out."""
    for name in ("dumps", "loads"):
        monkeypatch.setattr(json, name, getattr(json_numpy, name))
    sent = {"image": np.zeros((256, 256, 3), dtype=np.uint8), "instruction": "do something"}
    action = server.post("/act", content=json.dumps(sent), headers=NUMPY).json()  # what requests.post(json=sent) does
    assert isinstance(action, np.ndarray) and action.shape == (7,)


def test_the_double_encoded_form_gets_a_text_that_holds_the_array(server):
    sent = {"encoded": json_numpy.dumps({"image": IMAGE, "instruction": "open the drawer"})}
    answer = server.post("/act", json=sent).json()
    assert isinstance(answer, str) and json_numpy.loads(answer).shape == (7,)


def test_a_client_of_oft_gets_a_list_of_arrays(chunks):
    sent = {"full_image": IMAGE, "wrist_image": IMAGE, "state": np.zeros(8), "instruction": "open the drawer"}
    actions = json_numpy.loads(chunks.post("/act", content=json_numpy.dumps(sent), headers=NUMPY).text)
    assert isinstance(actions, list) and len(actions) == 4 and all(action.shape == (7,) for action in actions)


def test_details_come_as_a_map_where_they_are_asked(server):
    sent = {"image": IMAGE, "instruction": "go", "details": True, "request_id": "a", "session": "b", "step": 3}
    found = json_numpy.loads(server.post("/act", content=json_numpy.dumps(sent), headers=NUMPY).text)
    assert found["actions"].shape == found["normalized"].shape == found["probabilities"].shape == (1, 7)
    assert (found["request_id"], found["session"], found["step"]) == ("a", "b", 3)


def test_base64_gets_plain_numbers_and_what_they_mean(server):
    sent = {"image": base64.b64encode(png()).decode(), "prompt": "open the drawer"}
    found = server.post("/act", json=sent).json()
    assert found["actions"][0][0] == pytest.approx(0.1) and found["names"][-1] == "gripper"
    assert found["probabilities"][0][0] == 0.75 and found["unnorm_key"] == "robot"
    assert {"queue_ms", "infer_ms", "read_ms", "total_ms", "batch_size"} <= found["server_timing"].keys()
    with_head = {**sent, "image": "data:image/png;base64," + sent["image"]}
    assert server.post("/act", json=with_head).json()["actions"] == found["actions"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_forms_are_read(server, chunks, kind):
    found = server.post("/act", files={"image": png(kind=kind)}, data={"instruction": "12"}).json()
    assert found["actions"][0][:2] == pytest.approx([0.1, 0.002], abs=1e-3)  # "12" is an instruction, and no number
    given = {"instruction": "go", "state": json.dumps([0.0] * 8), "step": "4", "committed": json.dumps([[0.0] * 7])}
    files = {"full_image": png(kind=kind), "wrist_image": png(kind=kind)}
    found = chunks.post("/act", files=files, data=given).json()
    assert np.shape(found["actions"]) == (4, 7) and found["step"] == 4


def test_words_of_a_form_are_words_under_any_name():
    """Those that other clients have for an instruction, and those of --map, were expected to hold JSON."""
    with client(mapping={"lang": "instruction"}) as made:
        warm(made)
        for name in ("task_description", "language_instruction", "lang", "observation/prompt"):
            found = made.post("/act", files={"image": png()}, data={name: "open the drawer"}).json()
            assert found["actions"][0][1] == pytest.approx(0.015), found
        encoded = base64.b64encode(png()).decode()
        form = {name: (None, value) for name, value in {"image": encoded, "task": "true"}.items()}
        assert made.post("/act", files=form).json()["actions"][0][:2] == pytest.approx([0.1, 0.004], abs=1e-3)
        for name in ("state", "step", "details", "gripper_position"):
            found = made.post("/act", files={"image": png()}, data={"task": "go", name: "0.1,"})
            assert found.status_code == 400 and f"'{name}': expected JSON" in found.json()["error"]


def test_msgpack_gets_msgpack(server):
    sent = wire.pack({"observation/image": IMAGE, "prompt": "go", "request_id": 5})
    answer = server.post("/act", content=sent, headers={"Content-Type": "application/msgpack"})
    found = wire.unpack(answer.content)
    assert found["actions"].shape == (1, 7) and found["request_id"] == 5
    assert found["digest"] == server.get("/info").json()["digest"]


def test_a_large_picture_is_decoded_in_another_thread(server):
    large = png(np.full((600, 600, 3), 100, np.uint8))
    threads = server.app.state.service._threads
    before = len(threads._threads)
    assert server.post("/act", files={"image": png()}, data={"instruction": "go"}).status_code == 200
    assert len(threads._threads) == before
    found = server.post("/act", files={"image": large}, data={"instruction": "go"}).json()
    assert found["actions"][0][0] == pytest.approx(0.1) and len(threads._threads) > 0


def test_an_episode_ends(server):
    assert server.post("/act", json={"endpoint": "reset", "session": "b"}).json() == {"reset": True}


# What the server says of itself ---------------------------------------------------------------------------------------


def test_it_says_what_it_is(server, chunks):
    assert server.get("/healthz").text == "OK\n"
    assert (server.get("/readyz").status_code, server.get("/readyz").json()) == (200, {"ready": True})
    info = chunks.get("/info").json()
    assert (info["cameras"], info["state_dim"], info["chunk"]) == (["full_image", "wrist_image"], 8, 4)
    assert info["datasets"]["libero"]["names"][-1] == "gripper" and info["datasets"]["libero"]["spec_stated"] is False


def test_who_only_looks_whether_it_lives_gets_no_body(server):
    for path in ("/healthz", "/readyz"):
        answer = server.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("ask, status", [(("GET", "/act"), 405), (("POST", "/predict"), 404), (("GET", "/docs"), 404)])
def test_another_address_is_told_where_actions_are(server, ask, status):
    answer = server.request(*ask)
    assert answer.status_code == status and "POST /act" in answer.json()["error"] and answer.json()["code"]


def test_nobody_is_led_elsewhere(server):
    """By `http://` behind a proxy that speaks TLS, and curl said nothing at all."""
    sent = {"image": base64.b64encode(png()).decode(), "instruction": "go"}
    assert server.post("/act/", json=sent, follow_redirects=False).json()["actions"]
    for path in ("/info", "/metrics", "/healthz", "/readyz"):
        assert server.get(path + "/", follow_redirects=False).status_code == server.get(path).status_code == 200


def test_it_is_not_ready_before_it_is_warm():
    engine = Engine(FakeModel(("primary",)))
    server = TestClient(create_app(engine), base_url="http://localhost")  # not started
    assert server.get("/readyz").status_code == 503 and server.get("/healthz").status_code == 200
    assert server.get("/readyz").json() == {
        "ready": False, "error": "The model is warming up: ask again.", "code": "busy", "retry_after": 1.0
    }  # fmt: skip
    refused = server.post("/act", json=example(engine.info))
    assert refused.status_code == 503 and refused.json()["code"] == "busy" and int(refused.headers["Retry-After"]) >= 1


def test_metrics_count(server):
    server.post("/act", json=example(server.app.state.service.info))
    server.post("/act", json={})
    server.post("/act", content="{}", headers={"Content-Type": "text/plain"})
    server.post("/act", content=b" " * (MOST_BYTES + 1), headers={"Content-Type": "application/json"})
    server.get("/info", headers={"Host": "elsewhere.example"})
    text = server.get("/metrics").text
    for line in (
        'openvla_refusals_total{code="bad_request",protocol="rest"}',
        'openvla_refusals_total{code="too_large",protocol="rest"}',
        'openvla_refusals_total{code="forbidden",protocol="gate"}',
        'openvla_stage_seconds_count{stage="infer"}',
        'openvla_stage_seconds_count{stage="queue"}',
        "openvla_batch_size_count",
        'openvla_requests_total{protocol="rest"}',
        "openvla_queue 0.0",
        "openvla_ready 1.0",
        "openvla_predicting_seconds 0.0",
        "openvla_bodies_bytes 0.0",
    ):
        assert line in text, text


def test_metrics_say_which_replica_they_are_of(server):
    metrics = server.app.state.service.metrics
    metrics.labels["replica"] = "a1"
    try:
        text = server.get("/metrics").text
    finally:
        metrics.labels.clear()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines and all('replica="a1"' in line for line in lines)


def test_examples_of_the_description_work(server, chunks):
    for made in (server, chunks):
        described = made.get("/openapi.json").json()["paths"]["/act"]["post"]
        content = described["requestBody"]["content"]
        for given in content["application/json"]["examples"].values():
            assert made.post("/act", json=given["value"]).status_code == 200
        assert {"200", "400", "401", "403", "413", "500", "503", "504"} <= described["responses"].keys()


# What is wrong --------------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=np.uint8):
    return json_numpy.dumps(np.zeros(shape, dtype))


GOOD = {"image": base64.b64encode(png()).decode(), "instruction": "go"}
BAD = {
    "nothing": {},
    "list": [],
    "null": None,
    "text": "image",
    "no image": {"instruction": "go"},
    "no instruction": {"image": GOOD["image"]},
    "empty instruction": {**GOOD, "instruction": " \n"},
    "instruction is a number": {**GOOD, "instruction": 5},
    "half a letter": {**GOOD, "instruction": "go \ud800"},
    "half a letter in a name": {**GOOD, "\ud800": 1},
    "unknown key": {**GOOD, "unnorm_key": "no"},
    "key is a list": {**GOOD, "unnorm_key": ["robot"]},
    "unknown name": {**GOOD, "imgae": 1},
    "two instructions": {**GOOD, "prompt": "stay"},
    "two images": {**GOOD, "full_image": GOOD["image"]},
    "image is a path": {**GOOD, "image": "/etc/passwd"},
    "image is a URL": {**GOOD, "image": "http://localhost/a.png"},
    "image is a number": {**GOOD, "image": 1},
    "image is a list": {**GOOD, "image": [[0, 0], [0, 0]]},
    "image of objects": {**GOOD, "image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}},
    "image is cut": {**GOOD, "image": base64.b64encode(png(NOISE)[:-500]).decode()},
    "step": {**GOOD, "step": -1},
    "step is true": {**GOOD, "step": True},
    "session": {**GOOD, "session": "a\nb"},
    "request id": {**GOOD, "request_id": 2**70},
    "committed": {**GOOD, "committed": [[0.0] * 7]},
    "timeout": {**GOOD, "timeout_ms": 0},
    "endless timeout": {**GOOD, "timeout_ms": 1e300},
    "endpoint": {**GOOD, "endpoint": "train"},
    "details": {**GOOD, "details": "yes"},
    "encoded": {"encoded": "{"},
    "encoded twice more": {"encoded": json.dumps({"encoded": json.dumps(GOOD)})},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_requests_are_told_what_is_expected(server, name):
    before = server.app.state.service.engine.outcomes["answered"]
    answer = server.post("/act", content=json.dumps(BAD[name]), headers=NUMPY)
    assert answer.status_code == 400 and answer.json()["code"] == "bad_request"
    assert 20 < len(answer.json()["error"]) < 1500 and "Traceback" not in answer.text
    assert server.app.state.service.engine.outcomes["answered"] == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"a": NaN'])
@pytest.mark.parametrize("kind", ["application/json", "application/msgpack", "multipart/form-data; boundary=x"])
def test_what_is_no_message_is_refused(server, content, kind):
    answer = server.post("/act", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["code"] == "bad_request"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "multipart/form-data"}, 400),
        ({"Content-Type": "multipart/form-data; boundary="}, 400),
        ({"Content-Type": "multipart/form-data; boundary=x; charset=nonsense"}, 400),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 400),
        ({"Content-Type": "application/json", "Content-Length": "99999999999"}, 413),
    ],
)
def test_what_is_not_read_is_refused(server, headers, status):
    answer = server.post("/act", content=b"--x\r\n", headers=headers)
    assert answer.status_code == status and answer.json()["code"] in ("bad_request", "too_large")


def test_more_than_the_limits_is_refused():
    limits = Limits(message_bytes=2000, picture_pixels=100, instruction_letters=9, name_letters=9, state_numbers=3)
    with client(FakeModel(("primary",), chunk=2), limits) as server:
        warm(server)
        for given in (
            {**GOOD, "image": base64.b64encode(png(np.zeros((11, 11, 3), np.uint8))).decode()},
            {**GOOD, "image": json.loads(zeros(11, 11, 3))},
            {**GOOD, "instruction": "go to there"},
            {**GOOD, "session": "a" * 10},
            {**GOOD, "request_id": "a" * 10},
            {**GOOD, "committed": [[0.0] * 7] * 3},
        ):
            answer = server.post("/act", json=given)
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), answer.text
        parts = iter([b"{" * 1500, b" " * 1500])  # without a length
        assert server.post("/act", content=parts, headers=NUMPY).status_code == 413
        assert server.post("/act", json=GOOD).status_code == 200


def test_a_form_has_so_many_parts(server):
    many = {f"image{number}": png() for number in range(20)}
    assert server.post("/act", files=many).status_code == 400
    assert server.post("/act", files={"image": png()}, data={str(n): "1" for n in range(40)}).status_code == 400
    twice = [("image", png()), ("image", png())]
    assert "twice" in server.post("/act", files=twice).json()["error"]


def test_a_form_is_read_as_utf8_alone(server):
    """Python decodes punycode in the square of its length: 320 kB stopped everybody for 5 s."""
    sent = (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"a" * 9000 + b"-" + b"a" * 9000 + b"\r\n--x--\r\n"
    )
    for charset in ("punycode", "idna", "utf-7"):
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = server.post("/act", content=sent, headers={"Content-Type": kind})
        assert answer.status_code == 400 and f"charset={charset}: expected utf-8" in answer.json()["error"]
    kind = "multipart/form-data; boundary=x; charset=UTF-8"
    assert "charset" not in server.post("/act", content=sent, headers={"Content-Type": kind}).json()["error"]


@pytest.mark.parametrize("words, end, said", [
    ("öffne die Tür".encode(), b"--x--", ""),
    ("öffne die Tür".encode("latin-1"), b"--x--\r\n", "'instruction': expected utf-8"),  # the arm did something else
    (b"go", b"", "its end is missing"),  # the last field, which may be the units, was left out
])  # fmt: skip
def test_a_form_is_read_as_it_was_meant(server, words, end, said):
    fields = {b"instruction": words, b"image": base64.b64encode(png()), b"step": b"1"}
    sent = b"".join(b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % one for one in fields.items())
    answer = server.post("/act", content=sent + end, headers={"Content-Type": 'multipart/form-data; boundary="x"'})
    assert answer.status_code == (400 if said else 200) and said in answer.text


def test_a_large_form_is_read_in_another_thread(server, monkeypatch):
    threads, read = [], rest.read_form

    async def noted(*given):
        threads.append(threading.current_thread())
        return await read(*given)

    monkeypatch.setattr(rest, "read_form", noted)
    large = png(np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8))
    assert len(large) > service.QUICK
    for image in (png(), large):
        found = server.post("/act", files={"image": image}, data={"instruction": "go"}).json()
        assert found["actions"][0][0] == pytest.approx(0.1, abs=0.03)
    assert threads[0] is not threads[1]


# What fails -----------------------------------------------------------------------------------------------------------


def test_a_model_that_fails_is_not_explained_to_clients(caplog):
    class Broken(FakeModel):
        def act(self, requests):
            raise RuntimeError("secret place")

    with client(Broken(("primary",))) as server, caplog.at_level(logging.ERROR):
        answer = warm(server).post("/act", json={**GOOD, "request_id": 7})
    assert answer.status_code == 500 and answer.json()["code"] == "failed" and answer.json()["request_id"] == 7
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert "secret place" in caplog.text


def test_actions_that_are_not_finite_are_none():
    class Wild(FakeModel):
        def _answer(self, request):
            answer = super()._answer(request)
            answer.actions[0, 2] = np.nan
            return answer

    with client(Wild(("primary",))) as server:
        assert warm(server).post("/act", json=GOOD).status_code == 500


def test_what_nobody_thought_of_is_logged_and_not_told(server, monkeypatch, caplog):
    service = server.app.state.service
    monkeypatch.setattr(service.reader, "read", lambda *given: 1 / 0)
    answer = server.post("/act", json=GOOD)
    assert answer.status_code == 500 and "division" not in answer.text and "division" in caplog.text


def test_late_answers_are_refusals(server, monkeypatch):
    async def late(request):
        raise Late("too late")

    monkeypatch.setattr(server.app.state.service.engine, "act", late)
    answer = server.post("/act", json=GOOD)
    assert (answer.status_code, answer.json()) == (504, {"error": "too late", "code": "late"})


def test_only_pictures_of_two_kinds_are_opened(server):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "BMP")
    answer = server.post("/act", json={**GOOD, "image": base64.b64encode(stream.getvalue()).decode()})
    assert answer.status_code == 400 and "JPEG or PNG" in answer.json()["error"]


# Below the client library ---------------------------------------------------------------------------------------------


class Held(FakeModel):
    """Answers when it is told to."""

    def __init__(self, *given):
        super().__init__(*given)
        self.go = threading.Event()

    def act(self, requests):
        assert self.go.wait(30)
        return super().act(requests)


def scope(length: int) -> dict:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
    return {
        "type": "http", "method": "POST", "path": "/act", "raw_path": b"/act", "query_string": b"", "scheme": "http",
        "http_version": "1.1", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        "asgi": {"version": "3.0"}, "root_path": "",
    }  # fmt: skip


async def call(app, parts: list[bytes], length: int, leave: asyncio.Event) -> list[dict]:
    """What is answered to a client that sends `parts`, and leaves when it is told to."""
    came = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if sum(map(len, parts)) == length:
        came[-1]["more_body"] = False
    sent: list[dict] = []

    async def receive() -> dict:
        if came:
            return came.pop(0)
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope(length), receive, send)
    return sent


def test_who_leaves_frees_the_place_in_the_queue():
    async def run() -> None:
        model = Held(("primary",))
        app = create_app(Engine(model, max_batch=1))
        service = app.state.service
        service.start()
        await service.warm
        body = json.dumps(example(service.info)).encode()
        first, leave = asyncio.Event(), asyncio.Event()
        held = asyncio.create_task(call(app, [body], len(body), first))
        while not model.go.is_set() and not service.engine.unanswered():
            await asyncio.sleep(0)
        second = asyncio.create_task(call(app, [body], len(body), leave))
        while service.engine.waiting() != 1:
            await asyncio.sleep(0.001)
        leave.set()
        await second
        assert service.engine.waiting() == 0
        model.go.set()
        assert (await held)[0]["status"] == 200
        await service.stop()
        assert model.batches == [1]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_body_that_is_coming_in_takes_room_already():
    async def run() -> None:
        app = create_app(Engine(FakeModel(("primary",))), Limits(bodies_bytes=1500, message_bytes=1500))
        room, leave = app.state.service.room, asyncio.Event()
        first = asyncio.create_task(call(app, [bytes(1000)], 1200, leave))
        while room.taken != 1000:
            await asyncio.sleep(0.001)
        sent = await call(app, [bytes(400), bytes(400)], 800, asyncio.Event())
        assert sent[0]["status"] == 503 and room.taken == 1000
        leave.set()
        await first
        assert room.taken == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_large_request_of_a_server_that_has_stopped_is_told_so():
    """Such as robots send until their connection is closed: it "failed", with a traceback in the log."""

    async def run() -> None:
        made = create_app(Engine(FakeModel(("primary",)))).state.service
        made.start()
        await made.warm
        await made.stop()
        message = {"image": np.zeros((600, 600, 3), np.uint8), "instruction": "go"}
        with pytest.raises(Busy, match="stopping"):
            await made.answer(lambda: message, 2**21)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_images_are_decoded_to_takes_room():
    with client(FakeModel(("primary",)), Limits(bodies_bytes=500_000, message_bytes=500_000)) as server:
        warm(server)
        room = server.app.state.service.room
        for side, others, status in ((600, 0, 413), (300, 300_000, 503), (300, 0, 200)):
            black, room.taken = png(np.zeros((side, side, 3), np.uint8)), others
            answer = server.post("/act", files={"image": black}, data={"instruction": "go"})
            assert answer.status_code == status and len(black) < 10_000, answer.text
        assert room.taken == 0


def test_a_body_that_does_not_come_is_not_awaited_for_ever():
    async def run() -> None:
        app = create_app(Engine(FakeModel(("primary",))), Limits(body_seconds=0.01))
        sent = await call(app, [b'{"image'], 1000, asyncio.Event())
        assert sent[0]["status"] == 400 and b"did not come within" in sent[1]["body"]
        gone = asyncio.Event()
        gone.set()
        assert (await call(app, [b'{"image'], 1000, gone))[0]["status"] == 499

    asyncio.run(asyncio.wait_for(run(), 60))
