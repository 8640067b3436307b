"""The profile: what each worker of a device used in a window of time, and what the device has left. Pure.

One struct holds for a second and for a quarter of an hour: :func:`merge` of the parts is the profile of the whole.
Each field is declared once, with its unit and how it is merged; ``docs/PROFILE.md`` is made from the declarations.
"""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from edged.errors import ProfileError
from edged.probe import histogram
from edged.probe.sample import AffinityChange, Cost, Measured, NodeSample, ProcessSample, Sample, Source, Step
from edged.types import Served

SCHEMA: Final = 1
"""Fields may be added under the same number; one that changes its meaning or goes away raises it."""

CHANGES_KEPT: Final = 8
SHARED_ENERGY_CONFIDENCE: Final = 0.5
"""A process's part of the energy follows its part of the CPU time; memory and radio are not told apart."""
SMOOTHED_CONFIDENCE: Final = 0.8

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


class Merging(StrEnum):
    """What the parts of a window make together."""

    SUM = "added up"
    MEAN = "averaged over time"
    LAST = "as at the end"
    PEAK = "the largest"
    DELAYS = "counts added up, percentiles anew"


class Figure(msgspec.Struct, Generic[T], frozen=True):
    """A value, how many ``seconds`` of the window it was measured for, by what, and how far to trust it (1: every
    event was counted)."""

    value: T
    seconds: float
    sources: tuple[Source, ...]
    confidence: float


class Delays(msgspec.Struct, frozen=True):
    """``counts`` by powers of two: the first up to 2 µs, the second up to 4, the last from 67 s on. Percentiles are
    interpolated in their bucket; null without any count."""

    counts: tuple[int, ...]
    p50_us: float | None
    p99_us: float | None


def _field(merging: Merging, unit: str, description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description, extra={"merging": merging, "unit": unit})


Counted = Figure[int]
Amount = Figure[float]


