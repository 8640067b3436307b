"""A whole daemon: honest health at every stage, answers in each step, nothing left behind when it stops."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest

from edged.config import load
from edged.daemon import running
from edged.errors import ConfigError
from edged.workers.process import ENGINE_COMMAND
from tests.daemon_process import FAKE_WORKER, DaemonProcess, configure

MANUAL = "The relief valve of pump P7 opens at 12 bar. The pump P7 holds 4 litres of oil."
OFFLINE = {"mqtt.enabled": False}


@contextlib.asynccontextmanager
async def daemon(
    home: Path, *, command: tuple[str, ...] = FAKE_WORKER, fake: bool = True, **overrides: Any
) -> AsyncIterator[httpx.AsyncClient]:
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    config = configure(home, {**OFFLINE, **names}, fake=fake)
    async with (
        running(config, worker_command=command) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=60) as http,
    ):
        yield http


async def ready(http: httpx.AsyncClient) -> None:
    while (await http.get("/health/ready")).status_code != 200:
        pass


async def ask(http: httpx.AsyncClient, **query: object) -> dict[str, Any]:
    answer = await http.post("/v1/query", json=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def edged_threads() -> list[str]:
    """Threads by name, without asyncio's own: a pool that grows as it likes, and one that ends with each child."""
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio"))


@pytest.mark.models
@pytest.mark.timeout(300)
async def test_the_main_job_with_real_models(tmp_path: Path, link_models: Callable[[Path], None]) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home, command=ENGINE_COMMAND, fake=False) as http:
        await ready(http)
        assert (await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})).status_code == 201
        assert (await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})).status_code == 200
        body = await ask(http, query="At what pressure does the relief valve of pump P7 open?")
        assert "12 bar" in body["answer"]
        assert body["citations"]
        nothing = await ask(http, query="Who painted the Mona Lisa?")
        assert nothing["step"] == "not_found"
        async with http.stream(
            "POST", "/v1/query", json={"query": "How much oil does pump P7 hold?", "stream": True}
        ) as response:
            lines = [line async for line in response.aiter_lines()]
        health = (await http.get("/health")).json()
        metrics = (await http.get("/metrics")).text
    assert "event: delta" in lines
    assert "event: answer" in lines
    assert (health["model_loaded"], health["vector_store_ready"], health["documents"]) == (True, True, 1)
    assert {held["code"] for held in health["conditions"]} <= {"cores_crowded"}  # by what else runs on this machine
    assert "edged_first_token_seconds_count" in metrics


