"""A worker role, chat or embed, as the daemon sees it: always asking the same object, whatever process serves it.

The process is restarted with a jittered backoff when it dies. Requests it left unfinished run once more on the
next process and fail with a named error when that one dies too. A model that need not be kept warm has no process
while nobody asks.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from edged.errors import (
    DeadlineError,
    InspectionUnavailableError,
    OutputFormatError,
    PromptTooLongError,
    QueueFullError,
    WorkerError,
    WorkerLostError,
    WorkerUnavailableError,
)
from edged.hardware.neighbours import read_scheduled
from edged.runtime.backoff import pause_seconds
from edged.types import OutputFormat, Priority, Sampling, Segment, Served
from edged.workers.process import ENGINE_COMMAND, LOAD_TIMEOUT_SECONDS, OnSpawn, WorkerProcess, unconfined
from edged.workers.protocol import (
    Alive,
    Cancel,
    Embed,
    Failed,
    Finished,
    FrameError,
    Generate,
    Inspect,
    Inspected,
    Piece,
    Ready,
    Reply,
    Tune,
    Vectors,
    WorkerSettings,
    encode,
)
from edged.workers.state import PINNED, KeepWarm, WorkerState, check_move

SMALLEST_PAUSE_SECONDS = 0.1
LARGEST_PAUSE_SECONDS = 30.0
STALLED_AFTER_SECONDS = 60.0
COMPUTING_STALLED_AFTER = 15
"""So many times longer may be silent whose process computes: a long prompt on a slow device is one step of minutes."""
COMPUTING_LOOK_SECONDS = 1.0
COMPUTING_SHARE = 0.05  # of a core
SILENCE_PRECISION = 1 / 64  # of that time; a timer set anew at every token would cost as much as passing it on
STOP_GRACE_SECONDS = 5.0
DEATH_GRACE_SECONDS = 0.5
INSPECT_SECONDS = 10.0
LOOP_OF_CRASHES = 4
RUNS = 2
GREEDY = Sampling()

FloatArray = npt.NDArray[np.float32]


class Lost(msgspec.Struct, frozen=True):
    """The worker died; what it sent for this request is void and the request runs once more."""


@dataclass(slots=True)
class _Pending:
    """A request between its arrival and its last reply."""

    request: Generate | Embed | Inspect
    expires: float | None
    runs: int = 0
    pieces: int = 0
    running: bool = False
    replies: asyncio.Queue[Reply | Lost | WorkerError] = field(default_factory=asyncio.Queue)


class Worker:
    """One role. ``on_state`` hears every change of state, with a sentence on why; ``served`` is what it did so far.

    ``keep_warm`` says how long the model stays in memory while nobody asks. A process is given up when it is silent
    under a request for ``stalled_after_seconds``, or ``COMPUTING_STALLED_AFTER`` times that while it computes, and when
    it has not loaded its model after ``load_timeout_seconds``.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        socket_path: Path,
        *,
        on_state: Callable[[WorkerState, str], None],
        command: Sequence[str] = ENGINE_COMMAND,
        keep_warm: KeepWarm = PINNED,
        on_spawn: OnSpawn = unconfined,
        stalled_after_seconds: float = STALLED_AFTER_SECONDS,
        load_timeout_seconds: float = LOAD_TIMEOUT_SECONDS,
    ) -> None:
        self.settings = settings
        self.restarts = 0
        self.served = Served()
        self.ready: Ready | None = None
        self._socket_path = socket_path
        self._command = command
        self._keep_warm = keep_warm
        self._stalled_after_seconds = stalled_after_seconds
        self._load_timeout_seconds = load_timeout_seconds
        self._on_state = on_state
        self._on_spawn = on_spawn
        self._state = WorkerState.STOPPED
        self._pending: dict[int, _Pending] = {}
        self._next_id = 1
        self._tuned: Tune | None = None
        self._failures = 0
        self._settled = asyncio.Event()
        self._process: WorkerProcess | None = None
        self._silence: asyncio.Timeout | None = None
        self._silent_since: float | None = None
        self._idleness: asyncio.TimerHandle | None = None
        self._asked = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("worker", kind=settings.kind)

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of the child that serves now."""
        return self._process.pid if self._process is not None else None

    @property
    def tuned(self) -> Tune | None:
        """What the process was told last that it may do; None while that is all of its settings."""
        return self._tuned

    @property
    def unfinished(self) -> int:
        """Requests that have no last reply yet."""
        return len(self._pending)

    def start(self) -> None:
        """Begin serving; returns at once, requests wait for the process to be ready."""
        first = self._keep_warm.first_state
        self._move(first, "starting" if first is WorkerState.STARTING else "nobody has asked yet")
        self._serving = asyncio.create_task(self._serve(), name=f"worker-{self.settings.kind}")

    def tune(self, tune: Tune) -> None:
        """Let the process do more or less from now on, and the ones after it."""
        if tune == self._tuned:
            return
        self._tuned = tune
        if self._process is not None:
            self._process.send(tune)

    async def settled(self) -> None:
        """Return once the first start has either succeeded or failed, or waits to be asked for."""
        await self._settled.wait()

    async def stop(self) -> None:
        """End the process; unfinished requests fail. Idempotent, and a second caller waits for the same end."""
        serving = self._serving
        if serving is None:
            return
        if self._state is not WorkerState.STOPPING:
            self._move(WorkerState.STOPPING, "stopping")
            serving.cancel()
        await asyncio.wait([serving])
        if self._serving is None:
            return
        self._serving = None
        self._fail_all(WorkerUnavailableError(f"the {self.settings.kind} worker is stopping"))
        self._move(WorkerState.STOPPED, "stopped")
        if not serving.cancelled():
            serving.result()  # raises what ended it before its time

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
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        """Stream a generation; the last item is :class:`Finished`. Closing the iterator cancels the work.

        The arguments are those of :class:`~edged.workers.protocol.Generate`. Raises :class:`WorkerError`: queue full,
        prompt too long, output format invalid, deadline exceeded, lost twice, unavailable.
        """
        pending = self._submit(
            Generate(
                id=self._take_id(),
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                sampling=sampling,
                output=output,
                stop=tuple(stop),
                priority=priority,
                prefix_segments=prefix_segments,
                keep=keep,
                deadline_seconds=deadline_seconds,
            ),
            deadline_seconds,
        )
        try:
            while True:
                match await _next_reply(pending):
                    case Finished() as last:
                        yield last
                        return
                    case Piece() | Lost() as item:
                        yield item
                    case WorkerError() as error:
                        raise error
        finally:
            self._forget(pending)

    async def embed(self, texts: Sequence[str], *, deadline_seconds: float | None = None) -> FloatArray:
        """Vectors of unit length, shape (texts, dimensions), in the order of the texts.

        Raises :class:`WorkerError` as :meth:`generate` does.
        """
        return (await self.embed_counted(texts, deadline_seconds=deadline_seconds))[0]

    async def embed_counted(
        self, texts: Sequence[str], *, deadline_seconds: float | None = None
    ) -> tuple[FloatArray, int]:
        """As :meth:`embed`, and how many tokens the texts had together."""
        pending = self._submit(Embed(self._take_id(), tuple(texts)), deadline_seconds)
        try:
            while True:
                match await _next_reply(pending):
                    case Vectors() as vectors:
                        return _matrix(vectors, rows=len(texts)), vectors.tokens
                    case WorkerError() as error:
                        raise error
        finally:
            self._forget(pending)

    async def inspect(self, *, allocations: Path | None = None, tracer: int = 0) -> None:
        """Look into the process so from now on; see :class:`~edged.workers.protocol.Inspect`.

        Raises :class:`WorkerError`: no process, memray is missing or records already, the process died.
        """
        if self._process is None:
            raise WorkerUnavailableError(f"the {self.settings.kind} worker has no process now: {self._state.value}")
        file = "" if allocations is None else str(allocations)
        pending = self._submit(Inspect(self._take_id(), file, tracer), INSPECT_SECONDS)
        try:
            match await _next_reply(pending):
                case WorkerError() as error:
                    raise error
                case Lost():
                    raise WorkerLostError(f"the {self.settings.kind} worker died while it was looked into")
        finally:
            self._forget(pending)

    # --- requests --------------------------------------------------------------------------------------

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _submit(self, request: Generate | Embed | Inspect, deadline_seconds: float | None) -> _Pending:
        settings = self.settings
        crashing = self._failures >= LOOP_OF_CRASHES and self._state is not WorkerState.READY
        if crashing or self._state in (WorkerState.STOPPED, WorkerState.STOPPING):
            raise WorkerUnavailableError(
                f"the {settings.kind} worker is {self._state.value}", hint="see the conditions in /health"
            )
        if len(self._pending) >= settings.queue_limit + settings.sequences:
            raise QueueFullError(
                f"{len(self._pending)} requests are before this one",
                hint="ask again later, or raise queue_limit",
            )
        _check_encodable(request)
        expires = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        pending = _Pending(request, expires)
        self._pending[request.id] = pending
        self._asked.set()
        if self._process is not None:  # else with the next process, together with all that waits
            self._send(pending, self._process)
        return pending

    def _send(self, pending: _Pending, process: WorkerProcess) -> None:
        """Hand a request to the process, with what is left of its time."""
        pending.runs += 1
        pending.running = True
        request = pending.request
        if isinstance(request, Generate) and pending.expires is not None:
            left = max(0.0, pending.expires - time.monotonic())
            request = msgspec.structs.replace(request, deadline_seconds=left)
        process.send(request)
        self._watch(heard=False)

    def _forget(self, pending: _Pending) -> None:
        """The asker has its last reply, or went away: then the worker must stop working on it."""
        if self._pending.pop(pending.request.id, None) is None:
            return
        if self._process is not None and self._state is WorkerState.READY:
            self._process.send(Cancel(pending.request.id))
            self._watch(heard=False)

    def _deliver(self, reply: Reply) -> None:
        match reply:
            case Failed(id=request_id):
                pending = self._pending.pop(request_id, None)
                if pending is not None:
                    pending.replies.put_nowait(_error(reply))
            case Finished(id=request_id) | Vectors(id=request_id) | Inspected(id=request_id):
                pending = self._pending.pop(request_id, None)
                if pending is not None:
                    self.served = _counted(self.served, reply, pending.pieces)
                    pending.replies.put_nowait(reply)
            case Piece(id=request_id):
                pending = self._pending.get(request_id)
                if pending is not None:
                    pending.pieces += 1
                    self.served = _counted(self.served, reply, pending.pieces)
                    pending.replies.put_nowait(reply)

    def _fail_all(self, error: WorkerError) -> None:
        for pending in self._pending.values():
            pending.replies.put_nowait(error)
        self._pending.clear()

    # --- the process -----------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Run one process after another until cancelled."""
        while True:
            if self._state is WorkerState.UNLOADED:
                await self._until_asked()
                self._move(WorkerState.STARTING, "asked")
            reason = await self._serve_one()
            if reason is None:
                self._failures = 0
                self._move(WorkerState.UNLOADED, f"nobody asked for {self._keep_warm.idle_seconds:g} s")
                continue
            self._failures += 1
            self.restarts += 1
            self._settle_after_death(reason)
            self._move(WorkerState.BACKOFF, reason)
            await asyncio.sleep(
                pause_seconds(
                    self._failures,
                    smallest=SMALLEST_PAUSE_SECONDS,
                    largest=LARGEST_PAUSE_SECONDS,
                    random=random.random(),  # noqa: S311 - jitter, no secret
                )
            )
            self._move(WorkerState.STARTING, f"starting again after: {reason}")

    async def _until_asked(self) -> None:
        """Return once there is a request: the event may be about one that is over."""
        while not self._pending:
            self._asked.clear()
            await self._asked.wait()

    async def _serve_one(self) -> str | None:
        """Serve with one process until it is gone; returns why, None where it was unloaded."""
        try:
            process = await WorkerProcess.start(
                self.settings,
                self._socket_path,
                self._command,
                load_timeout_seconds=self._load_timeout_seconds,
                on_spawn=self._on_spawn,
            )
        except WorkerError as error:
            return error.message
        self._process, self.ready = process, process.ready
        reason = "hung up"
        unloaded = False
        try:
            self._move(WorkerState.READY, process.ready.description)
            if self._tuned is not None:
                process.send(self._tuned)
            for pending in self._pending.values():
                self._send(pending, process)
            await self._relay(process)
            unloaded = self._process is None
        except FrameError as error:
            reason = f"sent garbage: {error}"
        except TimeoutError:
            reason = f"made no progress for {self._silent_seconds:.1f} s"
        finally:
            self._process = self._silence = None
            self._watch_idleness()
            # Cancelled here means stopping; a process that hung up or stalled is not waited for.
            told = unloaded or self._state is WorkerState.STOPPING
            ending = await _end(process, STOP_GRACE_SECONDS if told else DEATH_GRACE_SECONDS)
        return None if unloaded else f"{reason}, {ending}"

    async def _relay(self, process: WorkerProcess) -> None:
        """Hand out what the process says until it hangs up. Raises ``TimeoutError`` when it stalls."""
        self._silent_since = None
        while True:
            try:
                return await self._listen(process)
            except TimeoutError:
                longest = COMPUTING_STALLED_AFTER * self._stalled_after_seconds
                stalled = self._silent_seconds >= longest or not await self._computes(process)
                if stalled and self._pending:  # else the last asker went away meanwhile
                    raise
                self._log.warning("worker_silent", pid=process.pid, seconds=self._silent_seconds, at_most=longest)

    async def _listen(self, process: WorkerProcess) -> None:
        async with asyncio.timeout(None) as self._silence, contextlib.aclosing(process.replies()) as replies:
            self._watch(heard=False)
            async for reply in replies:
                if not isinstance(reply, Alive | Ready):
                    self._failures = 0
                    self._deliver(reply)
                self._watch(heard=True)

    @property
    def _silent_seconds(self) -> float:
        return 0.0 if self._silent_since is None else asyncio.get_running_loop().time() - self._silent_since

    async def _computes(self, process: WorkerProcess) -> bool:
        """Whether it uses the CPU now. One that hangs waits for something that does not come."""
        before = await asyncio.to_thread(read_scheduled, process.pid)
        await asyncio.sleep(COMPUTING_LOOK_SECONDS)
        after = await asyncio.to_thread(read_scheduled, process.pid)
        return after.run - before.run >= COMPUTING_SHARE * COMPUTING_LOOK_SECONDS * 1e9

    def _watch(self, *, heard: bool) -> None:
        """What is asked, or how much, may have changed."""
        self._watch_silence(heard=heard)
        self._watch_idleness()

    def _watch_silence(self, *, heard: bool) -> None:
        """While nothing is asked, silence is right; while something is, the worker says it is alive.

        Only hearing from it starts the time anew: a hung worker must not live on the requests it is sent.
        """
        silence = self._silence
        if silence is None or silence.expired():
            return
        if not self._pending:
            self._silent_since = None
            silence.reschedule(None)
            return
        limit, now = silence.when(), asyncio.get_running_loop().time()
        if heard or self._silent_since is None:
            self._silent_since = now
        elif limit is not None:
            return
        later = now + self._stalled_after_seconds
        if limit is None or later - limit > self._stalled_after_seconds * SILENCE_PRECISION:
            silence.reschedule(later)

    def _watch_idleness(self) -> None:
        """Count the time for which a process is there and nothing asked, where the model need not be kept."""
        seconds = self._keep_warm.unload_after_seconds(unfinished=len(self._pending))
        if self._process is None or seconds is None:
            if self._idleness is not None:
                self._idleness.cancel()
                self._idleness = None
        elif self._idleness is None:
            self._idleness = asyncio.get_running_loop().call_later(seconds, self._unload, self._process)

    def _unload(self, process: WorkerProcess) -> None:
        """From this moment on requests wait for the next process."""
        self._process = self._idleness = None
        process.hang_up()

    def _settle_after_death(self, reason: str) -> None:
        """Decide for each unfinished request whether it runs again."""
        hopeless = self._failures >= LOOP_OF_CRASHES
        for request_id, pending in list(self._pending.items()):
            if pending.runs < RUNS and not hopeless:
                if pending.running:
                    pending.running = False
                    pending.replies.put_nowait(Lost())
                continue
            del self._pending[request_id]
            pending.replies.put_nowait(self._obituary(pending.runs, reason))

    def _obituary(self, runs: int, reason: str) -> WorkerError:
        if not runs:
            return WorkerUnavailableError(
                f"no {self.settings.kind} worker: {reason}", hint="see the conditions in /health and the daemon's log"
            )
        return WorkerLostError(
            f"the {self.settings.kind} worker died under this request, {runs} times: {reason}",
            hint="see the daemon's log; a model too large for the memory is a common cause",
        )

    def _move(self, state: WorkerState, why: str) -> None:
        check_move(self._state, state)
        self._log.info("worker_state", old=self._state.value, new=state.value, why=why, pid=self.pid)
        self._state = state
        if state is not WorkerState.STARTING:
            self._settled.set()
        self._on_state(state, why)


