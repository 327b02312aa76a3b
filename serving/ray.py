"""The same app on many machines: replicas of Ray Serve, each with a model, an engine and a queue of its own.

Nothing is shared between them: what a replica keeps of a session is only a cache, so that any of them answers any
request, and a client whose replica has died asks again.
"""

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse
from ray import serve

from ..device import torch_device
from ..hub import published_name
from ..options.serving import ServeOptions
from .auth import read_key
from .contract import Engine, Model
from .model import OpenVLAModel
from .server import GRACE, check_address, keep_loaded, listen, make_app
from .service import Service


logger = logging.getLogger(__name__)


def serve_with_ray(
    options: ServeOptions,
    say: Callable[[str], Any] = print,
    *,
    load: Callable[[ServeOptions], Model] = OpenVLAModel.load,
) -> bool:
    """Listen until Ctrl-C or SIGTERM, on every machine of the cluster of `RAY_ADDRESS`; without one on this machine.

    Args:
        say: Told where it listens, once replicas answer.
        load: Makes the model of a replica.

    Returns:
        Whether replicas could be started; if not, the log says why.

    Raises:
        ValueError: If an address that others reach has no key.
        OSError: If the address cannot be listened at.
    """
    check_address(options.host, read_key(os.environ) is not None or options.insecure)
    with listen(options.host, options.port) as listener:
        port = listener.getsockname()[1]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    os.environ.setdefault("RAY_worker_niceness", "0")  # by itself Ray lets replicas wait for everything else (15)
    ray.init(**({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
    try:
        serve.start(http_options={"host": options.host, "port": port})
        try:
            serve.run(application(options, load), name="openvla", route_prefix="/")
        except RuntimeError:
            logger.exception("No replica could be started.")
            return False
        address = f"http://{options.host}:{port}"
        say(f"serving {published_name(options.model)} by Ray at {address}; try: curl -s {address}/info")
        wait_for_signal()
        return True
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_for_signal() -> None:
    """Until Ctrl-C or SIGTERM, in place of Ray's own handler of it, which aborts."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        while not stop.wait(3600):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def application(options: ServeOptions, load: Callable[[ServeOptions], Model] = OpenVLAModel.load) -> serve.Application:
    """What `serve.run` takes, also in a program or configuration file of your own."""
    if Path(options.model).expanduser().is_dir():  # replicas run in folders of their own
        options = replace(options, model=str(Path(options.model).expanduser().resolve()))

    def build() -> FastAPI:
        return replica_app(options, load)

    @serve.deployment(
        name="openvla",
        autoscaling_config={
            "min_replicas": options.replicas,
            "initial_replicas": options.replicas,
            "max_replicas": options.max_replicas or options.replicas,
            "target_ongoing_requests": options.max_batch,  # an open WebSocket counts as one
        },
        max_ongoing_requests=options.connections,
        max_queued_requests=options.queue_size,
        graceful_shutdown_timeout_s=GRACE,
        health_check_period_s=5,
        max_constructor_retry_count=2,  # what is wrong with a model is wrong again
        ray_actor_options={"num_gpus": int(torch_device(options.device).startswith("cuda"))},
    )
    @serve.ingress(build)
    class Replica:
        async def check_health(self) -> None:
            """Raises for a model that broke: Ray starts another replica."""
            service = self.app.state.service  # type: ignore[attr-defined]
            if not service.engine.ready:
                raise RuntimeError(f"The engine is {service.engine.state}.")

    return Replica.bind()  # type: ignore[attr-defined]  # it is a `Deployment`


def no_page(engine: Engine, service: Service) -> APIRouter:
    """`GET /` in place of the page, which shows the robots and episodes of one process."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> PlainTextResponse:
        return PlainTextResponse("With --ray there is no page. openvla serve without it has one.\n", 404)

    return router


def replica_app(options: ServeOptions, load: Callable[[ServeOptions], Model]) -> FastAPI:
    """The app of one replica, which is there once its model is warm.

    Raises:
        ValueError: If an address that others reach has no key in the environment of this machine.
    """
    key = read_key(os.environ)
    check_address(options.host, key is not None or options.insecure)
    app = make_app(options, load(options), key, page=no_page)
    app.state.service.metrics.labels["replica"] = serve.get_replica_context().replica_id.unique_id
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def warm(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            await app.state.service.warm
            keep_loaded()
            yield state

    app.router.lifespan_context = warm
    return app
