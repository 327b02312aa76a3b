"""How much of everything a server takes from outside. Light to import."""

from dataclasses import dataclass

from .wire import MOST_BYTES, MOST_PIXELS


@dataclass(frozen=True)
class Limits:
    """Checked before the memory is taken; what is above is refused with `TooLarge`, or `Busy` where waiting helps.

    Args:
        message_bytes: Of the body of a request, or of a message of a WebSocket. Nothing that is compressed is read.
        picture_pixels: Height times width of an image, before a JPEG or PNG is decoded.
        state_numbers: Of a state.
        instruction_letters: Of an instruction.
        name_letters: Of a session or a request id.
        connections: Open at a time, of all clients together.
        ahead: Requests of one WebSocket that may wait for their answers; the next is read when one is sent.
        bodies_bytes: Of all bodies that are read or answered at a time.
        head_seconds: On a connection without a request, until one has begun; longer than it is kept open for the next.
        body_seconds: Until a body that has begun is there.
        send_seconds: Until a client has taken an answer.
        idle_seconds: Without a message, until a WebSocket is closed.
        timeout_ms: The longest that a request may say it waits.
    """

    message_bytes: int = MOST_BYTES
    picture_pixels: int = MOST_PIXELS
    state_numbers: int = 1024
    instruction_letters: int = 1000
    name_letters: int = 200
    connections: int = 64
    ahead: int = 4
    bodies_bytes: int = 8 * MOST_BYTES
    head_seconds: float = 40.0
    body_seconds: float = 30.0
    send_seconds: float = 10.0
    idle_seconds: float = 3600.0
    timeout_ms: float = 600_000.0
