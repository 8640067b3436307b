"""Plain text into headings and blocks, by the conventions manuals and log books are typed in.

Headings are underlined, in capitals or numbered; tables are aligned columns; lists have bullets or numbers.
"""

import re
from collections.abc import Iterator, Sequence

from edged.rag.blocks import Block, Heading, Line, item, lines_of, prose, rows, unmarked
from edged.rag.markdown import pipe_table
from edged.types import Sentence

_ITEM = re.compile(r"\s*(?:(?P<bullet>[-*+•–·])|(?P<number>\d{1,3}[.)]|[a-z]\)|\(\d{1,2}\)))(?=\s)")
_NUMBERED = re.compile(r"\s*(?P<number>\d{1,2}(?:\.\d{1,3}){0,5})(?P<dot>\.?)\s+(?P<title>[^\W\d_]{2}.*)")
_CELL = re.compile(r"\S+(?: \S+)*")
_RULE_CHARACTERS = frozenset("-=+|_~* \t\r")
_LONGEST_HEADING_WORDS = 10
_LONGEST_HEADING_CHARACTERS = 120
_WIDE = 1000  # column distance given to tab-separated cells, which need no alignment
_MOST_COLUMNS = 40  # bounds the search for a cell's column
_SLACK = 1  # characters by which columns may be out of line

Cell = tuple[int, int, str]
"""Start and end column and the text of a cell."""


def parse(text: str) -> Iterator[Heading | Block]:
    """Headings and blocks in the order of the document."""
    lines = lines_of(text)
    path: list[tuple[str, str]] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.blank or _is_rule(line.text):
            at += 1
        elif _starts_table(lines, at):
            end, block = _table(lines, at)
            yield block
            at = end
        elif _starts_pipe_table(lines, at):
            end = _pipe_table_end(lines, at)
            yield pipe_table(line, [row for row in lines[at + 1 : end] if not _is_rule(row.text)])
            at = end
        elif (style := _heading_style(lines, at)) is not None:
            path = [*_outer(path, style), (style, " ".join(line.text.split()))]
            yield Heading(tuple(title for _, title in path))
            at += 2 if style.startswith("under") else 1
        elif _ITEM.match(line.text):
            end = _list_end(lines, at)
            yield _list(lines[at:end])
            at = end
        else:
            end = _paragraph_end(lines, at)
            yield _paragraph(lines[at:end])
            at = end


def _paragraph(lines: Sequence[Line]) -> Block:
    sentences = prose(lines, unmarked)
    return Block(tuple(sentences), leads=bool(sentences) and sentences[-1].text.endswith((":", "：")))


# --- headings --------------------------------------------------------------------------------------


def _outer(path: list[tuple[str, str]], style: str) -> list[tuple[str, str]]:
    """The headings above one of this style: a style seen before takes its old place, a new one goes below.

    A number's style is its depth, ``number 2`` for "3.2": it also ends deeper numbers. ``===`` is always outermost.
    """
    if style == "under =":
        return []
    for index, (seen, _) in enumerate(path):
        both_numbers = seen.startswith("number") and style.startswith("number")
        if seen == style or (both_numbers and seen > style):
            return path[:index]
    return path


def _heading_style(lines: Sequence[Line], at: int) -> str | None:
    """What makes this line a heading: its underline's character, ``capitals``, the depth of its number."""
    text = lines[at].text.strip()
    if len(text) > _LONGEST_HEADING_CHARACTERS or len(text.split()) > _LONGEST_HEADING_WORDS:
        return None
    under = lines[at + 1].text.strip() if at + 1 < len(lines) else ""
    if len(under) >= 3 and under[0] in "=-~^" and not under.strip(under[0]):
        return f"under {under[0]}"
    if text.endswith((".", ",", ";", ":", "!", "?", "。")) or _cells(text)[1:]:
        return None
    if not _stands_apart(lines, at):
        return None
    if _is_capitals(text):
        return "capitals"
    return _number_style(lines, at)


def _stands_apart(lines: Sequence[Line], at: int) -> bool:
    """First or behind a blank line, and something follows."""
    return (at == 0 or lines[at - 1].blank) and _next_filled(lines, at) is not None


def _next_filled(lines: Sequence[Line], at: int) -> Line | None:
    """The next line that is not blank among the few that may follow a heading."""
    return next((line for line in lines[at + 1 : at + 5] if not line.blank), None)


