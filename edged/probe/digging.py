"""Looking into a running worker with py-spy and memray, and putting what they say beside its profile.

Used by the command line, on the machine of the daemon. py-spy reads the worker's stacks from outside and so needs the
right to trace it; memray runs inside the worker, started by a message of the daemon.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from edged.errors import InspectionUnavailableError, RequestError
from edged.probe import pages
from edged.probe.profile import Profile
from edged.probe.stacks import Slice, innermost, parse_folded, render_folded, total
from edged.probe.timeline import Point, Timeline, timeline

if TYPE_CHECKING:
    from memray import AllocationRecord

SLICE_SECONDS: Final = 5
SAMPLES_A_SECOND: Final = 25
"""The worker stands still while a stack is read, on a small board for longer than 10 ms with native frames."""
PROC: Final = Path("/proc")
TOP: Final = 10

FLAMES: Final = "flames.html"
FOLDED: Final = "stacks.folded"
CAPTURE: Final = "allocations.memray"
MEMORY: Final = "memory.html"
STATISTICS: Final = "memory.json"
TIMELINE: Final = "timeline.json"
PAGE: Final = "timeline.html"


class Kept(msgspec.Struct, frozen=True):
    """What one place in Python's code, or one function of the libraries below it, allocated and had not freed at the
    end."""

    place: str
    bytes: int
    allocations: int


class Dug(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and the names of the files in ``folder``. ``native``: whether stacks reach into llama.cpp."""

    folder: str
    files: tuple[str, ...]
    samples: int
    native: bool
    innermost: list[tuple[str, float]]
    kept: list[Kept]
    notes: tuple[str, ...]


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The slices; ``note`` says why there are none, or not all."""

    slices: tuple[Slice, ...] = ()
    native: bool = False
    note: str = ""


def find_py_spy() -> Path:
    """The program, of this installation before others. Raises :class:`InspectionUnavailableError`: it or memray is
    missing."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    missing = [name for name, there in (("py-spy", found), ("memray", _has_memray())) if not there]
    if missing or found is None:
        raise InspectionUnavailableError(f"{' and '.join(missing)} cannot be found")
    return Path(found)


def _has_memray() -> bool:
    return importlib.util.find_spec("memray") is not None


