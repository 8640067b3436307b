"""Tokens per second of the chat worker with 1, 4, 8 and 16 streams at a time, measured in interleaved rounds.

The worker is the daemon's own, in its own process, with the daemon's settings; only ``sequences`` is raised to 16.
Ratios are to one stream within the same round, so that what else the machine does falls on both.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import structlog
from quality import as_served

from edged.config import Config, load
from edged.hardware import detect, placement
from edged.models.catalog import Catalog
from edged.types import Segment
from edged.workers.protocol import Finished, Piece, WorkerSettings
from edged.workers.worker import Worker

MODELS_CACHE = Path("~/.cache/edged/models").expanduser()
STREAMS = (1, 4, 8, 16)
ROUNDS = 3
TOKENS = 128
REQUIRED_RATIO = {8: 1.8}

# Plain beginnings of texts, which the model continues: as questions, they would end after a sentence or two.
PROMPTS = tuple(
    f"Chapter {number}. {subject}\n\nIn this chapter we describe in detail"
    for number, subject in enumerate(
        (
            "The history of pumps",
            "How a compressor works",
            "The care of bearings",
            "Steam and its uses",
            "The electric motor",
            "Measuring temperature",
            "The weather at sea",
            "A day in the mill",
            "The first railways",
            "Bread and its making",
            "The life of bees",
            "Rivers and their bridges",
            "The art of the clockmaker",
            "How glass is made",
            "The garden in spring",
            "Ships of the north",
        ),
        start=1,
    )
)


class Stream(msgspec.Struct, frozen=True):
    """What one stream gave. Seconds from its request to its first text."""

    tokens: int
    first_token_seconds: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams in one round."""

    streams: int
    round: int
    tokens: int
    seconds: float
    first_token_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The median of the rounds. ``first_token_ms`` is the median of all streams of all rounds."""

    streams: int
    tokens_per_second: float
    slowest_round: float
    fastest_round: float
    ratio: float
    first_token_ms: float


def chat_settings(config: Config, model: Path) -> WorkerSettings:
    """As :mod:`edged.daemon` builds them."""
    threads = placement.place(
        detect.machine(), placement.Wishes(chat_threads=config.chat.threads, embed_threads=config.embed.threads)
    )
    return WorkerSettings(
        kind="chat",
        model=str(model),
        threads=threads.chat_threads,
        context_tokens=config.chat.context_tokens,
        sequences=config.chat.sequences,
        batch_tokens=config.chat.batch_tokens,
        queue_limit=config.chat.queue_limit,
    )


@contextlib.asynccontextmanager
async def chat_worker(path: Path | None = None) -> AsyncGenerator[Worker, None]:
    """A started worker over a model file, the default chat model without one; its home is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="edged-throughput-") as home:
        config = load(None, {}, {"home": home, "chat.sequences": max(STREAMS)})
        config.run_dir.mkdir(parents=True, exist_ok=True)
        file = path or as_served(config, Catalog(config.models_dir, MODELS_CACHE), config.chat.model)
        settings = chat_settings(config, file)
        worker = Worker(settings, config.run_dir / "chat.sock", on_state=lambda _state, _why: None)
        worker.start()
        try:
            await worker.settled()
            yield worker
        finally:
            await worker.stop()


async def stream(worker: Worker, prompt: str) -> Stream:
    """One greedy continuation to its last token."""
    started = time.monotonic()
    first = tokens = None
    async with contextlib.aclosing(worker.generate([Segment(prompt)], max_tokens=TOKENS)) as items:
        async for item in items:
            match item:
                case Piece() if first is None:
                    first = time.monotonic()
                case Finished():
                    tokens = item.completion_tokens
    if first is None or tokens != TOKENS:
        raise SystemExit(f"a stream ended after {tokens} of {TOKENS} tokens: {prompt!r}")
    return Stream(tokens, first - started)


async def measure(worker: Worker, streams: int, round_number: int) -> Measured:
    """All streams begun at once, to the end of the last."""
    started = time.monotonic()
    done = await asyncio.gather(*(stream(worker, prompt) for prompt in PROMPTS[:streams]))
    return Measured(
        streams=streams,
        round=round_number,
        tokens=sum(each.tokens for each in done),
        seconds=time.monotonic() - started,
        first_token_seconds=tuple(each.first_token_seconds for each in done),
    )


async def run(path: Path | None) -> list[Measured]:
    """Every number of streams in every round, after one unmeasured stream that touches the model's pages."""
    async with chat_worker(path) as worker:
        await stream(worker, PROMPTS[0])
        measured = []
        for number in range(ROUNDS):
            for streams in STREAMS:
                measured.append(await measure(worker, streams, number))
                print(
                    f"round {number + 1}, {streams} streams: {measured[-1].tokens_per_second:.1f} tokens/s", flush=True
                )
        return measured


def row(measured: list[Measured], streams: int) -> Row:
    """What the rounds of one number of streams come to."""
    own = [each for each in measured if each.streams == streams]
    one = {each.round: each.tokens_per_second for each in measured if each.streams == 1}
    speeds = [each.tokens_per_second for each in own]
    return Row(
        streams=streams,
        tokens_per_second=round(statistics.median(speeds), 1),
        slowest_round=round(min(speeds), 1),
        fastest_round=round(max(speeds), 1),
        ratio=round(statistics.median(each.tokens_per_second / one[each.round] for each in own), 2),
        first_token_ms=round(1e3 * statistics.median([s for each in own for s in each.first_token_seconds]), 1),
    )


def table(rows: list[Row]) -> str:
    """Plain text with aligned columns."""
    lines = [f"{'streams':>8} {'tokens/s':>9} {'min..max':>15} {'ratio':>6} {'first token p50, ms':>20}"]
    for each in rows:
        span = f"{each.slowest_round:.1f}..{each.fastest_round:.1f}"
        lines.append(
            f"{each.streams:>8} {each.tokens_per_second:>9.1f} {span:>15} {each.ratio:>6.2f}"
            f" {each.first_token_ms:>20.1f}"
        )
    return "\n".join(lines)


def requirements(rows: list[Row]) -> list[str]:
    """What must hold, and whether it does."""
    ratios = {each.streams: each.ratio for each in rows}
    return [
        f"{streams} streams at least {least} times one: {'yes' if ratios[streams] >= least else 'NO'}"
        f" ({ratios[streams]:.2f})"
        for streams, least in REQUIRED_RATIO.items()
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--path", type=Path, help="a GGUF file to measure instead of the default chat model")
    arguments.add_argument("--json", type=Path, help="write every measurement to this file")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    measured = asyncio.run(run(given.path))
    rows = [row(measured, streams) for streams in STREAMS]
    print(table(rows))
    print("\n".join(requirements(rows)))
    if given.json is not None:
        body = {"rows": msgspec.to_builtins(rows), "rounds": msgspec.to_builtins(measured)}
        given.json.write_text(json.dumps(body, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
