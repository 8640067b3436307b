"""The life of a model in service, and whether a candidate is good enough: pure.

A model goes ``staged → warm → canary → active → draining → retired``; of one role at most one model is active.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Literal

import msgspec

Role = Literal["chat", "embed"]
ROLES: tuple[Role, ...] = ("chat", "embed")


class Stage(Enum):
    """Where a model is in its life.

    ``staged``: its file is looked at. ``warm``: its worker is loaded and asked only by us. ``canary``: it gets a share
    of the requests. ``active``: it gets all others. ``draining``: it gets none and finishes what it has.
    ``retired``: its worker is gone.
    """

    STAGED = "staged"
    WARM = "warm"
    CANARY = "canary"
    ACTIVE = "active"
    DRAINING = "draining"
    RETIRED = "retired"


MOVES: dict[Stage, frozenset[Stage]] = {
    Stage.STAGED: frozenset({Stage.WARM, Stage.RETIRED}),
    Stage.WARM: frozenset({Stage.CANARY, Stage.ACTIVE, Stage.DRAINING}),
    Stage.CANARY: frozenset({Stage.ACTIVE, Stage.DRAINING}),
    Stage.ACTIVE: frozenset({Stage.DRAINING}),
    Stage.DRAINING: frozenset({Stage.RETIRED}),
    Stage.RETIRED: frozenset({Stage.STAGED}),
}
"""Legal moves; anything else is a programming error. A retired model that comes back begins anew."""


class Move(msgspec.Struct, frozen=True):
    """One step of one model, by its identity; ``old`` is None when it enters service for the first time."""

    model: str
    old: Stage | None
    new: Stage


Lineup = Mapping[str, Stage]
"""The models of one role by identity; those never seen are not in it."""


def move(lineup: Lineup, model: str, new: Stage) -> tuple[Lineup, Move]:
    """The line-up after a step. Raises ``ValueError`` for an illegal one, and for a second active model."""
    old = lineup.get(model)
    if new not in (MOVES[old] if old is not None else {Stage.STAGED}):
        raise ValueError(f"{model} does not go from {old.value if old else 'nowhere'} to {new.value}")
    if new is Stage.ACTIVE and (other := active(lineup)) is not None:
        raise ValueError(f"{model} cannot become active: {other} is")
    return {**lineup, model: new}, Move(model, old, new)


def active(lineup: Lineup) -> str | None:
    """The model in service, if any."""
    return next((model for model, stage in lineup.items() if stage is Stage.ACTIVE), None)


_WAY_OUT: dict[Stage, tuple[Stage, ...]] = {
    Stage.STAGED: (Stage.RETIRED,),
    Stage.WARM: (Stage.DRAINING, Stage.RETIRED),
    Stage.CANARY: (Stage.DRAINING, Stage.RETIRED),
    Stage.ACTIVE: (Stage.DRAINING, Stage.RETIRED),
    Stage.DRAINING: (Stage.RETIRED,),
    Stage.RETIRED: (),
}
_WAY_IN = (Stage.STAGED, Stage.WARM, Stage.ACTIVE)


def way_out(lineup: Lineup, model: str) -> tuple[Stage, ...]:
    """The steps that take a model out of service from wherever it is."""
    stage = lineup.get(model)
    return _WAY_OUT[stage] if stage is not None else ()


def recovery(lineup: Lineup, serving: str | None) -> tuple[Move, ...]:
    """The steps from where a daemon was when it ended to where it begins: ``serving`` active, all others retired."""
    steps: list[Move] = []
    for model in [model for model in lineup if model != serving]:
        lineup = _walk(lineup, model, way_out(lineup, model), steps)
    if serving is not None and lineup.get(serving) is not Stage.ACTIVE:
        lineup = _walk(lineup, serving, way_out(lineup, serving), steps)
        _walk(lineup, serving, _WAY_IN, steps)
    return tuple(steps)


def _walk(lineup: Lineup, model: str, stages: Iterable[Stage], steps: list[Move]) -> Lineup:
    for stage in stages:
        lineup, step = move(lineup, model, stage)
        steps.append(step)
    return lineup


def choose(configured: str, chosen: tuple[str, str] | None) -> str:
    """The model to begin with: the activated one, unless the configuration named another since.

    ``chosen`` is the activated model and what was configured then: the later word counts.
    """
    if chosen is not None and chosen[1] == configured:
        return chosen[0]
    return configured


# --- is the candidate good enough? -----------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How one request went. ``valid``: whether the answer had the form asked for; ``overlap``: the share of the text
    that stood on the cited sentences, 0 to 1; each None where it cannot be told. ``seconds`` are of generation alone.
    """

    failed: bool = False
    valid: bool | None = None
    overlap: float | None = None
    tokens: int = 0
    seconds: float = 0.0


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's requests were like together; ``rss_bytes`` is its worker's memory, 0 while unknown."""

    requests: int = 0
    failed: int = 0
    formed: int = 0
    valid: int = 0
    grounded: int = 0
    overlap_sum: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    rss_bytes: int = 0

    def add(self, report: Report) -> "Observed":
        """With one more request."""
        return Observed(
            requests=self.requests + 1,
            failed=self.failed + report.failed,
            formed=self.formed + (report.valid is not None),
            valid=self.valid + (report.valid is True),
            grounded=self.grounded + (report.overlap is not None),
            overlap_sum=self.overlap_sum + (report.overlap or 0.0),
            tokens=self.tokens + report.tokens,
            seconds=self.seconds + report.seconds,
            rss_bytes=self.rss_bytes,
        )

    def told(self) -> dict[str, float | None]:
        """The figures that are compared."""
        return {
            "requests": self.requests,
            "failure_rate": self.failure_rate,
            "validity": self.validity,
            "overlap": self.overlap,
            "tokens_per_second": self.tokens_per_second,
            "rss_bytes": self.rss_bytes,
        }

    @property
    def failure_rate(self) -> float | None:
        return self.failed / self.requests if self.requests else None

    @property
    def validity(self) -> float | None:
        return self.valid / self.formed if self.formed else None

    @property
    def overlap(self) -> float | None:
        return self.overlap_sum / self.grounded if self.grounded else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much worse than the active model a candidate may be; see ``[rollout]`` in the configuration.

    The first three are differences of shares, the last two quotients.
    """

    more_failures: float
    less_valid: float
    less_overlap: float
    slowest: float
    heaviest: float