class WorkerProfile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process. What could not be measured is left out."""

    pid: Annotated[int, _field(Merging.LAST, "", "Process id.")]
    threads: Annotated[int, _field(Merging.LAST, "", "Threads of the process.")]
    model: Annotated[str, _field(Merging.LAST, "", "Identity of the model it serves; empty for the daemon.")] = ""
    cpu_seconds: Annotated[
        Figure[dict[int, float]] | None, _field(Merging.SUM, "s", "CPU time by number of the core.")
    ] = None
    run_queue: Annotated[
        Figure[Delays] | None, _field(Merging.DELAYS, "µs", "How long threads that could run waited for a core.")
    ] = None
    off_cpu_seconds: Annotated[
        Figure[dict[str, float]] | None,
        _field(
            Merging.SUM,
            "s",
            "Thread time off the CPU by reason: `preempted` (could run), `sleeping`, `waiting` (for the disk, mostly), "
            "`stolen` (on a core that a hypervisor or an interrupt had meanwhile, as far as this kernel tells them).",
        ),
    ] = None
    throttled_share: Annotated[
        Amount | None, _field(Merging.MEAN, "0 to 1", "Share of the periods of its CPU quota in which it was stopped.")
    ] = None
    migrations: Annotated[Counted | None, _field(Merging.SUM, "", "Moves of a thread to another core.")] = None
    affinity_changes: Annotated[
        Counted | None, _field(Merging.SUM, "", "Calls of sched_setaffinity on its threads, those of edged included.")
    ] = None
    changed_by: Annotated[
        tuple[AffinityChange, ...],
        _field(Merging.LAST, "", f"The latest {CHANGES_KEPT} by others: `caller_pid`, `caller_name`, `thread`."),
    ] = ()
    minor_faults: Annotated[Counted | None, _field(Merging.SUM, "", "Page faults served from memory.")] = None
    major_faults: Annotated[Counted | None, _field(Merging.SUM, "", "Page faults that waited for the disk.")] = None
    read_bytes: Annotated[Counted | None, _field(Merging.SUM, "bytes", "Read from block devices.")] = None
    written_bytes: Annotated[Counted | None, _field(Merging.SUM, "bytes", "Written to block devices.")] = None
    io_delay: Annotated[
        Figure[Delays] | None, _field(Merging.DELAYS, "µs", "Each block request's time from issue to completion.")
    ] = None
    cycles: Annotated[Counted | None, _field(Merging.SUM, "", "CPU cycles.")] = None
    instructions: Annotated[Counted | None, _field(Merging.SUM, "", "Instructions completed.")] = None
    cache_misses: Annotated[Counted | None, _field(Merging.SUM, "", "Misses of the last cache level.")] = None
    resident_bytes: Annotated[Counted | None, _field(Merging.LAST, "bytes", "Memory in RAM.")] = None
    resident_peak_bytes: Annotated[
        Counted | None, _field(Merging.PEAK, "bytes", "The most memory in RAM at the end of a second.")
    ] = None
    file_bytes: Annotated[
        Counted | None, _field(Merging.LAST, "bytes", "Of it, pages of files: a mapped model is here.")
    ] = None
    anonymous_bytes: Annotated[
        Counted | None, _field(Merging.LAST, "bytes", "Of it, memory of its own: caches and buffers are here.")
    ] = None
    requests: Annotated[Counted | None, _field(Merging.SUM, "", "Requests finished.")] = None
    prompt_tokens: Annotated[Counted | None, _field(Merging.SUM, "tokens", "Of their prompts or texts.")] = None
    cached_tokens: Annotated[
        Counted | None, _field(Merging.SUM, "tokens", "Of the prompts, what was not computed again.")
    ] = None
    completion_tokens: Annotated[Counted | None, _field(Merging.SUM, "tokens", "Generated.")] = None
    tokens_per_second: Annotated[
        Amount | None, _field(Merging.MEAN, "tokens/s", "Generated in the window, by all requests together.")
    ] = None
    queue_seconds: Annotated[
        Amount | None, _field(Merging.SUM, "s", "What the finished requests waited before their prompt was begun.")
    ] = None
    prompt_speed: Annotated[
        Amount | None, _field(Merging.LAST, "tokens/s", "At which a request's prompt is computed, smoothed.")
    ] = None
    decode_speed: Annotated[
        Amount | None, _field(Merging.LAST, "tokens/s", "At which one request gets its answer, smoothed.")
    ] = None
    joules: Annotated[
        Amount | None, _field(Merging.SUM, "J", "Its part of the device's energy, by its part of the CPU time.")
    ] = None


class NodeProfile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole device."""

    cores: Annotated[
        dict[int, float],
        _field(Merging.LAST, "", "Cores edged may use: by number, computing power beside the fastest, 0 to 1."),
    ]
    quota_cores: Annotated[
        float | None, _field(Merging.LAST, "cores", "CPU time edged may use, where a quota limits it.")
    ] = None
    total_bytes: Annotated[int, _field(Merging.LAST, "bytes", "All memory of the device; 0 where not known.")] = 0
    available_bytes: Annotated[
        Counted | None, _field(Merging.LAST, "bytes", "Memory that can be had without swapping.")
    ] = None
    busy_seconds: Annotated[
        Figure[dict[int, float]] | None,
        _field(Merging.SUM, "s", "Time each core was busy, by number, whoever computed."),
    ] = None
    stalled: Annotated[
        Figure[dict[str, float]] | None,
        _field(Merging.MEAN, "0 to 1", "Share of the time in which a process waited for `cpu`, `memory` or `io`."),
    ] = None
    celsius: Annotated[
        Amount | None, _field(Merging.LAST, "°C", "Of the sensor nearest to the point where the CPU is slowed.")
    ] = None
    headroom_celsius: Annotated[
        Amount | None, _field(Merging.LAST, "°C", "How far it is below that point: thermal headroom.")
    ] = None
    slowed: Annotated[
        bool, _field(Merging.LAST, "", "Whether the CPU is kept below its speed for heat or power now.")
    ] = False
    joules: Annotated[Amount | None, _field(Merging.SUM, "J", "Energy, where the device has a sensor for it.")] = None


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What the parts of the load score count for, and the waiting time at which the latency part is one half."""

    memory: float = 0.7
    latency: float = 0.3
    cpu: float = 0.0
    half_seconds: float = 0.05


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How much room there is, 0 to 1, more is better: the weighted mean of the parts that are known.

    ``memory``: the share that is available. ``latency``: ``half_seconds / (half_seconds + wait)``, where ``wait`` is
    what requests waited in the chat worker's queue, on average, and the 99th percentile of what its threads waited for
    a core. ``cpu``: the share of the cores' time that was idle. ``confidence`` counts an unknown part as 0.
    """

    value: float
    confidence: float
    parts: dict[str, float]
    weights: Weights


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A window of time. ``since`` and ``at`` are its ends, seconds since 1970; ``seconds`` of it were measured.

    ``step`` and ``reason`` say by which means at its end, and why not by better ones. ``workers`` are by role:
    ``chat``, ``embed``, ``daemon``, and ``chat-candidate`` while a model is tried. ``probe`` is what measuring cost.
    """

    schema: int = SCHEMA
    device: str
    software: str
    since: float
    at: float
    seconds: float
    step: Step
    reason: str = ""
    workers: dict[str, WorkerProfile]
    node: NodeProfile
    score: Score
    probe: Cost


class Fact(msgspec.Struct, frozen=True):
    """What is declared of a field."""

    merging: Merging
    unit: str
    description: str


def facts(kind: type[msgspec.Struct]) -> Iterator[tuple[str, Fact]]:
    """The declared fields of :class:`WorkerProfile` or :class:`NodeProfile`, in order."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        meta = hint.__metadata__[0]
        yield name, Fact(meta.extra["merging"], meta.extra["unit"], meta.description)


