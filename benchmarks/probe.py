"""What measuring costs the chat worker, and what it shows that a CPU percentage does not.

cost       decode tokens per second of a real worker with and without the probe, in turn; what the probe itself takes.
           The median time from token to token tells less than the whole, and repeats better: stalls do not move it
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
from edged.workers.protocol import Finished, WorkerSettings
from edged.workers.worker import Worker
from tests.probe_process import ProbeClient, ProbeProcess

MODELS_CACHE: Final = Path("~/.cache/edged/models").expanduser()
STREAMS: Final = (1, 4)
TOKENS: Final = 192
PACE_SECONDS: Final = 0.4
PACED_TOKENS: Final = 6
LEAST_RATIO: Final = 0.99
MOST_CORE_SHARE: Final = 0.01
LEAST_RISE: Final = 10.0
BUSY: Final = "while True: pass"
PROMPT: Final = "A long list of the parts of a pump, each with its purpose:\n1."
WITH, WITHOUT = "with the probe", "without"


class Speed(msgspec.Struct, frozen=True):
    """Of all streams together, prompts left out; and the median time from one token of a stream to its next."""

    tokens_per_second: float
    token_ms: float


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """So many streams at once; the probe's own figures are of the seconds in between, 0 without it."""

    streams: int
    method: str
    speed: Speed
    samples: int = 0
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


async def decode(worker: Worker, streams: int, tokens: int = TOKENS) -> Speed:
    ended = await asyncio.gather(*(_one(worker, tokens) for _ in range(streams)))
    return Speed(
        sum((last.completion_tokens - 1) / (last.generate_ms / 1e3) for last, _ in ended),
        statistics.median(gap for _, gaps in ended for gap in gaps),
    )


async def _one(worker: Worker, tokens: int) -> tuple[Finished, list[float]]:
    """How it ended, and the milliseconds between the pieces of its text."""
    loop = asyncio.get_running_loop()
    heard: list[float] = []
    async with contextlib.aclosing(worker.generate([Segment(PROMPT)], max_tokens=tokens)) as items:
        async for item in items:
            if isinstance(item, Finished):
                return item, [(later - sooner) * 1e3 for sooner, later in itertools.pairwise(heard)]
            heard.append(loop.time())
    raise RuntimeError("a stream ended early")


# --- cost ------------------------------------------------------------------------------------------


async def measure_cost(worker: Worker, probe: ProbeProcess, rounds: int) -> list[Round]:
    await decode(worker, max(STREAMS))
    found = []
    for number in range(rounds):
        for streams in STREAMS:
            order = (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH)
            for method in order:
                found.append(await _round(worker, probe, streams, method))
                print(
                    f"round {number + 1}, {streams} streams, {method}: {found[-1].speed.tokens_per_second:.1f}",
                    flush=True,
                )
    return found


async def _round(worker: Worker, probe: ProbeProcess, streams: int, method: str) -> Round:
    if method == WITHOUT:
        return Round(streams=streams, method=method, speed=await decode(worker, streams))
    client = await asyncio.to_thread(watched_client, probe, worker)
    before = _cpu_seconds(probe.pid)
    speed = await decode(worker, streams)
    first = await asyncio.to_thread(client.sample)
    samples = [first]
    seconds = streams * TOKENS / speed.tokens_per_second
    while sum(each.seconds for each in samples) < seconds:
        samples.append(await asyncio.to_thread(client.sample))
    client.close()
    passed = sum(each.seconds for each in samples)
    return Round(
        streams=streams,
        method=method,
        speed=speed,
        samples=len(samples),
        probe_core_share=(_cpu_seconds(probe.pid) - before) / passed,
        kernel_core_share=sum(each.cost.kernel_seconds or 0.0 for each in samples) / passed,
    )


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def cost_report(rounds: Sequence[Round], resident_bytes: int) -> Iterator[str]:
    rows = []
    for streams in STREAMS:
        plain, measured = (_speeds(rounds, streams, method) for method in (WITHOUT, WITH))
        own = [each for each in rounds if each.streams == streams and each.method == WITH]
        ratio = _relation([each.tokens_per_second for each in measured], [each.tokens_per_second for each in plain])
        token_ratio = _relation([each.token_ms for each in plain], [each.token_ms for each in measured])
        rows.append(
            (
                streams,
                f"{statistics.median(each.tokens_per_second for each in plain):.1f}",
                f"{statistics.median(each.tokens_per_second for each in measured):.1f}",
                f"{ratio:.3f}",
                f"{token_ratio:.3f}",
                f"{100 * statistics.median(each.probe_core_share for each in own):.2f} %",
                f"{100 * statistics.median(each.kernel_core_share for each in own):.2f} %",
            )
        )
        yield _goal(f"{streams} streams at least {LEAST_RATIO:g} times", ratio >= LEAST_RATIO, f"{ratio:.3f}")
    shares = [each.probe_core_share for each in rounds if each.method == WITH]
    yield _goal(
        "the probe's process takes at most 1 % of a core",
        statistics.median(shares) <= MOST_CORE_SHARE,
        f"{100 * statistics.median(shares):.2f} %, {resident_bytes / 2**20:.0f} MiB resident",
    )
    header = (
        "streams", "tokens/s without", "with the probe", "ratio", "by the median token", "probe's process",
        "its programs",
    )  # fmt: skip
    yield "\n" + table(header, rows)


def _relation(upper: Sequence[float], lower: Sequence[float]) -> float:
    """The median of the ratios within the rounds."""
    return statistics.median(above / below for above, below in zip(upper, lower, strict=True))


def _speeds(rounds: Sequence[Round], streams: int, method: str) -> list[Speed]:
    return [each.speed for each in rounds if (each.streams, each.method) == (streams, method)]


def _goal(text: str, holds: bool, found: str) -> str:
    return f"{text}: {'yes' if holds else 'NO'} ({found})"


# --- neighbour -------------------------------------------------------------------------------------


async def measure_neighbour(worker: Worker, probe: ProbeProcess, seconds: int) -> list[Second]:
    """The worker has a core to itself and less to do than it could; then somebody else wants that core as well."""
    core = max(os.sched_getaffinity(0))
    _pin(worker, core)
    client = await asyncio.to_thread(watched_client, probe, worker)
    asking = asyncio.create_task(_ask_now_and_then(worker))
    try:
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


def _pin(worker: Worker, core: int) -> None:
    """The thread that computes on this core; the worker's others, and this program, elsewhere."""
    assert worker.pid is not None
    others = os.sched_getaffinity(0) - {core}
    for thread in psutil.Process(worker.pid).threads():
        os.sched_setaffinity(thread.id, {core} if thread.id == worker.pid else others)
    os.sched_setaffinity(0, others)


async def _ask_now_and_then(worker: Worker) -> None:
    """A sensor's pace: as much work each second, however long it takes."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        await _one(worker, PACED_TOKENS)
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
    arguments.add_argument("--rounds", type=int, default=12, help="pairs of rounds for each number of streams")
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
