"""The composition root: builds every part, in the order they start; they stop in reverse."""

import asyncio
import contextlib
import faulthandler
import functools
import gc
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import structlog
from fastapi import FastAPI
from threadpoolctl import threadpool_limits

from edged import __version__, credentials, log
from edged.config import Config, Topic, is_loopback, split_listen
from edged.events.admission import Admission
from edged.events.dispatch import Dispatcher
from edged.events.event import Event, Outcome
from edged.events.inbox import Accepted, Inbox
from edged.events.outbox import Outbox
from edged.events.retention import Retention
from edged.events.trigger import TopicRule
from edged.gateway.http import HttpServer, create_app
from edged.gateway.mqtt import MqttGateway, Rendering
from edged.hardware import detect
from edged.hardware.thermal import Thermometer
from edged.hardware.usage import Usage, read_usage
from edged.models.catalog import Catalog
from edged.models.rollout import ROLES, Limits, Role
from edged.probe.broadcast import Broadcast
from edged.probe.exposition import Exposition
from edged.probe.feed import Feed
from edged.probe.profile import Device, Warmth, Weights
from edged.probe.profiles import Profiles
from edged.probe.progress import Subject
from edged.probe.publish import Publisher
from edged.probe.sample import Sample, Watched
from edged.rag.answer import Answerer, Settings
from edged.rag.ingest import Library
from edged.rag.reembed import Collections
from edged.rag.retrieve import Retriever
from edged.reload import Reloader
from edged.runtime import health as conditions
from edged.runtime import home
from edged.runtime.health import Health
from edged.runtime.metrics import Metrics
from edged.runtime.notify import Notifier, feed_watchdog, inherited_listeners
from edged.runtime.supervise import Supervisor
from edged.serving.care import Care, HeatLimits, Sources, Workers
from edged.serving.deviation import CANDIDATE
from edged.serving.findings import Findings
from edged.serving.inspection import Inspections
from edged.serving.keeper import Keeper, wishes
from edged.serving.launch import Launcher
from edged.serving.moves import Journal
from edged.serving.pool import ChatPool, EmbedderPool
from edged.serving.restraint import Restrained, Restraint
from edged.serving.rollout import Rollouts, Trial
from edged.serving.services import Services
from edged.status import NamedWorker, StatusBoard, hardware_body, probe_body
from edged.store.knowledge import KnowledgeStore
from edged.workers.cgroup import Tree
from edged.workers.process import ENGINE_COMMAND
from edged.workers.worker import Worker

HTTP_GRACE_SECONDS = 3.0


def serve(config: Config, read_again: Callable[[], Config]) -> int:
    """Run the daemon until SIGTERM or SIGINT; a second signal forces. Returns the exit status.

    SIGHUP makes it use what ``read_again`` returns. Raises :class:`EdgedError` when it cannot start.
    """
    log.configure(config.log.level)
    faulthandler.enable()  # the watchdog ends a daemon that hangs by SIGABRT: where it hung is then told
    return asyncio.run(_serve(config, read_again))


async def _serve(config: Config, read_again: Callable[[], Config]) -> int:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    notifier = Notifier.of(os.environ, os.getpid())
    reloader = Reloader(config, functools.partial(_startable, read_again), notifier)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    loop.add_signal_handler(signal.SIGHUP, reloader.request)
    listeners = inherited_listeners(os.environ, os.getpid())
    async with running(config, notifier=notifier, reloader=reloader, listeners=listeners):
        spare_collector()
        await stop.wait()
    return 0


