"""How edged is on this device: ``edged status``, ``doctor`` and ``version``."""

import platform
from typing import TYPE_CHECKING

import typer

from edged import __version__
from edged.cli.screen import duration_text, say, say_json
from edged.cli.session import FAILED, Json, client_of, config_of

if TYPE_CHECKING:
    from edged.doctor.finding import Finding as Diagnosis
    from edged.gateway import wire


def status(context: typer.Context, as_json: Json = False) -> None:
    """Show how the running daemon is; fails when the daemon is failing."""
    with client_of(context) as client:
        body = client.status()
    if as_json:
        say_json(body.model_dump(mode="json"))
    else:
        _say_status(body)
    if body.failing:
        raise typer.Exit(FAILED)


def _say_status(body: "wire.StatusBody") -> None:
    say(f"edged {body.version}: {body.status}, up {duration_text(body.uptime)}")
    for role, worker in (("chat", body.chat), ("embed", body.embed)):
        threads = f", {worker.threads} threads" if worker.threads else ""
        say(f"{role + ':':<11}{worker.model or 'no model'}, {worker.state}{threads}, {worker.restarts} restarts")
    say(f"documents: {body.documents}, {body.chunks} passages")
    if body.probe is not None:
        say(f"load:      score {body.probe.score:.2f}, measured by {body.probe.step}")
    events = body.events
    say(
        f"events:    {events.open} open, {events.closed} closed "
        f"({events.failed} failed, {events.expired} expired), {events.unpublished} unpublished"
    )
    say(f"mqtt:      {'connected, MQTT ' + (body.mqtt.protocol or '?') if body.mqtt.connected else 'not connected'}")
    for condition in body.conditions:
        say(f"{condition.severity}: {condition.text} ({condition.code})\n  hint: {condition.hint}")


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Look at this device for what keeps edged from working well, and say the fix; fails when a line fails."""
    from edged.doctor import checks

    found: dict[str, Diagnosis] = {}
    for name, finding in checks.examine(config_of(context)):
        found[name] = finding
        if not as_json:
            _say_diagnosis(name, finding)
    counts = checks.count(found.values())
    if as_json:
        lines = [{"check": name, "level": f.level, "what": f.what, "fix": f.fix} for name, f in found.items()]
        say_json({"findings": lines, "counts": counts})
    else:
        say(", ".join(f"{number} {level}" for level, number in counts.items()))
    if counts["fail"]:
        raise typer.Exit(FAILED)


def _say_diagnosis(name: str, finding: "Diagnosis") -> None:
    say(f"{finding.level:<6}{name:<15}{finding.what}")
    if finding.fix:
        say(f"{'':<21}fix: {finding.fix}")


def version(as_json: Json = False) -> None:
    """Show the version."""
    if as_json:
        say_json({"edged": __version__, "python": platform.python_version(), "machine": platform.machine()})
    else:
        say(f"edged {__version__} (Python {platform.python_version()}, {platform.machine()})")
