"""Which of the sentences shown to the model its answer stands on: pure."""

from collections.abc import Sequence

from edged.rag.verify import unsupported_words, verify
from edged.types import Citation, Passage

MOST_CITATIONS = 3
LEAST_GAIN = 0.02


def citation(passage: Passage, index: int) -> Citation:
    """The ``index``-th sentence of a passage as a citation."""
    sentence = passage.sentences[index]
    return Citation(
        sentence_id=f"{passage.chunk_id}.{index}",
        chunk_id=passage.chunk_id,
        document_id=passage.document_id,
        title=passage.title,
        headings=passage.headings,
        text=sentence.text,
        start=sentence.start,
        end=sentence.end,
    )


def supporting(answer: str, shown: Sequence[Citation]) -> list[Citation]:
    """The fewest shown sentences that hold the answer's words, in the order shown; at least one."""
    chosen: list[Citation] = []
    missing = 1.0
    while len(chosen) < min(MOST_CITATIONS, len(shown)):
        rest = [candidate for candidate in shown if candidate not in chosen]
        gains = {
            candidate.sentence_id: unsupported_words(answer, [each.text for each in [*chosen, candidate]])
            for candidate in rest
        }
        best = min(rest, key=lambda candidate: gains[candidate.sentence_id])
        if chosen and missing - gains[best.sentence_id] < LEAST_GAIN:
            break
        chosen.append(best)
        missing = gains[best.sentence_id]
    return [candidate for candidate in shown if candidate in chosen]


def check(answer: str, shown: Sequence[Citation], event_texts: Sequence[str]) -> tuple[list[Citation], list[str]]:
    """The citations of an answer, and the numbers, units and codes in it that stand nowhere."""
    chosen = supporting(answer, shown)
    if verify(answer, [*(cited.text for cited in chosen), *event_texts]):
        chosen = list(shown)
    return chosen, verify(answer, [*(cited.text for cited in chosen), *event_texts])
