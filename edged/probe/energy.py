"""Energy, where something measures it: the processor's own account (RAPL), or sensors of the supply.

Kernel: power/powercap/powercap.rst, hwmon/sysfs-interface.rst.
"""

from pathlib import Path
from typing import Final

import msgspec

SYSFS: Final = Path("/sys")
SUPPLY: Final = "VDD_IN"
"""What a Jetson's power monitor calls the rail that feeds all others."""


class Meter(msgspec.Struct, frozen=True):
    """A file that counts microjoules and begins anew beyond ``largest``."""

    file: Path
    largest: int


class Rail(msgspec.Struct, frozen=True):
    """Files that say millivolts and milliamperes now."""

    voltage: Path
    current: Path


def find(sysfs: Path = SYSFS) -> list[Meter] | Rail | None:
    """What measures the whole device, as nearly as possible; only what may be read."""
    meters = [
        Meter(folder / "energy_uj", int(_read(folder / "max_energy_range_uj") or 0))
        for folder in sorted((sysfs / "class/powercap").glob("intel-rapl:*"))
        if folder.name.count(":") == 1 and _read(folder / "energy_uj")
    ]
    if meters:
        return meters
    for label in sorted((sysfs / "class/hwmon").glob("hwmon*/in*_label")):
        if _read(label) == SUPPLY:
            number = label.name.removeprefix("in").removesuffix("_label")
            return Rail(label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
    return None


class Energy:
    """The energy that the device takes, where ``source`` measures it."""

    def __init__(self, source: list[Meter] | Rail | None) -> None:
        self._source = source
        self._before = self._microjoules()

    @property
    def confidence(self) -> float:
        """A rail is looked at only at the end of each time; a processor is not the whole device."""
        return 0.5

    def joules(self, seconds: float) -> float | None:
        """What was taken since the last call, which is ``seconds`` ago; None where nothing measures it."""
        if isinstance(self._source, Rail):
            watts = int(_read(self._source.voltage) or 0) * int(_read(self._source.current) or 0) / 1e6
            return watts * seconds
        if self._source is None:
            return None
        now = self._microjoules()
        passed = sum(
            new - old if new >= old else new - old + meter.largest
            for meter, old, new in zip(self._source, self._before, now, strict=True)
        )
        self._before = now
        return passed / 1e6

    def _microjoules(self) -> list[int]:
        return [int(_read(meter.file) or 0) for meter in self._source] if isinstance(self._source, list) else []


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # a sensor that does not answer, or is root's alone
        return ""
