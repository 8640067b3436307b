"""Others are kept off cores by systemd, which may refuse; what is so already is left alone."""

import os
from pathlib import Path

import pytest

from edged.errors import ConfinementError
from edged.hardware import reserve
from edged.hardware.cores import format_list, read_online
from edged.hardware.placement import Machine, Wishes, place
from edged.runtime.health import Health
from edged.serving import keeper
from edged.serving.keeper import Keeper
from tests.sysfs import write

OWN = "/edged.slice/edged.service/daemon"
SYSTEMCTL = """#!/bin/sh
[ "$1" = show ] && exec cat {allowed}/"$4"
echo "$@" >> {log}
[ -e {refuse} ] && echo 'Access denied' >&2 && exit 1
exit 0
"""


class Systemd:
    """A ``systemctl`` that notes what it is told, and knows which cores somebody ``allowed`` to whom."""

    def __init__(self, folder: Path) -> None:
        self.allowed = folder / "allowed"
        write(self.allowed, dict.fromkeys(reserve.OTHERS, "\n"))
        self.log, self.refusing = folder / "log", folder / "refuse"
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "systemctl"
        program.write_text(SYSTEMCTL.format(log=self.log, refuse=self.refusing, allowed=self.allowed))
        program.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    systemd = Systemd(tmp_path)
    monkeypatch.setenv("PATH", f"{systemd.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(reserve, "RECORD", tmp_path / "reserved")
    monkeypatch.setattr(keeper, "group_of", lambda _pid: OWN)
    return systemd


def orders(cores: str) -> list[str]:
    return [f"set-property --runtime {unit} AllowedCPUs={cores}" for unit in ("system.slice", "user.slice")]


# By name first: a property merely taken back may leave the kernel with what it was told.
ALL_CORES = orders(format_list(read_online())) + orders("")


def test_services_and_logins_are_left_the_other_cores_and_given_all_back(systemd: Systemd) -> None:
    reserve.reserve([3, 0, 1])
    reserve.free()
    assert systemd.asked == orders("0-1,3") + ALL_CORES


def test_what_somebody_else_restricted_is_not_given_back(systemd: Systemd) -> None:
    reserve.free()
    assert systemd.asked == []
    reserve.reserve([0])
    reserve.free()
    reserve.free()
    assert systemd.asked == orders("0") + ALL_CORES


def test_who_was_kept_to_fewer_cores_before_stays_so(systemd: Systemd) -> None:
    write(systemd.allowed, {"user.slice": "1-2 4\n"})
    reserve.reserve([0, 1, 2])
    write(systemd.allowed, {"user.slice": "1-2\n"})
    reserve.reserve([0, 1])  # what we did ourselves is not taken for somebody's wish
    reserve.free()
    assert [order.rpartition(" ")[2] for order in systemd.asked if "user.slice" in order] == [
        "AllowedCPUs=1-2",
        "AllowedCPUs=1",
        "AllowedCPUs=1-2,4",
    ]


@pytest.mark.parametrize("group", ["/user.slice/user-0.slice/session-1.scope", "/system.slice/edged.service"])
def test_an_edged_that_would_lose_the_cores_itself_reserves_none(
    systemd: Systemd, four_cores: Machine, group: str
) -> None:
    with pytest.raises(ConfinementError, match="edged is itself in"):
        keeper.reserve_cores(four_cores, place(four_cores, Wishes(reserve_cores=True)), group)
    assert systemd.asked == []


def test_by_hand_it_counts_where_the_service_is_and_not_the_shell(systemd: Systemd) -> None:
    write(systemd.allowed, {reserve.SERVICE: "edged.slice"})
    assert reserve.group_of_service() == "/edged.slice/edged.service"


def test_a_refusal_is_told_in_systemds_words(systemd: Systemd) -> None:
    systemd.refusing.touch()
    with pytest.raises(ConfinementError, match=r"refuses .*system\.slice AllowedCPUs=0: Access denied"):
        reserve.reserve([0])


def test_without_systemd_nothing_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(reserve, "RECORD", tmp_path / "reserved")
    with pytest.raises(ConfinementError, match="cannot be asked"):
        reserve.reserve([0])


def test_without_root_nothing_is_reserved(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "RECORD", Path("/proc/reserved"))  # where nobody can make a file
    with pytest.raises(ConfinementError, match="only root"):
        reserve.reserve([0])
    assert systemd.asked == []


def test_cores_are_reserved_when_neither_services_nor_logins_may_use_them(tmp_path: Path) -> None:
    assert not reserve.is_reserved({2, 3}, tmp_path)
    write(tmp_path, {"system.slice/cpuset.cpus.effective": "0-1"})
    assert not reserve.is_reserved({2, 3}, tmp_path)
    write(tmp_path, {"user.slice/cpuset.cpus.effective": "0-1"})
    assert reserve.is_reserved({2, 3}, tmp_path)
    assert not reserve.is_reserved({1, 2}, tmp_path)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(keeper, "read_online", lambda: frozenset(range(4)))
    monkeypatch.setattr(reserve, "is_reserved", lambda _cores: False)
    return Machine.of(4)


def test_the_chat_workers_cores_are_reserved(systemd: Systemd, four_cores: Machine) -> None:
    assert keeper.reserve_cores(four_cores, place(four_cores, Wishes(reserve_cores=True)), OWN)
    assert systemd.asked == orders("3")


def test_cores_that_are_reserved_already_are_left_so(
    systemd: Systemd, four_cores: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve, "is_reserved", lambda _cores: True)
    assert not keeper.reserve_cores(four_cores, place(four_cores, Wishes(reserve_cores=True)), OWN)
    assert systemd.asked == []


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (2, 2)])
def test_too_few_cores_are_not_reserved(systemd: Systemd, cores: int, threads: int) -> None:
    machine = Machine.of(cores)
    with pytest.raises(ConfinementError, match="too few cores"):
        keeper.reserve_cores(machine, place(machine, Wishes(reserve_cores=True, chat_threads=threads)), OWN)
    assert systemd.asked == []


async def test_a_daemon_that_may_not_reserve_says_so_and_one_that_may_gives_back(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there must be a core to leave to others")
    wishes = Wishes(reserve_cores=True, chat_threads=1)
    machine = Machine(cores=tuple(core for core in Machine.of(cores[-1] + 1).cores if core.number in cores))
    systemd.refusing.touch()
    for refused in (True, False):
        health = Health()
        one = Keeper(machine, wishes, health, None)
        await one.begin()
        assert [held.code for held in health.conditions()] == (["cores_not_reserved"] if refused else [])
        await one.end()
        systemd.refusing.unlink(missing_ok=True)
    assert systemd.asked[-2:] == orders("")
    assert sorted(os.sched_getaffinity(0)) == cores
