"""How much a chat worker does at once, by the memory there is: pure.

The number of sequences that run follows the queue by itself, up to a limit; the limit and the bytes of kept prompt
states shrink fast when memory runs short and come back slowly, when it has been plenty for a while.
"""

import math

import msgspec

from edged.hardware.governor import Step
from edged.hardware.pressure import CALM_OBSERVATIONS, Supply
from edged.workers.protocol import Tune, WorkerSettings

SMALLEST_CACHE_BYTES = 1 << 20


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What memory allows the worker. ``calm`` counts observations of plenty in a row."""

    sequences: int
    prefix_cache_bytes: int
    calm: int = 0

    def observe(self, supply: Supply, settings: WorkerSettings, *, shrinking: bool) -> "Tuning":
        """The next tuning; ``shrinking``: what could be given up before has been.

        Short memory then halves both limits. After plenty for ``CALM_OBSERVATIONS`` in a row, one sequence more is
        allowed and the cache doubled, up to the settings.
        """
        if supply is Supply.SHORT and shrinking:
            smaller = max(min(SMALLEST_CACHE_BYTES, settings.prefix_cache_bytes), self.prefix_cache_bytes // 2)
            return Tuning(sequences=max(1, self.sequences // 2), prefix_cache_bytes=smaller)
        if supply is not Supply.PLENTY:
            return msgspec.structs.replace(self, calm=0)
        if self.calm + 1 < CALM_OBSERVATIONS:
            return msgspec.structs.replace(self, calm=self.calm + 1)
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
