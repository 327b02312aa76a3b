"""The page without a browser: its routes and headers, what it refuses, the live view, episodes of a simulator."""

import asyncio
import io
import json
import random
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import quote

import numpy as np
import pytest
from fake_serving import BINS, FakeModel, request
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from openvla.observation import Observation
from openvla.options.serving import Limits
from openvla.serving import episodes
from openvla.serving.app import create_app
from openvla.serving.contract import Busy, Late, Request
from openvla.serving.episodes import MOST_WATCHERS, Episodes, Simulator
from openvla.serving.live import MOST_CAMERAS, MOST_NUMBERS, MOST_ROBOTS, SIDE, LiveView
from openvla.serving.page import EXAMPLES, FOLDER, answer_content, bin_values, page_routes, read_examples
from openvla.serving.rest import read_request
from openvla.serving.server import PAGE_PATHS
from openvla.serving.service import Service
from openvla.serving.wire import picture_file


XSS = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


class FakeEngine:
    """Asks the model at once; `refusals` are raised first, one for each request."""

    ready = True

    def __init__(self, model: FakeModel | None = None, refusals=(), live: LiveView | None = None):
        self.model = model or FakeModel(cameras=("primary",))
        self.info, self.live, self.refusals = self.model.info, live or LiveView(), list(refusals)
        self.requests: list[Request] = []

    async def act(self, request: Request):
        self.requests.append(request)
        if self.refusals:
            raise self.refusals.pop(0)
        return self.model.act([request])[0]

    async def start(self):
        pass

    async def stop(self, patience=30.0):
        pass

    def predicting(self):
        return 0.0

    def waiting(self):
        return 0


def page_app(engine: FakeEngine, episodes: Episodes | None = None, **options):
    """As `openvla serve` puts it together."""

    def routes(service):
        if episodes is not None:
            service.closers.append(episodes.close)
        return page_routes(
            engine,
            lambda http: read_request(http, service),
            service.ask,
            service.asked,
            live=engine.live,
            episodes=episodes,
        )

    return create_app(engine, routes=[routes], open_paths=PAGE_PATHS, **options)


def page(engine=None, **options) -> TestClient:
    return TestClient(page_app(engine or FakeEngine(), **options), base_url="http://localhost:8000")


def form(level: int = 7, **fields) -> dict:
    """What the page sends."""
    picture = picture_file(np.full((8, 8, 3), level, np.uint8), "PNG")
    return {"files": {"primary": ("picture", picture)}, "data": {"instruction": "open the drawer", **fields}}


# Files and headers ----------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.all: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_script():
    html = (FOLDER / "index.html").read_text()
    for tag, attributes in Elements(html).all:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href", "action"):
            assert not re.match(r"(\w+:)?//", attributes.get(name) or ""), (tag, attributes)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
        ), file


def test_everything_that_the_page_names_is_served_with_a_strict_policy():
    client = page()
    html = client.get("/")
    assert html.headers["content-type"].startswith("text/html")
    names = [
        a.get("src") or a.get("href")
        for _, a in Elements(html.text).all
        if (a.get("src") or a.get("href") or "").startswith("page/")
    ]
    scripts = [
        f"page/{name}" for file in FOLDER.glob("*.js") for name in re.findall(r'from "\./(\w+\.js)"', file.read_text())
    ]
    assert {"page/page.js", "page/style.css"} <= set(names) and "page/api.js" in scripts
    for name in ["", *names, *scripts]:
        response = client.get(f"/{name}")
        assert response.status_code == 200, name
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in response.headers["content-security-policy"]
        assert (
            response.headers["x-content-type-options"] == "nosniff"
            and response.headers["referrer-policy"] == "no-referrer"
        )
        assert (
            response.headers["content-type"]
            .split(";")[0]
            .endswith({"": "html"}.get(name) or {"js": "javascript"}.get(name[-2:], "css"))
        )


@pytest.mark.parametrize("name", ["page.py", "..%2fcontract.py", "%2e%2e/contract.py", "index.html", "", "%00"])
def test_nothing_but_the_files_of_the_page(name):
    assert page().get(f"/page/{name}", follow_redirects=False).status_code == 404


