"""Pages that show a timeline and sampled stacks: each one file that needs no network; pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import jinja2
import msgspec

from edged.probe.stacks import Slice, indexed
from edged.probe.timeline import GAP_SECONDS, Point, Series, Timeline

WIDTH: Final = 1000
HEIGHT: Final = 90
"""Of a chart, in its own units; the page stretches it to the window's width."""

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("edged.probe"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """A series drawn: ``path`` in SVG's words, between values of ``low`` and ``high``."""

    series: Series
    low: float
    high: float
    path: str


def chart(series: Series, seconds: float) -> Chart:
    """Levels fill the height with what they change, so that slow growth shows; rates stand on zero."""
    values = [value for _, value in series.points]
    low = min(values) if series.shape == "level" else 0.0
    high = max(values)
    if math.isclose(low, high):
        high = low + 1.0
    return Chart(series=series, low=low, high=high, path=_path(series, seconds, low, high))


def _path(series: Series, seconds: float, low: float, high: float) -> str:
    steps = []
    before = -math.inf
    for at, value in series.points:
        pen = "L" if at - before <= GAP_SECONDS else "M"
        x, y = WIDTH * at / seconds, HEIGHT * (high - value) / (high - low)
        # A point alone would be invisible: it is drawn as the shortest of lines.
        steps.append(f"{pen}{x:.1f} {y:.1f}" + ("h0.1" if pen == "M" else ""))
        before = at
    return "".join(steps)


def ticks(seconds: float) -> list[int]:
    """Round seconds for the axis, at most twelve beside zero."""
    step = next(step for step in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600) if seconds / step <= 12)
    return list(range(0, math.floor(seconds) + 1, step))


def thinned(points: Sequence[Point], most: int = WIDTH) -> list[Point]:
    """At most so many of the points, evenly chosen."""
    return list(points[:: max(1, math.ceil(len(points) / most))])


def timeline_page(timeline: Timeline, files: Mapping[str, str]) -> str:
    """The timeline as HTML. ``files`` are the names of what lies beside it, by what they show."""
    return _environment.get_template("timeline.html.jinja").render(
        timeline=timeline,
        charts=[chart(series, timeline.seconds) for series in timeline.series],
        values=[thinned(series.points) for series in timeline.series],
        ticks=ticks(timeline.seconds),
        files=files,
        width=WIDTH,
        height=HEIGHT,
    )


def flames_page(slices: Sequence[Slice], begin: float, title: str) -> str:
    """A flame graph as HTML: of all slices, or of the one whose number is behind the ``#`` of its address."""
    names, stacks = indexed(slices)
    times = [[round(each.begin - begin, 1), round(each.end - begin, 1)] for each in slices]
    data = {"names": names, "stacks": stacks, "times": times}
    return _environment.get_template("flames.html.jinja").render(title=title, data=data)
