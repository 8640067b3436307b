"""Which of the sentences shown to the model its answer stands on, and whether it stands on them: pure."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from edged.rag.terms import content_terms
from edged.rag.verify import unsupported_words, verify
from edged.store.keywords import codes
from edged.types import Citation, Passage

MOST_CITATIONS = 3
LEAST_GAIN = 0.02

# Fitted on SmolLM2-135M's answers to 100 XQuAD questions and 50 about the manuals, where the numbers of 131 stood:
# 57 of these were right. Refusing those that only repeat the question leaves 57 right and 67 wrong ones; with these
# two shares and the rule on codes, 46 right and 12 wrong (with another prompt format 46 and 20). The passages given
# in place of a refused answer hold the right one nine times in ten. A higher LEAST_SAID refuses more right answers
# than wrong ones; LEAST_ASKED from 0.7 to 0.9 differs little.
LEAST_SAID = 0.5
"""Share of the answer's words, those of the question aside, that one sentence must hold."""
LEAST_ASKED = 0.7
"""That sentence's share of the question's words must reach this part of the best sentence's share."""

_SAYS_NOTHING = frozenset(content_terms("answer question"))
_ENDINGS = (".", "!", "?", "…", ":", "。", "！", "？")


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


class Verdict(msgspec.Struct, frozen=True):
    """The sentences an answer stands on, and in a few words why it does not stand; empty when it does."""

    citations: tuple[Citation, ...]
    objection: str


def check(question: str, answer: str, shown: Sequence[Citation], evidence: str = "") -> Verdict:
    """Whether an answer stands on the sentences shown and on the event's own text; by rule.

    A rightful paraphrase is refused now and then, which costs only the generated wording.
    """
    if not answer:
        return Verdict((), "the model said nothing")
    # What the question claims is no evidence, except that it names the code or part it asks about.
    given = [evidence, *codes(question)]
    chosen = supporting(answer, shown)
    unsupported = verify(answer, [*(cited.text for cited in chosen), *given])
    if unsupported:
        chosen = list(shown)
        unsupported = verify(answer, [*(cited.text for cited in chosen), *given])
    if unsupported:
        return Verdict(tuple(chosen), f"not in the cited sentences: {', '.join(unsupported)}")
    return Verdict(tuple(chosen), _objection(question, answer, shown, evidence))


def _objection(question: str, answer: str, shown: Sequence[Citation], evidence: str) -> str:
    """What speaks against the words of an answer, its numbers aside."""
    asked = set(content_terms(question))
    said = set(content_terms(answer)) - asked - _SAYS_NOTHING
    if not said:
        return "the model only repeated the question"
    sources = [_Source.of(asked, said, cited.text, " ".join((cited.title, *cited.headings))) for cited in shown]
    if evidence:
        sources.append(_Source.of(asked, said, evidence, ""))
    origin = max(sources, default=_Source(0.0, 0.0, ""))
    if origin.said < LEAST_SAID:
        return "the model's words stand in no single sentence"
    elsewhere = [code for code in codes(question) if _names(code, sources) and not _names(code, [origin])]
    if elsewhere:
        return f"the sentence the model drew on is not about {', '.join(elsewhere)}"
    if origin.asked < LEAST_ASKED * max(source.asked for source in sources):
        return "the sentence the model drew on is not the one that the question is about"
    return ""


class _Source(NamedTuple):
    """How much of what was said, and then of what was asked, a sentence holds: shares of words, 0 to 1.

    ``text`` is the sentence under its title and headings.
    """

    said: float
    asked: float
    text: str

    @classmethod
    def of(cls, asked: set[str], said: set[str], text: str, place: str) -> "_Source":
        """``place`` is the sentence's title and headings: they tell what it is about, but are no evidence."""
        held = set(content_terms(text))
        about = held | set(content_terms(place))
        return cls(len(said & held) / len(said), _weight(asked & about) / max(1, _weight(asked)), f"{place}\n{text}")


def _names(code: str, sources: Sequence[_Source]) -> bool:
    return not verify(code, [source.text for source in sources])


def _weight(terms: set[str]) -> int:
    """Words by their number, those with a digit twice: a code or a rating says more than a noun."""
    return sum(2 if any(character.isdigit() for character in term) else 1 for term in terms)


def as_text(cited: Sequence[Citation]) -> str:
    """Sentences and table rows one after the other, as they can be read: each ends as a sentence does."""
    return " ".join(_ended(citation.text.strip()) for citation in cited)


def _ended(text: str) -> str:
    return text if text.rstrip("\"'”’»)]").endswith(_ENDINGS) else f"{text.rstrip(';,')}."
