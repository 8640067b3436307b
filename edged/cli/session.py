"""What holds for a whole invocation: its options, its configuration, its daemon."""

import contextlib
import os
import pwd
import shlex
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edged.errors import RequestError

if TYPE_CHECKING:
    from edged.client import Client
    from edged.config import Config
    from edged.models.catalog import Catalog

FAILED = 1
NO_DAEMON = 3


@dataclass
class Session:
    """What holds for the whole invocation."""

    config_file: Path | None = None
    as_json: bool = False


def session_of(context: typer.Context) -> Session:
    return context.ensure_object(Session)


def _remember_json(context: typer.Context, value: bool) -> bool:
    session = session_of(context)
    session.as_json = session.as_json or value
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember_json)]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration; else $EDGED_CONFIG, else <home>/edged.toml."),
]
Collection = Annotated[str, typer.Option("--collection", help="Collection of documents.")]


def config_of(
    context: typer.Context, overrides: Mapping[str, object] | None = None, *, file: Path | None = None
) -> "Config":
    from edged.config import load

    return load(file or config_file(session_of(context)), os.environ, overrides)


def config_file(session: Session) -> Path | None:
    """The file asked for, which must exist, or the usual one where there is one."""
    from edged.config import Config

    named = session.config_file or os.environ.get("EDGED_CONFIG")
    if named:
        return Path(named)
    home = os.environ.get("EDGED_HOME")
    usual = (Path(home).expanduser() if home else Config().home) / "edged.toml"
    return usual if os.path.lexists(usual) else None  # a link that leads nowhere is an error, not the defaults


@contextlib.contextmanager
def client_of(context: typer.Context) -> Iterator["Client"]:
    from edged.client import Client

    with Client.of(config_of(context)) as client:
        yield client


def catalog_of(config: "Config") -> "Catalog":
    from edged.models.catalog import Catalog

    return Catalog(config.models_dir, config.models_cache_dir)


def readable(path: Path | None) -> Path | None:
    """A file that is there. What this user may not look at, or not even look for, is not said to be missing."""
    if path is None or os.access(path, os.R_OK):
        return path
    with contextlib.suppress(PermissionError):
        try:
            path.stat()
        except FileNotFoundError as error:
            raise typer.BadParameter(f"'{path}' does not exist.") from error
    raise RequestError(
        f"the user {pwd.getpwuid(os.geteuid()).pw_name} may not read {path}",
        hint=f"put a copy where that user may: sudo install -m 644 {shlex.quote(str(path))} /var/tmp/",
    )


def end_on_signals() -> None:
    """A signal ends the command as an error does, so that what it started, or wrote in part, does not stay."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
