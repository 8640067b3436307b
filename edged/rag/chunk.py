"""Cuts a document into the passages that are indexed and retrieved as one.

A chunk stays under one heading, holds whole sentences, list items and table rows, and knows where each came from.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from edged.rag import markdown, plaintext
from edged.rag.blocks import Block, Heading
from edged.rag.sentences import count_words
from edged.types import Chunk, Sentence

Group = list[Sentence]
Format = Literal["markdown", "text"]

_OVERLAP_SENTENCE_WORDS = 20  # room kept free for each repeated sentence


def chunk_document(
    text: str,
    format: Format,
    *,
    max_words: int = 160,
    overlap_sentences: int = 0,
) -> list[Chunk]:
    """The chunks of a document in order, ordinals from 0.

    A chunk has at most ``max_words`` words (:func:`edged.rag.sentences.count_words`) unless it is one sentence.
    ``overlap_sentences`` of the chunk before, under the same headings, are repeated where they fit.
    """
    chunks: list[Chunk] = []
    filled_to = max(max_words - overlap_sentences * _OVERLAP_SENTENCE_WORDS, max_words // 2)
    for path, blocks in _sections(text, format):
        groups = _pack(blocks, filled_to)
        for group in _overlapped(groups, overlap_sentences, max_words):
            chunks.append(Chunk(len(chunks), path, tuple(group)))
    return chunks


def _sections(text: str, document_format: Format) -> Iterator[tuple[tuple[str, ...], list[Block]]]:
    """The blocks under each heading; headings without any are left out."""
    path: tuple[str, ...] = ()
    blocks: list[Block] = []
    for part in (markdown if document_format == "markdown" else plaintext).parse(text):
        if isinstance(part, Heading):
            if blocks:
                yield path, blocks
            path, blocks = part.path, []
        elif part.sentences:
            blocks.append(part)
    if blocks:
        yield path, blocks


def _pack(blocks: Sequence[Block], max_words: int) -> list[Group]:
    """Neighbouring blocks together while they fit; a block that fits nowhere whole is cut into even parts."""
    groups: list[Group] = []
    room = 0.0
    for unit in _units(blocks, max_words):
        words = _words(unit)
        if words <= room:
            groups[-1] += unit
            room -= words
            continue
        for part in _parts(unit, words, max_words):
            groups.append(part)
            room = max_words - _words(part)
    return groups


def _units(blocks: Sequence[Block], max_words: int) -> Iterator[Group]:
    """What should stay together: a block, with the line that introduces it."""
    unit: Group = []
    for block in blocks:
        if block.whole is not None and count_words(block.whole.text) <= max_words:
            unit.append(block.whole)
        else:
            unit.extend(block.sentences)
        if not block.leads:
            yield unit
            unit = []
    if unit:
        yield unit


def _parts(unit: Group, words: float, max_words: int) -> Iterator[Group]:
    target = words / max(1, math.ceil(words / max(1, max_words)))
    part: Group = []
    held = 0.0
    for sentence in unit:
        size = count_words(sentence.text)
        if part and (held >= target or held + size > max_words):
            yield part
            part, held = [], 0.0
        part.append(sentence)
        held += size
    if part:
        yield part


def _overlapped(groups: Sequence[Group], overlap: int, max_words: int) -> Iterator[Group]:
    before: Group = []
    for group in groups:
        repeated = before[-overlap:] if overlap > 0 else []
        yield [*repeated, *group] if _words(repeated) + _words(group) <= max_words else group
        before = group


def _words(sentences: Sequence[Sentence]) -> float:
    return sum(count_words(sentence.text) for sentence in sentences)
