"""Temperatures, trip points, cooling and under-voltage as the kernels of several boards show them."""

from pathlib import Path

import pytest

from edged.hardware.thermal import Firmware, Heat, Thermometer, Zone, parse_throttled, read_heat
from tests.sysfs import write

THERMAL = "class/thermal"


def zone(number: int, kind: str, temp: int | str, **trips: tuple[str, int]) -> dict[str, str | int]:
    folder = f"{THERMAL}/thermal_zone{number}"
    points = {
        f"{folder}/trip_point_{name[1:]}_{file}": content
        for name, (kind_of, at) in trips.items()
        for file, content in (("type", kind_of), ("temp", at))
    }
    return {f"{folder}/type": kind, f"{folder}/temp": temp, **points}


def test_a_raspberry_pi_names_no_point_at_which_it_slows_and_the_configured_one_counts(tmp_path: Path) -> None:
    write(tmp_path, zone(0, "cpu-thermal", 61_825, _0=("critical", 110_000)))
    heat = read_heat(tmp_path)
    assert heat == Heat(zones=(Zone("cpu-thermal", 61.825, None),))
    assert heat.hottest(80.0) == Zone("cpu-thermal", 61.825, 80.0)


def test_of_an_rk3588s_zones_the_one_nearest_to_its_lowest_passive_point_counts(tmp_path: Path) -> None:
    passive = {"_0": ("passive", 75_000), "_1": ("passive", 85_000), "_2": ("critical", 115_000)}
    write(tmp_path, zone(0, "soc-thermal", 52_000, **passive))
    write(tmp_path, zone(1, "bigcore0-thermal", 55_461, _0=("critical", 115_000)))
    assert read_heat(tmp_path).hottest(80.0) == Zone("soc-thermal", 52.0, 75.0)


def test_zones_that_are_no_processors_are_left_out_where_one_is(tmp_path: Path) -> None:
    write(tmp_path, zone(0, "PMIC-Die", 100_000) | zone(1, "tj-thermal", 48_000, _0=("hot", 99_000)))
    assert [each.name for each in read_heat(tmp_path).zones] == ["tj-thermal"]
    write(tmp_path, zone(1, "acpitz", 30_000))
    assert [each.name for each in read_heat(tmp_path).zones] == ["PMIC-Die", "acpitz"]


@pytest.mark.parametrize("temp", ["", "garbage", 250_000, -274_000])
def test_a_sensor_that_tells_no_temperature_is_left_out(tmp_path: Path, temp: str | int) -> None:
    write(tmp_path, zone(0, "cpu-thermal", temp))
    assert read_heat(tmp_path).zones == ()
    assert read_heat(tmp_path).hottest(80.0) is None


def test_a_point_of_zero_is_not_in_use(tmp_path: Path) -> None:
    write(tmp_path, zone(0, "x86_pkg_temp", 55_000, _0=("passive", 0), _1=("passive", 0)))
    assert read_heat(tmp_path).zones[0].slows_at is None


def test_a_cpu_that_the_kernel_cools_is_slowed_and_a_fan_that_runs_is_not(tmp_path: Path) -> None:
    write(tmp_path, {f"{THERMAL}/cooling_device0/type": "pwm-fan", f"{THERMAL}/cooling_device0/cur_state": 3})
    write(tmp_path, {f"{THERMAL}/cooling_device1/type": "cpufreq-cpu0", f"{THERMAL}/cooling_device1/cur_state": 0})
    assert not read_heat(tmp_path).slowed
    write(tmp_path, {f"{THERMAL}/cooling_device1/cur_state": 2})
    assert read_heat(tmp_path).slowed


def test_the_supply_monitor_of_a_raspberry_pi_tells_of_under_voltage(tmp_path: Path) -> None:
    write(tmp_path, {"class/hwmon/hwmon0/name": "nvme", "class/hwmon/hwmon0/in0_lcrit_alarm": 1})
    write(tmp_path, {"class/hwmon/hwmon1/name": "rpi_volt", "class/hwmon/hwmon1/in0_lcrit_alarm": 0})
    assert not read_heat(tmp_path).under_voltage
    write(tmp_path, {"class/hwmon/hwmon1/in0_lcrit_alarm": 1})
    assert read_heat(tmp_path).under_voltage


