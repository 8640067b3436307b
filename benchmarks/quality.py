"""What the two quality benchmarks share: questions with known answers, and edged's own parts to ask."""

import contextlib
import json
import re
import string
import tempfile
import tomllib
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edged.config import Config, load
from edged.hardware import detect, placement
from edged.models.catalog import Catalog
from edged.models.gguf import read_header
from edged.models.template import ChatTemplate
from edged.models.wide import Copies
from edged.rag.ingest import Library
from edged.rag.retrieve import FloatArray, Retriever
from edged.serving import widening
from edged.serving.chat import LocalChat
from edged.serving.embed import LocalEmbedder
from edged.serving.launch import EMBED_BATCH_TOKENS
from edged.serving.pool import EmbedderPool
from edged.store.knowledge import KnowledgeStore
from edged.workers.protocol import WorkerSettings
from edged.workers.worker import Worker

REPOSITORY = Path(__file__).parent.parent
XQUAD_FILE = REPOSITORY / "../shared/data/xquad.en.dev.json"
MANUALS = REPOSITORY / "edged/demo/manuals"
MANUAL_QUESTIONS = REPOSITORY / "benchmarks/data/manual_questions.toml"
MODELS_CACHE = Path("~/.cache/edged/models").expanduser()

XQUAD = "xquad"
MANUAL = "manuals"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(rf"(?!(?<=\d)\.\d)[{re.escape(string.punctuation)}]")


class Document(msgspec.Struct, frozen=True):
    """A text to be indexed. ``format`` as the library takes it."""

    id: str
    title: str | None
    format: str
    text: str


class Asked(msgspec.Struct, frozen=True):
    """A question, the document that answers it, and spellings of the answer that count as right."""

    question: str
    document: str
    answers: tuple[str, ...]


class QuestionSet(NamedTuple):
    """A collection's documents and the questions about them."""

    collection: str
    documents: list[Document]
    asked: list[Asked]


def xquad() -> QuestionSet | None:
    """XQuAD, English, each paragraph one document under its article's title; None where the data is absent.

    Source: Artetxe, Ruder, Yogatama, "On the Cross-lingual Transferability of Monolingual Representations",
    ACL 2020; CC BY-SA 4.0.
    """
    if not XQUAD_FILE.exists():
        return None
    documents, asked = [], []
    for article in json.loads(XQUAD_FILE.read_text(encoding="utf-8"))["data"]:
        title = article["title"].replace("_", " ")
        for number, paragraph in enumerate(article["paragraphs"]):
            document = Document(f"{title} {number}", title, "text", paragraph["context"])
            documents.append(document)
            asked += [
                Asked(item["question"], document.id, tuple(answer["text"] for answer in item["answers"]))
                for item in paragraph["qas"]
            ]
    return QuestionSet(XQUAD, documents, asked)


def manuals() -> QuestionSet:
    """The demo's manuals and fifty questions as technicians ask them."""
    documents = [
        Document(path.name, None, "markdown" if path.suffix == ".md" else "text", path.read_text(encoding="utf-8"))
        for path in sorted(MANUALS.iterdir())
        if path.suffix in (".md", ".txt")
    ]
    questions = tomllib.loads(MANUAL_QUESTIONS.read_text(encoding="utf-8"))["questions"]
    asked = [Asked(item["question"], item["document"], tuple(item["answer"])) for item in questions]
    return QuestionSet(MANUAL, documents, asked)


def every_kth(asked: Sequence[Asked], count: int, *, offset: int = 0) -> list[Asked]:
    """``count`` questions spread evenly over all; different offsets, below the step, share none."""
    step = len(asked) // count
    return list(asked[offset::step])[:count]


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as the SQuAD evaluation script compares.

    Unlike there, a decimal point stays: 9.5 is not 95.
    """
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text.lower())).split())


def holds_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in the text, as whole words."""
    within = f" {normalised(text)} "
    return any(f" {normalised(answer)} " in within for answer in answers)


class Parts(msgspec.Struct, frozen=True):
    """Edged's own parts over an empty store, as the daemon builds them with its defaults."""

    config: Config
    store: KnowledgeStore
    embedder: LocalEmbedder
    library: Library
    retriever: Retriever
    chat: LocalChat | None

    async def fill(self, questions: QuestionSet) -> None:
        """Index the documents of a set into the collection of its name."""
        for document in questions.documents:
            await self.library.add(
                collection=questions.collection,
                document_id=document.id,
                title=document.title,
                format=document.format,
                text=document.text,
            )

    async def vectors(self, asked: Sequence[Asked]) -> FloatArray:
        """The questions' vectors, (questions, dimensions)."""
        return np.stack([await self.embedder.embed_question(each.question) for each in asked])


@contextlib.asynccontextmanager
async def parts(*, with_chat: bool) -> AsyncGenerator[Parts, None]:
    """Start the workers over a home that is gone afterwards; models come from the cache or their source."""
    async with contextlib.AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edged-quality-")))
        config = load(None, {}, {"home": str(home)})
        catalog = Catalog(config.models_dir, MODELS_CACHE)
        threads = placement.place(detect.machine())
        store = await KnowledgeStore.open(config.knowledge_db)
        stack.push_async_callback(store.close)

        file = catalog.pull(config.embed.model)
        settings = WorkerSettings(
            kind="embed", model=str(file), threads=threads.embed_threads, batch_tokens=EMBED_BATCH_TOKENS
        )
        worker = await _started(stack, config, settings)
        identity = catalog.identity(config.embed.model)
        embedder = LocalEmbedder(worker, identity, catalog.info(config.embed.model).prefixes)
        await store.use_embedder(identity, read_header(file).embedding_length)
        yield Parts(
            config,
            store,
            embedder,
            Library(store, EmbedderPool(embedder)),
            Retriever(store, EmbedderPool(embedder), near=config.rag.near),
            await _chat(stack, config, catalog, threads.chat_threads) if with_chat else None,
        )


def as_served(config: Config, catalog: Catalog, name: str) -> Path:
    """The weights that an installed edged computes with: the model's file, or an eight-bit copy of it."""
    file, identity = catalog.pull(name), catalog.identity(name)
    widening.widen_once(config, identity, file)
    return Copies(config.wide_dir).find(identity) or file


async def _chat(stack: contextlib.AsyncExitStack, config: Config, catalog: Catalog, threads: int) -> LocalChat:
    name = config.chat.model
    file = as_served(config, catalog, name)
    worker = await _started(
        stack,
        config,
        WorkerSettings(
            kind="chat",
            model=str(file),
            threads=threads,
            context_tokens=config.chat.context_tokens,
            sequences=config.chat.sequences,
            batch_tokens=config.chat.batch_tokens,
        ),
    )
    template = ChatTemplate.of(catalog.info(name).template, read_header(file))
    return LocalChat(worker, template, catalog.identity(name))


async def _started(stack: contextlib.AsyncExitStack, config: Config, settings: WorkerSettings) -> Worker:
    worker = Worker(settings, config.run_dir / f"{settings.kind}.sock", on_state=lambda _state, _why: None)
    worker.start()
    stack.push_async_callback(worker.stop)
    await worker.settled()
    return worker


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right with three decimals."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = "|" + "|".join("-" * (width + 2) if at == 0 else "-" * (width + 1) + ":" for at, width in enumerate(widths))
    return "\n".join([line(list(header)), rule + "|", *(line(row) for row in cells)])
