"""What every HTTP exchange needs: its body, work that ends when the client leaves, event streams, error headers."""

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edged.errors import HTTP_STATUS, EdgedError, PayloadTooLargeError
from edged.gateway import wire

EVENT_STREAM_TYPE = "text/event-stream"

Result = TypeVar("Result")
Write = Callable[[bytes], Awaitable[None]]

log = structlog.get_logger("http")


async def read_json(request: Request, max_bytes: int) -> bytes:
    """The body, read no further than ``max_bytes`` whatever its declared length.

    Only JSON is taken: a foreign web page can post plain forms to loopback, but not this type unasked.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body is not declared as JSON")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"the body is larger than {max_bytes} bytes",
        hint="send less at once, or raise http.max_body_bytes",
        max_bytes=max_bytes,
    )


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.encode(body), status_code=status, headers=headers, media_type="application/json")


def request_body(model: type[wire.StrictRequest]) -> dict[str, Any]:
    """What ``/openapi.json`` says of a body that the route parses itself."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


# --- answering, while the client listens -----------------------------------------------------------


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away: :class:`ClientDisconnect` then."""
    working = asyncio.create_task(work, name="http-answer")
    leaving = asyncio.create_task(_client_gone(receive), name="http-client-gone")
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, until the client goes away. A kind of stream says what they are.

    Up to the first event an error is still a plain one with its own status.
    """

    media_type = EVENT_STREAM_TYPE

    def __init__(self) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def produce(self, write: Write) -> None:
        """Write the events; several may go out as one part."""
        raise NotImplementedError

    def last_words(self, error: EdgedError) -> bytes:
        """The event that ends a stream that cannot go on."""
        raise NotImplementedError

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        # Whoever has left is owed no answer; after the first event there could be none but a broken one.
        with contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        started = False

        async def write(part: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": part, "more_body": True})

        try:
            await self.produce(write)
        except Exception as error:
            if not started:
                raise
            await write(self.last_words(known(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def server_sent_event(name: str, data: object) -> bytes:
    """One event with JSON data."""
    # Escaped to ASCII: many clients split lines at U+2028 and its like, which JSON leaves as they are.
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


# --- errors ----------------------------------------------------------------------------------------


def problem(error: EdgedError) -> tuple[int, dict[str, object]]:
    """Status and RFC 9457 body of an error; every other key than the standard's is ``EdgedError.body``'s."""
    status = HTTP_STATUS.get(error.code, 500)
    body = error.body()
    detail = body.pop("message")
    return status, {**problem_head(error.code, status), "detail": detail, **body}


def problem_head(code: str, status: int) -> dict[str, object]:
    """What every problem document begins with."""
    return {"type": f"urn:edged:error:{code}", "title": code.replace("_", " ").capitalize(), "status": status}


def known(error: Exception) -> EdgedError:
    """The error itself, or for an unforeseen one, which is logged, one that tells nothing of our insides."""
    if isinstance(error, EdgedError):
        return error
    log.error("http_unforeseen_error", exc_info=error)
    return EdgedError("something unforeseen went wrong in edged", hint="the daemon's log holds the details")


def error_headers(status: int, error: EdgedError | None = None) -> dict[str, str]:
    """What HTTP itself says about a refusal; ``Retry-After`` in whole seconds, as long as the error asks for."""
    headers = {}
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="edged"'
    after = error.facts.get("retry_after_seconds") if error is not None else None
    if isinstance(after, int | float) and math.isfinite(after):
        headers["retry-after"] = str(max(1, math.ceil(after)))
    elif status in (429, 503):
        headers["retry-after"] = "1"
    if status in (401, 413, 415, 421):
        headers["connection"] = "close"  # the rest of the body will not be read
    return headers
