"""The kernel's own cgroup tree, real daemons and real processes: who is put where, and put back.

Where this machine's cgroup v2 tree has no controllers, processes are still moved, found elsewhere and put back in it;
limits are tested on the emulated boards.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.daemon import running
from tests.daemon_process import FAKE_WORKER, configure

CORES = sorted(os.sched_getaffinity(0))
MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


# --- the kernel's tree -----------------------------------------------------------------------------


@pytest.fixture
def own_cgroup() -> Iterator[tuple[Path, Path]]:
    """A mount of cgroup v2, and a new cgroup in it for this test."""
    mount = next((mount for mount in MOUNTS if (mount / "cgroup.controllers").exists()), None)
    if mount is None:
        pytest.skip("there is no cgroup v2")
    group = mount / f"edged-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    yield mount, group
    for folder in (*group.glob("*/"), group):
        folder.rmdir()


LIFE = """
import json, os, subprocess, sys
from pathlib import Path
from edged.hardware.placement import Bounds
from edged.workers.cgroup import Confinement, Tree, group_of

mount, base = Path(sys.argv[1]), Path(sys.argv[2])
bounds = Bounds(cores=tuple(sorted(os.sched_getaffinity(0)))[:1], threads=1, weight=500, nice=0)
said = {"before": group_of(os.getpid())}
confinement = Confinement(Tree.claim(mount))
confinement.confine("daemon", os.getpid(), bounds)
said["daemon"] = group_of(os.getpid())
worker = subprocess.Popen(["sleep", "60"])
confinement.confine("chat", worker.pid, bounds)
name = f"chat-{worker.pid}"
said["worker"] = group_of(worker.pid).replace(str(worker.pid), "PID")
said["undrifted"] = len(confinement.repair())
(base / "daemon" / "cgroup.procs").write_text(str(worker.pid))
said["drifts"] = [drift.kind for drift in confinement.repair()[worker.pid]]
said["back"] = group_of(worker.pid).replace(str(worker.pid), "PID")
said["held"] = confinement.sweep() == {} and (base / name).exists()
worker.kill(); worker.wait()
while (base / name).exists():
    confinement.sweep()
confinement.release(frozenset(os.sched_getaffinity(0)))
said["after"] = group_of(os.getpid())
said["left"] = [each.name for each in base.iterdir() if each.is_dir()]
print(json.dumps(said))
"""


def test_in_the_kernels_tree_a_daemon_lives_and_leaves_nothing_behind(own_cgroup: tuple[Path, Path]) -> None:
    mount, group = own_cgroup
    path = f"/{group.name}"
    enter = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} - {mount} {group}"
    done = subprocess.run(["sh", "-c", enter], input=LIFE, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "before": path,
        "daemon": f"{path}/daemon",
        "worker": f"{path}/chat-PID",
        "undrifted": 0,
        "drifts": ["group"],
        "back": f"{path}/chat-PID",
        "held": True,
        "after": path,
        "left": [],
    }


# --- daemons ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def daemon(
    home: Path, *, available_memory: Callable[[], int | None] = lambda: None, **overrides: Any
) -> AsyncIterator[httpx.AsyncClient]:
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    config = configure(home, {"mqtt.enabled": False, **names})
    async with (
        running(config, worker_command=FAKE_WORKER, available_memory=available_memory) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=60) as http,
    ):
        yield http


async def health_when(http: httpx.AsyncClient, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """``/health``, once it is as wanted."""
    async with asyncio.timeout(60):
        while True:
            body: dict[str, Any] = (await http.get("/health")).json()
            if holds(body):
                return body


def codes(health: dict[str, Any]) -> set[str]:
    return {held["code"] for held in health["conditions"]}


def loaded(health: dict[str, Any]) -> bool:
    return bool(health["status"] != "failing" and health["chat"]["state"] == health["embed"]["state"] == "ready")


async def test_health_shows_the_placement_and_each_process_is_there(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    async with daemon(tmp_path / "home") as http:
        health = await health_when(http, loaded)
        hardware = health["hardware"]
        assert (hardware["cgroups"], hardware["heat_step"], hardware["memory"]) == (False, 0, "calm")
        for role in ("chat", "embed"):
            bounds = hardware["placement"][role]
            assert sorted(os.sched_getaffinity(health[role]["pid"])) == bounds["cores"]
            assert health[role]["threads"] == bounds["threads"] <= len(bounds["cores"])
            assert bounds["memory_max"] > bounds["memory_high"] > 0
        assert sorted(os.sched_getaffinity(0)) == hardware["placement"]["daemon"]["cores"]
        metrics = (await http.get("/metrics")).text
        assert "edged_heat_step 0.0" in metrics
        assert f"edged_chat_threads {hardware['placement']['chat']['threads']:.1f}" in metrics
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(len(CORES) < 2, reason="affinity cannot differ on one core")
async def test_taskset_on_a_worker_from_outside_is_named_and_undone(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", chat__threads=1) as http:
        health = await health_when(http, loaded)
        pid, planned = health["chat"]["pid"], health["hardware"]["placement"]["chat"]["cores"]
        wrong = next(core for core in CORES if [core] != planned)
        taskset = await asyncio.create_subprocess_exec("taskset", "-a", "-p", "-c", str(wrong), str(pid), stdout=-3)
        assert await taskset.wait() == 0
        health = await health_when(http, lambda body: "placement_drifted" in codes(body))
        assert sorted(os.sched_getaffinity(pid)) == planned
        [condition] = [held for held in health["conditions"] if held["code"] == "placement_drifted"]
        assert f"process {pid}" in condition["text"]


async def test_a_device_short_of_memory_refuses_batch_questions_alone_until_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.serving.care.OBSERVE_EVERY_SECONDS", 0.02)
    available = [10 << 30]
    async with daemon(tmp_path / "home", available_memory=lambda: available[0]) as http:
        await health_when(http, loaded)
        available[0] = 1 << 20
        health = await health_when(http, lambda body: "memory_short" in codes(body))
        assert health["hardware"]["memory"] in ("shedding", "shrinking")
        refused = await http.post("/v1/query", json={"query": "How much?", "priority": "batch"})
        assert (refused.status_code, refused.json()["code"]) == (503, "batch_shed")
        assert refused.headers["retry-after"] == "30"
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        chat = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        refused = await http.post("/v1/chat/completions", json={**chat, "priority": "batch"})
        assert refused.status_code == 503
        assert (await http.post("/v1/query", json={"query": "How much?"})).status_code == 200
        assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
        await health_when(http, lambda body: body["hardware"]["memory"] == "shrinking")
        available[0] = 10 << 30
        await health_when(http, lambda body: body["hardware"]["memory"] == "calm")
        assert (await http.post("/v1/query", json={"query": "How much?", "priority": "batch"})).status_code == 200


async def test_cgroups_that_cannot_be_had_are_a_condition_and_the_daemon_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.workers.cgroup.Tree.claim.__func__.__defaults__", (tmp_path, Path("/proc"), None))
    async with daemon(tmp_path / "home", hardware__cgroups=True) as http:
        health = await health_when(http, loaded)
        assert (health["status"], codes(health)) == ("degraded", {"cgroups_missing"})
        assert (await http.post("/v1/query", json={"query": "How much?"})).status_code == 200
