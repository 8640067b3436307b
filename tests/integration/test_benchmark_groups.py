"""Control groups of benchmarks, on a kernel that has them, by root."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import groups
import pytest
from groups import Limits

DETECT = "from edged.hardware import detect; print(detect.machine().quota_cores)"
NAME = f"edged-test-{os.getpid()}"


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    """Where a group of this name lies while it is there; skips where none can be made."""
    try:
        version = groups.version()
        with groups.made(NAME, Limits(quota_cores=0.5)):
            found = [folder for folder in (groups.ROOT / NAME, *groups.ROOT.glob(f"*/{NAME}")) if folder.is_dir()]
    except (OSError, SystemExit) as error:
        pytest.skip(f"no control group can be made here: {error}")
    assert len(found) == 1, version
    yield found
    assert not any(folder.exists() for folder in found)


def test_what_is_started_in_a_group_finds_its_quota_from_the_start(folders: list[Path]) -> None:
    with groups.made(NAME, Limits(quota_cores=0.7)) as group:
        found = subprocess.run([*group.launcher, sys.executable, "-c", DETECT], capture_output=True, check=True)
    assert float(found.stdout) == 0.7


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no core to move to")
def test_a_process_that_runs_is_moved_off_a_core_that_it_asked_for(folders: list[Path]) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    with groups.made(NAME, Limits(cores=(second,))) as group, subprocess.Popen(["sleep", "60"]) as process:
        try:
            os.sched_setaffinity(process.pid, {first})
            group.adopt(process.pid)
            assert os.sched_getaffinity(process.pid) == {second}
        finally:
            process.kill()
            process.wait()


def test_all_in_a_group_and_below_it_are_stopped_and_go_on(folders: list[Path]) -> None:
    with groups.made(NAME, Limits(quota_cores=1.0)) as group, subprocess.Popen(["sleep", "60"]) as process:
        try:
            below = folders[0] / "daemon"
            below.mkdir()
            (below / "cgroup.procs").write_text(str(process.pid))
            group.signal(signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            group.signal(signal.SIGCONT)
            assert os.WIFCONTINUED(os.waitpid(process.pid, os.WCONTINUED)[1])
        finally:
            process.kill()
            process.wait()


def test_a_group_goes_with_the_groups_that_were_made_in_it(folders: list[Path]) -> None:
    with groups.made(NAME, Limits(quota_cores=1.0)):
        (folders[0] / "daemon").mkdir()
