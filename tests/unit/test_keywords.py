"""The keyword index finds words, codes and CJK text, and takes any question."""

import sqlite3
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.store.keywords import TERM_LIMIT, codes, index_text, is_code, match_query


class Table:
    """An FTS5 table set up as in knowledge.db, in memory."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:")
        self._connection.execute(
            "CREATE VIRTUAL TABLE entries USING fts5 (text, tokenize = 'porter unicode61 remove_diacritics 2')"
        )

    def add(self, text: str) -> None:
        self._connection.execute("INSERT INTO entries (text) VALUES (?)", (index_text(text),))

    def found(self, question: str) -> list[int]:
        rows = self._connection.execute(
            "SELECT rowid FROM entries WHERE entries MATCH ? ORDER BY bm25(entries)", (match_query(question),)
        )
        return [row[0] for row in rows]

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def table() -> Iterator[Table]:
    table = Table()
    yield table
    table.close()


@pytest.fixture(scope="module")
def shared_table() -> Iterator[Table]:
    """For hypothesis, which runs many examples per fixture; nothing adds to it."""
    table = Table()
    table.add("E-217: low oil pressure. 温度过高")
    yield table
    table.close()


def test_runs_of_chinese_are_indexed_as_overlapping_pairs() -> None:
    assert index_text("温度传感器").split() == ["温度", "度传", "传感", "感器"]


def test_pairs_keep_apart_from_the_letters_around_them() -> None:
    assert index_text("泵P-101过热").split() == ["泵", "P-101", "过热"]


def test_text_without_chinese_japanese_or_korean_is_indexed_unchanged() -> None:
    text = 'Füllstand:\t4-20mA, "E-217" — при 80 °C\n'
    assert index_text(text) == text


@pytest.mark.parametrize("text", ["サーボモーター", "온도센서", "時々", "𠀀𠀁𠀂"])
def test_kana_hangul_and_rare_han_are_paired_too(text: str) -> None:
    assert index_text(text).split() == [text[start : start + 2] for start in range(len(text) - 1)]


def test_every_telling_word_is_an_alternative() -> None:
    assert match_query("What is the oil pressure of the pump?") == '"oil" OR "pressure" OR "pump"'


def test_stop_words_count_when_there_is_nothing_else() -> None:
    assert match_query("What is it?") == '"What" OR "is" OR "it"'


@pytest.mark.parametrize("question", ["", "   ", "?!…", "_", '"', "\x00", "\ud800"])
def test_a_question_without_words_finds_nothing(question: str, table: Table) -> None:
    table.add("anything at all")
    assert table.found(question) == []


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("E-217", '"E 217"'),
        ("PX.40/2", '"PX 40 2"'),
        ("4-20mA", '"4 20mA"'),
        ("E\u2011217", '"E 217"'),
        ("ERR_17", '"ERR 17"'),
        ("10,000", '"10 000"'),
    ],
)
def test_a_code_becomes_one_phrase_of_its_pieces(word: str, phrase: str) -> None:
    assert match_query(f"meaning of {word}?") == f'"meaning" OR {phrase}'


def test_a_code_finds_itself_and_not_its_relatives(table: Table) -> None:
    for text in ("E-217 low oil", "E-218 hot oil", "see page 217", "E 7-217", "valve PX.40/25", "valve PX.40/2"):
        table.add(text)
    assert table.found("E-217") == [1]
    assert table.found("PX.40/2") == [6]


def test_a_compound_without_digits_finds_its_parts_too(table: Table) -> None:
    table.add("the temperature rises")
    table.add("temperature and pressure")
    table.add("the valve")
    assert sorted(table.found("temperature/pressure")) == [1, 2]


def test_operators_of_the_query_language_are_plain_words(table: Table) -> None:
    table.add("a near miss")
    assert table.found('NEAR(x y) AND NOT "z" ^a* text:near') == [1]


def test_inflected_and_accented_words_are_found(table: Table) -> None:
    table.add("Replacing the Drücker")
    assert table.found("replace") == [1]
    assert table.found("Dru\u0308cker") == [1]


def test_chinese_is_found_without_spaces(table: Table) -> None:
    table.add("轴承温度报警设定在85°C")
    table.add("振动报警")
    assert table.found("轴承的温度是多少?") == [1]


def test_a_lone_chinese_character_is_found_as_the_beginning_of_a_pair(table: Table) -> None:
    table.add("泵已停机")
    assert table.found("泵 ?") == [1]


def test_repeated_words_are_asked_once() -> None:
    assert match_query("pump pump pump") == '"pump"'


def test_a_very_long_question_is_cut_to_the_first_terms(table: Table) -> None:
    query = match_query(" ".join(f"word{number}" for number in range(10_000)))
    assert query.count(" OR ") == TERM_LIMIT - 1
    table.add("word3")
    assert table.found(" ".join(f"word{number}" for number in range(10_000))) == [1]


@pytest.mark.parametrize("word", ["E-217", "E217", "PX.40/2", "4-20mA", "M16", "2024-11", "ISO9001", "ERR_17"])
def test_digits_with_a_letter_or_an_inner_dash_are_a_code(word: str) -> None:
    assert is_code(word)


@pytest.mark.parametrize("word", ["217", "3.5", "-5", "pump", "on-site", "m²", "85度", ""])
def test_plain_numbers_and_plain_words_are_no_codes(word: str) -> None:
    assert not is_code(word)


def test_codes_are_listed_once_in_order_as_they_are_spelt() -> None:
    assert codes("Does (E-217) or PF-08 follow e.g. E-217 after 30 seconds?") == ("E-217", "PF-08")


_QUESTIONS = st.text() | st.text(alphabet="\"'*^:()-+{}. _\x00ANDORTNEARé温度7Ee\u0301\u2011,/")


@given(question=_QUESTIONS)
def test_any_question_is_a_valid_query(shared_table: Table, question: str) -> None:
    shared_table.found(question)


@given(text=_QUESTIONS)
def test_indexing_only_adds_spaces_and_repeats_paired_characters(text: str) -> None:
    assert set(index_text(text)) <= set(text) | {" "}


@given(
    word=st.from_regex(r"[A-Z]{1,3}-[0-9]{2,4}", fullmatch=True), before=st.sampled_from(["", "温度", "alarm ", "("])
)
def test_any_fault_code_in_a_text_is_found_by_its_name(word: str, before: str) -> None:
    table = Table()
    try:
        table.add(f"{before}{word}: stop the pump")
        assert table.found(f"what does {word} mean?") == [1]
    finally:
        table.close()
