"""Token bytes become text: whole characters, no stop strings, however the bytes are cut."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edged.engine.text import TextStream


def read(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    """All text of a stream fed piece by piece, and whether a stop string ended it."""
    stream = TextStream(stop)
    text = "".join([stream.feed(piece) for piece in pieces])
    return text + stream.flush(), stream.stopped


def cut(data: bytes, places: set[int]) -> list[bytes]:
    edges = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


cuts = st.sets(st.integers(0, 40))


@given(st.binary(max_size=40), cuts)
def test_any_cut_of_any_bytes_gives_the_text_of_the_whole(data: bytes, places: set[int]) -> None:
    assert read(cut(data, places)) == (data.decode("utf-8", "replace"), False)


@given(st.text("abcd", max_size=20), st.lists(st.text("abcd", min_size=1, max_size=4), max_size=3), cuts)
@example("abcd", ["bc", "abcd"], {1, 2, 3})
def test_any_cut_gives_the_same_text_before_the_stop_string(text: str, stop: list[str], places: set[int]) -> None:
    whole, stopped = read([text.encode()], tuple(stop))
    assert read(cut(text.encode(), places), tuple(stop)) == (whole, stopped)
    assert stopped == any(each in text for each in stop)
    assert text.startswith(whole)
    assert stopped or whole == text
    assert not any(each in whole for each in stop)


@given(st.text("ab", max_size=20), cuts)
def test_text_that_is_certain_is_not_held_back(text: str, places: set[int]) -> None:
    stream = TextStream(("aab",))
    shown = "".join(stream.feed(piece) for piece in cut(text.encode(), places))
    if not stream.stopped:
        assert text[len(shown) :] in ("", "a", "aa")


def test_a_stop_string_across_tokens_is_never_shown_in_part() -> None:
    stream = TextStream(("<|im_end|>",))
    assert [stream.feed(piece) for piece in (b"Done <", b"|im", b"_end", b"|> more", b"x")] == ["Done ", "", "", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_beginning_that_does_not_become_the_stop_string_is_shown() -> None:
    stream = TextStream(("###",))
    assert stream.feed(b"a ##") == "a "
    assert stream.feed(b" b") == "## b"


def test_the_held_beginning_of_a_stop_string_is_shown_at_the_end() -> None:
    assert read([b"5 <", b"|im"], ("<|im_end|>",)) == ("5 <|im", False)


def test_a_character_cut_by_the_end_becomes_a_replacement_character() -> None:
    stream = TextStream()
    assert stream.feed("20 °".encode()[:-1]) == "20 "
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("stop", [(), ("",)], ids=["none", "empty"])
def test_without_a_stop_string_everything_is_shown_at_once(stop: tuple[str, ...]) -> None:
    assert TextStream(stop).feed(b"abc") == "abc"
