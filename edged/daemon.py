"""The composition root: builds every part, in the order they start; they stop in reverse."""

import asyncio
import contextlib
import errno
import fcntl
import functools
import gc
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import msgspec
import structlog
from fastapi import FastAPI

from edged import log
from edged.config import Config, split_listen
from edged.errors import ConfigError, DiskFullError, ModelError
from edged.events.admission import Admission
from edged.events.dispatch import Dispatcher
from edged.events.event import Event, Outcome
from edged.events.inbox import Accepted, Inbox
from edged.events.outbox import Outbox
from edged.events.trigger import TopicRule
from edged.gateway.http import HttpServer, create_app, is_loopback
from edged.gateway.mqtt import MqttGateway, Rendering
from edged.hardware import detect, placement
from edged.models.catalog import Catalog
from edged.models.gguf import GgufHeader, read_header
from edged.models.manifest import Prefixes, TemplateSource
from edged.models.template import ChatTemplate
from edged.rag.answer import Answerer, Settings
from edged.rag.ingest import Library
from edged.rag.retrieve import Retriever
from edged.runtime import health as conditions
from edged.runtime.health import ConditionKind, Health
from edged.runtime.metrics import Metrics
from edged.runtime.supervise import Supervisor
from edged.serving.chat import LocalChat
from edged.serving.embed import LocalEmbedder
from edged.serving.pool import ChatPool
from edged.status import StatusBoard
from edged.store.knowledge import KnowledgeStore
from edged.workers.process import ENGINE_COMMAND
from edged.workers.protocol import WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Worker

