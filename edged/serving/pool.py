"""Which chat model gets the next request."""

import contextlib
from collections.abc import AsyncGenerator

from edged.errors import WorkerUnavailableError
from edged.serving.chat import LocalChat


class ChatPool:
    """The chat models in service. A lease keeps a model in service until it is given back."""

    def __init__(self, active: LocalChat | None) -> None:
        self._active = active

    @property
    def active(self) -> LocalChat | None:
        return self._active

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncGenerator[LocalChat, None]:
        """The model for one request. Raises :class:`WorkerUnavailableError` when there is none."""
        if self._active is None:
            raise WorkerUnavailableError("there is no chat model", hint="see the conditions in /health")
        yield self._active
