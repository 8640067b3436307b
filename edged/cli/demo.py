"""``edged demo``: the whole way once."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edged.cli.ask import AnswerScreen
from edged.cli.screen import say, say_json
from edged.cli.session import Json, config_of, end_on_signals

if TYPE_CHECKING:
    from edged.demo.runner import Message
    from edged.gateway import wire


def demo(
    context: typer.Context,
    broker: Annotated[
        str | None, typer.Option("--broker", metavar="URL", help="MQTT broker to use; its own by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the whole way once: a broker, a daemon, shipped manuals, three sensors' events and their answers."""
    from edged.demo import runner

    end_on_signals()
    record = DemoRecord()
    runner.run(config_of(context), record if as_json else DemoScreen(), broker_url=broker)
    if as_json:
        say_json({"steps": record.steps, "events": record.events})


class DemoScreen:
    """Shows the demo to a person."""

    def __init__(self) -> None:
        self._answer = AnswerScreen()

    def step(self, text: str) -> None:
        say(f"· {text}")

    def event(self, message: "Message", question: str) -> None:
        say(f"\n{message.topic} ← {message.payload}\n? {question}")

    def delta(self, text: str) -> None:
        self._answer.delta(text)

    def restarted(self, reason: str) -> None:
        self._answer.restarted(reason)

    def answer(self, answer: "wire.AnswerBody", round_trip_ms: float) -> None:
        self._answer.finish(answer)
        say(f"  from sensor to sensor {round_trip_ms:.0f} ms")


class DemoRecord:
    """Keeps the demo for a program: what was done, and each event with its answer."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.events: list[dict[str, Any]] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def event(self, message: "Message", question: str) -> None:
        asked = {"topic": message.topic, "payload": message.payload, "question": question}
        self.events.append({**asked, "streamed": "", "restarted": []})

    def delta(self, text: str) -> None:
        self.events[-1]["streamed"] += text

    def restarted(self, reason: str) -> None:
        self.events[-1]["restarted"].append(reason)

    def answer(self, answer: "wire.AnswerBody", round_trip_ms: float) -> None:
        self.events[-1].update(answer=answer.model_dump(mode="json"), round_trip_ms=round_trip_ms)
