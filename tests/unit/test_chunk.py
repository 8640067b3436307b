"""Chunking: blocks, headings, tables and offsets of Markdown and plain text, and its bounds on any text."""

import itertools
import time
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.chunk import chunk_document
from edged.rag.sentences import count_words
from edged.types import Chunk

Format = Literal["markdown", "text"]
FORMATS: tuple[Format, ...] = ("markdown", "text")


def markdown(text: str) -> list[str]:
    return [sentence.text for chunk in chunk_document(text, "markdown") for sentence in chunk.sentences]


def plain(text: str) -> list[str]:
    return [sentence.text for chunk in chunk_document(text, "text") for sentence in chunk.sentences]


def paths(chunks: list[Chunk]) -> list[tuple[str, ...]]:
    return [chunk.headings for chunk in chunks]


def test_chunks_stay_under_their_heading_path() -> None:
    """ATX and setext headings nest by level, and each chunk carries its path."""
    text = "Top\n===\na.\n\n## Second ##\nb.\n### **Third**\nc.\n\nSibling\n-------\nd.\n"
    chunks = chunk_document(text, "markdown")
    assert paths(chunks) == [("Top",), ("Top", "Second"), ("Top", "Second", "Third"), ("Top", "Sibling")]
    assert [chunk.ordinal for chunk in chunks] == [0, 1, 2, 3]


