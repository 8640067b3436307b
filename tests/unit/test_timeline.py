"""What several means measured of a worker, on one axis of time, and the pages that show it."""

import json
import re
from typing import Any

import pytest

from edged.probe.pages import HEIGHT, WIDTH, chart, flames_page, thinned, ticks, timeline_page
from edged.probe.profile import Device, Profile, Warmth, Work, profile
from edged.probe.stacks import Slice, indexed, innermost, parse_folded, render_folded, total
from edged.probe.timeline import Series, Timeline, timeline
from edged.types import Served
from tests.samples import NOW, histogram, process, sample

DEVICE = Device(id="box", software="1", cores={0: 1.0, 1: 1.0})
FOLDED = "main (a.py:1);step (b.py:2);llama_decode (libllama.so) 3\nmain (a.py:1);0x7f2b22e4524a (libc.so.6) 1\n"


def second(after: float, *, pid: int = 10, tokens: int = 0, **figures: Any) -> Profile:
    """The profile of the second that ends so long after NOW."""
    work = Work(model="m", served=Served(completion_tokens=tokens))
    return profile(sample(process(pid=pid, **figures), at=NOW + after), DEVICE, {"chat": work}, Warmth())


def lined_up(*profiles: Profile, **changes: Any) -> Timeline:
    given: dict[str, Any] = {"role": "chat", "pid": 10, "begin": NOW, "end": NOW + 10.0, "heap": (), "slices": ()}
    return timeline(**{**given, "profiles": profiles, **changes})


def points(axis: Timeline, name: str) -> list[tuple[float, float]]:
    return [point for series in axis.series if series.name == name for point in series.points]


# --- the axis --------------------------------------------------------------------------------------


def test_levels_stand_at_the_end_of_their_second_and_rates_in_its_middle() -> None:
    axis = lined_up(
        second(1.0, tokens=40, resident_bytes=100_000_000), second(2.0, tokens=20, resident_bytes=110_000_000)
    )
    assert points(axis, "resident") == [(1.0, 100.0), (2.0, 110.0)]
    assert points(axis, "tokens") == [(0.5, 40.0), (1.5, 20.0)]


def test_everything_is_in_the_units_that_the_series_names() -> None:
    figures: dict[str, Any] = {
        "cpu_seconds": {0: 0.5, 1: 0.75},
        "run_queue": histogram(b10=100),
        "anonymous_bytes": 5_000_000,
    }
    axis = lined_up(second(1.0, **figures), heap=[(NOW + 0.25, 2_000_000.0)])
    units = {series.name: (series.unit, series.points[0][1]) for series in axis.series}
    assert units["cores"] == ("cores", 1.25)
    assert units["anonymous"] == ("MB", 5.0)
    assert units["heap"] == ("MB", 2.0)
    assert units["run_queue_p99"][0] == "ms"
    assert units["run_queue_p99"][1] == pytest.approx(2.04, abs=0.02)


def test_what_was_measured_before_or_after_is_left_out() -> None:
    axis = lined_up(
        second(-1.0, resident_bytes=1),
        second(0.3, resident_bytes=2_000_000, tokens=9),
        second(11.0, resident_bytes=3),
        heap=[(NOW - 1, 1.0), (NOW + 1, 1_000_000.0), (NOW + 11, 1.0)],
    )
    assert points(axis, "resident") == [(0.3, 2.0)]
    assert points(axis, "tokens") == []
    assert points(axis, "heap") == [(1.0, 1.0)]


def test_another_process_of_the_role_is_left_out_and_named() -> None:
    axis = lined_up(second(1.0, resident_bytes=1_000_000), second(2.0, pid=11, resident_bytes=2_000_000))
    assert points(axis, "resident") == [(1.0, 1.0)]
    assert axis.notes == ("the worker's process was another for a part of the time",)


def test_without_profiles_the_rest_is_there_and_the_reason_too() -> None:
    axis = lined_up(heap=[(NOW + 1, 1_000_000.0)], notes=["no stacks: because"])
    assert [series.name for series in axis.series] == ["heap"]
    assert axis.notes == ("no stacks: because", "no profile came: probe.enabled must be true")


def test_a_slice_of_stacks_ends_with_the_axis_and_names_what_computed_most() -> None:
    stacks = parse_folded(FOLDED)
    axis = lined_up(slices=[Slice(NOW + 5, NOW + 10.2, stacks), Slice(NOW + 10.3, NOW + 11, stacks)])
    assert [(each.begin, each.end, each.samples) for each in axis.slices] == [(5.0, 10.0, 4)]
    assert axis.slices[0].innermost == [("llama_decode (libllama.so)", 0.75), ("? (libc.so.6)", 0.25)]


