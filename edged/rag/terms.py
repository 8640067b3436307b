"""The words of a text that carry its content: shared by selection and by the measures of an answer."""

import re

from edged.rag.sentences import CJK

_TERM = re.compile(rf"[{CJK}]+|[^\W_{CJK}]+(?:[-/.'’][^\W_{CJK}]+)*")
_CJK_RUN = re.compile(f"[{CJK}]")
_PUNCTUATION = re.compile(r"[\W_]")
_SUFFIXES = ("ations", "ation", "ings", "ing", "ies", "ied", "edly", "ed", "es", "ly", "s", "e", "y")
_SHORTEST_STEM = 3

STOP_WORDS = frozenset(
    """
    a an the this that these those it its he she they them his her their him we us our you your i me my mine who
    whom whose which what when where why how is are was were be been being am do does did done doing have has had
    having can could may might must shall should will would not no nor and or but if then than so as at by for
    from in into of off on onto out over to under up upon with within without about after before between during
    through again once there here all any both each few more most other some such only own same too very just
    also because until while per via yes many much
    """.split()  # noqa: SIM905 - a table of words reads better than a list of strings
)
"""English function and question words."""


def stem(word: str) -> str:
    """The word in lower case without its commonest endings; crude, but the same for question and text."""
    lower = word.lower().removesuffix("'s").removesuffix("’s")
    for suffix in _SUFFIXES:
        if lower.endswith(suffix) and len(lower) - len(suffix) >= _SHORTEST_STEM:
            lower = lower.removesuffix(suffix)
            break
    doubled = len(lower) > _SHORTEST_STEM and lower[-1] == lower[-2] and lower[-1].isalpha()
    return lower[:-1] if doubled else lower  # stopped, stop


def content_terms(text: str) -> list[str]:
    """Stems of the words that are no stop words, in order; scripts without spaces as overlapping pairs."""
    terms: list[str] = []
    for match in _TERM.finditer(text):
        word = match[0]
        if _CJK_RUN.match(word):
            run = _PUNCTUATION.sub("", word)
            terms.extend(run[at : at + 2] for at in range(max(1, len(run) - 1)) if run)
        elif word.lower() not in STOP_WORDS:
            terms.append(stem(word))
    return terms
