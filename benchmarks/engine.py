"""edged beside llama-server: same model file, threads, KV cells and prompts, greedy, over HTTP, in interleaved rounds.

Both are started and take turns, so that only one computes at a time and what else the machine does falls on both.
llama-server is built once from the llama.cpp inside the pinned llama-cpp-python sdist.

streams   1, 8 and 16 streams at once: tokens per second in all, time to the first token
rag       XQuAD questions with our prompt on both, and with the three whole paragraphs on llama-server
gap       a prompt of 1,500 tokens arrives among four decoding streams: the longest pause between two of their tokens
quality   edged alone: paired XQuAD questions, eight at a time, with and without reuse of prefixes

edged answers as it is installed: with an eight-bit copy of the file where the device is faster with one. With
--no-widen both have the very same weights, and with --path where that file has eight bits already.

    python benchmarks/engine.py [--only PART]… [--path GGUF] [--no-widen] [--llama-server PROGRAM] [--json FILE]
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import llama_server
import msgspec
import servers
import structlog
from quality import MANUALS, MODELS_CACHE, Asked, every_kth, holds_answer, parts, table, xquad
from servers import Reply, Server, Setup, in_turn, numbered
from throughput import PROMPTS

from edged.config import load
from edged.hardware import detect, placement
from edged.models.catalog import Catalog
from edged.rag import prompt
from edged.rag.answer import select_facts
from edged.rag.cite import citation
from edged.rag.retrieve import Retrieval
from edged.workers.process import COMPUTE_ENVIRONMENT

PARTS = ("streams", "rag", "gap", "quality")
OURS, THEIRS = "edged", "llama-server"
OURS_APART = "edged, KV apart"
THEIRS_APART, THEIRS_WHOLE = "llama-server, KV apart", "llama-server, whole paragraphs"
WITH_REUSE, WITHOUT_REUSE = "edged, prefix reuse", "edged, no prefix reuse"

STREAMS = (1, 8, 16)
STREAM_TOKENS = 128
LEAST_SPEED = {1: 0.97, 8: 1.0, 16: 1.0}
FIRST_TOKEN_STREAMS = 8
MOST_FIRST_TOKEN = 1.0
MOST_FIRST_TOKEN_AGAINST_WHOLE = 0.25

GAP_STREAMS = 4
GAP_STREAM_TOKENS = 320
GAP_BEFORE_TOKENS = 16
LONG_PROMPT_TOKENS = 1500
LONG_PROMPT_ANSWER_TOKENS = 4
MOST_GAP_MS = 150.0

QUALITY_BATCH = 8
LEAST_PAIRED = 300
SIGNIFICANT = 0.05


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What must hold, and whether this run shows it."""

    text: str
    holds: bool
    found: str

    def __str__(self) -> str:
        return f"{self.text}: {'yes' if self.holds else 'NO'} ({self.found})"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One part: its table in Markdown, remarks and goals below it, and every measurement."""

    part: str
    table: str
    remarks: tuple[str, ...]
    goals: tuple[Goal, ...]
    measured: object


# --- streams ---------------------------------------------------------------------------------------


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """So many streams, begun at once, on one server. ``client_cores`` is what this client itself used."""

    server: str
    streams: int
    round: int
    tokens: int
    seconds: float
    first_token_seconds: tuple[float, ...]
    ended_early: int
    prompt_tokens: tuple[int, ...]
    client_cores: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


async def streams_part(program: Path, setup: Setup, given: argparse.Namespace) -> Report:
    """Tokens per second and first tokens, against llama-server with its KV cells shared and parted."""
    async with contextlib.AsyncExitStack() as stack:
        contenders = [
            await stack.enter_async_context(servers.edged(setup, name=OURS)),
            await stack.enter_async_context(servers.llama_server(program, setup, name=THEIRS)),
            await stack.enter_async_context(
                servers.edged(setup, name=OURS_APART, settings={"EDGED_CHAT__KV": "apart"})
            ),
            await stack.enter_async_context(servers.llama_server(program, setup, name=THEIRS_APART, unified=False)),
        ]
        rounds = [each async for each in _rounds(contenders, given.rounds)]
    rows = [
        _streams_row(rounds, streams, name) for streams in STREAMS for name in (OURS, THEIRS, OURS_APART, THEIRS_APART)
    ]
    header = (
        "streams", "server", "tokens/s", "min..max", "edged to it", "first token p50 ms", "p99 ms", "client's cores",
    )  # fmt: skip
    remarks = (
        f"{given.rounds} rounds, {STREAM_TOKENS} tokens a stream; ended early: "
        + ", ".join(f"{name} {sum(r.ended_early for r in rounds if r.server == name)}" for name in (OURS, THEIRS)),
        _same_prompts({name: [r.prompt_tokens for r in rounds if r.server == name] for name in (OURS, THEIRS)}),
    )
    return Report(
        part="streams",
        table=table(header, rows),
        remarks=remarks,
        goals=tuple(_streams_goals(rounds)),
        measured=rounds,
    )


async def _rounds(contenders: Sequence[Server], rounds: int) -> AsyncIterator[Round]:
    serial = itertools.count(1)
    for number, streams in itertools.product(range(rounds), STREAMS):
        prompts = numbered(serial, PROMPTS[:streams])
        for server in in_turn(contenders, number):
            yield (measured := await _round(server, prompts, number))
            _say(f"round {number + 1}, {streams} streams, {server.name}: {measured.tokens_per_second:.1f} tokens/s")


async def _round(server: Server, prompts: Sequence[str], number: int) -> Round:
    cpu_before, started = time.process_time(), time.monotonic()
    replies = await asyncio.gather(*(servers.complete(server, each, STREAM_TOKENS) for each in prompts))
    cpu = time.process_time() - cpu_before
    seconds = max(each.ended for each in replies) - started
    return Round(
        server=server.name,
        streams=len(prompts),
        round=number,
        tokens=sum(each.completion_tokens for each in replies),
        seconds=seconds,
        first_token_seconds=tuple(each.first_seconds for each in replies),
        ended_early=sum(each.completion_tokens < STREAM_TOKENS for each in replies),
        prompt_tokens=tuple(each.prompt_tokens for each in replies),
        client_cores=cpu / seconds,
    )


def _streams_row(rounds: Sequence[Round], streams: int, name: str) -> tuple[object, ...]:
    own = [each for each in rounds if (each.streams, each.server) == (streams, name)]
    speeds = [each.tokens_per_second for each in own]
    first = _first_tokens(rounds, streams, name)
    return (
        streams,
        name,
        f"{statistics.median(speeds):.1f}",
        f"{min(speeds):.1f}..{max(speeds):.1f}",
        "" if name in (OURS, OURS_APART) else f"{_speed_ratio(rounds, streams, name):.3f}",
        f"{1e3 * _quantile(first, 50):.0f}",
        f"{1e3 * _quantile(first, 99):.0f}",
        f"{statistics.median(each.client_cores for each in own):.3f}",
    )


def _streams_goals(rounds: Sequence[Round]) -> Iterator[Goal]:
    for streams, least in LEAST_SPEED.items():
        ratio = _speed_ratio(rounds, streams, THEIRS)
        apart = _speed_ratio(rounds, streams, THEIRS_APART)
        yield Goal(
            text=f"{streams} streams at least {least:g} times llama-server's tokens/s",
            holds=ratio >= least,
            found=f"{ratio:.3f}; both with KV apart {apart:.3f}",
        )
    ours, theirs = (_first_tokens(rounds, FIRST_TOKEN_STREAMS, name) for name in (OURS, THEIRS))
    for percent in (50, 99):
        ratio = _quantile(ours, percent) / _quantile(theirs, percent)
        yield Goal(
            text=f"first token p{percent} at {FIRST_TOKEN_STREAMS} streams at most {MOST_FIRST_TOKEN:g} times",
            holds=ratio <= MOST_FIRST_TOKEN,
            found=f"{ratio:.3f} over {len(ours)} streams each",
        )


def _speed_ratio(rounds: Sequence[Round], streams: int, name: str) -> float:
    """Ours to another's with its KV cells held alike, the median of the ratios within each round."""
    ours = OURS_APART if name == THEIRS_APART else OURS
    speed = {(each.server, each.round): each.tokens_per_second for each in rounds if each.streams == streams}
    return statistics.median(value / speed[name, number] for (server, number), value in speed.items() if server == ours)