class Digging:
    """One look into a worker: told what the daemon says in its order, it writes its findings to ``folder``.

    Use as a context manager: leaving ends what still runs.
    """

    def __init__(self, folder: Path, py_spy: Path, *, role: str, seconds: int) -> None:
        self._folder = folder
        self._py_spy = py_spy
        self._role = role
        self._seconds = seconds
        self._profiles: list[Profile] = []
        self._pid = 0
        self._begin = self._end = 0.0
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="py-spy")
        self._sampling: Future[Sampled] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._pool.shutdown()

    def started(self, pid: int) -> None:
        """The worker's process, whose allocations are recorded from now on. Raises :class:`RequestError`: no folder."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot make {self._folder}: {error.strerror}", hint="choose another --out") from error
        self._pid, self._begin = pid, time.time()
        sampler = StackSampler(self._py_spy, pid, self._ending)
        self._sampling = self._pool.submit(sampler.sample, self._seconds)

    def profile(self, each: Profile) -> None:
        """The profile of the next second."""
        self._profiles.append(each)

    def finished(self, allocations: Path) -> None:
        """All is recorded; ``allocations`` is there until the daemon's stream is closed.

        Raises :class:`InspectionUnavailableError`: it cannot be read.
        """
        self._end = time.time()
        try:
            shutil.copyfile(allocations, self._folder / CAPTURE)
        except OSError as error:
            raise InspectionUnavailableError(
                f"what memray recorded cannot be read: {error}",
                hint="run this on the daemon's machine, as its user or as root",
            ) from error

    def write(self) -> Dug:
        """Make the reports and pages of what is there. Raises :class:`InspectionUnavailableError`."""
        assert self._sampling is not None
        sampled = self._sampling.result()
        capture = self._folder / CAPTURE
        report_memory(capture, self._folder)
        axis = timeline(
            role=self._role,
            pid=self._pid,
            begin=self._begin,
            end=self._end,
            profiles=self._profiles,
            heap=read_heap(capture),
            slices=sampled.slices,
            notes=[sampled.note] if sampled.note else [],
        )
        stacks = total(sampled.slices)
        return Dug(
            folder=str(self._folder),
            files=tuple(self._write_pages(axis, sampled)),
            samples=sum(stacks.values()),
            native=sampled.native,
            innermost=innermost(stacks, TOP),
            kept=read_kept(capture)[:TOP],
            notes=axis.notes,
        )

    def _write_pages(self, axis: Timeline, sampled: Sampled) -> Iterator[str]:
        shown = {"what memory stays, and who took it": MEMORY, "in numbers": STATISTICS, "this timeline": TIMELINE}
        pages_of: dict[str, str | bytes] = {TIMELINE: msgspec.json.format(msgspec.json.encode(axis))}
        if sampled.slices:
            title = f"Where the time of the {axis.role} worker goes, process {axis.pid}"
            shown = {"flame graph": FLAMES, "the same as text": FOLDED, **shown}
            pages_of[FLAMES] = pages.flames_page(sampled.slices, axis.begin, title)
            pages_of[FOLDED] = render_folded(total(sampled.slices))
        pages_of[PAGE] = pages.timeline_page(axis, shown)
        for name, content in pages_of.items():
            (self._folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        yield PAGE
        yield from shown.values()
        yield CAPTURE


# --- py-spy ------------------------------------------------------------------------------------------


class StackSampler:
    """Runs py-spy for one slice of time after the other, until ``ending`` is set."""

    def __init__(self, py_spy: Path, pid: int, ending: threading.Event) -> None:
        self._py_spy = py_spy
        self._pid = pid
        self._ending = ending

    def sample(self, seconds: float) -> Sampled:
        """Blocks for that long. With native frames where py-spy can read them."""
        refusal = why_untraceable(self._pid)
        if refusal is not None:
            return Sampled(note=f"no stacks: {refusal}")
        end = time.monotonic() + seconds
        slices: list[Slice] = []
        native = True
        while not self._ending.is_set() and (left := end - time.monotonic()) >= 1:
            begin = time.time()
            taken = self._take(min(SLICE_SECONDS, int(left)), native=native)
            if isinstance(taken, dict):
                slices.append(Slice(begin, time.time(), taken))
            elif native and not slices:
                native = False
            else:
                return Sampled(slices=tuple(slices), native=native, note=f"py-spy ended: {taken}")
        return Sampled(slices=tuple(slices), native=native)

    def _take(self, seconds: int, *, native: bool) -> dict[tuple[str, ...], int] | str:
        """The stacks of that many seconds from now on, or why there are none."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stacks"
            sampled = ["--pid", str(self._pid), "--duration", str(seconds), "--rate", str(SAMPLES_A_SECOND)]
            written = ["--format", "raw", "--output", str(file)]
            ended = subprocess.run(
                [self._py_spy, "record", *sampled, *written, *(["--native"] if native else [])],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if ended.returncode:
                return next(iter(ended.stderr.splitlines()), f"exit status {ended.returncode}")
            return parse_folded(file.read_text(encoding="utf-8", errors="replace"))


def why_untraceable(pid: int, proc: Path = PROC) -> str | None:
    """Why this process may not trace that one, and what to do; None when it may.

    Opening a process's memory asks the kernel for the same right as ptrace does (proc(5)).
    """
    try:
        (proc / str(pid) / "mem").open("rb").close()
    except FileNotFoundError:
        return f"process {pid} has ended"
    except PermissionError:
        return f"process {pid} may not be traced: {_forbidden_by(pid, proc)}"
    return None


def _forbidden_by(pid: int, proc: Path) -> str:
    owner = (proc / str(pid)).stat().st_uid
    if os.geteuid() not in (0, owner):
        return f"it belongs to user {owner}; run this as that user or as root"
    scope = _yama_scope(proc)
    if scope == 3:
        return "the kernel allows it to nobody (kernel.yama.ptrace_scope = 3) until the next boot"
    if os.geteuid() == 0:
        return "root has no CAP_SYS_PTRACE here; a container needs --cap-add=SYS_PTRACE"
    if scope == 2:
        return "the kernel allows it to root alone (kernel.yama.ptrace_scope = 2); run this as root"
    return "it runs in a user namespace of its own (PrivateUsers= of the service), or has more rights; run this as root"


def _yama_scope(proc: Path) -> int:
    try:
        return int((proc / "sys/kernel/yama/ptrace_scope").read_text())
    except FileNotFoundError:
        return 0


# --- memray ------------------------------------------------------------------------------------------


def read_heap(capture: Path) -> list[Point]:
    """What was allocated since memray began and not freed: moments since 1970, and bytes."""
    import memray  # noqa: PLC0415 - an optional part of the installation

    with contextlib.closing(memray.FileReader(capture)) as reader:
        return [(each.time / 1e3, float(each.heap)) for each in reader.get_memory_snapshots()]


def read_kept(capture: Path) -> list[Kept]:
    """Who allocated what was not freed at the end, the largest first."""
    import memray  # noqa: PLC0415

    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with contextlib.closing(memray.FileReader(capture)) as reader:
        for record in reader.get_leaked_allocation_records(merge_threads=True):
            place = _place(record)
            sizes[place] += record.size
            counts[place] += record.n_allocations
    return [Kept(place, size, counts[place]) for place, size in sizes.most_common()]


def _place(record: "AllocationRecord") -> str:
    """The innermost line of Python: below it are the interpreter's and the libraries' own functions."""
    for function, file, line in record.stack_trace(max_stacks=1):
        return f"{function} ({file}:{line})"
    return "outside of Python"


def report_memory(capture: Path, folder: Path) -> None:
    """memray's own reports: what stayed, for any part of the time, and statistics."""
    flames = ["flamegraph", "--temporal", "--leaks", "--no-web", "--output", str(folder / MEMORY)]
    numbers = ["stats", "--json", "--output", str(folder / STATISTICS)]
    for arguments in (flames, numbers):
        ended = subprocess.run(
            [sys.executable, "-m", "memray", *arguments, "--force", str(capture)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise InspectionUnavailableError(
                f"memray made no report: {ended.stderr.strip() or ended.stdout.strip()}", hint=f"{capture} is kept"
            )
