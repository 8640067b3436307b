"""The route of profiles: one of a window, or each second as it comes."""

from typing import Annotated, Final

import msgspec
from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from edged.errors import EdgedError
from edged.gateway.exchange import EVENT_STREAM_TYPE, EventStream, Write, problem, server_sent_event
from edged.probe.profile import Profile, to_json, to_msgpack
from edged.probe.profiles import Profiles
from edged.probe.rollup import Window

MSGPACK_TYPE: Final = "application/msgpack"


class WindowQuery(BaseModel):
    """Query parameters of the route of profiles."""

    model_config = ConfigDict(extra="forbid")
    window: Window = Field("10s", description="How long the time is that the profile is of.")


class ProfileRoutes:
    """What the workers use, as ``docs/PROFILE.md`` describes it."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    def add_to(self, app: FastAPI) -> None:
        content: dict[str, dict[str, object]] = {EVENT_STREAM_TYPE: {}, MSGPACK_TYPE: {}, "application/json": {}}
        app.add_api_route("/v1/profile", self.get, response_class=Response, responses={200: {"content": content}})

    async def get(self, request: Request, parameters: Annotated[WindowQuery, Query()]) -> Response:
        """The profile of the latest window; as server-sent events each second from now on."""
        accepted = request.headers.get("accept", "")
        if EVENT_STREAM_TYPE in accepted:
            return ProfileStream(self._profiles)
        found = self._profiles.window(parameters.window)
        headers = {"cache-control": "no-store"}
        if MSGPACK_TYPE in accepted:
            return Response(to_msgpack(found), media_type=MSGPACK_TYPE, headers=headers)
        return Response(to_json(found), media_type="application/json", headers=headers)


class ProfileStream(EventStream):
    """Each second as an event ``profile``; a client that reads slowly misses some. Begins with the last one."""

    def __init__(self, profiles: Profiles) -> None:
        super().__init__()
        self._profiles = profiles

    async def produce(self, write: Write) -> None:
        await write(_event(self._profiles.window("1s")))
        async for second in self._profiles.seconds():
            await write(_event(second))

    def last_words(self, error: EdgedError) -> bytes:
        return server_sent_event("error", problem(error)[1])


def _event(profile: Profile) -> bytes:
    return server_sent_event("profile", msgspec.to_builtins(profile))