def _startable(read: Callable[[], Config]) -> Config:
    """What a reload may bring into force: the next start must not fail by it. Raises :class:`EdgedError`."""
    config = read()
    for refusal in home.refusals(config):
        raise refusal
    credentials.require(config)
    return config


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
    config: Config,
    *,
    worker_command: Sequence[str] = ENGINE_COMMAND,
    available_memory: Callable[[], int | None] = detect.available_memory,
    notifier: Notifier | None = None,
    reloader: Reloader | None = None,
    listeners: Sequence[socket.socket] = (),
) -> AsyncGenerator[HttpServer, None]:
    """A whole daemon, for the time of the block. Raises :class:`EdgedError` when it cannot start.

    ``listeners`` are sockets that the service manager opened: the first is the HTTP door's.
    """
    started = time.monotonic()
    notifier = notifier or Notifier()
    reloader = reloader or Reloader(config, lambda: config, notifier)
    device, config = _at_this_device(config)
    api_key = credentials.require(config)
    health = _health(notifier)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(home.hold_home(config))
        stack.enter_context(_one_blas_thread())
        inbox = await Inbox.open(config.events_db)
        stack.push_async_callback(inbox.close)
        store = await KnowledgeStore.open(config.knowledge_db)
        stack.push_async_callback(store.close)
        metrics = Metrics(health)
        restraint = Restraint()
        chats, embedders = ChatPool(None, restraint=restraint), EmbedderPool(None)
        keeper = await stack.enter_async_context(_kept(config, health))
        launcher = await _launcher(config, keeper, worker_command)
        journal, collections = Journal(inbox.database), Collections(store)
        services = Services(
            launcher,
            journal,
            health,
            chats=chats,
            embedders=embedders,
            documents=collections,
            on_ready=Findings(health, detect.cpu_flags()).loaded,
        )
        await stack.enter_async_context(_begun(services, store, health))
        rollouts = Rollouts(
            services,
            launcher,
            journal,
            health,
            _trial(config),
            chats=chats,
            embedders=embedders,
            documents=collections,
            available_memory=available_memory,
            on_end=metrics.rollout_ended,
        )

        answerer = _answerer(config, store, chats, embedders, metrics)
        profiles = _profiles(config, device, keeper, metrics, services)
        care = _care(
            config,
            keeper,
            functools.partial(_workers, services),
            restraint,
            health,
            metrics,
            available_memory,
            profiles,
        )
        feed = _feed(config, health, profiles, care, functools.partial(_subjects, services, chats, keeper))
        board = StatusBoard(
            health,
            inbox,
            store,
            device=device,
            chat=functools.partial(_shown, services, "chat", config.chat.model),
            embed=functools.partial(_shown, services, "embed", config.embed.model),
            hardware=functools.partial(hardware_body, care, restraint),
            probe=functools.partial(probe_body, feed, profiles),
        )
        supervisor = Supervisor(health)
        stack.push_async_callback(supervisor.stop_all)
        supervisor.start("status", board.run)
        admission = Admission(health, limit=config.events.max_pending, open_events=await inbox.open_count())
        mqtt, retention = _start_events(
            supervisor, config, health, inbox, answerer, admission, metrics, board, restraint
        )
        _start_upkeep(supervisor, config, rollouts, care, feed, profiles, mqtt)

        app = create_app(
            answers=Restrained(answerer, restraint),
            documents=board.watching(Library(store, embedders)),
            status=board,
            metrics=metrics.render,
            chats=chats,
            embedders=embedders,
            rollouts=rollouts,
            profiles=profiles,
            inspections=Inspections(functools.partial(_worker, services), config.run_dir),
            api_key=api_key,
            max_body_bytes=config.http.max_body_bytes,
        )
        server = _http_server(config, app, health, listeners)
        await server.start()
        stack.push_async_callback(server.stop, HTTP_GRACE_SECONDS)
        notifier.ready()
        supervisor.start("watchdog", functools.partial(feed_watchdog, notifier, lambda: _answer(inbox, store)))
        reloader.on_change(functools.partial(_use_live_settings, answerer, admission, mqtt, retention, device))
        supervisor.start("reload", functools.partial(reloader.run, health))
        supervisor.start("ready", functools.partial(_ready, config, health, services, started))
        try:
            yield server
        finally:
            notifier.stopping()
            health.set(conditions.STOPPING, "stopping")
            profiles.close()


