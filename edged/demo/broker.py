"""A broker for the demo: mosquitto where it is installed, else amqtt in a process of its own."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edged.errors import EdgedError

START_TIMEOUT_SECONDS = 15.0
DEBIAN_SBIN = "/usr/sbin"  # where mosquitto lies, and not on every user's PATH


class BrokerError(EdgedError):
    code = "demo_broker_failed"


@contextlib.contextmanager
def running() -> Iterator[tuple[str, str]]:
    """A broker on a free loopback port for the time of the block: its URL and its name."""
    port = free_port()
    mosquitto = shutil.which("mosquitto") or shutil.which("mosquitto", path=DEBIAN_SBIN)
    with tempfile.TemporaryDirectory(prefix="edged-demo-") as folder:
        command = [sys.executable, "-m", "edged.demo.broker", str(port)]
        if mosquitto is not None:
            settings = Path(folder) / "mosquitto.conf"
            settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
            command = [mosquitto, "-c", str(settings)]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                _wait(process, port, log.name)
                yield f"mqtt://127.0.0.1:{port}", "mosquitto" if mosquitto else "amqtt"
            finally:
                process.terminate()
                process.wait(timeout=10)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: str) -> None:
    end = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)  # the broker says nowhere that it listens; asking is the only way
    said = Path(log).read_text(errors="replace").strip().splitlines()
    raise BrokerError(
        f"the demo's MQTT broker did not start: {said[-1] if said else 'it said nothing'}",
        hint="install mosquitto, or give a running broker with --broker URL",
    )


async def _serve(port: int) -> None:
    from amqtt.broker import Broker  # noqa: PLC0415 - an extra, needed only where mosquitto is missing

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
