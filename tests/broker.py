"""A mosquitto of one test's own, that can be stopped, killed and started again on the same port."""

import os
import socket
import subprocess
import threading
from pathlib import Path

START_SECONDS = 10.0


def find_free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """The process ``mosquitto`` on ``127.0.0.1:port``; everything it keeps lies in ``folder``.

    ``options`` are further lines of mosquitto.conf(5). Persistence is on: after :meth:`stop` and :meth:`start` the
    sessions and their queues are there again; :meth:`kill` loses what was not saved (``autosave_interval``).
    """

    def __init__(self, folder: Path, port: int, options: str = "allow_anonymous true") -> None:
        self.folder = folder
        self.port = port
        self.log: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._reading: threading.Thread | None = None
        self._config = folder / "mosquitto.conf"
        lines = (
            f"listener {port} 127.0.0.1",
            "persistence true",
            f"persistence_location {folder}/",
            "log_dest stderr",
            "log_type all",
            "max_queued_messages 0",
            *(["user root"] if os.geteuid() == 0 else []),
            options,
        )
        self._config.write_text("\n".join(lines) + "\n")

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it accepts connections."""
        assert not self.running
        self._process = subprocess.Popen(
            ["mosquitto", "-c", str(self._config)], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        listening = threading.Event()
        self._reading = threading.Thread(target=self._read, args=(self._process, listening), name="mosquitto-log")
        self._reading.start()
        if not listening.wait(START_SECONDS) or not self.running:
            self.kill()
            raise RuntimeError("mosquitto did not start: " + " | ".join(self.log[-5:]))

    def stop(self) -> None:
        """End it by SIGTERM: it saves its sessions. Nothing happens where it does not run."""
        self._end(by_force=False)

    def kill(self) -> None:
        """End it by SIGKILL: what it had only in memory is lost."""
        self._end(by_force=True)

    def _end(self, *, by_force: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if by_force:
            process.kill()
        else:
            process.terminate()
        process.wait(START_SECONDS)
        if self._reading is not None:
            self._reading.join(START_SECONDS)
        if process.stderr is not None:
            process.stderr.close()

    def _read(self, process: "subprocess.Popen[str]", listening: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line.rstrip())
            if line.rstrip().endswith(" running"):
                listening.set()
        listening.set()  # its end, which start() tells from its beginning by `running`
