"""Whether an answer stands on its evidence: every number, unit and code in it must occur there.

Small models invent numbers fluently, and a wrong "12 bar" is the most dangerous thing this product could say.
The check is by rule: it refuses a rightful paraphrase now and then, which costs only the generated wording.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal

import msgspec

from edged.rag.terms import content_terms

_SPELLINGS: dict[str, str] = {
    "°C": "°C|C|deg C|deg. C|degree C|degrees C|degree Celsius|degrees Celsius|deg Celsius|Celsius|centigrade|摄氏度",
    "°F": "°F|F|deg F|deg. F|degrees F|degree Fahrenheit|degrees Fahrenheit|Fahrenheit",
    "K": "K|kelvin",
    "deg": "°|deg|degree|degrees|度",
    "bar": "bar|bars|巴",
    "barg": "barg|bar g|bar(g)|bar gauge",
    "bara": "bara|bar a|bar(a)|bar absolute",
    "mbar": "mbar|millibar|millibars",
    "psi": "psi|lbf/in^2|pounds per square inch",
    "psig": "psig",
    "MPa": "MPa|megapascal|megapascals",
    "kPa": "kPa|kilopascal|kilopascals",
    "hPa": "hPa|hectopascal|hectopascals",
    "Pa": "Pa|pascal|pascals",
    "mm": "mm|millimetre|millimetres|millimeter|millimeters|毫米",
    "cm": "cm|centimetre|centimetres|centimeter|centimeters|厘米",
    "km": "km|kilometre|kilometres|kilometer|kilometers|公里",
    "m": "m|metre|metres|meter|meters|米",
    "μm": "μm|um|micron|microns|micrometre|micrometres|micrometer|micrometers",
    "in": "inch|inches",
    "ft": "ft|foot|feet",
    "mi": "mile|miles",
    "mm^2": "mm^2|mm2|sq mm|square millimetres|square millimeters",
    "m^2": "m^2|m2|sq m|square metre|square metres|square meter|square meters",
    "m^3": "m^3|m3|cubic metre|cubic metres|cubic meter|cubic meters",
    "l": "l|L|litre|litres|liter|liters|升",
    "ml": "ml|mL|millilitre|millilitres|milliliter|milliliters",
    "gal": "gal|gallon|gallons",
    "rpm": "rpm|r.p.m.|min^-1|min-1|1/min",
    "rev": "r|rev|revs|revolution|revolutions",
    "mV": "mV|millivolt|millivolts",
    "kV": "kV|kilovolt|kilovolts",
    "V": "V|volt|volts|伏",
    "VDC": "VDC|V DC|Vdc|V d.c.|volts DC",
    "VAC": "VAC|V AC|Vac|V a.c.|volts AC",
    "mA": "mA|milliamp|milliamps|milliampere|milliamperes",
    "A": "A|amp|amps|ampere|amperes|安",
    "Ah": "Ah|amp hours|ampere hours",
    "mAh": "mAh",
    "MW": "MW|megawatt|megawatts",
    "kW": "kW|kilowatt|kilowatts",
    "mW": "mW|milliwatt|milliwatts",
    "W": "W|watt|watts|瓦",
    "kWh": "kWh|kilowatt hour|kilowatt hours|kilowatt-hours",
    "kVA": "kVA",
    "VA": "VA",
    "hp": "hp|horsepower",
    "GHz": "GHz|gigahertz",
    "MHz": "MHz|megahertz",
    "kHz": "kHz|kilohertz",
    "Hz": "Hz|hertz",
    "%": "%|percent|per cent|pct",
    "Nm": "Nm|N·m|N⋅m|N*m|N.m|N m|newton metre|newton metres|newton meter|newton meters|newton-metres",
    "kN": "kN|kilonewton|kilonewtons",
    "N": "N|newton|newtons",
    "kJ": "kJ|kilojoule|kilojoules",
    "J": "J|joule|joules",
    "ms": "ms|msec|millisecond|milliseconds|毫秒",
    "μs": "μs|us|microsecond|microseconds",
    "s": "s|sec|secs|second|seconds|秒",
    "min": "min|mins|minute|minutes|分钟",
    "h": "h|hr|hrs|hour|hours|小时",
    "day": "day|days|天",
    "week": "week|weeks|wk|wks|周",
    "month": "month|months|个月",
    "year": "year|years|yr|yrs|年",
    "kg": "kg|kilogram|kilograms|kilo|kilos|公斤|千克",
    "mg": "mg|milligram|milligrams",
    "g": "g|gram|grams|gramme|grammes|克",
    "t": "t|tonne|tonnes|ton|tons",
    "lb": "lb|lbs|pound|pounds",
    "kΩ": "kΩ|kohm|kilohm|kilohms|kiloohm|kiloohms",
    "MΩ": "MΩ|Mohm|megohm|megohms|megaohm|megaohms",
    "Ω": "Ω|ohm|ohms",
    "dB": "dB|decibel|decibels",
    "ppm": "ppm|parts per million",
    "lux": "lux|lx",
    "GB": "GB|gigabyte|gigabytes",
    "MB": "MB|megabyte|megabytes",
    "kB": "kB|KB|kilobyte|kilobytes",
    "cycle": "cycle|cycles",
}
"""Canonical unit to its spellings."""

_IMPLIED: dict[str, str] = {
    "VDC": "V",
    "VAC": "V",
    "barg": "bar",
    "bara": "bar",
    "psig": "psi",
    "°C": "deg",
    "°F": "deg",
}
"""What evidence in the left unit also supports: "24 VDC" supports "24 V", never the other way."""

_COMPOUNDS = {"rev/min": "rpm", "gpm": "gal/min"}
_EXACT = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split("|")}
# Without case, single letters say nothing ("5 a day"), except that nobody means anything else by "24 v".
_LOWER = {spelling.lower(): unit for spelling, unit in reversed(_EXACT.items()) if len(spelling) > 1} | {"v": "V"}
_WORDS = {
    word: value
    for value, word in enumerate(
        """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen""".split(),  # noqa: SIM905 - counted in order
        start=2,
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)  # noqa: SIM905
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_CODE_NOUNS = frozenset("code error fault alarm warning message no number type model event".split())  # noqa: SIM905


def _alternatives(spellings: Sequence[str]) -> str:
    longest_first = sorted(spellings, key=len, reverse=True)
    return "|".join(re.escape(spelling).replace(r"\ ", r"\s{1,3}") for spelling in longest_first)


_UNIT = f"(?:{_alternatives([*_EXACT, 'gpm', 'lpm'])})(?![A-Za-z0-9μΩ])"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w.)%°-])-)?
    (?P<number>\d{{1,3}}(?:,\d{{3}})++(?:\.\d+)?(?!\d) | (?<![\d,])\d++,\d{{1,2}}(?![\d,]) | \d++(?:\.\d+)?
             | (?<![\d.])\.\d+)
    (?:(?:st|nd|rd|th|x)(?![A-Za-z0-9]))?
    (?:\s{{1,3}}(?P<scale>hundred|thousand|million|billion)(?![A-Za-z]))?
    (?:(?:\s{{0,3}}|-)(?P<unit>{_UNIT})(?:\s?(?:/|per\s)\s?(?P<per>{_UNIT}))?)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_JOINS_RANGE = re.compile(r"\s*(?:-|to|through|and|or|/|\.{2,3}|…|~|x|by|±|\+/-|to\s*\+|-\s*\+)\s*", re.IGNORECASE)
_TOKEN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]++(?:[-/._^][A-Za-z0-9]++)*+")
_VERSION = re.compile(r"v?\d+(?:\.\d+){2,}", re.IGNORECASE)
_WORD_AND_NUMBER = re.compile(r"[A-Za-z][a-z]{2,}[-_]\d[\d.]*s?")
_NUMERIC_PART = re.compile(rf"\d+(?:\.\d+)?(?:st|nd|rd|th|s|x|{_UNIT})?", re.IGNORECASE)
_CODE_PIECE = re.compile(r"[a-z]+|\d+")
_LIST_NUMBER = re.compile(r"^[ \t]*(?:[-*•][ \t]*)?\(?\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
_CITATION = re.compile(r"\[\d{1,3}(?:\s?[,-]\s?\d{1,3})*\]")
_WORD_BEFORE = re.compile(r"([A-Za-z]{1,8})[.:#\s-]{0,3}$")
_UNIT_BEFORE = re.compile(
    rf"""(?:[(\[]\s?(?P<enclosed>{_UNIT})\s?[)\]]|_(?P<suffix>{_UNIT})|[,\s](?P<last>{_UNIT}))["'\s]{{0,3}}[:=]
    (?P<cell>[^;\n:=]{{0,200}})""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT_FIELD = re.compile(rf"""\bunits?["'\s]{{0,3}}[:=]["'\s]{{0,3}}(?P<unit>{_UNIT})""", re.IGNORECASE)
_TENS_WORDS = "|".join(_TENS)
_NUMBER_WORD = re.compile(
    rf"""\b(?:(?P<tens>{_TENS_WORDS})(?:[-\s](?P<ones>one|two|three|four|five|six|seven|eight|nine))?
    | (?P<word>{"|".join(_WORDS)}) | (?:one|an?)(?=\s(?P<round>hundred|thousand|million|billion)\b))\b""",
    re.VERBOSE | re.IGNORECASE,
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("[\u2010-\u2015\u2212\ufe63\uff0d]"), "-"),
    (re.compile(r"(?<=\d)[\u00a0\u2009\u202f'’](?=\d{3}(?!\d))"), ""),
    (re.compile("²"), "^2"),
    (re.compile("³"), "^3"),
    (re.compile("⁻¹"), "^-1"),
)
_REWRITES_AFTER: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<![\w.,-])(\d{1,3}) (?=\d{3}(?![\w.]))"), r"\1"),  # 10 000
    (re.compile(r"(\d{4}-\d\d-\d\d)T(?=\d\d:)"), r"\1 "),
    (re.compile(r"(?<=:\d\d)(\.\d{1,9})?Z\b"), r"\1"),
    (re.compile(r"\bminus\s(?=\d)", re.IGNORECASE), "-"),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?[x×]\s?(?=\d)"), r"\1 x "),
    (re.compile(r"(?<=\d\d\d\d)s\b"), ""),  # the 1990s
)