def test_an_app_below_a_prefix_has_its_page_there():
    above = Starlette(routes=[Mount("/robots", page_app(FakeEngine()))])
    with TestClient(above, base_url="http://localhost:8000") as server:
        for path in ("", "page/style.css", "info", "info/"):
            assert server.get(f"/robots/{path}", follow_redirects=False).status_code == 200


def test_a_part_of_a_file_is_not_looked_for():
    """In starlette 0.46 to 0.49.0 a header of 64 KiB took most of a second, in which no robot is answered."""
    answer = page().get("/page/page.js", headers={"Range": "bytes=1-2"})
    assert answer.status_code == 200 and "accept-ranges" not in answer.headers
    assert answer.content == (FOLDER / "page.js").read_bytes()


def test_examples(tmp_path):
    client = page()
    examples = client.get("/page/about").json()["examples"]
    assert len(examples) == len(list(EXAMPLES.glob("*.png"))) >= 6
    for example in examples:
        response = client.get(f"/page/examples/{example['name']}")
        with Image.open(io.BytesIO(response.content)) as picture:
            assert picture.size == (224, 224) and response.headers["content-type"] == "image/png"
        assert example["instruction"] and len(response.content) < 60_000
    assert client.get("/page/examples/frames.json").status_code == 404
    assert read_examples(tmp_path) == {}


# Who may ask ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example"])
def test_a_name_that_a_stranger_can_give_to_this_machine_is_refused(host):
    for path in ("/", "/page/page.js", "/page/robots", "/page/about"):
        assert page().get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}], ids=str)
def test_pages_of_other_sites_are_refused(headers):
    engine = FakeEngine()
    client = page(engine, episodes=Episodes(simulator(), engine))
    gets, posts = (
        ("about", "robots", "robots/1/0", "episode"),
        ("act", "episode", "episode/stop", "episode/instruction"),
    )
    for method, path in [*(("POST", path) for path in posts), *(("GET", path) for path in gets)]:
        assert client.request(method, f"/page/{path}", headers=headers, json={"task": "lift"}).status_code == 403
    assert not engine.requests and not client.get("/page/episode").json()["running"]
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to it may be followed


def test_with_a_key_the_page_itself_is_open_and_nothing_else():
    engine = FakeEngine()
    client = page(engine, key="the key", episodes=Episodes(simulator(), engine))
    for path in PAGE_PATHS:
        assert client.get(path).status_code == 200
    example = f"examples/{next(EXAMPLES.glob('*.png')).name}"
    gets, posts = ("about", "robots", example, "episode"), ("act", "episode", "episode/stop", "episode/instruction")
    for method, path in [*(("POST", path) for path in posts), *(("GET", path) for path in gets)]:
        response = client.request(method, f"/page/{path}", json={})
        assert response.status_code == 401 and response.json()["code"] == "unauthorized", path
    assert not engine.requests
    for path in gets:
        assert client.get(f"/page/{path}", headers={"Authorization": "Bearer the key"}).status_code == 200


# An action ------------------------------------------------------------------------------------------------------------


def test_an_action_with_its_spread_in_units():
    engine = FakeEngine()
    content = page(engine).post("/page/act", **form(unnorm_key="robot")).json()
    assert engine.requests[0].distributions and engine.requests[0].session is None
    assert content["unnorm_key"] == "robot" and content["actions"][0][:2] == [0.007, 0.015]
    assert np.shape(content["distributions"]) == (1, 7, BINS) and np.shape(content["low"]) == (1, 7)
    for low, value, high in zip(content["low"][0], content["actions"][0], content["high"][0]):
        assert low - 0.008 <= value <= high + 0.008 and high - low < 0.01  # two bins next to each other
    assert engine.live.robots() == []  # who looks is no robot


def test_bins_in_units_are_those_of_the_tokenizer():
    from openvla.action_tokenizer import ActionTokenizer, unnormalize_actions

    tokenizer, low, high = ActionTokenizer(1000), np.array([-0.02, -1.0, 0.5]), np.array([0.03, 1.0, 0.5])
    first, end = tokenizer.token_range
    normalized = tokenizer.decode(np.arange(end - 1, first - 1, -1))  # as numbers grow
    stats = {"q01": low, "q99": high}
    expected = [unnormalize_actions(np.full(3, number), stats) for number in normalized]
    dataset = replace(FakeModel(dims=3).info.datasets["robot"], low=tuple(low), high=tuple(high))
    np.testing.assert_allclose(bin_values(dataset, 3, len(normalized)).T, expected, atol=1e-12)


