"""What measuring costs the chat worker, and what it shows that a CPU percentage does not.

cost       tokens per second of a real worker's streams while the probe watches it and while nobody does, in turn, for a
           second from the same token on; what the probe itself takes
neighbour  a worker asked at a steady pace, alone on its core and then beside a busy process, second by second: the
           run-queue delay that the probe counts, the CPU percentage that psutil computes

The probe needs root, bcc and the kernel's headers (scripts/probe-kernel.sh):

    python benchmarks/probe.py [--rounds N] [--seconds N] [--svg FILE] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil
from quality import table

sys.path.insert(0, str(Path(__file__).parent.parent))

from edged.config import Config
from edged.models.catalog import Catalog
from edged.probe.histogram import quantile
from edged.probe.sample import Sample, Step, Watched
from edged.types import Segment
from edged.workers.protocol import WorkerSettings
from edged.workers.worker import Worker
from tests.probe_process import ProbeClient, ProbeProcess

MODELS_CACHE: Final = Path("~/.cache/edged/models").expanduser()
STREAMS: Final = (1, 4)
MOST_TOKENS: Final = 1900
WINDOW_SECONDS: Final = 1.0
"""As long as from one reading of the probe to its next."""
SETTLING_SECONDS: Final = 0.3
"""From the first tokens until the window begins: the programs are attached there. Longer windows would not be alike: a
token takes longer, the more there were before."""
PACE_SECONDS: Final = 0.4
PACED_TOKENS: Final = 6
LEAST_RATIO: Final = 0.99
MOST_CORE_SHARE: Final = 0.01
LEAST_RISE: Final = 10.0
BUSY: Final = "while True: pass"
PROMPT: Final = "A long list of the parts of a pump, each with its purpose:\n1."
WITH, WITHOUT = "with the probe", "without"


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Some seconds of streams that go on: tokens of all of them per second, and the median milliseconds from one token
    of a stream to its next. The probe's own figures are shares of a core, 0 without it.
    """

    streams: int
    method: str
    tokens_per_second: float
    token_ms: float
    probe_core_share: float = 0.0
    kernel_core_share: float = 0.0


class Second(msgspec.Struct, frozen=True, kw_only=True):
    """One second of the worker: run-queue delays in microseconds, its CPU percentage as psutil has it."""

    busy_neighbour: bool
    p50: float
    p99: float
    cpu_percent: float


# --- the parts -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def chat_worker(folder: Path, threads: int) -> AsyncIterator[Worker]:
    models = folder / "models"
    models.mkdir(exist_ok=True)
    file = Catalog(models, MODELS_CACHE).pull(Config().chat.model)
    settings = WorkerSettings(kind="chat", model=str(file), threads=threads, sequences=max(STREAMS))
    worker = Worker(settings, folder / "worker.sock", on_state=lambda _state, _why: None)
    worker.start()
    try:
        await worker.settled()
        yield worker
    finally:
        await worker.stop()


@contextlib.contextmanager
def probe(folder: Path) -> Iterator[ProbeProcess]:
    process = ProbeProcess(folder)
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


def watched_client(probe: ProbeProcess, worker: Worker) -> ProbeClient:
    """A client whose samples come from the kernel."""
    assert worker.pid is not None
    client = ProbeClient(probe.socket)
    client.watch(Watched(name="chat", pid=worker.pid))
    sample = client.sample_until(lambda sample: sample.step is Step.EBPF or "compiled" not in sample.reason)
    if sample.step is not Step.EBPF:
        raise SystemExit(f"the probe does not reach the kernel: {sample.reason}")
    client.sample_until(lambda sample: bool(sample.processes))
    return client


