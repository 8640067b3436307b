"""An emulated board: QEMU runs Debian with systemd as PID 1, ssh reaches it, and its power can be cut.

The board has no network. Ports of it that a test names are reachable from the host, and ports of the host that a test
names from the board, under the address ``HOST``. So brokers and loads live outside and outlive it.
"""

import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, assert_never

from tests.device import relay
from tests.ports import find_free_port

Architecture = Literal["amd64", "arm64"]

HOST = "10.0.2.100"
"""The address under which the board reaches what :attr:`Hardware.reaches` names."""

SSH_PORT = 22
BOOT_SECONDS = 600.0  # 30 on an idle machine with two cores, and several times that on a busy one
TRY_SECONDS = 0.2
GREETING_SECONDS = 5.0
SSH_SOCKET = "ssh"  # in the board's folder, and named from within: a socket's path may only be 108 bytes long
SSH = (
    *("ssh", "-o", f"ControlPath={SSH_SOCKET}", "-o", "BatchMode=yes", "-o", "ConnectTimeout=60"),
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
)
CONSOLES: Mapping[Architecture, str] = {"amd64": "ttyS0", "arm64": "ttyAMA0"}
IMAGE_SCRIPT = Path(__file__).parents[2] / "scripts" / "board-image.sh"


class BoardError(Exception):
    """The board, or a command on it, did not do what it was asked; says what it did."""


