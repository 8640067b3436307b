"""How hot the device is and whether its power holds, from sysfs and the Raspberry Pi's firmware.

Kernel: driver-api/thermal/sysfs-api.rst, hwmon/sysfs-interface.rst, hwmon/raspberrypi-hwmon.rst.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edged.hardware.detect import PROC_CPUINFO, cpu_flags

SYSFS = Path("/sys")
VCGENCMD = ("vcgencmd", "get_throttled")
VCGENCMD_EVERY_SECONDS = 10.0
VCGENCMD_TIMEOUT_SECONDS = 2.0

SLOWING_TRIPS = frozenset({"passive", "hot"})
SLOWING_DEVICES = ("cpufreq", "processor")
PROCESSOR_ZONES = ("cpu", "soc", "core", "pkg", "tj")
DIE_SENSORS = {"coretemp": None, "k10temp": 95.0}
"""Drivers of the sensors in x86-64 processors, and where the processor slows itself (Tjmax) if they do not say so: of
Ryzen, 95 °C by AMD's specifications for most. What thermal zones say of these processors is vaguer: their points are
thresholds that programs set, or those of the board."""
COLDEST, HOTTEST = -40.0, 150.0  # what a sensor says beyond these is no temperature

UNDER_VOLTAGE_NOW = 1 << 0
CAPPED_NOW = 1 << 1
THROTTLED_NOW = 1 << 2
SOFT_LIMIT_NOW = 1 << 3


class Zone(msgspec.Struct, frozen=True):
    """A temperature sensor, °C. ``slows_at`` is where the kernel begins to slow the device, if it says so."""

    name: str
    celsius: float
    slows_at: float | None


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the device now.

    ``slowed``: the kernel or the firmware keeps the CPU below its speed for heat or power. ``under_voltage``: the
    supply gives too little.
    """

    zones: tuple[Zone, ...] = ()
    slowed: bool = False
    under_voltage: bool = False

    def hottest(self, slows_at: float) -> Zone | None:
        """The zone nearest to being slowed; ``slows_at`` counts for those that name no point of their own."""
        named = (zone if zone.slows_at is not None else Zone(zone.name, zone.celsius, slows_at) for zone in self.zones)
        return min(named, key=lambda zone: (zone.slows_at or slows_at) - zone.celsius, default=None)


class Firmware(msgspec.Struct, frozen=True):
    """What a Raspberry Pi's firmware says of itself."""

    slowed: bool = False
    under_voltage: bool = False


def parse_throttled(text: str) -> Firmware | None:
    """``throttled=0x50005``, as ``vcgencmd get_throttled`` says it; None for anything else.

    Bits 16 and up tell of the past. What some kernels have in sysfs is deprecated, and reading it makes them warn.
    """
    try:
        bits = int(text.strip().removeprefix("throttled="), 16)
    except ValueError:
        return None
    return Firmware(
        slowed=bool(bits & (CAPPED_NOW | THROTTLED_NOW | SOFT_LIMIT_NOW)), under_voltage=bool(bits & UNDER_VOLTAGE_NOW)
    )


def is_guest(cpuinfo: Path = PROC_CPUINFO) -> bool:
    """Whether this is a virtual machine, whose processor's sensors tell nothing: coretemp reads Tjmax there."""
    return "hypervisor" in cpu_flags(cpuinfo)


def read_heat(sysfs: Path = SYSFS, firmware: Firmware | None = None, *, is_guest: bool = False) -> Heat:
    """All that sysfs tells, with what the firmware said.

    Sensors that cannot be read are left out, and where some are in the processor or called after it, so are all others:
    a disk or a charger has limits of its own.
    """
    firmware = firmware or Firmware()
    dies = () if is_guest else tuple(_dies(sysfs / "class" / "hwmon"))
    zones = tuple(_zones(sysfs / "class" / "thermal"))
    processor = tuple(zone for zone in zones if any(word in zone.name.lower() for word in PROCESSOR_ZONES))
    return Heat(
        zones=dies or processor or zones,
        slowed=firmware.slowed or _cooling(sysfs / "class" / "thermal"),
        under_voltage=firmware.under_voltage or _alarm(sysfs / "class" / "hwmon"),
    )


def ask_vcgencmd() -> Firmware | None:
    """What the firmware says; None where there is none to ask, or the service is not let to it."""
    try:
        answer = subprocess.run(VCGENCMD, capture_output=True, text=True, timeout=VCGENCMD_TIMEOUT_SECONDS, check=False)
    except OSError:
        return None
    except subprocess.TimeoutExpired:
        return Firmware()
    return parse_throttled(answer.stdout)


class Thermometer:
    """Reads :class:`Heat`, blocking.

    The firmware is asked now and then only, as that takes a process; where there is none to ask, not again.
    """

    def __init__(
        self,
        sysfs: Path = SYSFS,
        ask_firmware: Callable[[], Firmware | None] = ask_vcgencmd,
        clock: Callable[[], float] = time.monotonic,
        cpuinfo: Path = PROC_CPUINFO,
    ) -> None:
        self._sysfs = sysfs
        self._ask_firmware = ask_firmware
        self._clock = clock
        self._firmware: Firmware | None = Firmware()
        self._ask_at = 0.0
        self._cpuinfo = cpuinfo
        self._is_guest: bool | None = None

    def read(self) -> Heat:
        """The state now."""
        if self._is_guest is None:
            self._is_guest = is_guest(self._cpuinfo)
        if self._firmware is not None and self._clock() >= self._ask_at:
            self._ask_at = self._clock() + VCGENCMD_EVERY_SECONDS
            self._firmware = self._ask_firmware()
        return read_heat(self._sysfs, self._firmware, is_guest=self._is_guest)


def _zones(folder: Path) -> Iterator[Zone]:
    for zone in sorted(folder.glob("thermal_zone*")):
        celsius = _celsius(zone / "temp")
        if celsius is not None and COLDEST < celsius < HOTTEST:
            yield Zone(_read(zone / "type") or zone.name, celsius, _slows_at(zone))


def _dies(folder: Path) -> Iterator[Zone]:
    """One of each processor: the sensor by which it slows itself, which is the first."""
    for device in sorted(folder.glob("hwmon*")):
        driver = _read(device / "name")
        if driver not in DIE_SENSORS:
            continue
        celsius = _celsius(device / "temp1_input")
        if celsius is not None and COLDEST < celsius < HOTTEST:
            yield Zone(driver, celsius, _celsius(device / "temp1_crit") or DIE_SENSORS[driver])


def _slows_at(zone: Path) -> float | None:
    """The lowest point at which the kernel slows what heats the zone. A point of 0 is one that is not in use."""
    points = (
        _celsius(kind.with_name(kind.name.removesuffix("type") + "temp"))
        for kind in zone.glob("trip_point_*_type")
        if _read(kind) in SLOWING_TRIPS
    )
    return min((point for point in points if point is not None and point > 0), default=None)


def _cooling(folder: Path) -> bool:
    """Whether the kernel slows a CPU now; fans are welcome to run."""
    return any(
        any(word in _read(device / "type").lower() for word in SLOWING_DEVICES)
        and _read(device / "cur_state") not in ("", "0")
        for device in folder.glob("cooling_device*")
    )


def _alarm(folder: Path) -> bool:
    return any(
        _read(device / "name") == "rpi_volt" and _read(device / "in0_lcrit_alarm") == "1"
        for device in folder.glob("hwmon*")
    )


def _celsius(file: Path) -> float | None:
    text = _read(file)
    return int(text) / 1000 if text.lstrip("-").isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # a zone that is switched off cannot be read
        return ""