def test_the_middle_of_a_distribution():
    model = FakeModel(dims=2)
    answer = model.act([replace(request(), distributions=True)])[0]
    shares = np.zeros((1, 2, BINS), np.float32)
    shares[0, :, 10:20], shares[0, :, 200] = 0.1, 1e-4
    content = answer_content(replace(answer, distributions=shares), model.info.datasets["robot"])
    values = bin_values(model.info.datasets["robot"], 2, BINS)[0]
    assert content["low"] == [[values[10]] * 2] and content["high"] == [[values[19]] * 2]


def test_a_head_without_tokens_has_no_spread():
    model = FakeModel()
    answer = replace(model.act([request()])[0], probabilities=None)
    assert answer_content(answer, model.info.datasets["robot"]).keys() == {"actions", "timing"}


def test_refusals_come_in_words():
    response = page().post("/page/act", **form(instruction=" "))
    assert response.status_code == 400 and "instruction" in response.json()["error"]
    full = page(FakeEngine(refusals=[Busy("The queue is full.", 0.5)]))
    busy = full.post("/page/act", **form())
    counted = full.get("/metrics").text
    assert 'openvla_requests_total{protocol="page"} 1.0' in counted
    assert 'openvla_refusals_total{code="busy",protocol="page"} 1.0' in counted
    assert busy.status_code == 503 and busy.json()["error"] == "The queue is full."


def junk(generator: random.Random) -> tuple[str, str, dict]:
    """A request that nobody should send: method, path, arguments."""
    word = "".join(chr(generator.choice([generator.randrange(32, 127), 0x202E, 0x1F600])) for _ in range(30))
    body = generator.choice(
        [
            generator.randbytes(100),
            b"[" * 15_000,
            json.dumps({"task": generator.choice(["lift", word]), "seed": generator.choice([-1, 10**30, 1e9, None])}),
            json.dumps({"task": "lift", "instruction": generator.choice([word, XSS, 5, "a" * 1001]), "seed": 0}),
        ]
    )
    places = ["act", "episode", "episode/instruction"]
    json_type = {"Content-Type": generator.choice(["application/json", "application/msgpack", "text/plain"])}
    return generator.choice(
        [
            ("GET", f"/page/{quote(word)}", {}),
            ("GET", f"/page/examples/{quote(word)}", {}),
            ("GET", f"/page/robots/{generator.choice([0, 10**20, 'x'])}/{generator.choice([-5, 9, 'y'])}", {}),
            ("GET", f"/page/episode?after={generator.choice([-1, 'x', -(10**40)])}", {}),
            ("POST", f"/page/{generator.choice(places)}", {"content": body, "headers": json_type}),
            ("POST", "/page/act", {"files": {"primary": generator.randbytes(50)}, "data": {"instruction": word}}),
            ("POST", "/page/act", form(unnorm_key=word)),
        ]
    )


def test_junk_is_refused_in_words():
    engine, generator = FakeEngine(), random.Random(0)
    with page(engine, episodes=Episodes(simulator(), engine)) as client:
        for _ in range(300):
            method, path, more = junk(generator)
            response = client.request(method, path, **more)
            assert response.status_code < 500 or response.json()["code"] == "busy", (method, path, more)
            kind = response.headers["content-type"]
            assert kind == "application/json" and "Traceback" not in response.text, (method, path, kind)
        assert client.post("/page/act", **form()).status_code == 200


# Live view ------------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def seen(live: LiveView, given: Request, outcome="answered"):
    robot = live.asked(given)
    live.told(robot, outcome, 12.5, FakeModel().act([given])[0] if outcome == "answered" else None)


