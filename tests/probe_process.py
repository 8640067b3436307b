"""The probe as a process of its own, and a client of it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edged.probe.protocol import Watch, decode_sample, encode
from edged.probe.sample import Sample, Watched
from edged.workers.protocol import FrameBuffer

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 100.0
"""For a machine that is busy with other things while the probe compiles."""


class ProbeProcess:
    """``edged probe`` on a socket of its own; ``before`` are words that its command begins with (unshare, setpriv)."""

    def __init__(self, folder: Path, *options: str, before: Sequence[str] = ()) -> None:
        self.socket = folder / "probe.sock"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.settimeout(PATIENCE_SECONDS)
        self._notified.bind(str(folder / "notify.sock"))
        (folder / "notify.sock").chmod(0o666)
        self._log = (folder / "probe.log").open("wb")
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "edged.cli", "probe", "--socket", str(self.socket), *options],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify.sock")},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        self.log = folder / "probe.log"

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> None:
        while not self._notified.recv(4096).startswith(b"READY=1"):
            pass

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_SECONDS)
        self.close()
        return status

    def close(self) -> None:
        self.kill()
        self._notified.close()
        self._log.close()


class ProbeClient:
    """A connection to the probe."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE_SECONDS)
        self._socket.connect(str(path))
        self._frames = FrameBuffer()
        self._samples: list[Sample] = []

    def watch(self, *processes: Watched) -> None:
        self._socket.sendall(encode(Watch(processes)))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def sample(self) -> Sample:
        """The next one. Raises ``EOFError`` when the probe ends the connection."""
        while not self._samples:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._samples += [decode_sample(payload) for payload in self._frames.feed(data)]
        return self._samples.pop(0)

    def sample_until(self, wanted: Callable[[Sample], bool]) -> Sample:
        """The first that is as wanted."""
        while not wanted(sample := self.sample()):
            pass
        return sample

    def close(self) -> None:
        self._socket.close()


def tell_as(user: int, path: Path, other: int) -> None:
    """As another user, print the names of those of two processes that the probe tells of: this one, and another."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    connected = ProbeClient(path)
    connected.watch(Watched(name="mine", pid=os.getpid()), Watched(name="other", pid=other))
    sys.stdout.write(" ".join(each.name for each in connected.sample().processes))


if __name__ == "__main__":
    tell_as(int(sys.argv[2]), Path(sys.argv[1]), int(sys.argv[3]))
