"""What the probe says of a process is what that process did: on the real kernel, with its real programs.

Each subject does a known amount of something; what was measured may be off by 5 %.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.probe import counters
from edged.probe.bpf import Map
from edged.probe.follower import Follower
from edged.probe.histogram import quantile
from edged.probe.kernel import Counted, KernelProbe
from edged.probe.layout import THREADS
from edged.probe.loading import Loading, Programs, obstacle
from edged.probe.procfs import thread_numbers
from edged.probe.sample import AffinityChange, Source, Watched
from tests.probe_subject import PAGE, Subject

needs_ebpf = pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "eBPF can be used")
CORES = sorted(os.sched_getaffinity(0))
TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")


def about(amount: float) -> object:
    return pytest.approx(amount, rel=0.05)


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    loading = Loading()
    try:
        programs = loading.wait()
    finally:
        loading.close()
    yield programs
    programs.close()


@pytest.fixture(scope="module")
def probe(programs: Programs) -> Iterator[KernelProbe]:
    probe = KernelProbe(programs)
    yield probe
    probe.watch([])


@pytest.fixture
def subject() -> Iterator[Subject]:
    subject = Subject()
    yield subject
    subject.end()


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A file to be; its file system has a block device."""
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip("temporary files are not on a disk")
    return tmp_path / "file"


def counted(probe: KernelProbe, subject: Subject) -> Counted:
    return probe.read().processes[subject.pid]


# --- CPU time --------------------------------------------------------------------------------------


@needs_ebpf
@TWO_CORES
def test_cpu_time_counts_for_the_core_on_which_it_was_used(probe: KernelProbe, subject: Subject) -> None:
    first, second = CORES[:2]
    probe.watch([subject.pid])
    subject.do("compute", first, 0.5)
    subject.do("compute", second, 0.25)
    found = counted(probe, subject)
    assert found.cpu_seconds[first] == about(0.5), found
    assert found.cpu_seconds[second] == about(0.25), found
    assert sum(found.cpu_seconds.values()) == about(0.75), found


@needs_ebpf
def test_threads_that_begin_and_end_later_count_for_their_process(probe: KernelProbe, subject: Subject) -> None:
    probe.watch([subject.pid])
    spent = subject.do("compute_in_threads", 8, 0.1)
    found = counted(probe, subject)
    assert spent >= 0.8
    assert sum(found.cpu_seconds.values()) == about(spent), found


@needs_ebpf
def test_who_computes_without_a_pause_counts_up_to_the_moment_of_the_reading(
    probe: KernelProbe, subject: Subject
) -> None:
    subject.do("compute_for_ever", CORES[0])
    probe.watch([subject.pid])
    began, until = time.monotonic(), time.monotonic() + 0.5
    while time.monotonic() < until:
        time.sleep(0)  # not on the subject's core if it can be helped
    found = counted(probe, subject)
    passed = time.monotonic() - began
    off_cpu = found.off_cpu_seconds
    assert found.cpu_seconds[CORES[0]] + off_cpu["preempted"] + off_cpu["stolen"] == about(passed)


@needs_ebpf
def test_all_time_of_a_thread_is_on_a_core_or_off_it_for_a_reason(probe: KernelProbe, subject: Subject) -> None:
    probe.watch([subject.pid])
    began = time.monotonic()
    subject.do("compute", CORES[0], 0.2)
    subject.do("sleep", 0.4)
    found = counted(probe, subject)
    passed = time.monotonic() - began
    assert sum(found.cpu_seconds.values()) + sum(found.off_cpu_seconds.values()) == about(passed)
    assert found.off_cpu_seconds["sleeping"] >= 0.4


# --- waiting for a core ----------------------------------------------------------------------------


def take_turns(subject: Subject) -> None:
    """Before all ordinary processes, so that nobody counts but those whom the test brings."""
    try:
        os.sched_setscheduler(subject.pid, os.SCHED_RR, os.sched_param(10))
    except PermissionError:
        pytest.skip("this system gives nobody a real-time priority")


def waits(probe: KernelProbe, subject: Subject) -> Counted:
    probe.watch([subject.pid])
    counted(probe, subject)
    subject.do("alternate", 20, 0.002)
    return counted(probe, subject)


@needs_ebpf
def test_a_busy_neighbour_on_its_core_shows_in_the_run_queue_of_a_process(probe: KernelProbe, subject: Subject) -> None:
    subject.do("compute", CORES[0], 0.01)
    take_turns(subject)
    alone = waits(probe, subject)
    neighbour = Subject()
    try:
        take_turns(neighbour)
        neighbour.do("compute_for_ever", CORES[0])
        beside = waits(probe, subject)
    finally:
        neighbour.end()
    assert sum(alone.run_queue) >= 20
    assert beside.off_cpu_seconds["preempted"] > alone.off_cpu_seconds["preempted"] + 0.2
    delay, before = quantile(beside.run_queue, 0.99), quantile(alone.run_queue, 0.99)
    assert delay is not None
    assert before is not None
    assert delay > 10 * before


@needs_ebpf
@TWO_CORES
def test_every_move_to_another_core_counts(probe: KernelProbe, subject: Subject) -> None:
    subject.do("compute", CORES[0], 0.01)
    probe.watch([subject.pid])
    subject.do("move", [CORES[1], CORES[0]], 200)
    assert counted(probe, subject).migrations == about(200)


# --- affinity --------------------------------------------------------------------------------------