def _first_tokens(rounds: Sequence[Round], streams: int, name: str) -> list[float]:
    own = [each for each in rounds if (each.streams, each.server) == (streams, name)]
    return [seconds for each in own for seconds in each.first_token_seconds]


# --- questions -------------------------------------------------------------------------------------


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A question with its prompts as chat messages: the sentences that edged selects, and the passages whole."""

    asked: Asked
    selected: tuple[tuple[str, str], ...]
    whole: tuple[tuple[str, str], ...]


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One question to one server."""

    server: str
    question: str
    text: str
    right: bool
    first_token_seconds: float
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


async def prepare(count: int) -> list[Prepared]:
    """Retrieve and select for so many questions of XQuAD, the first one over and above: it is for warming up.

    The embedder's worker is gone afterwards. The data is not part of the repository.
    """
    questions = xquad()
    if questions is None:
        raise SystemExit("XQuAD is not there (../shared/data)")
    async with parts(with_chat=False) as started:
        await started.fill(questions)
        prepared = []
        for asked in [questions.asked[-1], *every_kth(questions.asked, count)]:
            rag = started.config.rag
            retrieval = await started.retriever.retrieve(asked.question, questions.collection, rag.passages)
            shown = select_facts(asked.question, retrieval, rag.budget_tokens)
            prepared.append(
                Prepared(
                    asked=asked,
                    selected=tuple(prompt.messages(asked.question, shown)),
                    whole=tuple(_whole(asked.question, retrieval)),
                )
            )
    return prepared