def _at_this_device(config: Config) -> tuple[str, Config]:
    """This device's name for the time of this run, and the configuration with it in its topics."""
    device = detect.device_name(config.probe.device)
    return device, config.at_device(device)


async def _answer(inbox: Inbox, store: KnowledgeStore) -> None:
    """Return once both stores have answered. Raises :class:`StoreError`."""
    await inbox.database.answer()
    await store.database.answer()


def _use_live_settings(
    answerer: Answerer, admission: Admission, mqtt: MqttGateway, retention: Retention, device: str, config: Config
) -> None:
    """All that ``config.py`` marks as live. Waits for nothing, so that nobody sees a part of it."""
    log.configure(config.log.level)
    answerer.use(_answer_settings(config), near=config.rag.near)
    admission.use_limit(config.events.max_pending)
    retention.use(config.events)
    mqtt.use_rules([_rule(topic) for topic in config.at_device(device).events.topics])


def _health(notifier: Notifier) -> Health:
    """All conditions, told to systemd: it is starting."""
    health = Health()
    health.subscribe(lambda: notifier.status(_status_line(health)))
    health.set(conditions.STARTING, "loading")
    return health


def _status_line(health: Health) -> str:
    """For ``systemctl status``: how it is, and why."""
    codes = ", ".join(held.code for held in health.conditions())
    return f"{health.status()}: {codes}" if codes else health.status()


def _rule(topic: Topic) -> TopicRule:
    return TopicRule(**topic.model_dump(exclude={"json_schema", "grammar"}), output=topic.output)


def _start_events(
    supervisor: Supervisor,
    config: Config,
    health: Health,
    inbox: Inbox,
    answerer: Answerer,
    admission: Admission,
    metrics: Metrics,
    board: StatusBoard,
    restraint: Restraint,
) -> tuple[MqttGateway, Retention]:
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
        rules=[_rule(topic) for topic in config.events.topics],
        admission=admission,
        on_accepted=accepted,
        status=board.summary,
        farewell=board.farewell(),
    )
    outbox = Outbox(inbox, mqtt, health, window=config.events.outbox_window)
    dispatcher = Dispatcher(
        inbox,
        answerer,
        Rendering(),
        health,
        decide=mqtt.decide,
        concurrency=config.events.concurrency,
        shedding=lambda: restraint.shedding,
        on_closed=closed,
        on_progress=mqtt.progress if config.mqtt.stream_answers else None,
    )
    restraint.subscribe(dispatcher.wake)
    metrics.watch("edged_events_open", "Events without an outcome", lambda: admission.open_events)
    supervisor.start("outbox", outbox.run)
    supervisor.start("dispatch", dispatcher.run)
    if config.mqtt.enabled:
        board.mqtt = mqtt
        supervisor.start("mqtt", mqtt.run)
        health.subscribe(mqtt.status_changed)
    retention = Retention(inbox, outbox, config.events, board.changed)
    supervisor.start("prune", retention.run)
    return mqtt, retention


# --- models ----------------------------------------------------------------------------------------


async def _launcher(config: Config, keeper: Keeper, command: Sequence[str]) -> Launcher:
    catalog = await asyncio.to_thread(Catalog, config.models_dir, config.models_cache_dir)

    def threads(role: Role) -> int:
        return keeper.placement.bounds(role).threads

    return Launcher(config, catalog, threads, command=command, on_launch=keeper.launched)


def _workers(services: Services) -> Workers:
    """All there are, also a candidate that is still examined and a model that is about to leave."""
    return {role: services.workers(role) for role in ROLES}


def _worker(services: Services, role: Role) -> Worker | None:
    service = services.active(role)
    return None if service is None else service.worker


def _trial(config: Config) -> Trial:
    settings = config.rollout.model_dump()
    requests, seconds = settings.pop("canary_requests"), settings.pop("canary_seconds")
    return Trial(canary_requests=requests, canary_seconds=seconds, limits=Limits(**settings))


