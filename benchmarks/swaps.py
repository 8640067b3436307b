"""Swap two chat models again and again under constant streams: requests that fail, and memory that stays.

``python benchmarks/swaps.py [--swaps 50] [--streams 4] [--models NAME NAME] [--home DIR]`` runs a daemon over HTTP in a
home of its own, with the models of ``--home`` (or of the shared cache), and prints one line a swap. A request fails
when it has another status than 200, or was not answered by a model. Goal: none fails, and the daemon's resident memory
after the last swap is no more than after the tenth.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from edged.config import Config
from edged.models.catalog import Catalog

MANUAL = (
    "# Pump P7\n\nThe relief valve of pump P7 opens at 12 bar. The pump P7 holds 4 litres of oil. "
    "Pump P7 weighs 30 kg. The seal of pump P7 is changed every 6 months by a trained fitter."
)
QUESTIONS = (
    "At what pressure does the relief valve of pump P7 open?",
    "How much oil does pump P7 hold?",
    "How heavy is pump P7?",
    "When is the seal of pump P7 changed?",
)
WARM_SWAPS = 10
MEGABYTE = 1e6


@dataclass
class Load:
    """What the streams have seen."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    by_model: dict[str, int] = field(default_factory=dict)

    def answered(self, response: httpx.Response, seconds: float) -> None:
        body = response.json()
        self.seconds.append(seconds)
        if response.status_code != 200 or body["step"] not in ("generated", "reduced", "unverified"):
            self.failures.append(f"{response.status_code} {body.get('step', '')} {body.get('note') or body}"[:200])
            return
        name = body["model"].partition("@")[0]
        self.by_model[name] = self.by_model.get(name, 0) + 1


async def ask_for_ever(http: httpx.AsyncClient, number: int, load: Load) -> None:
    """One stream: the next question as soon as the answer is there."""
    while True:
        began = time.monotonic()
        try:
            response = await http.post("/v1/query", json={"query": QUESTIONS[number % len(QUESTIONS)]})
        except httpx.HTTPError as error:
            load.failures.append(repr(error))
        else:
            load.answered(response, time.monotonic() - began)


@contextlib.asynccontextmanager
async def streams(http: httpx.AsyncClient, count: int, load: Load) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(ask_for_ever(http, number, load)) for number in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def activate(http: httpx.AsyncClient, model: str) -> str:
    """Swap, wait for its end; the outcome, with the reason where it is not promoted."""
    body = (await http.post("/v1/rollouts", json={"model": model})).raise_for_status().json()
    while body["outcome"] is None:
        seen = body["progress"]["version"] if body["progress"] else 0
        body = (await http.get(f"/v1/rollouts/{body['id']}", params={"seen": seen, "wait_s": 20})).json()
    return str(body["outcome"]) if body["outcome"] == "promoted" else f"{body['outcome']}: {body['reason']}"


async def measure(url: str, pid: int, models: list[str], swaps: int, count: int) -> bool:
    """Print the table; whether both goals are met."""
    daemon, load, resident = psutil.Process(pid), Load(), []
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as http:
        (await http.post("/v1/documents", json={"id": "p7", "text": MANUAL, "format": "markdown"})).raise_for_status()
        print(f"{'swap':>4}  {'to':<24} {'took s':>7} {'answers':>8} {'failed':>7} {'daemon MB':>10} {'children':>9}")
        async with streams(http, count, load):
            for swap in range(1, swaps + 1):
                model, began = models[swap % len(models)], time.monotonic()
                outcome = await activate(http, model)
                resident.append(daemon.memory_info().rss)
                print(
                    f"{swap:>4}  {model:<24} {time.monotonic() - began:>7.1f} {len(load.seconds):>8}"
                    f" {len(load.failures):>7} {resident[-1] / MEGABYTE:>10.1f} {len(daemon.children()):>9}"
                    + ("" if outcome == "promoted" else f"  {outcome}"),
                    flush=True,
                )
    return _conclude(load, resident)


def _conclude(load: Load, resident: list[int]) -> bool:
    for failure in load.failures[:10]:
        print(f"failed: {failure}")
    print(f"answers by model: {load.by_model}; seconds an answer p50 {statistics.median(load.seconds):.2f},", end=" ")
    print(f"longest {max(load.seconds):.2f}")
    warm = resident[min(WARM_SWAPS, len(resident)) - 1]
    growth = max(resident[-3:]) - warm
    print(
        f"{len(load.failures)} of {len(load.seconds)} requests failed; daemon grew by {growth / MEGABYTE:.1f} MB",
        end=" ",
    )
    print(f"after swap {min(WARM_SWAPS, len(resident))}")
    return not load.failures and growth < 0.02 * warm


@contextlib.contextmanager
def served(home: Path) -> Iterator[tuple[str, int]]:
    """A daemon as a process of its own: its address and process id."""
    environment = {**os.environ, "EDGED_HOME": str(home), "EDGED_MQTT__ENABLED": "false"}
    port = _free_port()
    command = [sys.executable, "-m", "edged.cli", "serve", "--host", f"127.0.0.1:{port}"]
    with (home / "daemon.log").open("w") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _until_ready(url, process, home / "daemon.log")
            yield url, process.pid
        finally:
            process.terminate()


def _until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the daemon did not start:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _prepare(home: Path, origin: Path | None, models: list[str]) -> None:
    """Install the models from another home's files, or from the shared cache."""
    target = home / "models"
    if origin is not None:
        target.mkdir()
        for file in (origin / "models").iterdir():
            if not file.name.startswith("."):
                os.link(file, target / file.name)
    catalog = Catalog(target, Config().models_cache_dir)
    for name in {*models, Config().chat.model, Config().embed.model}:
        catalog.pull(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--models", nargs=2, default=["smollm2-135m-instruct", "gemma3-270m"])
    parser.add_argument("--home", type=Path, help="a home whose models are used")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edged-swaps-") as folder:
        home = Path(folder)
        _prepare(home, arguments.home, arguments.models)
        with served(home) as (url, pid):
            met = asyncio.run(measure(url, pid, arguments.models, arguments.swaps, arguments.streams))
    print(json.dumps({"goals_met": met}))
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
