"""``edged-probe.service``: a user with two capabilities measures by eBPF what the daemon's workers use."""

from collections.abc import Iterator

import pytest

from tests.device.board import Board
from tests.device.installed import conditions, health, wait_until, wait_until_ready

pytestmark = pytest.mark.timeout(5400)

SEEN = 'edged status --json | grep -Eq \'"step": *"{step}"\''


@pytest.fixture
def board(installed_board: Board) -> Iterator[Board]:
    """The installed board, ready and measured by the probe."""
    wait_until_ready(installed_board)
    installed_board.run("systemctl start edged-probe")
    wait_until(installed_board, SEEN.format(step="ebpf"))
    yield installed_board
    installed_board.run("systemctl stop edged-probe")


def test_it_measures_by_ebpf_and_the_daemon_by_itself_when_it_ends(board: Board) -> None:
    said = health(board)
    assert said["probe"]["linked"]
    assert said["probe"]["step"] == "ebpf"
    assert {"probe_absent", "probe_reduced"}.isdisjoint(held["code"] for held in said["conditions"])
    board.run("systemctl stop edged-probe")
    wait_until(board, "! " + SEEN.format(step="ebpf"))
    assert "probe_absent" in conditions(board)


def test_who_moved_a_worker_is_named(board: Board) -> None:
    pid = health(board)["chat"]["pid"]
    board.run(f"taskset -apc 0 {pid}")
    wait_until(board, "edged status --json | grep -q 'changed by taskset'")


def test_it_is_confined_to_two_capabilities(board: Board) -> None:
    pid = board.run("systemctl show --property MainPID --value edged-probe").strip()
    sets = dict(line.split(":") for line in board.run(f"grep ^Cap /proc/{pid}/status").splitlines())
    both = 1 << 38 | 1 << 39  # CAP_PERFMON and CAP_BPF
    assert int(sets["CapEff"], 16) == int(sets["CapBnd"], 16) == both
    assert board.run(f"stat -c %U /proc/{pid}").strip() == "edged-probe"
