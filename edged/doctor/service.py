"""Checks of edged as a program on this device: its port, and its systemd unit."""

import errno
from collections.abc import Mapping

import msgspec

from edged.config import split_listen
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
PROPERTIES = ("LoadState", "ActiveState", "UnitFileState", "Result", "NRestarts", "NeedDaemonReload")


class Unit(msgspec.Struct, frozen=True):
    """``properties`` as ``systemctl show`` has them; empty where systemd does not run or does not answer."""

    properties: Mapping[str, str]


def read_unit(device: Device) -> Unit:
    if not device.path("run/systemd/system").is_dir():
        return Unit({})
    said = device.run(["systemctl", "show", UNIT, f"--property={','.join(PROPERTIES)}"]) or ""
    return Unit(dict(line.split("=", 1) for line in said.splitlines() if "=" in line))


def judge_unit(facts: Unit) -> Finding:
    state = facts.properties
    if not state:
        return skip("systemd does not run here")
    if state.get("LoadState") == "not-found":
        return skip("edged is not installed as a service")
    if state.get("LoadState") != "loaded":
        return fail(f"systemd cannot load {UNIT}: {state.get('LoadState')}", f"systemd-analyze verify {UNIT}")
    return _judge_loaded(state)


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
