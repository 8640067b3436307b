"""The text side of the keyword index: what is written to FTS5 and how a question becomes a MATCH expression.

FTS5's tokenizer knows no words in Chinese, Japanese or Korean: their runs are indexed as overlapping pairs.
"""

import re
import unicodedata
from collections.abc import Iterator

TERM_LIMIT = 256

# Han with its iteration marks, kana, and Hangul syllables, without the punctuation among them.
_CJK = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_DASHES = "\\-\u2010-\u2015\u2212"
_LETTER = f"(?:(?![{_CJK}])\\w)"
_THOUSANDS = r"(?<=\d),(?=\d{3}\b)"

_CJK_RUN = re.compile(f"[{_CJK}]+")
_WORD = re.compile(f"[{_CJK}]+|{_LETTER}+(?:(?:[{_DASHES}./:+#@&]|{_THOUSANDS}){_LETTER}+)*")
_NOT_IN_TOKENS = re.compile(r"[\W_]+")
_INNER_DASH = re.compile(f"\\w[{_DASHES}]\\w")

STOP_WORDS = frozenset(
    # s to ve are what the tokenizer leaves of "what's", "don't", "we've"
    """
    a about again all also am an and any are as at be because been being both but by can cannot could did do does
    doing done each few for from further get had has have having he her here hers him his how i if in into is it its
    itself just many may me might more most much must my no nor not now of on only or other our ours own please shall
    she should so some such tell than that the their theirs them then there these they this those to too us very was
    we were what when where whether which while who whom whose why will with would you your yours
    s t d ll m re ve don doesn didn isn aren wasn weren won wouldn couldn shouldn hasn haven hadn
    """.split()  # noqa: SIM905 - a list of strings would be ten times as long to read
)
"""English words that tell nothing about what a passage is about."""


def index_text(text: str) -> str:
    """``text`` with every run of Chinese, Japanese or Korean as overlapping pairs; all else unchanged.

    ``温度计`` becomes ``温度 度计``; a run of one character stays one token.
    """
    return _CJK_RUN.sub(lambda run: f" {' '.join(_pairs(run.group()))} ", text)


def match_query(question: str) -> str:
    """An FTS5 expression that finds what shares a word with ``question``; valid for any text.

    A word with inner punctuation (``E-217``, ``PX.40/2``) must occur with its pieces in this order; where it has
    no digit (``on/off``) its pieces count alone as well. Stop words count only when there is nothing else.
    At most :data:`TERM_LIMIT` different terms are used.
    """
    words = list(_words(question))
    telling = [word for word in words if not _is_stop(word)]
    terms = dict.fromkeys(term for word in telling or words for term in _terms(word))
    return " OR ".join(list(terms)[:TERM_LIMIT]) or '""'


def is_code(word: str) -> bool:
    """Whether a word looks like a fault code, part number or rating: a digit with a letter or an inner dash.

    Letters of Chinese, Japanese and Korean do not count: they stand next to plain numbers.
    """
    if not any(character.isdecimal() for character in word):
        return False
    return _INNER_DASH.search(word) is not None or any(
        character.isalpha() and not _CJK_RUN.match(character) for character in word
    )


def codes(question: str) -> tuple[str, ...]:
    """The words of ``question`` that are codes, as spelt there, each once, in order."""
    return tuple(dict.fromkeys(word for word in _words(question) if is_code(word)))


def _words(text: str) -> Iterator[str]:
    # Composed, because the tokenizer folds accents away while a bare combining mark would end a word here.
    return (match.group() for match in _WORD.finditer(unicodedata.normalize("NFC", text)))


def _pieces(word: str) -> list[str]:
    return [piece for piece in _NOT_IN_TOKENS.split(word) if piece]


def _is_stop(word: str) -> bool:
    return all(piece.lower() in STOP_WORDS for piece in _pieces(word))


def _terms(word: str) -> Iterator[str]:
    if _CJK_RUN.match(word):
        prefix = "*" if len(word) == 1 else ""  # a lone character is found as the beginning of a pair
        yield from (f'"{pair}"{prefix}' for pair in _pairs(word))
        return
    pieces = _pieces(word)
    if pieces:
        yield f'"{" ".join(pieces)}"'
    if len(pieces) > 1 and not any(character.isdecimal() for character in word):
        yield from (f'"{piece}"' for piece in pieces if piece.lower() not in STOP_WORDS)


def _pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(len(run) - 1)] or [run]
