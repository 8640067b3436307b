"""Are answers from selected sentences better and sooner than answers from whole passages?

A is the product: the sentences of three passages to a budget of tokens. B gives the model the three passages whole,
with the same instruction, model and check. Both answer in turn, question by question, in one run; the questions about
the manuals are answered by A alone:

    python benchmarks/answers.py [--questions N] [--offset N] [--json FILE]

Right: the answer holds a gold answer, compared as the SQuAD evaluation script does. Wrong but confident: it holds
none although it was presented as the model's answer, not as passages. With --questions 100, offset 0 asks the questions
that are reported, offset 1 those the prompt and the check were fitted on.
"""

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog
from quality import XQUAD, Asked, Parts, QuestionSet, every_kth, holds_answer, manuals, parts, table, xquad

from edged.rag import prompt
from edged.rag.answer import PASSAGE_TOKENS, Answerer, Settings, select_citations, select_facts, similarities
from edged.rag.cite import as_text, check, citation
from edged.rag.retrieve import Retrieval
from edged.serving.pool import ChatPool
from edged.types import Answer, Citation, Delta, Question, Restarted
from edged.workers.protocol import Finished, Piece

CONFIDENT = ("generated", "reduced")
PROGRESS_EVERY = 10
SELECTED, WHOLE = "A selected sentences", "B whole passages"
HEADER = (
    "collection", "method", "questions", "prompt holds it", "model right", "answer right", "wrong, confident",
    "passages instead", "first token s, p50", "p90", "total s, p50", "prompt tokens",
)  # fmt: skip


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one question by one method. Times in seconds."""

    collection: str
    method: str
    question: str
    generated: str
    final: str
    step: str
    note: str
    prompt_holds_answer: bool
    generated_is_right: bool
    final_is_right: bool
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """An answer before it is judged. ``shown`` is the text that the model was given."""

    generated: str
    final: str
    step: str
    note: str
    shown: str
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int


def settings(parts: Parts) -> Settings:
    """As the daemon sets them."""
    rag = parts.config.rag
    return Settings(passages=rag.passages, budget_tokens=rag.budget_tokens, max_tokens=rag.max_tokens)


async def selected(parts: Parts, question: str, collection: str) -> Attempt:
    """A: the product as it is."""
    answer: Answer | None = None
    generated = ""
    answerer = Answerer(parts.retriever, ChatPool(parts.chat), settings(parts))
    async for event in answerer.stream(Question(text=question, collection=collection)):
        match event:
            case Delta(text=text):
                generated += text
            case Restarted():
                pass  # what was said before is what the model said
            case Answer():
                answer = event
    assert answer is not None
    first_token_ms = answer.timings.first_token_ms
    retrieval = await parts.retriever.retrieve(question, collection, parts.config.rag.passages)
    shown = select_facts(question, retrieval, parts.config.rag.budget_tokens)
    return Attempt(
        generated=generated,
        final=answer.text,
        step=answer.step,
        note=answer.note,
        shown=prompt.messages(question, shown)[-1][1],
        first_token_seconds=(answer.timings.total_ms if first_token_ms is None else first_token_ms) / 1e3,
        total_seconds=answer.timings.total_ms / 1e3,
        prompt_tokens=answer.prompt_tokens,
    )


async def whole(parts: Parts, question: str, collection: str) -> Attempt:
    """B: the three passages as they are."""
    assert parts.chat is not None
    started = time.monotonic()
    retrieval = await parts.retriever.retrieve(question, collection, parts.config.rag.passages)
    sentences, paragraphs = _citations(retrieval)
    messages = prompt.messages(question, paragraphs)
    generated, first_token, last = "", 0.0, None
    rendered = parts.chat.render(messages)
    async for item in parts.chat.generate(rendered, max_tokens=parts.config.rag.max_tokens, deadline_seconds=None):
        match item:
            case Piece(text=text):
                first_token = first_token or time.monotonic()
                generated += text
            case Finished():
                last = item
    verdict = check(question, generated.strip(), sentences, similarities=similarities(retrieval))
    best = as_text(select_citations(question, retrieval, PASSAGE_TOKENS))
    ended = time.monotonic()
    assert last is not None
    return Attempt(
        generated=generated,
        final=best if verdict.objection else generated,
        step="unverified" if verdict.objection else "generated",
        note=verdict.objection,
        shown=messages[-1][1],
        first_token_seconds=(first_token or ended) - started,
        total_seconds=ended - started,
        prompt_tokens=last.prompt_tokens,
    )


def _citations(retrieval: Retrieval) -> tuple[list[Citation], list[Citation]]:
    """All sentences, and each passage as if it were one."""
    sentences, paragraphs = [], []
    for stored in retrieval.passages:
        passage = stored.passage
        own = [citation(passage, index) for index in range(len(passage.sentences))]
        sentences += own
        paragraphs.append(msgspec.structs.replace(own[0], text=" ".join(each.text for each in own)))
    return sentences, paragraphs


async def measure(parts: Parts, questions: QuestionSet, asked: Sequence[Asked]) -> list[Outcome]:
    """Every question by each method of its collection, in turns; which goes first alternates."""
    methods = [(SELECTED, selected), (WHOLE, whole)] if questions.collection == XQUAD else [(SELECTED, selected)]
    await selected(parts, asked[0].question, questions.collection)  # the first answer touches the model's pages
    outcomes = []
    started = time.monotonic()
    for number, each in enumerate(asked, start=1):
        for name, method in methods:
            attempt = await method(parts, each.question, questions.collection)
            outcomes.append(_judged(questions.collection, name, each, attempt))
        methods.reverse()
        if number % PROGRESS_EVERY == 0 or number == len(asked):
            seconds = time.monotonic() - started
            print(f"{questions.collection}: {number}/{len(asked)} questions, {seconds:.0f} s", file=sys.stderr)
    return outcomes


def _judged(collection: str, method: str, asked: Asked, attempt: Attempt) -> Outcome:
    return Outcome(
        collection=collection,
        method=method,
        question=asked.question,
        generated=attempt.generated,
        final=attempt.final,
        step=attempt.step,
        note=attempt.note,
        prompt_holds_answer=holds_answer(attempt.shown, asked.answers),
        generated_is_right=holds_answer(attempt.generated, asked.answers),
        final_is_right=holds_answer(attempt.final, asked.answers),
        first_token_seconds=attempt.first_token_seconds,
        total_seconds=attempt.total_seconds,
        prompt_tokens=attempt.prompt_tokens,
    )


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table: shares of all questions, seconds, tokens."""

    collection: str
    method: str
    questions: int
    prompt_holds_answer: float
    generated_right: float
    final_right: float
    confident_wrong: float
    instead: float
    first_token_p50: float
    first_token_p90: float
    total_p50: float
    prompt_tokens_p50: int


