"""``edged-probe.service``: a user with two capabilities measures by eBPF what the daemon's workers use."""

import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.device.board import Board
from tests.device.installed import conditions, health, wait_until, wait_until_ready

pytestmark = pytest.mark.timeout(5400)

ROOT = Path(__file__).parent.parent.parent
ATTRIBUTION = "tests/integration/test_probe_attribution.py"
ATTRIBUTION_PARTS = ("tests/__init__.py", "tests/probe_subject.py", "tests/integration/__init__.py", ATTRIBUTION)
RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
"""pytest and what it needs: Python alone, so that it runs on any board."""
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


@pytest.fixture
def attribution(tmp_path: Path) -> Path:
    """A folder with the tests of what the probe says of known processes, and with what runs them."""
    folder = tmp_path / "attribution"
    for part in ATTRIBUTION_PARTS:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / part, folder / part)
    for file in (file for name in RUNNER for file in distribution(name).files or ()):
        if ".." not in file.parts and file.suffix != ".pyc":
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file.locate(), folder / file)
    return folder


@pytest.mark.takes(amd64=5, arm64=10)
def test_what_a_known_process_does_is_measured_within_five_percent(installed_board: Board, attribution: Path) -> None:
    wait_until_ready(installed_board)
    installed_board.run("systemctl stop edged")
    installed_board.push(attribution, "/var/tmp/attribution")
    command = (
        "cd /var/tmp/attribution && PYTHONPATH=. /opt/edged/current/bin/python -m pytest -c /dev/null --noconftest"
        f" -p no:cacheprovider --basetemp=/var/tmp/files -rs --tb=short {ATTRIBUTION}"
    )
    try:
        said = installed_board.run(command, timeout_seconds=1200)
    finally:
        installed_board.run("rm -r /var/tmp/attribution; systemctl start edged")
    assert "skipped" not in said.splitlines()[-1], said
