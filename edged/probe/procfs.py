"""The lowest step of the ladder, which needs nothing: what proc(5) tells of processes and of the whole system."""

import os
from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


class ProcessNow(msgspec.Struct, frozen=True):
    """``/proc/<pid>/stat`` now: ``began`` (ticks since the boot) tells two processes of the same number apart."""

    began: int
    threads: int
    cpu_ticks: int
    minor_faults: int
    major_faults: int


class Memory(msgspec.Struct, frozen=True):
    """In RAM: pages of files, and all others; shared memory counts with those, because no file holds it."""

    file_bytes: int
    anonymous_bytes: int


class Transferred(msgspec.Struct, frozen=True):
    """Bytes that a process caused to be read from and written to block devices so far."""

    read_bytes: int
    written_bytes: int


class ThreadNow(msgspec.Struct, frozen=True):
    """A thread: what it does (``R``, ``S``, ``D``, …), on which core it runs or ran last; how long it has computed and
    waited for a core so far, and how many times it was given one."""

    number: int
    state: str
    core: int
    cpu_nanoseconds: int = 0
    delay_nanoseconds: int = 0
    turns: int = 0


# --- processes -------------------------------------------------------------------------------------


def process_now(pid: int, proc: Path = PROC) -> ProcessNow | None:
    """None when it is gone."""
    fields = _stat_fields(proc / str(pid) / "stat")
    if not fields or fields[0] in "ZX":
        return None
    return ProcessNow(
        began=int(fields[22 - 3]),
        threads=int(fields[20 - 3]),
        cpu_ticks=int(fields[14 - 3]) + int(fields[15 - 3]),
        minor_faults=int(fields[10 - 3]),
        major_faults=int(fields[12 - 3]),
    )


def owner_of(pid: int, proc: Path = PROC) -> int | None:
    """The real user id of a process; None when it is gone."""
    value = keyed(proc / str(pid) / "status").get("Uid", "")
    return int(value.split()[0]) if value else None


def memory_of(pid: int, proc: Path = PROC) -> Memory | None:
    """None when it is gone."""
    values = keyed(proc / str(pid) / "status")
    if "RssFile" not in values:
        return None
    kilobytes = {name: int(values[name].split()[0]) for name in ("RssFile", "RssAnon", "RssShmem")}
    return Memory(kilobytes["RssFile"] * 1024, (kilobytes["RssAnon"] + kilobytes["RssShmem"]) * 1024)


def transferred_by(pid: int, proc: Path = PROC) -> Transferred | None:
    """Also what the kernel will write for it later. None when it is gone, or is not ours to look into."""
    values = keyed(proc / str(pid) / "io")
    if "read_bytes" not in values:
        return None
    return Transferred(int(values["read_bytes"]), int(values["write_bytes"]))


def thread_numbers(pid: int, proc: Path = PROC) -> list[int]:
    """Empty when it is gone."""
    try:
        return [int(folder.name) for folder in (proc / str(pid) / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def threads_now(pid: int, proc: Path = PROC) -> list[ThreadNow]:
    """All threads of a process, but for those that have just ended. Times are 0 where the kernel does not keep them."""
    found = []
    for number in thread_numbers(pid, proc):
        folder = proc / str(pid) / "task" / str(number)
        if fields := _stat_fields(folder / "stat"):
            times = [int(each) for each in read_file(folder / "schedstat").split()] or [0, 0, 0]
            found.append(ThreadNow(number, fields[0], int(fields[39 - 3]), *times))
    return found


def nanoseconds_of(thread: int, proc: Path = PROC) -> int | None:
    """How long it has computed, up to the last tick. None when it is gone, or where the kernel keeps no account."""
    text = read_file(proc / str(thread) / "schedstat")
    return int(text.split()[0]) if text else None


# --- the system ------------------------------------------------------------------------------------


def busy_seconds(proc: Path = PROC) -> dict[int, float]:
    """How long each core has computed since the boot, for whomever, without what a hypervisor took for others."""
    found = {}
    for line in read_file(proc / "stat").splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _, _, interrupts, soft_interrupts = (int(each) for each in ticks[:7])
            found[int(name[3:])] = (user + nice + system + interrupts + soft_interrupts) / TICKS_PER_SECOND
    return found


def memory_of_system(proc: Path = PROC) -> tuple[int, int]:
    """Bytes that could be had without swapping, and all there are."""
    values = keyed(proc / "meminfo")
    return int(values["MemAvailable"].split()[0]) * 1024, int(values["MemTotal"].split()[0]) * 1024


# --- files -----------------------------------------------------------------------------------------


def _stat_fields(file: Path) -> list[str]:
    """From field 3, the state, on: the name before it may hold anything. Empty when the process is gone."""
    text = read_file(file)
    return text[text.rindex(")") + 2 :].split() if text else []


def keyed(file: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in read_file(file).splitlines())
    return {name: value.strip() for name, _, value in lines}


def read_file(file: Path) -> str:
    """Empty when the process is gone or hides it from us, and where the kernel does not keep it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
