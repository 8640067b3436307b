"""Stacks that py-spy sampled in consecutive slices of time: read, added up, and what is on top of them; pure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

Stack = tuple[str, ...]
"""Frames from the outermost one inwards."""

_NAMELESS = re.compile(r"^0x[0-9a-f]+ ")


class Slice(msgspec.Struct, frozen=True):
    """How often each stack was seen between two moments, seconds since 1970. Idle threads are left out."""

    begin: float
    end: float
    stacks: Mapping[Stack, int]

    @property
    def samples(self) -> int:
        return sum(self.stacks.values())


def parse_folded(text: str) -> dict[Stack, int]:
    """``py-spy record --format raw``: a line ``outermost;…;innermost count`` for each stack."""
    stacks: Counter[Stack] = Counter()
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        stacks[tuple(_NAMELESS.sub("? ", frame) for frame in frames.split(";"))] += int(count)
    return dict(stacks)


def render_folded(stacks: Mapping[Stack, int]) -> str:
    """The same form, which other flame graph programs read too."""
    return "".join(f"{';'.join(stack)} {count}\n" for stack, count in stacks.items())


def total(slices: Iterable[Slice]) -> dict[Stack, int]:
    """All slices together."""
    counts: Counter[Stack] = Counter()
    for each in slices:
        counts.update(each.stacks)
    return dict(counts)


def innermost(stacks: Mapping[Stack, int], most: int) -> list[tuple[str, float]]:
    """The frames that were computing most often themselves, and their shares of all samples, 0 to 1."""
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[stack[-1]] += count
    whole = counts.total()
    return [(frame, count / whole) for frame, count in counts.most_common(most)]


def indexed(slices: Sequence[Slice]) -> tuple[list[str], list[list[tuple[int, list[int]]]]]:
    """Every frame's name once, and for each slice its stacks as ``(count, numbers of its frames)``: small in a page."""
    numbers: dict[str, int] = {}
    stacks = [
        [
            (count, [numbers.setdefault(frame, len(numbers)) for frame in stack])
            for stack, count in sorted(each.stacks.items())
        ]
        for each in slices
    ]
    return list(numbers), stacks
