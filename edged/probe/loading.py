"""Whether our programs can be had in this kernel, and the way there: a process of its own compiles and loads them."""

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from edged.errors import ProbeError
from edged.probe import bpf
from edged.probe.compiler import BCC, Loaded
from edged.probe.layout import KEYLESS, NUMBER, OF_EACH_CORE, VALUES

LONGEST_SECONDS: Final = 180.0
MOST_DESCRIPTORS: Final = 64
LONGEST_REASON: Final = 300

CAPABILITIES: Final = {"CAP_BPF": 39, "CAP_PERFMON": 38}
CAP_SYS_ADMIN: Final = 21
INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO


def obstacle(root: Path = Path("/")) -> str:
    """Why the programs cannot be loaded here, with the remedy; empty where nothing is known against it."""
    if platform.machine() not in bpf.CALL_NUMBERS:
        return f"the eBPF programs are for x86-64 and arm64, not {platform.machine()}"
    if missing := _missing_capabilities(root / "proc/self/status"):
        return f"eBPF needs {' and '.join(missing)}: run edged-probe.service"
    if (root / "proc/self/ns/pid").stat().st_ino != INITIAL_PID_NAMESPACE:
        return "eBPF sees the host's process numbers, and this container has others: run the probe on the host"
    return missing_tools(root)


def missing_tools(root: Path = Path("/")) -> str:
    """The part of :func:`obstacle` that holds for everybody on this system."""
    if not (root / BCC.relative_to("/") / "__init__.py").exists():
        return "bcc is not installed: sudo apt-get install python3-bpfcc"
    headers = (f"lib/modules/{platform.release()}/build/include", "sys/kernel/kheaders.tar.xz")
    if not any((root / place).exists() for place in headers):
        return "there are no headers of this kernel: 'edged doctor' names their package"
    return ""


def _missing_capabilities(status: Path) -> list[str]:
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    if effective >> CAP_SYS_ADMIN & 1:
        return []
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


class Programs:
    """The loaded programs and their maps, by name. They are this process's: :meth:`close` or its end frees them."""

    def __init__(self, loaded: Loaded, descriptors: list[int]) -> None:
        count = len(loaded.programs)
        self.programs = dict(zip(loaded.programs, descriptors[:count], strict=True))
        cores = bpf.possible_cores()
        self.maps = {
            name: bpf.Map(
                descriptor,
                0 if name in KEYLESS else NUMBER.size,
                VALUES[name].size,
                cores=cores if name in OF_EACH_CORE else 1,
            )
            for name, descriptor in zip(loaded.maps, descriptors[count:], strict=True)
        }
        other = [name for name, size in zip(loaded.maps, loaded.sizes, strict=True) if size != VALUES[name].size]
        if other:
            self.close()
            raise ProbeError(f"the maps {', '.join(other)} are not as this version reads them")

    def close(self) -> None:
        for descriptor in self.programs.values():
            os.close(descriptor)
        for each in self.maps.values():
            each.close()
        self.programs.clear()
        self.maps.clear()


class Loading:
    """The programs on their way: :meth:`poll` now and then, or :meth:`wait`; in the end, in any case, :meth:`close`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            # -P: what lies in the folder that it happens to run in is none of its modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "edged.probe.compiler", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
            )

    def poll(self) -> Programs | None:
        """The programs once they are loaded. Raises :class:`ProbeError` when they cannot be."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, 64 * 1024, MOST_DESCRIPTORS)
        except BlockingIOError:
            if time.monotonic() - self._began > LONGEST_SECONDS:
                raise ProbeError(f"bcc did not end within {LONGEST_SECONDS:.0f} s") from None
            return None
        if not message:
            self._process.wait()
            raise ProbeError(f"bcc could not load the programs: {self._reason()}")
        return Programs(msgspec.json.decode(message, type=Loaded), descriptors)

    def wait(self) -> Programs:
        """The same, however long it takes."""
        self._socket.setblocking(True)
        programs = self.poll()
        assert programs is not None
        return programs

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._said.close()

    def _reason(self) -> str:
        """The first line that names an error, else the last one."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line]
        return (errors or lines[-1:] or [f"status {self._process.returncode}"])[0][:LONGEST_REASON]
