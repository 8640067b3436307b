"""Verification: what stands on the evidence, what does not, and that no changed digit ever passes."""

import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edged.rag.verify import unsupported_words, verify

STANDS = [
    # numbers and their spellings
    ("It is 5 bar.", "max. 5 bar"),
    ("2.0 bar", "2 bar"),
    ("2 bar", "2.00 bar"),
    ("1,500 rpm", "1500 rpm"),
    ("1500 rpm", "1 500 rpm"),
    ("1500 rpm", "1'500 rpm"),
    ("10 000 h", "10,000 hours"),
    ("3,5 bar", "3.5 bar"),
    ("+5 °C", "5 °C"),
    ("-10 °C", "−10 to +50 °C"),
    ("minus 10 °C", "-10 °C"),
    (".5 mm", "0.5 mm"),
    ("seven bar", "7 bar"),
    ("12 bolts", "twelve bolts"),
    ("twenty-five seconds", "25 s"),
    ("forty one mm", "41 mm"),
    ("two hundred hours", "200 h"),
    ("a thousand hours", "1,000 h"),
    ("1.5 million cycles", "1,500,000 cycles"),
    ("the 2nd valve", "valve 2"),
    ("1990s", "in 1990"),
    ("3x", "3 times"),
    # the word "one", list numbers and marks of citation are no claims
    ("Only one of them.", "All."),
    ("1. Open it.\n2) Close it.\n  (3) Wait.", "Open, close, wait."),
    ("- 4. Open it.", "Open it."),
    ("Open it [1]. Close it [2, 3].", "Open it. Close it."),
    # no unit in the answer: any unit will do
    ("The limit is 5.", "5 psi"),
    ("5 bolts", "5 screws"),
    # units
    ("80 degrees Celsius", "80 °C"),
    ("80 °C", "80C"),
    ("80 deg C", "80 ℃"),
    ("80 degrees", "80 °C"),
    ("5-bar", "5 bar"),
    ("5bar", "5 BAR"),
    ("0.4 MPa", "0.4 megapascal"),
    ("12 l/min", "12 litres per minute"),
    ("12 L/min", "12 liters/minute"),
    ("900 rpm", "900 r/min"),
    ("900 revolutions per minute", "900 min⁻¹"),
    ("24 V", "24V"),
    ("24 V", "24 VDC"),
    ("24 V DC", "24 VDC"),
    ("5 kV and 3 mV", "5kV, 3mV"),
    ("2 amps", "2 A"),
    ("15 milliamps", "15 mA"),
    ("3 kilowatts", "3 kW"),
    ("50 hertz", "50 Hz"),
    ("50 percent", "50%"),
    ("50 %", "50 per cent"),
    ("5 Nm", "5 N·m"),
    ("5 newton metres", "5 N m"),
    ("2 hours", "2 hrs"),
    ("10 minutes", "10 min"),
    ("30 sec", "30 s"),
    ("7 days", "7 day"),
    ("4 kilograms", "4 kg"),
    ("3 m³/h", "3 m3/h"),
    ("3 m/s", "3 metres per second"),
    ("5 kΩ", "5 kohm"),
    ("10 bar", "10 barg"),
    ("运行 5 分钟", "5 min"),
    ("压力5bar", "5 巴"),
    # ranges carry their unit
    ("4-20 mA", "4–20mA"),
    ("4 mA to 20 mA", "4...20 mA"),
    ("10 to 12 bar", "from 10 bar to 12 bar"),
    ("between 10 and 12 bar", "10-12 bar"),
    ("10 bar", "10 or 12 bar"),
    ("10 mm", "10 x 20 mm"),
    ("10x20 mm", "10 × 20 mm"),
    # units in labels and fields
    ("5 bar", "Pressure (bar): 5; Temperature: 80"),
    ("5.2 bar", '{"pressure_bar": 5.2}'),
    ("81 °C", '{"temp_c": 81}'),
    ("81 °C", '{"value": 81, "unit": "C"}'),
    # dates and times
    ("12 May 2024", "2024-05-12 in May"),
    ("2024-05-12 at 10:30", "2024-05-12T10:30:00Z"),
    # codes
    ("E217", "E-217"),
    ("e-217", "fault E 217"),
    ("E 217", "E-217."),
    ("error 217", "E-217"),
    ("PX40/2", "px40-2"),
    ("F07", "F07/F08"),
    ("RS 485", "RS-485"),
    ("ISO-9001", "ISO 9001"),
    ("IP67 and M8", "M8, IP67"),
    ("v1.2.3", "V1.2.3"),
    ("1.2.3", "version 1.2.3."),
    ("H2O", "H2O"),
    ("Type-2 plug", "type 2"),
    ("No numbers at all.", ""),
]

