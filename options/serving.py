"""Options of `openvla serve`."""

from dataclasses import dataclass

from .fields import Options, option, pairs
from .prediction import ActingOptions, GraphOptions


@dataclass(kw_only=True)
class Limits(Options):
    """How much of everything a server takes from outside. Checked before the memory is taken; what is above is refused,
    with 413 or, where waiting helps, with 503."""

    message_bytes: int = option(
        32 * 2**20,
        "Bytes of one body or message. Nothing that is compressed is read.",
        least=1,
        heading="Limits",
    )
    bodies_bytes: int = option(
        256 * 2**20, "Bytes of all bodies and messages that come in or are answered at a time.", least=1
    )
    picture_pixels: int = option(
        4096 * 4096, "Height times width of an image, known before a JPEG or PNG is decoded.", least=1
    )
    state_numbers: int = option(1024, "Numbers of a state.", least=1)
    instruction_letters: int = option(1000, "Letters of an instruction.", least=1)
    name_letters: int = option(200, "Letters of the name of a session or a request.", least=1)
    connections: int = option(64, "Requests and WebSockets at a time, of all clients together.", least=1)
    ahead: int = option(
        4,
        "Requests of one WebSocket that may wait for their answers; it is read no further before one is sent.",
        least=1,
    )
    head_seconds: float = option(
        40.0, "Seconds after which a connection that asks nothing is ended; if it asked before, 30 are enough.", above=0
    )
    body_seconds: float = option(30.0, "Seconds until a body that has begun has to be there.", above=0)
    send_seconds: float = option(10.0, "Seconds until a client has to have taken an answer.", above=0)
    idle_seconds: float = option(3600.0, "Seconds without a message after which a WebSocket is closed.", above=0)
    timeout_ms: float = option(600_000.0, "The longest that a request may say it waits, in milliseconds.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bodies_bytes < self.message_bytes:
            raise ValueError(
                f"bodies_bytes={self.bodies_bytes}: one message may have message_bytes={self.message_bytes}, and would "
                "never find room. Give a larger one, or a smaller message_bytes."
            )


@dataclass(kw_only=True)
class ServeOptions(GraphOptions, ActingOptions, Limits):
    """A model behind a socket."""

    host: str = option(
        "127.0.0.1",
        "Address to listen at. Others than those of this machine alone (loopback) need a key, or --insecure.",
        heading="Network",
        neutral=True,
    )
    port: int = option(8000, "Port to listen at; 0: any that is free.", least=0, below=65536, neutral=True)
    max_batch: int = option(
        16, "Requests that the model answers at once, at most.", least=1, below=1025, heading="Batches"
    )
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
        heading="Network",
    )
    allow_host: str | None = option(
        None,
        "Names under which a proxy or another machine asks, joined by commas; addresses, and a server with a key, need "
        "none.",
        shown="none",
    )
    sim: bool = option(
        False,
        "Let the page run episodes in Meta-World, one at a time; its steps wait in the queue as a robot's do.",
        heading="Page",
    )
    live_frames: bool = option(True, "Keep the last pictures of each robot, in memory, for the page to show.")
    insecure: bool = option(
        False,
        "Listen at any address without a key: everyone who reaches it can move the robot.",
        flag="--insecure",
        heading="Network",
    )
    ray: bool = option(
        False,
        "Serve by Ray, each replica with a model of its own, on the cluster of RAY_ADDRESS or on this machine. Without "
        "the page.",
        heading="Ray",
    )
    replicas: int = option(1, "Replicas at least (--ray).", least=1)
    max_replicas: int | None = option(
        None, "Replicas at most, as robots need them (--ray).", least=1, shown="--replicas"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.allow_host or "").split(","):
            if any(sign in name.strip() for sign in "/:*@ "):
                raise ValueError(
                    f"allow_host={self.allow_host!r}: expected names of machines as clients write them, without "
                    "http:// and port, such as gpu-box,robots.example."
                )
        if not self.ray and (self.replicas > 1 or self.max_replicas is not None):
            raise ValueError(f"replicas={self.replicas}, max_replicas={self.max_replicas}: only with --ray.")
        if self.ray and self.sim:
            raise ValueError("ray and sim: the page, and with it its episodes, is of one process; leave one out.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas}: expected at least replicas={self.replicas}.")
