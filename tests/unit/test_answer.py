"""Which sentences stand in for an answer that may not be given."""

from edged.rag.answer import about_the_codes
from edged.types import Citation


def cited(*texts: str) -> tuple[Citation, ...]:
    return tuple(
        Citation(
            sentence_id=f"1.{index}",
            chunk_id=1,
            document_id="d",
            title="t",
            headings=(),
            text=text,
            start=0,
            end=1,
        )
        for index, text in enumerate(texts)
    )


def test_sentences_that_name_the_code_asked_about_stand_before_those_of_its_neighbours() -> None:
    shown = cited("Fault PF-08 on the CP-250 means dry running.", "Fault PF-21 on the CP-250 reports leakage.")
    assert about_the_codes("What does fault PF-21 on the CP-250 report?", shown) == shown[1:]


def test_a_question_without_codes_keeps_all_sentences() -> None:
    shown = cited("The valve opens at 12 bar.", "The pump holds 4 litres.")
    assert about_the_codes("When does the valve open?", shown) == shown
    assert about_the_codes("When does the valve open?", ()) == ()
