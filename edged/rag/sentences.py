"""Cuts prose into sentences with exact offsets, by rule and in linear time.

Sentences are what answers are built from and cite, so a cut in "approx. 3.5 bar" costs an answer, while two
sentences left together cost only tokens: where the rules are in doubt, they do not cut.
"""

import math
import re
from collections.abc import Iterator

from edged.types import Sentence

LONGEST_SENTENCE_WORDS = 60
"""Above this a sentence is cut at a semicolon or comma."""

_HARD_LIMIT_WORDS = 2 * LONGEST_SENTENCE_WORDS  # reached only by text without punctuation, such as dumps
_SHORTEST_PIECE_WORDS = 8

CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
"""The inside of a character class of a regular expression: scripts without spaces, and their punctuation."""

# Every match consumes what it looked at, so a scan with finditer stays linear on any text.
_ENDING = re.compile(r"""(?P<mark>[.!?…。！？｡]+)["'”’»)\]}」』）】〉》*_`~]*(?:\[\d{1,3}\])*""")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_NEXT_WORD = re.compile(r"""\s*["'“‘«(\[{「『（【*_`~¿¡<]*(?P<word>\w*)""")
_LAST_WORD = re.compile(r"[\w.&/-]+$")
_CJK_CHARACTER = re.compile(f"[{CJK}]")
_UNIT = re.compile(f"[{CJK}]|[^\\s{CJK}]{{1,64}}")

_LOOK_BACK_CHARACTERS = 40


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence, whatever follows.
_TITLES = _words(
    """
    e.g i.e eg ie dr mr mrs ms prof hon rev st vs cf viz ca approx resp incl excl esp gen col lt sgt
    """
)
# No end before a number or a lower-case word: "Fig. 3", "max. 10 bar", but "That is the max. Then stop."
_BEFORE_NUMBERS = _words(
    """
    no nos nr fig figs eq eqs sec sect ch chap vol vols pp p pg para art tab tbl ref refs pos item
    pt ver rev app ed max min nom typ avg std dia temp tel ext qty ser mod est jan feb mar apr jun
    jul aug sep sept oct nov dec
    """
)
# An end only before a word that starts sentences: "U.S. Army", "J. Smith", but "in the U.S. The".
_SENTENCE_STARTERS = _words(
    """
    the this that these those if when while where it its in on at as for from to by with after
    before during there then thus however he she they we you i his her their our your a an and but
    or so do does not no yes all any each every some most many both neither either only also press
    turn check open close set use replace remove see note warning caution never always once until
    since because although what which who how why is are was were has have had can may must should
    will would
    """
)


def split(text: str, offset: int = 0) -> list[Sentence]:
    """The sentences of ``text`` in order; ``offset`` is added to their ``start`` and ``end``.

    Spans never overlap and cover every character that is no white space. A sentence's ``text`` is its span
    with every run of white space made one space.
    """
    return [
        Sentence(" ".join(text[start:end].split()), start + offset, end + offset)
        for sentence in _spans(text)
        for start, end in _pieces(text, *sentence)
    ]


def count_words(text: str) -> float:
    """Words by white space; two CJK characters count as one word, every 64 letters on end as one more."""
    return len(_UNIT.findall(text)) - 0.5 * len(_CJK_CHARACTER.findall(text))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end in _ends(text):
        yield from _trimmed(text, start, end)
        start = end
    yield from _trimmed(text, start, len(text))


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    stripped = part.strip()
    if stripped:
        begin = start + part.index(stripped[0])
        yield begin, begin + len(stripped)


def _ends(text: str) -> list[int]:
    blank_lines = {match.start() for match in _BLANK_LINE.finditer(text)}
    ends, start = set(blank_lines), 0
    for match in _ENDING.finditer(text):
        if _is_end(text, start, match):
            ends.add(match.end())
            start = match.end()
    return sorted(ends)


def _is_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a full stop, mark or ellipsis ends the sentence that began at ``start``."""
    mark, after = match["mark"], match.end()
    if mark[-1] in "。！？｡":
        return True
    following = text[after : after + 1]
    if following and not following.isspace():
        return mark[-1] in "!?" and _CJK_CHARACTER.match(following) is not None
    found = _NEXT_WORD.match(text, after)
    word = found["word"] if found else ""
    if word[:1].islower():
        return False
    return mark != "." or _full_stop_ends(text, start, match.start(), word)


def _full_stop_ends(text: str, start: int, dot: int, following: str) -> bool:
    found = _LAST_WORD.search(text, max(start, dot - _LOOK_BACK_CHARACTERS), dot)
    if found is None:
        return True
    last = found[0].lower().lstrip("-/")
    if last in _TITLES:
        return False
    if last in _BEFORE_NUMBERS:
        return not following[:1].isdigit()
    if last.isdigit() and not text[start : found.start()].strip(" \t\r\n*_-"):
        return False  # "1. Open the valve": the number of a step
    if _is_initials(text, start, found):
        return following.lower() in _SENTENCE_STARTERS or not following
    return True


def _is_initials(text: str, start: int, last: re.Match[str]) -> bool:
    """``J.``, ``U.S.``; a letter behind a number is a unit ("16 A.") and no initial."""
    word = last[0]
    if "." in word:
        return all(len(part) == 1 and part.isalpha() for part in word.split("."))
    before = text[max(start, last.start() - 2) : last.start()].rstrip()
    return len(word) == 1 and word.isupper() and word.isascii() and not before[-1:].isdigit()


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The span itself, or its parts when it has too many words."""
    if end - start <= LONGEST_SENTENCE_WORDS:  # a word has at least one character
        yield start, end
        return
    words = count_words(text[start:end])
    while words > LONGEST_SENTENCE_WORDS:
        cut, taken = _cut(text, start, end, words)
        if cut >= end:
            break
        yield from _trimmed(text, start, cut)
        start, words = cut, words - taken
    yield from _trimmed(text, start, end)


def _cut(text: str, start: int, end: int, words: float) -> tuple[int, float]:
    """Where to cut and how many words lie before it: a semicolon, else a comma, nearest to equal parts."""
    target = words / math.ceil(words / LONGEST_SENTENCE_WORDS)
    best: tuple[int, float, int, float] | None = None
    count = 0.0
    for match in _UNIT.finditer(text, start, end):
        unit = match[0]
        count += 0.5 if _CJK_CHARACTER.match(unit) else 1.0
        strength = _strength(text, unit, match.end())
        if strength is not None and count >= _SHORTEST_PIECE_WORDS and words - count >= _SHORTEST_PIECE_WORDS:
            candidate = (strength, abs(count - target), match.end(), count)
            best = candidate if best is None else min(best, candidate)
        if (count >= LONGEST_SENTENCE_WORDS and best) or count >= _HARD_LIMIT_WORDS:
            break
    return (best[2], best[3]) if best else (match.end(), count)


def _strength(text: str, unit: str, after: int) -> int | None:
    """0 behind a semicolon, 1 behind a comma, None where nothing may be cut."""
    last = unit[-1]
    if last in "；;" and (last == "；" or text[after : after + 1].isspace()):
        return 0
    if last in "，、,:" and (last in "，、" or text[after : after + 1].isspace()):
        return 1
    return None
