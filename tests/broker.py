"""A mosquitto of one test's own, that can be stopped, killed and started again on the same port."""

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

START_SECONDS = 10.0


def refusing(folder: Path, pattern: str) -> str:
    """Options for a mosquitto that lets anybody do anything but subscribe to filters under ``pattern``.

    An ``acl_file`` refuses no subscription; the plugin for dynamic rules does.
    """
    plugin = next(Path("/usr/lib").glob("**/mosquitto_dynamic_security.so"), None)
    if plugin is None:
        pytest.skip("mosquitto's plugin mosquitto_dynamic_security.so is not there")
    defaults = ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe")
    rule = {"acltype": "subscribePattern", "topic": pattern, "priority": 0, "allow": False}
    rules = {
        "defaultACLAccess": dict.fromkeys(defaults, True),
        "anonymousGroup": "anybody",
        "groups": [{"groupname": "anybody", "roles": [{"rolename": "restrained"}]}],
        "roles": [{"rolename": "restrained", "acls": [rule]}],
        "clients": [],
    }
    file = folder / "rules.json"
    file.write_text(json.dumps(rules))
    return f"allow_anonymous true\nplugin {plugin}\nplugin_opt_config_file {file}"


class Mosquitto:
    """The process ``mosquitto`` on ``127.0.0.1:port``; everything it keeps lies in ``folder``.

    ``options`` are further lines of mosquitto.conf(5). Persistence is on: after :meth:`stop` and :meth:`start` the
    sessions and their queues are there again; :meth:`kill` loses what was not saved (``autosave_interval``).
    """

    def __init__(self, folder: Path, port: int, options: str = "allow_anonymous true") -> None:
        self.folder = folder
        self.port = port
        self.log: list[str] = []
        self._grown = threading.Condition()
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

    def until_logged(self, text: str, times: int) -> None:
        """Return once so many lines of the log hold ``text``."""
        with self._grown:
            logged = self._grown.wait_for(lambda: sum(text in line for line in self.log) >= times, START_SECONDS)
        assert logged, self.log

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
            with self._grown:
                self.log.append(line.rstrip())
                self._grown.notify_all()
            if line.rstrip().endswith(" running"):
                listening.set()
        listening.set()  # its end, which start() tells from its beginning by `running`
