"""The app of a server: what protocols, page and metrics are put together to. Any ASGI server runs it."""

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..options.serving import Limits
from . import rest, websocket
from .auth import OPEN_PATHS, Gate, checked_key, refusal_response
from .contract import BadRequest, Engine, NotThere, Refusal
from .service import Service


ROUTES: tuple[Callable[[Service], APIRouter], ...] = (rest.routes, websocket.routes)


def create_app(
    engine: Engine,
    limits: Limits | None = None,
    *,
    mapping: Mapping[str, str] | None = None,
    key: str | None = None,
    names: Collection[str] = (),
    open_paths: Collection[str] = OPEN_PATHS,
    routes: Sequence[Callable[[Service], APIRouter]] = (),
) -> FastAPI:
    """An app that begins to warm the engine up when it starts, and lets it answer what is in flight when it stops.

    Args:
        mapping: See `names.Reader`.
        key, names, open_paths: See `auth.Gate`.
        routes: Further ones, such as those of a page: each makes a router of the `Service`.

    Raises:
        ValueError: If `key` is empty, or no header could hold it.

    Attributes:
        state.service: The `Service`.
    """
    limits, key = limits or Limits(), None if key is None else checked_key(key)
    service = Service(engine, limits, mapping)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    # Neither of FastAPI's pages about the description: they load scripts from other sites.
    app = FastAPI(
        title="OpenVLA", description="An image and an instruction go in, a robot action comes out.", version="1",
        docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan,
    )  # fmt: skip
    app.state.service = service
    for make in (*ROUTES, *routes):
        app.include_router(make(service))
    app.add_middleware(
        Gate, key=key, names=names, open_paths=open_paths, connections=limits.connections,
        refused=lambda refusal: service.metrics.refused("gate", refusal),
    )  # fmt: skip

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return refusal_response(refusal)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        """Another address, or another method than it has."""
        said = f"{request.method} {request.url.path:.100}: {error.detail}. Actions are at POST /act, see /openapi.json."
        code = NotThere.code if error.status_code == NotThere.status else BadRequest.code
        return JSONResponse({"error": said, "code": code}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        """What nobody thought of: starlette logs it, and the client learns nothing of its inside."""
        return JSONResponse({"error": "The server failed; its log says why.", "code": "failed"}, 500)

    return app