def _whole(question: str, retrieval: Retrieval) -> list[tuple[str, str]]:
    """The same prompt over the passages as they are."""
    passages = [each.passage for each in retrieval.passages]
    paragraphs = [
        msgspec.structs.replace(citation(passage, 0), text=" ".join(each.text for each in passage.sentences))
        for passage in passages
    ]
    return prompt.messages(question, paragraphs)


async def _ask(server: Server, asked: Asked, messages: servers.Messages, max_tokens: int) -> Answered:
    reply = await servers.chat(server, messages, max_tokens)
    return Answered(
        server=server.name,
        question=asked.question,
        text=reply.text,
        right=holds_answer(reply.text, asked.answers),
        first_token_seconds=reply.first_seconds,
        seconds=reply.ended - reply.asked,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        cached_tokens=reply.cached_tokens,
    )


# --- rag -------------------------------------------------------------------------------------------


async def rag_part(program: Path, setup: Setup, given: argparse.Namespace) -> Report:
    """First tokens and right answers of questions asked one after the other.

    The whole paragraphs go to a llama-server of their own: what it keeps of a prompt would help it with the selected
    sentences of the same question.
    """
    warm_up, *questions = await prepare(given.questions)
    max_tokens = load(None, {}).rag.max_tokens
    async with contextlib.AsyncExitStack() as stack:
        contenders = [
            await stack.enter_async_context(servers.edged(setup, name=OURS)),
            await stack.enter_async_context(servers.llama_server(program, setup, name=THEIRS)),
            await stack.enter_async_context(servers.llama_server(program, setup, name=THEIRS_WHOLE)),
        ]
        answered: list[Answered] = []
        for number, each in enumerate([warm_up, *questions]):
            for server in in_turn(contenders, number):
                messages = each.whole if server.name == THEIRS_WHOLE else each.selected
                answered.append(await _ask(server, each.asked, messages, max_tokens))
            _say(f"question {number} of {len(questions)}")
    by_server = _by_server(answered[len(contenders) :], [each.name for each in contenders])
    prompts = {name: [each.prompt_tokens for each in by_server[name]] for name in (OURS, THEIRS)}
    return Report(
        part="rag",
        table=_answers_table(by_server),
        remarks=(_same_prompts(prompts),),
        goals=tuple(_rag_goals(by_server)),
        measured=answered,
    )


