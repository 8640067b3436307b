"""What documents of every format are made of: lines, headings and blocks, with offsets into the source."""

import bisect
import itertools
from collections.abc import Callable, Sequence

import msgspec

from edged.rag.sentences import LONGEST_SENTENCE_WORDS, count_words, split
from edged.types import Sentence


class Line(msgspec.Struct, frozen=True):
    """A line, or the rest of one behind a prefix. ``start`` is the offset of its first character."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @property
    def blank(self) -> bool:
        return not self.text or self.text.isspace()

    def after(self, characters: int) -> "Line":
        """The line without its first characters."""
        return Line(self.text[characters:], self.start + characters)


class Heading(msgspec.Struct, frozen=True):
    """The headings that hold from here on, outermost first."""

    path: tuple[str, ...]


class Block(msgspec.Struct, frozen=True):
    """A paragraph, list, table or code listing.

    ``whole`` is the block as one sentence, to be used where it fits (code); ``leads`` says that the block
    introduces the next one ("Possible causes:") and belongs to it.
    """

    sentences: tuple[Sentence, ...]
    whole: Sentence | None = None
    leads: bool = False


class Spliced:
    """Text put together from pieces of another text, that knows where each character came from."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._positions: list[int] = []
        self._origins: list[int] = []
        self._length = 0

    def add(self, part: str, origin: int) -> None:
        if part:
            self._parts.append(part)
            self._positions.append(self._length)
            self._origins.append(origin)
            self._length += len(part)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def origin(self, position: int) -> int:
        """The place in the other text of the character at ``position``."""
        index = bisect.bisect_right(self._positions, position) - 1
        return self._origins[index] + position - self._positions[index]


Strip = Callable[[str], Spliced]
"""Takes the inline marks out of a text."""


def unmarked(text: str) -> Spliced:
    """The :data:`Strip` of formats that have no inline marks."""
    spliced = Spliced()
    spliced.add(text, 0)
    return spliced


def lines_of(text: str) -> list[Line]:
    r"""The lines of a text, ended by ``\n`` or the end of the text."""
    lines, start = [], 0
    for line in text.split("\n"):
        lines.append(Line(line, start))
        start += len(line) + 1
    return lines


def prose(lines: Sequence[Line], strip: Strip) -> list[Sentence]:
    """The sentences of a paragraph. Every letter and digit of the lines lies in the span of a sentence."""
    joined = Spliced()
    for line in lines:
        joined.add(line.text, line.start)
        joined.add("\n", line.end)
    stripped = strip(joined.text)
    sentences = [
        Sentence(
            sentence.text,
            joined.origin(stripped.origin(sentence.start)),
            joined.origin(stripped.origin(sentence.end - 1)) + 1,
        )
        for sentence in split(stripped.text)
    ]
    return covering(lines, sentences)


def item(lines: Sequence[Line], strip: Strip) -> list[Sentence]:
    """A list item: one sentence, unless it is too long to be read as one."""
    sentences = prose(lines, strip)
    text = " ".join(sentence.text for sentence in sentences)
    if not sentences or count_words(text) > LONGEST_SENTENCE_WORDS:
        return sentences
    return [Sentence(text, sentences[0].start, sentences[-1].end)]


def row_text(names: Sequence[str], cells: Sequence[str]) -> str:
    """A table row that can be read alone: ``Code: E-217; Meaning: pump too hot``."""
    padded = itertools.chain(names, itertools.repeat(""))
    named = zip(padded, cells, strict=False)
    return "; ".join(f"{name.rstrip(':')}: {cell}" if name else cell for name, cell in named if cell)


def rows(header: Sequence[Line], names: Sequence[str], body: Sequence[tuple[Sequence[Line], Sequence[str]]]) -> Block:
    """A table. The span of its first row begins with the header, whose names every row's text repeats.

    ``body`` holds the lines and the cells of each row.
    """
    sentences = [
        Sentence(text, lines[0].start, lines[-1].end) for lines, cells in body if (text := row_text(names, cells))
    ]
    every_line = [*header, *(line for lines, _ in body for line in lines)]
    return Block(tuple(covering(every_line, sentences)))


def covering(lines: Sequence[Line], sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences with their spans widened to letters and digits that their texts leave out, such as URLs.

    Lines of which nothing was left at all become a sentence as they are; lines without any letter or digit
    are ornament.
    """
    words = _word_bounds(lines)
    if not words:
        return []
    if not sentences:
        text = " ".join(" ".join(line.text for line in lines).split())
        return [Sentence(text, words[0][0], words[-1][1])]
    widened: list[Sentence] = []
    at = 0
    for index, sentence in enumerate(sentences):
        following = sentences[index + 1].start if index + 1 < len(sentences) else None
        start, end = sentence.start, sentence.end
        while at < len(words) and (following is None or words[at][0] < following):
            start = min(start, words[at][0]) if index == 0 else start
            end = max(end, words[at][1])
            at += 1
        end = end if following is None else min(end, following)
        widened.append(Sentence(sentence.text, start, end))
    return widened


def _word_bounds(lines: Sequence[Line]) -> list[tuple[int, int]]:
    """Start and end of each run of letters and digits, in source offsets."""
    bounds = []
    for line in lines:
        position = line.start
        for alphanumeric, run in itertools.groupby(line.text, str.isalnum):
            length = sum(1 for _ in run)
            if alphanumeric:
                bounds.append((position, position + length))
            position += length
    return bounds
