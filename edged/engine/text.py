"""From token bytes to text that may be shown: whole characters only, and never a part of a stop string."""

import codecs


class TextStream:
    """Feed the bytes of each token, take the text that is certain."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text now certain; once a stop string is complete, ``stopped`` is set and the rest is dropped."""
        return self._advance(self._decoder.decode(data))

    def flush(self) -> str:
        """The rest, at the end of generation."""
        text = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        # The one complete first, wherever the tokens were cut: of "bc" and "abcd", "abcd" stops at its "bc".
        found = ((at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0)
        if complete := min(found, default=None):
            self.stopped = True
            certain, self._held = self._held[: complete[1]], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        split = len(self._held) - keep
        certain, self._held = self._held[:split], self._held[split:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that may still grow into ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