def summary(outcomes: Sequence[Outcome], collection: str, method: str) -> Summary:
    """What the outcomes of one collection by one method come to."""
    own = [each for each in outcomes if (each.collection, each.method) == (collection, method)]
    confident = [each for each in own if each.step in CONFIDENT]
    return Summary(
        collection=collection,
        method=method,
        questions=len(own),
        prompt_holds_answer=sum(each.prompt_holds_answer for each in own) / len(own),
        generated_right=sum(each.generated_is_right for each in own) / len(own),
        final_right=sum(each.final_is_right for each in own) / len(own),
        confident_wrong=sum(not each.final_is_right for each in confident) / len(own),
        instead=1.0 - len(confident) / len(own),
        first_token_p50=_quantile([each.first_token_seconds for each in own], 0.5),
        first_token_p90=_quantile([each.first_token_seconds for each in own], 0.9),
        total_p50=_quantile([each.total_seconds for each in own], 0.5),
        prompt_tokens_p50=int(_quantile([each.prompt_tokens for each in own], 0.5)),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def requirements(ours: Summary, theirs: Summary) -> str:
    """What the product must keep, and whether this run shows it."""
    right = "yes" if ours.final_right >= theirs.final_right else "NO"
    sooner = theirs.first_token_p50 / ours.first_token_p50
    return f"{ours.collection}: A at least as right as B: {right}; first token {sooner:.1f} times sooner (at least 2)"


async def run(count: int, offset: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    async with parts(with_chat=True) as started:
        for questions in (xquad(), manuals()):
            if questions is None:
                print("XQuAD is not there (../shared/data): its part is skipped")
                continue
            await started.fill(questions)
            few = len(questions.asked) <= count
            asked = questions.asked if few else every_kth(questions.asked, count, offset=offset)
            outcomes += await measure(started, questions, asked)
    return outcomes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--questions", type=int, default=50, help="at most so many of a collection, spread evenly")
    arguments.add_argument("--offset", type=int, default=0, help="another offset asks other questions of those")
    arguments.add_argument("--json", type=Path, help="write every outcome to this file")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    outcomes = asyncio.run(run(given.questions, given.offset))
    measured = dict.fromkeys((each.collection, each.method) for each in outcomes)
    rows = {key: summary(outcomes, *key) for key in sorted(measured, key=lambda key: (key[0] != XQUAD, key[1]))}
    print(table(HEADER, [msgspec.structs.astuple(row) for row in rows.values()]))
    if (XQUAD, WHOLE) in rows:
        print(requirements(rows[XQUAD, SELECTED], rows[XQUAD, WHOLE]))
    if given.json is not None:
        given.json.write_text(json.dumps(msgspec.to_builtins(outcomes), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
