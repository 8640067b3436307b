"""What a check found: pure."""

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is. ``fail``: edged does not work like that, or loses data; ``warn``: it works, but worse.

    ``skip``: nothing can be said, or it does not concern this device.
    """

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Finding(msgspec.Struct, frozen=True):
    """``what`` was found, in a sentence; ``fix`` is a command or a setting where there is one."""

    level: Level
    what: str
    fix: str = ""


def ok(what: str) -> Finding:
    return Finding(Level.OK, what)


def warn(what: str, fix: str) -> Finding:
    return Finding(Level.WARN, what, fix)


def fail(what: str, fix: str) -> Finding:
    return Finding(Level.FAIL, what, fix)


def skip(why: str) -> Finding:
    return Finding(Level.SKIP, why)