@needs_ebpf
def test_every_change_of_affinity_is_told_with_who_made_it(probe: KernelProbe, subject: Subject) -> None:
    probe.watch([subject.pid])
    for _ in range(17):
        os.sched_setaffinity(subject.pid, set(CORES))
    subject.do("move", [CORES[0]], 5)
    name = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
    ours = AffinityChange(caller_pid=os.getpid(), caller_name=name, thread=subject.pid)
    found = counted(probe, subject).affinity_changes
    assert found.count(ours) == 17
    assert [change.caller_pid for change in found if change != ours] == [subject.pid] * 5


@needs_ebpf
def test_an_attempt_that_fails_changes_nothing_and_does_not_count(probe: KernelProbe, subject: Subject) -> None:
    probe.watch([subject.pid])
    subject.do("fail_to_move", 5)
    assert counted(probe, subject).affinity_changes == ()


@needs_ebpf
def test_a_change_is_not_told_of_the_process_that_is_watched_next(probe: KernelProbe, subject: Subject) -> None:
    probe.watch([subject.pid])
    os.sched_setaffinity(subject.pid, set(CORES))
    probe.watch([os.getpid()])
    assert probe.read().processes[os.getpid()].affinity_changes == ()


# --- the disk --------------------------------------------------------------------------------------


@needs_ebpf
@pytest.mark.parametrize("deed", ["write", "write_around_the_cache"])
def test_bytes_written_to_the_disk_count(probe: KernelProbe, subject: Subject, on_disk: Path, deed: str) -> None:
    probe.watch([subject.pid])
    subject.do(deed, str(on_disk), 8 << 20)
    found = counted(probe, subject)
    assert found.written_bytes == about(8 << 20)
    assert sum(found.io_delay) >= 1


@needs_ebpf
def test_bytes_read_from_the_disk_count_with_the_time_each_request_took(
    probe: KernelProbe, subject: Subject, on_disk: Path
) -> None:
    subject.do("write", str(on_disk), 8 << 20)
    probe.watch([subject.pid])
    subject.do("read_around_the_cache", str(on_disk))
    found = counted(probe, subject)
    assert found.read_bytes == about(8 << 20)
    assert sum(found.io_delay) >= 1


@needs_ebpf
def test_bytes_count_once_beside_a_neighbour_who_fills_the_disks_queue(
    probe: KernelProbe, subject: Subject, on_disk: Path
) -> None:
    subject.do("write", str(on_disk), 8 << 20)
    probe.watch([subject.pid])
    neighbour = Subject()
    try:
        neighbour.begin("write_around_the_cache", str(on_disk.with_name("other")), 256 << 20)
        for _ in range(10):
            subject.do("read_around_the_cache", str(on_disk))
    finally:
        neighbour.end()
    assert counted(probe, subject).read_bytes == about(80 << 20)


# --- without our programs --------------------------------------------------------------------------


def follow(subject: Subject) -> Follower:
    return Follower(Watched(name="subject", pid=subject.pid))


def test_page_faults_count_those_that_wait_for_the_disk_on_their_own(subject: Subject, on_disk: Path) -> None:
    subject.do("write", str(on_disk), 500 * PAGE)
    follower = follow(subject)
    subject.do("touch", 4000)
    touched = follower.measure(with_threads=False)
    subject.do("read_mapped", str(on_disk), 500)
    mapped = follower.measure(with_threads=False)
    assert touched is not None
    assert mapped is not None
    assert touched["minor_faults"].value == about(4000)
    assert mapped["major_faults"].value == about(500)


def test_bytes_are_told_by_the_kernels_own_account_too(subject: Subject, on_disk: Path) -> None:
    follower = follow(subject)
    subject.do("write", str(on_disk), 8 << 20)
    fields = follower.measure(with_threads=False)
    if fields is None or "written_bytes" not in fields:
        pytest.skip("this kernel keeps no account of what processes read and write")
    assert fields["written_bytes"].value == about(8 << 20)
    assert fields["written_bytes"].source is Source.PROCFS


def test_cpu_time_is_estimated_where_nobody_counts_it(subject: Subject) -> None:
    subject.do("compute", CORES[0], 0.01)
    follower = follow(subject)
    follower.measure(with_threads=True)
    subject.do("compute", CORES[0], 1.0)
    fields = follower.measure(with_threads=True)
    assert fields is not None
    assert fields["cpu_seconds"].value[CORES[0]] == about(1.0)
    assert fields["cpu_seconds"].confidence < 1.0


@TWO_CORES
@pytest.mark.skipif("migrations" not in counters.available(), reason="perf events of the kernel cannot be counted")
def test_the_systems_own_counters_count_threads_that_are_made_later(subject: Subject) -> None:
    subject.do("compute", CORES[0], 0.01)
    counting = counters.Counters(subject.pid, {"migrations": True})
    subject.do("move", [CORES[1], CORES[0]], 200)
    found = counting.read()["migrations"]
    counting.close()
    assert found.value == about(200)
    assert found.share == 1.0


# --- nothing is left -------------------------------------------------------------------------------


def entries(kernel_map: Map) -> int:
    return len(kernel_map.items(THREADS)[0]) // 4


@needs_ebpf
def test_a_thousand_processes_that_come_and_go_leave_no_entry(probe: KernelProbe, programs: Programs) -> None:
    for _ in range(50):
        children = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(20)]
        probe.watch(children)
        for child in children:
            os.waitpid(child, 0)
        probe.read()
    probe.watch([os.getpid()])
    probe.read()
    assert entries(programs.maps["watched"]) == 1
    assert entries(programs.maps["threads"]) == len(thread_numbers(os.getpid()))
    probe.watch([])
    assert entries(programs.maps["watched"]) == 0
    assert entries(programs.maps["threads"]) == 0
