"""`GET /`: a page to look at what the model does. Plain HTML, CSS and JavaScript from `page/`; nothing from elsewhere.

Words of strangers (a robot's instruction, a session) must not become code in a browser that can reach robots: they are
text and nothing else in `page/*.js`, and nothing but these files is executed (`HEADERS`). Who may ask is decided before
(`auth.Gate`); the page itself needs no key, it asks for the key.
"""

import base64
import json
import mimetypes
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from ..options.serving import Limits
from .contract import Answer, BadRequest, Dataset, Engine, ModelInfo, NotThere, Request
from .episodes import Episodes, Step
from .live import LiveView
from .rest import read_body, unless_gone
from .room import Room, Share


WORDS = Limits(message_bytes=16 * 1024)  # of what is said about an episode
FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("api.js", "draw.js", "page.js", "watch.js")
FILES = {**dict.fromkeys(SCRIPTS, "text/javascript"), "style.css": "text/css"}
EXAMPLES = Path(__file__).parents[1] / "examples" / "frames"  # pictures, and frames.json, which says what they are
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def page_routes(
    engine: Engine,
    read: Callable[[HTTPRequest], Awaitable[Request]],
    ask: Callable[[Request], Coroutine[Any, Any, Answer]],
    asked: Callable[[str], AbstractContextManager[None]],
    *,
    live: LiveView,
    episodes: Episodes | None = None,
    examples: Path = EXAMPLES,
) -> APIRouter:
    """Routes of the page, and of what it asks. Errors are `Refusal`s.

    Args:
        read: The request of a model in the body of one of HTTP.
        ask: Its answer.
        asked: Counts requests and refusals of a protocol, see `Service.asked`.
        live: That of the engine.
        episodes: None: the server runs no simulator.
        examples: Folder of pictures with their `frames.json`.
    """
    router = APIRouter(include_in_schema=False)
    pictures = read_examples(examples)

    @router.get("/")
    async def index() -> Response:
        return _file(FOLDER / "index.html", "text/html")

    @router.get("/page/about")
    async def about() -> Response:
        simulator = episodes and {
            "name": episodes.simulator.name,
            "tasks": episodes.simulator.tasks,
            "seeds": len(episodes.simulator.seeds),
        }
        shown = [{"name": name, "instruction": instruction} for name, instruction in pictures.items()]
        return _json(engine.info, **asdict(engine.info), examples=shown, frames=live.frames, simulator=simulator)

    @router.get("/page/examples/{name}")
    async def example(name: str) -> Response:
        if name not in pictures:
            raise NotThere(f"{name:.100}: there is no such example.")
        return _file(examples / name, mimetypes.guess_type(name)[0])

    @router.post("/page/act")
    async def act(http: HTTPRequest) -> Response:
        with asked("page"):
            request = replace(await read(http), distributions=True)
            answer = await unless_gone(http, ask(request))
        dataset = engine.info.datasets[request.unnorm_key]
        return _json(engine.info, **answer_content(answer, dataset), unnorm_key=request.unnorm_key)

    @router.get("/page/robots")
    async def robots() -> Response:
        return _json(engine.info, robots=live.robots())

    @router.get("/page/robots/{number}/{camera}")
    async def picture(number: int, camera: int) -> Response:
        jpeg = live.jpeg(number, camera)
        if jpeg is None:
            raise NotThere(f"There is no picture {camera} of robot {number}.")
        return Response(jpeg, media_type="image/jpeg", headers=HEADERS)

    if episodes is not None:
        add_episodes(router, episodes)

    @router.get("/page/{name}")  # after all that it could stand for
    async def file(name: str) -> Response:
        if name not in FILES:
            raise NotThere(f"/page/{name:.100}: there is no such file.")
        return _file(FOLDER / name, FILES[name])

    return router


