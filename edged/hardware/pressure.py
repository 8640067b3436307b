"""When memory is short, and what is given up for it: batch work first, then budgets. The decision is pure.

Kernel: accounting/psi.rst. Pressure tells what no count of free bytes does: that processes already wait for memory.
"""

from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

PROC_PRESSURE: Final = Path("/proc/pressure/memory")

SOME_SHORT: Final = 0.10
FULL_SHORT: Final = 0.02
"""Shares of the time in which some process, or all, waited for memory: from these on it is short."""
SOME_PLENTY: Final = 0.01
PLENTY_FACTOR: Final = 2.0


class Stalled(msgspec.Struct, frozen=True):
    """Microseconds since the boot in which ``some`` process, or all (``full``), waited for memory."""

    some: int
    full: int


class Stall(msgspec.Struct, frozen=True):
    """The same as shares of a time, 0 to 1."""

    some: float
    full: float


def read_stalled(file: Path = PROC_PRESSURE) -> Stalled | None:
    """From ``memory.pressure`` of a cgroup or of the whole system; None where the kernel does not measure it."""
    try:
        text = file.read_text(encoding="ascii")
    except OSError:  # not built in, or switched off (psi=0): then reading fails, not opening
        return None
    totals = {line.split()[0]: int(line.rpartition("total=")[2]) for line in text.splitlines() if "total=" in line}
    return Stalled(totals.get("some", 0), totals.get("full", 0))


def stall(before: Stalled | None, after: Stalled | None, seconds: float) -> Stall | None:
    """What lies between two readings so many seconds apart."""
    if before is None or after is None or seconds <= 0:
        return None
    return Stall((after.some - before.some) / 1e6 / seconds, (after.full - before.full) / 1e6 / seconds)


class Supply(Enum):
    """How much memory there is: ``short`` of what must be left, ``tight`` (no reason to change), or ``plenty``."""

    SHORT = "short"
    TIGHT = "tight"
    PLENTY = "plenty"


def supply(*, available: int | None, reserve: int, stall: Stall | None) -> Supply:
    """From the bytes free, those of them that are to stay free, and how much processes waited."""
    if (available is not None and available < reserve) or (
        stall is not None and (stall.some >= SOME_SHORT or stall.full >= FULL_SHORT)
    ):
        return Supply.SHORT
    if (available is not None and available < PLENTY_FACTOR * reserve) or (
        stall is not None and stall.some >= SOME_PLENTY
    ):
        return Supply.TIGHT
    return Supply.PLENTY


class Stage(Enum):
    """What is given up: nothing (``calm``), batch work (``shedding``), budgets as well (``shrinking``)."""

    CALM = "calm"
    SHEDDING = "shedding"
    SHRINKING = "shrinking"

    @property
    def severity(self) -> int:
        """0 for calm and up."""
        return list(Stage).index(self)


MOVES: Final[dict[Stage, frozenset[Stage]]] = {
    Stage.CALM: frozenset({Stage.SHEDDING}),
    Stage.SHEDDING: frozenset({Stage.SHRINKING, Stage.CALM}),
    Stage.SHRINKING: frozenset({Stage.SHEDDING}),
}
"""Legal moves: nothing is skipped, neither down nor up."""


CALM_OBSERVATIONS: Final = 10
TIGHT_OBSERVATIONS: Final = 60
"""So many of plenty, or so many in which memory is at least not short, bring back what was given up. A small device may
never have plenty."""
RELIEF: Final = {Supply.PLENTY: TIGHT_OBSERVATIONS // CALM_OBSERVATIONS, Supply.TIGHT: 1, Supply.SHORT: 0}
"""What each observation counts on the way to ``TIGHT_OBSERVATIONS``."""


class Pressure(msgspec.Struct, frozen=True):
    """The stage, and the ``relief`` since the last change or the last observation of short memory."""

    stage: Stage = Stage.CALM
    relief: int = 0

    def observe(self, found: Supply) -> "Pressure":
        """The next state: a stage further at each observation of short memory, one back after a while without."""
        if found is Supply.SHORT:
            return self._move(Stage.SHEDDING if self.stage is Stage.CALM else Stage.SHRINKING)
        if self.stage is Stage.CALM:
            return self
        relief = self.relief + RELIEF[found]
        if relief < TIGHT_OBSERVATIONS:
            return Pressure(self.stage, relief)
        return self._move(Stage.SHEDDING if self.stage is Stage.SHRINKING else Stage.CALM)

    def _move(self, stage: Stage) -> "Pressure":
        if stage is not self.stage and stage not in MOVES[self.stage]:
            raise ValueError(f"memory pressure does not go from {self.stage.value} to {stage.value}")
        return Pressure(stage)
