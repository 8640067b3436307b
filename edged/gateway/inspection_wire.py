"""What is asked and told when a worker is looked into, as HTTP and the command line see it."""

from pydantic import BaseModel, Field

from edged.gateway import wire
from edged.gateway.rollouts_wire import Role

LONGEST_SECONDS = 600


class InspectionRequest(wire.StrictRequest):
    """What to look into, and for how long."""

    role: Role = Field("chat", description="Whose worker.")
    seconds: int = Field(60, ge=1, le=LONGEST_SECONDS, description="How long.")
    tracer: int = Field(
        0, ge=0, description="Id of a process that may, with its children, trace the worker meanwhile; 0 for none."
    )


class Started(BaseModel):
    """The worker's process, whose allocations are recorded from now on."""

    pid: int


class Finished(BaseModel):
    """The file of what was recorded; it is there until the stream is closed."""

    allocations: str