def _worker_usage(services: Services) -> dict[str, Usage]:
    """What the processes of the workers use now; a worker whose process is gone is left out."""
    pids = {role: service.worker.pid for role in ROLES if (service := services.active(role)) is not None}
    return {role: usage for role, pid in pids.items() if pid is not None and (usage := read_usage(pid)) is not None}


@contextlib.asynccontextmanager
async def _begun(services: Services, store: KnowledgeStore, health: Health) -> AsyncGenerator[None, None]:
    """The models are loading, or said to be missing, and the store searches the embedder's vectors."""
    try:
        await services.begin()
        await _use_embedder(store, services, health)
        yield
    finally:
        await services.stop()


async def _use_embedder(store: KnowledgeStore, services: Services, health: Health) -> None:
    service = services.active("embed")
    if service is None:
        return
    left_out = await store.use_embedder(service.model.identity, service.model.header.embedding_length)
    if left_out:
        health.set(conditions.VECTORS_STALE, f"{left_out} passages were embedded by another model")


def _shown(services: Services, role: Role, configured: str) -> NamedWorker:
    service = services.active(role)
    return (configured, None) if service is None else (service.model.identity, service.worker)


# --- the device ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _kept(config: Config, health: Health) -> AsyncGenerator[Keeper, None]:
    """The keeper, with the daemon itself in its place; what it took of the system it gives back."""
    machine = await asyncio.to_thread(detect.machine)
    keeper = Keeper(machine, wishes(config), health, Tree.claim if config.hardware.cgroups else None)
    try:
        await keeper.begin()
        yield keeper
    finally:
        await keeper.end()


def _care(
    config: Config,
    keeper: Keeper,
    workers: Callable[[], Workers],
    restraint: Restraint,
    health: Health,
    metrics: Metrics,
    available_memory: Callable[[], int | None],
    profiles: Profiles,
) -> Care:
    limits = HeatLimits(
        throttle_celsius=config.hardware.throttle_celsius,
        margin_celsius=config.hardware.margin_celsius,
        hot_max_tokens=config.hardware.hot_max_tokens,
    )
    sources = Sources(available=available_memory, heat=Thermometer().read, profile=lambda: profiles.latest)
    reserve_bytes = config.chat.reserve_memory_bytes
    care = Care(keeper, workers, restraint, health, sources, limits, reserve_bytes=reserve_bytes)
    _watch_device(metrics, care, restraint)
    return care


def _watch_device(metrics: Metrics, care: Care, restraint: Restraint) -> None:
    watch = metrics.watch
    watch("edged_celsius", "Of the sensor nearest to the point where the CPU is slowed", lambda: care.celsius)
    watch("edged_heat_step", "0: full work; each step up leaves less", lambda: care.governor.level)
    watch("edged_chat_threads", "Compute threads of the chat worker now", lambda: care.placement.chat.threads)
    watch("edged_memory_stage", "0: calm, 1: no batch work, 2: less of all", lambda: care.pressure.stage.severity)
    watch("edged_placement_repairs", "Changes from outside that were put back", lambda: care.repairs)
    watch("edged_batch_refused", "Batch requests refused for want of memory", lambda: restraint.refused)


# --- profiles --------------------------------------------------------------------------------------


def _profiles(config: Config, name: str, keeper: Keeper, metrics: Metrics, services: Services) -> Profiles:
    probe, machine = config.probe, keeper.machine
    device = Device(
        id=name,
        software=__version__,
        cores={core.number: core.speed for core in machine.cores},
        quota_cores=machine.quota_cores,
        weights=Weights(
            memory=probe.weight_memory,
            latency=probe.weight_latency,
            cpu=probe.weight_cpu,
            half_seconds=probe.half_latency_ms / 1e3,
        ),
    )
    profiles = Profiles(device)
    metrics.add(Exposition(profiles))
    metrics.watch_workers(functools.partial(_worker_usage, services))
    return profiles


def _feed(
    config: Config, health: Health, profiles: Profiles, care: Care, subjects: Callable[[], list[Subject]]
) -> Feed:
    def watched() -> list[Watched]:
        return [subject.watched for subject in subjects()]

    def add(sample: Sample) -> None:
        profiles.add(sample, subjects(), _warmth(care, health))

    return Feed(config.probe.socket, watched, add, health)


