"""The models in service: of each role the one that is active, with its worker, as it was chosen last."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from edged.errors import EdgedError
from edged.models import rollout as rules
from edged.models.rollout import Lineup, Role, Stage
from edged.runtime import health as conditions
from edged.runtime.health import ConditionKind, Health
from edged.serving.chat import LocalChat
from edged.serving.embed import LocalEmbedder
from edged.serving.launch import Launcher, Model
from edged.serving.moves import Choice, Journal
from edged.serving.pool import ChatPool, EmbedderPool
from edged.workers.protocol import Ready, WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Worker

DOWN: Final[Mapping[Role, ConditionKind]] = {"chat": conditions.CHAT_DOWN, "embed": conditions.EMBED_DOWN}
MISSING: Final[Mapping[Role, ConditionKind]] = {
    "chat": conditions.CHAT_MODEL_MISSING,
    "embed": conditions.EMBED_MODEL_MISSING,
}

log = structlog.get_logger("services")


@dataclass(eq=False)
class Service:
    """A model with its worker. ``died`` is set when a process of it ends unasked or cannot start; ``why`` says so."""

    role: Role
    model: Model
    worker: Worker
    client: LocalChat | LocalEmbedder
    beside: bool
    died: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""


@dataclass(eq=False)
class Standing:
    """What is known of one role: the active service, every model's stage, and what was chosen and served before."""

    active: Service | None = None
    lineup: Lineup = field(default_factory=dict)
    choice: Choice | None = None


class Switches(Protocol):
    """The stored documents, as far as the start must know them."""

    async def switched_to(self) -> str | None: ...

    async def noted(self) -> None: ...


class Services:
    """Owns the workers of both roles: whoever launches one here ends it here, and :meth:`stop` ends the rest."""

    def __init__(
        self,
        launcher: Launcher,
        journal: Journal,
        health: Health,
        *,
        chats: ChatPool,
        embedders: EmbedderPool,
        documents: Switches,
        on_ready: Callable[[WorkerSettings, Ready], None] = lambda _settings, _ready: None,
    ) -> None:
        """``on_ready`` hears of each load of an active model."""
        self._launcher = launcher
        self._journal = journal
        self._health = health
        self._chats = chats
        self._embedders = embedders
        self._documents = documents
        self._on_ready = on_ready
        self._standings: dict[Role, Standing] = {role: Standing() for role in rules.ROLES}
        self._launched: set[Service] = set()

    def active(self, role: Role) -> Service | None:
        """What serves a role now."""
        return self._standings[role].active

    def workers(self, role: Role) -> list[Worker]:
        """All of a role that run, the one that serves it first."""
        active = self.active(role)
        others = [each.worker for each in self._launched if each.role == role and each is not active]
        return [*([active.worker] if active is not None else []), *others]

    def standing(self, role: Role) -> Standing:
        """All that is known of a role; a rollout changes it together with the journal."""
        return self._standings[role]

    # --- the start -------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Start what was activated last, or what is configured. What is missing becomes a condition.

        A rollout that was under way when the daemon ended is over; its candidate is not served.
        """
        await self._journal.interrupted()
        for role in self._standings:
            await self._begin(role)

    async def _begin(self, role: Role) -> None:
        standing = self._standings[role]
        configured = self._launcher.configured(role)
        if role == "embed":
            await self._catch_up(configured)
        standing.choice = await self._journal.choice(role)
        chosen = (standing.choice.model, standing.choice.configured) if standing.choice is not None else None
        name = rules.choose(configured, chosen)
        model = await self._find_or_say(role, name)
        if model is None and name != configured:
            model = await self._find_or_say(role, configured)
        moves = rules.recovery(await self._journal.lineup(role), model.identity if model is not None else None)
        if moves:
            await self._journal.moved(role, moves, "the daemon starts")
        if model is not None:
            standing.lineup = {model.identity: Stage.ACTIVE}
            self.serve(role, self.launch(role, model))

    async def _catch_up(self, configured: str) -> None:
        """The documents were switched to another embedder, and the daemon ended before that was noted as the choice."""
        switched_to = await self._documents.switched_to()
        if switched_to is not None:
            before = await self._journal.choice("embed")
            name = switched_to.partition("@")[0]
            if before is None or before.model != name:
                previous = before.model if before is not None else configured
                choice = Choice(model=name, configured=configured, previous=previous)
                await self._journal.moved("embed", (), "", choice=choice)
            await self._documents.noted()

    async def _find_or_say(self, role: Role, name: str) -> Model | None:
        try:
            return await asyncio.to_thread(self._launcher.find, role, name)
        except EdgedError as error:
            hint = await asyncio.to_thread(self._launcher.advice, role, name)
            self._health.set(MISSING[role], error.message, hint=hint)
            return None

    async def settled(self) -> None:
        """Return once each active worker has either loaded its model or failed to."""
        for standing in self._standings.values():
            if standing.active is not None:
                await standing.active.worker.settled()

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(self.end(service) for service in list(self._launched)))

    # --- one service -----------------------------------------------------------------------------------

    def launch(self, role: Role, model: Model, *, beside: bool = False) -> Service:
        """Start a worker for a model; nobody is served by it yet."""

        def on_state(state: WorkerState, why: str) -> None:
            self._heard(role, service, state, why)

        worker = self._launcher.worker(role, model, on_state=on_state, beside=beside)
        client: LocalChat | LocalEmbedder
        if role == "chat":
            assert model.template is not None
            client = LocalChat(worker, model.template, model.identity)
        else:
            client = LocalEmbedder(worker, model.identity, model.prefixes)
        service = Service(role, model, worker, client, beside)
        self._launched.add(service)
        worker.start()
        return service

    async def end(self, service: Service) -> None:
        """End its worker. Idempotent."""
        await service.worker.stop()
        self._launched.discard(service)

    def serve(self, role: Role, service: Service) -> None:
        """Give a service all requests of its role from now on."""
        self._standings[role].active = service
        if isinstance(service.client, LocalEmbedder):
            self._embedders.serve(service.client)
        elif self._chats.candidate is service.client:
            self._chats.promote()
        else:
            self._chats.serve(service.client)
        self._show(role, service)

    async def move(self, role: Role, model: Model, stage: Stage, why: str, rollout_id: int) -> None:
        """Take one move of a model's life: on disk, then here."""
        standing = self._standings[role]
        lineup, move = rules.move(standing.lineup, model.identity, stage)
        await self._journal.moved(role, [move], why, rollout_id=rollout_id)
        standing.lineup = lineup
        log.info("model_moved", model=model.identity, old=move.old and move.old.value, new=stage.value)

    def _heard(self, role: Role, service: Service, state: WorkerState, why: str) -> None:
        """A worker's state changed: of the active one the conditions tell, of a candidate its rollout."""
        if state is WorkerState.BACKOFF:
            service.why = why
            service.died.set()
        if self._standings[role].active is service:
            self._show(role, service)

    def _show(self, role: Role, service: Service) -> None:
        if service.worker.state is WorkerState.BACKOFF:
            self._health.set(DOWN[role], service.why)
        elif service.worker.state is WorkerState.READY and service.worker.ready is not None:
            self._health.clear(DOWN[role])
            self._on_ready(service.worker.settings, service.worker.ready)
