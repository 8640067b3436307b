"""A whole daemon with real models that are unloaded, locked, read or meant for a GPU, and what it says about them."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from threadpoolctl import threadpool_info

from edged.daemon import running
from edged.workers.process import ENGINE_COMMAND
from tests.daemon_process import FAKE_WORKER, configure

pytestmark = pytest.mark.timeout(300)

MANUAL = "The relief valve of pump P7 opens at 12 bar. The pump P7 holds 4 litres of oil."
LOCKABLE_BYTES = 65536

Link = Callable[[Path], None]


@contextlib.asynccontextmanager
async def daemon(
    home: Path, *, command: tuple[str, ...] = ENGINE_COMMAND, fake: bool = False, **overrides: Any
) -> AsyncIterator[httpx.AsyncClient]:
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    config = configure(home, {"mqtt.enabled": False, **names}, fake=fake)
    async with (
        running(config, worker_command=command) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=120) as http,
    ):
        yield http


async def health_when(http: httpx.AsyncClient, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """``/health``, once it is as wanted."""
    async with asyncio.timeout(120):
        while True:
            body: dict[str, Any] = (await http.get("/health")).json()
            if holds(body):
                return body


async def ready(http: httpx.AsyncClient) -> dict[str, Any]:
    return await health_when(http, lambda body: body["status"] != "failing")


def both_loaded(health: dict[str, Any]) -> bool:
    states = {health["chat"]["state"], health["embed"]["state"]}
    return health["status"] != "failing" and states == {"ready"}


async def ask(http: httpx.AsyncClient, question: str) -> dict[str, Any]:
    answer = await http.post("/v1/query", json={"query": question})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def add_manual(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})).is_success


async def usage(http: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """What ``/metrics`` says of the worker processes, by name and labels."""
    text = (await http.get("/metrics")).text
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("edged_worker_")
    }


def codes(health: dict[str, Any]) -> set[str]:
    return {held["code"] for held in health["conditions"]}


# --- keeping models warm ---------------------------------------------------------------------------


@pytest.mark.models
async def test_unloaded_models_cost_no_memory_and_answer_all_the_same(tmp_path: Path, link_models: Link) -> None:
    home = tmp_path / "home"
    link_models(home)
    soon = 0.2
    async with daemon(
        home,
        chat__keep_warm="idle",
        chat__idle_seconds=soon,
        embed__keep_warm="demand",
        embed__idle_seconds=soon,
    ) as http:
        health = await ready(http)
        assert health["embed"]["state"] == "unloaded"
        await add_manual(http)
        for _ in range(3):
            health = await health_when(http, lambda body: body["chat"]["state"] == body["embed"]["state"] == "unloaded")
            assert codes(health) <= {"cores_crowded"}, "what else runs on this machine is not the daemon's to choose"
            assert not health["model_loaded"]
            assert (health["chat"]["pid"], health["embed"]["pid"]) == (None, None)
            assert psutil.Process().children() == []
            assert await usage(http) == {}
            assert (await http.get("/health/ready")).status_code == 200
            questions = ["At what pressure does the relief valve of pump P7 open?"] * 4
            answers = await asyncio.gather(*(ask(http, question) for question in questions))
            assert ["12 bar" in answer["answer"] for answer in answers] == [True] * 4
            assert {answer["step"] for answer in answers} <= {"generated", "unverified"}
        health = await health_when(http, lambda body: body["chat"]["state"] == "unloaded")
        assert (health["chat"]["restarts"], health["embed"]["restarts"]) == (0, 0)


@pytest.mark.models
async def test_a_loaded_model_shows_its_memory_and_page_faults(tmp_path: Path, link_models: Link) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home) as http:
        health = await ready(http)
        found = await usage(http)
        process = psutil.Process(health["chat"]["pid"])
        resident = found["edged_worker_resident_bytes", "chat"]
        assert abs(resident - process.memory_info().rss) < 16e6
        assert resident > 90e6
        for worker in ("chat", "embed"):
            assert found["edged_worker_page_faults_total", "minor", worker] > 1000
            assert found["edged_worker_page_faults_total", "major", worker] >= 0


# --- how models are loaded -------------------------------------------------------------------------


def without_room_to_lock() -> tuple[str, ...]:
    """The engine as a process that may lock next to nothing, also where the tests run as root."""
    if shutil.which("prlimit") is None or shutil.which("setpriv") is None:
        pytest.skip("util-linux is not installed")
    limit = ("prlimit", f"--memlock={LOCKABLE_BYTES}:{LOCKABLE_BYTES}")
    drop = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock") if os.geteuid() == 0 else ()
    return (*drop, *limit, *ENGINE_COMMAND)


@pytest.mark.models
async def test_a_model_that_cannot_be_locked_in_memory_is_a_condition_and_serves(
    tmp_path: Path, link_models: Link
) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home, command=without_room_to_lock(), chat__load_mode="mlock") as http:
        health = await health_when(http, both_loaded)
        await add_manual(http)
        answer = await ask(http, "How much oil does pump P7 hold?")
    assert codes(health) == {"model_not_locked"}
    assert health["conditions"][0]["text"] == "0 of 97 MB of the chat model are locked in memory"
    assert "4 litres" in answer["answer"]


@pytest.mark.models
async def test_each_load_mode_keeps_the_weights_where_it_says(tmp_path: Path, link_models: Link) -> None:
    found = {}
    for mode in ("mmap", "mlock", "read"):
        home = tmp_path / mode
        link_models(home)
        async with daemon(home, chat__load_mode=mode, embed__load_mode=mode) as http:
            health = await health_when(http, both_loaded)
            found[mode] = memory_of(health["chat"]["pid"])
            locked = "model_not_locked" not in codes(health)
        assert locked or mode == "mlock"  # a system may not let it; it says so then
        if mode == "mlock" and locked:
            assert found["mlock"]["VmLck"] > 94_000
    assert found["mmap"]["RssFile"] > 94_000
    assert found["mmap"]["VmLck"] == found["read"]["VmLck"] == 0
    assert found["read"]["RssAnon"] > found["mmap"]["RssAnon"] + 90_000


def memory_of(pid: int) -> dict[str, int]:
    """Kilobytes by name, from /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}


# --- what llama.cpp was built with -----------------------------------------------------------------


@pytest.mark.models
async def test_layers_meant_for_a_gpu_that_is_not_there_are_a_condition_and_computed_on_the_cpu(
    tmp_path: Path, link_models: Link
) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home, chat__gpu_layers=-1) as http:
        health = await health_when(http, both_loaded)
        if health["engine"]["gpu"]:
            pytest.skip("llama.cpp was built for a GPU that is here")
        await add_manual(http)
        answer = await ask(http, "How much oil does pump P7 hold?")
    assert codes(health) == {"gpu_missing"}
    assert "4 litres" in answer["answer"]


@pytest.mark.models
async def test_health_shows_what_llama_cpp_was_built_with(tmp_path: Path, link_models: Link) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home, chat__keep_warm="demand") as http:
        health = await health_when(http, lambda body: body["embed"]["state"] == "ready")
    assert "REPACK" in health["engine"]["backends"]["CPU"]
    assert isinstance(health["engine"]["gpu"], bool)


# --- the daemon's own threads ----------------------------------------------------------------------


async def test_numpy_computes_with_one_thread_in_the_daemon(tmp_path: Path) -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    np.dot(np.ones((2, 2), np.float32), np.ones(2, np.float32))
    outside = threads()
    async with daemon(tmp_path / "home", command=FAKE_WORKER, fake=True):
        assert threads() == [1] * len(outside)
    assert threads() == outside
    assert outside
