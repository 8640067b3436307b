"""How things are shown: text and tables to a person, JSON to a program."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from edged.errors import EdgedError

if TYPE_CHECKING:
    from rich.console import Console

# A document must not steer the terminal that shows it: all of C0 and C1 but tab and line feed go.
CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n")


def say(text: str = "", *, end: str = "\n") -> None:
    typer.echo(text.translate(CONTROLS) + end, nl=False)


def note(text: str) -> None:
    typer.echo(text.translate(CONTROLS), err=True)


def say_json(body: object) -> None:
    typer.echo(json.dumps(body, ensure_ascii=False, default=str))


def show_error(error: EdgedError, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": error.body()}, ensure_ascii=False), err=True)
        return
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint:  {error.hint}")


def plain(structs: object) -> Any:
    """msgspec's structs as JSON has them."""
    import msgspec

    return msgspec.to_builtins(structs)


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; cut to the terminal's width, but never in a pipe or file."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in row))
    open_console().print(table)


def open_console() -> "Console":
    """As wide as the terminal; in a pipe or file as wide as it takes."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)


@contextlib.contextmanager
def progress_bar(label: str, *, total: int | None, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, where that is a terminal; the caller tells it what is done and what is to do."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(label, total=total)
        yield lambda done, whole: bars.update(bar, completed=done, total=whole)


def size_text(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def duration_text(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86_400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.0f} h" if days < 2 else f"{days:.0f} days"