# --- one second --------------------------------------------------------------------------------------


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change: who measures, and what edged may use. ``cores``: number to speed, see
    :class:`NodeProfile`."""

    id: str
    software: str
    cores: dict[int, float]
    quota_cores: float | None = None
    weights: Weights = Weights()


class Speed(msgspec.Struct, frozen=True):
    """Tokens/s a request sees, smoothed; None until there was one."""

    prompt: float | None = None
    decode: float | None = None


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon knows of a worker in that second: its model, what it served meanwhile, how fast of late."""

    model: str
    served: Served
    speed: Speed = Speed()


class Warmth(msgspec.Struct, frozen=True, kw_only=True):
    """How hot the device is, as the daemon's sensors say; None where there are none."""

    celsius: float | None = None
    headroom: float | None = None
    slowed: bool = False


def profile(sample: Sample, device: Device, works: Mapping[str, Work], warmth: Warmth) -> Profile:
    """The profile of one sample; ``works`` are by the names of the watched processes."""
    node = _node(sample.node, sample.seconds, device, warmth)
    workers = {process.name: _worker(process, sample, works.get(process.name)) for process in sample.processes}
    return Profile(
        device=device.id,
        software=device.software,
        since=sample.at - sample.seconds,
        at=sample.at,
        seconds=sample.seconds,
        step=sample.step,
        reason=sample.reason,
        workers=workers,
        node=node,
        score=score(workers, node, device.weights),
        probe=sample.cost,
    )


_COPIED: Final = (
    "cpu_seconds",
    "off_cpu_seconds",
    "migrations",
    "minor_faults",
    "major_faults",
    "read_bytes",
    "written_bytes",
    "throttled_share",
    "cycles",
    "instructions",
    "cache_misses",
    "resident_bytes",
    "file_bytes",
    "anonymous_bytes",
)


def _worker(process: ProcessSample, sample: Sample, work: Work | None) -> WorkerProfile:
    seconds = sample.seconds
    figures: dict[str, Any] = {name: _figure(getattr(process, name), seconds) for name in _COPIED}
    changes = process.affinity_changes
    if changes is not None:
        figures["affinity_changes"] = Figure(len(changes.value), seconds, (changes.source,), changes.confidence)
        by_others = [change for change in changes.value if change.caller_pid != process.pid]
        figures["changed_by"] = tuple(by_others[-CHANGES_KEPT:])
    return WorkerProfile(
        pid=process.pid,
        threads=process.threads,
        **figures,
        resident_peak_bytes=figures["resident_bytes"],
        run_queue=_delays(process.run_queue, seconds),
        io_delay=_delays(process.io_delay, seconds),
        joules=_energy(process, sample.node, seconds),
        **(_work(work, seconds) if work is not None else {}),
    )


def _figure(measured: Measured[T] | None, seconds: float) -> Figure[T] | None:
    if measured is None:
        return None
    return Figure(measured.value, seconds, (measured.source,), measured.confidence)


def _delays(measured: Measured[tuple[int, ...]] | None, seconds: float) -> Figure[Delays] | None:
    if measured is None:
        return None
    return Figure(_read_delays(measured.value), seconds, (measured.source,), measured.confidence)


def _read_delays(counts: tuple[int, ...]) -> Delays:
    return Delays(counts, histogram.quantile(counts, 0.5), histogram.quantile(counts, 0.99))


