"""Decoding under a CPU quota and beside a busy neighbour: edged as it decides by itself, and llama-server.

Each server is a process in a control group of its own, started under the limits that it is measured under, asked over
HTTP, in interleaved rounds, one at a time while the others are stopped. Control groups are made by root, with cgroup v2
or v1. The client has real-time priority: it shares the cores, and would else tell when it was let to run.

quota       35 to 200 % of a core: the automatic plan, each number of threads by hand (as many as cores is the naive
            one), and llama-server with its defaults
neighbour   a program that keeps a core busy: nothing done about it, CPU weights of 100:1, and reserve_cores, each
            beside the rate without it. Where there are too few cores to reserve as many as the automatic plan has
            threads, one is left to others; then the quiet rate is told with the same cores and with all

    python benchmarks/quota.py [--quick] [--only quota|neighbour] [--quotas PERCENT,…] [--rounds N] [--seconds S]
        [--path GGUF] [--alone] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import logging
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import groups
import httpx
import llama_server
import msgspec
import servers
import structlog
from engine import Goal
from groups import Group, Limits
from quality import MODELS_CACHE, table
from servers import Reply, Server, Setup, in_turn, numbered
from throughput import PROMPTS

from edged.config import load
from edged.hardware import detect
from edged.hardware.neighbours import CROWDED_OBSERVATIONS, FREE_OBSERVATIONS
from edged.hardware.placement import Machine, Placement, Wishes, place
from edged.models.catalog import Catalog
from edged.runtime.health import CORES_CROWDED, CORES_NOT_RESERVED, ConditionKind
from edged.serving.care import OBSERVE_EVERY_SECONDS
from edged.workers.process import COMPUTE_ENVIRONMENT

PARTS = ("quota", "neighbour")
AUTOMATIC, THEIRS = "edged", "llama-server"
RESERVING, THEIRS_BY_HAND = "edged, reserve_cores", "llama-server, those cores by hand"
SETUP_TOKENS, SETUP_SEQUENCES = 2048, 4

PERCENTS = (35, 70, 100, 150, 200)
LEAST_OF_BEST = 0.95

Handling = Literal["nothing", "weights", "reserve_cores"]
HANDLINGS: tuple[Handling, ...] = ("nothing", "weights", "reserve_cores")
HEAVY_WEIGHT = 100 * groups.USUAL_WEIGHT  # as systemd/edged.slice has it
LEAST_OF_QUIET = {"weights": 0.65, "reserve_cores": 0.9}

LEAST_TOKENS, MOST_TOKENS = 16, 512
STEADY_SECONDS = (CROWDED_OBSERVATIONS + 3) * OBSERVE_EVERY_SECONDS
QUIET_SECONDS = 3 * FREE_OBSERVATIONS * OBSERVE_EVERY_SECONDS
SETTLE_SECONDS = 60.0
POLL_SECONDS = 0.5
TOO_FEW_CORES = "a neighbour needs a second core"
BUSY = """
import contextlib, os, sys
with contextlib.suppress(OSError):
    os.sched_setaffinity(0, {int(sys.argv[1])})
print(flush=True)
while True:
    pass
"""


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """A server as it is to be started. 0 ``threads``: as it takes by itself."""

    name: str
    threads: int = 0
    reserve: bool = False
    limits: Limits = Limits()

    @property
    def is_edged(self) -> bool:
        return self.name.startswith(AUTOMATIC)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One stream. ``case`` is the quota in percent or how the neighbour is handled, ``beside`` whether it was there.

    ``threads`` are those that edged decided on when the stream had ended; llama-server does not say. ``settled``: they
    had been the same for a while.
    """

    case: str
    contender: str
    round: int
    beside: bool
    tokens_per_second: float
    threads: int | None
    settled: bool = True


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One part: its table in Markdown, remarks and goals below it, and every measurement."""

    part: str
    table: str
    remarks: tuple[str, ...]
    goals: tuple[Goal, ...]
    measured: tuple[Measured, ...]


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What a part works with: streams of about so many ``seconds``, so many ``rounds``, quotas of so many ``percents``;
    maybe no llama-server."""

    percents: tuple[int, ...]
    program: Path | None
    setup: Setup
    machine: Machine
    seconds: float
    rounds: int


