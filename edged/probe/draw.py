"""Profiles as a terminal shows them: a table of the workers, and a heat map of the cores over time. Pure."""

import math
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edged.probe.profile import Counted, Figure, Profile, WorkerProfile, merge, spent_seconds

BLOCKS: Final = " ▁▂▃▄▅▆▇█"
HEAT: Final = ("grey37", "green", "chartreuse3", "yellow3", "orange1", "red")
HEAT_COLUMNS: Final = 60
UNSURE: Final = 0.9
"""Below this confidence a figure is an estimate and marked by a tilde."""
MISSING: Final = "–"
# What a process calls itself must not steer the terminal: all of C0 and C1 goes.
_CONTROLS: Final = dict.fromkeys((*range(32), *range(127, 160)))

T = TypeVar("T")


def screen(shown: Profile, history: Sequence[Profile]) -> RenderableType:
    """Everything: ``shown`` in the table, the seconds of ``history`` in the heat map, the latest at its right."""
    parts: list[RenderableType] = [_head(shown), workers_table(shown)]
    if changes := _changes(shown):
        parts.append(changes)
    parts.append(heat_map(history, shown))
    return Group(*parts)


# --- the head ----------------------------------------------------------------------------------------


def _head(shown: Profile) -> Text:
    node, score = shown.node, shown.score
    parts = ", ".join(f"{name} {part:.2f}" for name, part in score.parts.items())
    told = [
        f"{shown.device}, edged {shown.software}",
        f"by {shown.step.value}",
        f"score {score.value:.2f} ({parts})",
        f"{shown.seconds:.0f} s",
    ]
    if node.available_bytes is not None:
        told.append(f"{_bytes(node.available_bytes.value)} of {_bytes(node.total_bytes)} free")
    if node.celsius is not None:
        margin = f", {node.headroom_celsius.value:.0f} to spare" if node.headroom_celsius is not None else ""
        told.append(f"{node.celsius.value:.0f} °C{margin}{', slowed' * node.slowed}")
    if shown.seconds:
        told.append(f"measuring takes {spent_seconds(shown.probe) / shown.seconds:.1%} of a core")
    text = _plain(" · ".join(told), "bold")
    if shown.reason:
        text.append("\n").append_text(_plain(f"not by better means: {shown.reason}", "dim"))
    return text


def _changes(shown: Profile) -> Text | None:
    lines = [
        _plain(f"{name}: affinity of thread {change.thread} changed by {change.caller_name} (pid {change.caller_pid})")
        for name, worker in shown.workers.items()
        for change in worker.changed_by
    ]
    return Text("\n", style="yellow").join(lines) if lines else None


# --- the table ---------------------------------------------------------------------------------------

_COLUMNS: Final[tuple[tuple[str, Callable[[WorkerProfile], str]], ...]] = (
    ("PID", lambda worker: str(worker.pid)),
    ("CPU", lambda worker: _figure(worker.cpu_seconds, lambda used, s: f"{sum(used.values()) / s:.0%}")),
    ("WAIT p50", lambda worker: _figure(worker.run_queue, lambda waits, _: _microseconds(waits.p50_us))),
    ("p99", lambda worker: _figure(worker.run_queue, lambda waits, _: _microseconds(waits.p99_us))),
    ("STOPPED", lambda worker: _figure(worker.throttled_share, lambda share, _: f"{share:.0%}")),
    ("FAULTS/s", lambda worker: _figure(worker.minor_faults, lambda count, s: f"{count / s:.0f}")),
    ("MAJOR", lambda worker: _figure(worker.major_faults, lambda count, _: str(count))),
    ("READ/s", lambda worker: _rate(worker.read_bytes)),
    ("WRITE/s", lambda worker: _rate(worker.written_bytes)),
    ("I/O p99", lambda worker: _figure(worker.io_delay, lambda waits, _: _microseconds(waits.p99_us))),
    ("MEMORY", lambda worker: _size(worker.resident_bytes)),
    ("FILE", lambda worker: _size(worker.file_bytes)),
    ("OWN", lambda worker: _size(worker.anonymous_bytes)),
    ("TOKENS/s", lambda worker: _figure(worker.tokens_per_second, lambda rate, _: f"{rate:.1f}")),
    ("MODEL", lambda worker: worker.model.partition("@")[0]),
)