def add_episodes(router: APIRouter, episodes: Episodes) -> None:
    """Routes that start, watch, reword and stop an episode."""

    @router.post("/page/episode")
    async def start(http: HTTPRequest) -> Response:
        given = await read_words(http, task=str, seed=int, instruction=str)
        episodes.start(given.get("task", ""), given.get("seed", 0), given.get("instruction", ""))
        return _json(episodes.info, **step_content(episodes.last))

    @router.post("/page/episode/instruction")
    async def reword(http: HTTPRequest) -> Response:
        episodes.reword((await read_words(http, instruction=str)).get("instruction", ""))
        return _json(episodes.info, **step_content(episodes.last))

    @router.get("/page/episode")
    async def newest(after: int = -1) -> Response:
        return _json(episodes.info, **step_content(await episodes.after(after)))

    @router.post("/page/episode/stop")
    async def stop() -> Response:
        episodes.stop()
        return _json(episodes.info)


async def read_words(http: HTTPRequest, **kinds: type) -> dict[str, Any]:
    """The fields of a small body, those of `kinds` alone; a `Refusal` for anything else."""
    body = await read_body(http, WORDS, Share(Room(WORDS.message_bytes)))
    try:
        given = body.decode()
    except ValueError as error:
        raise BadRequest(str(error)) from error
    for name, value in given.items() if isinstance(given, dict) else [("", given)]:
        if type(value) is not kinds.get(name):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise BadRequest(f"{name or 'body'!r:.100}: expected {known}.")
    return given


def read_examples(folder: Path) -> dict[str, str]:
    """Name of a picture -> instruction; empty where the folder is not there (it is no part of every installation)."""
    file = folder / "frames.json"
    if not file.is_file():
        return {}
    return {entry["file"]: entry["instruction"] for entry in json.loads(file.read_text("utf-8"))}


def answer_content(answer: Answer, dataset: Dataset) -> dict[str, Any]:
    """An answer as JSON; with distributions also the middle 90% of each number, `low` and `high` (K, A) in units."""
    content: dict[str, Any] = {"actions": answer.actions.tolist(), "timing": answer.timing}
    if answer.probabilities is not None:
        content["probabilities"] = answer.probabilities.astype(float).round(6).tolist()
    if answer.distributions is not None:
        below = answer.distributions.cumsum(axis=-1)
        values = bin_values(dataset, answer.actions.shape[-1], below.shape[-1])
        for name, share in (("low", 0.05), ("high", 0.95)):
            place = (below >= share * below[..., -1:]).argmax(axis=-1)  # (K, A)
            content[name] = np.take_along_axis(values[None], place[..., None], axis=-1)[..., 0].tolist()
        content["distributions"] = answer.distributions.astype(float).round(5).tolist()
    return content


def bin_values(dataset: Dataset, action_dim: int, bins: int) -> np.ndarray:
    """(A, bins) what each bin stands for in units: the middle between two of `bins` edges, the last two both the last
    middle; from -1 to 1 where the units are not known."""
    low = np.array(dataset.low or [-1.0] * action_dim)[:, None]
    high = np.array(dataset.high or [1.0] * action_dim)[:, None]
    share = np.minimum((np.arange(bins) + 0.5) / (bins - 1), (bins - 1.5) / (bins - 1))
    return low + (high - low) * share


def step_content(step: Step) -> dict[str, Any]:
    return {**asdict(step), "jpeg": base64.b64encode(step.jpeg).decode()}


def _file(path: Path, kind: str | None) -> Response:
    """Small, and complete: before 0.49.1 starlette may take most of a second for a header `Range`, which needs no
    key."""
    return Response(path.read_bytes(), media_type=kind, headers=HEADERS)


def _json(info: ModelInfo, **content: Any) -> Response:
    """Of which model it is, stands in each answer: a page that is open outlives servers, and knows units and names of
    the model that it was opened with."""
    return JSONResponse({**content, "digest": info.digest}, headers=HEADERS)
