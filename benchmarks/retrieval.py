"""Does the right document come back, and only where there is one?

Three tables: the rank of the right document by keyword, by vector and by both; the same on the half of the questions
that the ranking was fitted on and on the other half; and whether questions are called near to what answers them and
not near to what does not:

    python benchmarks/retrieval.py [--json FILE]
"""

import argparse
import asyncio
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog
from quality import MANUAL, XQUAD, Asked, Parts, QuestionSet, holds_answer, manuals, parts, table, xquad

from edged.rag.retrieve import Ranking, Retriever, named_codes
from edged.serving.pool import EmbedderPool
from edged.types import Passage

DEPTHS = (1, 3, 5)
RANKED = 10
TOP = 3
UNANSWERED = 100
MACHINES = ("BD-30", "CP-250", "CW-90", "GB-45", "HP-160", "MG-320", "RS-75", "TX-620", "VD-400")
"""The manuals' subjects: codes that stay when a question's code is changed to one that no manual has."""

THRESHOLDS = (0.30, 0.35, 0.40, 0.45, 0.50)
METHODS: tuple[tuple[str, Callable[[Ranking], Sequence[int]]], ...] = (
    ("keyword", lambda ranking: ranking.by_keyword),
    ("vector", lambda ranking: ranking.by_vector),
    ("hybrid", lambda ranking: ranking.ids),
)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One question by one method. ``rank`` of the right document from 1, None when not among those looked at."""

    collection: str
    method: str
    question: str
    rank: int | None
    passage_holds_answer: bool


class Nearness(msgspec.Struct, frozen=True, kw_only=True):
    """Share of questions called near at a threshold."""

    threshold: float
    case: str
    questions: int
    near: float


async def ranked(parts: Parts, questions: QuestionSet) -> list[Found]:
    """Every question of a set by every method."""
    found = []
    for asked, vector in zip(questions.asked, await parts.vectors(questions.asked), strict=True):
        ranking = await parts.retriever.rank(asked.question, vector, questions.collection)
        for name, ids_of in METHODS:
            stored = await parts.store.passages(ids_of(ranking)[:RANKED])
            passages = [each.passage for each in stored]
            found.append(
                Found(
                    collection=questions.collection,
                    method=name,
                    question=asked.question,
                    rank=_rank(asked.document, passages),
                    passage_holds_answer=any(_holds(passage, asked) for passage in passages[:TOP]),
                )
            )
    return found


def _rank(document: str, passages: Sequence[Passage]) -> int | None:
    """Documents count once, where their first passage stands."""
    documents = list(dict.fromkeys(passage.document_id for passage in passages))
    return documents.index(document) + 1 if document in documents else None


def _holds(passage: Passage, asked: Asked) -> bool:
    return holds_answer(" ".join(sentence.text for sentence in passage.sentences), asked.answers)


def recall(found: Sequence[Found]) -> list[float]:
    """The share of questions whose document is among the first 1, 3 and 5."""
    return [sum(each.rank is not None and each.rank <= depth for each in found) / len(found) for depth in DEPTHS]


def half_of(question: str) -> str:
    """Which half of the questions one belongs to, by its hash."""
    return "confirming" if hashlib.sha256(question.encode()).digest()[0] & 1 else "fitting"


def recall_rows(found: Sequence[Found]) -> list[list[object]]:
    rows: list[list[object]] = []
    for collection, method in dict.fromkeys((each.collection, each.method) for each in found):
        own = [each for each in found if (each.collection, each.method) == (collection, method)]
        holding = sum(each.passage_holds_answer for each in own) / len(own)
        rows.append([collection, method, len(own), *recall(own), holding])
    return rows


def half_rows(found: Sequence[Found]) -> list[list[object]]:
    rows: list[list[object]] = []
    for half in ("fitting", "confirming"):
        for method, _ in METHODS:
            own = [
                each
                for each in found
                if each.collection == XQUAD and each.method == method and half_of(each.question) == half
            ]
            rows.append([half, method, len(own), *recall(own)])
    return rows


async def nearness(parts: Parts, own: QuestionSet, other: QuestionSet | None) -> list[Nearness]:
    """At each threshold: questions to the documents that answer them, and to such as do not."""
    texts = "\n".join(document.text for document in own.documents)
    cases = [
        ("manual questions, to the manuals", MANUAL, [each.question for each in own.asked]),
        ("the same with a code that is in no manual", MANUAL, _with_unknown_codes(own.asked, texts)),
    ]
    if other is not None:
        questions = [each.question for each in other.asked]
        cases += [
            ("XQuAD questions, to their paragraphs", XQUAD, questions),
            ("XQuAD questions, to the manuals", MANUAL, questions[:: len(questions) // UNANSWERED][:UNANSWERED]),
        ]
    results = []
    for threshold in THRESHOLDS:
        retriever = Retriever(parts.store, EmbedderPool(parts.embedder), near=threshold)
        for case, collection, asked in cases:
            near = [(await retriever.retrieve(question, collection, TOP)).near for question in asked]
            results.append(Nearness(threshold=threshold, case=case, questions=len(near), near=sum(near) / len(near)))
    return results


def _with_unknown_codes(asked: Sequence[Asked], texts: str) -> list[str]:
    """The questions about a fault or a part, each asking for a number that the texts do not have."""
    changed = []
    for each in asked:
        for code in named_codes(each.question):
            if code not in MACHINES:
                changed.append(each.question.replace(code, _unknown(code, texts)))
                break
    return changed


def _unknown(code: str, texts: str) -> str:
    match = re.search(r"\d+$", code)
    assert match is not None
    digits = len(match[0])
    numbers = ((int(match[0]) + step) % 10**digits for step in range(37, 37 * 10**digits, 37))
    candidates = (f"{code[: match.start()]}{number:0{digits}d}" for number in numbers)
    return next(candidate for candidate in candidates if candidate not in texts)


def nearness_rows(results: Sequence[Nearness]) -> list[list[object]]:
    rows: list[list[object]] = []
    for case in dict.fromkeys(each.case for each in results):
        own = [each for each in results if each.case == case]
        rows.append([case, own[0].questions, *(each.near for each in own)])
    return rows


async def run() -> tuple[list[Found], list[Nearness], float]:
    """Everything measured, and the threshold that is the default."""
    async with parts(with_chat=False) as started:
        sets = [questions for questions in (xquad(), manuals()) if questions is not None]
        if len(sets) < 2:
            print("XQuAD is not there (../shared/data): its part is skipped")
        found = []
        for questions in sets:
            await started.fill(questions)
            found += await ranked(started, questions)
        near = await nearness(started, sets[-1], sets[0] if len(sets) == 2 else None)
        return found, near, started.config.rag.near


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write every result to this file")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    found, near, default = asyncio.run(run())
    recalls = [f"R@{depth}" for depth in DEPTHS]
    print(table(["collection", "method", "questions", *recalls, f"answer in top {TOP}"], recall_rows(found)))
    if any(each.collection == XQUAD for each in found):
        print("\n" + table(["half of XQuAD", "method", "questions", *recalls], half_rows(found)))
    print(f"\nCalled near, by threshold (rag.near is {default:.2f}):\n")
    print(table(["questions", "number", *(f"{threshold:.2f}" for threshold in THRESHOLDS)], nearness_rows(near)))
    if given.json is not None:
        results = {"found": msgspec.to_builtins(found), "nearness": msgspec.to_builtins(near)}
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
