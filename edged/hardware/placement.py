"""How many threads each worker computes with: pure.

llama.cpp's threads wait for each other at barriers, so a thread without a core of its own, or one that the quota
stops, stops them all: threads ≤ min(cores, floor(quota)). A quota is a ceiling, never a share to fill.
"""

import math

import msgspec

from edged.hardware.detect import Cpu


class Placement(msgspec.Struct, frozen=True):
    """Compute threads of the two workers, each at least one."""

    chat_threads: int
    embed_threads: int


def place(cpu: Cpu, *, chat_threads: int = 0, embed_threads: int = 0) -> Placement:
    """The plan for a machine; a configured number other than 0 is taken as it is."""
    whole = cpu.cores if cpu.quota_cores is None else min(cpu.cores, math.floor(cpu.quota_cores))
    chat = chat_threads or max(1, whole)
    return Placement(chat, embed_threads or max(1, chat // 2))