def test_robots_as_they_were_seen_last():
    clock = Clock()
    live = LiveView(clock=clock)
    seen(live, request(10, session="b"))
    seen(live, request(20, session="a"), outcome=Late.code)
    seen(live, request(200, session="b", instruction=XSS))
    seen(live, request())
    waiting = live.asked(request(session="a"))
    clock.now += 2
    robots = page(FakeEngine(live=live)).get("/page/robots").json()["robots"]
    assert [robot["name"] for robot in robots] == ["", "a", "b"]
    _, a, b = robots
    expected = {"frame": 2, "instruction": XSS, "state": "answered", "age": 2.0, "latency_ms": 12.5}
    assert b["number"] == a["number"] - 1  # in the order in which they came
    assert b | expected | {"outcomes": {"answered": 2}} == b and b["action"][0] == 0.2
    assert a["outcomes"] == {"late": 1} and a["waiting"] == 1
    live.told(waiting, "gone", 5.0)
    live.ended("a")
    assert [(robot["state"], robot["waiting"]) for robot in live.robots()][1] == ("ended", 0)
    clock.now += 700
    assert live.robots() == []


def test_the_last_picture():
    live = LiveView()
    seen(live, request(10, session="a"))
    seen(live, request(200, session="a"))
    client = page(FakeEngine(live=live))
    (robot,) = live.robots()
    number = robot["number"]
    response = client.get(f"/page/robots/{number}/0")
    with Image.open(io.BytesIO(response.content)) as picture:
        assert picture.format == "JPEG" and abs(int(np.asarray(picture).mean()) - 200) < 4
    assert response.headers["cache-control"] == "no-store"
    for path in (f"{number}/1", f"{number + 1}/0", f"{number}/-1", "0/0"):
        assert client.get(f"/page/robots/{path}").status_code == 404
    assert client.get("/page/robots/a/b").status_code == 422


def test_no_robot_has_the_number_of_another_server_s():
    """A page that was open all the time showed the picture of the first beside the name of the second."""
    views = [LiveView(), LiveView()]
    for live in views:
        seen(live, request(session="a"))
    first, second = ({robot["number"] for robot in live.robots()} for live in views)
    assert not first & second


def test_each_answer_says_of_which_model_it_is():
    engine = FakeEngine()
    client = page(engine, episodes=Episodes(simulator(), engine))
    asked = [client.get(f"/page/{name}") for name in ("about", "robots", "episode")]
    asked.append(client.post("/page/act", **form()))
    asked.append(client.post("/page/episode/stop"))
    assert {answer.json()["digest"] for answer in asked} == {engine.info.digest}


def test_without_frames_no_picture_is_kept():
    live = LiveView(frames=False)
    seen(live, request(10, session="a"))
    assert live.jpeg(1) is None and live.robots()[0]["pictures"] == 0
    assert page(FakeEngine(live=live)).get("/page/about").json()["frames"] is False


def test_the_live_view_is_bounded():
    live = LiveView()
    images = {f"camera{number}": np.zeros((3000, 2000, 3), np.uint8) for number in range(10)}
    large = Observation(images, np.zeros(10_000, np.float32), "a" * 100_000)
    for number in range(2 * MOST_ROBOTS):
        seen(live, replace(request(session=f"{number}" + "s" * 1000), observation=large), outcome="busy")
    robots = live.robots()
    assert len(robots) == MOST_ROBOTS and robots[0]["name"].startswith(f"{2 * MOST_ROBOTS - 1}s")
    for robot, kept in zip(robots, live._robots.values()):
        assert len(robot["name"]) == len(robot["instruction"]) == 200
        assert len(robot["proprio"]) == MOST_NUMBERS and robot["pictures"] == MOST_CAMERAS
        for picture in kept.pictures.values():
            assert max(picture.shape) <= SIDE and picture.base is None  # the large one is freed


# Episodes -------------------------------------------------------------------------------------------------------------


class FakeWorld:
    """Done once the instruction's length has been executed three times, in thousandths."""

    opened = closed = 0

    def __init__(self, cameras=(), breaks=None, gate=None):
        type(self).opened += 1
        self.breaks, self.gate = breaks, gate
        self.actions: list[np.ndarray] = []

    def observe(self):
        image = np.full((8, 8, 3), len(self.actions), np.uint8)
        return Observation({"front": image}, np.arange(3, dtype=np.float32), "not said by the user")

    def reset(self, seed, task):
        self.seed, self.task = seed, task
        return self.observe()

    def step(self, action):
        if self.gate is not None:
            self.gate.acquire(timeout=10)
        if self.breaks == len(self.actions):
            raise RuntimeError("the arm fell off")
        self.actions.append(action)
        return self.observe(), sum(action[1] == 0.015 for action in self.actions) == 3

    def close(self):
        type(self).closed += 1


