"""What the lower steps of the ladder read, from trees of files as the kernel makes them, and what follows from it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.probe import energy, estimate, groups, loading, procfs
from edged.probe.btf import Types
from edged.probe.follower import best
from edged.probe.groups import Periods
from edged.probe.kernel import computed
from edged.probe.procfs import TICKS_PER_SECOND, Memory, ProcessNow, ThreadNow, Transferred
from edged.probe.sample import HISTOGRAM_BUCKETS, Measured, Source, Step
from edged.probe.sampler import Sampler

STAT = (
    "{pid} (a) name (x) {state} 1 1 1 0 -1 4194304 120 0 7 0 250 50 0 0 20 0 5 0 {began} 1000000 2500 "
    "18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 {core} 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return root


# --- /proc -----------------------------------------------------------------------------------------


def test_a_process_is_read_whatever_its_name_is_and_is_gone_once_it_is_a_zombie(tmp_path: Path) -> None:
    write(tmp_path, {"7/stat": STAT.format(pid=7, state="S", began=4711, core=1)})
    assert procfs.process_now(7, tmp_path) == ProcessNow(4711, 5, 300, 120, 7)
    write(tmp_path, {"7/stat": STAT.format(pid=7, state="Z", began=4711, core=1)})
    assert procfs.process_now(7, tmp_path) is None
    assert procfs.process_now(8, tmp_path) is None


def test_memory_owner_and_bytes_are_read_and_none_of_a_process_that_is_gone_or_hidden(tmp_path: Path) -> None:
    status = "Name:\tx\nUid:\t101\t102\t103\t104\nRssAnon:\t   100 kB\nRssFile:\t   200 kB\nRssShmem:\t     3 kB\n"
    write(tmp_path, {"7/status": status, "7/io": "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\n"})
    assert procfs.memory_of(7, tmp_path) == Memory(200 * 1024, 103 * 1024)
    assert procfs.owner_of(7, tmp_path) == 101
    assert procfs.transferred_by(7, tmp_path) == Transferred(4096, 8192)
    assert (procfs.memory_of(8, tmp_path), procfs.owner_of(8, tmp_path)) == (None, None)
    assert procfs.transferred_by(8, tmp_path) is None


def test_threads_are_read_with_and_without_their_schedule(tmp_path: Path) -> None:
    stat = STAT.format(pid=7, state="R", began=1, core=3)
    write(tmp_path, {"7/task/7/stat": stat, "7/task/7/schedstat": "5000 6000 7\n", "7/task/8/stat": stat})
    found = {each.number: each for each in procfs.threads_now(7, tmp_path)}
    assert found == {7: ThreadNow(7, "R", 3, 5000, 6000, 7), 8: ThreadNow(8, "R", 3)}
    assert procfs.threads_now(9, tmp_path) == []
    write(tmp_path, {"8/schedstat": "5000 6000 7\n"})
    assert (procfs.nanoseconds_of(8, tmp_path), procfs.nanoseconds_of(9, tmp_path)) == (5000, None)


def test_a_core_is_busy_while_it_neither_idles_nor_waits_for_the_disk_nor_for_the_hypervisor(tmp_path: Path) -> None:
    write(tmp_path, {"stat": "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 999 888 4 5 777 0 0\nintr 1\n"})
    assert procfs.busy_seconds(tmp_path) == {0: 159 / TICKS_PER_SECOND}


# --- estimates -------------------------------------------------------------------------------------


def threads(*found: ThreadNow) -> dict[int, ThreadNow]:
    return {each.number: each for each in found}


def test_time_counts_for_the_core_on_which_a_thread_was_seen_last() -> None:
    before = threads(ThreadNow(1, "R", 0, 10**9), ThreadNow(2, "R", 0, 0))
    after = threads(ThreadNow(1, "R", 0, 2 * 10**9), ThreadNow(2, "R", 1, 5 * 10**8))
    assert estimate.cpu_seconds(before, after, TICKS_PER_SECOND * 3 // 2) == {0: 1.0, 1: 0.5}


def test_time_of_threads_that_have_ended_is_not_lost() -> None:
    before = threads(ThreadNow(1, "S", 0, 0), ThreadNow(2, "R", 1, 0))
    after = threads(ThreadNow(1, "S", 0, 10**9))
    assert estimate.cpu_seconds(before, after, TICKS_PER_SECOND * 2) == {0: 2.0}
    assert estimate.cpu_seconds(before, threads(ThreadNow(1, "S", 1)), TICKS_PER_SECOND) == {1: 1.0}


def test_delays_count_as_if_all_of_a_thread_had_been_equal() -> None:
    before = threads(ThreadNow(1, "S", 0, 0, 0, 10))
    after = threads(ThreadNow(1, "S", 0, 0, 10 * 3_000_000, 20), ThreadNow(2, "S", 0, 0, 500, 1))
    found = estimate.run_queue(before, after)
    assert len(found) == HISTOGRAM_BUCKETS
    assert {bucket: count for bucket, count in enumerate(found) if count} == {11: 10, 0: 1}


@given(st.floats(0.0, 1e12))
def test_every_delay_has_its_bucket(microseconds: float) -> None:
    bucket = estimate.bucket_of(microseconds)
    assert 0 <= bucket < HISTOGRAM_BUCKETS
    assert bucket == 0 or 2**bucket <= microseconds
    assert bucket == HISTOGRAM_BUCKETS - 1 or microseconds < 2 ** (bucket + 1)


def test_the_most_trusted_measurement_of_a_field_is_taken_and_of_equal_ones_the_first() -> None:
    sure, half = Measured(1, Source.EBPF, 1.0), Measured(2, Source.PROCFS, 0.5)
    same = Measured(3, Source.CGROUP, 1.0)
    assert best({"a": sure, "b": half}, {"a": same, "b": same, "c": half}) == {"a": sure, "b": same, "c": half}


# --- cgroups, pressure, energy ---------------------------------------------------------------------


def test_a_group_tells_its_throttling_and_that_of_the_groups_it_is_in(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a/b/cpu.stat": "usage_usec 5\nnr_periods 20\nnr_throttled 5\n",
            "a/cpu.stat": "usage_usec 5\nnr_periods 40\nnr_throttled 4\n",
            "cpu.stat": "usage_usec 5\n",
        },
    )
    assert groups.periods_of("/a/b", tmp_path) == [Periods(20, 5), Periods(40, 4)]
    assert groups.periods_of("", tmp_path) == []
    assert groups.stopped_share(Periods(10, 0), Periods(20, 5)) == 0.5
    assert groups.stopped_share(Periods(20, 5), Periods(20, 5)) == 0.0


def test_a_group_tells_the_bytes_of_all_its_devices(tmp_path: Path) -> None:
    lines = "8:0 rbytes=10 wbytes=20 rios=1 wios=1 dbytes=0 dios=0\n254:0 rbytes=1 wbytes=2 rios=1 wios=1\n"
    write(tmp_path, {"a/io.stat": lines})
    assert groups.transferred_by("/a", tmp_path) == Transferred(11, 22)
    assert groups.transferred_by("/b", tmp_path) is None


def test_pressure_is_read_where_the_kernel_counts_it(tmp_path: Path) -> None:
    write(tmp_path, {"pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\nfull avg10=0 total=1\n"})
    assert groups.stalled_seconds(tmp_path) == {"cpu": 1.5}


def test_a_processors_own_account_is_read_over_its_end_and_a_rail_by_its_power(tmp_path: Path) -> None:
    rapl = "class/powercap/intel-rapl:0"
    write(tmp_path, {f"{rapl}/energy_uj": "900\n", f"{rapl}/max_energy_range_uj": "1000\n"})
    write(tmp_path, {f"{rapl}:0/energy_uj": "5\n"})  # a part of the whole
    meter = energy.Energy(energy.find(tmp_path))
    write(tmp_path, {f"{rapl}/energy_uj": "400\n"})
    assert meter.joules(1.0) == pytest.approx(500e-6)


def test_a_jetsons_rail_is_known_by_its_name_and_other_sensors_are_no_energy(tmp_path: Path) -> None:
    assert energy.Energy(energy.find(tmp_path)).joules(1.0) is None
    sensor = "class/hwmon/hwmon3"
    write(tmp_path, {f"{sensor}/in2_label": "VDD_CPU\n", f"{sensor}/in1_label": "VDD_IN\n"})
    write(tmp_path, {f"{sensor}/in1_input": "5000\n", f"{sensor}/curr1_input": "1200\n"})
    assert energy.Energy(energy.find(tmp_path)).joules(2.0) == pytest.approx(12.0)


# --- programs in the kernel ------------------------------------------------------------------------


def test_a_thread_still_on_its_core_has_computed_all_the_time_but_for_what_was_stolen_beyond_a_tick() -> None:
    second = 1_000_000_000
    assert computed(second, 0, None) == second
    assert computed(second, 5 * second, 6 * second - 4_000_000) == second
    assert computed(second, 5 * second, 6 * second - 50_000_000) == second - 50_000_000
    assert computed(second, 0, 90 * second) == second
    assert computed(second, 90 * second, 0) == second


# --- the way up ------------------------------------------------------------------------------------


def test_what_is_no_btf_is_refused() -> None:
    with pytest.raises(ValueError, match="BTF"):
        Types(bytes(64))


def test_missing_bcc_and_headers_are_named_one_after_the_other(tmp_path: Path) -> None:
    assert "python3-bpfcc" in loading.missing_tools(tmp_path)
    write(tmp_path, {"usr/lib/python3/dist-packages/bcc/__init__.py": ""})
    assert "headers" in loading.missing_tools(tmp_path)
    write(tmp_path, {"sys/kernel/kheaders.tar.xz": ""})
    assert loading.missing_tools(tmp_path) == ""


def test_missing_capabilities_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/status": f"Name:\tx\nCapEff:\t{1 << 38:016x}\n"})
    assert loading.obstacle(tmp_path) == "eBPF needs CAP_BPF: run edged-probe.service"


def test_with_nothing_at_hand_there_is_a_sample_all_the_same() -> None:
    sampler = Sampler(Step.EBPF, survey=lambda: {Step.EBPF: "no", Step.COUNTERS: "neither"})
    sample = sampler.sample(now=5.0)
    sampler.close()
    assert (sample.at, sample.step, sample.reason, sample.processes) == (5.0, Step.PROCFS, "neither", ())
    assert sample.node.stalled is None
    assert sample.node.total_bytes > 0