def test_a_heading_without_body_makes_no_chunk() -> None:
    """Empty sections and documents of headings alone leave nothing behind."""
    assert chunk_document("# A\n## B\n", "markdown") == []
    assert paths(chunk_document("# A\n## B\n# C\ntext", "markdown")) == [("C",)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("text", ["", " \n\t\n", "---\n\n***\n"])
def test_nothing_to_read_gives_no_chunks(text: str, kind: Format) -> None:
    """Empty documents, blank ones and bare rules give an empty list."""
    assert chunk_document(text, kind) == []


def test_markdown_tables_become_rows_that_read_alone() -> None:
    """A row repeats the names of its columns, skips empty cells and loses its marks."""
    text = "| Code | Meaning |\n|---|:-:|\n| E-217 | *hot* \\| dry |\n| E-218 | |\n"
    chunk = chunk_document(text, "markdown")[0]
    assert [row.text for row in chunk.sentences] == ["Code: E-217; Meaning: hot | dry", "Code: E-218"]
    second = chunk.sentences[1]
    assert text[second.start : second.end] == "| E-218 | |"


def test_list_items_are_sentences_and_steps_keep_their_number() -> None:
    """Bullets go, numbers stay, continuation lines join their item, nesting flattens."""
    text = "- one\n  goes on. Still.\n- two\n  1. Open it.\n  2) Close it.\n"
    assert markdown(text) == ["one goes on. Still.", "two", "1. Open it.", "2) Close it."]
    assert plain(text) == markdown(text)


def test_a_long_list_item_is_cut_into_its_sentences() -> None:
    """An item of more than sixty words is no unit any more."""
    assert len(markdown("- " + "Seven words are in this one sentence. " * 12)) == 12


def test_code_stays_whole_with_its_line_breaks() -> None:
    """A listing is one sentence whose span includes the fences; headings inside it are code."""
    text = "```sh\n# comment\n\nedged check\n```\n"
    (chunk,) = chunk_document(text, "markdown")
    assert [sentence.text for sentence in chunk.sentences] == ["# comment\nedged check"]
    assert text[chunk.start : chunk.end] == text.rstrip()


def test_code_that_does_not_fit_is_cut_between_lines() -> None:
    """A listing longer than a chunk goes by lines."""
    chunks = chunk_document("```\n" + "a b c d e f\n" * 20 + "```\n", "markdown", max_words=30)
    assert [len(chunk.sentences) for chunk in chunks] == [5, 5, 5, 5]


def test_an_unclosed_fence_runs_to_the_end() -> None:
    """As in CommonMark, nothing of it is lost."""
    assert markdown("text\n~~~\ncode") == ["text", "code"]


@pytest.mark.parametrize(
    ("marked", "shown"),
    [
        ("A **bold** and *light* and __strong__ word.", "A bold and light and strong word."),
        ("See [the manual](http://x.y/a_(b)) now.", "See the manual now."),
        ("Mail <mailto:a@b.c> or ![logo](l.png) it.", "Mail mailto:a@b.c or logo it."),
        ("Run `edged --all` twice.", "Run edged --all twice."),
        ("Keep snake_case_names and 2 * 3 * 4.", "Keep snake_case_names and 2 * 3 * 4."),
        (r"A \*literal\* star.", "A *literal* star."),
        ("Below 5 &lt; 6 &deg;C.<br>Next.", "Below 5 < 6 °C. Next."),
        ("H<sub>2</sub>O is <!-- note --> wet.", "H2O is wet."),
        ("If a <5 bar and b >3 bar.", "If a <5 bar and b >3 bar."),
    ],
)
def test_inline_marks_are_not_part_of_the_text(marked: str, shown: str) -> None:
    """Emphasis, links, code marks, tags, escapes and entities read as shown."""
    assert " ".join(markdown(marked)) == shown


def test_quotations_are_paragraphs_without_their_marks() -> None:
    """Quoted lines join, deeper marks go, a quoted heading opens no section."""
    chunks = chunk_document("> # Note\n> Do not\n>> open it.\n\nAfter.", "markdown")
    assert paths(chunks) == [()]
    assert [sentence.text for sentence in chunks[0].sentences] == ["Note", "Do not open it.", "After."]


def test_offsets_lead_back_to_the_source_through_marks_and_prefixes() -> None:
    """A sentence's span frames its source, marks included where they lie inside."""
    text = "# T\n\n> One **two**\n> three. Four [five](http://u.v).\n"
    first, second = chunk_document(text, "markdown")[0].sentences
    assert text[first.start : first.end] == "One **two**\n> three."
    assert text[second.start : second.end] == "Four [five](http://u.v)."


def test_plain_headings_are_underlined_capitals_or_numbered() -> None:
    """Every convention opens a section below the one that stood around it."""
    text = (
        "Manual\n======\nintro\n\nPUMP SAFETY\n\nRead this.\n\n3 Faults\nf\n\n3.2 Fault codes\ng\n\n"
        "3.3. Alarms\n\nh\n\n4 Service\ni\n"
    )
    assert paths(chunk_document(text, "text")) == [
        ("Manual",),
        ("Manual", "PUMP SAFETY"),
        ("Manual", "PUMP SAFETY", "3 Faults"),
        ("Manual", "PUMP SAFETY", "3 Faults", "3.2 Fault codes"),
        ("Manual", "PUMP SAFETY", "3 Faults", "3.3. Alarms"),
        ("Manual", "PUMP SAFETY", "4 Service"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "TURN OFF THE POWER.\nThen wait.",
        "text before\nNOT A HEADING\ntext",
        "1. Open the valve.\n2. Close it.",
        "24 V is needed here\nalways",
        "LAST LINE",
        "E-217\nPump too hot.",
    ],
)
def test_plain_lines_that_are_no_headings(text: str) -> None:
    """Sentences in capitals, list steps, values and a line with nothing below stay text."""
    assert paths(chunk_document(text, "text")) == [()]


def test_plain_aligned_columns_become_rows() -> None:
    """Columns are found by alignment, wrapped cells join their row, numbers may align right."""
    text = (
        "Limits:\n"
        "Code    Meaning           Limit\n"
        "-----   ---------------   -----\n"
        "E-217   Pump overheated      80\n"
        "        for too long\n"
        "E-218   Dry run               5\n"
        "\nDone."
    )
    assert plain(text) == [
        "Limits:",
        "Code: E-217; Meaning: Pump overheated for too long; Limit: 80",
        "Code: E-218; Meaning: Dry run; Limit: 5",
        "Done.",
    ]


def test_plain_tables_by_tabs_and_by_bars() -> None:
    """Tab-separated and barred tables need no alignment."""
    assert plain("Name\tMin\tMax\npressure\t2\t10\n") == ["Name: pressure; Min: 2; Max: 10"]
    assert plain("| A | B |\n+---+---+\n| x | y |\n") == ["A: x; B: y"]


def test_plain_table_without_names_keeps_its_rows() -> None:
    """Where the first line is data, rows stand without names."""
    assert plain("E1  hot   2\nE2  cold  3\n") == ["E1; hot; 2", "E2; cold; 3"]


def test_two_spaces_behind_a_full_stop_are_no_column() -> None:
    """Typists' spacing stays prose."""
    assert plain("It is on.  It runs.\nIt is up.  It stops.") == ["It is on.", "It runs.", "It is up.", "It stops."]


def test_small_blocks_merge_and_large_ones_are_cut_evenly() -> None:
    """Neighbours share a chunk up to the limit; a paragraph over it comes in even parts."""
    small = "\n\n".join(["Five words are in here."] * 10)
    assert [len(chunk.sentences) for chunk in chunk_document(small, "markdown", max_words=25)] == [5, 5]
    large = "Five words are in here. " * 8
    assert [len(chunk.sentences) for chunk in chunk_document(large, "markdown", max_words=35)] == [4, 4]


def test_an_introduction_stays_with_its_list() -> None:
    """A line that ends in a colon goes where the list below it goes."""
    text = "Ten words stand here to fill the first chunk up.\n\nCauses are:\n\n- air in it\n- worn seal\n"
    chunks = chunk_document(text, "markdown", max_words=12)
    assert [sentence.text for sentence in chunks[1].sentences] == ["Causes are:", "air in it", "worn seal"]


def test_overlap_repeats_the_end_of_the_chunk_before() -> None:
    """The last sentences come again where they fit, never across headings."""
    text = "# A\n" + " ".join(f"Sentence number {number} here." for number in range(6)) + "\n# B\nOther."
    chunks = chunk_document(text, "markdown", max_words=24, overlap_sentences=1)
    assert chunks[1].sentences[0] == chunks[0].sentences[-1]
    assert [sentence.text for sentence in chunks[-1].sentences] == ["Other."]


PIECES = st.sampled_from(
    """# |## |===|---|```|~~~|- |1. |> |\\||a \\| b|\\|--\\|--\\||  |    |\t|\n|\n\n|\r\n|word|E-217|泵|。|. |**|_|`
    |[a](b)|![](c1.png)|<br>|&lt;|&#0;|\\\\|NOTE|3.2 |:|ab  cd  ef\n|*|<!--|-->|\x0c|\u2028|[|](|²""".replace(
        "\\|", "¦"
    ).split("|")
).map(lambda piece: piece.replace("¦", "|"))
DOCUMENTS = st.lists(PIECES | st.text(max_size=8), max_size=60).map("".join)


@given(DOCUMENTS, st.sampled_from(FORMATS), st.integers(1, 30))
def test_every_letter_is_in_a_chunk_or_a_heading(text: str, kind: Format, max_words: int) -> None:
    """On any text: no exception, exact order, sizes within the limit, no letter or digit of the body lost."""
    chunks = chunk_document(text, kind, max_words=max_words)
    assert chunks == chunk_document(text, kind, max_words=max_words)
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))
    sentences = [sentence for chunk in chunks for sentence in chunk.sentences]
    for before, after in itertools.pairwise(sentences):
        assert before.start < before.end <= after.start
    for chunk in chunks:
        assert all(sentence.text.strip() for sentence in chunk.sentences)
        assert len(chunk.sentences) == 1 or count_words(chunk.text) <= max_words
    covered = {position for sentence in sentences for position in range(sentence.start, sentence.end)}
    offset = 0
    for line in text.split("\n"):
        lost = [at for at in range(offset, offset + len(line)) if text[at].isalnum() and at not in covered]
        all_of_it = [at for at in range(offset, offset + len(line)) if text[at].isalnum()]
        assert not lost or (lost == all_of_it and may_be_heading(text, line, offset, kind))
        offset += len(line) + 1


def may_be_heading(text: str, line: str, offset: int, kind: Format) -> bool:
    under = text[offset + len(line) + 1 :].split("\n", 1)[0].strip()
    if under and under[0] in "=-~^" and not under.strip(under[0]):
        return True
    shown = line.strip()
    return shown.startswith("#") if kind == "markdown" else shown.isupper() or shown[0].isdigit()


PATTERNS = [
    "[", "[a](", "`", "``a", "*a", "**", "_a_ ", "<", "<!--", "<a ", "&a", "![", "\\", "> ", ">", "- ", "|", "a|",
    "|-", "\n|-|", "a  ", "a  b  c\n", "a\tb\n", "-\n", "#", "# \n", "```\n", "1.", "1. a\n", "=", "A\n\n", "\n", "a. ",
    "x", "泵", "~~~a\n", "a:\n\n", " ",
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_time_grows_linearly(pattern: str, kind: Format) -> None:
    """No pattern, repeated to 250 kB, costs more than a few seconds even on a busy machine."""
    started = time.process_time()
    chunk_document(pattern * (250_000 // len(pattern)), kind)
    assert time.process_time() - started < 5
