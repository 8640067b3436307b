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
        self.template = template
        self._name = name

    @property
    def name(self) -> str:
        """The model's identity, as answers show it."""
        return self._name

    @property
    def fair_tokens(self) -> int:
        """How long an answer may get that nobody limited: a sequence's share of the context."""
        return self.worker.settings.context_tokens // self.worker.settings.sequences

    def render(self, messages: Messages) -> list[Segment]:
        """Chat messages (role, content) as a prompt; contents are never special."""
        return self.template.render(messages)

    def prefix_segments(self, messages: Messages) -> int:
        """How many leading segments of the rendered prompt do not depend on what follows the first message."""
        here = self.template.render(messages)
        elsewhere = self.template.render([messages[0], ("user", "\0")])
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
        templated: bool = True,
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        """As :meth:`Worker.generate`; to a ``templated`` prompt the template's own stop strings are added."""
        return self.worker.generate(
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            output=output,
            stop=(*self.template.stop, *stop) if templated else stop,
            priority=priority,
            prefix_segments=prefix_segments,
            keep=keep,
            deadline_seconds=deadline_seconds,
        )
