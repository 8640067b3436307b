"""The probe as a process: who is told what, what it needs and what it does without, and what it leaves behind."""

import ctypes
import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edged.probe import bpf, loading
from edged.probe.sample import Sample, Step, Watched
from edged.probe.sampler import COMPILING
from tests.probe_process import PATIENCE_SECONDS, ProbeClient, ProbeProcess
from tests.probe_subject import ROOT, Subject

needs_ebpf = pytest.mark.skipif(bool(loading.obstacle()), reason=loading.obstacle() or "eBPF can be used")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root changes users and mounts")
OBJECTS = {"prog_id": 13, "map_id": 14}
"""BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID."""
NOBODY = 65534
ME = Watched(name="test", pid=os.getpid())

Start = Callable[..., ProbeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(*options, before=())``: a probe of the test's own."""
    started: list[ProbeProcess] = []

    def start(*options: str, before: Sequence[str] = ()) -> ProbeProcess:
        folder = tmp_path / f"probe-{len(started)}"
        folder.mkdir()
        folder.chmod(0o777)
        for above in (tmp_path, *tmp_path.parents[:2]):  # which pytest makes for its own user alone
            above.chmod(0o755)
        probe = ProbeProcess(folder, *options, before=before)
        started.append(probe)
        return probe

    yield start
    for probe in started:
        probe.close()


@pytest.fixture
def connect() -> Iterator[Callable[[ProbeProcess], ProbeClient]]:
    clients: list[ProbeClient] = []

    def connect(probe: ProbeProcess) -> ProbeClient:
        clients.append(ProbeClient(probe.socket))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


Connect = Callable[[ProbeProcess], ProbeClient]


def is_at_the_top(sample: Sample) -> bool:
    return sample.step is Step.EBPF


# --- who is told what ------------------------------------------------------------------------------


def test_a_client_is_told_each_second_of_what_it_watches_and_of_nothing_else(start: Start, connect: Connect) -> None:
    probe = start("--highest", "counters")
    probe.wait_ready()
    mine, other = connect(probe), connect(probe)
    parent = Watched(name="parent", pid=os.getppid())
    mine.watch(ME)
    other.watch(parent)
    first, second = mine.sample(), mine.sample()
    assert [each.name for each in (*first.processes, *second.processes)] == ["test", "test"]
    assert second.seconds == pytest.approx(1.0, abs=0.5)
    assert second.processes[0].resident_bytes is not None
    assert [each.name for each in other.sample().processes] == ["parent"]
    mine.watch(parent)
    assert mine.sample_until(lambda sample: sample.processes[0].name == "parent").processes[0].pid == os.getppid()


def test_who_is_gone_is_left_out_and_others_are_not(start: Start, connect: Connect) -> None:
    probe = start("--highest", "counters")
    probe.wait_ready()
    client, subject = connect(probe), Subject()
    client.watch(ME, Watched(name="subject", pid=subject.pid))
    client.sample_until(lambda sample: len(sample.processes) == 2)
    subject.end()
    client.sample_until(lambda sample: [each.name for each in sample.processes] == ["test"])


def test_the_sockets_mode_keeps_others_out_and_it_goes_when_the_probe_ends(start: Start, connect: Connect) -> None:
    probe = start("--highest", "procfs")
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    client.sample()
    assert probe.socket.stat().st_mode & 0o777 == 0o660
    assert probe.stop() == 0
    assert not probe.socket.exists()


def test_a_second_probe_is_refused_and_what_a_killed_one_left_is_not_in_the_way(start: Start) -> None:
    first = start("--highest", "procfs")
    first.wait_ready()
    same_socket = ("--highest", "procfs", "--socket", str(first.socket))
    refused = start(*same_socket)
    assert refused.process.wait(PATIENCE_SECONDS) == 1
    assert "another probe serves" in refused.log.read_text()
    first.kill()
    assert first.socket.exists()
    start(*same_socket).wait_ready()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x03\0\0\0abc"])
def test_a_client_that_talks_nonsense_is_dropped_and_the_others_are_served(
    start: Start, connect: Connect, garbage: bytes
) -> None:
    probe = start("--highest", "procfs")
    probe.wait_ready()
    good, bad = connect(probe), connect(probe)
    good.watch(ME)
    bad.send(garbage)
    with pytest.raises(EOFError):
        bad.sample()
    assert good.sample().processes[0].name == "test"


@needs_root
def test_another_users_processes_are_not_told_of(start: Start) -> None:
    probe = start("--highest", "counters")
    probe.wait_ready()
    os.chown(probe.socket, 0, NOBODY)
    command = [sys.executable, "-m", "tests.probe_process", str(probe.socket), str(NOBODY), str(os.getpid())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    assert done.stdout.split() == ["mine"]


# --- the ladder ------------------------------------------------------------------------------------


@needs_root
def test_without_any_right_there_is_a_sample_and_it_says_which_right_is_missing(start: Start, connect: Connect) -> None:
    probe = start(before=["setpriv", "--bounding-set=-all", "--inh-caps=-all"])
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    sample = client.sample()
    assert sample.step is not Step.EBPF
    assert "CAP_BPF and CAP_PERFMON" in sample.reason
    assert sample.processes[0].resident_bytes is not None


@needs_root
@needs_ebpf
@pytest.mark.parametrize(
    ("hidden", "reason"),
    [("/usr/lib/python3/dist-packages/bcc", "bcc is not installed"), ("/lib/modules", "no headers of this kernel")],
)
def test_without_bcc_or_headers_there_is_a_sample_and_it_says_what_is_missing(
    start: Start, connect: Connect, hidden: str, reason: str
) -> None:
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        pytest.skip("this kernel brings its headers itself")
    probe = start(before=hide(hidden))
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    sample = client.sample()
    assert sample.step is Step.COUNTERS
    assert reason in sample.reason


@needs_root
@needs_ebpf
def test_without_btf_it_measures_by_headers_that_fit_and_notices_those_that_do_not(
    start: Start, connect: Connect
) -> None:
    probe = start(before=hide("/sys/kernel/btf"))
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    sample = client.sample_until(lambda sample: sample.reason != COMPILING)
    assert is_at_the_top(sample) or "headers are of another kernel" in sample.reason


@needs_root
@needs_ebpf
def test_two_capabilities_are_enough_for_the_top(start: Start, connect: Connect) -> None:
    """Of a user who is not root. Reading files of root's comes beside them where root alone may read this program."""
    rights = "+bpf,+perfmon" if other_users_may_read(Path(sys.executable)) else "+bpf,+perfmon,+dac_read_search"
    sets = [f"--{name}=-all,{rights}" for name in ("inh-caps", "ambient-caps", "bounding-set")]
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    probe = start(before=["setpriv", *user, *sets])
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    sample = client.sample_until(lambda sample: sample.reason != COMPILING)
    assert (sample.step, sample.reason) == (Step.EBPF, "")


@needs_root
@needs_ebpf
def test_it_goes_up_by_itself_once_the_obstacle_is_gone(start: Start, connect: Connect) -> None:
    bcc = "/usr/lib/python3/dist-packages/bcc"
    probe = start(before=hide(bcc))
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    assert client.sample().step is Step.COUNTERS
    subprocess.run(["nsenter", "--mount", f"--target={probe.pid}", "umount", bcc], check=True)
    sample = client.sample_until(is_at_the_top)
    assert sample.reason == ""
    assert sample.cost.kernel_seconds is not None


def hide(folder: str) -> list[str]:
    """A command begins so that sees nothing in a folder."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh"]


def other_users_may_read(file: Path) -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (*file.parents, *file.resolve().parents))


# --- what it leaves behind -------------------------------------------------------------------------


def kernel_objects(probe: ProbeProcess) -> set[tuple[int, int]]:
    """The programs and maps that the probe and the process that compiles for it hold: the kind, and the number."""
    found = set()
    children = Path(f"/proc/{probe.pid}/task/{probe.pid}/children").read_text(encoding="ascii").split()
    for pid in (probe.pid, *children):
        for file in Path(f"/proc/{pid}/fdinfo").glob("*"):
            try:
                words = file.read_text(encoding="ascii").split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # closed since the folder was read
            found |= {
                (kind, int(words[words.index(f"{name}:") + 1])) for name, kind in OBJECTS.items() if f"{name}:" in words
            }
    return found


def exists(kind: int, number: int) -> bool:
    try:
        os.close(bpf.call(kind, ctypes.create_string_buffer(number.to_bytes(4, sys.byteorder), 12)))
    except OSError as error:
        assert error.errno == errno.ENOENT
        return False
    return True


def wait_gone(objects: set[tuple[int, int]]) -> None:
    """The kernel frees them when nobody can be using them any more, and tells nobody."""
    until = time.monotonic() + PATIENCE_SECONDS
    while any(exists(*each) for each in objects):
        assert time.monotonic() < until, "programs or maps are left"
        os.sched_yield()


@needs_ebpf
def test_killed_at_any_time_it_leaves_no_program_and_no_map(start: Start, connect: Connect) -> None:
    most = 0
    for _ in range(4):
        probe = start()
        probe.wait_ready()
        client = connect(probe)
        client.watch(ME)
        for _ in range(random.randrange(4)):
            client.sample()
        held = kernel_objects(probe)
        most = max(most, len(held))
        probe.kill()
        wait_gone(held)
    probe = start()
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    client.sample_until(is_at_the_top)
    held = kernel_objects(probe)
    assert len(held) > 10
    assert all(exists(*each) for each in held)
    probe.kill()
    wait_gone(held)


@needs_ebpf
def test_a_thousand_processes_leave_the_probe_as_it_was(start: Start, connect: Connect) -> None:
    probe = start()
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME)
    client.sample_until(is_at_the_top)
    come_and_go(client, 200)
    descriptors, memory = held_by(probe.pid)
    come_and_go(client, 1000)
    after, memory_after = held_by(probe.pid)
    assert after == descriptors
    assert memory_after - memory < 1 << 20


def come_and_go(client: ProbeClient, count: int) -> None:
    for _ in range(count // 20):
        children = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(20)]
        client.watch(*(Watched(name="short", pid=child) for child in children))
        for child in children:
            os.waitpid(child, 0)
    client.watch(ME)
    client.sample_until(lambda sample: [each.name for each in sample.processes] == ["test"])


def held_by(pid: int) -> tuple[int, int]:
    """Descriptors, and bytes of memory that are its own."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii").split()
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status[status.index("RssAnon:") + 1]) * 1024


@needs_ebpf
def test_it_costs_less_than_a_hundredth_of_a_core(start: Start, connect: Connect) -> None:
    probe = start()
    probe.wait_ready()
    client = connect(probe)
    client.watch(ME, Watched(name="parent", pid=os.getppid()))
    client.sample_until(is_at_the_top)
    costs = [client.sample().cost for _ in range(9)]
    assert sorted(cost.cpu_seconds for cost in costs)[4] < 0.01
    assert costs[-1].resident_bytes < 80 << 20