def simulator(make=FakeWorld, **changes) -> Simulator:
    made = Simulator("toys", make, {"lift": "lift the lid", "push": "push it"}, 5, 1e4, range(1000, 2000), ("robot",))
    return replace(made, **changes)


def run(episodes: Episodes, *given):
    """The last step that somebody who watches is shown."""

    async def watch():
        episodes.start(*given)
        step = episodes.last
        while step.running:
            step = await episodes.after(step.number)
        await episodes.close()
        return step

    return asyncio.run(asyncio.wait_for(watch(), 60))


def test_an_episode_to_its_end():
    engine, opened, closed = FakeEngine(), FakeWorld.opened, FakeWorld.closed
    last = run(Episodes(simulator(), engine), "lift", 7, "open the drawer")
    assert (last.success, last.step, last.message, last.seed) == (True, 3, "Success after 3 steps.", 7)
    assert FakeWorld.opened == opened + 1 and FakeWorld.closed == closed + 1
    assert [asked.observation.step for asked in engine.requests] == [0, 1, 2]
    assert {asked.observation.instruction for asked in engine.requests} == {"open the drawer"}
    assert len({asked.session for asked in engine.requests}) == 1 and engine.requests[0].session
    assert list(engine.requests[0].observation.images) == ["primary"] and engine.requests[0].observation.state.size == 0
    with Image.open(io.BytesIO(last.jpeg)) as picture:
        assert picture.size == (8, 8)


def test_an_episode_that_fails_says_so_and_another_can_begin():
    episodes = Episodes(simulator(), FakeEngine())
    assert run(episodes, "lift").message == "Not done after 5 steps."
    assert episodes.last.instruction == "lift the lid" and episodes.last.success is False
    assert run(episodes, "push", 0, "open the drawer").success


def test_the_instruction_changes_while_it_runs():
    engine = FakeEngine(FakeModel(chunk=2, cameras=("primary",)))
    gate = threading.Semaphore(1)

    async def watch():
        episodes = Episodes(simulator(lambda cameras: FakeWorld(gate=gate), max_steps=50), engine)
        episodes.start("lift")
        while episodes.last.step < 1:
            await episodes.after(episodes.last.number)
        episodes.reword("open the drawer")
        gate.release(100)
        while episodes.last.running:
            await episodes.after(episodes.last.number)
        return episodes.last

    last = asyncio.run(watch())
    asked = [(given.observation.step, given.observation.instruction) for given in engine.requests]
    assert asked[0] == (0, "lift the lid") and {words for _, words in asked[1:]} == {"open the drawer"}
    assert last.success and last.instruction == "open the drawer"


@pytest.mark.parametrize(
    "engine, make, said",
    [
        (FakeEngine(), lambda cameras: FakeWorld(breaks=1), "the arm fell off"),
        (FakeEngine(refusals=[Late("There was no answer in time.")]), FakeWorld, "There was no answer in time."),
        (FakeEngine(FakeModel(state_dim=8)), FakeWorld, "The model takes a state of 8 numbers, toys has 3."),
        (FakeEngine(FakeModel(cameras=("primary", "wrist"))), FakeWorld, "toys does not show what the model sees."),
    ],
)
def test_an_episode_that_cannot_go_on_says_why(engine, make, said):
    closed = FakeWorld.closed
    last = run(Episodes(simulator(make), engine), "lift")
    assert last.message.startswith(said) and last.success is None and not last.running
    assert FakeWorld.closed == closed + 1


class Broken(FakeWorld):
    """Raises what no world should."""

    def step(self, action):
        raise KeyError("the name of a joint")

    def close(self):
        raise OSError("the lid is stuck")


def test_what_a_world_raises_is_in_the_log_at_once(caplog):
    """And the episode is over, also where the world cannot be closed."""
    last = run(Episodes(simulator(Broken), FakeEngine()), "lift")
    assert last.message == "The episode broke; the log of the server says why." and not last.running
    assert "the name of a joint" in caplog.text and "the lid is stuck" in caplog.text


