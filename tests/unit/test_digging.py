"""Whether a process may be traced, and what is said where not; py-spy and memray that are missing."""

import os
import sys
from pathlib import Path

import pytest

from edged.errors import InspectionUnavailableError
from edged.probe import digging
from edged.probe.digging import find_py_spy, why_untraceable


class Processes:
    """A made-up /proc with one process that may not be traced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "10").mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(root / "10", 1000, 1000)

    def yama(self, scope: int) -> None:
        file = self.root / "sys/kernel/yama/ptrace_scope"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{scope}\n")


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (refuse if path.name == "mem" else real)(path, *a, **k))
    return Processes(tmp_path)


def become(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)


def test_a_process_that_may_be_traced_has_no_obstacle() -> None:
    assert why_untraceable(os.getpid()) is None


def test_a_process_that_has_ended_is_said_to_have(tmp_path: Path) -> None:
    assert why_untraceable(10, tmp_path) == "process 10 has ended"


def test_another_users_process_needs_that_user_or_root(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = (processes.root / "10").stat().st_uid
    become(monkeypatch, owner + 1)
    assert f"it belongs to user {owner}" in (why_untraceable(10, processes.root) or "")


@pytest.mark.parametrize(
    ("scope", "root", "said"),
    [
        (0, False, "user namespace of its own"),
        (1, False, "user namespace of its own"),
        (2, False, "ptrace_scope = 2); run this as root"),
        (3, False, "to nobody"),
        (3, True, "to nobody"),
        (0, True, "CAP_SYS_PTRACE"),
    ],
)
def test_what_forbids_it_is_named_with_what_helps(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, scope: int, root: bool, said: str
) -> None:
    become(monkeypatch, 0 if root else (processes.root / "10").stat().st_uid)
    processes.yama(scope)
    assert said in (why_untraceable(10, processes.root) or "")


def test_missing_tools_are_named_together_with_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(digging, "_has_memray", lambda: False)
    with pytest.raises(InspectionUnavailableError, match="py-spy and memray cannot be found") as caught:
        find_py_spy()
    assert "pip install 'edged[profiling]'" in caught.value.hint
