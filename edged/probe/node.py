"""The whole device, second by second."""

from edged.probe import energy, groups, procfs
from edged.probe.sample import Measured, NodeSample, Source

WHOLE_TICKS = 0.9
"""Confidence in times that the kernel counts in ticks."""


class Node:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._busy = procfs.busy_seconds()
        self._stalled = groups.stalled_seconds()
        self._energy = energy.Energy(energy.find())

    def measure(self, seconds: float, *, with_groups: bool) -> NodeSample:
        """Since the last time, ``seconds`` ago. ``with_groups``: also what the kernel's pressure accounts say."""
        busy, self._busy = self._busy, procfs.busy_seconds()
        stalled, self._stalled = self._stalled, groups.stalled_seconds() if with_groups else {}
        joules = self._energy.joules(seconds)
        available, total = procfs.memory_of_system()
        waited = {
            name: (now - stalled[name]) / max(seconds, 1e-9) for name, now in self._stalled.items() if name in stalled
        }
        return NodeSample(
            busy_seconds=Measured(
                {core: max(0.0, now - busy[core]) for core, now in self._busy.items() if core in busy},
                Source.PROCFS,
                WHOLE_TICKS,
            ),
            stalled=Measured(waited, Source.PRESSURE, 1.0) if waited else None,
            available_bytes=Measured(available, Source.PROCFS, 1.0),
            total_bytes=total,
            joules=None if joules is None else Measured(joules, Source.SENSOR, self._energy.confidence),
        )
