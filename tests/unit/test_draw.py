"""What the terminal shows of a profile."""

from typing import Any

from rich.console import Console, RenderableType

from edged.probe.draw import HEAT_COLUMNS, heat_map, screen, workers_table
from edged.probe.profile import Device, Profile, Speed, Warmth, Work, profile
from edged.probe.sample import AffinityChange, NodeSample, Source, Step
from edged.types import Served
from tests.samples import counted, histogram, process, sample

DEVICE = Device(id="pi", software="1.2", cores={0: 1.0, 1: 1.0})
WORKS = {"chat": Work(model="tiny@1", served=Served(completion_tokens=30), speed=Speed())}


def told(*processes: Any, warmth: Warmth | None = None, **changes: Any) -> Profile:
    return profile(sample(*processes, **changes), DEVICE, WORKS, warmth or Warmth())


def drawn(renderable: RenderableType, *, terminal: bool = False) -> str:
    console = Console(width=400, force_terminal=terminal, color_system="256" if terminal else None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def busy(first: float, second: float) -> NodeSample:
    return NodeSample(busy_seconds=counted({0: first, 1: second}))


def test_a_worker_is_a_row_with_its_figures() -> None:
    chat = process(
        cpu_seconds={0: 0.5, 1: 0.4}, run_queue=histogram(b3=98, b12=2), resident_bytes=120_000_000, major_faults=3
    )
    heading, row = drawn(workers_table(told(chat))).splitlines()
    found = dict(zip(heading.replace("WAIT p50", "p50").split(), row.replace(" ms", "ms").split(), strict=False))
    assert "90%" in row
    assert "12 µs" in row
    assert "120.0 MB" in row
    assert row.split()[-1] == "tiny"
    assert "30.0" in row
    assert found["WORKER"] == "chat"


def test_estimates_have_a_tilde_and_what_is_not_known_a_dash() -> None:
    shown = drawn(workers_table(told(process(minor_faults=counted(50, Source.PROCFS, 0.5)))))
    assert "~50" in shown
    assert "–" in shown


def test_a_core_is_a_row_with_its_seconds_and_who_kept_it_busy() -> None:
    seconds = [told(node=busy(0.0, 0.0)), told(process(cpu_seconds={0: 0.7}), node=busy(1.0, 0.5))]
    rows = drawn(heat_map(seconds, seconds[-1])).splitlines()[1:]
    assert rows[0].split() == ["0", "█", "chat", "70%,", "others", "30%"]
    assert rows[1].split() == ["1", "▄", "others", "50%"]


def test_busy_cores_are_hot_and_idle_ones_cold() -> None:
    seconds = [told(node=busy(1, 1)), told(node=busy(0.1, 0))]
    hot, cold = (drawn(heat_map([each], each), terminal=True) for each in seconds)
    red = "\x1b[38;5;9m"
    assert red in hot or "\x1b[31m" in hot
    assert red not in cold


def test_a_long_history_is_drawn_in_as_many_columns_as_fit() -> None:
    seconds = [told(node=busy(1.0, 1.0))] * 200
    rows = drawn(heat_map(seconds, seconds[-1])).splitlines()
    assert rows[1].count("█") == 50 <= HEAT_COLUMNS
    assert "over 200 s, 4 s a mark" in rows[0]


def test_the_head_says_the_device_the_means_the_score_and_why_not_better() -> None:
    warmth = Warmth(celsius=61.0, headroom=19.0, slowed=True)
    shown = drawn(screen(told(step=Step.PROCFS, reason="no BTF", warmth=warmth), []))
    assert shown.startswith("pi, edged 1.2 · by procfs · score 0.50")
    assert "61 °C, 19 to spare, slowed" in shown
    assert "not by better means: no BTF" in shown


def test_who_changed_an_affinity_is_named_and_cannot_steer_the_terminal() -> None:
    change = AffinityChange(caller_pid=9, caller_name="task\x1b[2Jset\n", thread=11)
    shown = drawn(screen(told(process(affinity_changes=(change,))), []))
    assert "chat: affinity of thread 11 changed by task[2Jset (pid 9)" in shown


def test_a_device_of_which_nothing_is_known_can_be_drawn() -> None:
    nothing = told(node=NodeSample(), seconds=0.0)
    assert "pi, edged 1.2" in drawn(screen(nothing, [nothing]))
