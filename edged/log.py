"""Structured logging: an event name and named values; fields in the journal, text on a terminal, else JSON."""

import contextlib
import io
import logging
import os
import sys
from typing import TextIO, cast

import structlog

from edged import journal


class Stderr(io.TextIOBase):
    """stderr, at which a line may be lost but nothing fails: its pipe may be closed, its disk full."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def configure(level: str = "info") -> None:
    """Set up structlog for this process, and send the libraries' own warnings the same way."""
    number = logging.getLevelNamesMapping()[level.upper()]
    to_journal = journal.is_journal(sys.stderr, os.environ)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *_last_processors(to_journal=to_journal),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=journal.JournalLogger() if to_journal else structlog.WriteLoggerFactory(cast(TextIO, Stderr())),
        cache_logger_on_first_use=False,
    )
    # The journal takes a line's priority from its beginning: sd-daemon(3).
    form = f"{'<4>' if to_journal else ''}%(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=form)


def _last_processors(*, to_journal: bool) -> list[structlog.typing.Processor]:
    """From the event's values to what is written; the journal has times of its own."""
    if to_journal:
        return [structlog.processors.format_exc_info, journal.render]
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
    ]