# --- decisions, pure -------------------------------------------------------------------------------


def decode_rate(reply: Reply) -> float:
    """Tokens per second after the first one. Ends the program where a stream ended at once."""
    if len(reply.pieces) < 2:
        raise SystemExit(f"a stream ended after {reply.completion_tokens} tokens")
    return (reply.completion_tokens - 1) / (reply.pieces[-1][0] - reply.pieces[0][0])


def tokens_for(tokens_per_second: float, seconds: float) -> int:
    """How many tokens take about that long: no stream is too short to tell, and none lasts for minutes."""
    return max(LEAST_TOKENS, min(MOST_TOKENS, round(tokens_per_second * seconds)))


class Steadiness(msgspec.Struct, frozen=True):
    """Since when, by the clock, a number has been what it is."""

    value: int | None = None
    since: float = 0.0

    def observe(self, value: int | None, now: float) -> "Steadiness":
        return self if value == self.value else Steadiness(value, now)

    def holds(self, seconds: float, now: float) -> bool:
        return self.value is not None and now - self.since >= seconds


def reserving(machine: Machine) -> Placement:
    """The automatic plan with ``reserve_cores``."""
    return place(machine, Wishes(reserve_cores=True))


def manual(threads: int, cores: int) -> str:
    """The name of a number of threads that was set by hand."""
    return f"edged, {threads} {'thread' if threads == 1 else 'threads'} by hand{', naive' if threads == cores else ''}"


def quota_contenders(percent: int, cores: int) -> list[Contender]:
    """The automatic plan, each number of threads, and llama-server."""
    limits = Limits(quota_cores=percent / 100)
    by_hand = [(manual(threads, cores), threads) for threads in range(1, cores + 1)]
    named = [(AUTOMATIC, 0), *by_hand, (THEIRS, 0)]
    return [Contender(name=name, threads=threads, limits=limits) for name, threads in named]


def neighbour_contenders(handling: Handling, machine: Machine) -> list[Contender]:
    """edged and llama-server; to reserved cores belong those who have them for themselves as well."""
    limits = Limits(weight=groups.USUAL_WEIGHT if handling == "nothing" else HEAVY_WEIGHT)
    both = [Contender(name=AUTOMATIC, limits=limits), Contender(name=THEIRS, limits=limits)]
    if handling != "reserve_cores":
        return both
    placement = reserving(machine)
    held = msgspec.structs.replace(limits, cores=placement.reserved)
    return [
        Contender(name=RESERVING, reserve=True, limits=limits),
        Contender(name=THEIRS_BY_HAND, threads=placement.chat.threads, limits=held),
        *both,
    ]


def rates(measured: Sequence[Measured], case: str, contender: str, *, beside: bool) -> dict[int, float]:
    """Tokens per second by round."""
    return {
        each.round: each.tokens_per_second
        for each in measured
        if (each.case, each.contender, each.beside) == (case, contender, beside)
    }


