"""Where a loaded model is not what its settings ask for, or slower than this device allows: named conditions."""

from collections.abc import Iterator, Mapping

from edged.hardware import features
from edged.runtime.health import CPU_UNUSED, GPU_MISSING, MODEL_NOT_LOCKED, ConditionKind, Health
from edged.workers.protocol import Ready, WorkerSettings

MEGABYTE = 1e6

Loaded = Mapping[str, tuple[WorkerSettings, Ready]]
"""By kind: what was asked of the worker and what it reported."""


class Findings:
    """Holds the conditions that follow from what the workers report when they have loaded their models."""

    def __init__(self, health: Health, cpu_flags: frozenset[str]) -> None:
        self._health = health
        self._cpu_flags = cpu_flags
        self._loaded: dict[str, tuple[WorkerSettings, Ready]] = {}

    def loaded(self, settings: WorkerSettings, ready: Ready) -> None:
        """A worker has loaded its model; what an earlier one of its kind reported is over."""
        self._loaded[settings.kind] = (settings, ready)
        found = dict(findings(self._loaded, self._cpu_flags))
        for kind in (GPU_MISSING, MODEL_NOT_LOCKED, CPU_UNUSED):
            if kind in found:
                self._health.set(kind, found[kind])
            else:
                self._health.clear(kind)


def findings(loaded: Loaded, cpu_flags: frozenset[str]) -> Iterator[tuple[ConditionKind, str]]:
    """Each condition that holds, with its text: pure. ``cpu_flags`` are those of /proc/cpuinfo."""
    on_cpu = [kind for kind, (settings, ready) in loaded.items() if settings.gpu_layers and not ready.gpu]
    if on_cpu:
        yield GPU_MISSING, f"llama.cpp finds no GPU it was built for: the CPU computes {' and '.join(on_cpu)}"
    unlocked = [
        f"{ready.locked_bytes / MEGABYTE:.0f} of {ready.model_bytes / MEGABYTE:.0f} MB of the {kind} model"
        for kind, (settings, ready) in loaded.items()
        if settings.load_mode == "mlock" and ready.locked_bytes < _to_lock(settings, ready)
    ]
    if unlocked:
        yield MODEL_NOT_LOCKED, f"{', '.join(unlocked)} are locked in memory"
    unused = {name: None for _, ready in loaded.values() for name in features.unused(cpu_flags, ready.system)}
    if unused:
        yield CPU_UNUSED, f"llama.cpp was built without {', '.join(unused)}, which this CPU has"


def _to_lock(settings: WorkerSettings, ready: Ready) -> int:
    """How much must be locked at least; layers on a GPU are not in this memory, nobody says how many bytes."""
    return 1 if settings.gpu_layers and ready.gpu else ready.model_bytes
