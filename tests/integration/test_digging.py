"""A running daemon whose worker is looked into: what is recorded, who may ask, and that nothing of it stays."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from edged.client import server_sent_events
from edged.daemon import running
from edged.engine.inspection import PR_SET_PTRACER
from edged.probe.digging import read_heap, read_kept
from edged.workers.process import ENGINE_COMMAND
from tests.daemon_process import FAKE_WORKER, ROOT, configure

pytestmark = pytest.mark.timeout(300)

ROUTE = "/v1/profile/worker"
LONG = 600
Link = Callable[[Path], None]
Event = tuple[str, dict[str, Any]]


@contextlib.asynccontextmanager
async def daemon(home: Path, *, fake: bool = False, **overrides: Any) -> AsyncIterator[httpx.AsyncClient]:
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    probe = {"probe.enabled": True, "probe.socket": str(home / "probe.sock")}
    config = configure(home, {"mqtt.enabled": False, **probe, **names}, fake=fake)
    async with (
        running(config, worker_command=FAKE_WORKER if fake else ENGINE_COMMAND) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=120) as http,
    ):
        yield http


async def when(holds: Callable[[], Any]) -> None:
    """Return once it holds, for what nobody announces."""
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def states(http: httpx.AsyncClient) -> set[str]:
    health = (await http.get("/health")).json()
    return {health["chat"]["state"], health["embed"]["state"]}


async def until_loaded(http: httpx.AsyncClient) -> None:
    async def loaded() -> bool:
        return await states(http) == {"ready"}

    await when(loaded)


@contextlib.asynccontextmanager
async def inspecting(http: httpx.AsyncClient, **asked: Any) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of one look, as they come."""

    async def events(response: httpx.Response) -> AsyncIterator[Event]:
        lines: list[str] = []
        async for line in response.aiter_lines():
            lines.append(line)
            if not line:
                for name, data in server_sent_events(lines):
                    yield name, json.loads(data)
                lines = []

    async with http.stream("POST", ROUTE, json=asked) as response:
        assert response.status_code == 200, await response.aread()
        yield events(response)


async def generate(http: httpx.AsyncClient) -> None:
    body = {"model": "x", "prompt": "A pump is", "max_tokens": 8}
    answer = await http.post("/v1/completions", json={**body, "model": (await models(http))[0]})
    assert answer.is_success, answer.text


async def models(http: httpx.AsyncClient) -> list[str]:
    return [each["id"] for each in (await http.get("/v1/models")).json()["data"]]


def captures(home: Path) -> list[Path]:
    return list((home / "run").glob("*.memray"))


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.models
async def test_a_workers_allocations_are_recorded_until_the_client_leaves_and_no_longer(
    tmp_path: Path, link_models: Link
) -> None:
    home = tmp_path / "home"
    link_models(home)

    async def gone() -> bool:
        return not captures(home)

    async with daemon(home) as http:
        await until_loaded(http)
        pid = (await http.get("/health")).json()["chat"]["pid"]
        for _ in range(2):
            async with inspecting(http, seconds=4) as events:
                assert await anext(events) == ("started", {"pid": pid})
                await generate(http)
                told = [event async for event in until_finished(events)]
                capture = Path(told[-1][1]["allocations"])
                kept = await asyncio.to_thread(read_kept, capture)
                heap = await asyncio.to_thread(read_heap, capture)
            assert {name for name, _ in told[:-1]} == {"profile"}
            assert told[-2][1]["workers"]["chat"]["pid"] == pid
            assert any("edged/engine/chat.py" in each.place for each in kept)
            assert len(heap) > 3
            await when(gone)
        assert (await http.get("/health")).json()["chat"]["restarts"] == 0