def workers_table(shown: Profile) -> Table:
    """A row a worker. A tilde marks what was sampled or estimated, a dash what could not be measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("WORKER", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, no_wrap=True, justify="left" if heading == "MODEL" else "right")
    for name, worker in shown.workers.items():
        table.add_row(_plain(name), *(_plain(tell(worker)) for _, tell in _COLUMNS))
    return table


def _figure(figure: Figure[T] | None, tell: Callable[[T, float], str]) -> str:
    if figure is None or not figure.seconds:
        return MISSING
    told = tell(figure.value, figure.seconds)
    return f"~{told}" if figure.confidence < UNSURE and told != MISSING else told


def _rate(figure: Counted | None) -> str:
    return _figure(figure, lambda count, seconds: _bytes(count / seconds))


def _size(figure: Counted | None) -> str:
    return _figure(figure, lambda count, _: _bytes(count))


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _microseconds(count: float | None) -> str:
    if count is None:
        return MISSING
    if count < 1e3:
        return f"{count:.0f} µs"
    return f"{count / 1e3:.1f} ms" if count < 1e6 else f"{count / 1e6:.1f} s"


# --- the heat map ------------------------------------------------------------------------------------


def heat_map(history: Sequence[Profile], shown: Profile) -> Table:
    """A row a core: how busy it was each second, and who kept it so in the time that is shown."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns, step = _columns(history)
    over = f" over {sum(each.seconds for each in history):.0f} s{f', {step} s a mark' * (step > 1)}"
    for heading in ("CORE", "BUSY" + over, "BY"):
        table.add_column(heading, no_wrap=True)
    busy = shown.node.busy_seconds
    for core in sorted(shown.node.cores | (busy.value if busy is not None else {})):
        cells = Text()
        for column in columns:
            cells.append_text(_cell(_share(column, core)))
        table.add_row(str(core), cells, _plain(_shares(shown, core)))
    return table


def _columns(history: Sequence[Profile]) -> tuple[list[Profile], int]:
    """The history in no more columns than fit, and how many profiles make one."""
    step = math.ceil(len(history) / HEAT_COLUMNS) or 1
    parts = list(history)
    return [merge(parts[start : start + step]) for start in range(0, len(parts), step)], step


def _share(profile: Profile, core: int) -> float | None:
    busy = profile.node.busy_seconds
    if busy is None or not busy.seconds:
        return None
    return min(1.0, busy.value.get(core, 0.0) / busy.seconds)


def _cell(share: float | None) -> Text:
    if share is None:
        return Text("?", style="dim")
    block = BLOCKS[min(len(BLOCKS) - 1, round(share * (len(BLOCKS) - 1)))]
    return Text(block, style=HEAT[min(len(HEAT) - 1, int(share * len(HEAT)))])


def _shares(shown: Profile, core: int) -> str:
    """Each worker's share of a core, and that of all others."""
    whole = _share(shown, core)
    ours = {
        name: worker.cpu_seconds.value.get(core, 0.0) / worker.cpu_seconds.seconds
        for name, worker in shown.workers.items()
        if worker.cpu_seconds is not None and worker.cpu_seconds.seconds
    }
    told = [f"{name} {share:.0%}" for name, share in ours.items() if share >= 0.005]
    others = (whole or 0.0) - sum(ours.values())
    return ", ".join([*told, f"others {others:.0%}"] if others >= 0.005 else told)


def _plain(text: str, style: str = "") -> Text:
    return Text(text.translate(_CONTROLS), style=style)
