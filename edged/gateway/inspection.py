"""The route by which a worker is looked into: its profile each second, and at the end what memray recorded of it."""

import asyncio
import contextlib

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from edged.errors import EdgedError
from edged.gateway import wire
from edged.gateway.exchange import EventStream, Write, problem, read_json, request_body, server_sent_event
from edged.gateway.inspection_wire import Finished, InspectionRequest, Started
from edged.probe.profiles import Profiles
from edged.serving.inspection import Inspections

READING_SECONDS = 60.0


class InspectionRoutes:
    """Looking into workers."""

    def __init__(self, inspections: Inspections, profiles: Profiles, max_body_bytes: int) -> None:
        self._inspections = inspections
        self._profiles = profiles
        self._max_body_bytes = max_body_bytes

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(
            "/v1/profile/worker", self.inspect, methods=["POST"], openapi_extra=request_body(InspectionRequest)
        )

    async def inspect(self, request: Request) -> Response:
        """Record what a worker allocates, as server-sent events; a client that goes away ends it."""
        asked = wire.parse_json(await read_json(request, self._max_body_bytes), InspectionRequest)
        return InspectionStream(self._inspections, self._profiles, asked)


class InspectionStream(EventStream):
    """``started``, a ``profile`` a second, ``finished`` or ``error``. The file is there until the client goes away."""

    def __init__(self, inspections: Inspections, profiles: Profiles, asked: InspectionRequest) -> None:
        super().__init__()
        self._inspections = inspections
        self._profiles = profiles
        self._asked = asked

    async def produce(self, write: Write) -> None:
        async with self._inspections.begin(self._asked.role, tracer=self._asked.tracer) as inspection:
            await write(server_sent_event("started", Started(pid=inspection.pid).model_dump()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._asked.seconds):
                    await self._relay_profiles(write)
            await inspection.end()
            finished = Finished(allocations=str(inspection.allocations))
            await write(server_sent_event("finished", finished.model_dump()))
            await asyncio.sleep(READING_SECONDS)

    async def _relay_profiles(self, write: Write) -> None:
        async with contextlib.aclosing(self._profiles.seconds()) as seconds:
            async for second in seconds:
                await write(server_sent_event("profile", msgspec.to_builtins(second, str_keys=True)))

    def last_words(self, error: EdgedError) -> bytes:
        return server_sent_event("error", problem(error)[1])