async def until_finished(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    async for event in events:
        yield event
        if event[0] == "finished":
            return


@pytest.mark.models
async def test_a_client_that_leaves_early_ends_the_recording(
    tmp_path: Path, link_models: Link, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home) as http:
        await until_loaded(http)
        async with inspecting(http, seconds=LONG, role="embed") as events:
            await anext(events)
            assert len(captures(home)) == 1
            busy = await http.post(ROUTE, json={"role": "embed"})
            assert (busy.status_code, busy.json()["code"]) == (409, "inspection_busy")

        async def free() -> bool:
            async with http.stream("POST", ROUTE, json={"role": "embed", "seconds": LONG}) as response:
                return response.status_code == 200

        await when(free)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.models
async def test_a_worker_that_dies_while_it_is_looked_into_is_said_to_have(tmp_path: Path, link_models: Link) -> None:
    home = tmp_path / "home"
    link_models(home)
    async with daemon(home) as http:
        await until_loaded(http)
        async with inspecting(http, seconds=3, role="embed") as events:
            _, started = await anext(events)
            os.kill(started["pid"], signal.SIGKILL)
            last = [event async for event in events][-1]
        assert (last[0], last[1]["code"]) == ("error", "worker_lost")
        await until_loaded(http)
        assert captures(home) == []


# --- refusals --------------------------------------------------------------------------------------


async def test_a_worker_without_memray_refuses_with_what_helps(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", fake=True) as http:
        await until_loaded(http)
        answer = await http.post(ROUTE, json={})
        assert (answer.status_code, answer.json()["code"]) == (501, "inspection_unavailable")
        assert "pip install 'edged[profiling]'" in answer.json()["hint"]


async def test_a_worker_without_a_process_cannot_be_looked_into(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", fake=True, chat__keep_warm="demand") as http:
        answer = await http.post(ROUTE, json={})
        assert (answer.status_code, answer.json()["code"]) == (503, "worker_unavailable")


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": 601}, {"role": "daemon"}, {"tracer": -1}, {"x": 1}])
async def test_what_cannot_be_asked_is_refused_by_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async with daemon(tmp_path / "home", fake=True) as http:
        answer = await http.post(ROUTE, json=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
        assert next(iter(wrong)) in answer.json()["detail"]


# --- the whole of it -------------------------------------------------------------------------------


@pytest.fixture
def load() -> Iterator[Callable[[int], None]]:
    """``load(port)``: somebody who asks the daemon for completions until the test ends."""
    program = (
        "import httpx, sys\n"
        "with httpx.Client(base_url=sys.argv[1], trust_env=False, timeout=60) as http:\n"
        "    model = http.get('/v1/models').json()['data'][0]['id']\n"
        "    while True:\n"
        "        http.post('/v1/completions', json={'model': model, 'prompt': 'A pump is', 'max_tokens': 40})\n"
    )
    begun: list[subprocess.Popen[bytes]] = []

    def begin(port: int) -> None:
        address = f"http://127.0.0.1:{port}"
        begun.append(subprocess.Popen([sys.executable, "-c", program, address], stderr=subprocess.DEVNULL))

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.models
async def test_the_command_writes_flame_graph_memory_report_and_one_timeline(
    tmp_path: Path, link_models: Link, load: Callable[[int], None]
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    link_models(home)
    async with daemon(home) as http:
        await until_loaded(http)
        port = http.base_url.port
        assert port is not None
        load(port)
        environment = {**os.environ, "EDGED_HOME": str(home), "EDGED_HTTP__LISTEN": f"127.0.0.1:{port}"}
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "edged.cli", "profile", "worker", "--seconds", "7", "--out", str(out), "--json"),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said, complaints = await command.communicate()
        restarts = (await http.get("/health")).json()["chat"]["restarts"]
    assert command.returncode == 0, complaints.decode()
    dug = json.loads(said)
    assert restarts == 0
    assert sorted(dug["files"]) == sorted(file.name for file in out.iterdir() if file.name in dug["files"])
    timeline = json.loads((out / "timeline.json").read_text())
    series = {each["name"]: each["points"] for each in timeline["series"]}
    assert {"resident", "cores", "tokens", "heap"} <= series.keys()
    assert max(value for _, value in series["tokens"]) > 0
    for each in series.values():
        assert all(0 <= at <= timeline["seconds"] for at, _ in each)
    assert {"memory.html", "memory.json", "timeline.html", "allocations.memray"} <= set(dug["files"])
    assert dug["kept"]
    if not dug["samples"]:
        pytest.skip(f"py-spy cannot attach here: {dug['notes']}")
    assert "flames.html" in dug["files"]
    assert timeline["slices"]
    if dug["native"]:
        assert "llama_decode" in (out / "stacks.folded").read_text()
    assert "edged/engine/__main__.py" in (out / "stacks.folded").read_text()


@pytest.mark.models
async def test_only_the_process_that_is_named_may_trace_the_worker(tmp_path: Path, link_models: Link) -> None:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not scope.exists() or scope.read_text().strip() != "1" or os.geteuid() == 0:
        pytest.skip("this kernel does not ask who may trace (Yama's scope 1), or root asks it")
    home = tmp_path / "home"
    link_models(home)
    stranger = [sys.executable, "-c", "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"]

    def may_trace(pid: int) -> bool:
        return subprocess.run([*stranger, str(pid)], stderr=subprocess.DEVNULL, check=False).returncode == 0

    async with daemon(home) as http:
        await until_loaded(http)
        pid = (await http.get("/health")).json()["embed"]["pid"]
        assert psutil.pid_exists(pid)
        assert not await asyncio.to_thread(may_trace, pid)
        async with inspecting(http, seconds=LONG, role="embed", tracer=os.getpid()) as events:
            await anext(events)
            assert await asyncio.to_thread(may_trace, pid), PR_SET_PTRACER
