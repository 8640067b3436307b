"""The emulated board itself: without what is seen here, no other test on it means anything."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device.board import HOST, Board, Hardware, check_file_system, flatten, read_file
from tests.device.conftest import MakeBoard
from tests.device.writes import read_record, replay

pytestmark = pytest.mark.timeout(1800)

OUTSIDE_PORT = 1883
INSIDE_PORT = 8080


@pytest.fixture(scope="module")
def greeter() -> Iterator[int]:
    """A server on the host's loopback that says hello to each connection and echoes one line; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_greet, args=(listening,), daemon=True).start()
        yield listening.getsockname()[1]


def _greet(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"hello " + connection.makefile("rb").readline())


@pytest.fixture(scope="module")
def one_board(make_board: MakeBoard, greeter: int, tmp_path_factory: pytest.TempPathFactory) -> Board:
    share = tmp_path_factory.mktemp("share")
    (share / "from-host").write_text("shared\n")
    return make_board(Hardware(serves=(INSIDE_PORT,), reaches={OUTSIDE_PORT: greeter}, shares={"host": share}))


@pytest.fixture
def board(one_board: Board) -> Board:
    """The board, switched on whatever the test before left."""
    if not one_board.running:
        one_board.boot()
    return one_board


def test_systemd_is_process_one_and_no_unit_has_failed(board: Board) -> None:
    assert board.run("cat /proc/1/comm").strip() == "systemd"
    assert board.run("systemctl is-system-running --wait").strip() == "running"


def test_cgroup_v2_offers_every_controller_that_edged_uses(board: Board) -> None:
    controllers = board.run("cat /sys/fs/cgroup/cgroup.controllers").split()
    assert {"cpuset", "cpu", "memory", "pids", "io"} <= set(controllers)


def test_the_processor_has_the_instructions_that_the_wheel_is_compiled_for(board: Board) -> None:
    features = set(board.run("grep -m 1 -E '^(flags|Features)' /proc/cpuinfo").split())
    wanted = {"amd64": {"avx2", "fma", "f16c", "bmi2"}, "arm64": {"asimddp", "fphp", "asimdhp"}}
    assert wanted[board.image.architecture] <= features


def test_the_kernel_has_the_types_and_headers_that_the_probe_needs(board: Board) -> None:
    board.run(
        "test -s /sys/kernel/btf/vmlinux && test -d /lib/modules/$(uname -r)/build/include && python3 -c 'import bcc'"
    )


def test_there_is_no_swap_and_no_network_but_what_the_test_gave(board: Board) -> None:
    assert len(board.run("cat /proc/swaps").splitlines()) == 1
    unreachable = board.attempt("timeout 5 python3 -c 'import socket; socket.create_connection((\"10.0.2.2\", 22))'")
    assert unreachable.returncode != 0


def test_the_board_reaches_a_server_of_the_host_again_and_again(board: Board) -> None:
    client = (
        f"import socket; c = socket.create_connection(('{HOST}', {OUTSIDE_PORT})); "
        "c.sendall(b'board\\n'); print(c.makefile().read(), end='')"
    )
    for _ in range(3):
        assert board.run(f'python3 -c "{client}"') == "hello board\n"


def test_the_host_reaches_a_server_of_the_board(board: Board) -> None:
    server = f"import socket; s = socket.create_server(('', {INSIDE_PORT})); s.accept()[0].sendall(b'inside')"
    board.run(f'systemd-run --collect --unit inside python3 -c "{server}"')
    board.run(f"until ss -Hltn 'sport = {INSIDE_PORT}' | grep -q .; do :; done")
    with socket.create_connection(("127.0.0.1", board.port(INSIDE_PORT)), 30) as connection:
        assert connection.recv(100) == b"inside"


def test_files_go_to_the_board_and_back(board: Board, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(bytes(range(256)) * 1000)
    board.push(tmp_path / "sent", "/root/sent")
    board.pull("/root/sent", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
    assert board.run(f"cat {board.mount('host')}/from-host") == "shared\n"


def test_a_power_cut_keeps_what_was_flushed_and_the_board_boots_again(board: Board) -> None:
    boot = board.run("cat /proc/sys/kernel/random/boot_id")
    board.run("echo kept > /root/kept && sync /root/kept")
    board.cut_power()
    assert not board.running
    board.boot()
    assert board.run("cat /root/kept") == "kept\n"
    assert board.run("cat /proc/sys/kernel/random/boot_id") != boot


def test_a_record_of_writes_replays_to_disks_that_boot_with_all_that_was_flushed(
    one_board: Board, make_board: MakeBoard, record: Path
) -> None:
    """The file system is sound at every cut, and a file is there from its flush on."""
    board = one_board
    board.cut_power()
    board.boot(record_writes=record)
    before_file = len(read_record(record))
    board.run("echo recorded > /root/recorded && sync /root/recorded && sync /root")
    after_file = len(read_record(record))
    board.cut_power()
    assert before_file < after_file
    before, after = record.parent / "before.raw", record.parent / "after.raw"
    flatten(board.disk_before_record, before)
    for cut, content in ((before_file // 2, ""), (before_file, ""), (after_file, "recorded\n")):
        replay(record, before, after, cut=cut, seed=cut)
        assert check_file_system(after) in {0, 1}
        assert read_file(after, "/root/recorded").decode() == content
    replayed = make_board(disk=after)
    replayed.boot()
    assert replayed.run("cat /root/recorded") == "recorded\n"
