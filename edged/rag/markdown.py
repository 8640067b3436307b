"""Markdown into headings and blocks: the parts of CommonMark and GitHub tables that carry text.

Written here rather than taken from a library because every sentence must know its offsets in the source, and
because hostile documents must cost linear time.
"""

import html
import re
from collections.abc import Iterable, Iterator, Sequence

from edged.rag.blocks import Block, Heading, Line, Spliced, item, lines_of, prose, rows
from edged.types import Sentence

_FENCE = re.compile(r"\s*(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
_ATX = re.compile(r" {0,3}(?P<level>#{1,6})(?=\s|$)")
_ITEM = re.compile(r"\s*(?:(?P<bullet>[-*+])|(?P<number>\d{1,9}[.)]))(?=\s|$)")
_QUOTE = re.compile(r"(?: {0,3}>)+ ?")
_INTERRUPTING = (_FENCE, _ATX, _ITEM)
_DELIMITER_ROW = frozenset("|:- \t\r")
_PIPE = re.compile(r"(?<!\\)\|")
_LONGEST_SETEXT_CHARACTERS = 160  # a longer "heading" is a paragraph in front of a rule

# Every alternative is bounded or stops at the next character of its own kind, so that time stays linear.
_MARK = re.compile(
    r"""
    \\(?P<escaped>[!-/:-@\[-`{-~])
    | (?P<ticks>`{1,3}+)(?P<code>[^`]{1,500})(?P=ticks)
    | !?\[(?P<label>[^\[\]]{0,400})\](?:\([^()\s]{0,800}(?:\([^()\s]{0,200}\))?(?:\s{1,9}"[^"\n]{0,300}")?\)
                                     |\[[^\[\]\n]{0,100}\])
    | <(?P<address>(?:https?://|mailto:)[^<>\s]{1,800})>
    | (?P<space></?(?:br|p|div|li|ul|ol|td|th|tr|table|h[1-6]|hr)\b[^<>]{0,300}>)
    | </?(?:a|b|i|em|strong|sub|sup|span|code|kbd|u|s|small|font|img|center|details|summary)\b[^<>]{0,300}>
    | <!--[^<>]{0,1000}-->
    | (?P<entity>&(?:[A-Za-z]{2,8}|\#\d{1,6});)
    | (?<!\*)\*{2,3}(?!\*)(?=\S) | (?<=[^\s*])\*{2,3}(?!\*)
    | (?<![\w*])\*(?=[\w\[`"'(“]) | (?<=[^\s*])\*(?![\w*])
    | (?<![\w_])_{1,3}(?=[^\W_]) | (?<=[^\s_])_{1,3}(?!\w)
    | ~~
    """,
    re.VERBOSE,
)
_KEPT_GROUPS = ("escaped", "code", "label", "address")


def parse(text: str) -> Iterator[Heading | Block]:
    """Headings and blocks in the order of the document."""
    titles: list[tuple[int, str]] = []
    for part in _parse(lines_of(text), quoted=False):
        if isinstance(part, Block):
            yield part
            continue
        level, title = part
        titles = [outer for outer in titles if outer[0] < level]
        if title:
            titles.append((level, title))
        yield Heading(tuple(title for _, title in titles))


def strip_marks(text: str) -> Spliced:
    """The text as a reader sees it: without emphasis, link targets, code marks, tags and escapes."""
    spliced, at = Spliced(), 0
    for match in _MARK.finditer(text):
        spliced.add(text[at : match.start()], at)
        at = match.end()
        group = match.lastgroup
        if group == "space":
            spliced.add(" ", match.start())
        elif group == "entity":
            spliced.add(html.unescape(match[0])[:1], match.start())
        else:
            _keep(spliced, match)
    spliced.add(text[at:], at)
    return spliced


def _keep(spliced: Spliced, match: re.Match[str]) -> None:
    for group in _KEPT_GROUPS:
        if match[group] is not None:
            spliced.add(match[group], match.start(group))


def _parse(lines: Sequence[Line], *, quoted: bool) -> Iterator[Block | tuple[int, str]]:
    """Blocks, and headings as (level, title). Inside a quotation a heading is a paragraph."""
    at = 0
    while at < len(lines):
        if lines[at].blank or _is_rule(lines[at].text):
            at += 1
        else:
            at, parts = _next(lines, at, quoted=quoted)
            yield from parts


def _next(lines: Sequence[Line], at: int, *, quoted: bool) -> tuple[int, Iterable[Block | tuple[int, str]]]:
    """What begins at this line, and the index of the line behind it."""
    line = lines[at]
    if (fence := _FENCE.match(line.text)) is not None:
        end, closed = _fence_end(lines, at, fence["fence"])
        return end, _code(lines[at:end], closed=closed)
    if (heading := _heading(lines, at, quoted=quoted)) is not None:
        return heading
    if _starts_table(lines, at):
        end = _table_end(lines, at)
        return end, [pipe_table(line, lines[at + 2 : end])]
    if _ITEM.match(line.text):
        end = _list_end(lines, at)
        return end, [_list(lines[at:end])]
    if not quoted and _QUOTE.match(line.text):
        end = _quote_end(lines, at)
        return end, _parse([_unquoted(line) for line in lines[at:end]], quoted=True)
    end = _paragraph_end(lines, at, quoted=quoted)
    return end, [_block(prose(lines[at:end], strip_marks))]


def _heading(lines: Sequence[Line], at: int, *, quoted: bool) -> tuple[int, Iterable[Block | tuple[int, str]]] | None:
    atx = _ATX.match(lines[at].text)
    if atx is not None:
        rest = lines[at].after(atx.end())
        if quoted:
            return at + 1, [_block(prose([rest], strip_marks))]
        return at + 1, [(len(atx["level"]), _title(rest.text))]
    level = 0 if quoted else _setext_level(lines, at)
    return (at + 2, [(level, _title(lines[at].text))]) if level else None


def _block(sentences: Sequence[Sentence]) -> Block:
    return Block(tuple(sentences), leads=bool(sentences) and sentences[-1].text.endswith((":", "：")))


def _title(text: str) -> str:
    shown = text.strip()
    without_closing = shown.rstrip("#")
    if without_closing != shown and (not without_closing or without_closing[-1].isspace()):
        shown = without_closing
    return " ".join(strip_marks(shown).text.split())


def _is_rule(text: str) -> bool:
    marks = "".join(text.split())
    return len(marks) >= 3 and marks[0] in "-*_=" and not marks.strip(marks[0])


def _setext_level(lines: Sequence[Line], at: int) -> int:
    """1 or 2 when the next line underlines this one as a heading, else 0."""
    if at + 1 >= len(lines) or len(lines[at].text) > _LONGEST_SETEXT_CHARACTERS:
        return 0
    under = lines[at + 1].text.strip()
    if not under or lines[at + 1].text.startswith("    ") or under.strip(under[0]):
        return 0
    return {"=": 1, "-": 2}.get(under[0], 0)


def _closes(line: Line, fence: str) -> bool:
    text = line.text.strip()
    return len(text) >= len(fence) and not text.strip(fence[0])


def _fence_end(lines: Sequence[Line], at: int, fence: str) -> tuple[int, bool]:
    """The line behind the listing, and whether a closing fence is its last."""
    for index in range(at + 1, len(lines)):
        if _closes(lines[index], fence):
            return index + 1, True
    return len(lines), False


def _code(lines: Sequence[Line], *, closed: bool) -> Iterator[Block]:
    """A listing: whole with its line breaks where it fits, else line by line. Its span includes the fences."""
    body = [line for line in (lines[1:-1] if closed else lines[1:]) if not line.blank]
    if not body:
        yield from [_block(prose([lines[0]], strip_marks))] if any(map(str.isalnum, lines[0].text)) else []
        return
    parts = [Sentence(line.text.strip(), line.start, line.end) for line in body]
    parts[0] = Sentence(parts[0].text, lines[0].start, parts[0].end)
    whole = Sentence("\n".join(line.text.rstrip() for line in body).strip(), lines[0].start, lines[-1].end)
    yield Block(tuple(parts), whole=whole)


def _starts_table(lines: Sequence[Line], at: int) -> bool:
    if at + 1 >= len(lines) or "|" not in lines[at].text:
        return False
    under = lines[at + 1].text
    return "-" in under and "|" in under and _DELIMITER_ROW.issuperset(under)


def _table_end(lines: Sequence[Line], at: int) -> int:
    end = at + 2
    while end < len(lines) and "|" in lines[end].text:
        end += 1
    return end


def pipe_table(header: Line, body: Sequence[Line]) -> Block:
    """A table whose cells are divided by ``|``; ``body`` are its lines below the header and the rule."""
    names = _cells(header.text)
    filled = [line for line in body if any(map(str.isalnum, line.text))]
    return rows([header], names, [([line], _cells(line.text)) for line in filled])


def _cells(text: str) -> list[str]:
    shown = text.strip()
    inner = shown.removeprefix("|").removesuffix("|")
    return [" ".join(strip_marks(cell).text.split()) for cell in _PIPE.split(inner)]


def _list_end(lines: Sequence[Line], at: int) -> int:
    end = at + 1
    while end < len(lines) and (_ITEM.match(lines[end].text) or not _interrupts(lines, end)):
        end += 1
    return end


def _list(lines: Sequence[Line]) -> Block:
    starts = [index for index, line in enumerate(lines) if _ITEM.match(line.text)]
    sentences: list[Sentence] = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        sentences += item([_without_bullet(lines[start]), *lines[start + 1 : end]], strip_marks)
    return Block(tuple(sentences))


def _without_bullet(line: Line) -> Line:
    """Bullets go; the number of a step stays, it may be what is asked for."""
    match = _ITEM.match(line.text)
    return line.after(match.end()) if match and match["bullet"] else line


def _quote_end(lines: Sequence[Line], at: int) -> int:
    end = at + 1
    while end < len(lines) and _QUOTE.match(lines[end].text):
        end += 1
    return end


def _unquoted(line: Line) -> Line:
    match = _QUOTE.match(line.text)
    return line.after(match.end()) if match else line


def _interrupts(lines: Sequence[Line], at: int) -> bool:
    """Whether a paragraph cannot go on with this line."""
    text = lines[at].text
    return (
        lines[at].blank
        or _is_rule(text)
        or any(pattern.match(text) for pattern in _INTERRUPTING)
        or _starts_table(lines, at)
    )


def _paragraph_end(lines: Sequence[Line], at: int, *, quoted: bool) -> int:
    end = at + 1
    while end < len(lines) and not _interrupts(lines, end):
        if not quoted and (_QUOTE.match(lines[end].text) or _setext_level(lines, end)):
            break
        end += 1
    return end