@dataclass(frozen=True, slots=True)
class Image:
    """A Debian that boards boot: its files lie in ``directory`` and are never written."""

    architecture: Architecture
    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "root.ext4"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @classmethod
    def cached_or_made(cls, architecture: Architecture) -> "Image":
        """The image of the present recipe. Making it takes minutes and root.

        Raises:
            BoardError: it cannot be made; says why.
        """
        made = subprocess.run([IMAGE_SCRIPT, architecture], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise BoardError(f"{IMAGE_SCRIPT.name} {architecture} failed:\n{made.stderr[-4000:]}")
        return cls(architecture, Path(made.stdout.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a board is made of, and its only connections."""

    memory_mb: int = 2048
    cpus: int = 2
    drives: Sequence[Path] = ()
    """Raw disks: /dev/vdb, /dev/vdc and so on."""
    shares: Mapping[str, Path] = field(default_factory=dict)
    """Directories of the host by tag, read-only: see :meth:`Board.mount`."""
    serves: Sequence[int] = ()
    """Ports of the board that the host reaches by :meth:`Board.port`."""
    reaches: Mapping[int, int] = field(default_factory=dict)
    """Port that the board sees at ``HOST`` → port on the host's loopback. Needs nobody to listen there yet."""


class Board:
    """One board with a disk of its own, in ``folder``. It can be booted again and again; blocking calls.

    ``disk`` is a raw image to boot instead of the new board's; neither is written.
    ``console`` is what the kernel and systemd printed in all its boots: keep it when a test fails.
    """

    def __init__(
        self, image: Image, folder: Path, hardware: Hardware | None = None, *, disk: Path | None = None
    ) -> None:
        self.image = image
        self.folder = folder
        self.hardware = hardware or Hardware()
        self.console = folder / "console.log"
        self.disk = folder / "disk-0.qcow2"
        self.boot_seconds: list[float] = []
        self._ports = {port: find_free_port() for port in (SSH_PORT, *self.hardware.serves)}
        self._qemu: subprocess.Popen[bytes] | None = None
        make_overlay(self.disk, disk or image.disk, "raw")

    @property
    def running(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    def port(self, board_port: int) -> int:
        """The port on the host's loopback that leads to this port of the board."""
        return self._ports[board_port]

    def boot(self, *, record_writes: Path | None = None, within_seconds: float = BOOT_SECONDS) -> None:
        """Switch it on and return when ssh answers; ``boot_seconds`` gets how long that took.

        Raises:
            BoardError: QEMU ended, or the time was up; with the end of its output and of the console.
        """
        began = time.monotonic()
        self.switch_on(record_writes=record_writes)
        self._wait_for_ssh(began + within_seconds)
        self.boot_seconds.append(time.monotonic() - began)

    def switch_on(self, *, record_writes: Path | None = None) -> None:
        """Give it power, and wait for nothing.

        ``record_writes`` is a new file that gets every write of this boot, in the format :mod:`tests.device.writes`
        reads. What the disk held before lies then in :attr:`disk_before_record`, which stays as it is.
        """
        assert not self.running
        if record_writes is not None:
            self._freeze_disk()
            record_writes.touch()
        with (self.folder / "qemu.log").open("wb") as output:
            self._qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self._command(record_writes)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def expect_running(self, seconds: float = TRY_SECONDS) -> None:
        """Return after ``seconds``, in which it stayed on.

        Raises:
            BoardError: QEMU ended; with its output.
        """
        assert self._qemu is not None
        try:
            status = self._qemu.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        output = (self.folder / "qemu.log").read_text(errors="replace")
        raise BoardError(f"QEMU exited with {status}:\n{output[-2000:]}\n{self.last_console_lines()}")

    def run(self, command: str, *, timeout_seconds: float = 120.0, stdin: str = "") -> str:
        """What a shell command of root's printed.

        Raises:
            BoardError: it exited with another status than 0, or the connection broke; with its output.
            subprocess.TimeoutExpired: it took longer.
        """
        done = self.attempt(command, timeout_seconds=timeout_seconds, stdin=stdin)
        if done.returncode != 0:
            raise BoardError(f"{command!r} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def attempt(
        self, command: str, *, timeout_seconds: float = 120.0, stdin: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Like :meth:`run`, for commands that may fail. Status 255 is ssh's own: the connection broke."""
        return subprocess.run(
            [*SSH, "board", command],
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def follow(self, command: str) -> int:
        """The exit status of a command that may take hours and prints to this process's own output."""
        return subprocess.run(
            [*SSH, "board", command], cwd=self.folder, stdin=subprocess.DEVNULL, check=False
        ).returncode

    def push(self, source: Path, target: str, *, timeout_seconds: float = 600.0) -> None:
        """Copy a file or a directory to the board. A share is faster for much."""
        self._copy(str(source), f"board:{target}", timeout_seconds)

    def pull(self, source: str, target: Path, *, timeout_seconds: float = 600.0) -> None:
        """Copy a file or a directory from the board."""
        self._copy(f"board:{source}", str(target), timeout_seconds)

    def mount(self, tag: str) -> str:
        """Mount one of the hardware's shares, read-only; the directory it is at."""
        where = f"/mnt/{tag}"
        self.run(f"mkdir -p {where} && mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288 {tag} {where}")
        return where

    def cut_power(self) -> None:
        """End it as a power cut does: what it had not flushed may be lost. Nothing happens where it is off."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        self._forget()

    def shut_down(self, *, within_seconds: float = 300.0) -> None:
        """Ask systemd for an orderly power-off and wait for it.

        Raises:
            subprocess.TimeoutExpired: it is still on.
        """
        assert self._qemu is not None
        self.attempt("systemctl poweroff")
        self._qemu.wait(within_seconds)
        self._forget()

    def discard(self) -> None:
        """Switch it off and remove its disks; the logs stay."""
        self.cut_power()
        for disk in self.folder.glob("disk-*.qcow2"):
            disk.unlink()

    @property
    def disk_before_record(self) -> Path:
        """The disk (qcow2) as it was when the last recorded boot began."""
        return self._disk_number(self._disk_count() - 2)

    def last_console_lines(self, count: int = 40) -> str:
        """The end of what it printed."""
        if not self.console.exists():
            return ""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-count:])

    # --- the disk -----------------------------------------------------------------------------------

    def _disk_number(self, number: int) -> Path:
        return self.folder / f"disk-{number}.qcow2"

    def _disk_count(self) -> int:
        return len(list(self.folder.glob("disk-*.qcow2")))

    def _freeze_disk(self) -> None:
        frozen, self.disk = self.disk, self._disk_number(self._disk_count())
        make_overlay(self.disk, frozen, "qcow2")

    # --- QEMU -------------------------------------------------------------------------------------------

    def _command(self, record_writes: Path | None) -> list[str]:
        hardware = self.hardware
        drives = [part for n, path in enumerate(hardware.drives) for part in _drive_arguments(n, path)]
        shares = [part for tag, path in hardware.shares.items() for part in _share_arguments(tag, path)]
        return [
            *_machine_arguments(self.image.architecture),
            *("-accel", "tcg,thread=multi", "-smp", str(hardware.cpus), "-m", str(hardware.memory_mb)),
            *("-nodefaults", "-display", "none", "-no-reboot", "-device", "virtio-rng-pci"),
            *("-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"),
            *("-kernel", str(self.image.directory / "vmlinuz"), "-initrd", str(self.image.directory / "initrd")),
            *("-append", f"root=/dev/vda console={CONSOLES[self.image.architecture]} panic=-1 mitigations=off"),
            *("-netdev", self._network(), "-device", "virtio-net-pci,netdev=network,romfile="),
            *_disk_arguments(self.disk, record_writes),
            *drives,
            *shares,
        ]

    def _network(self) -> str:
        parts = ["user,id=network,restrict=on"]
        parts += [f"hostfwd=tcp:127.0.0.1:{host}-:{board}" for board, host in self._ports.items()]
        for board_port, host_port in self.hardware.reaches.items():
            command = shlex.join([sys.executable, "-I", "-S", relay.__file__, str(host_port)])
            parts.append(f"guestfwd=tcp:{HOST}:{board_port}-cmd:{command.replace(',', ',,')}")
        return ",".join(parts)

    def _forget(self) -> None:
        self._qemu = None
        (self.folder / SSH_SOCKET).unlink(missing_ok=True)

    # --- ssh ----------------------------------------------------------------------------------------------

    def _wait_for_ssh(self, deadline: float) -> None:
        while not self._connect():
            self.expect_running()
            if time.monotonic() > deadline:
                raise BoardError(f"ssh did not answer in time; the console ends with\n{self.last_console_lines()}")

    def _connect(self) -> bool:
        """One connection that all commands share: a handshake takes seconds on an emulated processor.

        The process that holds it ends when the board does.
        """
        if not self._answers():
            return False
        options = ("-M", "-N", "-f", "-i", str(self.image.key), "-p", str(self.port(SSH_PORT)))
        master = subprocess.run(
            [*SSH, *options, "root@127.0.0.1"],
            cwd=self.folder,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return master.returncode == 0

    def _answers(self) -> bool:
        """Whether the board's own server greets: QEMU accepts connections from the start."""
        try:
            with socket.create_connection(("127.0.0.1", self.port(SSH_PORT)), GREETING_SECONDS) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _copy(self, source: str, target: str, timeout_seconds: float) -> None:
        command = ["scp", "-q", "-r", *SSH[1:], source, target]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        if done.returncode != 0:
            raise BoardError(f"cannot copy {source} to {target}: {done.stderr.strip()}")


def make_overlay(overlay: Path, base: Path, base_format: Literal["raw", "qcow2"]) -> None:
    """A qcow2 file that takes the writes and leaves ``base`` as it is."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base.resolve()), "-F", base_format, str(overlay)]
    subprocess.run(command, check=True)


def flatten(disk: Path, target: Path) -> None:
    """A qcow2 file and all below it as one raw, sparse image."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(target)], check=True)


def check_file_system(disk: Path) -> int:
    """The status of a check of a raw image that replays its journal: 0 sound, 1 mended by that."""
    return subprocess.run(["/sbin/e2fsck", "-f", "-p", str(disk)], capture_output=True, check=False).returncode


def read_file(disk: Path, path: str) -> bytes:
    """What a raw image's file holds; nothing where there is no such file. For an image whose journal was replayed."""
    return subprocess.run(["/sbin/debugfs", "-R", f"cat {path}", str(disk)], capture_output=True, check=True).stdout


def _machine_arguments(architecture: Architecture) -> list[str]:
    match architecture:
        case "amd64":
            return ["qemu-system-x86_64", "-M", "q35", "-cpu", "max"]
        case "arm64":
            return ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a76"]
        case _:
            assert_never(architecture)


def _disk_arguments(disk: Path, record_writes: Path | None) -> list[str]:
    """The guest's flushes reach the host's disk (QEMU's default): what is not flushed, a power cut may take."""
    node: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}}
    if record_writes is not None:
        log = {"driver": "file", "filename": str(record_writes)}
        node = {"driver": "blklogwrites", "file": node, "log": log, "log-super-update-interval": 1}
    return _block_device("root", node)


def _block_device(name: str, node: dict[str, object]) -> list[str]:
    block = json.dumps({"node-name": name, **node})
    return ["-blockdev", block, "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _drive_arguments(number: int, path: Path) -> list[str]:
    return _block_device(f"drive{number}", {"driver": "raw", "file": {"driver": "file", "filename": str(path)}})


def _share_arguments(tag: str, path: Path) -> list[str]:
    return ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,readonly=on"]
