"""A process to be measured, which does on demand what a test then looks for. Run as a script it is that process.

It reads a line of JSON, a name and arguments, does it, and says how: ``{"result": …}``.
"""

import ctypes
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = mmap.PAGESIZE


class Subject:
    """The process as a test sees it. Each of :class:`Deeds` is a call."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.probe_subject"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.do("nothing")

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, deed: str, *arguments: Any) -> Any:
        """Return when it is done."""
        self.begin(deed, *arguments)
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())["result"]

    def begin(self, deed: str, *arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([deed, *arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class Deeds:
    """What it can do; amounts are of the thread's own CPU time, pages, bytes."""

    def nothing(self) -> None:
        """Only answer."""

    def compute(self, core: int, seconds: float) -> None:
        os.sched_setaffinity(0, {core})
        spend(seconds)

    def compute_in_threads(self, count: int, seconds: float) -> float:
        """What that took in all: to begin and end a thread costs too, on an emulated board not little."""
        before = time.process_time()
        threads = [threading.Thread(target=spend, args=(seconds,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.process_time() - before

    def sleep(self, seconds: float) -> None:
        select.select([], [], [], seconds)

    def alternate(self, times: int, seconds: float) -> None:
        """Compute and sleep a little, as somebody who waits for messages."""
        for _ in range(times):
            spend(seconds)
            select.select([], [], [], seconds)

    def move(self, cores: list[int], times: int) -> None:
        for index in range(times):
            os.sched_setaffinity(0, {cores[index % len(cores)]})

    def fail_to_move(self, times: int) -> None:
        for _ in range(times):
            try:
                os.sched_setaffinity(0, {len(os.sched_getaffinity(0)) + 4000})
            except OSError:
                continue

    def touch(self, pages: int) -> None:
        memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            memory[page * PAGE] = 1
        memory.close()

    def read_mapped(self, file: str, pages: int) -> None:
        """Each page on its own, from the disk."""
        with Path(file).open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
                memory.madvise(mmap.MADV_RANDOM)
                for page in range(pages):
                    memory[page * PAGE]

    def read_around_the_cache(self, file: str) -> None:
        piece = mmap.mmap(-1, 1 << 20)
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        while os.readv(descriptor, [piece]):
            pass
        os.close(descriptor)

    def write(self, file: str, count: int) -> None:
        with Path(file).open("wb") as opened:
            opened.write(os.urandom(count))
            opened.flush()
            os.fsync(opened.fileno())

    def write_around_the_cache(self, file: str, count: int) -> None:
        piece = mmap.mmap(-1, 1 << 20)
        piece.write(b"x" * (1 << 20))
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        for _ in range(count >> 20):
            os.write(descriptor, piece)
        os.close(descriptor)

    def compute_for_ever(self, core: int) -> None:
        os.sched_setaffinity(0, {core})
        answer(None)
        while True:
            spend(1.0)


def spend(seconds: float) -> None:
    """So much CPU time of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def answer(result: Any) -> None:
    sys.stdout.write(json.dumps({"result": result}) + "\n")
    sys.stdout.flush()


def main() -> None:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: no test leaves it behind
    deeds = Deeds()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer(getattr(deeds, name)(*arguments))


if __name__ == "__main__":
    main()
