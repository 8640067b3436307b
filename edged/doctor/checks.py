"""The table of checks, and how they are carried out: one after the other, because some measure the device.

Each has a thread of its own, so that one that hangs, on a disk or a broker, is left behind when its time is up.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from edged.config import Config
from edged.doctor import broker, kernel, models, power, probe, service, storage
from edged.doctor.daemon import find_daemon
from edged.doctor.device import Daemon, Device
from edged.doctor.finding import Finding, Level, skip, warn
from edged.doctor.patience import bounded

CHECK_SECONDS = 10.0  # above what each allows itself

F = TypeVar("F")


class Check(msgspec.Struct, frozen=True):
    """``about`` says what it looks at and when it warns or fails; docs/OPERATIONS.md has it word for word.

    ``when_late`` is what to do where it does not end.
    """

    name: str
    about: str
    examine: Callable[[Device], Finding]
    when_late: str = "try once more; 'sudo dmesg | tail' names a disk that hangs"


def _check(name: str, about: str, read: Callable[[Device], F], judge: Callable[[F], Finding]) -> Check:
    return Check(name, about, lambda device: judge(read(device)))


CHECKS: tuple[Check, ...] = (
    _check(
        "service",
        "the systemd unit edged.service, where it is installed; failed, ended again and again, or not let into `home`, "
        "is a failure",
        service.read_unit,
        service.judge_unit,
    ),
    _check(
        "port",
        "`http.listen` is free or edged's own; taken by another program is a failure, an edged that does not answer a "
        "warning",
        service.read_port,
        service.judge_port,
    ),
    Check(
        "broker",
        "the broker admits edged and grants its subscriptions, QoS 1, the session expiry and packet size wanted; "
        "refusal or no answer is a failure",
        lambda device: broker.judge_broker(broker.read_broker(device)),
        when_late="see whether the broker of mqtt.url and the network answer, as by ping; then try once more",
    ),
    _check(
        "models",
        "the model files have their checksums; another content is a failure, a missing file a warning",
        models.read_checksums,
        models.judge_checksums,
    ),
    _check(
        "memory",
        "the models' weights, caches and buffers fit into the memory that can be had; without even the weights, which "
        "can be read again, a failure",
        models.read_memory,
        models.judge_memory,
    ),
    _check(
        "build",
        "llama.cpp can be loaded, else a failure, and uses the instructions that this processor has; unused ones are a "
        "warning",
        models.read_build,
        models.judge_build,
    ),
    _check(
        "permissions",
        "home, databases and API key are edged's alone; a home that it cannot use, a key that others read or data they "
        "can write is a failure",
        storage.read_permissions,
        storage.judge_permissions,
    ),
    _check(
        "space",
        "free space under the home: a warning below 500 MB, a failure below 50",
        storage.read_room,
        storage.judge_room,
    ),
    _check(
        "disk",
        "the 99th percentile of 100 flushes of 4 KiB in the home: a warning from 20 ms, a failure from 200 ms or where "
        "edged cannot write",
        storage.read_flushes,
        storage.judge_flushes,
    ),
    _check("swap", "swap on an SD card is a warning", storage.read_swaps, storage.judge_swaps),
    _check("sqlite", "SQLite is 3.37 or later and has FTS5; else a failure", storage.read_sqlite, storage.judge_sqlite),
    _check(
        "memory-cgroup",
        "cgroup v2 has its memory controller; Raspberry Pi OS starts without it: a warning",
        kernel.read_memory_cgroup,
        kernel.judge_memory_cgroup,
    ),
    _check("pages", "memory pages of 4 KB; others are a warning", kernel.read_page_size, kernel.judge_page_size),
    _check(
        "tracing",
        "kernel headers and bcc, which only the probe needs; without them a warning",
        kernel.read_tracing,
        kernel.judge_tracing,
    ),
    _check(
        "probe",
        "how well the probe measures, as it says itself; by less than eBPF, or no probe at all, is a warning",
        probe.read_probe,
        probe.judge_probe,
    ),
    _check(
        "clock",
        "the clock was synchronised in the last hours, else a warning; a date before 2025 is a failure",
        kernel.read_clock,
        kernel.judge_clock,
    ),
    _check(
        "governor",
        "a frequency governor that keeps cores at their lowest frequency is a warning",
        power.read_governors,
        power.judge_governors,
    ),
    _check(
        "heat",
        "temperatures against the trip points: a warning where the device slows down, by itself or from "
        "`hardware.throttle_celsius` on, a "
        "failure 5 degrees below where it switches off",
        power.read_temperatures,
        power.judge_temperatures,
    ),
    _check(
        "supply",
        "the Raspberry Pi's supply voltage: too low now is a failure, earlier since its start, where the firmware says "
        "so, a warning",
        power.read_supply,
        power.judge_supply,
    ),
)
"""Every check there is, in the order in which they are shown: what concerns edged itself comes first."""


def examine(config: Config) -> Iterator[tuple[str, Finding]]:
    """Carry all checks out on this device; each name with its finding as soon as it is known."""
    device = Device(config, Daemon(None))
    return carry_out(CHECKS, dataclasses.replace(device, daemon=find_daemon(device)))


def carry_out(
    checks: Sequence[Check], device: Device, *, seconds: float = CHECK_SECONDS
) -> Iterator[tuple[str, Finding]]:
    """Each check's finding. One that does not end in time is a warning; a defect in one is said and hides no other."""
    for check in checks:
        result = bounded(functools.partial(check.examine, device), seconds)
        if isinstance(result, Finding):
            yield check.name, result
        elif isinstance(result, TimeoutError):
            what = f"no result within {seconds:.0f} s: what it waits for hangs"
            yield check.name, warn(what, check.when_late)
        else:
            yield check.name, skip(f"cannot tell: {type(result).__name__}: {result}")


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each level."""
    found = [finding.level for finding in findings]
    return {level.value: found.count(level) for level in Level}
