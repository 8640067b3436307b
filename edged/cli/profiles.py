"""``edged top`` and ``edged profile``: what the workers use."""

import collections
import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import typer

from edged.cli.screen import note, open_console, plain, progress_bar, say, say_json, size_text
from edged.cli.session import Json, client_of, readable
from edged.errors import RequestError

if TYPE_CHECKING:
    from edged.probe.digging import Dug
    from edged.probe.profile import Profile


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Show the last ten seconds and end.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the workers use, each second: a table, and a heat map of the cores."""
    from edged.probe.profile import to_json

    with client_of(context) as client:
        if once:
            shown = client.profile("10s")
            _say_profiles(shown, [shown], as_json=as_json)
            return
        with contextlib.closing(client.profiles()) as seconds, contextlib.suppress(KeyboardInterrupt):
            if as_json:
                for second in seconds:
                    typer.echo(to_json(second))
            else:
                _watch_profiles(seconds)


def _watch_profiles(seconds: "Iterable[Profile]") -> None:
    from rich.live import Live

    from edged.probe.draw import HEAT_COLUMNS, screen

    history: collections.deque[Profile] = collections.deque(maxlen=HEAT_COLUMNS)
    console = open_console()
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        for second in seconds:
            history.append(second)
            live.update(screen(second, history), refresh=True)


def _say_profiles(shown: "Profile", history: "Sequence[Profile]", *, as_json: bool) -> None:
    from edged.probe.draw import screen
    from edged.probe.profile import to_json

    if as_json:
        typer.echo(to_json(shown))
    else:
        open_console().print(screen(shown, history))


def record(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="Where to; a line of JSON a second.")],
    seconds: Annotated[int, typer.Option("--seconds", min=1, help="How long.")] = 60,
    as_json: Json = False,
) -> None:
    """Keep the profiles of the coming seconds in a file."""
    from edged.probe.profile import to_json

    recorded = 0
    with (
        client_of(context) as client,
        contextlib.closing(client.profiles()) as stream,
        _writing(file) as output,
        progress_bar("recording", total=seconds, shown=not as_json) as advance,
    ):
        for second in itertools.islice(stream, seconds):
            output.write(to_json(second) + b"\n")
            recorded += 1
            advance(recorded, seconds)
    if as_json:
        say_json({"file": file, "seconds": recorded})
    else:
        say(f"recorded   {file} ({recorded} s)")


@contextlib.contextmanager
def _writing(file: Path) -> "Iterator[BinaryIO]":
    try:
        with file.open("wb") as output:
            yield output
    except OSError as error:
        raise RequestError(f"cannot write {file}: {error.strerror}", hint="choose another file") from error


def show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", callback=readable, readable=False, dir_okay=False, help="A recording.")
    ],
    as_json: Json = False,
) -> None:
    """Show a recording: the whole time as one profile, and a heat map of its seconds."""
    from edged.probe.profile import from_json, merge

    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}", hint="check its permissions") from error
    seconds = [from_json(line) for line in lines]
    if not seconds:
        raise RequestError(f"{file} is empty", hint="record one: edged profile record FILE")
    _say_profiles(merge(seconds), seconds, as_json=as_json)


def worker(
    context: typer.Context,
    role: Annotated[Literal["chat", "embed"], typer.Option("--role", help="Whose worker.")] = "chat",
    seconds: Annotated[int, typer.Option("--seconds", min=1, max=600, help="How long.")] = 60,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIRECTORY", file_okay=False, help="Where to; edged-<role>-<time> by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out where a running worker's time goes and what memory it keeps: flame graph, memory report, timeline."""
    from edged.gateway.inspection_wire import Finished, InspectionRequest, Started
    from edged.probe import digging

    folder = out or Path(f"edged-{role}-{time.strftime('%Y%m%d-%H%M%S')}")
    order = InspectionRequest(role=role, seconds=seconds, tracer=os.getpid())
    with (
        client_of(context) as client,
        digging.Digging(folder, digging.find_py_spy(), role=role, seconds=seconds) as dig,
        contextlib.closing(client.inspect(order)) as events,
        progress_bar(f"looking into the {role} worker", total=seconds, shown=not as_json) as advance,
    ):
        for number, event in enumerate(events):
            match event:
                case Started(pid=pid):
                    dig.started(pid)
                case Finished(allocations=file):
                    dig.finished(Path(file))
                case second:
                    dig.profile(second)
                    advance(number, seconds)
    _say_dug(dig.write(), as_json=as_json)


def _say_dug(dug: "Dug", *, as_json: bool) -> None:
    if as_json:
        say_json(plain(dug))
        return
    reach = "into llama.cpp" if dug.native else "of Python alone"
    say(f"time: {dug.samples} stacks, {reach}; innermost:")
    for frame, share in dug.innermost:
        say(f"{share:>8.0%}  {frame}")
    say(f"memory taken meanwhile and kept: {size_text(sum(kept.bytes for kept in dug.kept))}")
    for kept in dug.kept:
        say(f"{size_text(kept.bytes):>9}  {kept.allocations} pieces, {kept.place}")
    for each in dug.notes:
        note(f"note: {each}")
    say(f"written to {dug.folder}: {', '.join(dug.files)}")
