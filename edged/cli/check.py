"""``edged check``: the configuration and what it refers to."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edged.cli.screen import plain, say, say_json
from edged.cli.session import FAILED, Json, catalog_of, config_file, config_of, session_of
from edged.errors import EdgedError

if TYPE_CHECKING:
    from edged.config import Config
    from edged.rehearse import Rehearsed


def check(
    context: typer.Context,
    stores: Annotated[
        bool, typer.Option("--stores", help="Also bring copies of the stores to this version's schema.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the configuration and what it refers to; says what differs from the defaults."""
    from edged.config import Config

    config, file = config_of(context), config_file(session_of(context))
    defaults = _flat(Config().model_dump(mode="json"))
    changed = {name: value for name, value in _flat(config.model_dump(mode="json")).items() if defaults[name] != value}
    findings = list(_findings(config))
    rehearsed = _rehearse(config) if stores else []
    if as_json:
        found = [finding.__dict__ for finding in findings]
        body = {"file": file, "home": config.home, "changed": changed, "findings": found, "stores": plain(rehearsed)}
        say_json(body)
    else:
        say(f"configuration: {file or 'defaults, no file'}\nhome: {config.home}")
        for name, value in changed.items():
            say(f"  {name} = {json.dumps(value, ensure_ascii=False)}")
        for finding in findings:
            say(f"{finding.severity}: {finding.text}\n  hint: {finding.hint}")
        for store in rehearsed:
            say(f"store {store.file}: schema {store.schema}{f' → {store.schema_after}' * store.migrates}")
        if not findings:
            say("nothing to complain about")
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(FAILED)


def _rehearse(config: "Config") -> "list[Rehearsed]":
    from edged.rehearse import rehearse

    return list(rehearse(config))


@dataclass
class Finding:
    """What ``edged check`` found: an ``error`` keeps the daemon from starting, a ``warning`` makes it serve less."""

    severity: Literal["error", "warning"]
    text: str
    hint: str


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _findings(config: "Config") -> Iterator[Finding]:
    from edged import credentials
    from edged.config import is_loopback, split_listen
    from edged.runtime import home

    for refusal in (*home.refusals(config), *credentials.refusals(config)):
        yield Finding("error", refusal.message, refusal.hint)
    if not is_loopback(split_listen(config.http.listen)[0]) and config.http.tls_cert is None:
        hint = "set http.tls_cert and http.tls_key: the API key travels in the clear"
        yield Finding("warning", f"{config.http.listen} is served without TLS", hint)
    with contextlib.suppress(EdgedError):  # a certificate that cannot be used at all was told above
        if objection := credentials.objection(config.http, time.time()):
            hint = "replace http.tls_cert and http.tls_key, and restart edged; the device's clock must be right too"
            yield Finding("warning", f"http.tls_cert {config.http.tls_cert}, as clients see it: {objection}", hint)
    yield from _model_findings(config)
    yield from _service_findings(config)


def _service_findings(config: "Config") -> Iterator[Finding]:
    """What the service, where it is installed for this user, cannot reach as it is confined."""
    from edged.doctor.device import Daemon, Device
    from edged.doctor.service import out_of_reach, read_unit

    for found in out_of_reach(read_unit(Device(config, Daemon(None)))):
        yield Finding("warning", found.what, found.fix)


def _model_findings(config: "Config") -> Iterator[Finding]:
    from edged.models.rollout import ROLES
    from edged.serving.launch import Launcher

    launcher = Launcher(config, catalog_of(config), lambda _role: 1)
    for role in ROLES:
        name = launcher.configured(role)
        try:
            launcher.locate(role, name)
        except EdgedError as error:
            yield Finding("warning", f"{role}: {error.message}", launcher.advice(role, name))
