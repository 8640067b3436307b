"""The routes by which models are brought into service, watched on their way, and taken back."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from edged.gateway import wire
from edged.gateway.exchange import json_response, read_json, request_body, while_connected
from edged.gateway.rollouts_wire import (
    Patience,
    ProgressBody,
    Role,
    RollbackRequest,
    RolloutBody,
    RolloutRequest,
    RolloutsBody,
    ServingBody,
)
from edged.models.rollout import ROLES
from edged.serving.golden import parse_golden
from edged.serving.moves import Past
from edged.serving.rollout import Order, Progress, Rollouts
from edged.serving.services import Service

HISTORY = 20


class RolloutRoutes:
    """Models into service and back."""

    def __init__(self, rollouts: Rollouts, max_body_bytes: int) -> None:
        self._rollouts = rollouts
        self._max_body_bytes = max_body_bytes

    def add_to(self, app: FastAPI) -> None:
        begun: dict[str, Any] = {"methods": ["POST"], "status_code": 202, "response_model": RolloutBody}
        app.add_api_route("/v1/rollouts", self.begin, openapi_extra=request_body(RolloutRequest), **begun)
        app.add_api_route("/v1/rollouts/rollback", self.roll_back, openapi_extra=request_body(RollbackRequest), **begun)
        app.add_api_route("/v1/rollouts", self.list, response_model=RolloutsBody)
        app.add_api_route("/v1/rollouts/{id}", self.get, response_model=RolloutBody)

    async def begin(self, request: Request) -> Response:
        """Activate a model, after it has shown to be no worse than the one in service."""
        asked = wire.parse_json(await read_json(request, self._max_body_bytes), RolloutRequest)
        return await self._begun(await self._rollouts.activate(_order(asked)))

    async def roll_back(self, request: Request) -> Response:
        """End the rollout under way, or bring back the model that served before."""
        asked = wire.parse_json(await read_json(request, self._max_body_bytes), RollbackRequest)
        return await self._begun(await self._rollouts.roll_back(asked.role))

    async def list(self) -> RolloutsBody:
        """The models that serve, and the latest rollouts."""
        serving = {role: self._serving(role, self._rollouts.active(role)) for role in ROLES}
        latest = await self._rollouts.history(HISTORY)
        return RolloutsBody(serving=serving, rollouts=[self._body(past) for past in latest])

    async def get(self, request: Request, id: int, patience: Annotated[Patience, Query()]) -> RolloutBody:
        """One rollout; with ``seen`` and ``wait_s``, once it has changed."""
        if patience.seen is not None and patience.wait_s:
            await while_connected(request.receive, self._rollouts.change(id, patience.seen, patience.wait_s))
        return self._body(await self._rollouts.past(id))

    async def _begun(self, rollout_id: int) -> Response:
        body = self._body(await self._rollouts.past(rollout_id))
        return json_response(body.model_dump(mode="json"), 202, {"location": f"/v1/rollouts/{rollout_id}"})

    def _serving(self, role: Role, service: Service | None) -> ServingBody | None:
        if service is None:
            return None
        previous = self._rollouts.previous(role)
        return ServingBody(model=service.model.identity, state=service.worker.state.value, previous=previous)

    def _body(self, past: Past) -> RolloutBody:
        return RolloutBody(
            id=past.id,
            role=past.role,
            model=past.model,
            started_at=past.started_at,
            ended_at=past.ended_at,
            outcome=past.outcome,
            reason=past.reason,
            evidence=past.evidence,
            progress=_progress_body(self._rollouts.progress(past.id)),
        )


def _order(asked: RolloutRequest) -> Order:
    questions = parse_golden(asked.golden) if asked.golden is not None else ()
    return Order(role=asked.role, model=asked.model, share=asked.canary, golden=questions)


def _progress_body(progress: Progress | None) -> ProgressBody | None:
    if progress is None:
        return None
    return ProgressBody(version=progress.version, step=progress.step, done=progress.done, total=progress.total)
