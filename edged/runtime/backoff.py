"""Pauses between attempts: exponential, with full jitter, so that forty boxes do not return in one beat.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""


def pause_seconds(failures: int, *, smallest: float, largest: float, random: float) -> float:
    """The pause before the next attempt after ``failures`` ≥ 1 failed ones; ``random`` is in [0, 1)."""
    ceiling = min(largest, smallest * 2.0 ** min(failures - 1, 32))
    return smallest * 0.5 + (ceiling - smallest * 0.5) * random