async def test_without_models_it_starts_says_so_and_answers_nothing_it_does_not_know(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", fake=False) as http:
        await ready(http)
        health = (await http.get("/health")).json()
        answer = await ask(http, query="Anything?")
        refused = await http.post("/v1/documents", json={"text": MANUAL})
    assert health["status"] == "degraded"
    assert {held["code"] for held in health["conditions"]} == {"chat_model_missing", "embed_model_missing"}
    assert health["model_loaded"] is False
    assert answer["step"] == "not_found"
    assert refused.status_code == 503
    assert refused.json()["hint"]


async def test_a_model_file_that_is_no_gguf_is_a_condition_and_not_a_crash(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"this is no model")
    async with daemon(tmp_path / "home", chat__path=str(broken)) as http:
        await ready(http)
        health = (await http.get("/health")).json()
    assert {held["code"] for held in health["conditions"]} == {"chat_model_missing"}


async def test_an_answer_whose_deadline_leaves_no_time_is_the_passages(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home") as http:
        await ready(http)
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        body = await ask(http, query="How much oil does pump P7 hold?", deadline_ms=1)
    assert body["step"] == "passages"
    assert "4 litres of oil" in body["answer"]
    assert body["note"]


async def test_an_embedder_that_is_too_slow_for_the_deadline_is_not_waited_for(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home") as http:
        await ready(http)
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        body = await ask(http, query="How much oil does pump P7 hold? pause=60", deadline_ms=400)
    assert "4 litres of oil" in body["answer"]
    assert body["timings"]["embed_ms"] < 400


async def test_a_worker_that_keeps_dying_leaves_answers_of_passages_and_a_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon(tmp_path / "home") as http:
        await ready(http)
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        body = await ask(http, query="How much oil does pump P7 hold? kill@request")
        health = (await http.get("/health")).json()
    assert body["step"] == "passages"
    assert "worker_lost" in body["note"]
    assert health["chat"]["restarts"] >= 1


async def test_the_documents_come_back_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        async with daemon(tmp_path / "home") as http:
            await ready(http)
            added = await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
            body = await ask(http, query="How much oil does pump P7 hold?")
    assert added.status_code == 200
    assert body["citations"][0]["document_id"] == "p7"


async def test_when_it_is_ready_it_leaves_a_mark_for_the_installer(tmp_path: Path) -> None:
    mark = tmp_path / "home/run/ready"
    async with daemon(tmp_path / "home") as http:
        await ready(http)
        os.utime(mark, (1, 1))
    async with daemon(tmp_path / "home") as http:
        await ready(http)
        assert mark.stat().st_mtime > 1


async def test_two_daemons_do_not_share_a_home(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home"):
        with pytest.raises(ConfigError, match="another edged runs"):
            async with daemon(tmp_path / "home"):
                raise AssertionError("the second one started")


async def test_an_address_open_to_others_needs_an_api_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="API key") as refusal:
        async with daemon(tmp_path / "home", http__listen="0.0.0.0:0"):
            raise AssertionError("it started without a key")
    assert "openssl" in refusal.value.hint


async def test_twenty_starts_and_stops_leave_no_file_thread_or_child(tmp_path: Path) -> None:
    process = psutil.Process()
    async with daemon(tmp_path / "home") as http:
        await ready(http)
    files, threads = process.num_fds(), edged_threads()
    for _ in range(20):
        async with daemon(tmp_path / "home") as http:
            await ready(http)
    assert process.num_fds() <= files
    assert edged_threads() == threads
    assert process.children(recursive=True) == []


def test_sigterm_stops_it_in_order_and_workers_end_with_it(tmp_path: Path) -> None:
    process = DaemonProcess(tmp_path / "home", OFFLINE)
    process.start()
    children = psutil.Process(process.pid).children()
    assert process.stop() == 0
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)


def test_workers_do_not_outlive_a_daemon_that_is_killed(tmp_path: Path) -> None:
    process = DaemonProcess(tmp_path / "home", OFFLINE)
    process.start()
    httpx.get(f"http://127.0.0.1:{process.port}/health", trust_env=False)
    children = psutil.Process(process.pid).children()
    assert children
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    async def start() -> None:
        async with running(load(None, {}, {"home": str(blocked / "home"), **OFFLINE})):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match="cannot use the home directory"):
        asyncio.run(start())


def test_status_is_json_all_the_way_down(tmp_path: Path) -> None:
    process = DaemonProcess(tmp_path / "home", OFFLINE)
    process.start()
    body = httpx.get(f"http://127.0.0.1:{process.port}/health", trust_env=False).text
    process.stop()
    assert set(json.loads(body)) >= {"status", "uptime", "model_loaded", "vector_store_ready", "conditions"}


REPORT = {
    "type": "object",
    "properties": {
        "severity": {"type": "integer", "minimum": 1, "maximum": 5},
        "pressure": {"type": "string", "maxLength": 20},
    },
    "required": ["severity", "pressure"],
    "additionalProperties": False,
}


@pytest.mark.models
@pytest.mark.timeout(300)
async def test_an_answer_in_a_format_is_of_that_format_or_there_is_none(
    tmp_path: Path, link_models: Callable[[Path], None]
) -> None:
    home = tmp_path / "home"
    link_models(home)
    asked = {"query": "At what pressure does the relief valve of pump P7 open?", "format": {"json_schema": REPORT}}
    async with daemon(home, command=ENGINE_COMMAND, fake=False) as http:
        await ready(http)
        nothing = await http.post("/v1/query", json=asked)
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        body = await ask(http, **asked, priority="alarm")
        late = await http.post("/v1/query", json={**asked, "deadline_ms": 1})
        bad = await http.post("/v1/query", json={**asked, "format": {"json_schema": {"minProperties": 1}}})
        both = await http.post("/v1/query", json={**asked, "format": {"json_schema": {}, "grammar": "root ::= 1"}})
    jsonschema.validate(json.loads(body["answer"]), REPORT)
    assert body["step"] in ("generated", "unverified")
    assert body["citations"]
    refusals = [(each.status_code, each.json()["code"]) for each in (nothing, late, bad, both)]
    assert refusals == [
        (422, "unanswerable"),
        (422, "unanswerable"),
        (422, "output_format_invalid"),
        (422, "request_invalid"),
    ]
    assert "minProperties" in bad.json()["detail"]
