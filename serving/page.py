"""`GET /`: a page to look at what the model does. Plain HTML, CSS and JavaScript from `page/`; nothing from elsewhere.

Browsers bring dangers that robots do not have: pages of other sites send requests through a browser that can reach this
server, and words of strangers must not become code. So requests have to come from this page (`check_origin`) under a
name that nobody else can give to this server (`check_host`), nothing but the files of `page/` is executed (`HEADERS`),
and the key travels in a header.
"""

import base64
import ipaddress
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import APIRouter, Body, Depends
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from .contract import Answer, Dataset, Engine, Forbidden, NotThere, Request
from .episodes import Episodes, Step
from .live import LiveView


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
    *,
    live: LiveView,
    episodes: Episodes | None = None,
    allow: Callable[..., Any] | None = None,
    examples: Path = EXAMPLES,
) -> APIRouter:
    """Routes of the page, and of what it asks. Errors are `Refusal`s.

    Args:
        read: The request of a model in the body of one of HTTP.
        live: That of the engine.
        episodes: None: the server runs no simulator.
        allow: A dependency that raises an `Unauthorized` where the key is missing; None: there is no key. The page
            itself is not asked: it asks for the key.
        examples: Folder of pictures with their `frames.json`.
    """
    # With a key a foreign name does no harm: the browser does not have the key under that name.
    trusted = [] if allow else [Depends(check_host)]
    files = APIRouter(include_in_schema=False, dependencies=trusted)
    data = APIRouter(
        prefix="/page",
        include_in_schema=False,
        dependencies=[*trusted, Depends(check_origin), *([Depends(allow)] if allow else [])],
    )
    pictures = read_examples(examples)

    @files.get("/")
    async def index() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @files.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise NotThere(f"/page/{name:.100}: there is no such file.")
        return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)

    @data.get("/about")
    async def about() -> Response:
        simulator = episodes and {
            "name": episodes.simulator.name,
            "tasks": episodes.simulator.tasks,
            "seeds": len(episodes.simulator.seeds),
        }
        shown = [{"name": name, "instruction": instruction} for name, instruction in pictures.items()]
        return _json({**asdict(engine.info), "examples": shown, "frames": live.frames, "simulator": simulator})

    @data.get("/examples/{name}")
    async def example(name: str) -> Response:
        if name not in pictures:
            raise NotThere(f"{name:.100}: there is no such example.")
        return FileResponse(examples / name, headers=HEADERS)

    @data.post("/act")
    async def act(http: HTTPRequest) -> Response:
        request = replace(await read(http), distributions=True)
        answer = await engine.act(request)
        return _json(
            answer_content(answer, engine.info.datasets[request.unnorm_key]) | {"unnorm_key": request.unnorm_key}
        )

    @data.get("/robots")
    async def robots() -> Response:
        return _json({"robots": live.robots()})

    @data.get("/robots/{number}/{camera}")
    async def picture(number: int, camera: int) -> Response:
        jpeg = live.jpeg(number, camera)
        if jpeg is None:
            raise NotThere(f"There is no picture {camera} of robot {number}.")
        return Response(jpeg, media_type="image/jpeg", headers=HEADERS)

    if episodes is not None:
        add_episodes(data, episodes)
    both = APIRouter()
    both.include_router(data)
    both.include_router(files)  # after it: /page/{name} would take its routes
    return both


def add_episodes(data: APIRouter, episodes: Episodes) -> None:
    """Routes that start, watch, reword and stop an episode."""

    @data.post("/episode")
    async def start(
        task: Annotated[str, Body()], seed: Annotated[int, Body()] = 0, instruction: Annotated[str, Body()] = ""
    ) -> Response:
        episodes.start(task, seed, instruction)
        return _json(step_content(episodes.last))

    @data.get("/episode")
    async def newest(after: int = -1) -> Response:
        return _json(step_content(await episodes.after(after)))

    @data.post("/episode/instruction")
    async def reword(instruction: Annotated[str, Body(embed=True)]) -> Response:
        episodes.reword(instruction)
        return _json(step_content(episodes.last))

    @data.post("/episode/stop")
    async def stop() -> Response:
        episodes.stop()
        return _json({})


def check_host(http: HTTPRequest) -> None:
    """Without a key the page answers to addresses and to localhost alone. A site can let its own name mean this machine
    (DNS rebinding), and its pages could then read what robots see; it cannot do so with an address."""
    name = urlsplit(f"//{http.headers.get('host', '')}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if name != "localhost" and not name.endswith(".localhost"):
            raise Forbidden(
                f"The page does not answer under the name {name!r:.100} as long as it needs no key: open it by the "
                "address of the machine, or let the server ask for a key (OPENVLA_API_KEY)."
            ) from None


def check_origin(http: HTTPRequest) -> None:
    """What a page of another site sends is refused; programs, which say nothing of a site, are not."""
    site, origin = http.headers.get("sec-fetch-site"), http.headers.get("origin")
    if site is None and origin is not None:  # over http only localhost is told where requests come from
        site = "same-origin" if urlsplit(origin).netloc == http.headers.get("host") else "another"
    if site not in (None, "none", "same-origin"):
        raise Forbidden(
            "A page of another site asks: open the page of this server itself. (A proxy has to pass Host on.)"
        )


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


def _json(content: Any) -> Response:
    return JSONResponse(content, headers=HEADERS)
