"""From a model's name to a worker that serves it: the file, its settings, its process."""

import functools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from edged.config import Chat, Config, Embed
from edged.errors import ModelError, ModelNotFoundError
from edged.models import memory
from edged.models.catalog import Catalog, ModelInfo
from edged.models.gguf import GgufHeader, read_header
from edged.models.manifest import Prefixes, TemplateSource
from edged.models.rollout import Role
from edged.models.template import ChatTemplate
from edged.models.wide import Copies
from edged.workers.process import ENGINE_COMMAND
from edged.workers.protocol import WorkerSettings
from edged.workers.state import KeepWarm, WorkerState
from edged.workers.worker import Worker

EMBED_BATCH_TOKENS = 1024

OnLaunch = Callable[[Role, int, int], Awaitable[None]]
"""Told of a worker's process before it loads its model: its role, its id, the bytes it will need."""


async def unconfined(_role: Role, _pid: int, _needed_bytes: int) -> None:
    """Leave it where it is."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model file that is there, with what its manifest and its header say. ``asked`` is how it was called for.

    ``copy`` is in eight bits, and computed with where there is one; ``header`` is then of it.
    """

    asked: str
    path: Path
    copy: Path | None
    header: GgufHeader
    identity: str
    template: ChatTemplate | None
    prefixes: Prefixes

    @property
    def name(self) -> str:
        return self.identity.partition("@")[0]


class Launcher:
    """Finds models and makes their workers as the configuration says."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        threads: Callable[[Role], int],
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        on_launch: OnLaunch = unconfined,
    ) -> None:
        """``threads`` says how many a worker computes with; ``command`` starts its process."""
        self._config = config
        self._catalog = catalog
        self._threads = threads
        self._command = command
        self._on_launch = on_launch

    def configured(self, role: Role) -> str:
        """What the configuration names: a file's path or a name in the catalogue."""
        section = self._section(role)
        return str(section.path) if section.path is not None else section.model

    def find(self, role: Role, name: str) -> Model:
        """A model by its name in the catalogue, or by path where that is what is configured. Blocks.

        Raises :class:`ModelError`: unknown, not installed, broken, or of the other kind.
        """
        file, header, info = self.locate(role, name)
        source: TemplateSource = "gguf" if header.chat_template else "plain"
        identity = self._catalog.identity(file if info is None else name)
        copy = self.copy(role, identity)
        return Model(
            asked=name,
            path=file,
            copy=copy,
            header=read_header(copy) if copy else header,
            identity=identity,
            template=ChatTemplate.of(info.template if info else source, header) if role == "chat" else None,
            prefixes=info.prefixes if info else Prefixes(),
        )

    def locate(self, role: Role, name: str) -> tuple[Path, GgufHeader, ModelInfo | None]:
        """Its file, that file's header, and what the catalogue says of it. Blocks. Raises as :meth:`find`."""
        if name == str(self._section(role).path):
            return Path(name), read_header(Path(name)), None
        info = self._catalog.info(name)
        if info.kind != role:
            raise ModelError(
                f"'{name}' is of the kind {info.kind}, not {role}",
                hint="activate embedding models with --embed, chat models without",
            )
        file = self._catalog.path(name)
        return file, read_header(file), info

    def advice(self, role: Role, name: str) -> str:
        """What to do where what is configured, or was activated, cannot be found. Blocks."""
        if name == str(self._section(role).path):
            return f"put a GGUF model there that edged may read, or correct {role}.path; then restart edged"
        try:
            info = self._catalog.info(name)
        except ModelNotFoundError as error:
            return f"correct {role}.model: {error.hint.rstrip('?')}; then restart edged"
        if info.kind != role:
            return f"let {role}.model name a model of the kind {role} ('edged models list'); then restart edged"
        return f"run 'edged models pull {name}', then restart edged"

    def verify(self, model: Model) -> None:
        """Read the whole file again; it blocks. Raises :class:`ChecksumError` or :class:`GgufError` for a wrong one."""
        if model.path not in (self._config.chat.path, self._config.embed.path):
            self._catalog.verify(model.name)
        if model.copy is not None:
            Copies(self._config.wide_dir).verify(model.identity)

    def need(self, role: Role, model: Model) -> memory.Need:
        """The memory its worker will take."""
        settings = self.settings(role, model)
        return memory.need(
            model.header,
            context_tokens=settings.context_tokens,
            batch_tokens=settings.batch_tokens,
            sequences=settings.sequences,
            prefix_cache_bytes=settings.prefix_cache_bytes,
        )

    def worker(
        self, role: Role, model: Model, *, on_state: Callable[[WorkerState, str], None], beside: bool = False
    ) -> Worker:
        """A worker for the model, not yet started. Two of a role at a time have sockets of their own: ``beside``."""
        section = self._section(role)
        needed_bytes = self.need(role, model).total
        return Worker(
            self.settings(role, model),
            self._config.run_dir / f"worker-{role}{'-2' if beside else ''}.sock",
            on_state=on_state,
            command=self._command,
            on_spawn=functools.partial(self._launched, role, needed_bytes),
            keep_warm=KeepWarm(section.keep_warm, section.idle_seconds),
        )

    async def _launched(self, role: Role, needed_bytes: int, pid: int) -> None:
        await self._on_launch(role, pid, needed_bytes)

    def settings(self, role: Role, model: Model) -> WorkerSettings:
        """What the worker is told."""
        section = self._section(role)
        if isinstance(section, Chat):
            return WorkerSettings(
                kind="chat",
                model=str(model.path),
                copy=str(model.copy or ""),
                identity=model.identity,
                threads=self._threads(role),
                context_tokens=section.context_tokens,
                sequences=section.sequences,
                kv_apart=section.kv == "apart",
                batch_tokens=section.batch_tokens,
                queue_limit=section.queue_limit,
                prefix_cache_bytes=section.prefix_cache_bytes,
                snapshots=str(self._config.prefixes_dir),
                load_mode=section.load_mode,
                gpu_layers=section.gpu_layers,
            )
        return WorkerSettings(
            kind="embed",
            model=str(model.path),
            identity=model.identity,
            threads=self._threads(role),
            batch_tokens=EMBED_BATCH_TOKENS,
            queue_limit=section.queue_limit,
            load_mode=section.load_mode,
            gpu_layers=section.gpu_layers,
        )

    def copy(self, role: Role, identity: str) -> Path | None:
        """The eight-bit copy of a model, where there is one and it may be used. Blocks."""
        chat = self._config.chat
        if role != "chat" or not chat.widen or chat.gpu_layers:
            return None
        return Copies(self._config.wide_dir).find(identity)

    def _section(self, role: Role) -> Chat | Embed:
        return self._config.chat if role == "chat" else self._config.embed
