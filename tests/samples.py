"""Samples as a probe sends them, made up: what a test does not name is quiet."""

from typing import Any

from edged.probe.sample import (
    HISTOGRAM_BUCKETS,
    Cost,
    Measured,
    NodeSample,
    ProcessSample,
    Sample,
    Source,
    Step,
)

NOW = 1_767_225_600.0


def counted(value: Any, source: Source = Source.EBPF, confidence: float = 1.0) -> Measured[Any]:
    return Measured(value, source, confidence)


def histogram(**counts: int) -> tuple[int, ...]:
    """``histogram(b3=10, b12=1)``: ten delays in bucket 3, one in bucket 12."""
    found = [0] * HISTOGRAM_BUCKETS
    for name, count in counts.items():
        found[int(name[1:])] = count
    return tuple(found)


def process(name: str = "chat", pid: int = 10, **figures: Any) -> ProcessSample:
    """Figures are given bare and count as counted by eBPF."""
    told = {key: value if isinstance(value, Measured) else counted(value) for key, value in figures.items()}
    return ProcessSample(name=name, pid=pid, threads=4, **told)


def sample(*processes: ProcessSample, at: float = NOW, seconds: float = 1.0, **changes: Any) -> Sample:
    node = changes.pop("node", None) or NodeSample(
        busy_seconds=counted({0: 0.5, 1: 0.5}), available_bytes=counted(2 * 10**9), total_bytes=4 * 10**9
    )
    return Sample(
        at=at,
        seconds=seconds,
        step=changes.pop("step", Step.EBPF),
        reason=changes.pop("reason", ""),
        processes=processes,
        node=node,
        cost=changes.pop("cost", Cost(cpu_seconds=0.002, resident_bytes=10**8, kernel_seconds=0.001)),
    )
