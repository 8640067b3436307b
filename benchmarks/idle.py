"""What the daemon costs when nothing happens, and how long it takes to be ready.

Memory and CPU are those of the daemon's own process with both models absent, so that no worker runs. The start is
measured from spawning ``edged serve`` to the first 200 of ``/health/ready``, with the default models installed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from edged.config import Config
from edged.models.catalog import Catalog
from tests.broker import Mosquitto, find_free_port

IDLE_SECONDS = 20.0
STARTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edged-idle-") as folder:
        broker = Mosquitto(Path(folder), find_free_port())
        broker.start()
        try:
            result = {**_idle(Path(folder) / "empty", broker), "ready_seconds": _starts(Path(folder) / "full", broker)}
        finally:
            broker.stop()
    print(f"idle daemon without workers: {result['rss_mb']:.0f} MB RSS, {result['cpu_percent']:.2f} % of a core")
    print(f"from start to ready with models cached: {', '.join(f'{s:.2f}' for s in result['ready_seconds'])} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


def _idle(home: Path, broker: Mosquitto) -> dict[str, float]:
    process, _ = _start(home, broker)
    try:
        watched = psutil.Process(process.pid)
        before = sum(watched.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        used = sum(watched.cpu_times()[:2]) - before
        return {"rss_mb": watched.memory_info().rss / 1e6, "cpu_percent": 100 * used / IDLE_SECONDS}
    finally:
        process.terminate()
        process.wait()


def _starts(home: Path, broker: Mosquitto) -> list[float]:
    defaults = Config()
    catalog = Catalog(home / "models", defaults.models_cache_dir)
    for name in (defaults.chat.model, defaults.embed.model):
        catalog.pull(name)
    seconds = []
    for _ in range(STARTS):
        process, taken = _start(home, broker)
        process.terminate()
        process.wait()
        seconds.append(taken)
    return seconds


def _start(home: Path, broker: Mosquitto) -> tuple[subprocess.Popen[bytes], float]:
    port = find_free_port()
    environment = {
        **os.environ,
        "EDGED_HOME": str(home),
        "EDGED_HTTP__LISTEN": f"127.0.0.1:{port}",
        "EDGED_MQTT__URL": broker.url,
        "EDGED_LOG__LEVEL": "warning",
    }
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "edged.cli", "serve"], env=environment)
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200:
                return process, time.monotonic() - started
        except httpx.TransportError:
            pass
        time.sleep(0.02)


if __name__ == "__main__":
    main()
