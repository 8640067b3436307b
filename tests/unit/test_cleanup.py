"""What a killed daemon leaves behind goes, and nothing else does."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.cleanup import CONTROL_GROUP, Removed, clean_up
from edged.config import Config
from edged.runtime.home import hold_home

SETTINGS = '{"kind":"chat"}'
WAIT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(home=tmp_path / "home")
    config.run_dir.mkdir(parents=True)
    return config


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[bytes]], *arguments: str) -> subprocess.Popen[bytes]:
    """A process with these last arguments, which runs until it is ended."""
    command = [sys.executable, "-c", WAIT, *arguments]
    processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    stdout = processes[-1].stdout
    assert stdout is not None
    stdout.readline()
    return processes[-1]


def leave_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def test_sockets_and_workers_of_a_dead_daemon_go_and_the_second_time_there_are_none(
    config: Config, processes: list[subprocess.Popen[bytes]]
) -> None:
    leave_socket(config.run_dir / "worker-chat.sock")
    leave_socket(config.profile_socket)
    worker = start(processes, str(config.run_dir / "worker-chat.sock"), SETTINGS)
    assert clean_up(config) == Removed(sockets=("worker-chat.sock", "profile.sock"), workers=(worker.pid,))
    assert worker.wait(10) == -9
    assert clean_up(config) == Removed()
    assert [path.name for path in config.run_dir.iterdir()] == ["lock"]


def test_processes_that_are_no_workers_of_this_home_live_on(
    config: Config, processes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    start(processes, str(tmp_path / "other/run/worker-chat.sock"), SETTINGS)
    start(processes, str(config.run_dir / "worker-chat.sock"))
    start(processes, str(config.run_dir / "lock"), SETTINGS)
    assert clean_up(config) == Removed()
    assert [process.poll() for process in processes] == [None] * 3


def test_nothing_is_touched_while_a_daemon_runs(config: Config, processes: list[subprocess.Popen[bytes]]) -> None:
    leave_socket(config.run_dir / "worker-chat.sock")
    worker = start(processes, str(config.run_dir / "worker-chat.sock"), SETTINGS)
    with hold_home(config):
        assert clean_up(config) == Removed(held=True)
    assert worker.poll() is None
    assert (config.run_dir / "worker-chat.sock").exists()


def test_groups_below_the_unit_go_where_systemd_runs_this_beside_it(config: Config, tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    unit = groups / "edged.slice/edged.service"
    (proc / "self").mkdir(parents=True)
    (unit / CONTROL_GROUP).mkdir(parents=True)
    (unit / "worker-chat/inner").mkdir(parents=True)
    (proc / "self/cgroup").write_text(f"0::/edged.slice/edged.service/{CONTROL_GROUP}\n")
    assert clean_up(config, proc=proc, cgroup_root=groups).groups == ("worker-chat/inner", "worker-chat")
    assert [path.name for path in unit.iterdir()] == [CONTROL_GROUP]


def test_no_group_is_touched_in_a_terminal(config: Config, tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "user.slice/empty").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/user.slice\n")
    assert clean_up(config, proc=proc, cgroup_root=groups).groups == ()
    assert (groups / "user.slice/empty").exists()
