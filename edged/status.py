"""The truth as ``/health`` and the retained MQTT status show it: a view, holding only counts it re-reads."""

import asyncio
import time
from collections.abc import Callable

from edged import __version__
from edged.events.event import Outcome
from edged.events.inbox import Inbox
from edged.gateway import wire
from edged.gateway.http import Documents
from edged.gateway.mqtt import MqttGateway
from edged.hardware.features import built_with
from edged.hardware.placement import Bounds
from edged.probe.feed import Feed, Link
from edged.probe.profile import spent_seconds
from edged.probe.profiles import Profiles
from edged.runtime.health import Health
from edged.serving.care import Care
from edged.serving.restraint import Restraint
from edged.store.knowledge import KnowledgeStore
from edged.types import DocumentInfo, Ingested
from edged.workers.state import WorkerState
from edged.workers.worker import Worker

RECOUNT_SECONDS = 1.0

NamedWorker = tuple[str, Worker | None]


class StatusBoard:
    """Counts are read again after a change, at most once a second; :meth:`run` is one supervised service."""

    def __init__(
        self,
        health: Health,
        inbox: Inbox,
        store: KnowledgeStore,
        *,
        device: str,
        chat: Callable[[], NamedWorker],
        embed: Callable[[], NamedWorker],
        hardware: Callable[[], wire.HardwareBody | None] = lambda: None,
        probe: Callable[[], wire.ProbeBody | None] = lambda: None,
    ) -> None:
        self._health = health
        self._inbox = inbox
        self._store = store
        self._device = device
        self._chat = chat
        self._embed = embed
        self._hardware = hardware
        self._probe = probe
        self._started = time.monotonic()
        self._changed = asyncio.Event()
        self._changed.set()
        self._events = wire.EventsBody()
        self._documents = 0
        self._chunks = 0
        self.mqtt: MqttGateway | None = None

    def changed(self) -> None:
        """The counts are no longer right."""
        self._changed.set()

    async def run(self) -> None:
        """Keep the counts right until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.recount()
            await asyncio.sleep(RECOUNT_SECONDS)

    async def recount(self) -> None:
        """Read the counts from the stores now."""
        found = await self._inbox.counts()
        self._documents, self._chunks = await self._store.counts()
        self._events = wire.EventsBody(
            open=found["open"],
            closed=sum(found.get(outcome.value, 0) for outcome in Outcome),
            failed=found.get(Outcome.FAILED.value, 0) + found.get(Outcome.REJECTED.value, 0),
            expired=found.get(Outcome.EXPIRED.value, 0),
            unpublished=found["outbox"],
        )

    def snapshot(self) -> wire.StatusBody:
        """Everything, as of now."""
        protocol = self.mqtt.protocol if self.mqtt is not None else None
        (chat_name, chat), (embed_name, embed) = self._chat(), self._embed()
        return wire.StatusBody(
            status=self._health.status(),
            version=__version__,
            uptime=round(time.monotonic() - self._started, 3),
            model_loaded=chat is not None and chat.state is WorkerState.READY,
            vector_store_ready=embed is not None,
            conditions=[
                wire.ConditionBody(
                    code=held.code, severity=held.severity.value, text=held.text, hint=held.hint, since=held.since
                )
                for held in self._health.conditions()
            ],
            chat=_worker_body(chat_name, chat),
            embed=_worker_body(embed_name, embed),
            engine=_engine_body(chat, embed),
            hardware=self._hardware(),
            probe=self._probe(),
            documents=self._documents,
            chunks=self._chunks,
            events=self._events,
            mqtt=wire.MqttBody(connected=protocol is not None, protocol=protocol),
        )

    def summary(self) -> dict[str, object]:
        """The retained MQTT status."""
        return {
            "status": self._health.status(),
            "device": self._device,
            "version": __version__,
            "conditions": [held.code for held in self._health.conditions()],
        }

    def farewell(self) -> dict[str, object]:
        """The retained MQTT status of a daemon that is gone: its last words, and its last will."""
        return {"status": "offline", "device": self._device}

    def watching(self, documents: Documents) -> Documents:
        """The same documents; a change to them is noticed here."""
        return _Watched(documents, self)


class _Watched:
    """Documents whose changes are counted."""

    def __init__(self, documents: Documents, board: StatusBoard) -> None:
        self._documents = documents
        self._board = board

    async def add(
        self, *, collection: str, document_id: str | None, title: str | None, format: str, text: str
    ) -> Ingested:
        ingested = await self._documents.add(
            collection=collection, document_id=document_id, title=title, format=format, text=text
        )
        await self._board.recount()
        return ingested

    async def remove(self, collection: str, document_id: str) -> None:
        await self._documents.remove(collection, document_id)
        await self._board.recount()

    async def list(self, collection: str | None) -> list[DocumentInfo]:
        return await self._documents.list(collection)

    async def get(self, collection: str, document_id: str) -> DocumentInfo:
        return await self._documents.get(collection, document_id)


def _worker_body(model: str, worker: Worker | None) -> wire.WorkerBody:
    if worker is None:
        return wire.WorkerBody(model=model, state="missing")
    active = min(worker.unfinished, worker.settings.sequences)
    return wire.WorkerBody(
        model=model,
        state=worker.state.value,
        description=worker.ready.description if worker.ready else None,
        threads=worker.settings.threads,
        pid=worker.pid,
        restarts=worker.restarts,
        active=active,
        queued=worker.unfinished - active,
    )


def hardware_body(care: Care, restraint: Restraint) -> wire.HardwareBody:
    """What the care service has found and decided."""
    placement, hottest, tune = care.placement, care.hottest, care.tuned
    bounds = {"daemon": placement.daemon, "chat": placement.chat, "embed": placement.embed}
    return wire.HardwareBody(
        cgroups=care.uses_cgroups,
        placement={name: _bounds_body(each) for name, each in bounds.items()},
        reserved_cores=list(placement.reserved),
        celsius=None if hottest is None else hottest.celsius,
        slowed_at_celsius=None if hottest is None else hottest.slows_at,
        heat_step=care.governor.level,
        memory=care.pressure.stage.value,
        sequences=None if tune is None else tune.sequences,
        longest_answer=restraint.longest_answer,
    )


def probe_body(feed: Feed, profiles: Profiles) -> wire.ProbeBody | None:
    """By which means the workers are measured, at what cost."""
    latest = profiles.latest
    if latest is None:
        return None
    recent = profiles.window("10s")
    return wire.ProbeBody(
        linked=feed.link is Link.HEARD,
        step=latest.step.value,
        reason=latest.reason,
        score=round(recent.score.value, 3),
        cpu_share=round(spent_seconds(recent.probe) / recent.seconds, 5) if recent.seconds else 0.0,
        resident_bytes=latest.probe.resident_bytes,
    )


def _bounds_body(bounds: Bounds) -> wire.BoundsBody:
    return wire.BoundsBody(
        cores=list(bounds.cores),
        threads=bounds.threads,
        quota_cores=bounds.quota_cores,
        weight=bounds.weight,
        memory_high=bounds.memory_high,
        memory_max=bounds.memory_max,
    )


def _engine_body(*workers: Worker | None) -> wire.EngineBody | None:
    """Both run the same build; the first that has said what it is, says it for all."""
    ready = next((worker.ready for worker in workers if worker is not None and worker.ready is not None), None)
    if ready is None:
        return None
    backends = {backend: list(features) for backend, features in built_with(ready.system).items()}
    return wire.EngineBody(gpu=ready.gpu, backends=backends)
