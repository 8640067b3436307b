"""A whole daemon with real models: exchanged under load over HTTP, and their memory as foretold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.config import Config
from edged.daemon import running
from edged.errors import EdgedError
from edged.hardware.usage import read_usage
from edged.models.catalog import Catalog
from edged.models.gguf import read_header
from edged.models.memory import need
from edged.types import Segment
from edged.workers.protocol import WorkerSettings
from edged.workers.worker import Worker
from tests.daemon_process import configure
from tests.rollout_rig import Streams

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

MANUAL = "The relief valve of pump P7 opens at 12 bar. The pump P7 holds 4 litres of oil. Pump P7 weighs 30 kg."
QUESTION = "At what pressure does the relief valve of pump P7 open?"
GEMMA = "gemma3-270m"
SMOLLM = "smollm2-135m-instruct"
CLOSE_ENOUGH = 0.25


@pytest.fixture
def home(tmp_path: Path, link_models: Callable[[Path], None]) -> Path:
    """A home with both default models, SmolLM2 under a second name, and Gemma 3."""
    home = tmp_path / "home"
    link_models(home)
    catalog = Catalog(home / "models", Config().models_cache_dir)
    catalog.import_file(catalog.path(SMOLLM), "second")
    try:
        catalog.pull(GEMMA)
    except EdgedError as error:
        pytest.skip(f"Gemma 3 cannot be had: {error.message}")
    return home


@pytest.fixture
def files(home: Path) -> dict[str, Path]:
    """Where each model is."""
    catalog = Catalog(home / "models", home / "none")
    return {name: catalog.path(name) for name in (SMOLLM, "second", GEMMA)}


@pytest.fixture
def config(home: Path) -> Config:
    return configure(home, {"mqtt.enabled": False, "chat.context_tokens": 2048}, fake=False)


@pytest.fixture
async def http(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running(config) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=120) as http,
    ):
        assert (await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})).is_success
        yield http


async def activate(http: httpx.AsyncClient, model: str, **options: Any) -> dict[str, Any]:
    begun = await http.post("/v1/rollouts", json={"model": model, **options})
    assert begun.status_code == 202, begun.text
    body: dict[str, Any] = begun.json()
    while body["outcome"] is None:
        seen = body["progress"]["version"] if body["progress"] else 0
        body = (await http.get(f"/v1/rollouts/{body['id']}", params={"seen": seen, "wait_s": 20})).json()
    return body


def asker(http: httpx.AsyncClient) -> Callable[[], Any]:
    async def ask() -> tuple[str, str]:
        answer = await http.post("/v1/query", json={"query": QUESTION})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["step"] in ("generated", "unverified"), body["note"]
        assert "12 bar" in body["answer"]
        return body["model"].partition("@")[0], body["answer"]

    return ask


async def test_swaps_of_real_models_under_four_streams_fail_no_request(http: httpx.AsyncClient) -> None:
    async with Streams(asker(http)).running() as streams:
        for model in ("second", GEMMA, SMOLLM):
            await streams.more(4)
            past = await activate(http, model)
            assert past["outcome"] == "promoted", past
            serving = (await http.get("/v1/rollouts")).json()["serving"]["chat"]
            assert serving["model"].startswith(f"{model}@")
            assert past["evidence"]["golden"]["candidate"]["rss_bytes"] > 90e6
        await streams.more(8)
    assert streams.failures == []
    assert set(streams.answers) >= {"second", GEMMA, SMOLLM}


async def test_a_canary_of_the_same_model_is_promoted(http: httpx.AsyncClient) -> None:
    async with Streams(asker(http)).running() as streams:
        past = await activate(http, "second", canary=0.5)
    assert (past["outcome"], streams.failures) == ("promoted", [])
    assert past["evidence"]["canary"]["candidate"]["validity"] == 1.0


async def test_a_damaged_copy_never_serves(http: httpx.AsyncClient, files: dict[str, Path]) -> None:
    file = files["second"]
    content = bytearray(await asyncio.to_thread(file.read_bytes))
    content[len(content) // 2] ^= 0xFF
    await asyncio.to_thread(file.write_bytes, content)
    past = await activate(http, "second")
    assert past["outcome"] == "rolled_back"
    health = (await http.get("/health")).json()
    assert [held["code"] for held in health["conditions"]] == ["model_rolled_back"]
    assert (await asker(http)())[0] == SMOLLM


@pytest.mark.parametrize(("name", "context_tokens"), [(SMOLLM, 2048), (SMOLLM, 8192), (GEMMA, 4096)])
async def test_a_chat_worker_takes_the_memory_foretold(
    files: dict[str, Path], tmp_path: Path, name: str, context_tokens: int
) -> None:
    file = files[name]
    settings = WorkerSettings(kind="chat", model=str(file), threads=2, context_tokens=context_tokens)
    worker = Worker(settings, tmp_path / "w.sock", on_state=lambda _state, _why: None)
    worker.start()
    try:
        prompt = [Segment("The pump and its valve. " * 60)]
        async for _ in worker.generate(prompt, max_tokens=20):
            assert worker.pid is not None
            usage = read_usage(worker.pid)
    finally:
        await worker.stop()
    header = await asyncio.to_thread(read_header, file)
    foretold = need(header, context_tokens=context_tokens, batch_tokens=settings.batch_tokens, sequences=8).total
    assert usage is not None
    assert abs(foretold - usage.resident_bytes) < CLOSE_ENOUGH * usage.resident_bytes
