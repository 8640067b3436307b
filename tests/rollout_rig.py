"""Models that are tiny files, workers that are ``tests/fake_worker.py``, and real rollouts of them."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from edged.config import Config, load
from edged.models.catalog import Catalog
from edged.models.rollout import Limits, Role
from edged.rag.reembed import Collections
from edged.runtime.health import Health
from edged.serving.golden import GoldenQuestion
from edged.serving.launch import Launcher
from edged.serving.moves import Journal, Past
from edged.serving.pool import ChatPool, EmbedderPool
from edged.serving.rollout import Order, Rollouts, Trial
from edged.serving.services import Services
from edged.store.database import Database
from edged.store.knowledge import KnowledgeStore
from edged.workers.protocol import Finished, Piece
from tests.daemon_process import CHATML, FAKE_WORKER
from tests.gguf_files import Value, gguf_bytes

GB = 10**9
MIGRATIONS = Path(__file__).parents[1] / "edged" / "events" / "migrations"
LIMITS = Limits(more_failures=0.05, less_valid=0.1, less_overlap=0.15, slowest=0.1, heaviest=10.0)
TALK = GoldenQuestion(ask="Is all well?")


class Rig:
    """A home with the chat models a, b, c and the embedders x, y; ``a`` and ``x`` are configured."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = load(None, {}, {"home": str(home), "chat.model": "a", "embed.model": "x"})
        self.catalog = Catalog(home / "models", home / "cache", manifests={})
        self.memory_bytes: int | None = 100 * GB
        self.trial = Trial(canary_requests=8, canary_seconds=60.0, limits=LIMITS)
        self.identities: dict[str, str] = {}
        self.health = Health()
        self.chats: ChatPool
        self.embedders: EmbedderPool
        self.services: Services
        self.rollouts: Rollouts
        self.journal: Journal
        self.store: KnowledgeStore

    def install(self) -> None:
        """Make the models' files; each has content, and so an identity, of its own."""
        source = self.home / "source.gguf"
        for name in "abc":
            source.write_bytes(gguf_bytes({"tokenizer.chat_template": CHATML, "general.name": name}))
            self._import(source, name)
        for name in "xy":
            bert: dict[str, Value] = {
                "general.architecture": "bert",
                "bert.embedding_length": 384,
                "bert.attention.causal": False,
            }
            source.write_bytes(gguf_bytes({**bert, "general.name": name}))
            self._import(source, name)

    def _import(self, source: Path, name: str) -> None:
        self.catalog.import_file(source, name)
        self.identities[name] = self.catalog.identity(name)

    def tell(self, model: str, words: str) -> None:
        """What the workers of one model are told; see tests/fake_worker.py."""
        (self.home / "models" / f"{model}.gguf.words").write_text(words)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        """Databases, rollouts and workers, for the time of the block."""
        async with contextlib.AsyncExitStack() as stack:
            events = await Database.open(self.home / "events.db", MIGRATIONS)
            stack.push_async_callback(events.close)
            self.store = await KnowledgeStore.open(self.home / "knowledge.db")
            stack.push_async_callback(self.store.close)
            self.health, self.journal = Health(), Journal(events)
            self.chats, self.embedders = ChatPool(None), EmbedderPool(None)
            launcher = Launcher(self.config, self.catalog, lambda _role: 1, command=FAKE_WORKER)
            pools: dict[str, Any] = {"chats": self.chats, "embedders": self.embedders}
            collections = Collections(self.store)
            self.services = Services(launcher, self.journal, self.health, documents=collections, **pools)
            stack.push_async_callback(self.services.stop)
            await self.services.begin()
            await self.services.settled()
            if (embedder := self.services.active("embed")) is not None:
                await self.store.use_embedder(embedder.model.identity, 384)
            self.rollouts = Rollouts(
                self.services,
                launcher,
                self.journal,
                self.health,
                self.trial,
                documents=collections,
                available_memory=lambda: self.memory_bytes,
                **pools,
            )
            service = asyncio.create_task(self.rollouts.run(), name="rollouts")
            stack.push_async_callback(functools.partial(_cancelled, service))
            yield self

    def configure(self, **settings: Any) -> Config:
        """Other settings for the next start."""
        names = {name.replace("__", "."): value for name, value in settings.items()}
        self.config = load(None, {}, {"home": str(self.home), "chat.model": "a", "embed.model": "x", **names})
        return self.config

    def serving(self, role: Role = "chat") -> str | None:
        """Name of the model that serves."""
        service = self.services.active(role)
        return service.model.name if service is not None else None

    async def activate(self, model: str, role: Role = "chat", **options: Any) -> Past:
        """Order it, wait for its end; how it went."""
        return await self.ended(await self.rollouts.activate(Order(role=role, model=model, **options)))

    async def ended(self, rollout_id: int) -> Past:
        while (progress := self.rollouts.progress(rollout_id)) is not None:
            await self.rollouts.change(rollout_id, progress.version, 30)
        return await self.rollouts.past(rollout_id)

    async def until(self, rollout_id: int, step: str) -> None:
        """Return once a rollout says that it is at this step."""
        async with asyncio.timeout(30):
            while (progress := self.rollouts.progress(rollout_id)) is not None and step not in progress.step:
                await self.rollouts.change(rollout_id, progress.version, 30)
        assert progress is not None, f"the rollout ended before '{step}'"

    async def ask(self, text: str = "Is all well?", deadline: float | None = None) -> tuple[str, str]:
        """The name of the model that answered, and its answer."""
        texts: list[str] = []
        async with self.chats.lease(deadline) as chat:
            prompt = chat.render([("user", text)])
            async for item in chat.generate(prompt, max_tokens=200, deadline_seconds=deadline):
                match item:
                    case Piece(text=piece):
                        texts.append(piece)
                    case Finished():
                        return chat.name.partition("@")[0], "".join(texts)
                    case _:
                        texts.clear()
        raise RuntimeError("the generation ended without its last item")


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class Streams:
    """Askers that never pause, as a constant load; ``answers`` are the models that answered, in order."""

    def __init__(self, ask: Callable[[], Any], count: int = 4) -> None:
        self._ask = ask
        self._count = count
        self.answers: list[str] = []
        self.failures: list[Exception] = []
        self._answered = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Streams"]:
        tasks = [asyncio.create_task(self._stream(), name=f"stream-{number}") for number in range(self._count)]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def more(self, count: int) -> None:
        """Return after so many further answers."""
        wanted = len(self.answers) + count
        async with asyncio.timeout(30):
            while len(self.answers) < wanted:
                self._answered.clear()
                await self._answered.wait()

    async def _stream(self) -> None:
        while True:
            try:
                model, _ = await self._ask()
            except Exception as error:  # noqa: BLE001 - whatever it was, the test counts it
                self.failures.append(error)
                await asyncio.sleep(0)
            else:
                self.answers.append(model)
            self._answered.set()