def _subjects(services: Services, chats: ChatPool, keeper: Keeper) -> list[Subject]:
    """The processes to be measured: the daemon, and each worker that runs."""
    workers: list[tuple[str, str, Worker]] = [
        (role, service.model.identity, service.worker)
        for role in ROLES
        if (service := services.active(role)) is not None
    ]
    if chats.candidate is not None:
        workers.append((CANDIDATE, chats.candidate.name, chats.candidate.worker))
    own = os.getpid()
    subjects = [Subject(watched=Watched(name="daemon", pid=own, group=keeper.group(own)))]
    for name, model, worker in workers:
        if worker.pid is not None:
            watched = Watched(name=name, pid=worker.pid, group=keeper.group(worker.pid))
            subjects.append(Subject(watched=watched, model=model, served=worker.served))
    return subjects


def _warmth(care: Care, health: Health) -> Warmth:
    hottest = care.hottest
    slowed = health.holds(conditions.CPU_SLOWED)
    if hottest is None:
        return Warmth(slowed=slowed)
    headroom = None if hottest.slows_at is None else hottest.slows_at - hottest.celsius
    return Warmth(celsius=hottest.celsius, headroom=headroom, slowed=slowed)


def _start_upkeep(
    supervisor: Supervisor,
    config: Config,
    rollouts: Rollouts,
    care: Care,
    feed: Feed,
    profiles: Profiles,
    mqtt: MqttGateway,
) -> None:
    """What looks after models and device, and tells others of them."""
    supervisor.start("rollouts", rollouts.run)
    supervisor.start("care", care.run)
    if not config.probe.enabled:
        return
    supervisor.start("probe-link", feed.follow)
    supervisor.start("probe-stand-in", feed.stand_in)
    supervisor.start("profile-socket", Broadcast(profiles, config.profile_socket).run)
    if config.mqtt.enabled:
        publish = functools.partial(mqtt.retain, config.probe.topic)
        supervisor.start("profile-publish", Publisher(profiles, publish, config.probe.publish_seconds).run)


# --- parts -----------------------------------------------------------------------------------------


def _one_blas_thread() -> threadpool_limits:
    """Keep NumPy to one thread: two wait for each other beside a computing worker, and take its cores.

    Measured on 2 cores, 20,000 vectors of 384: 1.5 ms with one thread and 0.7 with two alone, 1.9 and 12.6 beside
    busy processes.
    """
    return threadpool_limits(limits=1, user_api="blas")


def _answerer(
    config: Config, store: KnowledgeStore, chats: ChatPool, embedders: EmbedderPool, metrics: Metrics
) -> Answerer:
    retriever = Retriever(store, embedders, near=config.rag.near)
    return Answerer(retriever, chats, _answer_settings(config), on_answer=metrics.answered)


def _answer_settings(config: Config) -> Settings:
    return Settings(**config.rag.model_dump(include={"passages", "budget_tokens", "max_tokens"}))


def _http_server(config: Config, app: FastAPI, health: Health, listeners: Sequence[socket.socket]) -> HttpServer:
    host, port = split_listen(config.http.listen)
    if not is_loopback(host) and config.http.tls_cert is None:
        health.set(conditions.HTTP_PLAIN, f"{config.http.listen} is served without TLS")
    return HttpServer(
        app,
        host=host,
        port=port,
        tls_cert=config.http.tls_cert,
        tls_key=config.http.tls_key,
        listener=next(iter(listeners), None),
    )


async def _ready(config: Config, health: Health, services: Services, started: float) -> None:
    """Say so once each worker has either loaded or failed: from then on its own condition tells."""
    await services.settled()
    health.clear(conditions.STARTING)
    if health.status() != "failing":
        home.mark_ready(config)
    structlog.get_logger("daemon").info("ready", seconds=round(time.monotonic() - started, 3))
