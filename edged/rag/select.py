"""Chooses the sentences an answer is generated from, to a budget of tokens.

Prompt tokens are what an edge CPU pays for, and tiny models answer better from three good sentences than from
three passages: retrieval finds the passages, this picks their sentences.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from edged.rag.sentences import CJK
from edged.rag.terms import content_terms
from edged.types import Sentence

# Tuned on half of the 612 questions of XQuAD English dev: each question's gold paragraph with its two nearest by
# BM25 (574 estimated tokens in all), MiniLM-L6 vectors. Share of the other half's 306 questions with the gold answer
# in a selected sentence, at budgets of 100 / 130 / 160 tokens (three questions are one point):
#   these weights                      0.889 / 0.925 / 0.948
#   these weights, no vectors          0.863 / 0.912 / 0.944
#   similarity and rank alone          0.863 / 0.895 / 0.922
#   the passages in order              0.500 / 0.650 / 0.768
# The bonus for neighbours changes nothing with vectors and was kept for what it gains without them, 0 to 2 points;
# that was decided on both halves. A penalty for length, tried on the tuning half only, lost 0.3 points with vectors
# and gained 1 without, and was left out.
SIMILARITY_WEIGHT = 1.0
LEXICAL_WEIGHT = 1.0
CODE_WEIGHT = 0.5  # not measured, XQuAD has no codes: outweighs what a similar row about another code can gain
RANK_WEIGHT = 0.1
NEIGHBOUR_WEIGHT = 0.15

# The first half of XQuAD's questions / the other one, by the product's own retrieval: share with the gold answer in a
# selected sentence, median tokens (mean; nine of ten questions have at most).
#   160 tokens, no margin   0.925 / 0.938   155 (153; 159)
#   160 tokens, margin 0.5  0.915 / 0.908    81  (88; 151)
#   240 tokens, margin 0.4  0.905 / 0.915    64  (87; 190)
#   240 tokens, margin 0.5  0.935 / 0.928    81 (103; 220)
#   240 tokens, margin 0.6  0.941 / 0.935   107 (121; 231)
# A share of the best score in place of a distance from it needs 20 tokens more for the same. About the manuals
# every one of these holds all 50 answers.
FACTS_MARGIN = 0.5
"""How far below the best sentence's score one may be to be shown to the model."""

NEAR_DUPLICATE_SHARE = 0.85
"""Two sentences that share this much of their words (Jaccard) say the same."""

# SmolLM2's tokenizer over the sentences of XQuAD dev: the estimate is 1.07 times the truth in English and 1.02
# times in Chinese, of which that tokenizer knows little; the truth is above it in 17 % and 34 % of the sentences.
TOKENS_PER_CJK_CHARACTER = 1.9
CHARACTERS_PER_TOKEN = 5.2
SENTENCE_OVERHEAD_TOKENS = 1

_CODE = re.compile(r"(?<![A-Za-z0-9])(?=[A-Za-z/-]*\d)[A-Za-z0-9]+(?:[-/.][A-Za-z0-9]+)*")
_PIECE = re.compile(rf"(?P<cjk>[{CJK}])|(?P<word>[^\W\d_{CJK}]+)|\d|[^\w\s]|_")


class Candidate(msgspec.Struct, frozen=True):
    """A sentence of a retrieved passage. ``passage_rank`` counts from 0, ``index`` is its place in the passage.

    ``similarity`` is the cosine of the question's and the sentence's vectors, None without vectors.
    """

    passage_rank: int
    index: int
    sentence: Sentence
    similarity: float | None


def estimate_tokens(text: str) -> int:
    """About how many tokens a text costs, a little too many rather than too few. Needs no tokenizer."""
    tokens = 0.0
    for match in _PIECE.finditer(text):
        if match["cjk"]:
            tokens += TOKENS_PER_CJK_CHARACTER
        elif match["word"]:
            tokens += max(1.0, len(match["word"]) / CHARACTERS_PER_TOKEN)
        else:
            tokens += 1
    return math.ceil(tokens)


def cost_tokens(sentence: str) -> int:
    """About what a sentence takes of a budget."""
    return estimate_tokens(sentence) + SENTENCE_OVERHEAD_TOKENS


def score(question: str, candidates: Sequence[Candidate]) -> list[float]:
    """How well each candidate answers the question; only the order within one call means something."""
    asked = set(content_terms(question))
    codes = _codes(question)
    terms = [frozenset(content_terms(candidate.sentence.text)) for candidate in candidates]
    frequency = Counter(term for held in terms for term in held)
    weights = {term: math.log1p(len(candidates) / (1 + frequency[term])) for term in asked}
    whole = sum(weights.values()) or 1.0
    own = [
        SIMILARITY_WEIGHT * (candidate.similarity or 0.0)
        + LEXICAL_WEIGHT * sum(weights[term] for term in asked & held) / whole
        + CODE_WEIGHT * (len(codes & _codes(candidate.sentence.text)) / len(codes) if codes else 0.0)
        - RANK_WEIGHT * candidate.passage_rank
        for candidate, held in zip(candidates, terms, strict=True)
    ]
    return _with_neighbours(candidates, own)


def _with_neighbours(candidates: Sequence[Candidate], own: Sequence[float]) -> list[float]:
    """A sentence beside a good one is worth more: "It opens at 10 bar." says what of only with the one before."""
    places = [(candidate.passage_rank, candidate.index) for candidate in candidates]
    at = dict(zip(places, own, strict=True))
    return [
        value + NEIGHBOUR_WEIGHT * max(at.get((rank, index - 1), 0.0), at.get((rank, index + 1), 0.0))
        for (rank, index), value in zip(places, own, strict=True)
    ]


def select(
    question: str, candidates: Sequence[Candidate], *, budget_tokens: int, margin: float = math.inf
) -> list[Candidate]:
    """The best candidates that fit the budget, at least one, in reading order (passage_rank, index).

    Those whose score is more than ``margin`` below the best one's are left out, whatever room there is.
    """
    scores = score(question, candidates)
    least = max(scores, default=0.0) - margin
    best_first = sorted((at for at, value in enumerate(scores) if value >= least), key=lambda at: -scores[at])
    chosen: list[Candidate] = []
    words: list[frozenset[str]] = []
    room = budget_tokens
    for at in best_first:
        candidate = candidates[at]
        cost = cost_tokens(candidate.sentence.text)
        held = frozenset(candidate.sentence.text.lower().split())
        if (chosen and cost > room) or any(_near_duplicates(held, other) for other in words):
            continue
        chosen.append(candidate)
        words.append(held)
        room -= cost
    return sorted(chosen, key=lambda candidate: (candidate.passage_rank, candidate.index))


def _near_duplicates(first: frozenset[str], second: frozenset[str]) -> bool:
    return len(first & second) >= NEAR_DUPLICATE_SHARE * max(1, len(first | second))


def _codes(text: str) -> set[str]:
    """Numbers and codes as compared: ``E-217`` and ``e217`` are the same."""
    return {re.sub(r"[^a-z0-9.]", "", match[0].lower()) for match in _CODE.finditer(text)}
