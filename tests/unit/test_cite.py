"""Which sentences an answer stands on, and which answers do not stand."""

import pytest

from edged.rag.cite import as_text, check, citation, supporting
from edged.types import Citation, Passage, Sentence

FAULT = "Fault E-217 on the RS-75 compressor means that the discharge temperature has exceeded 110 °C."
OTHER_FAULT = "Fault E-271 on the RS-75 compressor means that the oil separator element is saturated."
OIL = "The oil of the RS-75 compressor is changed every 4000 operating hours or once a year."
ROW = "Code: E-217; Meaning: Discharge temperature above 110 °C; Action: Top up oil, clean the cooler"
ASKED = "What does fault E-217 on the RS-75 compressor mean?"


def shown(*texts: str) -> tuple[Citation, ...]:
    passage = Passage(
        7, "rs-75.md", "RS-75 compressor", ("Fault codes",), tuple(Sentence(text, 0, len(text)) for text in texts)
    )
    return tuple(citation(passage, index) for index in range(len(texts)))


def test_a_citation_names_its_chunk_and_the_sentence_in_it() -> None:
    assert [each.sentence_id for each in shown(FAULT, OIL)] == ["7.0", "7.1"]


def test_only_the_sentences_that_hold_the_words_of_the_answer_are_cited() -> None:
    facts = shown(OIL, FAULT, OTHER_FAULT)
    assert supporting("The discharge temperature has exceeded 110 °C.", facts) == [facts[1]]


def test_an_answer_from_two_sentences_cites_both_in_the_order_shown() -> None:
    facts = shown(OIL, FAULT, OTHER_FAULT)
    both = "The discharge temperature has exceeded 110 °C; the oil is changed every 4000 operating hours."
    assert supporting(both, facts) == [facts[0], facts[1]]


@pytest.mark.parametrize("facts", [shown(FAULT, OTHER_FAULT, OIL), shown(OTHER_FAULT, ROW)])
def test_an_answer_in_the_words_of_the_right_sentence_stands(facts: tuple[Citation, ...]) -> None:
    verdict = check(ASKED, "Fault E-217 means that the discharge temperature is above 110 °C.", facts)
    assert verdict.objection == ""
    assert verdict.citations


@pytest.mark.parametrize(
    "answer",
    [
        "Fault E-217 on the RS-75 compressor means that the RS-75 compressor has a faulty fault E-217.",
        "The answer to the question is: fault E-217.",
        "Yes.",
    ],
)
def test_an_answer_that_only_repeats_the_question_does_not_stand(answer: str) -> None:
    assert "repeated the question" in check(ASKED, answer, shown(FAULT, OIL)).objection


def test_an_answer_in_words_of_its_own_does_not_stand() -> None:
    answer = "It is a safety feature of the control module that protects electrical equipment."
    assert "no single sentence" in check(ASKED, answer, shown(FAULT, OIL)).objection


def test_words_gathered_from_many_sentences_do_not_stand() -> None:
    answer = "The saturated separator changed hours; temperature exceeded the year."
    assert "no single sentence" in check(ASKED, answer, shown(FAULT, OTHER_FAULT, OIL)).objection


def test_what_is_said_of_another_code_does_not_stand() -> None:
    answer = "Fault E-217 means that the oil separator element is saturated."
    assert check(ASKED, answer, shown(FAULT, OTHER_FAULT)).objection.endswith("is not about E-217")


def test_what_is_said_of_something_farther_from_the_question_does_not_stand() -> None:
    facts = shown("The pump of the skid is stopped at 32 °C.", "The pump of the skid is greased at 40 °C.")
    answer = "The pump is greased at 40 °C."
    far = {facts[0].sentence_id: 0.8, facts[1].sentence_id: 0.6}
    near = {facts[0].sentence_id: 0.8, facts[1].sentence_id: 0.78}
    assert "not the one" in check("When does the pump of the skid halt?", answer, facts, similarities=far).objection
    assert check("When does the pump of the skid halt?", answer, facts, similarities=near).objection == ""


