"""Which model gets the next request, and who still holds which: what a swap waits for."""

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from edged.errors import DeadlineError, OutputFormatError, QueueFullError, WorkerError, WorkerUnavailableError
from edged.models.rollout import Observed, Report
from edged.serving.chat import LocalChat, Messages
from edged.serving.embed import LocalEmbedder
from edged.serving.golden import well_formed
from edged.serving.restraint import Restraint
from edged.types import OutputFormat, Priority, Sampling, Segment
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import GREEDY, Lost

SMOOTHING = 0.2
"""Weight of the newest lease in how long one typically takes."""
LEAST_WAIT_SECONDS = 0.5
"""What is told to one who waits while an exchange takes longer than foreseen."""
NOT_THE_MODELS = (DeadlineError, OutputFormatError)
"""Errors that another model would give as well."""

M = TypeVar("M")


@dataclass(eq=False, slots=True)
class _Seat(Generic[M]):
    """A model in service, how many requests hold it, and how they went."""

    model: M
    leases: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    observed: Observed = field(default_factory=Observed)


class Pool(Generic[M]):
    """The models of one role. A lease keeps a model in service until it is given back."""

    def __init__(self, active: M | None, *, kind: str) -> None:
        self._kind = kind
        self._seat = _Seat(active) if active is not None else None
        self._leaving: list[_Seat[M]] = []
        self._open = asyncio.Event()
        self._open.set()
        self._hold_until = 0.0
        self._typical_lease_seconds = 0.0

    @property
    def active(self) -> M | None:
        return self._seat.model if self._seat is not None else None

    @property
    def typical_lease_seconds(self) -> float:
        """How long a request holds its model, smoothed over the latest."""
        return self._typical_lease_seconds

    @property
    def held_seconds(self) -> float:
        """How long a request made now will wait for a model, at the best guess; 0 while none is held."""
        if self._open.is_set():
            return 0.0
        return max(LEAST_WAIT_SECONDS, self._hold_until - time.monotonic())

    def serve(self, model: M | None) -> None:
        """Give ``model`` all requests from now on, also those that are held; the one before gets no more."""
        self._leave(self._seat)
        self._seat = _Seat(model) if model is not None else None
        self._open.set()

    def hold(self, expected_seconds: float) -> None:
        """Let further requests wait until :meth:`serve` or :meth:`release`, and tell them for how long about."""
        self._hold_until = time.monotonic() + expected_seconds
        self._open.clear()

    def release(self) -> None:
        """End a hold with the active model as it is."""
        self._open.set()

    async def drained(self, model: M) -> None:
        """Return when nobody holds ``model`` any more."""
        for seat in [seat for seat in self._seats() if seat.model is model]:
            while seat.leases:
                seat.changed.clear()
                await seat.changed.wait()
            if seat in self._leaving:
                self._leaving.remove(seat)

    def _leave(self, seat: _Seat[M] | None) -> None:
        """Remember a model for as long as somebody holds it."""
        if seat is not None and seat.leases:
            self._leaving.append(seat)

    def _seats(self) -> list[_Seat[M]]:
        return [*self._leaving, *([self._seat] if self._seat is not None else [])]

    async def _admit(self, deadline_seconds: float | None) -> _Seat[M]:
        """The active seat, after the hold where there is one.

        Raises :class:`WorkerUnavailableError` where there is no model or the hold will outlast the deadline, and
        :class:`DeadlineError` when it did.
        """
        held_seconds = self.held_seconds
        if deadline_seconds is not None and held_seconds > deadline_seconds:
            raise WorkerUnavailableError(
                f"the {self._kind} model is being exchanged, for about {held_seconds:.1f} s more",
                hint="ask again after that time",
                retry_after_seconds=round(held_seconds, 1),
            )
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._open.wait()
        except TimeoutError as error:
            raise DeadlineError(f"the deadline came while the {self._kind} model was exchanged") from error
        if self._seat is None:
            raise WorkerUnavailableError(f"there is no {self._kind} model", hint="see the conditions in /health")
        return self._seat

    @contextlib.contextmanager
    def _held(self, seat: _Seat[M]) -> Iterator[None]:
        began = time.monotonic()
        seat.leases += 1
        try:
            yield
        finally:
            seat.leases -= 1
            seat.changed.set()
            taken = time.monotonic() - began
            self._typical_lease_seconds += SMOOTHING * (taken - self._typical_lease_seconds)