def regression(baseline: Observed, candidate: Observed, limits: Limits) -> str | None:
    """What is worse about the candidate than the limits allow, in one sentence; None when nothing is.

    What is unknown of one of the two is not compared.
    """
    compared = (
        _more("of its requests failed", baseline.failure_rate or 0.0, candidate.failure_rate, limits.more_failures),
        _less("of its answers had the form asked for", baseline.validity, candidate.validity, limits.less_valid),
        _less("of its text stood on the sentences", baseline.overlap, candidate.overlap, limits.less_overlap),
        _slower(baseline.tokens_per_second, candidate.tokens_per_second, limits.slowest),
        _heavier(baseline.rss_bytes, candidate.rss_bytes, limits.heaviest),
    )
    return next((reason for reason in compared if reason is not None), None)


def _more(what: str, baseline: float, candidate: float | None, allowed: float) -> str | None:
    if candidate is None or candidate - baseline <= allowed:
        return None
    return f"{candidate:.0%} {what}, {baseline:.0%} of the active model's"


def _less(what: str, baseline: float | None, candidate: float | None, allowed: float) -> str | None:
    if baseline is None or candidate is None or baseline - candidate <= allowed:
        return None
    return f"only {candidate:.0%} {what}, {baseline:.0%} of the active model's"


def _slower(baseline: float | None, candidate: float | None, slowest: float) -> str | None:
    if baseline is None or candidate is None or candidate >= baseline * slowest:
        return None
    return f"it makes {candidate:.1f} tokens/s where the active model makes {baseline:.1f}"


def _heavier(baseline: int, candidate: int, heaviest: float) -> str | None:
    if not baseline or candidate <= baseline * heaviest:
        return None
    return f"its worker takes {candidate / 1e6:.0f} MB of memory, the active model's {baseline / 1e6:.0f} MB"


def golden_regression(baseline: Sequence[bool], candidate: Sequence[bool]) -> str | None:
    """What the golden questions have against the candidate; each entry says whether that question passed.

    An empty ``baseline`` is that of no active model: then the candidate needs to pass all.
    """
    passed, wanted = sum(candidate), sum(baseline) if baseline else len(candidate)
    if passed < max(wanted, 1 if candidate else 0):
        return f"it passed {passed} of {len(candidate)} golden questions, {wanted} are needed"
    return None


Verdict = Literal["wait", "promote", "roll back"]


def canary_verdict(
    baseline: Observed,
    candidate: Observed,
    limits: Limits,
    *,
    enough: int,
    elapsed_seconds: float,
    longest_seconds: float,
) -> tuple[Verdict, str]:
    """What to do with a canary now, and why.

    A regression shows once a quarter of ``enough`` requests are in; too few requests in ``longest_seconds`` decide too.
    """
    late = elapsed_seconds >= longest_seconds
    if late or candidate.requests * 4 >= enough:
        reason = regression(baseline, candidate, limits)
        if reason is not None:
            return "roll back", f"as a canary, {reason}"
    if candidate.requests >= enough:
        return "promote", f"{candidate.requests} canary requests were as good as the active model's"
    if late:
        return "promote", f"nothing was wrong with {candidate.requests} canary requests in {longest_seconds:g} s"
    return "wait", f"{candidate.requests} of {enough} canary requests"