@pytest.mark.parametrize(
    ("answer", "slowed", "under_voltage"),
    [
        ("throttled=0x0\n", False, False),
        ("throttled=0x50000\n", False, False),  # both have been, and are over
        ("throttled=0x50005\n", True, True),
        ("throttled=0x2\n", True, False),
        ("throttled=0x80008\n", True, False),
    ],
)
def test_the_firmwares_bits_of_now_count_and_those_of_the_past_do_not(
    answer: str, slowed: bool, under_voltage: bool
) -> None:
    assert parse_throttled(answer) == Firmware(slowed, under_voltage)


@pytest.mark.parametrize("answer", ["VCHI initialization failed\n", ""])
def test_what_is_no_answer_of_the_firmware_says_nothing(answer: str) -> None:
    assert parse_throttled(answer) is None


def test_the_processors_sensor_in_a_virtual_machine_tells_nothing(tmp_path: Path) -> None:
    sensor: dict[str, str | int] = {"name": "coretemp", "temp1_input": 100_000, "temp1_crit": 100_000}
    write(tmp_path, {f"class/hwmon/hwmon0/{file}": content for file, content in sensor.items()})
    write(tmp_path, {"cpuinfo": "flags : sse2 dtherm hypervisor"})
    assert Thermometer(tmp_path, cpuinfo=tmp_path / "cpuinfo").read().zones == ()
    write(tmp_path, {"cpuinfo": "flags : sse2 dtherm"})
    assert len(Thermometer(tmp_path, cpuinfo=tmp_path / "cpuinfo").read().zones) == 1


def test_an_intel_processor_says_itself_where_it_slows_down(tmp_path: Path) -> None:
    write(tmp_path, zone(0, "x86_pkg_temp", 78_000, _0=("passive", 0)) | zone(1, "acpitz", 28_000))
    sensor: dict[str, str | int] = {
        "name": "coretemp",
        "temp1_input": 78_000,
        "temp1_crit": 100_000,
        "temp2_input": 76_000,
    }
    write(tmp_path, {f"class/hwmon/hwmon3/{file}": content for file, content in sensor.items()})
    assert read_heat(tmp_path).hottest(80.0) == Zone("coretemp", 78.0, 100.0)


def test_a_ryzen_that_names_no_point_is_known_to_slow_down_at_95_degrees(tmp_path: Path) -> None:
    write(tmp_path, {"class/hwmon/hwmon0/name": "nvme", "class/hwmon/hwmon0/temp1_input": 60_000})
    write(tmp_path, {"class/hwmon/hwmon1/name": "k10temp", "class/hwmon/hwmon1/temp1_input": 84_500})
    assert read_heat(tmp_path).zones == (Zone("k10temp", 84.5, 95.0),)


def test_the_firmware_is_asked_every_ten_seconds_and_its_word_holds_meanwhile(tmp_path: Path) -> None:
    answers = [Firmware(slowed=True), Firmware()]
    now = [100.0]
    thermometer = Thermometer(tmp_path, lambda: answers.pop(0), lambda: now[0])
    assert thermometer.read().slowed
    now[0] += 9
    assert thermometer.read().slowed
    now[0] += 1
    assert not thermometer.read().slowed
    assert answers == []


def test_a_device_without_any_sensor_is_neither_hot_nor_short_of_power(tmp_path: Path) -> None:
    assert read_heat(tmp_path) == Heat()


def test_firmware_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    asked: list[None] = []
    now = [0.0]
    thermometer = Thermometer(tmp_path, lambda: asked.append(None), lambda: now[0])
    for _ in range(3):
        assert thermometer.read() == Heat()
        now[0] += 60
    assert len(asked) == 1
