"""What benchmarks/quota.py decides: who is measured, for how long, and what its figures come to."""

from pathlib import Path

import groups
import pytest
import quota
from groups import Limits
from quota import AUTOMATIC, RESERVING, THEIRS, Measured, Steadiness
from servers import Reply, in_turn

from edged.hardware.placement import Machine


def reply(tokens: int, *arrivals: float) -> Reply:
    return Reply(
        asked=0.0,
        ended=arrivals[-1] if arrivals else 0.0,
        pieces=tuple((moment, "x") for moment in arrivals),
        finish_reason="length",
        prompt_tokens=5,
        completion_tokens=tokens,
        cached_tokens=0,
    )


def measured(case: str, contender: str, number: int, rate: float, *, beside: bool = False) -> Measured:
    return Measured(
        case=case, contender=contender, round=number, beside=beside, tokens_per_second=rate, threads=1, settled=True
    )


def test_the_time_to_the_first_token_is_no_part_of_the_decode_rate() -> None:
    assert quota.decode_rate(reply(11, 5.0, 5.5, 6.0)) == 10.0


def test_a_stream_that_ends_at_once_has_no_rate() -> None:
    with pytest.raises(SystemExit, match="after 1 tokens"):
        quota.decode_rate(reply(1, 5.0))


@pytest.mark.parametrize(("rate", "tokens"), [(1.6, 16), (100.0, 150), (10_000.0, 512)])
def test_a_stream_lasts_as_long_as_wanted_but_no_slow_server_takes_minutes(rate: float, tokens: int) -> None:
    assert quota.tokens_for(rate, 1.5) == tokens


def test_a_number_is_steady_once_it_has_been_the_same_for_a_while() -> None:
    seen = Steadiness().observe(2, 0.0).observe(1, 3.0)
    assert not seen.observe(1, 6.0).holds(5.0, 6.0)
    assert seen.observe(1, 8.0).holds(5.0, 8.0)
    assert not Steadiness().holds(0.0, 100.0)


def test_under_a_quota_each_number_of_threads_is_tried_by_hand_and_as_many_as_cores_is_the_naive_one() -> None:
    contenders = quota.quota_contenders(70, 3)
    assert [each.threads for each in contenders] == [0, 1, 2, 3, 0]
    assert [each.name for each in contenders if "naive" in each.name] == ["edged, 3 threads by hand, naive"]
    assert {each.limits for each in contenders} == {Limits(quota_cores=0.7)}
    assert [each.is_edged for each in contenders] == [True, True, True, True, False]


def test_beside_reserved_cores_llama_server_is_measured_as_it_is_and_held_to_the_same_cores() -> None:
    contenders = {each.name: each for each in quota.neighbour_contenders("reserve_cores", Machine.of(2))}
    assert contenders[RESERVING].reserve
    assert contenders[quota.THEIRS_BY_HAND].limits.cores == (0,)
    assert contenders[THEIRS].limits.cores is None
    assert {each.limits.weight for each in contenders.values()} == {quota.HEAVY_WEIGHT}


def test_with_nothing_done_about_the_neighbour_all_weigh_the_same() -> None:
    assert {each.limits for each in quota.neighbour_contenders("nothing", Machine.of(2))} == {Limits()}


def test_the_plan_is_compared_with_the_best_number_of_threads_round_by_round() -> None:
    one, two = quota.manual(1, 2), quota.manual(2, 2)
    slow, fast = [(AUTOMATIC, 49.0), (one, 50.0), (two, 30.0)], [(AUTOMATIC, 98.0), (one, 100.0), (two, 60.0)]
    found = [measured("35 %", name, number, rate) for number, both in enumerate((slow, fast)) for name, rate in both]
    assert quota.best_by_hand(found, "35 %", 2) == one
    own = quota.rates(found, "35 %", AUTOMATIC, beside=False)
    assert quota.ratio(own, quota.rates(found, "35 %", one, beside=False)) == pytest.approx(0.98)


def test_reserved_cores_are_judged_by_the_quiet_rate_on_them_and_on_all() -> None:
    found = [
        measured("weights", AUTOMATIC, 0, 100.0),
        measured("weights", AUTOMATIC, 0, 70.0, beside=True),
        measured("reserve_cores", AUTOMATIC, 0, 100.0),
        measured("reserve_cores", RESERVING, 0, 75.0),
        measured("reserve_cores", RESERVING, 0, 74.0, beside=True),
    ]
    goals = list(quota.neighbour_goals(found))
    assert [(goal.holds, goal.found) for goal in goals] == [(True, "0.700"), (True, "0.987"), (False, "0.740")]


def test_who_goes_first_changes_from_round_to_round() -> None:
    assert ["".join(in_turn("abc", number)) for number in range(6)] == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert ["".join(in_turn("ab", number)) for number in range(4)] == ["ab", "ba", "ba", "ab"]


# --- groups ----------------------------------------------------------------------------------------


def test_limits_are_told_in_the_terms_of_either_cgroup() -> None:
    limits = Limits(quota_cores=0.35, weight=10_000, cores=(0, 1, 3))
    assert groups.files(limits, 2) == {"cpu.max": "35000 100000", "cpu.weight": "10000", "cpuset.cpus": "0-1,3"}
    assert groups.files(limits, 1) == {
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "35000",
        "cpu.shares": "102400",
        "cpuset.cpus": "0-1,3",
    }


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_not_limited_is_not_written(version: groups.Version) -> None:
    assert groups.files(Limits(), version) == {}


def test_cgroup_v1_is_used_where_v2_has_no_cpu_controller(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no cgroup controller"):
        groups.version(tmp_path)
    (tmp_path / "cpu,cpuacct").mkdir()
    assert groups.version(tmp_path) == 1
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert groups.version(tmp_path) == 2


def test_a_program_of_the_system_lives_among_the_services_where_systemd_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    assert groups.services(tmp_path) == ""
    (tmp_path / "system.slice").mkdir()
    assert groups.services(tmp_path) == "system.slice/"


def test_controllers_are_enabled_above_a_group_before_it_is_limited(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpuset memory pids\n")
    (tmp_path / "slice").mkdir()
    (tmp_path / "slice" / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
    (tmp_path / "slice" / "cgroup.subtree_control").write_text("memory\n")
    groups.Group("slice/g", Limits(cores=(1,)), tmp_path).make()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "slice" / "cgroup.subtree_control").read_text() == "+cpuset"
    assert (tmp_path / "slice" / "g" / "cpuset.cpus").read_text() == "1"
