"""The command line: the only part that prints or picks an exit code. Here is the tree of its commands.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 no daemon answers. What is heavy is imported by the command needing it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from edged.cli import bundles, documents, models, profiles, rollouts
from edged.cli.ask import ask
from edged.cli.check import check
from edged.cli.demo import demo
from edged.cli.screen import show_error
from edged.cli.service import cleanup, probe, reserve, serve
from edged.cli.session import FAILED, NO_DAEMON, ConfigFile, Session, session_of
from edged.cli.status import doctor, status, version
from edged.errors import DaemonUnreachableError, EdgedError

Command = Callable[..., None]
COMMANDS: tuple[Command, ...] = (
    serve,
    cleanup,
    reserve,
    probe,
    check,
    status,
    doctor,
    version,
    ask,
    profiles.top,
    demo,
)
GROUPS: Mapping[tuple[str, str], Mapping[str, Command]] = {
    ("docs", "The documents that answers stand on."): {
        "add": documents.add,
        "list": documents.list_,
        "remove": documents.remove,
    },
    ("models", "Model files on this device."): {
        "list": models.list_,
        "pull": models.pull,
        "widen": models.widen,
        "verify": models.verify,
        "import": models.import_,
        "remove": models.remove,
        "activate": rollouts.activate,
        "rollback": rollouts.rollback,
        "status": rollouts.status,
    },
    ("profile", "What the workers use, kept for later."): {
        "record": profiles.record,
        "show": profiles.show,
        "worker": profiles.worker,
    },
    ("bundle", "Offline bundles: edged for devices without a network."): {
        "create": bundles.create,
        "show": bundles.show,
        "check": bundles.check,
        "keygen": bundles.keygen,
    },
}


class Commands(TyperGroup):
    """All commands; their errors become two lines on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EdgedError as error:
            show_error(error, as_json=session_of(ctx).as_json)
            raise typer.Exit(NO_DAEMON if isinstance(error, DaemonUnreachableError) else FAILED) from error


def main() -> None:
    """The ``edged`` program."""
    app(prog_name="edged")


def _everything(context: typer.Context, config: ConfigFile = None) -> None:
    context.obj = Session(config_file=config)


def _assemble() -> typer.Typer:
    everything = typer.Typer(
        cls=Commands,
        name="edged",
        help="Answers questions on this device, from its own documents, with its own model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    everything.callback()(_everything)
    for command in COMMANDS:
        everything.command()(command)
    for (name, purpose), commands in GROUPS.items():
        group = typer.Typer(name=name, help=purpose, no_args_is_help=True)
        for verb, command in commands.items():
            group.command(verb)(command)
        everything.add_typer(group)
    return everything


app = _assemble()
