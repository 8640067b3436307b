"""Checks of edged as a program on this device: its port, and its systemd unit."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from edged.config import Config, split_listen
from edged.doctor.device import Device, Reach
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.doctor.systemd import SOCKET, UNIT, is_me, show
from edged.errors import ConfigError
from edged.gateway.http import bind

# --- port ------------------------------------------------------------------------------------------


class Port(msgspec.Struct, frozen=True):
    """Who has ``http.listen``: edged of this ``version``, nobody, or others (then ``error`` is the errno).

    ``reach`` is what is known of an edged that did not say its version.
    """

    listen: str
    version: str
    error: int
    said: str
    reach: Reach = Reach.NOBODY


def read_port(device: Device) -> Port:
    listen, status, reach = device.config.http.listen, device.daemon.status, device.daemon.reach
    if status is not None:
        return Port(listen, status.version, 0, "")
    if reach in (Reach.CLOSED, Reach.RUNS):
        return Port(listen, "", 0, device.daemon.problem, reach)
    try:
        bind(*split_listen(listen)).close()
    except ConfigError as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EINVAL
        said = device.daemon.problem if number == errno.EADDRINUSE else error.message
        return Port(listen, "", number, said, reach)
    return Port(listen, "", 0, "", reach)


def judge_port(facts: Port) -> Finding:
    if facts.version:
        return ok(f"edged {facts.version} serves at {facts.listen}")
    if facts.reach is Reach.CLOSED:
        return skip(f"edged serves at {facts.listen}, but {facts.said}: run the doctor as a user who may read the key")
    if facts.reach is Reach.RUNS:
        what = f"edged runs, but does not say how it is at {facts.listen}: {facts.said}"
        return warn(what, f"try again once it has started; journalctl -b -n 50 -u {UNIT} says what it does")
    return _judge_binding(facts) if facts.error else ok(f"{facts.listen} is free; edged does not run")


def _judge_binding(facts: Port) -> Finding:
    """Why the port cannot be had, where it is not the running edged's."""
    port = facts.listen.rpartition(":")[2]
    if facts.error == errno.EADDRINUSE and facts.reach is Reach.WAITS:
        return ok(f"{facts.listen} is held by {SOCKET}: {facts.said}")
    if facts.error == errno.EADDRINUSE:
        fix = f"sudo ss -ltnp 'sport = :{port}' names the program; stop it, or set http.listen to another port"
        return fail(f"{facts.listen} is taken: {facts.said}", fix)
    if facts.error == errno.EACCES:
        return fail(
            f"{facts.listen}: ports below 1024 are root's", "set http.listen to a port from 1024 on, such as 3000"
        )
    return fail(facts.said, "set http.listen to an address of this device; ip address shows them")


# --- systemd unit ----------------------------------------------------------------------------------

PROPERTIES = (
    *("LoadState", "ActiveState", "SubState", "UnitFileState", "Result", "NRestarts", "NeedDaemonReload"),
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
    properties = show(device, UNIT, PROPERTIES)
    if not is_me(properties.get("User", "")):
        return Unit(properties)
    files = {name: str(path.resolve()) for name, path in _files(device.config).items() if path is not None}
    return Unit(properties, str(device.config.home.resolve()), files)


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
        return skip("systemd does not run here, or does not answer")
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
    restarts = int(state.get("NRestarts") or 0)
    if trouble := _trouble(state, restarts):
        return fail(f"{UNIT} {trouble}: {state.get('Result')}", f"journalctl -b -n 50 -u {UNIT}")
    if state.get("NeedDaemonReload") == "yes":
        fix = f"sudo systemctl daemon-reload && sudo systemctl restart {UNIT}"
        return warn(f"{UNIT} was changed on the disk after it was loaded", fix)
    if state.get("UnitFileState") == "disabled":
        return warn(f"{UNIT} does not start with the device", f"sudo systemctl enable {UNIT}")
    if state.get("ActiveState") == "inactive":
        return warn(f"{UNIT} does not run", f"sudo systemctl start {UNIT}")
    if restarts:
        return warn(f"{UNIT} was restarted {restarts} times by systemd", f"journalctl -b -u {UNIT} | grep -i error")
    return ok(f"{UNIT} is {state.get('ActiveState')}")


MANY_RESTARTS = 5
"""In a start again, so many are no accident: systemd forgets why the last one ended."""


def _trouble(state: Mapping[str, str], restarts: int) -> str:
    """Where its starts have no limit, a unit never has failed: it waits between two of them, or starts once more."""
    active, is_well = state.get("ActiveState"), state.get("Result", "success") == "success"
    if active == "failed":
        return "has failed"
    ends_again = restarts >= MANY_RESTARTS or not is_well
    if state.get("SubState", "").startswith("auto-restart") or (active == "activating" and ends_again):
        return f"ended by itself and is to start again ({restarts} times so far)"
    return ""