def _work(work: Work, seconds: float) -> dict[str, Any]:
    served = work.served

    def told(value: T, confidence: float = 1.0) -> Figure[T]:
        return Figure(value, seconds, (Source.WORKER,), confidence)

    return {
        "model": work.model,
        "requests": told(served.requests),
        "prompt_tokens": told(served.prompt_tokens),
        "cached_tokens": told(served.cached_tokens),
        "completion_tokens": told(served.completion_tokens),
        "tokens_per_second": told(served.completion_tokens / seconds if seconds else 0.0),
        "queue_seconds": told(served.queue_seconds),
        "prompt_speed": None if work.speed.prompt is None else told(work.speed.prompt, SMOOTHED_CONFIDENCE),
        "decode_speed": None if work.speed.decode is None else told(work.speed.decode, SMOOTHED_CONFIDENCE),
    }


def _energy(process: ProcessSample, node: NodeSample, seconds: float) -> Amount | None:
    if node.joules is None or node.busy_seconds is None or process.cpu_seconds is None:
        return None
    busy = sum(node.busy_seconds.value.values())
    part = min(1.0, sum(process.cpu_seconds.value.values()) / busy) if busy else 0.0
    confidence = SHARED_ENERGY_CONFIDENCE * node.joules.confidence
    return Figure(part * node.joules.value, seconds, (node.joules.source,), confidence)


def _node(sample: NodeSample, seconds: float, device: Device, warmth: Warmth) -> NodeProfile:
    def sensed(value: float | None) -> Amount | None:
        return None if value is None else Figure(value, seconds, (Source.SENSOR,), 1.0)

    return NodeProfile(
        cores=device.cores,
        quota_cores=device.quota_cores,
        total_bytes=sample.total_bytes,
        available_bytes=_figure(sample.available_bytes, seconds),
        busy_seconds=_figure(sample.busy_seconds, seconds),
        stalled=_figure(sample.stalled, seconds),
        celsius=sensed(warmth.celsius),
        headroom_celsius=sensed(warmth.headroom),
        slowed=warmth.slowed,
        joules=_figure(sample.joules, seconds),
    )


# --- the load score ----------------------------------------------------------------------------------


def score(workers: Mapping[str, WorkerProfile], node: NodeProfile, weights: Weights) -> Score:
    """See :class:`Score`."""
    known = {
        "memory": _memory_part(node),
        "latency": _latency_part(workers.get("chat"), weights.half_seconds),
        "cpu": _cpu_part(node),
    }
    parts = {name: part for name, part in known.items() if part is not None}
    counted = {name: getattr(weights, name) for name in known}
    whole, present = sum(counted.values()), sum(counted[name] for name in parts)
    return Score(
        value=sum(counted[name] * part for name, (part, _) in parts.items()) / present if present else 0.0,
        confidence=sum(counted[name] * sure for name, (_, sure) in parts.items()) / whole if whole else 0.0,
        parts={name: part for name, (part, _) in parts.items()},
        weights=weights,
    )


def _memory_part(node: NodeProfile) -> tuple[float, float] | None:
    available = node.available_bytes
    if available is None or not node.total_bytes:
        return None
    return _bounded(available.value / node.total_bytes), available.confidence


def _latency_part(chat: WorkerProfile | None, half_seconds: float) -> tuple[float, float] | None:
    if chat is None or (chat.queue_seconds is None and chat.run_queue is None):
        return None
    waited = mean_wait_seconds(chat)
    if chat.run_queue is not None:
        waited += (chat.run_queue.value.p99_us or 0.0) / 1e6
    sure = [figure.confidence for figure in (chat.queue_seconds, chat.run_queue) if figure is not None]
    return half_seconds / (half_seconds + waited), sum(sure) / 2


def mean_wait_seconds(worker: WorkerProfile) -> float:
    """What a request waited in the worker's queue, on average; 0 where there was none."""
    if worker.requests is None or worker.queue_seconds is None or not worker.requests.value:
        return 0.0
    return worker.queue_seconds.value / worker.requests.value


def _cpu_part(node: NodeProfile) -> tuple[float, float] | None:
    busy = node.busy_seconds
    if busy is None or not busy.value or not busy.seconds:
        return None
    return _bounded(1.0 - sum(busy.value.values()) / (len(busy.value) * busy.seconds)), busy.confidence


def _bounded(share: float) -> float:
    return min(1.0, max(0.0, share))


# --- merging -----------------------------------------------------------------------------------------


