"""Exchanging the models in service: one rollout at a time, each move stored, a candidate that is worse taken back.

:mod:`edged.models.rollout` decides, this module acts. The active model is never touched before the candidate has
shown that it works, except where memory holds only one of them; and its requests are always left to finish.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import structlog

from edged.errors import (
    EdgedError,
    ModelTooLargeError,
    RequestError,
    RolloutBusyError,
    RolloutNotFoundError,
)
from edged.hardware.usage import read_usage
from edged.models import rollout as rules
from edged.models.memory import Room, room
from edged.models.rollout import Limits, Observed, Role, Stage
from edged.runtime import health as conditions
from edged.runtime.health import Health
from edged.serving.chat import LocalChat
from edged.serving.embed import LocalEmbedder
from edged.serving.exam import Exam, examine
from edged.serving.golden import DEFAULT_QUESTIONS, GoldenQuestion
from edged.serving.launch import Launcher, Model
from edged.serving.moves import Choice, Journal, Outcome, Past
from edged.serving.pool import ChatPool, EmbedderPool
from edged.serving.services import MISSING, Service, Services
from edged.workers.state import WorkerState

LOAD_BYTES_PER_SECOND = 100e6
"""How fast a model loads, before one has been seen to: what an SD card reads."""
CATCH_UPS = 3
"""How often documents that came meanwhile may put the switch of an embedder off; further ones then wait for it."""
SAME_COSINE = 0.999
"""Vectors nearer than this to each other do not tell texts apart."""
SAMPLE_TEXTS = ("The pump has stopped.", "Replace the filter every month.", "Seven green apples")

T = TypeVar("T")
log = structlog.get_logger("rollout")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """How long a canary is watched and how much worse it may be; see ``[rollout]`` in the configuration."""

    canary_requests: int
    canary_seconds: float
    limits: Limits


class Reembedding(Protocol):
    """All stored documents, as a change of the embedder sees them."""

    async def embed_all(self, embedder: LocalEmbedder, progress: Callable[[int, int], None]) -> None: ...

    async def switch(self, identity: str, dimensions: int) -> bool: ...

    async def forget(self) -> None: ...

    async def noted(self) -> None: ...


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. ``share`` of the requests for a canary, 0 for none; ``tried`` off goes back untested."""

    role: Role
    model: str
    share: float = 0.0
    golden: tuple[GoldenQuestion, ...] = ()
    tried: bool = True


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rollout is: a sentence, and how much of it is done where that can be counted."""

    version: int
    step: str
    done: int = 0
    total: int = 0


@dataclass(eq=False)
class _Work:
    """A rollout under way."""

    id: int
    order: Order
    model: Model
    room: Room
    progress: Progress
    evidence: dict[str, Any] = field(default_factory=dict)
    abort_reason: str = ""
    decided: bool = False


class _RejectedError(Exception):
    """The candidate is not good enough; the message says why."""


class Rollouts:
    """Takes orders; :meth:`run` is one supervised service that carries them out."""

    def __init__(
        self,
        services: Services,
        launcher: Launcher,
        journal: Journal,
        health: Health,
        trial: Trial,
        *,
        chats: ChatPool,
        embedders: EmbedderPool,
        documents: Reembedding,
        available_memory: Callable[[], int | None],
        on_end: Callable[[Role, Outcome], None] = lambda _role, _outcome: None,
    ) -> None:
        """``available_memory`` gives bytes and may block."""
        self._services = services
        self._launcher = launcher
        self._journal = journal
        self._health = health
        self._trial = trial
        self._chats = chats
        self._embedders = embedders
        self._documents = documents
        self._available_memory = available_memory
        self._on_end = on_end
        self._work: _Work | None = None
        self._ordered = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._preparing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._load_speed = LOAD_BYTES_PER_SECOND

    # --- orders ----------------------------------------------------------------------------------------

    async def activate(self, order: Order) -> int:
        """Begin a rollout; its id. What can be told at once is told at once, and nothing is changed then.

        Raises :class:`RolloutBusyError` while another goes on, :class:`ModelError` for a model that is unknown, not
        installed, broken or of the other kind, and :class:`ModelTooLargeError`.
        """
        async with self._preparing:
            self._refuse_when_busy()
            if order.role == "embed" and (order.share or order.golden):
                raise RequestError("an embedding model takes no canary share and no golden questions")
            rollout_id = await self._journal.begin(order.role, order.model, {"share": order.share})
            try:
                model = await asyncio.to_thread(self._launcher.find, order.role, order.model)
                where = await self._room_for(order.role, model)
            except EdgedError as error:
                await self._journal.end(rollout_id, "refused", error.message, {})
                self._on_end(order.role, "refused")
                raise
            if self._serves(order.role, model):
                await self._journal.end(rollout_id, "unchanged", "it is active already", {})
                return rollout_id
            self._work = _Work(rollout_id, order, model, where, Progress(version=0, step="waiting to begin"))
            self._ordered.set()
            return rollout_id

    async def roll_back(self, role: Role) -> int:
        """End the rollout under way, or bring back the model that served before the last one; the rollout's id.

        Raises :class:`RequestError` when there is nothing to go back to, and what :meth:`activate` raises.
        """
        work = self._work
        if work is not None and work.order.role == role and not work.decided and self._working is not None:
            work.abort_reason = "it was rolled back on request"
            self._working.cancel()
            return work.id
        previous = self.previous(role)
        if previous is None:
            raise RequestError(
                f"there is no {role} model to go back to", hint="'edged models status' shows what was activated"
            )
        return await self.activate(Order(role=role, model=previous, tried=False))

    def active(self, role: Role) -> Service | None:
        """What serves a role now."""
        return self._services.active(role)

    def previous(self, role: Role) -> str | None:
        """The model that rolling back would bring again."""
        choice = self._services.standing(role).choice
        return choice.previous if choice is not None else None

    def progress(self, rollout_id: int) -> Progress | None:
        """Where a rollout is; None when it is over or unknown."""
        work = self._work
        return work.progress if work is not None and work.id == rollout_id else None

    async def past(self, rollout_id: int) -> Past:
        """A rollout as it is remembered. Raises :class:`RolloutNotFoundError`."""
        found = await self._journal.rollout(rollout_id)
        if found is None:
            raise RolloutNotFoundError(f"there is no rollout {rollout_id}", hint="see GET /v1/rollouts")
        return found

    async def history(self, limit: int) -> list[Past]:
        """The latest rollouts, newest first."""
        return await self._journal.rollouts(limit)

    async def change(self, rollout_id: int, seen: int, patience_seconds: float) -> None:
        """Return once the progress of a rollout has another version than the one seen, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while (progress := self.progress(rollout_id)) is not None and progress.version == seen:
                    await self._changed.wait()

    def _refuse_when_busy(self) -> None:
        if self._work is not None:
            raise RolloutBusyError(
                f"the rollout of '{self._work.order.model}' is under way: {self._work.progress.step}",
                hint="wait for its end, or end it with 'edged models rollback'",
                rollout=self._work.id,
            )

    def _serves(self, role: Role, model: Model) -> bool:
        """Whether nothing is to be done; an embedder whose vectors are not all its own embeds the rest anew."""
        active = self.active(role)
        if active is None or active.model.identity != model.identity:
            return False
        return role == "chat" or not self._health.holds(conditions.VECTORS_STALE)

    async def _room_for(self, role: Role, model: Model) -> Room:
        """Where the candidate fits. Raises :class:`ModelTooLargeError` where it does not."""
        active = self.active(role)
        need = self._launcher.need(role, model)
        available = await asyncio.to_thread(self._available_memory)
        if available is None or (active is not None and active.model.identity == model.identity):
            return "beside"
        held = _resident_bytes(active) if active is not None else 0
        found = room(need.total, available_bytes=available, held_by_active_bytes=held)
        if found == "none" or (found == "serial" and role == "embed"):
            raise ModelTooLargeError(
                f"'{model.name}' needs about {need.total / 1e6:.0f} MB of memory, {available / 1e6:.0f} MB are free"
                + (", and both embedders are needed while documents are embedded anew" if found == "serial" else ""),
                hint="choose a smaller model, or less context (chat.context_tokens)",
                need_bytes=need.total,
                available_bytes=available,
                active_bytes=held,
            )
        return found

    # --- carrying out ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out one order after another until cancelled."""
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            if self._work is None:
                continue
            self._working = asyncio.create_task(self._carry_out(self._work), name=f"rollout-{self._work.id}")
            try:
                await asyncio.wait([self._working])
            except asyncio.CancelledError:
                self._working.cancel()
                await asyncio.wait([self._working])
                raise
            finally:
                working, self._working, self._work = self._working, None, None
                self._tell()
            if not working.cancelled():
                working.result()

    async def _carry_out(self, work: _Work) -> None:
        """Bring the candidate into service or take it back; how it ended is stored and shown."""
        outcome: Outcome = "promoted"
        try:
            reason = await self._bring_in(work)
        except (_RejectedError, EdgedError) as error:
            outcome, reason = "rolled_back", str(error)
        except asyncio.CancelledError:
            if not work.abort_reason:
                raise  # the daemon stops; its next start finds the rollout interrupted
            outcome, reason = "rolled_back", work.abort_reason
        await self._end(work, outcome, reason)

    async def _end(self, work: _Work, outcome: Outcome, reason: str) -> None:
        log.info("rollout_ended", rollout=work.id, model=work.order.model, outcome=outcome, reason=reason)
        await self._journal.end(work.id, outcome, reason, work.evidence)
        if outcome == "promoted" or work.abort_reason:
            self._health.clear(conditions.ROLLOUT_FAILED)
        else:
            self._health.set(conditions.ROLLOUT_FAILED, f"{work.order.model}: {reason}")
        self._on_end(work.order.role, outcome)

    async def _bring_in(self, work: _Work) -> str:
        """Returns in a sentence why the candidate serves now."""
        role, model = work.order.role, work.model
        active = self.active(role)
        if active is not None and active.model.identity == model.identity:
            active.died.clear()
            await self._embed_anew(work, active)
            return "all documents were embedded anew"
        await self._step(work, model, Stage.STAGED)
        try:
            self._say(work, "checking the file")
            await asyncio.to_thread(self._launcher.verify, model)
        except BaseException:
            await self._step(work, model, Stage.RETIRED)
            raise
        if work.room == "serial" and active is not None:
            return await self._exchange_serially(work, active)
        return await self._exchange_beside(work, active)

    async def _exchange_beside(self, work: _Work, active: Service | None) -> str:
        """Load the candidate beside the active model, try it, and let it take over."""
        async with self._candidate_of(work, beside=active is not None and not active.beside) as candidate:
            reason = await self._try(work, active, candidate)
            await self._take_over(work, candidate)
        if active is not None:
            await self._retire(work, active)
        return reason

    async def _try(self, work: _Work, active: Service | None, candidate: Service) -> str:
        if isinstance(candidate.client, LocalEmbedder):
            await self._while_alive(candidate, _check_embedder(candidate.client))
            await self._embed_anew(work, candidate)
            return "all documents were embedded anew"
        reason = await self._ask_golden(work, active, candidate)
        if work.order.share and active is not None:
            return await self._while_alive(candidate, self._watch_canary(work, active, candidate))
        return reason

    @contextlib.asynccontextmanager
    async def _candidate_of(self, work: _Work, *, beside: bool) -> AsyncGenerator[Service, None]:
        """The candidate, loaded; unless it has become the active model, it is gone afterwards."""
        role, model = work.order.role, work.model
        self._say(work, "loading the model")
        began = time.monotonic()
        candidate = self._services.launch(role, model, beside=beside)
        try:
            await candidate.worker.settled()
            if candidate.died.is_set():
                raise _RejectedError(candidate.why)
            self._load_speed = model.header.file_bytes / max(time.monotonic() - began, 1e-3)
            await self._step(work, model, Stage.WARM)
            yield candidate
        finally:
            if self.active(role) is not candidate:
                await self._withdraw(work, candidate)

    async def _withdraw(self, work: _Work, candidate: Service) -> None:
        """Take the candidate out of service; its requests are left to finish, unless the daemon stops."""
        standing = self._services.standing(work.order.role)
        if standing.lineup[candidate.model.identity] is Stage.CANARY:
            self._chats.withdraw()
        stopping = self._stopping(work)
        if not stopping and isinstance(candidate.client, LocalChat):
            await self._chats.drained(candidate.client)
        await self._services.end(candidate)
        if not stopping:
            if isinstance(candidate.client, LocalEmbedder):
                await self._documents.forget()
            for stage in rules.way_out(standing.lineup, candidate.model.identity):
                await self._step(work, candidate.model, stage)

    def _stopping(self, work: _Work) -> bool:
        """Whether our own task was cancelled for no reason of the rollout."""
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0 and not work.abort_reason

    async def _take_over(self, work: _Work, candidate: Service) -> None:
        """Make the candidate the active model: on disk, then here. From then on the rollout has succeeded."""
        role = work.order.role
        standing = self._services.standing(role)
        work.decided = True
        before, lineup, moves = standing.active, standing.lineup, []
        if before is not None and lineup.get(before.model.identity) is Stage.ACTIVE:
            lineup, move = rules.move(lineup, before.model.identity, Stage.DRAINING)
            moves.append(move)
        lineup, move = rules.move(lineup, candidate.model.identity, Stage.ACTIVE)
        moves.append(move)
        choice = Choice(
            model=candidate.model.asked,
            configured=self._launcher.configured(role),
            previous=before.model.asked if before is not None else None,
        )
        if role == "embed":  # the documents are switched: there is no way back, and questions are held
            self._services.serve(role, candidate)
        await self._journal.moved(role, moves, work.progress.step, rollout_id=work.id, choice=choice)
        standing.lineup, standing.choice = lineup, choice
        self._health.clear(MISSING[role])
        if role == "embed":
            await self._documents.noted()
        else:
            self._services.serve(role, candidate)

    async def _retire(self, work: _Work, former: Service) -> None:
        """Let the former model finish what it has, and end its worker."""
        self._say(work, "finishing the requests of the former model")
        try:
            await self._drained(former)
        finally:  # whatever happens, a model that nobody asks does not stay in memory
            await self._services.end(former)
        await self._step(work, former.model, Stage.RETIRED)

    async def _drained(self, service: Service) -> None:
        if isinstance(service.client, LocalChat):
            await self._chats.drained(service.client)
        else:
            await self._embedders.drained(service.client)

    # --- one after the other ---------------------------------------------------------------------------

    async def _exchange_serially(self, work: _Work, active: Service) -> str:
        """Memory holds one model: requests wait while the active one finishes and goes and the candidate comes."""
        wanted = await self._baseline(work, active)
        self._chats.hold(self._expected_seconds(work, wanted))
        try:
            self._say(work, "finishing the requests of the active model; further ones wait")
            await self._drained(active)
            await self._step(work, active.model, Stage.DRAINING)
            await self._services.end(active)
            await self._step(work, active.model, Stage.RETIRED)
            async with self._candidate_of(work, beside=False) as candidate:
                reason = await self._ask_golden(work, active, candidate, wanted)
                await self._take_over(work, candidate)
        except BaseException:
            if not self._stopping(work):
                await self._bring_back(work, active)
            raise
        if work.order.share:
            reason += "; memory had no room for both models, so no canary was tried"
        return reason

    def _expected_seconds(self, work: _Work, wanted: Exam | None) -> float:
        """How long requests will be held: until the last one is finished, the model loaded and its questions asked."""
        load = work.model.header.file_bytes / self._load_speed
        return self._chats.typical_lease_seconds + load + (wanted.seconds if wanted is not None else 0.0)

    async def _bring_back(self, work: _Work, former: Service) -> None:
        """Serve the former model again, whatever state the exchange has come to."""
        standing = self._services.standing(work.order.role)
        if standing.lineup.get(former.model.identity) is Stage.ACTIVE:
            self._chats.release()
            return
        self._say(work, "bringing the former model back")
        await self._services.end(former)
        for stage in rules.way_out(standing.lineup, former.model.identity):
            await self._step(work, former.model, stage)
        service = self._services.launch(work.order.role, former.model)
        for stage in (Stage.STAGED, Stage.WARM, Stage.ACTIVE):
            await self._step(work, former.model, stage)
        self._services.serve(work.order.role, service)

    # --- golden questions ------------------------------------------------------------------------------

    async def _baseline(self, work: _Work, active: Service | None) -> Exam | None:
        """What the active model makes of the golden questions; None where it is not to be compared with."""
        if active is None or not work.order.tried or active.worker.state is not WorkerState.READY:
            return None
        return await self._examine(work, active, "the active model")

    async def _ask_golden(
        self, work: _Work, active: Service | None, candidate: Service, wanted: Exam | None = None
    ) -> str:
        """Compare both models' answers. Raises :class:`_RejectedError` when the candidate's are worse."""
        if not work.order.tried:
            return "it served before"
        if wanted is None:
            wanted = await self._baseline(work, active)
        found = await self._while_alive(candidate, self._examine(work, candidate, "the candidate"))
        work.evidence["golden"] = {"active": wanted.told() if wanted is not None else None, "candidate": found.told()}
        objection = rules.golden_regression(wanted.passed if wanted is not None else (), found.passed)
        if objection is None and wanted is not None:
            objection = rules.regression(wanted.observed, found.observed, self._trial.limits)
        if objection is not None:
            raise _RejectedError("; ".join([objection, *found.objections[:1]]))
        return f"it passed {sum(found.passed)} of {len(found.passed)} golden questions"

    async def _examine(self, work: _Work, service: Service, who: str) -> Exam:
        assert isinstance(service.client, LocalChat)

        def progress(done: int, total: int) -> None:
            self._say(work, f"golden questions to {who}", done, total)

        exam = await examine(service.client, work.order.golden or DEFAULT_QUESTIONS, progress)
        exam.observed = msgspec.structs.replace(exam.observed, rss_bytes=_resident_bytes(service))
        return exam

    # --- canary ----------------------------------------------------------------------------------------

    async def _watch_canary(self, work: _Work, active: Service, candidate: Service) -> str:
        """Give the candidate its share until its requests, or the time, decide."""
        assert isinstance(candidate.client, LocalChat)
        await self._step(work, candidate.model, Stage.CANARY)
        self._chats.try_out(candidate.client, work.order.share)
        began = time.monotonic()
        while True:
            elapsed = time.monotonic() - began
            baseline, found = self._compared(active, candidate)
            verdict, reason = rules.canary_verdict(
                baseline,
                found,
                self._trial.limits,
                enough=self._trial.canary_requests,
                elapsed_seconds=elapsed,
                longest_seconds=self._trial.canary_seconds,
            )
            work.evidence["canary"] = {"active": baseline.told(), "candidate": found.told()}
            self._say(work, f"as a canary: {reason}", found.requests, self._trial.canary_requests)
            if verdict == "promote":
                return reason
            if verdict == "roll back":
                raise _RejectedError(reason)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._trial.canary_seconds - elapsed):
                    await self._chats.reported()

    def _compared(self, active: Service, candidate: Service) -> tuple[Observed, Observed]:
        baseline, found = self._chats.observations()
        return (
            msgspec.structs.replace(baseline, rss_bytes=_resident_bytes(active)),
            msgspec.structs.replace(found, rss_bytes=_resident_bytes(candidate)),
        )

    # --- embedders -------------------------------------------------------------------------------------

    async def _embed_anew(self, work: _Work, service: Service) -> None:
        """Embed all documents with the candidate and search its vectors from then on; the old ones serve until then."""
        assert isinstance(service.client, LocalEmbedder)
        embedder, dimensions = service.client, service.model.header.embedding_length

        def progress(done: int, total: int) -> None:
            self._say(work, "embedding the documents anew", done, total)

        attempts, switched = 0, False
        try:
            while not switched:
                await self._while_alive(service, self._documents.embed_all(embedder, progress))
                attempts += 1
                self._embedders.hold(0.0)  # for the moment of the switch; the candidate ends it by taking over
                work.decided = True
                work.decided = switched = await self._documents.switch(embedder.identity, dimensions)
                if not switched and attempts < CATCH_UPS:  # else documents come as fast as they are embedded
                    self._embedders.release()
        finally:
            if not switched or self._embedders.active is embedder:
                self._embedders.release()
        self._health.clear(conditions.VECTORS_STALE)

    async def _step(self, work: _Work, model: Model, stage: Stage) -> None:
        await self._services.move(work.order.role, model, stage, work.progress.step, work.id)

    async def _while_alive(self, service: Service, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, which ends with :class:`_RejectedError` when the service's process does."""
        working = asyncio.create_task(work, name="rollout-trial")
        dying = asyncio.create_task(service.died.wait(), name="rollout-candidate-death")
        try:
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _RejectedError(f"its worker died: {service.why}")
            return working.result()
        finally:
            working.cancel()
            dying.cancel()
            await asyncio.gather(working, dying, return_exceptions=True)

    def _say(self, work: _Work, step: str, done: int = 0, total: int = 0) -> None:
        work.progress = Progress(version=work.progress.version + 1, step=step, done=done, total=total)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _check_embedder(embedder: LocalEmbedder) -> None:
    """Whether it makes vectors at all, and different ones of different texts. Raises :class:`_RejectedError`."""
    vectors = await embedder.embed_documents(SAMPLE_TEXTS)
    cosines = vectors @ vectors.T
    if not np.isfinite(vectors).all():
        raise _RejectedError("it makes vectors that are no numbers")
    if (cosines[~np.eye(len(cosines), dtype=bool)] > SAME_COSINE).any():
        raise _RejectedError("it makes the same vector of different texts")


def _resident_bytes(service: Service) -> int:
    usage = read_usage(service.worker.pid) if service.worker.pid is not None else None
    return usage.resident_bytes if usage is not None else 0
