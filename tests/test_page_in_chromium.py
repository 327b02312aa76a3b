"""The page in a real browser without a screen: `make test-page`, which installs playwright."""

import asyncio
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import uvicorn
from fake_serving import FakeModel, request
from PIL import Image
from test_serving_page import XSS, Clock, FakeEngine, FakeWorld, page_app, simulator

from openvla.serving.contract import Busy
from openvla.serving.episodes import Episodes
from openvla.serving.live import LiveView
from openvla.serving.page import step_content


pytestmark = pytest.mark.chromium
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-page")
    if CHROMIUM is None:
        pytest.fail("There is no Chromium: apt-get install chromium, or CHROMIUM=PATH of another one.")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Served:
    """An app on a port of its own, its event loop in a thread."""

    def __init__(self, engine: FakeEngine, episodes: Episodes | None = None, key: str | None = None):
        app = page_app(engine, episodes, key=key)
        self.engine, self.episodes = engine, episodes
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self.server.started:
            self._thread.join(timeout=0.02)
            assert self._thread.is_alive(), "the server did not start"
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://localhost:{self.port}/"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self._thread.join(timeout=20)


@pytest.fixture
def serve():
    running = []

    def start(engine=None, **options):
        running.append(Served(engine or FakeEngine(), **options).__enter__())
        return running[-1]

    yield start
    for served in running:
        served.__exit__()


