"""A daemon as a process of its own, so that a test can kill it. Run as a script it is that process.

With ``fake=True`` its models are tiny files and its workers ``tests/fake_worker.py``; all else is real.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from edged import log
from edged.config import Config, load
from edged.daemon import running, spare_collector
from edged.workers.process import ENGINE_COMMAND
from tests.gguf_files import gguf_bytes

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
ROOT = Path(__file__).parent.parent
CHATML = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def fake_models(home: Path) -> dict[str, object]:
    """Configuration overrides naming two tiny model files, made in ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    chat, embed = home / "chat.gguf", home / "embed.gguf"
    if not chat.exists():
        chat.write_bytes(gguf_bytes({"tokenizer.chat_template": CHATML, "llama.context_length": 8192}))
        embed.write_bytes(gguf_bytes({"general.architecture": "bert", "bert.embedding_length": 384}))
    return {"chat.path": str(chat), "embed.path": str(embed)}


def configure(home: Path, overrides: dict[str, Any], *, fake: bool = True) -> Config:
    """A configuration for ``home`` with free ports where none is given."""
    names = {"home": str(home), "http.listen": "127.0.0.1:0", "log.level": "info"}
    less = {"hardware.cgroups": False, "probe.enabled": False}
    return load(None, {}, {**names, **less, **(fake_models(home) if fake else {}), **overrides})


class DaemonProcess:
    """Start, kill and start again; ``port`` is the HTTP port of the running one."""

    def __init__(self, home: Path, overrides: dict[str, Any], *, fake: bool = True) -> None:
        self._arguments = json.dumps({"home": str(home), "overrides": overrides, "fake": fake})
        self._process: subprocess.Popen[str] | None = None
        self._log = home.with_suffix(".log")
        self.port = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Return when the daemon accepts requests."""
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.daemon_process", self._arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said.startswith("READY "):
            self.kill()
            raise RuntimeError(f"the daemon did not start: {self._log.read_text()[-2000:]}")
        self.port = int(said.split()[1])

    def kill(self) -> None:
        """SIGKILL, as a power cut for the process."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        status = process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()
        return status


async def _serve(config: Config, command: tuple[str, ...]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running(config, worker_command=command) as server:
        spare_collector()
        os.write(sys.stdout.fileno(), f"READY {server.port}\n".encode())
        await stop.wait()


def _main() -> None:
    arguments = json.loads(sys.argv[1])
    config = configure(Path(arguments["home"]), arguments["overrides"], fake=arguments["fake"])
    log.configure(config.log.level)
    asyncio.run(_serve(config, FAKE_WORKER if arguments["fake"] else ENGINE_COMMAND))


if __name__ == "__main__":
    _main()
