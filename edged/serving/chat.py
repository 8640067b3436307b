"""A chat model in service: a worker, the prompt format of its model, its name."""

from collections.abc import AsyncGenerator, Sequence

from edged.models.template import ChatTemplate
from edged.types import OutputFormat, Priority, Sampling, Segment
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import GREEDY, Lost, Worker

Messages = Sequence[tuple[str, str]]


class LocalChat:
    """A chat worker and the prompt format of its model."""

    def __init__(self, worker: Worker, template: ChatTemplate, name: str) -> None:
        self.worker = worker
        self._template = template
        self._name = name

    @property
    def name(self) -> str:
        """The model's identity, as answers show it."""
        return self._name

    def render(self, messages: Messages) -> list[Segment]:
        """Chat messages (role, content) as a prompt; contents are never special."""
        return self._template.render(messages)

    def prefix_segments(self, messages: Messages) -> int:
        """How many leading segments of the rendered prompt do not depend on what follows the first message."""
        here = self.render(messages)
        elsewhere = self.render([messages[0], ("user", "\0")])
        differs = (index for index, pair in enumerate(zip(here, elsewhere, strict=False)) if pair[0] != pair[1])
        return next(differs, 0)

    def generate(
        self,
        prompt: Sequence[Segment],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        output: OutputFormat | None = None,
        stop: Sequence[str] = (),
        priority: Priority = "interactive",
        prefix_segments: int = 0,
        keep: bool = False,
        deadline_seconds: float | None = None,
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        """As :meth:`Worker.generate`; the template's own stop strings are added."""
        return self.worker.generate(
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            output=output,
            stop=(*self._template.stop, *stop),
            priority=priority,
            prefix_segments=prefix_segments,
            keep=keep,
            deadline_seconds=deadline_seconds,
        )