class EmbedderPool(Pool[LocalEmbedder]):
    """The embedding model in service."""

    def __init__(self, active: LocalEmbedder | None) -> None:
        super().__init__(active, kind="embedding")

    @contextlib.asynccontextmanager
    async def lease(self, deadline_seconds: float | None = None) -> AsyncGenerator[LocalEmbedder, None]:
        """The embedder for texts that must be embedded alike.

        Raises :class:`WorkerUnavailableError` when there is none.
        """
        seat = await self._admit(deadline_seconds)
        with self._held(seat):
            yield seat.model


class ChatPool(Pool[LocalChat]):
    """The chat model in service, and beside it, while one is tried, a candidate that gets a share of the requests."""

    def __init__(
        self,
        active: LocalChat | None,
        *,
        chance: Callable[[], float] = random.random,
        restraint: Restraint | None = None,
    ) -> None:
        """``chance`` gives numbers in [0, 1): below the share, a request goes to the candidate."""
        super().__init__(active, kind="chat")
        self.restraint = restraint or Restraint()
        self._chance = chance
        self._canary: _Seat[LocalChat] | None = None
        self._share = 0.0
        self._reported = asyncio.Event()

    @property
    def candidate(self) -> LocalChat | None:
        return self._canary.model if self._canary is not None else None

    @property
    def names(self) -> tuple[str, ...]:
        """Identities of the models that a request made now may meet."""
        return tuple(model.name for model in (self.active, self.candidate) if model is not None)

    @contextlib.asynccontextmanager
    async def lease(self, deadline_seconds: float | None = None) -> AsyncGenerator["Lease", None]:
        """The model for one request. While models are exchanged a request waits, no longer than its deadline.

        Raises :class:`WorkerUnavailableError` when there is none, or will be none in time, and
        :class:`DeadlineError` when there was none in time.
        """
        seat = await self._admit(deadline_seconds)
        if self._canary is not None and self._chance() < self._share:
            seat = self._canary
        with contextlib.ExitStack() as held:
            held.enter_context(self._held(seat))
            lease = Lease(self, seat, held)
            try:
                yield lease
            finally:
                lease.finish()

    # --- trying a candidate ----------------------------------------------------------------------------

    def try_out(self, candidate: LocalChat, share: float) -> None:
        """Give ``candidate`` this share of the requests, 0 to 1; both models' observations begin anew."""
        self._canary, self._share = _Seat(candidate), share
        if self._seat is not None:
            self._seat.observed = Observed()

    def withdraw(self) -> None:
        """Give the candidate no further requests."""
        self._leave(self._canary)
        self._canary, self._share = None, 0.0

    def promote(self) -> None:
        """Make the candidate the active model, with those who hold it; the active one gets no more requests."""
        self._leave(self._seat)
        self._seat, self._canary, self._share = self._canary, None, 0.0
        self._open.set()

    def observations(self) -> tuple[Observed, Observed]:
        """How the requests went since the trial began: the active model's, and the candidate's."""
        seats = (self._seat, self._canary)
        active, candidate = (seat.observed if seat is not None else Observed() for seat in seats)
        return active, candidate

    async def reported(self) -> None:
        """Return after the next request has been reported."""
        self._reported.clear()
        await self._reported.wait()

    # --- leases ----------------------------------------------------------------------------------------

    def _note(self, seat: _Seat[LocalChat], report: Report) -> None:
        seat.observed = seat.observed.add(report)
        self._reported.set()

    def _instead_of(self, seat: _Seat[LocalChat]) -> _Seat[LocalChat] | None:
        """Who answers when the candidate fails: the user is not to suffer for the trial."""
        return self._seat if seat is not self._seat else None


