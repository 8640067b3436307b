"""The first words of an answer, without the mark of the list in which the model was shown its facts: pure."""

import re

_UNDECIDED = re.compile(r"\s*(?:-\s*)?")
_MARK = re.compile(r"\s*-\s+(?=[^\s\d])")  # before a number it may be a sign


class Opening:
    """Holds the beginning of a text back until it shows whether it is such a mark; passes on all that follows."""

    def __init__(self) -> None:
        self._held = ""
        self._is_over = False

    def feed(self, text: str) -> str:
        """What of the text so far is to be shown now; maybe nothing."""
        if self._is_over:
            return text
        self._held += text
        if _UNDECIDED.fullmatch(self._held):
            return ""
        self._is_over = True
        mark = _MARK.match(self._held)
        return self._held[mark.end() :] if mark else self._held