def _rag_goals(by_server: Mapping[str, Sequence[Answered]]) -> Iterator[Goal]:
    first = {name: _quantile([each.first_token_seconds for each in own], 50) for name, own in by_server.items()}
    right = {name: sum(each.right for each in own) for name, own in by_server.items()}
    yield Goal(
        text=f"first token p50 with our prompt on both at most {MOST_FIRST_TOKEN:g} times",
        holds=first[OURS] <= MOST_FIRST_TOKEN * first[THEIRS],
        found=f"{first[OURS] / first[THEIRS]:.3f}",
    )
    ratio = first[OURS] / first[THEIRS_WHOLE]
    yield Goal(
        text=f"first token p50 against whole paragraphs at most {MOST_FIRST_TOKEN_AGAINST_WHOLE:g} times",
        holds=ratio <= MOST_FIRST_TOKEN_AGAINST_WHOLE,
        found=f"{ratio:.3f}",
    )
    yield Goal(
        text="at least as many right answers as with whole paragraphs",
        holds=right[OURS] >= right[THEIRS_WHOLE],
        found=f"{right[OURS]} against {right[THEIRS_WHOLE]}",
    )


def _by_server(answered: Sequence[Answered], names: Sequence[str]) -> dict[str, list[Answered]]:
    return {name: [each for each in answered if each.server == name] for name in names}


def _answers_table(by_server: Mapping[str, Sequence[Answered]]) -> str:
    header = (
        "server", "questions", "right", "first token p50 ms", "p90 ms", "whole answer p50 ms", "prompt tokens p50",
        "of them reused",
    )  # fmt: skip
    return table(header, [(name, *_answers_row(own)) for name, own in by_server.items()])


def _answers_row(own: Sequence[Answered]) -> tuple[object, ...]:
    first = [each.first_token_seconds for each in own]
    return (
        len(own),
        sum(each.right for each in own),
        f"{1e3 * _quantile(first, 50):.0f}",
        f"{1e3 * _quantile(first, 90):.0f}",
        f"{1e3 * _quantile([each.seconds for each in own], 50):.0f}",
        f"{_quantile([each.prompt_tokens for each in own], 50):.0f}",
        f"{_quantile([each.cached_tokens for each in own], 50):.0f}",
    )


# --- gap -------------------------------------------------------------------------------------------


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """One long prompt among decoding streams. Pauses between two arrivals of one stream, milliseconds.

    ``before_ms`` is the longest while they decode alone, ``longest_ms`` the longest that touches the time from the long
    prompt's request to its first token. ``outlasted``: no stream ended before that.
    """

    server: str
    repetition: int
    before_ms: float
    longest_ms: float
    usual_ms: float
    tokens_beside: int
    long_first_token_seconds: float
    long_prompt_tokens: int
    outlasted: bool


async def gap_part(program: Path, setup: Setup, given: argparse.Namespace) -> Report:
    """The longest pause that a long prompt causes."""
    async with (
        servers.edged(setup, name=OURS) as ours,
        servers.llama_server(program, setup, name=THEIRS) as theirs,
    ):
        text = " ".join(path.read_text(encoding="utf-8") for path in sorted(MANUALS.glob("*.md")))
        long_text = await servers.cut_to_tokens(theirs, text, LONG_PROMPT_TOKENS)
        measured = []
        serial = itertools.count(1)
        for number in range(given.repetitions):
            *prompts, long_prompt = numbered(serial, [*PROMPTS[:GAP_STREAMS], long_text])
            for server in in_turn([ours, theirs], number):
                measured.append(await _gap(server, prompts, long_prompt, number))
                _say(f"repetition {number + 1}, {server.name}: longest gap {measured[-1].longest_ms:.0f} ms")
    longest = {name: max(each.longest_ms for each in measured if each.server == name) for name in (OURS, THEIRS)}
    goal = Goal(
        text=f"longest gap of a decoding stream at most {MOST_GAP_MS:g} ms",
        holds=longest[OURS] <= MOST_GAP_MS,
        found=f"{longest[OURS]:.0f}; llama-server's {longest[THEIRS]:.0f}",
    )
    header = (
        "server", "repetitions", "longest gap ms", "median of the longest", "p50 gap beside it", "longest before it",
        "tokens of the streams meanwhile", "long prompt's first token s",
    )  # fmt: skip
    outlasted = sum(each.outlasted for each in measured)
    prompt_tokens = sorted({each.long_prompt_tokens for each in measured})
    return Report(
        part="gap",
        table=table(header, [_gap_row(measured, name) for name in (OURS, THEIRS)]),
        remarks=(
            f"{GAP_STREAMS} streams, a prompt of {prompt_tokens[0]}..{prompt_tokens[-1]} tokens;"
            f" all streams outlasted it in {outlasted} of {len(measured)}",
        ),
        goals=(goal,),
        measured=measured,
    )


