"""Named conditions: declared once, set and cleared by the part they concern, shown by every door.

``/health``, the retained MQTT status and the metrics are views on this registry and hold no state of their own.
"""

import time
from collections.abc import Callable
from enum import StrEnum

import msgspec
import structlog


class Severity(StrEnum):
    """``failing``: the main job does not work; ``degraded``: it works, but worse or not for everyone; ``info``: it
    works as it should, and something beside it could be better."""

    INFO = "info"
    DEGRADED = "degraded"
    FAILING = "failing"


class ConditionKind(msgspec.Struct, frozen=True):
    """What can be wrong, declared before it happens: its code, how bad it is, and what to do."""

    code: str
    severity: Severity
    hint: str


STARTING = ConditionKind("starting", Severity.FAILING, "wait: the daemon is still loading its parts")
STOPPING = ConditionKind("stopping", Severity.FAILING, "the daemon was told to stop")
CHAT_DOWN = ConditionKind(
    "chat_worker_down",
    Severity.DEGRADED,
    "questions are answered with the passages themselves until it is back",
)
EMBED_DOWN = ConditionKind(
    "embed_worker_down", Severity.DEGRADED, "retrieval uses keywords alone and documents cannot be added"
)
CHAT_MODEL_MISSING = ConditionKind(
    "chat_model_missing",
    Severity.DEGRADED,
    "run 'edged models pull', or correct chat.path where that is set; then restart edged",
)
EMBED_MODEL_MISSING = ConditionKind(
    "embed_model_missing",
    Severity.DEGRADED,
    "run 'edged models pull', or correct embed.path where that is set; then restart edged",
)
VECTORS_STALE = ConditionKind(
    "vectors_of_another_embedder",
    Severity.DEGRADED,
    "run 'edged models activate --embed NAME' with the model in use: it embeds the rest anew",
)
ROLLOUT_FAILED = ConditionKind(
    "model_rolled_back",
    Severity.DEGRADED,
    "the model before it serves on; 'edged models status' shows what was compared. The next activation ends this",
)
CONFIG_REFUSED = ConditionKind(
    "config_refused", Severity.DEGRADED, "mend the file and reload again; the configuration before it is in force"
)
RESTART_NEEDED = ConditionKind(
    "restart_needed", Severity.DEGRADED, "restart edged when it suits: these settings cannot change while it runs"
)
SERVICE_FAILING = ConditionKind(
    "service_failing",
    Severity.DEGRADED,
    "a part of the daemon ends and is started again: correct the setting that the reason names, or else report the "
    "traceback in the log",
)
MQTT_DOWN = ConditionKind(
    "mqtt_disconnected",
    Severity.DEGRADED,
    "check that the broker at mqtt.url runs and admits this client, and that no other has its mqtt.client_id",
)
MQTT_REFUSED = ConditionKind(
    "mqtt_publish_refused", Severity.DEGRADED, "let the broker's ACL allow edged to publish to these topics"
)
MQTT_SUBSCRIBE_REFUSED = ConditionKind(
    "mqtt_subscribe_refused",
    Severity.DEGRADED,
    "let the broker's ACL allow edged to subscribe to these topics, or correct them; edged asks again every minute",
)
STORE_FAILING = ConditionKind(
    "store_failing", Severity.FAILING, "check free space and the health of the disk that holds EDGED_HOME"
)
INBOX_FULL = ConditionKind(
    "inbox_full", Severity.DEGRADED, "events arrive faster than they are answered; the broker holds the rest"
)
HTTP_PLAIN = ConditionKind(
    "http_without_tls",
    Severity.DEGRADED,
    "set http.tls_cert and http.tls_key: the API key travels in the clear",
)
GPU_MISSING = ConditionKind(
    "gpu_missing",
    Severity.DEGRADED,
    "build llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=on or -DGGML_VULKAN=on, or set gpu_layers to 0",
)
MODEL_NOT_LOCKED = ConditionKind(
    "model_not_locked",
    Severity.DEGRADED,
    "raise the limit of locked memory (LimitMEMLOCK= of the service, or ulimit -l), or set load_mode to mmap",
)
CPU_UNUSED = ConditionKind(
    "cpu_features_unused",
    Severity.INFO,
    "compile it on this device: sudo /opt/edged/current/bin/pip install --force-reinstall --no-deps --no-cache-dir "
    "llama-cpp-python==0.3.36 (without the service: edged's own pip), then restart edged",
)
CGROUPS_MISSING = ConditionKind(
    "cgroups_missing",
    Severity.DEGRADED,
    "run the service made by install-edge.sh (Delegate=yes) on cgroups v2, with cgroup_enable=memory on the kernel's "
    "command line; or set hardware.cgroups to false: affinity and nice are all that holds the workers then",
)
CORES_NOT_RESERVED = ConditionKind(
    "cores_not_reserved",
    Severity.DEGRADED,
    "see journalctl -u edged; a core must be left for others (chat.threads), and systemd must run",
)
CORES_CROWDED = ConditionKind(
    "cores_crowded",
    Severity.DEGRADED,
    "another program keeps one of the chat worker's cores: move it away, or set hardware.reserve_cores",
)
PLACEMENT_DRIFTED = ConditionKind(
    "placement_drifted",
    Severity.DEGRADED,
    "find out who changes edged's affinity or cgroups (taskset, another manager); it was put back",
)
QUOTA_STOPS = ConditionKind(
    "cpu_quota_stops_workers", Severity.DEGRADED, "raise CPUQuota= of the service, or lower hardware.share or threads"
)
HOT = ConditionKind("hot", Severity.DEGRADED, "better cooling, or a lower hardware.share; it recovers by itself")
CPU_SLOWED = ConditionKind(
    "cpu_slowed", Severity.DEGRADED, "the system slows the CPU for heat or power: better cooling or a better supply"
)
UNDER_VOLTAGE = ConditionKind(
    "under_voltage", Severity.DEGRADED, "use a stronger power supply and a shorter, thicker cable"
)
MEMORY_SHORT = ConditionKind(
    "memory_short", Severity.DEGRADED, "end other programs, or choose a smaller model or chat.context_tokens"
)
PROBE_ABSENT = ConditionKind(
    "probe_absent",
    Severity.INFO,
    "for profiles by eBPF run 'systemctl enable --now edged-probe'; edged measures with its own rights until then",
)
PROBE_REDUCED = ConditionKind(
    "probe_reduced",
    Severity.INFO,
    "mend what the reason says ('edged doctor' has the fix); the probe then goes up again by itself",
)

