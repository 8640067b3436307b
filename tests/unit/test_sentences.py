"""Sentence splitting: where it cuts, where it must not, and that offsets are exact."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.sentences import LONGEST_SENTENCE_WORDS, count_words, split


def texts(text: str) -> list[str]:
    return [sentence.text for sentence in split(text)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["The pump runs.", "The valve is open."],
        ["Use a seal, e.g. NBR or i.e. rubber.", "Then close it."],
        ["See Fig. 3 and No. 7 in Sec. 2.1 for details.", "Stop."],
        ["It takes approx. 10 minutes.", "Ask Dr. Miller."],
        ["Pressure is max. 10 bar at min. 5 °C.", "Do not exceed it."],
        ["That is the max. ", "Then stop."],
        ["It was made in the U.S. Army workshop by J. R. Smith.", "It works."],
        ["It is sold in the U.S.", "The warranty holds."],
        ["Is it sold in the U.S. at all?", "No.", "It is not."],
        ["Set 3.5 bar.", "Version 1.2.3 needs v2.0."],
        ["The fuse has 16 A.", "Replace it at 24 V.", "Check again."],
        ["Wait... then go on.", "Wait...", "Then go on."],
        ["He said “Stop.”", "Then (it was late.)", "The end!", "Really?", "Yes."],
        ["“Stop!” he said.", "Is it on?"],
        ["1. Open the valve.", "2. Close it."],
        ["Contact support@example.com or www.example.com/a.html now.", "Thanks."],
        ["Bolts, nuts, etc. are included.", "Bolts, nuts, etc.", "Nothing else."],
        ["The rate fell.[12]", "It rose later.[3][4]", "End."],
        ["**Bold end.**", "Next one."],
        ["What?!", "Yes!"],
        ["It opens at 6 a.m. and closes at 5 p.m.", "The gate is locked."],
    ],
)
def test_english_is_cut_where_sentences_end(sentences: list[str]) -> None:
    """Joined by spaces, the sentences come apart again at the same places."""
    assert texts(" ".join(sentences)) == [sentence.strip() for sentence in sentences]


def test_chinese_and_japanese_marks_end_sentences_without_spaces() -> None:
    """Full-width marks cut, with a closing quote kept on the left."""
    assert texts("泵过热。检查冷却！好吗？“是。”完") == ["泵过热。", "检查冷却！", "好吗？", "“是。”", "完"]


def test_line_breaks_inside_a_sentence_become_one_space() -> None:
    """A sentence over two lines reads as one, and its offsets still frame the source."""
    source = "  The pump\n   runs\r\nhot. Stop it."
    first, second = split(source, offset=100)
    assert first.text == "The pump runs hot."
    assert source[first.start - 100 : first.end - 100] == "The pump\n   runs\r\nhot."
    assert second.text == "Stop it."


def test_a_blank_line_ends_a_sentence() -> None:
    """Two paragraphs without full stops stay two sentences."""
    assert texts("No full stop\n \nAnother one") == ["No full stop", "Another one"]


def test_very_long_sentences_are_cut_at_a_semicolon_before_a_comma() -> None:
    """A sentence of 84 words with both comes apart at its semicolon."""
    first = "word " * 20 + "word, " + "word " * 20 + "word;"
    second = "word " * 40 + "word."
    assert texts(f"{first} {second}") == [first, second]


def test_long_chinese_sentences_are_cut_at_a_comma() -> None:
    """150 characters without a full stop come apart at the full-width comma."""
    source = "泵" * 70 + "，" + "阀" * 80 + "。"
    assert texts(source) == ["泵" * 70 + "，", "阀" * 80 + "。"]


def test_text_without_any_punctuation_is_still_bounded() -> None:
    """A dump of words never becomes one endless sentence."""
    assert max(count_words(text) for text in texts("word " * 5000)) <= 2 * LONGEST_SENTENCE_WORDS
    assert max(len(text) for text in texts("x" * 100_000)) < 10_000


def test_empty_and_blank_text_have_no_sentences() -> None:
    """Nothing in, nothing out."""
    assert split("") == split(" \n\t ") == []


ANY_TEXT = st.text(
    alphabet=st.sampled_from("aB1 \n.!?,;:…。！？，”\")([]*'-泵\x85\xa0U") | st.characters(), max_size=400
)


@given(ANY_TEXT, st.integers(0, 9))
def test_spans_are_ordered_complete_and_exact(text: str, offset: int) -> None:
    """Spans never overlap, cover every non-space character, and hold exactly the sentence's words."""
    sentences = split(text, offset)
    for before, after in itertools.pairwise(sentences):
        assert before.end <= after.start
    for sentence in sentences:
        assert sentence.text == " ".join(text[sentence.start - offset : sentence.end - offset].split()) != ""
    covered = "".join("".join(sentence.text.split()) for sentence in sentences)
    assert covered == "".join(text.split())


@pytest.mark.parametrize("pattern", ["a. ", ".", ". ", "(", "a, ", "泵", "x", "[1]", "!*", "\n\n", "1. "])
def test_time_grows_linearly(pattern: str) -> None:
    """A megabyte of one repeated pattern is split in about a second."""
    text = pattern * (1_000_000 // len(pattern))
    started = time.process_time()
    split(text)
    assert time.process_time() - started < 6