def _is_capitals(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    return len(letters) >= 3 and text.isupper() and len(letters) * 2 >= len("".join(text.split()))


def _number_style(lines: Sequence[Line], at: int) -> str | None:
    match = _NUMBERED.match(lines[at].text)
    if match is None or match["title"][0].islower():
        return None
    depth = match["number"].count(".") + 1
    following = _next_filled(lines, at)
    is_list = depth == 1 and match["dot"] and (not lines[at + 1].blank or _is_item(following))
    return None if is_list else f"number {depth}"


def _is_item(line: Line | None) -> bool:
    return line is not None and _ITEM.match(line.text) is not None


# --- lists and paragraphs --------------------------------------------------------------------------


def _list_end(lines: Sequence[Line], at: int) -> int:
    end = at + 1
    while end < len(lines) and not lines[end].blank and not _starts_table(lines, end):
        end += 1
    return end


def _list(lines: Sequence[Line]) -> Block:
    starts = [index for index, line in enumerate(lines) if _ITEM.match(line.text)]
    sentences: list[Sentence] = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = _ITEM.match(lines[start].text)
        first = lines[start].after(match.end()) if match and match["bullet"] else lines[start]
        sentences += item([first, *lines[start + 1 : end]], unmarked)
    return Block(tuple(sentences))


def _paragraph_end(lines: Sequence[Line], at: int) -> int:
    end = at + 1
    while end < len(lines) and not lines[end].blank:
        if _ITEM.match(lines[end].text) or _starts_table(lines, end) or _starts_pipe_table(lines, end):
            break
        end += 1
    return end


# --- tables ----------------------------------------------------------------------------------------


def _is_rule(text: str) -> bool:
    return len(text.strip()) >= 3 and _RULE_CHARACTERS.issuperset(text)


def _starts_pipe_table(lines: Sequence[Line], at: int) -> bool:
    if lines[at].text.count("|") < 2 or at + 1 >= len(lines):
        return False
    return "|" in lines[at + 1].text or _is_rule(lines[at + 1].text)


def _pipe_table_end(lines: Sequence[Line], at: int) -> int:
    end = at + 1
    while end < len(lines) and ("|" in lines[end].text or (not lines[end].blank and _is_rule(lines[end].text))):
        end += 1
    return end


def _cells(text: str) -> list[Cell]:
    """What stands between gaps of two or more spaces, or between tabs."""
    if "\t" in text.strip():
        parts = text.split("\t")
        return [(index * _WIDE, index * _WIDE + 1, part.strip()) for index, part in enumerate(parts) if part.strip()]
    cells: list[Cell] = []
    for match in _CELL.finditer(text.rstrip()):
        sentence_gap = cells and cells[-1][2][-1] in ".!?" and match.start() - cells[-1][1] == 2
        if sentence_gap:  # typists put two spaces behind a full stop
            start, _, before = cells.pop()
            cells.append((start, match.end(), f"{before} {match[0]}"))
        else:
            cells.append((match.start(), match.end(), match[0]))
    return cells


def _aligned(columns: Sequence[Cell], cells: Sequence[Cell]) -> bool:
    """Whether at least two cells stand under a column's start or end."""
    starts = {start + slack for start, _, _ in columns for slack in range(-_SLACK, _SLACK + 1)}
    ends = {end + slack for _, end, _ in columns for slack in range(-_SLACK, _SLACK + 1)}
    return sum(start in starts or end in ends for start, end, _ in cells) >= 2


def _starts_table(lines: Sequence[Line], at: int) -> bool:
    """Three columns over two lines, or two columns over three lines or with a rule below the header."""
    columns = _cells(lines[at].text)
    if not 2 <= len(columns) <= _MOST_COLUMNS or at + 1 >= len(lines):
        return False
    ruled = _is_rule(lines[at + 1].text)
    first = at + (2 if ruled else 1)
    needed = 1 if ruled or len(columns) > 2 else 2
    below = lines[first : first + needed]
    return len(below) == needed and all(_is_row(columns, line) for line in below)


def _is_row(columns: Sequence[Cell], line: Line) -> bool:
    cells = _cells(line.text)
    return len(cells) >= 2 and not _is_rule(line.text) and _aligned(columns, cells)


def _table(lines: Sequence[Line], at: int) -> tuple[int, Block]:
    """The end of the table and the table. A first line with digits and no rule below it is no header."""
    columns = _cells(lines[at].text)
    ruled = _is_rule(lines[at + 1].text)
    has_names = ruled or not any(character.isdigit() for character in lines[at].text)
    names = [text for _, _, text in columns] if has_names else []
    header = [lines[at]] if has_names else []
    body: list[tuple[list[Line], list[list[str]]]] = []
    end = at + len(header)
    while end < len(lines) and not lines[end].blank:
        cells = _cells(lines[end].text)
        if body and _continues(columns, cells):
            body[-1][0].append(lines[end])
            _fill(columns, cells, body[-1][1])
        elif cells and not _is_rule(lines[end].text):
            if len(cells) < 2 and cells[0][1] > columns[1][0]:
                break  # a line of prose
            row: list[list[str]] = [[] for _ in columns]
            _fill(columns, cells, row)
            body.append(([lines[end]], row))
        end += 1
    return end, rows(header, names, [(lines, [" ".join(parts) for parts in row]) for lines, row in body])


def _continues(columns: Sequence[Cell], cells: Sequence[Cell]) -> bool:
    """Whether the line only goes on with cells of the row above: its first column is empty."""
    return bool(cells) and columns[0][1] < cells[0][0] and cells[0][0] >= columns[1][0] - _SLACK


def _fill(columns: Sequence[Cell], cells: Sequence[Cell], row: list[list[str]]) -> None:
    for cell in cells:
        row[_column_of(columns, cell)].append(cell[2])


def _column_of(columns: Sequence[Cell], cell: Cell) -> int:
    """The column whose name the cell stands under, else the last one that begins before it."""
    start, end, _ = cell
    for index, (left, right, _) in enumerate(columns):
        if start < right and left < end:
            return index
    return max(sum(left <= start + _SLACK for left, _, _ in columns) - 1, 0)