def ratio(rates: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(rate / reference[number] for number, rate in rates.items())


def best_by_hand(measured: Sequence[Measured], case: str, cores: int) -> str:
    """The number of threads with the best median, by its name."""
    names = [manual(threads, cores) for threads in range(1, cores + 1)]
    return max(names, key=lambda name: statistics.median(rates(measured, case, name, beside=False).values()))


# --- measuring -------------------------------------------------------------------------------------


class Hardware(msgspec.Struct):
    """Part of what ``/health`` says under ``hardware``."""

    placement: dict[str, "Bounds"]
    reserved_cores: list[int]


class Bounds(msgspec.Struct):
    threads: int


class Condition(msgspec.Struct):
    code: str


class Health(msgspec.Struct):
    """The part of ``/health`` that is looked at."""

    conditions: list[Condition]
    hardware: Hardware | None = None

    @property
    def threads(self) -> int | None:
        return self.hardware.placement["chat"].threads if self.hardware else None

    def has(self, kind: ConditionKind) -> bool:
        return any(each.code == kind.code for each in self.conditions)


async def health(server: Server) -> Health:
    """What a daemon says of itself, asked for cheaply: who keeps a core busy with asking is a neighbour."""
    url = f"http://127.0.0.1:{server.port}"
    # To load certificates, as httpx does even for http, takes 19 ms on a PC and a third of an emulated core here.
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
        return msgspec.json.decode((await client.get("/health")).content, type=Health)


class Course:
    """Streams to whatever server, each with a prompt of its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._serial = itertools.count(1)
        self._tokens: dict[tuple[str, bool], int] = {}

    async def stream(self, server: Server, tokens: int = LEAST_TOKENS) -> float:
        """Decode so many tokens; how many in a second."""
        (prompt,) = numbered(self._serial, PROMPTS[:1])
        return decode_rate(await servers.complete(server, prompt, tokens))

    async def rate(self, server: Server, *, beside: bool) -> float:
        """Tokens per second over about as long as wanted; the first time it is found how many tokens that takes."""
        course = (server.name, beside)
        if course not in self._tokens:
            self._tokens[course] = tokens_for(await self.stream(server), self._seconds)
        return await self.stream(server, self._tokens[course])

    async def until_steady(self, server: Server) -> bool:
        """Let a daemon compute until its number of threads has been the same for a while; False where it never is."""
        computing = asyncio.create_task(self._for_ever(server))
        end = time.monotonic() + SETTLE_SECONDS
        seen = Steadiness()
        try:
            while not seen.holds(STEADY_SECONDS, now := time.monotonic()):
                if now > end or computing.done():
                    return False
                seen = seen.observe((await health(server)).threads, now)
                await asyncio.sleep(POLL_SECONDS)
        finally:
            computing.cancel()
            await asyncio.wait([computing])
        return True

    async def _for_ever(self, server: Server) -> None:
        while True:
            await self.stream(server)


async def until_quiet(server: Server) -> bool:
    """Wait until a daemon sees no neighbour any more; False where it keeps seeing one."""
    end = time.monotonic() + QUIET_SECONDS
    while (await health(server)).has(CORES_CROWDED):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


class Serving(msgspec.Struct, frozen=True):
    """A contender that was started. It is stopped while it is not its turn: what several servers do at idle would be a
    neighbour to each of them."""

    contender: Contender
    server: Server
    group: Group

    @contextlib.contextmanager
    def turn(self) -> Iterator[Server]:
        """Let it run for the time of the block."""
        self.group.signal(signal.SIGCONT)
        try:
            yield self.server
        finally:
            self.group.signal(signal.SIGSTOP)


@contextlib.asynccontextmanager
async def started(contender: Contender, means: Means) -> AsyncIterator[Serving]:
    """The server in its group."""
    setup = msgspec.structs.replace(means.setup, threads=contender.threads)
    with made(contender.limits) as group:
        if contender.is_edged:
            settings = {"EDGED_HARDWARE__RESERVE_CORES": "true"} if contender.reserve else None
            server = servers.edged(setup, name=contender.name, settings=settings, launcher=group.launcher)
        else:
            assert means.program is not None
            server = servers.llama_server(means.program, setup, name=contender.name, launcher=group.launcher)
        async with server as serving:
            try:
                yield Serving(contender, serving, group)
            finally:
                group.signal(signal.SIGCONT)  # to hear that it is to end


_names = (f"edged-benchmark-{os.getpid()}-{number}" for number in itertools.count(1))


def made(limits: Limits, *, of_services: bool = False) -> contextlib.AbstractContextManager[Group]:
    """A group with a name that nobody else has."""
    return groups.made((groups.services() if of_services else "") + next(_names), limits)


async def threads_of(contender: Contender, server: Server) -> int | None:
    """What edged has decided on."""
    return (await health(server)).threads if contender.is_edged else contender.threads or None


async def _warm(stack: contextlib.AsyncExitStack, contender: Contender, means: Means, course: Course) -> Serving:
    """Started, with one stream behind it."""
    serving = await stack.enter_async_context(started(contender, means))
    with serving.turn() as server:
        await course.stream(server)
    return serving


async def _measured(case: str, serving: Serving, course: Course, number: int, *, beside: bool) -> Measured:
    contender = serving.contender
    with serving.turn() as server:
        settled = True
        if contender.is_edged:
            settled = await (course.until_steady(server) if beside else until_quiet(server))
        return Measured(
            case=case,
            contender=contender.name,
            round=number,
            beside=beside,
            tokens_per_second=await course.rate(server, beside=beside),
            threads=await threads_of(contender, server),
            settled=settled,
        )


# --- quota -----------------------------------------------------------------------------------------


async def quota_part(means: Means) -> Report:
    """All contenders under one quota after the other."""
    measured: list[Measured] = []
    for percent in means.percents:
        async for each in _under_quota(percent, means):
            measured.append(each)
            _say(each)
    cores = len(means.machine.cores)
    header = ("quota", "server", "threads", "tokens/s", "min..max", "to the best by hand")
    return Report(
        part="quota",
        table=table(header, list(_quota_rows(measured, cores))),
        remarks=(_rounds(measured, means),),
        goals=tuple(_quota_goal(measured, percent, cores) for percent in means.percents),
        measured=tuple(measured),
    )


async def _under_quota(percent: int, means: Means) -> AsyncIterator[Measured]:
    contenders = _present(quota_contenders(percent, len(means.machine.cores)), means)
    course = Course(means.seconds)
    async with contextlib.AsyncExitStack() as stack:
        serving = [await _warm(stack, each, means, course) for each in contenders]
        for number in range(means.rounds):
            for each in in_turn(serving, number):
                yield await _measured(f"{percent} %", each, course, number, beside=False)


def _quota_rows(measured: Sequence[Measured], cores: int) -> Iterator[tuple[object, ...]]:
    for case, contender in _measured_ones(measured):
        best = rates(measured, case, best_by_hand(measured, case, cores), beside=False)
        own = rates(measured, case, contender, beside=False)
        yield (case, contender, _threads(measured, case, contender), *_speed(own), ratio(own, best))


def _quota_goal(measured: Sequence[Measured], percent: int, cores: int) -> Goal:
    case = f"{percent} %"
    best = best_by_hand(measured, case, cores)
    found = ratio(rates(measured, case, AUTOMATIC, beside=False), rates(measured, case, best, beside=False))
    return Goal(
        text=f"{case}: the automatic plan at least {LEAST_OF_BEST:g} times the best number of threads",
        holds=found >= LEAST_OF_BEST,
        found=f"{found:.3f}; best: {best}",
    )


# --- neighbour -------------------------------------------------------------------------------------


async def neighbour_part(means: Means) -> Report:
    """Quiet and beside the neighbour in turn, for each way to handle it."""
    if len(means.machine.cores) < 2:
        raise SystemExit(TOO_FEW_CORES)
    measured: list[Measured] = []
    for handling in HANDLINGS:
        async for each in _beside(handling, means):
            measured.append(each)
            _say(each)
    header = (
        "neighbour", "server", "threads quiet", "beside it", "tokens/s quiet", "beside it", "to quiet",
        "to edged quiet on all cores",
    )  # fmt: skip
    placement = reserving(means.machine)
    return Report(
        part="neighbour",
        table=table(header, list(_neighbour_rows(measured))),
        remarks=(
            _rounds(measured, means),
            f"reserved: {list(placement.reserved)} of {len(means.machine.cores)} cores",
        ),
        goals=tuple(neighbour_goals(measured)),
        measured=tuple(measured),
    )


async def _beside(handling: Handling, means: Means) -> AsyncIterator[Measured]:
    contenders = _present(neighbour_contenders(handling, means.machine), means)
    placement = reserving(means.machine)
    course = Course(means.seconds)
    async with contextlib.AsyncExitStack() as stack:
        serving = [await _warm(stack, each, means, course) for each in contenders]
        left = await _left_to_others(serving, means.machine, placement)
        for number in range(means.rounds):
            for each in in_turn(serving, number):
                yield await _measured(handling, each, course, number, beside=False)
            with neighbour(placement.chat.cores[0], left):
                for each in in_turn(serving, number):
                    yield await _measured(handling, each, course, number, beside=True)


async def _left_to_others(serving: Sequence[Serving], machine: Machine, placement: Placement) -> tuple[int, ...] | None:
    """The cores to which the neighbour has to be moved here, because edged reserves and has no systemd to ask."""
    for each in serving:
        with each.turn() as server:
            if each.contender.reserve and (await health(server)).has(CORES_NOT_RESERVED):
                return tuple(core.number for core in machine.cores if core.number not in placement.reserved)
    return None


@contextlib.contextmanager
def neighbour(core: int, left: tuple[int, ...] | None) -> Iterator[None]:
    """A program of the system that computes for ever on one core; on those that are ``left`` where that is given.

    Where edged had systemd reserve that core it cannot be asked for, and the program computes on the others.
    """
    with (
        made(Limits(cores=left), of_services=True) as group,
        subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE) as process,
    ):
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # in its group, a core that is not left could not be asked for
                raise SystemExit("the neighbour ended")
            group.adopt(process.pid)
            yield
        finally:
            process.kill()


def _neighbour_rows(measured: Sequence[Measured]) -> Iterator[tuple[object, ...]]:
    for handling, contender in _measured_ones(measured):
        everything = rates(measured, handling, AUTOMATIC, beside=False)
        quiet, beside = (rates(measured, handling, contender, beside=each) for each in (False, True))
        yield (
            handling,
            contender,
            *(_threads(measured, handling, contender, beside=each) for each in (False, True)),
            *(f"{statistics.median(each.values()):.1f}" for each in (quiet, beside)),
            ratio(beside, quiet),
            ratio(beside, everything),
        )


def neighbour_goals(measured: Sequence[Measured]) -> Iterator[Goal]:
    """What must hold beside the neighbour; reserved cores are judged by the quiet rate on them, and on all."""
    for handling, contender in (("weights", AUTOMATIC), ("reserve_cores", RESERVING)):
        least = LEAST_OF_QUIET[handling]
        beside = rates(measured, handling, contender, beside=True)
        own = ratio(beside, rates(measured, handling, contender, beside=False))
        yield Goal(
            text=f"{handling}: at least {least:g} times the quiet rate on the same cores",
            holds=own >= least,
            found=f"{own:.3f}",
        )
        if contender != AUTOMATIC:
            of_all = ratio(beside, rates(measured, handling, AUTOMATIC, beside=False))
            yield Goal(
                text=f"{handling}: at least {least:g} times the quiet rate on all cores",
                holds=of_all >= least,
                found=f"{of_all:.3f}",
            )


# --- all -------------------------------------------------------------------------------------------


def _present(contenders: Sequence[Contender], means: Means) -> list[Contender]:
    return [each for each in contenders if each.is_edged or means.program is not None]


def _measured_ones(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Each case with each of its contenders, in the order of the first round."""
    return list(dict.fromkeys((each.case, each.contender) for each in measured))


def _threads(measured: Sequence[Measured], case: str, contender: str, *, beside: bool = False) -> str:
    """All numbers of threads that were seen."""
    wanted = (case, contender, beside)
    seen = {each.threads for each in measured if (each.case, each.contender, each.beside) == wanted}
    return "/".join(str(each) for each in sorted(each for each in seen if each is not None)) or "its own"


def _rounds(measured: Sequence[Measured], means: Means) -> str:
    unsettled = sum(not each.settled for each in measured)
    return (
        f"{means.rounds} rounds of streams of about {means.seconds:g} s; the number of threads was not steady before"
        f" {unsettled} of {len(measured)}"
    )


def _speed(rates: Mapping[int, float]) -> tuple[str, str]:
    values = rates.values()
    return f"{statistics.median(values):.1f}", f"{min(values):.1f}..{max(values):.1f}"


def _say(measured: Measured) -> None:
    beside = ", neighbour" if measured.beside else ""
    threads = "" if measured.threads is None else f" with {measured.threads} threads"
    threads += "" if measured.settled else ", not steady before"
    print(
        f"{measured.case}, round {measured.round + 1}, {measured.contender}{beside}:"
        f" {measured.tokens_per_second:.1f} tokens/s{threads}",
        flush=True,
    )


def described(means: Means) -> str:
    """What ran, as a reader of the figures needs to know it."""
    spins = " ".join(f"{key}={value}" for key, value in COMPUTE_ENVIRONMENT.items())
    theirs = f" llama-server with its own defaults, built as {means.program.parent.name};" if means.program else ""
    return (
        f"{shlex.join(['python', *sys.argv])}, {datetime.datetime.now(datetime.UTC).date()},"
        f" {len(means.machine.cores)}-core {platform.machine()}, Linux {platform.release()},"
        f" cgroup v{groups.version()}, {means.setup.model.name}.{theirs} edged's worker with {spins}."
    )


async def run(chosen: Sequence[str], given: argparse.Namespace, models: Path) -> list[Report]:
    """The chosen parts, each printed when it is done; the model file is put into ``models`` where none is given."""
    task = asyncio.current_task()
    assert task is not None
    # So that no server and no group outlives this; timeout(1) sends it twice, and the second must not cut that short.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: task.cancelling() or task.cancel())
    model = given.path or Catalog(models, MODELS_CACHE).pull(load(None, {}).chat.model)
    means = Means(
        percents=given.quotas,
        program=None if given.alone else given.llama_server or llama_server.ensure(),
        setup=Setup(model=model, threads=0, context_tokens=SETUP_TOKENS, sequences=SETUP_SEQUENCES),
        machine=detect.machine(),
        seconds=given.seconds or (0.5 if given.quick else 1.5),
        rounds=1,
    )
    print(described(means), flush=True)
    measure = {"quota": (quota_part, 5), "neighbour": (neighbour_part, 3)}
    reports = []
    for part in chosen:
        measure_part, rounds = measure[part]
        rounds = given.rounds or (1 if given.quick else rounds)
        report = await measure_part(msgspec.structs.replace(means, rounds=rounds))
        reports.append(report)
        print("\n".join((f"\n{part}\n", report.table, "", *report.remarks, *map(str, report.goals), "")), flush=True)
    return reports


def as_percents(text: str) -> tuple[int, ...]:
    """The numbers of an option's text; raises ``ValueError``."""
    return tuple(map(int, text.split(",")))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", choices=PARTS, help="measure this part alone")
    arguments.add_argument("--quick", action="store_true", help="one round of short streams: whether it works")
    arguments.add_argument("--quotas", type=as_percents, default=PERCENTS, metavar="PERCENT,…", help="of a core")
    arguments.add_argument("--rounds", type=int, help="other than the part's own number")
    arguments.add_argument("--seconds", type=float, help="of a stream, about")
    arguments.add_argument("--path", type=Path, help="a GGUF file instead of the default chat model")
    arguments.add_argument("--llama-server", type=Path, help="a program instead of the one built and cached")
    arguments.add_argument("--alone", action="store_true", help="without llama-server, where it is not built")
    arguments.add_argument("--json", type=Path, help="write every measurement to this file")
    given = arguments.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("control groups are made by root")
    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="edged-quota-models-") as models:
        reports = asyncio.run(run([given.only] if given.only else PARTS, given, Path(models)))
    if given.json is not None:
        given.json.write_text(json.dumps(msgspec.to_builtins(reports), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
