"""Requests and answers about models coming into service, as HTTP and the command line see them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edged.gateway import wire

LONGEST_WAIT_SECONDS = 60.0

Role = Literal["chat", "embed"]


class RolloutRequest(wire.StrictRequest):
    """A model to activate."""

    model: wire.Name = Field(description="Its name in the catalogue.")
    role: Role = Field("chat", description="What it is to serve as.")
    canary: float = Field(0.0, ge=0, lt=1, description="Share of the requests it gets first; 0 for none.")
    golden: Annotated[str, Field(max_length=1_000_000)] | None = Field(
        None, description="Golden questions, the text of a TOML file."
    )


class RollbackRequest(wire.StrictRequest):
    """What to take back."""

    role: Role = Field("chat", description="Whose last activation, or whose rollout under way.")


class ProgressBody(BaseModel):
    """Where a rollout is. ``version`` grows with each change; ``total`` is 0 where nothing is counted."""

    version: int
    step: str
    done: int
    total: int


class RolloutBody(BaseModel):
    """A rollout. ``outcome`` and ``ended_at`` are null and ``progress`` is there while it goes on."""

    id: int
    role: Role
    model: str
    started_at: float
    ended_at: float | None
    outcome: Literal["promoted", "unchanged", "refused", "rolled_back", "interrupted"] | None
    reason: str
    evidence: dict[str, Any]
    progress: ProgressBody | None


class ServingBody(BaseModel):
    """The model that serves a role; ``previous`` is what a rollback brings again."""

    model: str
    state: str
    previous: str | None


class RolloutsBody(BaseModel):
    """What serves, and how it came to; newest first."""

    serving: dict[Role, ServingBody | None]
    rollouts: list[RolloutBody]


class Patience(BaseModel):
    """Query parameters of the route of one rollout."""

    model_config = ConfigDict(extra="forbid")
    seen: int | None = Field(None, ge=0, description="The version of the progress that is known already.")
    wait_s: float = Field(0.0, ge=0, le=LONGEST_WAIT_SECONDS, description="How long to wait for another, seconds.")