@contextlib.asynccontextmanager
async def streaming(worker: Worker, streams: int) -> AsyncIterator[list[list[float]]]:
    """When the pieces of each stream came, by the loop's clock; from the first of each on."""
    heard: list[list[float]] = [[] for _ in range(streams)]
    begun = [asyncio.Event() for _ in range(streams)]
    tasks = [asyncio.create_task(_listen(worker, *each)) for each in zip(heard, begun, strict=True)]
    try:
        for event in begun:
            await event.wait()
        yield heard
        if any(task.done() for task in tasks):
            raise RuntimeError("a stream ended early")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(worker: Worker, heard: list[float], begun: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    async with contextlib.aclosing(worker.generate([Segment(PROMPT)], max_tokens=MOST_TOKENS)) as items:
        async for _ in items:
            heard.append(loop.time())
            begun.set()


# --- cost ------------------------------------------------------------------------------------------


async def measure_cost(worker: Worker, probe: ProbeProcess, rounds: int) -> list[Window]:
    """Pairs of windows, one after the other in the list; which method comes first changes from pair to pair."""
    (await asyncio.to_thread(watched_client, probe, worker)).close()  # compiled
    found = []
    for number in range(rounds):
        for streams in STREAMS:
            order = (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH)
            pair = [await _window(worker, probe, streams, method) for method in order]
            found += pair
            told = ", ".join(f"{each.method} {each.tokens_per_second:.1f}" for each in pair)
            print(f"round {number + 1}, {streams} streams: {told}", flush=True)
    return found


async def _window(worker: Worker, probe: ProbeProcess, streams: int, method: str) -> Window:
    assert worker.pid is not None
    loop = asyncio.get_running_loop()
    async with streaming(worker, streams) as heard:
        with _watching(probe, worker.pid) if method == WITH else contextlib.nullcontext() as client:
            await asyncio.sleep(SETTLING_SECONDS)
            before, begin = _cpu_seconds(probe.pid), loop.time()
            await asyncio.sleep(WINDOW_SECONDS)
            seconds, spent = loop.time() - begin, _cpu_seconds(probe.pid) - before
            sample = None if client is None else client.sample_until(lambda sample: sample.seconds > WINDOW_SECONDS / 2)
    inside = [[moment for moment in each if begin <= moment <= begin + seconds] for each in heard]
    if sample is not None and sample.step is not Step.EBPF:
        raise SystemExit(f"the probe does not reach the kernel: {sample.reason}")
    return Window(
        streams=streams,
        method=method,
        tokens_per_second=sum(len(each) for each in inside) / seconds,
        token_ms=statistics.median(1e3 * (b - a) for each in inside for a, b in itertools.pairwise(each)),
        probe_core_share=0.0 if sample is None else spent / seconds,
        kernel_core_share=0.0 if sample is None else (sample.cost.kernel_seconds or 0.0) / sample.seconds,
    )


@contextlib.contextmanager
def _watching(probe: ProbeProcess, pid: int) -> Iterator[ProbeClient]:
    client = ProbeClient(probe.socket)
    try:
        client.watch(Watched(name="chat", pid=pid))
        yield client
    finally:
        client.close()


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def cost_report(windows: Sequence[Window], resident_bytes: int) -> Iterator[str]:
    rows = []
    for streams in STREAMS:
        mine = [each for each in windows if each.streams == streams]
        plain, measured = ([each for each in mine if each.method == method] for method in (WITHOUT, WITH))
        ratios = sorted(_ratio(pair) for pair in _pairs(mine))
        least, most = _bounds(ratios)
        rows.append(
            (
                streams,
                f"{statistics.median(each.tokens_per_second for each in plain):.1f}",
                f"{statistics.median(each.tokens_per_second for each in measured):.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{least:.3f} to {most:.3f}",
                f"{statistics.median(_token_ratio(pair) for pair in _pairs(mine)):.3f}",
                f"{100 * statistics.mean(each.probe_core_share for each in measured):.2f} %",
                f"{100 * statistics.mean(each.kernel_core_share for each in measured):.2f} %",
            )
        )
        ratio = statistics.median(ratios)
        yield _goal(f"{streams} streams at least {LEAST_RATIO:g} times", ratio >= LEAST_RATIO, f"{ratio:.3f}")
    share = statistics.mean(each.probe_core_share for each in windows if each.method == WITH)
    yield _goal(
        "the probe's process takes at most 1 % of a core",
        share <= MOST_CORE_SHARE,
        f"{100 * share:.2f} %, {resident_bytes / 2**20:.0f} MiB resident",
    )
    header = (
        "streams", "tokens/s without", "with the probe", "ratio", "95 % of such medians", "by the median token",
        "probe's process", "its programs",
    )  # fmt: skip
    yield "\n" + table(header, rows)


def _pairs(windows: Sequence[Window]) -> list[dict[str, Window]]:
    """Neighbours in time, by method."""
    return [{each.method: each for each in pair} for pair in zip(windows[::2], windows[1::2], strict=True)]


def _ratio(pair: dict[str, Window]) -> float:
    return pair[WITH].tokens_per_second / pair[WITHOUT].tokens_per_second


def _token_ratio(pair: dict[str, Window]) -> float:
    return pair[WITHOUT].token_ms / pair[WITH].token_ms


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Between these, of sorted values, the median of their distribution lies in 95 of 100 cases: by their ranks."""
    away = round(1.96 * len(values) ** 0.5 / 2)
    middle = (len(values) - 1) / 2
    return values[max(0, int(middle - away))], values[min(len(values) - 1, int(middle + away + 0.5))]


def _goal(text: str, holds: bool, found: str) -> str:
    return f"{text}: {'yes' if holds else 'NO'} ({found})"


# --- neighbour -------------------------------------------------------------------------------------


async def measure_neighbour(worker: Worker, probe: ProbeProcess, seconds: int) -> list[Second]:
    """The worker has a core to itself and less to do than it could; then somebody else wants that core as well."""
    core = max(os.sched_getaffinity(0))
    client = await asyncio.to_thread(watched_client, probe, worker)
    asking = asyncio.create_task(_ask_now_and_then(worker))
    try:
        await asyncio.to_thread(client.sample)
        _pin(worker, probe, core)  # now it has all of its threads: those to come would compute where this one does
        await asyncio.to_thread(client.sample)
        quiet = await _seconds(client, worker, seconds, busy=False)
        neighbour = await asyncio.create_subprocess_exec("taskset", "-c", str(core), sys.executable, "-c", BUSY)
        try:
            await asyncio.to_thread(client.sample)
            return quiet + await _seconds(client, worker, seconds, busy=True)
        finally:
            neighbour.kill()
            await neighbour.wait()
    finally:
        asking.cancel()
        client.close()


def _pin(worker: Worker, probe: ProbeProcess, core: int) -> None:
    """The thread that computes on this core; the worker's others, the probe, and this program, elsewhere."""
    assert worker.pid is not None
    others = os.sched_getaffinity(0) - {core}
    for thread in psutil.Process(worker.pid).threads():
        os.sched_setaffinity(thread.id, {core} if thread.id == worker.pid else others)
    for process in (probe.pid, 0):
        os.sched_setaffinity(process, others)


async def _ask_now_and_then(worker: Worker) -> None:
    """A sensor's pace: as much work each second, however long it takes."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        async for _ in worker.generate([Segment(PROMPT)], max_tokens=PACED_TOKENS):
            pass
        due = max(due + PACE_SECONDS, loop.time())
        await asyncio.sleep(due - loop.time())


async def _seconds(client: ProbeClient, worker: Worker, count: int, *, busy: bool) -> list[Second]:
    process = psutil.Process(worker.pid)
    process.cpu_percent()
    found = []
    for _ in range(count):
        sample: Sample = await asyncio.to_thread(client.sample)
        delays = sample.processes[0].run_queue
        assert delays is not None
        found.append(
            Second(
                busy_neighbour=busy,
                p50=quantile(delays.value, 0.5) or 0.0,
                p99=quantile(delays.value, 0.99) or 0.0,
                cpu_percent=process.cpu_percent(),
            )
        )
    return found


def neighbour_report(seconds: Sequence[Second]) -> Iterator[str]:
    quiet, busy = ([each for each in seconds if each.busy_neighbour is kind] for kind in (False, True))
    rows = [
        (
            name,
            f"{statistics.median(each.p50 for each in group):.0f}",
            f"{statistics.median(each.p99 for each in group):.0f}",
            f"{statistics.median(each.cpu_percent for each in group):.0f} %",
        )
        for name, group in (("alone", quiet), ("beside a busy process", busy))
    ]
    rise = statistics.median(each.p99 for each in busy) / max(1.0, statistics.median(each.p99 for each in quiet))
    yield _goal(f"run-queue p99 up at least {LEAST_RISE:g} times", rise >= LEAST_RISE, f"{rise:.0f} times")
    yield "\n" + table(("the worker", "run-queue p50 µs", "p99 µs", "psutil's CPU percentage"), rows)


# --- the picture -----------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, GAP = 640, 150, 70, 50


def picture(seconds: Sequence[Second]) -> str:
    """An SVG: both figures over the same seconds."""
    begin = next(index for index, each in enumerate(seconds) if each.busy_neighbour)
    upper = _chart("run-queue p99, ms", [each.p99 / 1e3 for each in seconds], begin, 20)
    lower = _chart("psutil's CPU, %", [each.cpu_percent for each in seconds], begin, 20 + HEIGHT + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {2 * HEIGHT + GAP + 60}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{upper}\n{lower}\n</svg>\n"
    )


def _chart(name: str, values: Sequence[float], begin: int, top: int) -> str:
    most = max(values) * 1.1
    step = WIDTH / (len(values) - 1)
    points = " ".join(
        f"{LEFT + n * step:.1f},{top + HEIGHT * (1 - value / most):.1f}" for n, value in enumerate(values)
    )
    border = LEFT + (begin - 0.5) * step
    return (
        f'<rect x="{border:.1f}" y="{top}" width="{LEFT + WIDTH - border:.1f}" height="{HEIGHT}" fill="#fde8d8"/>\n'
        f'<line x1="{LEFT}" y1="{top + HEIGHT}" x2="{LEFT + WIDTH}" y2="{top + HEIGHT}" stroke="#888"/>\n'
        f'<text x="{LEFT}" y="{top - 5}">{name}</text>\n'
        f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end">{most:.3g}</text>\n'
        f'<text x="{LEFT - 8}" y="{top + HEIGHT}" text-anchor="end">0</text>\n'
        f'<text x="{border + 6:.1f}" y="{top + HEIGHT + 16}">a busy process on its core, second by second</text>\n'
        f'<polyline points="{points}" fill="none" stroke="#b03a2e" stroke-width="2"/>'
    )


# --- all -------------------------------------------------------------------------------------------


async def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=60, help="pairs of windows for each number of streams")
    arguments.add_argument("--seconds", type=int, default=15, help="alone, and as many beside the busy process")
    arguments.add_argument("--svg", type=Path, help="draw the neighbour here")
    arguments.add_argument("--json", type=Path, help="write every measurement to this file")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="edged-probe-") as name:
        folder = Path(name)
        with probe(folder) as measuring:
            async with chat_worker(folder, threads=len(os.sched_getaffinity(0))) as worker:
                rounds = await measure_cost(worker, measuring, given.rounds)
            resident = psutil.Process(measuring.pid).memory_info().rss
            async with chat_worker(folder, threads=1) as worker:
                seconds = await measure_neighbour(worker, measuring, given.seconds)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"\n{today}, {os.cpu_count()}-core {platform.machine()}, Linux {platform.release()}, {given.rounds} rounds\n")
    for line in (*cost_report(rounds, resident), "", *neighbour_report(seconds)):
        print(line)
    if given.svg:
        given.svg.write_text(picture(seconds), encoding="utf-8")
    if given.json:
        given.json.write_bytes(msgspec.json.encode({"cost": rounds, "neighbour": seconds}))


if __name__ == "__main__":
    asyncio.run(main())
