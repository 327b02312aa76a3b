"""`POST /act`, and what people and programs ask a server about itself.

Clients of the original's deploy.py and of OpenVLA-OFT get what their servers answered: they send arrays as json-numpy
does, alone or encoded twice, and get arrays so. Who sends plain JSON with images in base64, or a form with files, gets
plain numbers with their names.
"""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ..options.serving import Limits
from . import contract, wire
from .auth import refusal_response
from .contract import Answer, BadRequest, Gone, ModelInfo, Refusal, TooLarge
from .names import INSTRUCTION, SESSION, STATE, STATE_PARTS, Call, Reset
from .room import Share
from .service import QUICK, Service, content, metadata


JSON, FORM, MSGPACK = "application/json", "multipart/form-data", "application/msgpack"
FILES, FIELDS = 16, 32  # of a form
TEXT = (*INSTRUCTION, *SESSION, "unnorm_key", "request_id", "endpoint")  # fields of a form that are no JSON
VALUES = (*STATE, *STATE_PARTS, "step", "committed", "timeout_ms", "details", "distributions")  # those that are
OFT = "full_image"  # clients of OpenVLA-OFT send it, and expect a list


class Direct(APIRoute):
    """An endpoint that takes a request and gives a response: FastAPI looks for nothing in between."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def act(request: Request) -> Response:
        """What to do for what the robot sees."""
        with service.sending(), service.asked("rest"), service.room.share() as share:
            body = await read_body(request, service.limits, share)
            call, answer = await unless_gone(request, service.answer(body.decode, len(body.data)))
            return body.response(call, answer, service.info)

    router.add_api_route(
        "/act", act, methods=["POST"], responses=responses(), route_class_override=Direct,
        openapi_extra={"requestBody": request_body(service.info)},
    )  # fmt: skip

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Whether the server lives."""
        return "OK\n"

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"description": "It is starting or stopping, or the model hangs or fails."}})
    async def readyz() -> JSONResponse:
        """Whether the server answers requests now."""
        problem = service.engine.problem
        return JSONResponse({"ready": True}) if problem is None else refusal_response(problem, ready=False)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """Model, datasets, cameras, what the numbers of an action mean."""
        return metadata(service.info)

    return router


# A request ------------------------------------------------------------------------------------------------------------


async def read_request(request: Request, service: Service) -> contract.Request:
    """The request of a model in the body of one of HTTP.

    Raises:
        Refusal: If there is none.
    """
    with service.room.share() as share:
        body = await read_body(request, service.limits, share)
        call = await service.read(body.decode, len(body.data))
    if isinstance(call, Reset):
        raise BadRequest("endpoint: expected an observation.")
    return call.request


@dataclass
class Body:
    """What came, and the form of the answer that belongs to it.

    twice: It was encoded twice, as the original's deploy.py takes it.
    arrays: Its images are arrays of json-numpy.
    listed: It is of a client of OpenVLA-OFT, which expects a list.
    """

    kind: str
    data: bytes
    form: dict[str, Any]
    twice: bool = False
    arrays: bool = False
    listed: bool = False

    def decode(self) -> Any:
        """The message; a `ValueError` if it is none."""
        if self.kind == MSGPACK:
            return wire.unpack(self.data)
        message = self.form if self.kind == FORM else wire.from_json(self.data)
        if isinstance(message, dict):
            self.twice = message.keys() == {"encoded"} and isinstance(message["encoded"], str)
            if self.twice:
                message = wire.from_json(message["encoded"])
        if isinstance(message, dict):
            self.arrays = any(isinstance(value, np.ndarray) for value in message.values())
            self.listed = OFT in message
        return message

    def response(self, call: Call | Reset, answer: Answer | None, info: ModelInfo) -> Response:
        if isinstance(call, Reset) or answer is None:
            return JSONResponse({"reset": True})
        if self.kind == MSGPACK:
            return Response(wire.pack({**content(call, answer), "digest": info.digest}), media_type=MSGPACK)
        if not (self.arrays or self.twice):
            found = content(call, answer, details=True) | info.datasets[call.request.unnorm_key].spec.to_dict()
            return JSONResponse({name: plain(value) for name, value in found.items()})
        # json-numpy's form: an array (A,), or a list of the arrays of a chunk; a map where details were asked.
        actions = [*answer.actions] if self.listed or info.chunk > 1 else answer.actions[0]
        text = wire.to_json(content(call, answer) if call.details else actions)
        return JSONResponse(text) if self.twice else Response(text, media_type=JSON)


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


