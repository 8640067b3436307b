"""How much a chat worker does at once, by the memory there is: pure.

The number of sequences that run follows the queue by itself, up to a limit; the limit and the bytes of kept prompt
states shrink fast when memory runs short and come back slowly, when it has not been short for a while.
"""

import math

import msgspec

from edged.hardware.governor import Step
from edged.hardware.pressure import RELIEF, TIGHT_OBSERVATIONS, Supply
from edged.workers.protocol import Tune, WorkerSettings

SMALLEST_CACHE_BYTES = 1 << 20


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What memory allows the worker, and the ``relief`` since it last did more, or was short."""

    sequences: int
    prefix_cache_bytes: int
    relief: int = 0

    def observe(self, supply: Supply, settings: WorkerSettings, *, shrinking: bool) -> "Tuning":
        """The next tuning; ``shrinking``: what could be given up before has been.

        Short memory then halves both limits. When it has been plenty for ``CALM_OBSERVATIONS``, or not short for
        ``TIGHT_OBSERVATIONS``, one sequence more is allowed and the cache doubled, up to the settings.
        """
        if supply is Supply.SHORT and shrinking:
            smaller = max(min(SMALLEST_CACHE_BYTES, settings.prefix_cache_bytes), self.prefix_cache_bytes // 2)
            return Tuning(sequences=max(1, self.sequences // 2), prefix_cache_bytes=smaller)
        relief = 0 if supply is Supply.SHORT else self.relief + RELIEF[supply]
        if relief < TIGHT_OBSERVATIONS:
            return msgspec.structs.replace(self, relief=relief)
        return Tuning(
            sequences=min(settings.sequences, self.sequences + 1),
            prefix_cache_bytes=min(settings.prefix_cache_bytes, 2 * self.prefix_cache_bytes),
        )


def untuned(settings: WorkerSettings) -> Tuning:
    """All that the settings allow."""
    return Tuning(sequences=settings.sequences, prefix_cache_bytes=settings.prefix_cache_bytes)


def combine(tuning: Tuning, step: Step, settings: WorkerSettings, *, threads: int) -> Tune:
    """The smallest of all limits: of memory, of heat, of the placement (``threads``), of the settings."""
    by_heat = max(1, math.floor(settings.sequences * step.sequences))
    return Tune(
        sequences=min(tuning.sequences, by_heat, settings.sequences),
        threads=max(1, min(threads, settings.threads)),
        prefix_cache_bytes=tuning.prefix_cache_bytes,
    )