@pytest.fixture
def visit(browser):
    """Open a page; what its console says has to be nothing in the end, but for what a test expects."""
    contexts, said, expected = [], [], []

    def open_page(url, expect=(), **options):
        expected.extend(expect)
        contexts.append(
            browser.new_context(viewport=options.pop("viewport", {"width": 1180, "height": 900}), **options)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"a script said {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in said if not any(words in text for words in expected)] == []


def predict(page):
    page.locator(".example").first.click()
    page.locator("#numbers .number").first.wait_for()


# One action -----------------------------------------------------------------------------------------------------------


def test_an_example_becomes_an_action(serve, visit):
    served = serve()
    page = visit(served.url)
    predict(page)
    assert page.locator("#numbers .number").count() == 7 and page.locator("svg.bins").count() == 7
    assert page.locator("#instruction").input_value() == "open the drawer"
    names = page.locator("#numbers .name b").all_inner_texts()
    assert names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    asked = served.engine.requests[-1]
    assert asked.distributions and asked.observation.images["primary"].shape == (224, 224, 3)
    value = float(page.locator("#numbers .value b").first.inner_text().replace("−", "-"))
    assert value == pytest.approx(asked.observation.images["primary"].mean() / 1000, abs=6e-4)
    assert page.locator("#numbers .share").first.inner_text() == "75%"
    assert page.locator("#compass .arrow").count() == 1 and page.locator("#compass .jaw").count() == 2
    caption = page.locator("#caption").inner_text()
    assert "its data does not name" in caption and "says nothing about pixels" in caption


def test_a_picture_of_ones_own_by_keyboard(serve, visit, tmp_path):
    served = serve()
    page = visit(served.url)
    page.locator(".example img[src]").first.wait_for()
    Image.fromarray(np.full((40, 60, 3), 100, np.uint8)).save(tmp_path / "frame.png")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "file"
    page.set_input_files("input[type=file]", tmp_path / "frame.png")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "instruction":
            break
    page.keyboard.type("lift the lid")
    page.keyboard.press("Enter")
    page.locator("#numbers .number").first.wait_for()
    assert served.engine.requests[0].observation.images["primary"].shape == (40, 60, 3)
    assert served.engine.requests[0].observation.instruction == "lift the lid"


def test_several_cameras_a_state_and_a_chunk(serve, visit):
    served = serve(FakeEngine(FakeModel(cameras=("primary", "wrist"), chunk=4, state_dim=3, keys=("a", "b"))))
    page = visit(served.url, expect=["400"])
    page.locator(".example img[src]").first.wait_for()
    page.fill("#state", "0.1, 0.2")
    page.locator(".example").first.click()
    page.locator("#trouble:visible").wait_for()
    assert "state" in page.locator("#trouble").inner_text()
    page.fill("#state", "0.1, 0.2, 0.3")
    page.select_option("#key", "b")
    page.click("#act")
    page.locator("#numbers .number").first.wait_for()
    asked = served.engine.requests[0]
    assert asked.unnorm_key == "b" and list(asked.observation.images) == ["primary", "wrist"]
    np.testing.assert_allclose(asked.observation.state, [0.1, 0.2, 0.3], rtol=1e-6)
    assert page.locator("#step-words").inner_text() == "Step 1 of 4" and page.locator("#compass .way").count() == 1
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#step-words").inner_text() == "Step 2 of 4"


def test_the_answer_to_a_picture_that_was_changed_is_not_waited_for(serve, visit):
    page, held = visit(serve().url), []
    page.locator(".example img[src]").nth(1).wait_for()
    page.route("**/page/act", lambda route: route.continue_() if held else held.append(route))
    page.locator(".example").nth(0).click()
    page.locator("#waiting", has_text="The model looks").wait_for()
    with page.expect_event("requestfailed") as ended:
        page.locator(".example").nth(1).click()
    assert ended.value == held[0].request  # whose place in the queue is free then
    page.locator("#numbers .number").first.wait_for()
    assert "open the door”" in page.locator("#answer").inner_text()
    assert page.locator("#trouble").is_hidden()


def test_errors_come_in_words(serve, visit):
    served = serve(FakeEngine(refusals=[Busy("The queue is full.", 1.0)]))
    page = visit(served.url, expect=["503", "ERR_CONNECTION_REFUSED"])
    page.click("#act")
    assert "Choose a picture first" in page.locator("#trouble").inner_text()
    page.locator(".example").first.click()
    page.get_by_text("The queue is full.").wait_for()
    predict(page)
    assert page.locator("#trouble").is_hidden()
    served.__exit__()
    page.click("#act")
    page.locator("#trouble", has_text="The server does not answer.").wait_for()
    assert page.locator("#numbers .number").count() == 0  # nothing old beside a new picture


def test_what_is_shown_is_asked_also_where_the_file_has_changed(serve, visit, tmp_path):
    """As where a program writes each frame to the same file. The browser refused to send it, and the page said that
    the server does not answer."""
    served = serve()
    page = visit(served.url)
    for level in (50, 100):
        Image.fromarray(np.full((40, 60, 3), level, np.uint8)).save(tmp_path / "frame.png")
        if level == 50:
            page.set_input_files("input[type=file]", tmp_path / "frame.png")
            page.locator(".picture img[src^=blob]").first.wait_for()
    page.fill("#instruction", "lift the lid")
    page.click("#act")
    page.locator("#numbers .number").first.wait_for()
    assert served.engine.requests[0].observation.images["primary"].mean() == 50
    (tmp_path / "frame.png").unlink()
    page.set_input_files("input[type=file]", [])
    assert page.locator("#trouble").is_hidden()


def test_of_a_gripper_in_a_range_of_its_own_nobody_knows_how_far_it_is_open(serve, visit):
    """1 of 100, nearly closed, was drawn as 100% open."""
    served = serve()
    info = served.engine.info
    own = {key: replace(each, spec=replace(each.spec, as_recorded=(6,))) for key, each in info.datasets.items()}
    served.engine.info = replace(info, datasets=own)
    page = visit(served.url)
    predict(page)
    assert "gripper, as recorded" in page.locator("#numbers .number").last.inner_text()
    assert page.locator("#compass .arrow").count() == 1 and page.locator("#compass .jaw").count() == 0


def test_numbers_of_another_model_are_not_shown_as_those_of_the_first(serve, visit):
    """A server that was started again at the same address: its numbers may have other names and units."""
    served = serve()
    served.engine.live.asked(request(session="arm-1"))
    page = visit(served.url)
    predict(page)
    page.locator(".robot").wait_for()
    served.engine.info = replace(served.engine.info, model="another")
    page.click("#act")
    page.locator("#trouble", has_text="another model: reload this page").wait_for()
    assert page.locator("#numbers .number").count() == 0
    page.locator("#no-robots", has_text="another model").wait_for()
    assert page.locator(".robot").count() == 0
    page.reload()
    page.locator("#model", has_text="another").wait_for()
    predict(page)
    assert page.locator("#trouble").is_hidden()


# Strangers ------------------------------------------------------------------------------------------------------------


def test_words_of_strangers_stay_words(serve, visit):
    model = FakeModel(cameras=("primary",), keys=(XSS,))
    object.__setattr__(model.info, "model", XSS)
    engine = FakeEngine(model)
    engine.live.told(engine.live.asked(request(session=XSS, instruction=XSS, unnorm_key=XSS)), "answered", 1.0)
    served = serve(engine, episodes=Episodes(simulator(tasks={"lift": XSS}), engine))
    page = visit(served.url)
    page.locator("#robots b", has_text=XSS).wait_for()
    predict(page)
    page.fill("#instruction", XSS)
    page.click("#act")
    page.locator("#meaning", has_text=XSS).wait_for()
    page.click("#start")
    page.locator("#episode-words", has_text=XSS).wait_for()
    assert XSS in page.locator("#model").inner_text()
    assert page.locator("script").count() == 1 and page.locator("img[src=x]").count() == 0


def test_no_other_script_is_executed(serve, visit):
    page = visit(serve().url, expect=["Content Security Policy", "Content-Security-Policy"])
    page.locator(".example img[src]").first.wait_for()
    done = page.evaluate(
        """async () => {
            const blocked = new Promise((resolve) => document.addEventListener(
                "securitypolicyviolation", (event) => resolve(event.effectiveDirective), { once: true }));
            const script = document.createElement("script");
            script.textContent = "window.executed = true";
            document.body.append(script);
            return [await blocked, window.executed === true];
        }"""
    )
    assert done == ["script-src-elem", False]


def test_a_page_of_another_site_starts_nothing_and_sees_nothing(serve, visit):
    engine = FakeEngine()
    served = serve(engine, episodes=Episodes(simulator(), engine))
    other = serve()  # another port is another origin, though the same site
    page = visit(other.url, expect=["CORS policy", "ERR_FAILED", "403"], bypass_csp=True)
    for address in (served.url, f"http://127.0.0.1:{served.port}/"):
        outcome = page.evaluate(
            """async (url) => {
                const ask = (path, options) =>
                    fetch(url + path, options).then((answer) => answer.type + answer.status, () => "failed");
                const form = new FormData();
                form.append("instruction", "open the drawer");
                return [
                    await ask("page/robots", {}),
                    await ask("page/episode", { method: "POST", mode: "no-cors", body: '{"task": "lift"}' }),
                    await ask("page/act", { method: "POST", mode: "no-cors", body: form }),
                ];
            }""",
            address,
        )
        assert outcome[0] == "failed" and outcome[1] in ("failed", "opaque0")
    assert not engine.requests and not engine.live.robots()


def test_the_key_is_asked_for_once_and_kept_out_of_addresses(serve, visit):
    served = serve(key="the right key")
    page = visit(served.url, expect=["401"])
    addresses = []
    page.on("request", lambda sent: addresses.append(sent.url))
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key-field", "a-wrong-key")
    page.keyboard.press("Enter")
    page.locator("#key-words", has_text="not the server's").wait_for()
    page.fill("#key-field", "the right key")
    page.keyboard.press("Enter")
    predict(page)
    page.reload()
    predict(page)  # the tab still knows it
    assert page.locator("#key-dialog[open]").count() == 0
    assert addresses and not any("key" in address for address in addresses)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


# Robots and the simulator ---------------------------------------------------------------------------------------------


def test_robots_are_shown_as_they_ask(serve, visit):
    served = serve()
    page = visit(served.url)
    page.get_by_text("No robot has asked yet.").wait_for()
    given = request(200, session="arm-1", instruction="lift the lid")
    live = served.engine.live
    live.told(live.asked(given), "answered", 34.0, served.engine.model.act([given])[0])
    live.told(live.asked(given), "late", 900.0)
    page.locator(".robot b", has_text="arm-1").wait_for()
    page.locator(".robot img[src^=blob]").wait_for()
    words = page.locator(".robot").inner_text()
    assert "lift the lid" in words and "1 answered, 1 late" in words and "900 ms" in words
    assert page.locator(".robot img").evaluate("image => image.naturalWidth") == 8
    images = {name: np.zeros((8, width, 3), np.uint8) for name, width in (("primary", 16), ("wrist", 24))}
    live.asked(replace(given, observation=replace(given.observation, images=images)))
    page.locator(".robot img").nth(1).wait_for()
    assert page.locator(".robot img").evaluate_all("images => images.map((image) => image.naturalWidth)") == [16, 24]


def test_a_robot_that_waits_is_not_called_silent(serve, visit):
    clock = Clock()
    engine = FakeEngine(live=LiveView(clock=clock))
    engine.live.asked(request(session="arm-1"))
    clock.now += 60  # a model that hangs
    page = visit(serve(engine).url)
    page.locator(".robot .mark.bad").wait_for()
    assert "waiting, seen 60 s ago" in page.locator(".robot").inner_text()


def test_robots_of_a_server_that_is_gone_are_shown_no_more(serve, visit):
    served = serve()
    page = visit(served.url, expect=["Failed to load resource"])
    served.engine.live.asked(request(session="arm-1"))
    page.locator(".robot img").wait_for()
    page.route("**/page/robots", lambda route: route.abort())
    page.get_by_text("The server does not answer.").wait_for()
    assert page.locator(".robot").count() == 0
    page.unroute("**/page/robots")
    page.locator(".robot img").wait_for()


def test_nor_are_those_of_a_server_that_says_nothing(serve, visit):
    """As where the network has gone: they stood there as if they were seen now, for minutes."""
    served = serve()
    page = visit(served.url)
    served.engine.live.asked(request(session="arm-1"))
    page.locator(".robot img").wait_for()
    page.route("**/page/robots", lambda route: None)
    page.get_by_text("The server does not answer.").wait_for()
    assert page.locator(".robot").count() == 0
    page.unroute("**/page/robots")
    page.locator(".robot img").wait_for()


@pytest.mark.parametrize("bins", [64, 256])
def test_bins_of_any_number_fill_the_paper(serve, visit, bins):
    page = visit(serve().url)
    marks = page.evaluate(
        """async (bins) => {
            const { drawDistribution } = await import("/page/draw.js");
            const svg = drawDistribution(-1, 1, 1, Array(bins).fill(1 / bins), [-1, 1]);
            const bars = [...svg.querySelectorAll(".bar")].map((bar) => Number(bar.getAttribute("x")));
            const chosen = Number(svg.querySelector(".chosen").getAttribute("d").match(/^M([\\d.]+)/)[1]);
            return [bars.length, Math.min(...bars), Math.max(...bars), chosen];
        }""",
        bins,
    )
    assert marks == [bins / 2, 0, 256 - 512 / bins, 256 - 256 / bins]


def test_an_episode_is_watched_reworded_and_stopped(serve, visit):
    gate, engine = threading.Semaphore(2), FakeEngine()
    digest = engine.info.digest
    served = serve(engine, episodes=Episodes(simulator(lambda cameras: FakeWorld(gate=gate), max_steps=500), engine))
    page = visit(served.url)
    page.select_option("#task", "push")
    assert page.locator("#words").input_value() == "push it"
    page.click("#start")
    page.locator("#episode-words", has_text="“push it”, step 2 of 500").wait_for()
    assert page.locator("#world[src^='data:image/jpeg']").count() == 1 and page.locator("#start").is_disabled()
    page.fill("#words", "lift the lid please")
    page.click("#reword")
    page.locator("#episode-words", has_text="“lift the lid please”").wait_for()
    gate.release(3)
    page.locator("#episode-words", has_text="step 5 of 500").wait_for()
    assert page.locator("#traces .trace polyline").count() == 7
    page.click("#stop")
    gate.release(500)
    page.locator("#episode-words", has_text="Stopped.").wait_for()
    assert page.locator("#start").is_enabled() and page.locator("#stop").is_disabled()
    # Of another one nothing is drawn into the traces of this one, also where its beginning was not seen.
    later = replace(served.episodes.last, number=10_000, episode=2, step=300)
    page.route("**/page/episode?*", lambda route: route.fulfill(json={**step_content(later), "digest": digest}))
    page.locator("#episode-words", has_text="step 300 of 500").wait_for()
    assert page.locator("#traces .trace polyline").first.get_attribute("points").count(",") == 1
    assert engine.requests[-1].observation.instruction == "lift the lid please"


# Looks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 640}, {"width": 1180, "height": 900}], ids=str)
def test_it_fits_a_phone_and_the_night(serve, visit, viewport, scheme):
    engine = FakeEngine()
    engine.live.told(engine.live.asked(request(session="a" * 150, instruction="b" * 150)), "answered", 1.0)
    page = visit(serve(engine, episodes=Episodes(simulator(), engine)).url, viewport=viewport, color_scheme=scheme)
    predict(page)
    page.locator(".robot").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark, light = sorted(colours, key=lambda colour: sum(map(int, colour[4:-1].split(","))))
    assert colours == ([light, dark] if scheme == "light" else [dark, light])
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, button")].filter((element) =>
            !element.labels?.length && !element.getAttribute("aria-label") && !element.textContent.trim()).length"""
    )
    assert unnamed == 0
