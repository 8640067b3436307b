"""Named conditions: declared once, set and cleared by the part they concern, shown by every door.

``/health``, the retained MQTT status and the metrics are views on this registry and hold no state of their own.
"""

import time
from collections.abc import Callable
from enum import StrEnum

import msgspec
import structlog


class Severity(StrEnum):
    """``failing``: the main job does not work; ``degraded``: it works, but worse or not for everyone."""

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
    "chat_model_missing", Severity.DEGRADED, "run 'edged models pull', then restart edged"
)
EMBED_MODEL_MISSING = ConditionKind(
    "embed_model_missing", Severity.DEGRADED, "run 'edged models pull', then restart edged"
)
VECTORS_STALE = ConditionKind(
    "vectors_of_another_embedder",
    Severity.DEGRADED,
    "add these documents again: their vectors were made by another embedder and are left out",
)
MQTT_DOWN = ConditionKind(
    "mqtt_disconnected", Severity.DEGRADED, "check that the broker at mqtt.url runs and admits this client"
)
MQTT_REFUSED = ConditionKind(
    "mqtt_publish_refused", Severity.DEGRADED, "let the broker's ACL allow edged to publish to these topics"
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

KINDS: tuple[ConditionKind, ...] = (
    STARTING,
    STOPPING,
    CHAT_DOWN,
    EMBED_DOWN,
    CHAT_MODEL_MISSING,
    EMBED_MODEL_MISSING,
    VECTORS_STALE,
    MQTT_DOWN,
    MQTT_REFUSED,
    STORE_FAILING,
    INBOX_FULL,
    HTTP_PLAIN,
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

    def set(self, kind: ConditionKind, text: str) -> None:
        """Say that ``kind`` holds now. The time of its first setting is kept while it holds."""
        held = self._held.get(kind.code)
        if held is not None and held.text == text:
            return
        since = held.since if held is not None else self._clock()
        self._held[kind.code] = Condition(kind.code, kind.severity, text, kind.hint, since)
        self._log.warning("condition_set", condition=kind.code, severity=kind.severity.value, text=text)
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
        worst_first = sorted(self._held.values(), key=lambda held: (held.severity is not Severity.FAILING, held.since))
        return tuple(worst_first)

    def status(self) -> str:
        """``ok``, ``degraded`` or ``failing``: the worst severity that holds."""
        held = {condition.severity for condition in self._held.values()}
        if Severity.FAILING in held:
            return Severity.FAILING.value
        return Severity.DEGRADED.value if held else "ok"

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change, on the thread that made it."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()