async def read_body(request: Request, limits: Limits, share: Share) -> Body:
    """The body, which takes its share of the room as it comes.

    Raises:
        BadRequest: If it is of no known form.
        TooLarge: If it is larger than the limits.
        Busy: If there is no room.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, FORM, MSGPACK):
        raise BadRequest(f"Content-Type: {kind[:50] or 'none'} came, expected {JSON}, {FORM} or {MSGPACK}.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("Content-Encoding: what is compressed is not read; send JPEG or PNG for smaller images.")
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > limits.message_bytes):
        raise TooLarge(f"A body of {said[:20]} bytes, at most {limits.message_bytes}: JPEG is smaller than raw images.")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.message_bytes:
                    raise TooLarge(f"A body of more than {limits.message_bytes} bytes.")
                share.resize(size)
    except TimeoutError:
        raise BadRequest(f"The body did not come within {limits.body_seconds:g} seconds.") from None
    except ClientDisconnect:
        raise Gone("The client has gone.") from None
    data = b"".join(parts)
    if kind != FORM:
        return Body(kind, data, {})
    form = read_form(request.headers, data)
    return Body(kind, data, await (asyncio.to_thread(asyncio.run, form) if size > QUICK else form))


async def read_form(headers: Headers, data: bytes) -> dict[str, Any]:
    """Fields and files of a form. What is no text (state, step, ...) is JSON."""
    options = parse_options_header(headers["content-type"])[1]
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() != b"utf-8":  # of Python's others one takes hours for a megabyte (punycode)
        raise BadRequest(f"charset={charset.decode('latin1'):.50}: expected utf-8.")

    async def once() -> AsyncGenerator[bytes, None]:
        yield data

    parser = MultiPartParser(headers, once(), max_files=FILES, max_fields=FIELDS, max_part_size=len(data))
    parser.spool_max_size = len(data) + 1  # nothing is written to a disk
    try:
        fields = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:
        raise BadRequest(f"No form: {error}") from error
    if b"\r\n--%b--" % options[b"boundary"] not in data:  # the parser leaves out the last field then
        raise BadRequest("No form: its end is missing.")
    found: dict[str, Any] = {}
    for name, value in fields.multi_items():
        if name in found:
            raise BadRequest(f"'{name:.100}' came twice.")
        if isinstance(value, str) and not value.isascii() and value.encode() not in data:  # read as latin-1 then
            raise BadRequest(f"'{name:.100}': expected utf-8.")
        if isinstance(value, UploadFile):
            found[name] = await value.read()
        elif name in TEXT:
            found[name] = value
        else:
            try:
                found[name] = wire.from_json(value)
            except ValueError as error:
                if name in VALUES:
                    raise BadRequest(f"'{name:.100}': expected JSON, such as [0.1, 0.2] or 3. {error}") from error
                found[name] = value  # a name that --map knows, and words
    return found


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """The answer; nobody waits for it any more once the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asked, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Gone("The client has gone.")
        return asked.result()
    finally:
        asked.cancel()
        left.cancel()


# Its description ------------------------------------------------------------------------------------------------------


def example(info: ModelInfo) -> dict[str, Any]:
    """A request that this model answers: gray images, as PNG files in base64."""
    image = wire.picture_file(np.full((8, 8, 3), 128, np.uint8), "PNG")
    key = info.default_key or next(iter(info.datasets))
    found: dict[str, Any] = {camera: base64.b64encode(image).decode() for camera in info.cameras}
    found["instruction"] = "open the drawer"
    if info.datasets[key].state_dim is not None:
        found["state"] = [0.0] * (info.datasets[key].state_dim or 0)
    return found if info.default_key else {**found, "unnorm_key": key}


def request_body(info: ModelInfo) -> dict[str, Any]:
    """Of `POST /act`, as OpenAPI writes it."""
    given = example(info)
    array = {
        "type": "object",
        "description": "An array as json-numpy writes it.",
        "required": ["__numpy__", "dtype", "shape"],
        "properties": {
            "__numpy__": {"type": "string", "contentEncoding": "base64"},
            "dtype": {"type": "string", "examples": ["|u1"]},
            "shape": {"type": "array", "items": {"type": "integer"}, "examples": [[224, 224, 3]]},
        },
    }
    image = {"type": "string", "contentEncoding": "base64", "description": "A JPEG or PNG file."}
    numbers = {"type": "array", "items": {"type": "number"}}
    known: dict[str, Any] = {
        **{camera: {"anyOf": [image, array]} for camera in info.cameras},
        "instruction": {"type": "string", "minLength": 1},
        "state": {"anyOf": [numbers, array], "description": "In the units of the dataset."},
        "unnorm_key": {"type": "string", "enum": list(info.datasets)},
        "session": {"type": "string", "description": "Of the episode: its newest observation counts."},
        "step": {"type": "integer", "minimum": 0},
        "committed": {"anyOf": [{"type": "array", "items": numbers}, array], "description": "(n, A), decided already."},
        "timeout_ms": {"type": "number", "exclusiveMinimum": 0, "description": "After it nobody needs the answer."},
        "request_id": {"type": ["string", "integer"], "description": "Comes back with the answer."},
        "details": {"type": "boolean", "description": "Normalized actions and probabilities as well."},
        "distributions": {"type": "boolean"},
    }
    arrays = {
        name: np.full((8, 8, 3), 128, np.uint8) if name in info.cameras else value for name, value in given.items()
    }
    files = {
        name: {"type": "string", "format": "binary"} if name in info.cameras else {"type": "string"} for name in given
    }
    examples = {
        "base64": {"summary": "Image files in base64", "value": given},
        "json-numpy": {
            "summary": "Arrays, as clients of the original send them",
            "value": json.loads(wire.to_json(arrays)),
        },
    }
    schema = {"type": "object", "required": list(given), "properties": known}
    return {
        "required": True,
        "content": {
            JSON: {"schema": schema, "examples": examples},
            FORM: {"schema": {"type": "object", "required": list(given), "properties": files}},
        },
    }


def responses() -> dict[int | str, dict[str, Any]]:
    """Refusals of `POST /act`, by their status."""
    schema = {
        "type": "object",
        "required": ["error", "code"],
        "properties": {
            "error": {"type": "string"},
            "code": {"type": "string"},
            "retry_after": {"type": "number"},
        },
    }
    return {
        kind.status: {"description": (kind.__doc__ or kind.code).splitlines()[0], "content": {JSON: {"schema": schema}}}
        for kind in Refusal.__subclasses__()
    }
