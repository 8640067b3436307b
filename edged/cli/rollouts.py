"""``edged models activate``, ``rollback`` and ``status``: which model the running daemon serves."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edged.cli.screen import CONTROLS, duration_text, note, say, say_json
from edged.cli.session import FAILED, Json, client_of, readable
from edged.errors import RequestError

if TYPE_CHECKING:
    from edged.client import Client
    from edged.gateway.rollouts_wire import ProgressBody, RolloutBody

NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once; 'edged models status' shows how it goes.")]
ForEmbedding = Annotated[bool, typer.Option("--embed", help="The embedding model, not the chat model.")]


def activate(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed model.")],
    canary: Annotated[
        str, typer.Option("--canary", metavar="SHARE", help="Share of the requests it gets first, such as 10%.")
    ] = "0%",
    golden: Annotated[
        Path | None,
        typer.Option(
            "--golden",
            metavar="FILE",
            callback=readable,
            readable=False,
            dir_okay=False,
            help="Golden questions (TOML).",
        ),
    ] = None,
    embed: ForEmbedding = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Let the running daemon serve a model, once it has shown to be no worse than the one in service."""
    from edged.gateway.rollouts_wire import RolloutRequest

    order = RolloutRequest(
        model=name,
        role="embed" if embed else "chat",
        canary=_share(canary),
        golden=_golden_text(golden) if golden is not None else None,
    )
    with client_of(context) as client:
        _follow(client, client.activate(order), wait=not no_wait, as_json=as_json)


def rollback(
    context: typer.Context, embed: ForEmbedding = False, no_wait: NoWait = False, as_json: Json = False
) -> None:
    """End the activation under way, or bring the model back that served before the last one."""
    from edged.gateway.rollouts_wire import RollbackRequest

    with client_of(context) as client:
        begun = client.roll_back(RollbackRequest(role="embed" if embed else "chat"))
        _follow(client, begun, wait=not no_wait, as_json=as_json, wanted=("promoted", "unchanged", "rolled_back"))


def status(context: typer.Context, as_json: Json = False) -> None:
    """Show which models serve, and how the latest activations went and why."""
    with client_of(context) as client:
        body = client.rollouts()
    if as_json:
        say_json(body.model_dump(mode="json"))
        return
    for role, serving in body.serving.items():
        before = f", before: {serving.previous}" if serving is not None and serving.previous else ""
        say(f"{role + ':':<7}{serving.model + ', ' + serving.state + before if serving is not None else 'no model'}")
    for rollout in body.rollouts:
        say(f"{rollout.id:>4}  {_ago(rollout.started_at)}  {_rollout_line(rollout)}")


def _share(text: str) -> float:
    """``10%`` or ``0.1``."""
    number = text.removesuffix("%")
    try:
        share = float(number) / (100 if number != text else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise RequestError(f"--canary {text} is no share", hint="give one below 100%, such as 10%")
    return share


def _golden_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {file}: {error}", hint="golden questions are a TOML file in UTF-8") from error


def _follow(
    client: "Client",
    begun: "RolloutBody",
    *,
    wait: bool,
    as_json: bool,
    wanted: Sequence[str] = ("promoted", "unchanged"),
) -> None:
    """Show a rollout until its end; fails when that is another than the one wanted."""
    rollout, step = begun, ""
    for rollout in client.follow(begun) if wait else ():
        if rollout.progress is not None and not as_json:
            step = _say_progress(rollout.progress, step)
    if as_json:
        say_json(rollout.model_dump(mode="json"))
    else:
        say(_rollout_line(rollout))
    if rollout.outcome not in (None, *wanted):
        raise typer.Exit(FAILED)


def _say_progress(progress: "ProgressBody", shown: str) -> str:
    """On a terminal each count, elsewhere each step; returns what is shown now."""
    counted = f" ({progress.done} of {progress.total})" if progress.total else ""
    if sys.stderr.isatty():
        typer.echo(f"\r\x1b[K· {(progress.step + counted).translate(CONTROLS)}", err=True, nl=False)
        if not progress.total or progress.done == progress.total:
            typer.echo(err=True)
    elif progress.step != shown:
        note(f"· {progress.step}")
    return progress.step


def _rollout_line(rollout: "RolloutBody") -> str:
    if rollout.progress is not None:
        return f"{rollout.role} {rollout.model}: under way: {rollout.progress.step}"
    outcome = (rollout.outcome or "under way").replace("_", " ")
    return f"{rollout.role} {rollout.model}: {outcome}{': ' + rollout.reason if rollout.reason else ''}"


def _ago(moment: float) -> str:
    return f"{duration_text(max(0.0, time.time() - moment))} ago"
