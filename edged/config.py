"""One TOML file, strict; ``EDGED_*`` environment over it; every setting has a default that works.

Each setting is declared once, here: name, type, default, unit and help. ``edged check``, ``docs/CONFIG.md`` and
the error messages are derived from these declarations.
"""

import difflib
import functools
import ipaddress
import json
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict

from edged.errors import ConfigError
from edged.topics import at_device, check_filter, check_name, matches
from edged.types import Grammar, JsonSchema, OutputFormat, Priority

ENVIRONMENT_PREFIX = "EDGED_"
SOCKET_PATH_LIMIT = 107  # sun_path of unix(7) is 108 bytes with its end mark


def _path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


FilePath = Annotated[Path, BeforeValidator(_path)]
TopicName = Annotated[str, AfterValidator(check_name)]
TopicFilter = Annotated[str, AfterValidator(check_filter)]


LIVE: JsonDict = {"live": True}
"""Marks a setting that a reload changes while the daemon runs."""


class Section(BaseModel):
    """A TOML table: frozen, strictly typed, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Http(Section):
    """The HTTP door."""

    listen: str = Field("127.0.0.1:3000", description="Address and port. Anything but loopback needs an API key.")
    api_key_file: FilePath | None = Field(
        None, description="File holding the API key; <home>/api-key when unset. Made at install."
    )
    tls_cert: FilePath | None = Field(None, description="Certificate chain (PEM); with tls_key, HTTPS is served.")
    tls_key: FilePath | None = Field(None, description="Private key (PEM) of tls_cert.")
    max_body_bytes: int = Field(16_777_216, ge=1024, description="Largest request body accepted, bytes.")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        split_listen(self.listen)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self


class Mqtt(Section):
    """The MQTT door."""

    enabled: bool = Field(True, description="Whether to connect to a broker at all.")
    url: str = Field("mqtt://127.0.0.1:1883", description="Broker: mqtt://host:port, or mqtts:// for TLS.")
    protocol: Literal["auto", "5", "3.1.1"] = Field(
        "auto", description="MQTT version; auto tries 5 and falls back to 3.1.1."
    )
    client_id: str = Field(
        "edged", min_length=1, description="Fixed, so that the broker keeps what arrives while edged is away."
    )
    username: str | None = Field(None, description="User name at the broker.")
    password_file: FilePath | None = Field(None, description="File holding the password; its last newline is dropped.")
    ca_file: FilePath | None = Field(None, description="CA certificates for mqtts://; the system's when unset.")
    cert_file: FilePath | None = Field(None, description="Client certificate for mqtts://.")
    key_file: FilePath | None = Field(None, description="Private key of cert_file.")
    query_topic: TopicFilter = Field(
        "edged/query",
        description="Questions arrive here; + and # are allowed, and $share/GROUP/… where one of several is to answer.",
    )
    answer_prefix: TopicName = Field(
        "edged/answer", description="Answers without an MQTT 5 response topic go to <prefix>/<id>."
    )
    stream_answers: bool = Field(
        False, description="Also publish each answer as it grows, to <answer topic>/stream with QoS 0."
    )
    status_topic: TopicName = Field(
        "edged/status", description="Retained status and last will; in this and the other topics {device} is filled in."
    )
    keepalive_seconds: int = Field(30, ge=5, le=65535, description="MQTT keep-alive, seconds.")
    session_expiry_seconds: int = Field(
        604_800,
        ge=0,
        le=4_294_967_295,
        description="How long the broker keeps the session, seconds (MQTT 5).",
    )
    receive_maximum: int = Field(
        64, ge=1, le=65535, description="Unacknowledged messages the broker may send at once (MQTT 5)."
    )
    max_payload_bytes: int = Field(65_536, ge=64, description="Largest event payload accepted, bytes.")
    reconnect_min_seconds: float = Field(1.0, gt=0, description="First pause before reconnecting, seconds, jittered.")
    reconnect_max_seconds: float = Field(60.0, gt=0, description="Longest pause before reconnecting, seconds.")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        split_broker_url(self.url)
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.reconnect_min_seconds > self.reconnect_max_seconds:
            raise ValueError("reconnect_min_seconds exceeds reconnect_max_seconds")
        return self


class Topic(Section):
    """A topic whose messages are plain sensor values, and the question each value asks."""

    filter: TopicFilter = Field(
        description="MQTT topic filter; + and # are allowed, and $share/GROUP/… where one of several is to answer."
    )
    question: str = Field(
        min_length=1,
        description="Question template; {value}, {topic} and {topic[N]} (Nth level, from 0) are filled in.",
    )
    collection: str = Field("default", min_length=1, description="Collection whose documents are asked.")
    deadline_ms: int | None = Field(None, ge=1, description="Answer within this time, degrading to meet it, ms.")
    expires_s: float | None = Field(None, gt=0, description="Not worth answering after this time, seconds.")
    max_tokens: int | None = Field(None, ge=1, description="Longest answer, tokens.")
    priority: Priority = Field("interactive", description="alarm goes before interactive, and that before batch.")
    json_schema: str | None = Field(None, description="JSON schema, as JSON text, that answers are held to.")
    grammar: str | None = Field(None, description="GBNF grammar, with the rule root, that answers are held to.")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar exclude each other")
        if self.json_schema is not None:
            json.loads(self.json_schema)
        return self

    @property
    def output(self) -> OutputFormat | None:
        """What answers are held to."""
        if self.json_schema is not None:
            return JsonSchema(self.json_schema)
        return None if self.grammar is None else Grammar(self.grammar)


class Events(Section):
    """The inbox, the dispatcher and the outbox."""

    topics: tuple[Topic, ...] = Field(
        (), strict=False, description="Topics that carry plain sensor values.", json_schema_extra=LIVE
    )
    max_pending: int = Field(
        10_000, ge=1, description="Open events held; beyond it the broker keeps the rest.", json_schema_extra=LIVE
    )
    concurrency: int = Field(8, ge=1, description="Events answered at the same time.")
    outbox_window: int = Field(16, ge=1, description="Answers published but not yet acknowledged by the broker.")
    keep_days: float = Field(
        30.0, gt=0, description="Closed events and answers are pruned after this, days.", json_schema_extra=LIVE
    )
    keep_bytes: int = Field(
        268_435_456,
        ge=0,
        description="Closed events and answers are pruned beyond this, bytes.",
        json_schema_extra=LIVE,
    )


class Chat(Section):
    """The chat model and its worker."""

    model: str = Field("smollm2-135m-instruct", description="Model name in the catalogue.")
    path: FilePath | None = Field(None, description="A GGUF file to serve instead of a catalogue model.")
    threads: int = Field(0, ge=0, description="Compute threads; 0 takes min(cores, the CPU quota in cores, rounded).")
    context_tokens: int = Field(8192, ge=256, description="KV cache shared by all sequences, tokens.")
    sequences: int = Field(8, ge=1, le=64, description="Answers generated at the same time.")
    kv: Literal["shared", "apart"] = Field(
        "shared",
        description="shared: a long conversation may use what others leave of the context. apart: each answer has an "
        "equal part of it (context_tokens / sequences) and nothing more; many at a time are faster.",
    )
    queue_limit: int = Field(256, ge=1, description="Requests waiting for a sequence; one more is refused.")
    batch_tokens: int = Field(256, ge=32, le=4096, description="Tokens in one decode step, prompt pieces included.")
    prefix_cache_bytes: int = Field(
        67_108_864, ge=0, description="States of prompts kept so that they are not computed again, bytes; 0 keeps none."
    )
    reserve_memory_bytes: int = Field(
        134_217_728, ge=0, description="With less memory free, fewer answers at a time and fewer kept states, bytes."
    )
    keep_warm: Literal["pinned", "idle", "demand"] = Field(
        "pinned",
        description="pinned: loaded at the start and kept. idle: unloaded when nobody has asked for idle_seconds. "
        "demand: so, and not loaded before the first request.",
    )
    idle_seconds: float = Field(
        300.0, gt=0, description="Unused for so long, a model that is not pinned is unloaded, seconds."
    )
    load_mode: Literal["mmap", "mlock", "read"] = Field(
        "mmap",
        description="mmap: read from the file when needed. mlock: so, and kept in memory. read: copied into memory.",
    )
    gpu_layers: int = Field(0, ge=-1, description="Layers computed on the GPU, where there is one; -1 is all.")
    widen: bool = Field(
        True,
        description="Compute with an eight-bit copy of the model's weights where 'edged models pull' or 'edged models "
        "widen' found that faster on this device. It takes up to 1.7 times the memory of a four-bit file.",
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.kv == "apart" and self.context_tokens < 256 * self.sequences:
            raise ValueError("kv = apart needs at least 256 context_tokens for each of the sequences")
        return self


class Embed(Section):
    """The embedding model and its worker."""

    model: str = Field("all-minilm-l6-v2", description="Model name in the catalogue.")
    path: FilePath | None = Field(None, description="A GGUF file to serve instead of a catalogue model.")
    threads: int = Field(0, ge=0, description="Compute threads; 0 takes half of the chat worker's, at least one.")
    queue_limit: int = Field(256, ge=1, description="Requests waiting; one more is refused.")
    keep_warm: Literal["pinned", "idle", "demand"] = Field(
        "pinned",
        description="pinned: loaded at the start and kept. idle: unloaded when nobody has asked for idle_seconds. "
        "demand: so, and not loaded before the first request.",
    )
    idle_seconds: float = Field(
        300.0, gt=0, description="Unused for so long, a model that is not pinned is unloaded, seconds."
    )
    load_mode: Literal["mmap", "mlock", "read"] = Field(
        "mmap",
        description="mmap: read from the file when needed. mlock: so, and kept in memory. read: copied into memory.",
    )
    gpu_layers: int = Field(0, ge=-1, description="Layers computed on the GPU, where there is one; -1 is all.")


class Rag(Section):
    """From a question to the sentences that answer it."""

    passages: int = Field(
        3, ge=1, le=50, description="Passages whose sentences compete for the budget.", json_schema_extra=LIVE
    )
    budget_tokens: int = Field(
        240,
        ge=16,
        description="Most tokens of cited sentences in a prompt; fewer where few are near the best one.",
        json_schema_extra=LIVE,
    )
    max_tokens: int = Field(
        96, ge=1, description="Longest answer, tokens, when the question does not say.", json_schema_extra=LIVE
    )
    near: float = Field(
        0.40,
        ge=-1,
        le=1,
        description="Cosine below which, with no telling keyword, nothing was found.",
        json_schema_extra=LIVE,
    )


class Rollout(Section):
    """How a candidate is compared with the active model before it takes over: see `edged models activate`."""

    canary_requests: int = Field(50, ge=1, description="Requests of the canary that decide.")
    canary_seconds: float = Field(600.0, gt=0, description="Time after which fewer of them decide, seconds.")
    more_failures: float = Field(0.05, ge=0, le=1, description="How much larger its share of failed requests may be.")
    less_valid: float = Field(
        0.1, ge=0, le=1, description="How much smaller its share of answers in the form asked for may be."
    )
    less_overlap: float = Field(
        0.15, ge=0, le=1, description="How much less of its text may stand on the cited sentences, a share."
    )
    slowest: float = Field(0.1, ge=0, description="Its least speed in tokens/s, as a part of the active model's.")
    heaviest: float = Field(10.0, gt=0, description="Its worker's most memory, as a multiple of the active one's.")


class Hardware(Section):
    """What edged may use of the device, and how it yields to heat."""

    cgroups: bool = Field(
        True,
        description="Confine the daemon and its workers by cgroups v2; false: by CPU affinity and nice alone.",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Part of all cores' time that a worker may use; its threads follow from it."
    )
    reserve_cores: bool = Field(
        False, description="Keep system.slice and user.slice off the chat worker's cores (AllowedCPUs of systemd)."
    )
    throttle_celsius: float = Field(
        80.0, gt=0, description="Temperature at which the CPU is slowed, where the system does not say it, °C."
    )
    margin_celsius: float = Field(
        5.0, ge=0, description="So far below that temperature less work is done at a time, °C."
    )
    hot_max_tokens: int = Field(
        64, ge=1, description="Longest answer at its hottest, tokens; at the two steps before, twice and four times."
    )


class Probe(Section):
    """What the workers use of the device: measured each second, and published as profiles."""

    enabled: bool = Field(True, description="Whether profiles are made at all.")
    socket: FilePath = Field(
        Path("/run/edged-probe/probe.sock"), description="Where the probe listens; without one edged measures itself."
    )
    device: str | None = Field(
        None,
        pattern=r"^[^\x00-\x1f\x7f/+#]+$",
        description="This device's name in profiles, in its status and in topics; the host name when unset.",
    )
    topic: TopicName = Field(
        "edged/{device}/profile", description="Retained profile, of a minute; {device} is filled in."
    )
    publish_seconds: float = Field(
        60.0, ge=10, description="How often it is published, seconds; on a notable change sooner, every 10 s at most."
    )
    weight_memory: float = Field(0.7, ge=0, description="Weight of free memory in the load score.")
    weight_latency: float = Field(0.3, ge=0, description="Weight of short waiting times in the load score.")
    weight_cpu: float = Field(0.0, ge=0, description="Weight of idle CPU time in the load score.")
    half_latency_ms: float = Field(
        50.0, gt=0, description="Waiting time at which the latency part of the load score is one half, ms."
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if not self.weight_memory + self.weight_latency + self.weight_cpu:
            raise ValueError("one of the weights must be more than 0")
        return self


class Log(Section):
    """Log output on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity written.", json_schema_extra=LIVE
    )


