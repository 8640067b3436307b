"""What edged costs while nothing happens, and how soon it is ready: ``edged serve`` as it is installed, with a broker.

Idle is the daemon alone, both models absent, so no worker: its resident memory and its CPU time over 20 s, begun 20 s
after the start. Ready is from the start of the process to ``/health`` saying ``ok`` with both models installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from edged.config import load
from edged.models.catalog import Catalog
from tests.broker import Mosquitto
from tests.ports import find_free_port

ROOT = Path(__file__).parent.parent
MODELS_CACHE = Path("~/.cache/edged/models").expanduser()
SETTLE_SECONDS = 20.0
WATCH_SECONDS = 20.0
STARTS = 5
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 30.0
MOST_MIB = 105.0  # 110 MB
MOST_CPU_PERCENT = 1.0
MOST_READY_SECONDS = 3.0


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that does nothing. ``anonymous_mib`` is its own memory, without files mapped from the disk."""

    resident_mib: float
    anonymous_mib: float
    cpu_percent: float
    threads: int


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start, seconds from the process to the first HTTP answer and to ``ok``."""

    serving_seconds: float
    ready_seconds: float


@contextmanager
def daemon(home: Path, broker: Mosquitto) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``edged serve`` with defaults but for home, port, broker and log level; its process and its address."""
    listen = f"127.0.0.1:{find_free_port()}"
    environment = {
        **os.environ,
        "EDGED_HOME": str(home),
        "EDGED_HTTP__LISTEN": listen,
        "EDGED_MQTT__URL": broker.url,
        "EDGED_LOG__LEVEL": "error",
    }
    process = subprocess.Popen([sys.executable, "-m", "edged.cli", "serve"], cwd=ROOT, env=environment)
    try:
        yield process, f"http://{listen}"
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def wait_for(url: str, *, status: str | None) -> dict[str, object]:
    """Ask ``/health`` until it answers, with ``status`` where one is given."""
    end = time.monotonic() + PATIENCE_SECONDS
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < end:
            try:
                body: dict[str, object] = client.get(f"{url}/health").json()
            except httpx.TransportError:
                body = {}
            if body and status in (None, body["status"]):
                return body
            time.sleep(POLL_SECONDS)
    raise SystemExit(f"not ready within {PATIENCE_SECONDS:g} s: {body}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5), stat fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_field(pid: int, name: str) -> int:
    """A number of ``/proc/PID/status``; memory in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def idle(folder: Path, broker: Mosquitto) -> Idle:
    """A daemon without models, left alone."""
    with daemon(folder / "idle", broker) as (process, url):
        wait_for(url, status=None)
        time.sleep(SETTLE_SECONDS)
        before = cpu_seconds(process.pid)
        time.sleep(WATCH_SECONDS)
        used = cpu_seconds(process.pid) - before
        return Idle(
            resident_mib=round(status_field(process.pid, "VmRSS") / 1024, 1),
            anonymous_mib=round(status_field(process.pid, "RssAnon") / 1024, 1),
            cpu_percent=round(100 * used / WATCH_SECONDS, 2),
            threads=status_field(process.pid, "Threads"),
        )


def start(home: Path, broker: Mosquitto) -> Start:
    """Start a daemon over installed models and wait for ``ok``."""
    started = time.monotonic()
    with daemon(home, broker) as (_, url):
        wait_for(url, status=None)
        serving = time.monotonic()
        wait_for(url, status="ok")
        return Start(serving_seconds=round(serving - started, 3), ready_seconds=round(time.monotonic() - started, 3))


def starts(folder: Path, broker: Mosquitto) -> list[Start]:
    """Several starts over one home, both default models in it."""
    home = folder / "ready"
    config = load(None, {}, {"home": str(home)})
    catalog = Catalog(config.models_dir, MODELS_CACHE)
    for name in (config.chat.model, config.embed.model):
        catalog.pull(name)
    return [start(home, broker) for _ in range(STARTS)]


def report(found: Idle, started: list[Start]) -> str:
    """The plain table, and what must hold."""
    serving = statistics.median(each.serving_seconds for each in started)
    ready = statistics.median(each.ready_seconds for each in started)
    slowest = max(each.ready_seconds for each in started)
    figures = (
        ("resident memory, idle", f"{found.resident_mib:.1f} MiB", f"<= {MOST_MIB:g}", found.resident_mib <= MOST_MIB),
        ("of it anonymous", f"{found.anonymous_mib:.1f} MiB", "", True),
        (
            f"CPU over {WATCH_SECONDS:g} s, idle",
            f"{found.cpu_percent:.2f} % of a core",
            f"< {MOST_CPU_PERCENT:g}",
            found.cpu_percent < MOST_CPU_PERCENT,
        ),
        ("threads, idle", str(found.threads), "", True),
        (f"start to first HTTP answer, median of {STARTS}", f"{serving:.2f} s", "", True),
        (
            f"start to ready, median of {STARTS}",
            f"{ready:.2f} s",
            f"<= {MOST_READY_SECONDS:g}",
            ready <= MOST_READY_SECONDS,
        ),
        ("start to ready, slowest", f"{slowest:.2f} s", "", True),
    )
    return "\n".join(
        f"{name:<44} {value:>17} {bound:>8}{'' if not bound else '  yes' if holds else '  NO'}"
        for name, value, bound, holds in figures
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write every figure to this file")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="edged-idle-") as name:
        Path(name).chmod(0o755)
        broker = Mosquitto(Path(name), find_free_port())
        broker.start()
        try:
            started = starts(Path(name), broker)
            found = idle(Path(name), broker)
        finally:
            broker.stop()
    print(report(found, started))
    if given.json is not None:
        body = {"idle": msgspec.to_builtins(found), "starts": msgspec.to_builtins(started)}
        given.json.write_text(json.dumps(body, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