class Claim(msgspec.Struct, frozen=True):
    """A number as it stands in a text. ``before`` is the text in front of it."""

    text: str
    value: Decimal
    unit: str | None
    before: str = ""


def verify(answer: str, evidence: Sequence[str]) -> list[str]:
    """The numbers (with their unit) and codes of the answer that the evidence does not hold: codes, then numbers.

    ``evidence`` are the cited sentences and the event's text. An empty list means that the answer stands.
    Tokens come as compared: ``seven bar`` is reported as ``7 bar``.
    """
    texts = [_normalised(text) for text in evidence]
    joined = "\n".join(texts).lower()
    held = _held(texts)
    claimed = _LIST_NUMBER.sub(" ", _CITATION.sub(" ", _normalised(answer)))
    codes, remaining = _codes(claimed)
    unsupported = [code for code in codes if not _holds_code(code, joined)]
    unsupported += [
        claim.text for claim in _claims(remaining) if not _holds(claim, held) and not _holds_as_code(claim, joined)
    ]
    return list(dict.fromkeys(unsupported))


def unsupported_words(answer: str, evidence: Sequence[str]) -> float:
    """The share, 0 to 1, of the answer's content words that no evidence text holds.

    For measuring, not for refusing. Give the question as one of the texts: its words are no invention.
    """
    words = content_terms(answer)
    if not words:
        return 0.0
    known = {term for text in evidence for term in content_terms(text)}
    return sum(word not in known for word in words) / len(words)