def merge(parts: Sequence[Profile]) -> Profile:
    """The profile of a window from those of its parts, in the order of time; at least one."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    names = dict.fromkeys(name for part in parts for name in part.workers)
    workers = {name: _merge_structs([part.workers[name] for part in parts if name in part.workers]) for name in names}
    node = _merge_structs([part.node for part in parts])
    return Profile(
        device=last.device,
        software=last.software,
        since=parts[0].since,
        at=last.at,
        seconds=sum(part.seconds for part in parts),
        step=last.step,
        reason=last.reason,
        workers=workers,
        node=node,
        score=score(workers, node, last.score.weights),
        probe=_merge_costs([part.probe for part in parts]),
    )


def spent_seconds(cost: Cost) -> float:
    """CPU time that measuring took, of the probe and of its programs in the kernel."""
    return cost.cpu_seconds + (cost.kernel_seconds or 0.0)


def _merge_costs(costs: Sequence[Cost]) -> Cost:
    kernel = [cost.kernel_seconds for cost in costs if cost.kernel_seconds is not None]
    return Cost(
        cpu_seconds=sum(cost.cpu_seconds for cost in costs),
        resident_bytes=costs[-1].resident_bytes,
        kernel_seconds=sum(kernel) if kernel else None,
    )


def _merge_structs(parts: Sequence[S]) -> S:
    """Field by field, as declared; ``changed_by`` alone is a list that grows."""
    kind = type(parts[0])
    merged: dict[str, Any] = {}
    for name, merging in _MERGINGS[kind].items():
        values = [getattr(part, name) for part in parts]
        figures = [value for value in values if isinstance(value, Figure)]
        if name == "changed_by":
            merged[name] = tuple(change for value in values for change in value)[-CHANGES_KEPT:]
        elif figures:
            merged[name] = _merge_figures(figures, merging)
        else:
            merged[name] = values[-1]
    return kind(**merged)


def _merge_figures(figures: Sequence[Figure[Any]], merging: Merging) -> Figure[Any]:
    seconds = [figure.seconds for figure in figures]
    return Figure(
        _MERGERS[merging]([figure.value for figure in figures], seconds),
        sum(seconds),
        tuple(sorted({source for figure in figures for source in figure.sources})),
        _mean([figure.confidence for figure in figures], seconds),
    )


def _sum(values: Sequence[Any], _seconds: Sequence[float]) -> Any:
    if isinstance(values[0], dict):
        return {key: sum(value.get(key, 0.0) for value in values) for key in _keys(values)}
    return sum(values)


def _mean(values: Sequence[Any], seconds: Sequence[float]) -> Any:
    if isinstance(values[0], dict):
        return {key: _mean([value.get(key, 0.0) for value in values], seconds) for key in _keys(values)}
    whole = sum(seconds)
    if not whole:
        return values[-1]
    return sum(value * each for value, each in zip(values, seconds, strict=True)) / whole


def _keys(values: Sequence[Mapping[Any, float]]) -> list[Any]:
    return sorted({key for value in values for key in value})


def _merge_delays(values: Sequence[Delays], _seconds: Sequence[float]) -> Delays:
    return _read_delays(histogram.add([value.counts for value in values]))


_MERGERS: Final[dict[Merging, Callable[[Sequence[Any], Sequence[float]], Any]]] = {
    Merging.SUM: _sum,
    Merging.MEAN: _mean,
    Merging.LAST: lambda values, _seconds: values[-1],
    Merging.PEAK: lambda values, _seconds: max(values),
    Merging.DELAYS: _merge_delays,
}
_MERGINGS: Final[dict[type, dict[str, Merging]]] = {
    kind: {name: fact.merging for name, fact in facts(kind)} for kind in (WorkerProfile, NodeProfile)
}


# --- on the wire -------------------------------------------------------------------------------------


class _Head(msgspec.Struct):
    schema: int


def to_json(each: Profile) -> bytes:
    """One line of JSON, without its end."""
    return msgspec.json.encode(each)


def to_msgpack(each: Profile) -> bytes:
    return msgspec.msgpack.encode(each)


def from_json(text: bytes | str) -> Profile:
    """Raises :class:`ProfileError`; fields added since are ignored."""
    return _decode(text, msgspec.json.decode)


def from_msgpack(data: bytes) -> Profile:
    """As :func:`from_json`."""
    return _decode(data, msgspec.msgpack.decode)


def _decode(data: bytes | str, decode: Callable[..., Any]) -> Profile:
    try:
        schema = decode(data, type=_Head).schema
        if schema != SCHEMA:
            raise ProfileError(
                f"the profile has schema {schema}, this edged reads {SCHEMA}", hint="use the edged that recorded it"
            )
        each: Profile = decode(data, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"this is no profile: {error}", hint="'edged profile record' makes one") from error
    return each
