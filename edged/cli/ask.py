"""``edged ask``: a question, its answer as it grows, its sources and times."""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from edged.cli.screen import note, say, say_json
from edged.cli.session import Collection, Json, client_of

if TYPE_CHECKING:
    from edged.gateway import wire


def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    collection: Collection = "default",
    deadline_ms: Annotated[
        int | None, typer.Option("--deadline-ms", min=1, help="Answer within this time, degrading to meet it.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer, tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Ask the running daemon; shows the answer as it grows, then its sources and times."""
    from edged.types import Delta, Restarted

    query = _query(query=question, collection=collection, deadline_ms=deadline_ms, max_tokens=max_tokens)
    screen = AnswerScreen()
    with client_of(context) as client, contextlib.closing(client.ask(query)) as events:
        for event in events:
            match event:
                case Delta(text=text) if not as_json:
                    screen.delta(text)
                case Restarted(reason=reason) if not as_json:
                    screen.restarted(reason)
                case Delta() | Restarted():
                    pass
                case answer if as_json:
                    say_json(answer.model_dump(mode="json"))
                case answer:
                    screen.finish(answer)


def _query(**fields: object) -> "wire.QueryRequest":
    from pydantic import ValidationError

    from edged.gateway import wire

    try:
        return wire.QueryRequest.model_validate(fields)
    except ValidationError as error:
        raise wire.explain(error.errors(), wire.QueryRequest.model_fields) from error


class AnswerScreen:
    """Shows an answer as it grows, then what it stands on and where the time went."""

    def __init__(self) -> None:
        self._shown = ""

    def delta(self, text: str) -> None:
        self._shown += text
        say(text, end="")

    def restarted(self, reason: str) -> None:
        if self._shown:
            say()
        self._shown = ""
        note(f"(from the start again: {reason})")

    def finish(self, answer: "wire.AnswerBody") -> None:
        streamed, self._shown = self._shown, ""
        if streamed:
            say()
        if streamed.strip() != answer.answer.strip():
            say(answer.answer)
        for number, cited in enumerate(answer.citations, start=1):
            place = " › ".join(dict.fromkeys([cited.title, *cited.headings]))
            say(f"  [{number}] {place} ({cited.document_id}): {cited.text}")
        if answer.note:
            say(f"  {answer.step}: {answer.note}")
        say(f"  {_times(answer)}")


def _times(answer: "wire.AnswerBody") -> str:
    timings = answer.timings
    first = "" if timings.first_token_ms is None else f"first token {timings.first_token_ms:.0f} ms, "
    parts = {
        "embed": timings.embed_ms,
        "retrieve": timings.retrieve_ms,
        "queue": timings.queue_ms,
        "prefill": timings.prefill_ms,
        "generate": timings.generate_ms,
    }
    shown = ", ".join(f"{name} {spent:.0f}" for name, spent in parts.items())
    return f"{first}total {timings.total_ms:.0f} ms ({shown}); {answer.model or 'no model'}"