class Config(Section):
    """All settings."""

    home: FilePath = Field(
        default_factory=lambda: Path("~/.local/share/edged").expanduser(),
        description="Directory of databases, models, keys and sockets. The service's is /var/lib/edged: OPERATIONS.md "
        "says how to move the data to another disk.",
    )
    cache: FilePath = Field(
        default_factory=lambda: Path("~/.cache/edged").expanduser(),
        description="Directory of downloads shared between installations; may be removed at any time.",
    )
    http: Http = Field(default_factory=Http)
    mqtt: Mqtt = Field(default_factory=Mqtt)
    events: Events = Field(default_factory=Events)
    chat: Chat = Field(default_factory=Chat)
    embed: Embed = Field(default_factory=Embed)
    rag: Rag = Field(default_factory=Rag)
    rollout: Rollout = Field(default_factory=Rollout)
    hardware: Hardware = Field(default_factory=Hardware)
    probe: Probe = Field(default_factory=Probe)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _sockets_fit(self) -> Self:
        longest = len(os.fsencode(self.run_dir / "worker-embed-2.sock"))
        if longest > SOCKET_PATH_LIMIT:
            raise ValueError(
                f"home is too long: its Unix sockets would have {longest} bytes, the kernel takes {SOCKET_PATH_LIMIT}"
            )
        return self

    @model_validator(mode="after")
    def _hears_not_itself(self) -> Self:
        """An answer that is an event again is answered again, without end."""
        own = [f"{self.mqtt.answer_prefix}/id", f"{self.mqtt.answer_prefix}/id/stream", self.mqtt.status_topic]
        own += [self.probe.topic] * self.probe.enabled
        heard = {"mqtt.query_topic": self.mqtt.query_topic}
        heard |= {f"events.topics.{number}.filter": topic.filter for number, topic in enumerate(self.events.topics)}
        for name, topic_filter in heard.items():
            if found := next((topic for topic in own if matches(topic_filter, topic)), None):
                raise ValueError(
                    f"{name} = '{topic_filter}' takes in {found}, where edged itself publishes: narrow the filter, "
                    "or move mqtt.answer_prefix, mqtt.status_topic or probe.topic"
                )
        return self

    def at_device(self, device: str) -> Self:
        """The same, with ``{device}`` filled in wherever a topic has it."""
        named = ("query_topic", "answer_prefix", "status_topic")
        mqtt = {name: at_device(getattr(self.mqtt, name), device) for name in named}
        topics = (topic.model_copy(update={"filter": at_device(topic.filter, device)}) for topic in self.events.topics)
        return self.model_copy(
            update={
                "mqtt": self.mqtt.model_copy(update=mqtt),
                "events": self.events.model_copy(update={"topics": tuple(topics)}),
                "probe": self.probe.model_copy(update={"topic": at_device(self.probe.topic, device)}),
            }
        )

    @property
    def run_dir(self) -> Path:
        """Sockets of this run."""
        return self.home / "run"

    @property
    def profile_socket(self) -> Path:
        """Where a local coordinator reads profiles."""
        return self.home / "profile.sock"

    @property
    def models_dir(self) -> Path:
        """Verified model files."""
        return self.home / "models"

    @property
    def wide_dir(self) -> Path:
        """Eight-bit copies of models."""
        return self.models_dir / "wide"

    @property
    def prefixes_dir(self) -> Path:
        """States of the stable parts of prompts."""
        return self.home / "prefixes"

    @property
    def models_cache_dir(self) -> Path:
        """Finished model files shared between installations."""
        return self.cache / "models"

    @property
    def api_key_path(self) -> Path:
        return self.http.api_key_file or self.home / "api-key"

    @property
    def events_db(self) -> Path:
        return self.home / "events.db"

    @property
    def knowledge_db(self) -> Path:
        return self.home / "knowledge.db"


