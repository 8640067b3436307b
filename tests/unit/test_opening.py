"""The mark of a list before an answer is left out, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.opening import Opening


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("- The valve opens at 12 bar.", "The valve opens at 12 bar."),
        (" -  The valve - opens.", "The valve - opens."),
        ("The valve.", "The valve."),
        ("- 5 °C", "- 5 °C"),
        ("-  5 °C", "-  5 °C"),
        ("-5 °C", "-5 °C"),
        ("-", ""),
        ("", ""),
    ],
)
def test_the_mark_goes_and_a_sign_stays(said: str, shown: str) -> None:
    assert Opening().feed(said) == shown


@given(st.text(alphabet="- ab5\n", max_size=12), st.data())
def test_it_is_the_same_in_any_pieces(said: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=4)))
    opening = Opening()
    pieces = [said[start:end] for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    assert "".join(opening.feed(piece) for piece in pieces) == Opening().feed(said)