FALLS = [
    ("5 bar", "6 bar", ["5 bar"]),
    ("5 bar", "5 psi", ["5 bar"]),
    ("5 bar", "5", ["5 bar"]),
    ("5 bar", "15 bar or 50 bar or 5.1 bar", ["5 bar"]),
    ("5 MPa", "5 kPa", ["5 MPa"]),
    ("5 A", "5 mA", ["5 A"]),
    ("5 mW", "5 MW", ["5 mW"]),
    ("5 m", "5 min", ["5 m"]),
    ("5 l/min", "5 l/h", ["5 l/min"]),
    ("24 VAC", "24 VDC", ["24 VAC"]),
    ("24 VDC", "24 V", ["24 VDC"]),
    ("10 °C", "-10 °C", ["10 °C"]),
    ("-10 °C", "10 °C", ["-10 °C"]),
    ("seven bar", "8 bar", ["7 bar"]),
    ("4-20 mA", "0-20 mA", ["4 mA"]),
    ("10 to 12 psi", "10 to 12 bar", ["10 psi", "12 psi"]),
    ("1,500 rpm", "150 rpm", ["1,500 rpm"]),
    ("E-218", "E-217", ["E-218"]),
    ("E-21", "E-217", ["E-21"]),
    ("E-217", "F-217", ["E-217"]),
    ("error 218", "E-217", ["218"]),
    ("PX402", "PX40/2", ["PX402"]),
    ("1.2.4", "1.2.3", ["1.2.4"]),
    ("E-9 at 7 bar, 7 bar", "nothing", ["E-9", "7 bar"]),
    ("Wait 3 hours.", "", ["3 h"]),
]


@pytest.mark.parametrize(("answer", "evidence"), STANDS)
def test_stands(answer: str, evidence: str) -> None:
    """Equal numbers, units and codes are recognised in every spelling."""
    assert verify(answer, [evidence]) == []


@pytest.mark.parametrize(("answer", "evidence", "unsupported"), FALLS)
def test_falls(answer: str, evidence: str, unsupported: list[str]) -> None:
    """Another number, unit, sign or code is named as unsupported."""
    assert verify(answer, [evidence]) == unsupported


def test_evidence_is_taken_together() -> None:
    """Each claim may stand on another text, the event's among them."""
    assert verify("81 °C is above 80 °C (E-217).", ["limit 80 °C", "E-217", "reading 81 °C"]) == []


SENTENCES = st.sampled_from(
    [text for stand in STANDS for text in stand if "\n" not in text and text[:1] not in "-("]
    + [text for answer, evidence, _ in FALLS for text in (answer, evidence)]
).filter(bool)


@given(st.lists(SENTENCES, min_size=1, max_size=5), st.integers(0, 4))
def test_a_sentence_of_the_evidence_always_stands(sentences: list[str], at: int) -> None:
    """Whatever is quoted as it is verifies."""
    evidence = " ".join(f"{sentence.rstrip('.')}." for sentence in sentences)
    assert verify(f"{sentences[at % len(sentences)].rstrip('.')}.", [evidence]) == []


@given(st.text(alphabet="aE1 20.,-/–x%°C bar\nmV(:)_", max_size=60))
def test_any_line_quoted_whole_stands(text: str) -> None:
    """An answer that equals the evidence verifies, however odd it looks."""
    assert verify(text, [text]) == []


@given(
    st.lists(st.integers(0, 99_999), min_size=1, max_size=4, unique=True),
    st.sampled_from(["bar", "°C", "rpm", "mA", "%", "bolts", "l/min"]),
    st.data(),
)
def test_a_changed_digit_never_stands(values: list[int], unit: str, data: st.DataObject) -> None:
    """A number of which one digit was changed to something that the evidence does not hold is refused."""
    evidence = [f"Value {index} is {value} {unit}." for index, value in zip("abcd", values, strict=False)]
    digits = list(str(data.draw(st.sampled_from(values))))
    place = data.draw(st.integers(0, len(digits) - 1))
    digits[place] = data.draw(st.sampled_from("0123456789"))
    changed = "".join(digits)
    assume(int(changed) not in values)
    assert verify(f"Value a is {changed} {unit}.", evidence) != []
    assert verify(f"Code E-{changed}.", [text.replace("is ", "is E-") for text in evidence]) != []


@given(st.text(max_size=200), st.lists(st.text(max_size=100), max_size=3))
def test_any_text_is_read_without_error(answer: str, evidence: list[str]) -> None:
    """Whatever a model says, the check answers."""
    assert all(re.search(r"\d", token) for token in verify(answer, evidence))


@pytest.mark.parametrize("pattern", ["1,234", "1", "1-", "a1-", "1 ", "E", "5 bar to ", "_bar:", "twenty ", ".", "1."])
def test_time_grows_linearly(pattern: str) -> None:
    """A long answer of one pattern costs no more than its length."""
    text = pattern * (20_000 // len(pattern))
    started = time.process_time()
    verify(text, ["5 bar"])
    verify("5 bar", [text])
    assert time.process_time() - started < 5


def test_unsupported_words_counts_inventions() -> None:
    """Stop words, endings and the question's words are no inventions; unknown content words are."""
    evidence = ["The pump overheats when the filter is blocked.", "Why does the pump stop?"]
    assert unsupported_words("The pumps stopped because a filter blocks.", evidence) == 0.0
    assert unsupported_words("The pump exploded.", evidence) == 0.5
    assert unsupported_words("It is.", evidence) == 0.0