class Lease(LocalChat):
    """A chat model for one request. How the request went is noted; where a candidate fails, the active model answers.

    Its name and worker are those of the model that answers at last.
    """

    def __init__(self, pool: ChatPool, seat: _Seat[LocalChat], held: contextlib.ExitStack) -> None:
        super().__init__(seat.model.worker, seat.model.template, seat.model.name)
        self._pool = pool
        self._seat = seat
        self._held = held
        self._report: Report | None = None
        self._rendered: tuple[Messages, list[Segment]] | None = None

    def report(self, *, overlap: float) -> None:
        """Say what share of the text stood on the sentences shown, 0 to 1, where the asker can tell."""
        if self._report is not None:
            self._report = Report(
                valid=self._report.valid, overlap=overlap, tokens=self._report.tokens, seconds=self._report.seconds
            )

    def finish(self) -> None:
        """Note how the request went, if it was asked and answered at all."""
        if self._report is not None:
            self._pool._note(self._seat, self._report)
            self._report = None

    def render(self, messages: Messages) -> list[Segment]:
        prompt = super().render(messages)
        self._rendered = (messages, prompt)
        return prompt

    async def generate(
        self,
        prompt: Sequence[Segment],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        output: OutputFormat | None = None,
        stop: Sequence[str] = (),
        priority: Priority = "interactive",
        prefix_segments: int = 0,
        keep: bool = False,
        deadline_seconds: float | None = None,
        templated: bool = True,
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        """As :meth:`LocalChat.generate`. A candidate's failure shows as :class:`Lost`: the active model begins anew.

        Raises :class:`BatchShedError` too, and the answer is no longer than the device can afford.
        """
        self._pool.restraint.admit(priority)
        began = time.monotonic()
        run = functools.partial(
            super().generate,
            max_tokens=self._pool.restraint.cap(max_tokens),
            sampling=sampling,
            output=output,
            stop=stop,
            priority=priority,
            keep=keep,
            templated=templated,
        )
        observed = functools.partial(self._observed, output)
        try:
            items = observed(run(prompt, prefix_segments=prefix_segments, deadline_seconds=deadline_seconds))
            async with contextlib.aclosing(items):
                async for item in items:
                    yield item
        except WorkerError as error:
            if isinstance(error, NOT_THE_MODELS) or not self._change_seats():
                raise
        else:
            return
        yield Lost()
        prompt, prefix_segments = self._again(prompt, prefix_segments)
        if deadline_seconds is not None:
            deadline_seconds = max(0.0, deadline_seconds - (time.monotonic() - began))
        items = observed(run(prompt, prefix_segments=prefix_segments, deadline_seconds=deadline_seconds))
        async with contextlib.aclosing(items):
            async for item in items:
                yield item

    async def _observed(
        self, output: OutputFormat | None, items: AsyncGenerator[Piece | Lost | Finished, None]
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        texts: list[str] = []
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    match item:
                        case Piece(text=text):
                            texts.append(text)
                        case Lost():
                            texts.clear()
                            self._pool._note(self._seat, Report(failed=True))
                        case Finished():
                            self._report = Report(
                                valid=well_formed("".join(texts), output, complete=item.reason == "stop"),
                                tokens=item.completion_tokens,
                                seconds=item.generate_ms / 1e3,
                            )
                    yield item
        except WorkerError as error:
            if not isinstance(error, OutputFormatError | QueueFullError):  # the asker's fault, or that of the crowd
                self._pool._note(self._seat, Report(failed=True))
            raise

    def _change_seats(self) -> bool:
        """Move over to the active model, if this is another one."""
        seat = self._pool._instead_of(self._seat)
        if seat is None:
            return False
        self._held.close()
        self._held.enter_context(self._pool._held(seat))
        self._seat = seat
        self.worker, self.template, self._name = seat.model.worker, seat.model.template, seat.model.name
        return True

    def _again(self, prompt: Sequence[Segment], prefix_segments: int) -> tuple[Sequence[Segment], int]:
        """The prompt as the model that now answers takes it; what was not made by a template stays as it is."""
        if self._rendered is None or list(prompt) != self._rendered[1]:
            return prompt, prefix_segments
        messages = self._rendered[0]
        return self.render(messages), self.prefix_segments(messages) if prefix_segments else 0