def split_listen(listen: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` into its parts; ``ValueError`` says what is wrong."""
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"'{listen}' is not host:port, such as 127.0.0.1:3000")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def split_broker_url(url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is spoken; ``ValueError`` says what is wrong."""
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise ValueError(f"'{url}' is not mqtt://host:port or mqtts://host:port")
    if parts.username or parts.password:
        raise ValueError("give the user by mqtt.username and the password by mqtt.password_file, not in the URL")
    secure = parts.scheme == "mqtts"
    return parts.hostname, parts.port or (8883 if secure else 1883), secure


def load(
    path: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """The configuration from a file (or none), the environment over it, and command-line overrides on top.

    ``overrides`` are dotted names, such as ``{"http.listen": "127.0.0.1:3001"}``.
    Raises :class:`ConfigError` naming table, key, value and the nearest valid name.
    """
    data = _read(path) if path is not None else {}
    for keys, value in _from_environment(environment):
        _assign(data, keys, value)
    for name, value in (overrides or {}).items():
        _assign(data, name.split("."), value)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _explain(error, path) from error


def settings() -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic field), in declaration order."""
    yield from _settings(Config, "")


def differences(old: Config, new: Config) -> list[tuple[str, bool]]:
    """The settings that differ, as (dotted name, whether a reload changes it), in declaration order."""
    return [
        (name, field.json_schema_extra == LIVE)
        for name, field in settings()
        if "[]" not in name and _value(old, name) != _value(new, name)
    ]


def _value(config: Config, name: str) -> object:
    return functools.reduce(getattr, name.split("."), config)


def _settings(section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        table = _table_of(field.annotation)
        if table is None:
            yield prefix + name, field
        elif table is Topic:
            yield prefix + name, field
            yield from _settings(table, f"{prefix}{name}[].")
        else:
            yield from _settings(table, f"{prefix}{name}.")


def _table_of(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *typing.get_args(annotation))
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "give another file with --config"
        if isinstance(error, PermissionError):
            hint = 'use sudo; or join the service\'s group, edged, and log in again: sudo usermod -aG edged "$USER"'
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}", hint=hint, file=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no valid TOML: {error}", hint="mend the line named; strings need quotes", file=path
        ) from error


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[list[str], object]]:
    """``EDGED_MQTT__URL=…`` becomes (["mqtt", "url"], …). Values are TOML where the setting is no text."""
    known = {name: field for name, field in settings() if "[]" not in name}
    for variable, raw in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == f"{ENVIRONMENT_PREFIX}CONFIG":
            continue
        keys = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        name = ".".join(keys)
        if name not in known:
            raise ConfigError(
                f"environment variable {variable} names no setting",
                hint=_nearest(name, known, lambda near: ENVIRONMENT_PREFIX + near.upper().replace(".", "__")),
                key=name,
            )
        yield keys, _environment_value(raw, known[name].annotation)


def _environment_value(raw: str, annotation: Any) -> object:
    members = {member for member in (annotation, *typing.get_args(annotation)) if isinstance(member, type)}
    if members & {str, Path} or typing.get_origin(annotation) is Literal:
        return raw
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw  # validation then names the variable's setting, its value and the type it takes


def _assign(data: dict[str, Any], keys: list[str], value: object) -> None:
    table = data
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"'{key}' is a value in the file but a table in the environment", key=".".join(keys))
        table = inner
    table[keys[-1]] = value


def _explain(error: ValidationError, path: Path | None) -> ConfigError:
    """The first thing wrong, in the words of the file's author."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    table = ".".join(location[:-1])
    place = f"[{table}] {location[-1]}" if table else name or "the configuration"
    where = f" in {path}" if path is not None else ""
    if first["type"] == "extra_forbidden":
        known = [known for known, _ in settings()]
        return ConfigError(
            f"{place} = {first['input']!r}{where}: there is no such setting",
            hint=_nearest(name, known, lambda near: near),
            key=name,
        )
    reason = str(first["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict | BaseModel) else f" = {first['input']!r}"
    return ConfigError(
        f"{place}{shown}{where}: {reason}",
        hint="docs/CONFIG.md lists every setting with type and default",
        key=name,
    )


def _nearest(name: str, known: typing.Iterable[str], render: typing.Callable[[str], str]) -> str:
    names = {_generic(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_generic(name), names, n=1, cutoff=0.5)
    if not close:
        return "docs/CONFIG.md lists every setting"
    return f"did you mean {render(names[close[0]])}?"


def _generic(name: str) -> str:
    return ".".join("[]" if part.isdigit() else part for part in name.replace("[]", ".[]").split(".") if part)