async def _gap(server: Server, prompts: Sequence[str], long_prompt: str, repetition: int) -> Gap:
    decoding = asyncio.Event()
    chunks = [0] * len(prompts)

    def counted(stream: int) -> None:
        chunks[stream] += 1
        if min(chunks) >= GAP_BEFORE_TOKENS:
            decoding.set()

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                servers.complete(server, each, GAP_STREAM_TOKENS, on_chunk=functools.partial(counted, stream))
            )
            for stream, each in enumerate(prompts)
        ]
        await asyncio.wait_for(decoding.wait(), servers.PATIENCE_SECONDS)
        long = await servers.complete(server, long_prompt, LONG_PROMPT_ANSWER_TOKENS)
    return _gap_of(server, [task.result() for task in tasks], long, repetition)


def _gap_of(server: Server, streams: Sequence[Reply], long: Reply, repetition: int) -> Gap:
    asked, first = long.asked, long.asked + long.first_seconds
    pauses = [pair for each in streams for pair in itertools.pairwise(moment for moment, _ in each.pieces)]
    beside = [later - earlier for earlier, later in pauses if later > asked and earlier < first]
    began = max(each.pieces[0][0] for each in streams)
    before = [later - earlier for earlier, later in pauses if earlier >= began and later <= asked]
    return Gap(
        server=server.name,
        repetition=repetition,
        before_ms=1e3 * max(before),
        longest_ms=1e3 * max(beside),
        usual_ms=1e3 * statistics.median(beside),
        tokens_beside=sum(asked < moment <= first for each in streams for moment, _ in each.pieces),
        long_first_token_seconds=long.first_seconds,
        long_prompt_tokens=long.prompt_tokens,
        outlasted=all(each.pieces[-1][0] > first for each in streams),
    )


def _gap_row(measured: Sequence[Gap], name: str) -> tuple[object, ...]:
    own = [each for each in measured if each.server == name]
    return (
        name,
        len(own),
        f"{max(each.longest_ms for each in own):.0f}",
        f"{statistics.median(each.longest_ms for each in own):.0f}",
        f"{statistics.median(each.usual_ms for each in own):.0f}",
        f"{max(each.before_ms for each in own):.0f}",
        f"{statistics.median(each.tokens_beside for each in own):.0f}",
        f"{statistics.median(each.long_first_token_seconds for each in own):.2f}",
    )


# --- quality ---------------------------------------------------------------------------------------