async def _next_reply(pending: _Pending) -> Reply | Lost | WorkerError:
    """The next item for the asker; its deadline holds also while no process is there or it is silent."""
    if pending.expires is None or not pending.replies.empty():
        return await pending.replies.get()
    try:
        async with asyncio.timeout_at(pending.expires):  # the loop's clock is time.monotonic
            return await pending.replies.get()
    except TimeoutError:
        return DeadlineError("the deadline came before the work was done")


async def _end(process: WorkerProcess, grace_seconds: float) -> str:
    """End a process even when cancelled meanwhile: it must not outlive its role."""
    ending = asyncio.create_task(process.end(grace_seconds), name="worker-end")
    try:
        return await asyncio.shield(ending)
    except asyncio.CancelledError:
        await asyncio.wait([ending])
        raise


def _check_encodable(request: Generate | Embed | Inspect) -> None:
    """Refuse what can never be sent, before anybody waits for it."""
    try:
        encode(request)
    except FrameError as error:
        raise PromptTooLongError(f"this text cannot be handed to a worker: {error}") from error


def _counted(served: Served, reply: Reply, pieces: int) -> Served:
    """What was served, with this reply. A piece is at least a token: those it hid are counted at the end."""
    replace = msgspec.structs.replace
    match reply:
        case Piece():
            return replace(served, completion_tokens=served.completion_tokens + 1)
        case Vectors(tokens=tokens):
            return replace(served, requests=served.requests + 1, prompt_tokens=served.prompt_tokens + tokens)
        case Finished():
            return Served(
                requests=served.requests + 1,
                prompt_tokens=served.prompt_tokens + reply.prompt_tokens,
                cached_tokens=served.cached_tokens + reply.cached_tokens,
                completion_tokens=served.completion_tokens + max(0, reply.completion_tokens - pieces),
                finished_tokens=served.finished_tokens + reply.completion_tokens,
                queue_seconds=served.queue_seconds + reply.queue_ms / 1e3,
                prefill_seconds=served.prefill_seconds + reply.prefill_ms / 1e3,
                generate_seconds=served.generate_seconds + reply.generate_ms / 1e3,
            )
    return served


def _matrix(vectors: Vectors, rows: int) -> FloatArray:
    if len(vectors.data) != rows * vectors.dimensions * 4:
        raise WorkerError(f"the worker sent {len(vectors.data)} bytes for {rows} vectors of {vectors.dimensions}")
    return np.frombuffer(vectors.data, dtype="<f4").reshape(rows, vectors.dimensions)


REFUSALS: tuple[type[WorkerError], ...] = (
    QueueFullError,
    PromptTooLongError,
    DeadlineError,
    OutputFormatError,
    InspectionUnavailableError,
)


def _error(failed: Failed) -> WorkerError:
    """The daemon's error for what a worker refused."""
    kind = next((kind for kind in REFUSALS if kind.code == failed.code), WorkerError)
    if failed.retry_after_seconds is None:
        return kind(failed.message)
    return kind(failed.message, retry_after_seconds=round(failed.retry_after_seconds, 3))