KINDS: tuple[ConditionKind, ...] = (
    STARTING,
    STOPPING,
    CHAT_DOWN,
    EMBED_DOWN,
    CHAT_MODEL_MISSING,
    EMBED_MODEL_MISSING,
    VECTORS_STALE,
    ROLLOUT_FAILED,
    CONFIG_REFUSED,
    RESTART_NEEDED,
    SERVICE_FAILING,
    MQTT_DOWN,
    MQTT_REFUSED,
    MQTT_SUBSCRIBE_REFUSED,
    STORE_FAILING,
    INBOX_FULL,
    HTTP_PLAIN,
    GPU_MISSING,
    MODEL_NOT_LOCKED,
    CPU_UNUSED,
    CGROUPS_MISSING,
    CORES_NOT_RESERVED,
    CORES_CROWDED,
    PLACEMENT_DRIFTED,
    QUOTA_STOPS,
    HOT,
    CPU_SLOWED,
    UNDER_VOLTAGE,
    MEMORY_SHORT,
    PROBE_ABSENT,
    PROBE_REDUCED,
)
"""Every condition there is; the documentation and the metrics are derived from this table."""


class Condition(msgspec.Struct, frozen=True):
    """A kind that holds now. ``since`` is Unix time in seconds."""

    code: str
    severity: Severity
    text: str
    hint: str
    since: float


class Health:
    """The registry. Cheap to set repeatedly: only a change is logged and told to listeners."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._held: dict[str, Condition] = {}
        self._listeners: list[Callable[[], None]] = []
        self._log = structlog.get_logger("health")

    def set(self, kind: ConditionKind, text: str, *, hint: str | None = None) -> None:
        """Say that ``kind`` holds now; ``hint`` where this case needs another one than its kind's.

        The time of its first setting is kept while it holds.
        """
        hint = kind.hint if hint is None else hint
        held = self._held.get(kind.code)
        if held is not None and (held.text, held.hint) == (text, hint):
            return
        since = held.since if held is not None else self._clock()
        self._held[kind.code] = Condition(kind.code, kind.severity, text, hint, since)
        log = self._log.info if kind.severity is Severity.INFO else self._log.warning
        log("condition_set", condition=kind.code, severity=kind.severity.value, text=text)
        self._notify()

    def clear(self, kind: ConditionKind) -> None:
        """Say that ``kind`` no longer holds; nothing happens where it did not."""
        if self._held.pop(kind.code, None) is not None:
            self._log.info("condition_cleared", condition=kind.code)
            self._notify()

    def holds(self, kind: ConditionKind) -> bool:
        return kind.code in self._held

    def conditions(self) -> tuple[Condition, ...]:
        """What holds now, the worst and then the oldest first."""
        worst = [Severity.FAILING, Severity.DEGRADED, Severity.INFO]
        return tuple(sorted(self._held.values(), key=lambda held: (worst.index(held.severity), held.since)))

    def status(self) -> str:
        """``ok``, ``degraded`` or ``failing``: the worst severity that holds; ``info`` is ok."""
        held = {condition.severity for condition in self._held.values()}
        return next((worst.value for worst in (Severity.FAILING, Severity.DEGRADED) if worst in held), "ok")

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change, on the thread that made it."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()
