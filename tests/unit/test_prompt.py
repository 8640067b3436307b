"""The prompt of an answer."""

from hypothesis import given
from hypothesis import strategies as st

from edged.rag.prompt import SYSTEM, messages
from edged.types import Citation


def fact(text: str) -> Citation:
    return Citation(
        sentence_id="1.0", chunk_id=1, document_id="d", title="Pump", headings=(), text=text, start=0, end=len(text)
    )


FACTS = [fact("The valve opens at 8 bar."), fact("It is replaced every 2 years.")]


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_instruction_comes_first_and_is_the_same_for_every_question(question: str, evidence: str) -> None:
    assert messages(question, FACTS, evidence)[0] == ("system", SYSTEM)


def test_every_fact_stands_before_the_question_in_the_order_shown() -> None:
    _, (role, content) = messages("When does it open?", FACTS)
    assert role == "user"
    places = [content.index(part) for part in (FACTS[0].text, FACTS[1].text, "When does it open?")]
    assert places == sorted(places)
    assert content.endswith("When does it open?")


def test_the_reading_of_an_event_stands_between_facts_and_question() -> None:
    content = messages("Is that high?", FACTS, "pressure 9 bar")[1][1]
    assert content.index(FACTS[1].text) < content.index("pressure 9 bar") < content.index("Is that high?")


def test_without_a_reading_none_is_mentioned() -> None:
    assert "Reading" not in messages("Is that high?", FACTS)[1][1]
