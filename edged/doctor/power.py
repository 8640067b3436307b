"""Checks of what slows the processor down: frequency governor, heat, supply voltage."""

import contextlib
import math
from collections.abc import Mapping

import msgspec

from edged.doctor.device import Device
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.hardware import thermal
from edged.hardware.thermal import Heat

# --- governor --------------------------------------------------------------------------------------

SCALING_POWERSAVE_DRIVERS = frozenset({"intel_pstate", "amd-pstate-epp"})
"""Drivers whose ``powersave`` follows the load (kernel: admin-guide/pm/intel_pstate.rst); of others it is the lowest
frequency, always."""

PREFERRED_GOVERNORS = ("schedutil", "ondemand", "performance")


class Policy(msgspec.Struct, frozen=True):
    """A group of cores with one frequency, such as ``policy0``."""

    name: str
    driver: str
    governor: str
    available: tuple[str, ...]


def read_governors(device: Device) -> tuple[Policy, ...]:
    """kernel: admin-guide/pm/cpufreq.rst."""
    return tuple(
        Policy(
            folder.name,
            device.read(folder / "scaling_driver"),
            device.read(folder / "scaling_governor"),
            tuple(device.read(folder / "scaling_available_governors").split()),
        )
        for folder in device.glob("sys/devices/system/cpu/cpufreq/policy*")
    )


def judge_governors(policies: tuple[Policy, ...]) -> Finding:
    if not policies:
        return skip("the kernel does not set this processor's frequency")
    slow = [
        policy
        for policy in policies
        if policy.governor == "powersave" and policy.driver not in SCALING_POWERSAVE_DRIVERS
    ]
    if not slow:
        return ok(", ".join(dict.fromkeys(policy.governor for policy in policies)))
    names = ", ".join(policy.name for policy in slow)
    better = next((name for name in PREFERRED_GOVERNORS if name in slow[0].available), "performance")
    rule = f"w /sys/devices/system/cpu/cpufreq/policy*/scaling_governor - - - - {better}"
    file = "/etc/tmpfiles.d/edged-governor.conf"
    return warn(
        f"the governor of {names} is powersave: these cores stay at their lowest frequency",
        f"echo '{rule}' | sudo tee {file} && sudo systemd-tmpfiles --create {file}",
    )


# --- heat ------------------------------------------------------------------------------------------

NEAR_CRITICAL_CELSIUS = 5.0


class Temperatures(msgspec.Struct, frozen=True):
    """``heat`` as the daemon sees it; ``critical`` is where a zone's device switches itself off, by the zone's name.

    ``throttle_celsius`` counts for zones that do not say where they are slowed down.
    """

    heat: Heat
    critical: Mapping[str, float]
    throttle_celsius: float


def read_temperatures(device: Device) -> Temperatures:
    critical: dict[str, float] = {}
    for file in device.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        thousandths = device.number(file.with_name(file.name.replace("_type", "_temp")))
        if device.read(file) == "critical" and thousandths is not None and thousandths > 0:  # others are not wired up
            name = device.read(file.with_name("type"))
            critical[name] = min(critical.get(name, math.inf), thousandths / 1000)
    heat = thermal.read_heat(device.path("sys"), is_guest=thermal.is_guest(device.path("proc/cpuinfo")))
    return Temperatures(heat, critical, device.config.hardware.throttle_celsius)


def judge_temperatures(facts: Temperatures) -> Finding:
    hottest = facts.heat.hottest(facts.throttle_celsius)
    if hottest is None or hottest.slows_at is None:
        return skip("this device reports no temperature")
    fix = "give it a heat sink or a fan, and air: a closed case alone costs 10 to 20 degrees"
    for zone in facts.heat.zones:
        limit = facts.critical.get(zone.name, math.inf)
        if limit - zone.celsius <= NEAR_CRITICAL_CELSIUS:
            return fail(f"{zone.name} {zone.celsius:.0f} °C: switches itself off at {limit:.0f}", fix)
    shown = f"{hottest.name} {hottest.celsius:.0f} °C, slows down from {hottest.slows_at:.0f}"
    if facts.heat.slowed or hottest.celsius >= hottest.slows_at:
        return warn(f"slowed down by heat: {shown}", fix)
    return ok(shown)


# --- supply voltage --------------------------------------------------------------------------------

SLOWED_NOW = thermal.CAPPED_NOW | thermal.THROTTLED_NOW | thermal.SOFT_LIMIT_NOW
UNDER_VOLTAGE_BEFORE = 1 << 16


class Supply(msgspec.Struct, frozen=True):
    """``alarm`` of the kernel's voltage monitor; ``throttled`` are the bits of ``vcgencmd get_throttled``."""

    alarm: bool | None
    throttled: int | None


def read_supply(device: Device) -> Supply:
    """The driver raspberrypi-hwmon is named rpi_volt; the firmware's bits come by a command, for the group video alone.

    Those that some kernels have in sysfs are deprecated, and have their past cleared every two seconds.
    """
    alarms = [
        device.number(folder / "in0_lcrit_alarm")
        for folder in device.glob("sys/class/hwmon/hwmon*")
        if device.read(folder / "name") == "rpi_volt"
    ]
    known = [alarm for alarm in alarms if alarm is not None]
    return Supply(any(known) if known else None, _throttled(device))


def _throttled(device: Device) -> int | None:
    if not device.model.startswith("Raspberry Pi"):
        return None
    with contextlib.suppress(TimeoutError, ValueError):
        return int((device.run(thermal.VCGENCMD) or "").strip().removeprefix("throttled="), 16)
    return None


def judge_supply(facts: Supply) -> Finding:
    if facts.alarm is None and facts.throttled is None:
        return skip("this board does not report its supply voltage")
    bits = facts.throttled or 0
    fix = "use the board's own power supply (Pi 5: 5 V 5 A, Pi 4: 5 V 3 A) and a short cable; move USB disks to a hub"
    if facts.alarm or bits & thermal.UNDER_VOLTAGE_NOW:
        return fail("the supply voltage is too low now: the processor is slowed down, and writes may be lost", fix)
    if bits & UNDER_VOLTAGE_BEFORE:
        return warn("the supply voltage was too low since the last start", fix)
    if bits & SLOWED_NOW:
        return warn("the firmware has slowed the processor down", "let it cool: see the line on heat")
    if facts.throttled is not None:
        return ok("never too low since the last start")
    return ok("not too low now; what was before needs the group video: sudo vcgencmd get_throttled")
