"""Options of `openvla serve`."""

from dataclasses import dataclass

from .fields import option, pairs
from .prediction import ModelOptions


@dataclass(kw_only=True)
class ServeOptions(ModelOptions):
    """A model behind a socket."""

    host: str = option(
        "127.0.0.1",
        "Address to listen at. Others than those of this machine alone (loopback) need a key, or --insecure.",
        neutral=True,
    )
    port: int = option(8000, "Port to listen at; 0: any that is free.", least=0, below=65536, neutral=True)
    max_batch: int = option(16, "Requests that the model answers at once, at most.", least=1)
    max_wait_ms: float = option(
        5.0, "How long a free model waits for requests that are likely to come, to answer them at once.", least=0
    )
    queue_size: int = option(64, "Requests that wait; more are told to come again (503).", least=1)
    hang_after_s: float = option(
        120.0,
        "Seconds that the model may take for a batch. After them it counts as hung: /readyz says so, and requests are "
        "refused (503) until it returns.",
        above=0,
    )
    mapping: dict[str, str] = pairs(
        "A name that clients send, and what it is: a camera of the model, state or instruction; NAME= for what is "
        "ignored. The usual names need no such option.",
        flag="--map",
    )
    allow_host: str | None = option(
        None,
        "Names under which a proxy or another machine asks, joined by commas; addresses, and a server with a key, need "
        "none.",
        shown="none",
    )
    sim: bool = option(
        False, "Let the page run episodes in Meta-World, one at a time; its steps wait in the queue as a robot's do."
    )
    live_frames: bool = option(True, "Keep the last pictures of each robot, in memory, for the page to show.")
    insecure: bool = option(
        False, "Listen at any address without a key: everyone who reaches it can move the robot.", flag="--insecure"
    )
    ray: bool = option(
        False,
        "Serve by Ray, each replica with a model of its own, on the cluster of RAY_ADDRESS or on this machine. Without "
        "the page.",
    )
    replicas: int = option(1, "Replicas at least (--ray).", least=1)
    max_replicas: int | None = option(
        None, "Replicas at most, as robots need them (--ray).", least=1, shown="--replicas"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ray and (self.replicas > 1 or self.max_replicas is not None):
            raise ValueError(f"replicas={self.replicas}, max_replicas={self.max_replicas}: only with --ray.")
        if self.ray and self.sim:
            raise ValueError("ray and sim: the page, and with it its episodes, is of one process; leave one out.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas}: expected at least replicas={self.replicas}.")