async def quality_part(_program: Path, setup: Setup, given: argparse.Namespace) -> Report:
    """The same questions, eight at a time, to a daemon that reuses prefixes and to one that does not."""
    warm_up, *questions = await prepare(given.paired)
    max_tokens = load(None, {}).rag.max_tokens
    off = {"EDGED_CHAT__PREFIX_CACHE_BYTES": "0"}
    answered: list[Answered] = []
    async with (
        servers.edged(setup, name=WITH_REUSE) as reusing,
        servers.edged(setup, name=WITHOUT_REUSE, settings=off) as plain,
    ):
        for server in (reusing, plain):
            await _ask(server, warm_up.asked, warm_up.selected, max_tokens)
        for start in range(0, len(questions), QUALITY_BATCH):
            batch = questions[start : start + QUALITY_BATCH]
            for server in in_turn([reusing, plain], start // QUALITY_BATCH):
                answered += await asyncio.gather(
                    *(_ask(server, each.asked, each.selected, max_tokens) for each in batch)
                )
            _say(f"question {start + len(batch)} of {len(questions)}")
    return _quality_report(answered)


def _quality_report(answered: Sequence[Answered]) -> Report:
    by_server = _by_server(answered, (WITH_REUSE, WITHOUT_REUSE))
    pairs = list(zip(by_server[WITH_REUSE], by_server[WITHOUT_REUSE], strict=True))
    gained = sum(reusing.right and not plain.right for reusing, plain in pairs)
    lost = sum(plain.right and not reusing.right for reusing, plain in pairs)
    chance = mcnemar(gained, lost)
    same = sum(reusing.text == plain.text for reusing, plain in pairs)
    goal = Goal(
        text=f"prefix reuse under batching costs no right answers, on at least {LEAST_PAIRED} questions",
        holds=len(pairs) >= LEAST_PAIRED and (gained >= lost or chance >= SIGNIFICANT),
        found=f"{gained} right only with it, {lost} only without, of {len(pairs)}; p = {chance:.2f}",
    )
    return Report(
        part="quality",
        table=_answers_table(by_server),
        remarks=(f"{same} of {len(pairs)} answers are the same to the letter",),
        goals=(goal,),
        measured=answered,
    )


def mcnemar(gained: int, lost: int) -> float:
    """How likely chance alone parts the discordant pairs as unevenly (exact, two-sided)."""
    pairs = gained + lost
    tail = sum(math.comb(pairs, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << pairs))


# --- all -------------------------------------------------------------------------------------------


def _quantile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    cuts: list[float] = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[percent - 1]


def _same_prompts(tokens: Mapping[str, Sequence[object]]) -> str:
    ours, theirs = tokens[OURS], tokens[THEIRS]
    same = sum(one == other for one, other in zip(sorted(map(repr, ours)), sorted(map(repr, theirs)), strict=True))
    return f"both counted the same prompt tokens in {same} of {len(ours)}"


def _say(line: str) -> None:
    print(line, flush=True)


def described(program: Path, setup: Setup) -> str:
    """What ran, as a reader of the figures needs to know it."""
    command = servers.llama_server_command(Path("llama-server"), setup, unified=True)
    command[command.index("-m") + 1] = setup.model.name
    spins = " ".join(f"{key}={value}" for key, value in COMPUTE_ENVIRONMENT.items())
    copy = "with an eight-bit copy of the file where that is faster" if setup.widen else "with the file itself"
    return (
        f"{platform.machine()}, {setup.threads} threads, {setup.model.name}. {' '.join(command)}, libgomp's defaults;"
        f" built as {program.parent.name}. edged: chat.sequences {setup.sequences}, chat.context_tokens"
        f" {setup.context_tokens}, its worker {copy} and {spins}. Greedy; what both reuse of prompts is left on."
    )


async def run(chosen: Sequence[str], given: argparse.Namespace, models: Path) -> list[Report]:
    """The chosen parts, each printed when it is done; the model file is put into ``models`` where none is given."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # so that no server outlives this
    program: Path = given.llama_server or llama_server.ensure()
    setup = Setup(
        model=given.path or Catalog(models, MODELS_CACHE).pull(load(None, {}).chat.model),
        threads=placement.place(detect.machine(), placement.Wishes(chat_threads=given.threads)).chat_threads,
        widen=not given.no_widen,
    )
    _say(described(program, setup))
    measure = {"streams": streams_part, "rag": rag_part, "gap": gap_part, "quality": quality_part}
    reports = []
    for part in chosen:
        report = await measure[part](program, setup, given)
        reports.append(report)
        _say("\n".join((f"\n{report.part}\n", report.table, "", *report.remarks, *map(str, report.goals), "")))
    return reports


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be repeated")
    arguments.add_argument("--path", type=Path, help="a GGUF file instead of the default chat model")
    arguments.add_argument("--llama-server", type=Path, help="a program instead of the one built and cached")
    arguments.add_argument("--no-widen", action="store_true", help="edged computes with the very file, without a copy")
    arguments.add_argument("--threads", type=int, default=0, help="compute threads of both; 0 as the daemon places")
    arguments.add_argument("--rounds", type=int, default=8, help="rounds of the streams")
    arguments.add_argument("--questions", type=int, default=60, help="questions of XQuAD for rag")
    arguments.add_argument("--repetitions", type=int, default=5, help="long prompts of gap, each server")
    arguments.add_argument("--paired", type=int, default=320, help="questions of XQuAD for quality")
    arguments.add_argument("--json", type=Path, help="write every measurement to this file")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="edged-engine-models-") as models:
        reports = asyncio.run(run(given.only or PARTS, given, Path(models)))
    if given.json is not None:
        given.json.write_text(json.dumps(msgspec.to_builtins(reports), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