def test_an_episode_waits_while_the_server_is_busy():
    engine = FakeEngine(refusals=[Busy("The queue is full.", 0.001)] * 2)
    assert run(Episodes(simulator(), engine), "lift", 0, "open the drawer").success
    assert len(engine.requests) == 5


def test_one_episode_at_a_time_and_stop():
    gate = threading.Semaphore(0)
    engine = FakeEngine()
    with page(engine, episodes=Episodes(simulator(lambda cameras: FakeWorld(gate=gate)), engine)) as client:
        assert client.post("/page/episode/instruction", json={"instruction": "x"}).status_code == 400
        assert client.post("/page/episode", json={"task": "lift", "instruction": XSS}).json()["instruction"] == XSS
        again = client.post("/page/episode", json={"task": "lift"})
        assert again.status_code == 503 and "An episode is running" in again.json()["error"]
        assert client.post("/page/episode/instruction", json={"instruction": "  "}).status_code == 400
        assert client.post("/page/episode/stop").status_code == 200
        gate.release(100)
        state = client.get("/page/episode").json()
        while state["running"]:
            state = client.get(f"/page/episode?after={state['number']}").json()
        assert state["message"] == "Stopped." and state["step"] <= 1


def test_a_simulator_that_never_returns_keeps_no_process(monkeypatch):
    """The end of a server waited for the thread of its step, and for the world to close."""
    monkeypatch.setattr(episodes, "CLOSING", 0.05)
    returns, returned = threading.Event(), []

    class Hanging(FakeWorld):
        def step(self, action):
            self.close()

        def close(self):
            returned.append(returns.wait(10))

    async def watch():
        running = Episodes(simulator(Hanging), FakeEngine())
        running.start("lift")
        while not running.last.jpeg:
            await running.after(running.last.number)
        await running.close(0.05)

    asyncio.run(watch())
    assert not returned
    returns.set()


def test_a_simulator_is_waited_for_once():
    """One that hung kept the server for ten seconds, and then its app for as long."""
    closed = []

    async def close():
        closed.append(True)

    async def stop():
        service = Service(FakeEngine(), Limits())
        service.closers.append(close)
        await service.stop()
        await service.stop()

    asyncio.run(stop())
    assert closed == [True]


def test_a_world_that_has_no_more_frames_ends_its_episode():
    """A `StopIteration` was lost, and the episode waited for ever."""
    made = simulator(lambda cameras: next(iter(())))
    assert "StopIteration" in run(Episodes(made, FakeEngine()), "lift").message


@pytest.mark.parametrize(
    "content, status",
    [
        ({"task": "fly"}, 400),
        ({"task": XSS}, 400),
        ({"task": "lift", "seed": -1}, 400),
        ({"task": "lift", "seed": 1000}, 400),
        ({"task": "lift", "seed": "many"}, 400),
        ({"task": "lift", "seed": True}, 400),
        ({"task": "lift", "colour": "red"}, 400),
        ({"task": "lift", "instruction": "a" * 1001}, 400),
        ({"task": "lift", "instruction": 3}, 400),
        ({"task": "lift", "instruction": "a" * 20_000}, 413),
        ({}, 400),
        ([], 400),
    ],
)
def test_episodes_that_there_are_not(content, status):
    engine = FakeEngine()
    client = page(engine, episodes=Episodes(simulator(), engine))
    assert client.post("/page/episode", json=content).status_code == status
    assert not engine.requests and not client.get("/page/episode").json()["running"]


def test_without_a_simulator_there_are_no_episodes():
    client = page()
    assert client.get("/page/about").json()["simulator"] is None
    assert client.post("/page/episode", json={"task": "lift"}).status_code in (404, 405)


def test_those_who_wait_for_a_step_are_bounded():
    async def watch():
        episodes = Episodes(simulator(), FakeEngine())
        waiting = [asyncio.create_task(episodes.after(0, patience=60)) for _ in range(MOST_WATCHERS)]
        await asyncio.sleep(0)
        assert (await episodes.after(0, patience=60)).number == 0  # at once
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert episodes._watchers == 0

    asyncio.run(asyncio.wait_for(watch(), 30))