def test_a_sentence_with_every_word_of_the_question_is_not_too_far_whatever_the_vectors_say() -> None:
    row = "Part number: PX-4410; Description: Seal; Pump: CP-250"
    facts = shown(row, "Part PX-4410 is the mechanical seal of the CP-250 pump.")
    answer = "Part PX-4410 of the CP-250 pump is the mechanical seal."
    vectors = {facts[0].sentence_id: 0.8, facts[1].sentence_id: 0.6}
    assert check("What is part PX-4410 of the CP-250 pump?", answer, facts, similarities=vectors).objection == ""
    assert "not the one" in check("What is the PX-4410 diameter?", answer, facts, similarities=vectors).objection


def test_a_code_of_one_sentence_with_the_words_of_another_does_not_stand() -> None:
    facts = shown(OTHER_FAULT, "Fault E-227 on the RS-75 compressor means that the inlet valve does not close.")
    answer = "Fault E-227 means that the oil separator element is saturated."
    assert "mixed sentences: E-227" in check("What does E-271 on the compressor mean?", answer, facts).objection


def test_an_invented_number_is_named() -> None:
    answer = "The discharge temperature has exceeded 95 °C."
    assert check(ASKED, answer, shown(FAULT)).objection == "not in the cited sentences: 95 °C"


def test_a_number_of_the_question_is_no_evidence_for_itself() -> None:
    assert check("Is it 95 °C?", "The discharge temperature is 95 °C.", shown(FAULT)).objection


def test_a_code_of_the_question_may_be_named_where_the_sentence_leaves_it_out() -> None:
    facts = shown("The return filter element of the power unit lies in the box.")
    answer = "HK-2280 is the return filter element of the power unit."
    assert check("What is the box HK-2280?", answer, facts).objection == ""


def test_a_number_counts_by_its_value_however_many_decimals_are_written() -> None:
    facts = shown("The exhaust valve clearance of the engine is 0.50 mm, the inlet valve's 0.30 mm.")
    asked = "What is the exhaust valve clearance of the engine?"
    assert check(asked, "The exhaust valve clearance of the engine is 0.5 mm.", facts).objection == ""
    assert check(asked, "The exhaust valve clearance of the engine is 0.05 mm.", facts).objection


def test_an_ordinal_of_the_question_is_no_code_that_the_sentence_must_name() -> None:
    facts = shown("The inspection of the 2nd year takes a day.", "After two years the filter of the pump is replaced.")
    answer = "After two years the filter of the pump is replaced."
    assert check("Which filter of the pump is replaced in the 2nd year?", answer, facts).objection == ""


def test_the_reading_of_the_event_is_evidence() -> None:
    answer = "The vibration of the fan is 7.1 mm/s."
    assert check("What is reported?", answer, shown(OIL), "Vibration of the fan: 7.1 mm/s").objection == ""
    assert check("What is reported?", answer, shown(OIL)).objection


def test_saying_nothing_does_not_stand() -> None:
    verdict = check(ASKED, "", shown(FAULT))
    assert (verdict.citations, verdict.objection) == ((), "the model said nothing")


def test_nothing_stands_on_no_sentences() -> None:
    assert check(ASKED, "The oil is low.", ()).objection


def test_table_rows_and_sentences_read_on_from_each_other() -> None:
    text = as_text(shown(ROW, OIL, 'It says "stop."', "温度过高。"))
    assert text == f'{ROW}. {OIL} It says "stop." 温度过高。'


def test_an_answer_drawn_from_a_sentence_about_something_else_does_not_stand() -> None:
    facts = shown("The bearing temperature limit of the pump is 95 °C.", "The motor stops when the fan has failed.")
    verdict = check("What is the bearing temperature limit?", "The motor stops when the fan has failed.", facts)
    assert "not the one that the question is about" in verdict.objection