# --- stacks ----------------------------------------------------------------------------------------


def test_functions_without_a_name_are_one_in_each_library() -> None:
    twice = parse_folded(FOLDED + "main (a.py:1);0x7f2b22e9999 (libc.so.6) 2\n")
    assert twice["main (a.py:1)", "? (libc.so.6)"] == 3


def test_folded_stacks_come_back_as_they_were_written() -> None:
    stacks = parse_folded(FOLDED)
    assert parse_folded(render_folded(stacks)) == stacks
    assert parse_folded("") == {}


def test_slices_add_up() -> None:
    one = Slice(0, 1, {("a",): 1, ("a", "b"): 2})
    other = Slice(1, 2, {("a", "b"): 3})
    assert total([one, other]) == {("a",): 1, ("a", "b"): 5}
    assert innermost(total([one, other]), 1) == [("b", 5 / 6)]
    assert innermost({}, 3) == []


def test_a_page_holds_each_name_once() -> None:
    names, stacks = indexed([Slice(0, 1, {("a", "b"): 2}), Slice(1, 2, {("a", "c", "b"): 1})])
    assert names == ["a", "b", "c"]
    assert stacks == [[(2, [0, 1])], [(1, [0, 2, 1])]]


# --- pages -----------------------------------------------------------------------------------------


def series(shape: Any, *drawn: tuple[float, float]) -> Series:
    return Series(name="x", title="X", unit="MB", shape=shape, sources=("procfs",), points=drawn)


def test_slow_growth_of_a_level_fills_its_chart_and_rates_stand_on_zero() -> None:
    level = chart(series("level", (0.0, 1000.0), (1.0, 1001.0)), seconds=2.0)
    assert (level.low, level.high) == (1000.0, 1001.0)
    assert level.path == f"M0.0 {HEIGHT:.1f}h0.1L{WIDTH / 2:.1f} 0.0"
    rate = chart(series("rate", (0.0, 50.0), (1.0, 100.0)), seconds=2.0)
    assert (rate.low, rate.high) == (0.0, 100.0)


def test_a_line_is_broken_where_nothing_was_measured() -> None:
    assert chart(series("rate", (0.0, 1.0), (1.0, 1.0), (9.0, 1.0)), seconds=10.0).path.count("M") == 2


def test_a_level_that_does_not_change_is_drawn_too() -> None:
    flat = chart(series("level", (0.0, 7.0), (1.0, 7.0)), seconds=1.0)
    assert flat.low < flat.high


@pytest.mark.parametrize(("seconds", "last"), [(1.0, 1), (5.3, 5), (60.4, 60), (600.0, 600)])
def test_the_axis_has_few_round_ticks(seconds: float, last: int) -> None:
    assert ticks(seconds)[0] == 0
    assert ticks(seconds)[-1] == last
    assert len(ticks(seconds)) <= 13


def test_long_series_are_thinned_for_the_page() -> None:
    assert len(thinned([(float(at), 1.0) for at in range(6000)])) <= WIDTH
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_the_pages_need_no_network_and_take_names_for_nothing_but_text() -> None:
    evil = "</script><script>alert(1)</script> (a&b.py:1)"
    slices = [Slice(NOW, NOW + 5, {("main", evil): 2})]
    axis = lined_up(second(1.0, resident_bytes=1_000_000), slices=slices, notes=["<b>bold</b>"])
    pages = [timeline_page(axis, {"flame graph": "flames.html"}), flames_page(slices, NOW, "<i>title</i>")]
    for page in pages:
        assert re.findall(r"(?:src|href)=\"(?!flames\.html)", page) == []
        assert "<script>alert" not in page
        assert "<b>bold" not in page
        assert "<i>title" not in page
    data = re.search(r'id="data" type="application/json">(.*?)</script>', pages[1], re.DOTALL)
    assert data is not None
    assert evil in json.loads(data[1])["names"]


def test_each_slice_leads_to_its_own_flame_graph() -> None:
    stacks = parse_folded(FOLDED)
    axis = lined_up(slices=[Slice(NOW, NOW + 5, stacks), Slice(NOW + 5, NOW + 10, stacks)])
    page = timeline_page(axis, {"flame graph": "flames.html"})
    assert re.findall(r'href="(flames\.html#\d)"', page) == ["flames.html#0", "flames.html#1"]