# --- reading ---------------------------------------------------------------------------------------


def _normalised(text: str) -> str:
    """One spelling of dashes, digits, thousands, number words and products."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    text = _NUMBER_WORD.sub(_number_word, text)
    for pattern, replacement in _REWRITES_AFTER:
        text = pattern.sub(replacement, text)
    return text


def _number_word(match: re.Match[str]) -> str:
    if match["tens"]:
        ones = (match["ones"] or "").lower()
        return str(_TENS[match["tens"].lower()] + (1 if ones == "one" else _WORDS.get(ones, 0)))
    return str(_WORDS[match["word"].lower()]) if match["word"] else "1"


def _codes(text: str) -> tuple[list[str], str]:
    """The codes of a text, and the text with every code blanked out."""
    codes: list[str] = []

    def take(match: re.Match[str]) -> str:
        if not _is_code(match[0]):
            return match[0]
        codes.append(match[0])
        return "\0" * len(match[0])

    return codes, _TOKEN.sub(take, text)


def _is_code(token: str) -> bool:
    """Letters and digits in one token, unless it is a number with its unit, or a version."""
    if _VERSION.fullmatch(token):
        return True
    if token.isdigit() or token.isalpha() or _WORD_AND_NUMBER.fullmatch(token):
        return False
    has_letter = any(character.isalpha() for character in token)
    has_digit = any(character.isdigit() for character in token)
    return has_letter and has_digit and not _is_numeric(token) and _unit(token) is None


def _is_numeric(token: str) -> bool:
    """``24VDC``, ``4-20mA``, ``10-year-old``, ``230V/50Hz``, ``20th``."""
    first, *others = re.split("[-/]", token)
    if _NUMERIC_PART.fullmatch(first) is None:
        return False
    return all(part.isalpha() or _NUMERIC_PART.fullmatch(part) or _unit(part) for part in others)


def _unit(spelling: str | None) -> str | None:
    if spelling is None:
        return None
    shown = " ".join(spelling.split())
    return _EXACT.get(shown) or _LOWER.get(shown.lower())


def _claims(text: str) -> list[Claim]:
    """The numbers of a text with their units; both ends of a range have the unit of the last."""
    claims: list[Claim] = []
    after = len(text)
    following: Claim | None = None
    for match in reversed(list(_NUMBER.finditer(text))):
        claim = _claim(text, match)
        end = match.end() if claim.unit else match.end("scale") if match["scale"] else _end_of_number(match)
        if following is not None and following.unit and not claim.unit and _joins(text[end:after]):
            claim = Claim(f"{claim.text} {following.unit}", claim.value, following.unit, claim.before)
        claims.append(claim)
        following, after = claim, match.start()
    return claims[::-1]


def _joins(between: str) -> bool:
    return _JOINS_RANGE.fullmatch(between) is not None


def _end_of_number(match: re.Match[str]) -> int:
    return match.end() if match["unit"] is None else match.end("number")


def _claim(text: str, match: re.Match[str]) -> Claim:
    shown = match["number"]
    value = Decimal(shown.replace(",", "") if re.search(r",\d{3}", shown) else shown.replace(",", "."))
    value = value * _SCALES[match["scale"].lower()] if match["scale"] else value
    value = -value if match["sign"] else value
    unit = _whole_unit(match)
    name = (match["sign"] or "") + shown + (f" {match['scale']}" if match["scale"] else "")
    return Claim(f"{name} {unit}" if unit else name, value, unit, text[max(0, match.start() - 12) : match.start()])


def _whole_unit(match: re.Match[str]) -> str | None:
    """``l/min`` for "litres per minute"; None where there is none or its case says it is none ("5 a day")."""
    spelled = match["unit"]
    if spelled is not None and spelled.lower() in ("gpm", "lpm"):
        return {"gpm": "gal/min", "lpm": "l/min"}[spelled.lower()]
    unit, per = _unit(spelled), _unit(match["per"])
    if unit is None or per is None:
        return unit
    return _COMPOUNDS.get(f"{unit}/{per}", f"{unit}/{per}")


# --- comparing -------------------------------------------------------------------------------------


def _held(texts: Sequence[str]) -> dict[Decimal, set[str]]:
    """Every number of the evidence with the units it stands with."""
    held: dict[Decimal, set[str]] = {}
    for text in texts:
        _, remaining = _codes(text)
        claims = _claims(remaining)
        field = _UNIT_FIELD.search(text)
        declared = _unit(field["unit"]) if field else None
        for claim in [*claims, *_with_unit_before(remaining)]:
            units = held.setdefault(claim.value, set())
            units.update(unit for unit in (claim.unit, _IMPLIED.get(claim.unit or "")) if unit)
            if declared and not claim.unit:
                units.add(declared)
    return held


def _with_unit_before(text: str) -> Iterator[Claim]:
    """Numbers whose unit stands in their label: ``Pressure (bar): 5``, ``"pressure_bar": 5.2``."""
    if ":" not in text and "=" not in text:  # most sentences, and trying every unit at every place is slow
        return
    for match in _UNIT_BEFORE.finditer(text):
        spelled = match["enclosed"] or match["suffix"] or match["last"]
        is_letter_of_prose = match["last"] is not None and len(spelled) == 1 and spelled.isalpha()
        unit = _unit(spelled) or (_unit(spelled.upper()) if match["suffix"] else None)
        if unit is None or is_letter_of_prose:
            continue
        for claim in _claims(match["cell"]):
            if claim.unit is None:
                yield Claim(claim.text, claim.value, unit)


def _holds(claim: Claim, held: dict[Decimal, set[str]]) -> bool:
    units = held.get(claim.value)
    return units is not None and (claim.unit is None or claim.unit in units)


def _holds_code(code: str, evidence: str) -> bool:
    return _code_pattern(code).search(evidence) is not None


def _code_pattern(code: str) -> re.Pattern[str]:
    """Dashes, spaces and case do not matter where letters meet digits; two numbers must stay apart."""
    pieces = _CODE_PIECE.findall(code.lower())
    pattern = re.escape(pieces[0])
    for before, piece in itertools.pairwise(pieces):
        needed = before.isdigit() and piece.isdigit()
        pattern += (r"[-/._^\s]" if needed else r"[-/._^\s]?") + re.escape(piece)
    return re.compile(rf"(?<![a-z0-9]){pattern}(?![a-z0-9]|\.\d)")


def _holds_as_code(claim: Claim, evidence: str) -> bool:
    """``E 217`` and ``error 217`` stand on E-217."""
    found = _WORD_BEFORE.search(claim.before)
    if claim.unit is not None or found is None or not claim.text.isdigit():
        return False
    word = found[1].lower()
    if word in _CODE_NOUNS:
        return re.search(rf"(?<![a-z0-9])[a-z]{{1,4}}[-\s]?{claim.text}(?![a-z0-9]|\.\d)", evidence) is not None
    return len(word) <= 4 and re.search(rf"(?<![a-z0-9]){word}[-/]?{claim.text}(?![a-z0-9])", evidence) is not None