HTTP_GRACE_SECONDS = 3.0
PRUNE_EVERY_SECONDS = 3600.0
EMBED_BATCH_TOKENS = 1024
SECONDS_A_DAY = 86_400.0


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model file that is there, with what its manifest and its header say."""

    path: Path
    header: GgufHeader
    identity: str
    template: ChatTemplate | None
    prefixes: Prefixes


def serve(config: Config) -> int:
    """Run the daemon until SIGTERM or SIGINT; a second signal forces. Returns the exit status.

    Raises :class:`EdgedError` when it cannot start.
    """
    log.configure(config.log.level)
    return asyncio.run(_serve(config))


async def _serve(config: Config) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop)
    async with running(config):
        spare_collector()
        await stop.wait()
    return 0


def spare_collector() -> None:
    """Exempt what stands after the start from garbage collection: walking it holds every event up for 20 ms."""
    gc.collect()
    gc.freeze()


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(130)  # asked twice: what is acknowledged is on disk, and nothing else is worth waiting for
    stop.set()


@contextlib.asynccontextmanager
async def running(
    config: Config, *, worker_command: Sequence[str] = ENGINE_COMMAND
) -> AsyncGenerator[HttpServer, None]:
    """A whole daemon, for the time of the block. Raises :class:`EdgedError` when it cannot start."""
    started = time.monotonic()
    api_key = _api_key(config)
    health = Health()
    health.set(conditions.STARTING, "loading")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_only_one(config))
        inbox = await Inbox.open(config.events_db)
        stack.push_async_callback(inbox.close)
        store = await KnowledgeStore.open(config.knowledge_db)
        stack.push_async_callback(store.close)
        models = await _start_models(stack, config, health, worker_command)
        if models.embed_model is not None:
            await _use_embedder(store, models.embed_model, health)

        metrics = Metrics(health)
        answerer = _answerer(config, store, models, metrics)
        board = StatusBoard(
            health,
            inbox,
            store,
            chat=(_shown(models.chat_model, config.chat.model), models.chat_worker),
            embed=(_shown(models.embed_model, config.embed.model), models.embed_worker),
        )
        supervisor = Supervisor()
        stack.push_async_callback(supervisor.stop_all)
        supervisor.start("status", board.run)
        supervisor.start("prune", functools.partial(_prune, inbox, config, board))
        admission = Admission(health, limit=config.events.max_pending, open_events=await inbox.open_count())
        _start_events(supervisor, config, health, inbox, answerer, admission, metrics, board)

        app = create_app(
            answers=answerer,
            documents=board.watching(Library(store, models.embedder)),
            status=board,
            metrics=metrics.render,
            api_key=api_key,
            max_body_bytes=config.http.max_body_bytes,
        )
        server = _http_server(config, app, health)
        await server.start()
        stack.push_async_callback(server.stop, HTTP_GRACE_SECONDS)
        supervisor.start("ready", functools.partial(_ready, health, models, started))
        try:
            yield server
        finally:
            health.set(conditions.STOPPING, "stopping")


def _start_events(
    supervisor: Supervisor,
    config: Config,
    health: Health,
    inbox: Inbox,
    answerer: Answerer,
    admission: Admission,
    metrics: Metrics,
    board: StatusBoard,
) -> None:
    """The event path: MQTT → inbox → dispatch → outbox → MQTT, each telling the next that there is work."""

    def accepted(result: Accepted) -> None:
        metrics.events_accepted.labels(result.status).inc()
        board.changed()
        if result.status == "new":
            admission.opened()
            dispatcher.wake()
        else:
            outbox.wake()

    def closed(_event: Event, outcome: Outcome, seconds: float) -> None:
        metrics.events_closed.labels(outcome.value).inc()
        metrics.event_seconds.observe(seconds)
        admission.closed()
        board.changed()
        outbox.wake()

    mqtt = MqttGateway(
        config.mqtt,
        inbox,
        health,
        rules=[TopicRule(**topic.model_dump()) for topic in config.events.topics],
        admission=admission,
        on_accepted=accepted,
        status=board.summary,
    )
    outbox = Outbox(inbox, mqtt, health, window=config.events.outbox_window)
    dispatcher = Dispatcher(
        inbox,
        answerer,
        Rendering(),
        health,
        decide=mqtt.decide,
        concurrency=config.events.concurrency,
        on_closed=closed,
        on_progress=mqtt.progress if config.mqtt.stream_answers else None,
    )
    metrics.watch("edged_events_open", "Events without an outcome", lambda: admission.open_events)
    supervisor.start("outbox", outbox.run)
    supervisor.start("dispatch", dispatcher.run)
    if config.mqtt.enabled:
        board.mqtt = mqtt
        supervisor.start("mqtt", mqtt.run)
        health.subscribe(mqtt.status_changed)


# --- models ----------------------------------------------------------------------------------------


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """The two models and their workers; each may be missing."""

    chat_model: Model | None
    chat_worker: Worker | None
    embed_model: Model | None
    embed_worker: Worker | None

    @property
    def chat(self) -> LocalChat | None:
        if self.chat_model is None or self.chat_worker is None or self.chat_model.template is None:
            return None
        return LocalChat(self.chat_worker, self.chat_model.template, self.chat_model.identity)

    @property
    def embedder(self) -> LocalEmbedder | None:
        if self.embed_model is None or self.embed_worker is None:
            return None
        return LocalEmbedder(self.embed_worker, self.embed_model.identity, self.embed_model.prefixes)


async def _start_models(
    stack: contextlib.AsyncExitStack, config: Config, health: Health, command: Sequence[str]
) -> Models:
    chat, embed = await asyncio.to_thread(_find_models, config, health)
    threads = placement.place(detect.cpu(), chat_threads=config.chat.threads, embed_threads=config.embed.threads)
    start = functools.partial(_start_worker, stack, config, health, command)
    return Models(
        chat_model=chat,
        chat_worker=start(_chat_settings(config, chat, threads.chat_threads), down=conditions.CHAT_DOWN),
        embed_model=embed,
        embed_worker=start(_embed_settings(config, embed, threads.embed_threads), down=conditions.EMBED_DOWN),
    )


def _find_models(config: Config, health: Health) -> tuple[Model | None, Model | None]:
    find = functools.partial(_find_model, Catalog(config.models_dir, config.models_cache_dir), health)
    return (
        find(config.chat.model, config.chat.path, conditions.CHAT_MODEL_MISSING, chats=True),
        find(config.embed.model, config.embed.path, conditions.EMBED_MODEL_MISSING, chats=False),
    )


def _find_model(
    catalog: Catalog, health: Health, name: str, path: Path | None, missing: ConditionKind, *, chats: bool
) -> Model | None:
    """The model a section names; a missing or broken one is a condition, and the rest keeps serving."""
    try:
        info = None if path is not None else catalog.info(name)
        file = path if path is not None else catalog.path(name)
        header = read_header(file)
        source: TemplateSource = "gguf" if header.chat_template else "plain"
        return Model(
            path=file,
            header=header,
            identity=catalog.identity(name if path is None else path),
            template=ChatTemplate.of(info.template if info else source, header) if chats else None,
            prefixes=info.prefixes if info else Prefixes(),
        )
    except ModelError as error:
        health.set(missing, error.message)
        return None


def _chat_settings(config: Config, model: Model | None, threads: int) -> WorkerSettings | None:
    if model is None:
        return None
    return WorkerSettings(
        kind="chat",
        model=str(model.path),
        threads=threads,
        context_tokens=config.chat.context_tokens,
        sequences=config.chat.sequences,
        batch_tokens=config.chat.batch_tokens,
        queue_limit=config.chat.queue_limit,
    )


def _embed_settings(config: Config, model: Model | None, threads: int) -> WorkerSettings | None:
    if model is None:
        return None
    return WorkerSettings(
        kind="embed",
        model=str(model.path),
        threads=threads,
        batch_tokens=EMBED_BATCH_TOKENS,
        queue_limit=config.embed.queue_limit,
    )


def _start_worker(
    stack: contextlib.AsyncExitStack,
    config: Config,
    health: Health,
    command: Sequence[str],
    settings: WorkerSettings | None,
    *,
    down: ConditionKind,
) -> Worker | None:
    if settings is None:
        return None

    def show(state: WorkerState, why: str) -> None:
        if state is WorkerState.READY:
            health.clear(down)
        elif state is WorkerState.BACKOFF:
            health.set(down, why)

    socket_path = config.run_dir / f"worker-{settings.kind}.sock"
    worker = Worker(settings, socket_path, on_state=show, command=command)
    worker.start()
    stack.push_async_callback(worker.stop)
    return worker


async def _use_embedder(store: KnowledgeStore, model: Model, health: Health) -> None:
    left_out = await store.use_embedder(model.identity, model.header.embedding_length)
    if left_out:
        health.set(conditions.VECTORS_STALE, f"{left_out} passages were embedded by another model")


def _shown(model: Model | None, name: str) -> str:
    return model.identity if model is not None else name


# --- parts -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_one(config: Config) -> Iterator[None]:
    """Hold the lock of a home directory: two daemons over the same databases would each believe they own them."""
    try:
        config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (config.run_dir / "lock").open("w")
    except OSError as error:
        kind = DiskFullError if error.errno == errno.ENOSPC else ConfigError
        raise kind(
            f"cannot use the home directory {config.home}: {error.strerror}", hint="set EDGED_HOME to one you may write"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another edged runs in {config.home}", hint="stop it, or give this one its own home (EDGED_HOME)"
            ) from error
        yield


def _api_key(config: Config) -> str | None:
    """The key that requests must carry; none on loopback."""
    host, _ = split_listen(config.http.listen)
    if is_loopback(host):
        return None
    path = config.api_key_path
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"http.listen {config.http.listen} is open to others and there is no API key in {path}",
            hint=f"make one: (umask 077; openssl rand -hex 32 > {path})",
        ) from error
    if len(key) < 16:
        raise ConfigError(f"the API key in {path} is too short", hint="use at least 16 characters")
    return key


def _answerer(config: Config, store: KnowledgeStore, models: Models, metrics: Metrics) -> Answerer:
    settings = Settings(
        passages=config.rag.passages, budget_tokens=config.rag.budget_tokens, max_tokens=config.rag.max_tokens
    )
    retriever = Retriever(store, models.embedder, near=config.rag.near)
    return Answerer(retriever, ChatPool(models.chat), settings, on_answer=metrics.answered)


def _http_server(config: Config, app: FastAPI, health: Health) -> HttpServer:
    host, port = split_listen(config.http.listen)
    if not is_loopback(host) and config.http.tls_cert is None:
        health.set(conditions.HTTP_PLAIN, f"{config.http.listen} is served without TLS")
    return HttpServer(app, host=host, port=port, tls_cert=config.http.tls_cert, tls_key=config.http.tls_key)


async def _ready(health: Health, models: Models, started: float) -> None:
    """Say so once each worker has either loaded or failed: from then on its own condition tells."""
    for worker in (models.chat_worker, models.embed_worker):
        if worker is not None:
            await worker.settled()
    health.clear(conditions.STARTING)
    structlog.get_logger("daemon").info("ready", seconds=round(time.monotonic() - started, 3))


async def _prune(inbox: Inbox, config: Config, board: StatusBoard) -> None:
    while True:
        before = time.time() - config.events.keep_days * SECONDS_A_DAY
        gone = await inbox.prune(closed_before=before, keep_bytes=config.events.keep_bytes)
        if gone:
            structlog.get_logger("daemon").info("events_pruned", events=gone)
            board.changed()
        await asyncio.sleep(PRUNE_EVERY_SECONDS)
