"""Checks of edged as a program on this device: its port, and its systemd unit."""

import contextlib
import errno
import os
import pwd
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from edged.config import Config, split_listen
from edged.doctor.device import Device
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.errors import ConfigError
from edged.gateway.http import bind

# --- port ------------------------------------------------------------------------------------------


class Port(msgspec.Struct, frozen=True):
    """Who has ``http.listen``: edged of this ``version``, nobody, or others (then ``error`` is the errno)."""

    listen: str
    version: str
    error: int
    said: str


def read_port(device: Device) -> Port:
    listen, status = device.config.http.listen, device.daemon.status
    if status is not None:
        return Port(listen, status.version, 0, "")
    try:
        bind(*split_listen(listen)).close()
    except ConfigError as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EINVAL
        said = device.daemon.problem if number == errno.EADDRINUSE else error.message
        return Port(listen, "", number, said)
    return Port(listen, "", 0, "")


def judge_port(facts: Port) -> Finding:
    port = facts.listen.rpartition(":")[2]
    if facts.version:
        return ok(f"edged {facts.version} serves at {facts.listen}")
    if not facts.error:
        return ok(f"{facts.listen} is free; edged does not run")
    if facts.error == errno.EADDRINUSE:
        fix = f"sudo ss -ltnp 'sport = :{port}' names the program; stop it, or set http.listen to another port"
        return fail(f"{facts.listen} is taken: {facts.said}", fix)
    if facts.error == errno.EACCES:
        return fail(
            f"{facts.listen}: ports below 1024 are root's", "set http.listen to a port from 1024 on, such as 3000"
        )
    return fail(facts.said, "set http.listen to an address of this device; ip address shows them")


# --- systemd unit ----------------------------------------------------------------------------------

UNIT = "edged.service"
PROPERTIES = (
    *("LoadState", "ActiveState", "UnitFileState", "Result", "NRestarts", "NeedDaemonReload"),
    *("User", "ProtectSystem", "ProtectHome", "ReadWritePaths", "StateDirectory"),
)
HIDDEN_BY_PROTECT_HOME = ("/home", "/root", "/run/user")


class Unit(msgspec.Struct, frozen=True):
    """``properties`` as ``systemctl show`` has them; empty where systemd does not run or does not answer.

    ``home`` and the ``files`` by their settings are those of the unit's user; empty where another one looks, whose
    configuration need not be the service's.
    """

    properties: Mapping[str, str]
    home: str = ""
    files: Mapping[str, str] = {}


def read_unit(device: Device) -> Unit:
    if not device.path("run/systemd/system").is_dir():
        return Unit({})
    said = device.run(["systemctl", "show", UNIT, f"--property={','.join(PROPERTIES)}"]) or ""
    properties = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if not _is_me(properties.get("User", "")):
        return Unit(properties)
    files = {name: str(path.resolve()) for name, path in _files(device.config).items() if path is not None}
    return Unit(properties, str(device.config.home.resolve()), files)


def _is_me(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user).pw_uid == os.geteuid()
    return False


def _files(config: Config) -> dict[str, Path | None]:
    http, mqtt = config.http, config.mqtt
    return {
        "chat.path": config.chat.path,
        "embed.path": config.embed.path,
        "http.api_key_file": http.api_key_file,
        "http.tls_cert": http.tls_cert,
        "http.tls_key": http.tls_key,
        "mqtt.password_file": mqtt.password_file,
        "mqtt.ca_file": mqtt.ca_file,
        "mqtt.cert_file": mqtt.cert_file,
        "mqtt.key_file": mqtt.key_file,
    }


def judge_unit(facts: Unit) -> Finding:
    state = facts.properties
    if not state:
        return skip("systemd does not run here")
    if state.get("LoadState") == "not-found":
        return skip("edged is not installed as a service")
    if state.get("LoadState") != "loaded":
        return fail(f"systemd cannot load {UNIT}: {state.get('LoadState')}", f"systemd-analyze verify {UNIT}")
    return next(out_of_reach(facts), None) or _judge_loaded(state)


def out_of_reach(facts: Unit) -> Iterator[Finding]:
    """What the service could not use although its user may: the unit confines it."""
    state = facts.properties
    if facts.home and state.get("ProtectSystem") == "strict" and not _is_below(facts.home, _writable(state)):
        yield fail(
            f"{UNIT} cannot write to home = {facts.home}: ProtectSystem=strict",
            'set home = "/var/lib/edged" and mount the other disk there (docs/OPERATIONS.md, Moving the data); or sudo '
            f"systemctl edit {UNIT}, with ReadWritePaths={facts.home} below [Service]",
        )
    hidden = [f"{name} = {path}" for name, path in facts.files.items() if _is_below(path, HIDDEN_BY_PROTECT_HOME)]
    if hidden and state.get("ProtectHome") == "yes":
        what = f"{UNIT} sees nothing below /home, /root and /run/user (ProtectHome=yes): {', '.join(hidden)}"
        yield warn(what, "put certificates and keys into /etc/edged, and models into /var/lib/edged")


def _writable(state: Mapping[str, str]) -> list[str]:
    states = [f"/var/lib/{name}" for name in state.get("StateDirectory", "").split()]
    return [*states, *(path.lstrip("-+") for path in state.get("ReadWritePaths", "").split())]


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _judge_loaded(state: Mapping[str, str]) -> Finding:
    active, restarts = state.get("ActiveState", ""), int(state.get("NRestarts") or 0)
    if active == "failed":
        return fail(f"{UNIT} has failed: {state.get('Result')}", f"journalctl -b -n 50 -u {UNIT}")
    if state.get("NeedDaemonReload") == "yes":
        fix = f"sudo systemctl daemon-reload && sudo systemctl restart {UNIT}"
        return warn(f"{UNIT} was changed on the disk after it was loaded", fix)
    if state.get("UnitFileState") == "disabled":
        return warn(f"{UNIT} does not start with the device", f"sudo systemctl enable {UNIT}")
    if active == "inactive":
        return warn(f"{UNIT} does not run", f"sudo systemctl start {UNIT}")
    if restarts:
        return warn(f"{UNIT} was restarted {restarts} times by systemd", f"journalctl -b -u {UNIT} | grep -i error")
    return ok(f"{UNIT} is {active}")
