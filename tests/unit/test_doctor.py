"""The doctor's judgements: each from facts alone."""

import errno
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.config import Mqtt
from edged.doctor import broker, kernel, models, power, probe, service, storage
from edged.doctor.broker import Broker, Reply
from edged.doctor.checks import CHECKS, Check, carry_out, count
from edged.doctor.device import Device, Reach
from edged.doctor.finding import Finding, Level, ok, skip
from edged.doctor.models import Build, Checked, Memory
from edged.doctor.power import Policy, Supply, Temperatures
from edged.doctor.probe import Probe
from edged.doctor.service import Port, Unit
from edged.doctor.storage import Flushes, Kept, Permissions, Room, Servant, Sqlite, Swap
from edged.hardware.thermal import Heat, Zone
from edged.probe.sample import Cost, NodeSample, Sample, Step

NO_DEVICE: Any = None


# --- power -----------------------------------------------------------------------------------------


def test_powersave_is_a_warning_whose_fix_names_a_governor_that_is_there() -> None:
    found = power.judge_governors((Policy("policy0", "cpufreq-dt", "powersave", ("ondemand", "performance")),))
    assert found.level is Level.WARN
    assert "- - - - ondemand" in found.fix


@pytest.mark.parametrize("driver", ["intel_pstate", "amd-pstate-epp"])
def test_powersave_of_a_driver_that_follows_the_load_is_right(driver: str) -> None:
    assert power.judge_governors((Policy("policy0", driver, "powersave", ()),)).level is Level.OK


def test_without_frequency_scaling_nothing_is_said_of_the_governor() -> None:
    assert power.judge_governors(()).level is Level.SKIP


def heat(*zones: Zone, slowed: bool = False) -> Finding:
    return power.judge_temperatures(Temperatures(Heat(zones=zones, slowed=slowed), {"cpu": 105.0}, 80.0))


@pytest.mark.parametrize(
    ("celsius", "level"), [(60.0, Level.OK), (79.9, Level.OK), (80.0, Level.WARN), (100.0, Level.FAIL)]
)
def test_a_zone_that_does_not_say_where_it_is_slowed_is_hot_from_the_setting_on(celsius: float, level: Level) -> None:
    assert heat(Zone("cpu", celsius, None)).level is level


@pytest.mark.parametrize(("celsius", "level"), [(98.0, Level.OK), (99.0, Level.WARN), (100.0, Level.FAIL)])
def test_a_zone_is_hot_where_it_is_slowed_and_fails_5_degrees_before_it_switches_off(
    celsius: float, level: Level
) -> None:
    assert heat(Zone("soc", 50.0, None), Zone("cpu", celsius, 99.0)).level is level


def test_a_processor_that_is_slowed_now_warns_and_no_sensor_says_nothing() -> None:
    assert heat(Zone("cpu", 50.0, None), slowed=True).level is Level.WARN
    assert heat().level is Level.SKIP


@pytest.mark.parametrize(
    ("alarm", "throttled", "level"),
    [
        (None, None, Level.SKIP),
        (False, None, Level.OK),
        (True, None, Level.FAIL),
        (None, 0x0, Level.OK),
        (False, 0x50005, Level.FAIL),
        (False, 0x50000, Level.WARN),
        (False, 0x80008, Level.WARN),
        (False, 0x20000, Level.OK),
    ],
)
def test_low_voltage_now_fails_and_earlier_warns(alarm: bool | None, throttled: int | None, level: Level) -> None:
    assert power.judge_supply(Supply(alarm, throttled)).level is level


def test_of_the_supplys_past_only_the_firmware_itself_is_believed() -> None:
    told, untold = (power.judge_supply(Supply(alarm=False, throttled=bits)) for bits in (0, None))
    assert told.what == "never too low since the last start"
    assert untold.what.startswith("not too low now; what was before needs the group video")


def test_a_home_that_systemd_makes_at_the_first_start_is_not_missed() -> None:
    new = Servant("edged", is_me=True, is_given_home=True)
    refused = Flushes("/var/lib", "ext4", (), errno.EACCES, "/var/lib/edged", new)
    assert storage.judge_flushes(refused).level is Level.SKIP
    found = Permissions(home=None, place="/var/lib/edged", refusal="cannot use it", servant=new)
    assert storage.judge_permissions(found).level is Level.SKIP


# --- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("milliseconds", "level"), [(1, Level.OK), (19.9, Level.OK), (20, Level.WARN), (199, Level.WARN), (200, Level.FAIL)]
)
def test_slow_flushes_warn_from_20_ms_and_fail_from_200(milliseconds: float, level: Level) -> None:
    assert storage.judge_flushes(Flushes("/home", "ext4", (milliseconds / 1e3,) * 100)).level is level


def test_one_slow_flush_in_a_hundred_does_not_decide() -> None:
    assert storage.judge_flushes(Flushes("/home", "ext4", (0.001,) * 99 + (9.0,))).level is Level.OK
    assert storage.judge_flushes(Flushes("/home", "ext4", (0.001,) * 98 + (9.0,) * 2)).level is Level.FAIL


def test_a_home_in_memory_is_a_warning_however_fast() -> None:
    assert storage.judge_flushes(Flushes("/run/edged", "tmpfs", (1e-6,))).level is Level.WARN


EDGED, SOMEBODY = Servant("edged", is_me=True), Servant("edged", is_me=False)
GIVE_TO_EDGED = "sudo mkdir -p /data/edged && sudo chown -R edged: /data/edged && sudo chmod u+rwx /data/edged"


@pytest.mark.parametrize(
    ("error", "level"), [(errno.EACCES, Level.SKIP), (errno.EROFS, Level.FAIL), (errno.EIO, Level.FAIL)]
)
def test_a_disk_that_cannot_be_written_fails_unless_this_user_merely_may_not(error: int, level: Level) -> None:
    assert storage.judge_flushes(Flushes("/home", "ext4", (), error, servant=SOMEBODY)).level is level


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM])
def test_a_disk_that_edged_itself_may_not_write_fails_and_the_home_is_given_to_it_not_what_is_above(error: int) -> None:
    found = storage.judge_flushes(Flushes("/data", "ext4", (), error, "/data/edged", EDGED))
    assert (found.level, found.fix) == (Level.FAIL, GIVE_TO_EDGED)


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_one_of_the_values_and_enough_are_not_above_it(values: list[float], share: float) -> None:
    found = storage.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


@pytest.mark.parametrize(
    ("free_bytes", "level"), [(10**9, Level.OK), (499_999_999, Level.WARN), (49_999_999, Level.FAIL)]
)
def test_a_full_disk_fails(free_bytes: int, level: Level) -> None:
    assert storage.judge_room(Room("/home", free_bytes)).level is level


def test_only_swap_on_an_sd_card_warns() -> None:
    assert storage.judge_swaps(()).level is Level.OK
    assert storage.judge_swaps((Swap("/dev/zram0", ""), Swap("/dev/mmcblk0p3", "MMC"))).level is Level.OK
    found = storage.judge_swaps((Swap("/var/swap", "SD"),))
    assert found.level is Level.WARN
    assert "dphys-swapfile" in found.fix


HOME = Kept("/var/lib/edged", 0o750, 900)
EVENTS = Kept("/var/lib/edged/events.db", 0o640, 900)


def permissions(**facts: Any) -> Finding:
    return storage.judge_permissions(
        Permissions(**{"home": HOME, "files": (EVENTS,), "owner_name": "edged", "user": 900, **facts})
    )


def test_a_home_of_its_owner_alone_is_right() -> None:
    assert permissions().level is Level.OK
    assert permissions(key=Kept("/var/lib/edged/api-key", 0o640, 0)).level is Level.OK


def test_a_key_that_everybody_can_read_fails_with_the_command_that_closes_it() -> None:
    found = permissions(key=Kept("/etc/edged/api-key", 0o644, 0))
    assert (found.level, found.fix) == (Level.FAIL, "chmod 640 /etc/edged/api-key")


def test_a_database_that_others_can_change_fails_and_one_that_they_can_read_warns() -> None:
    open_home = Kept(HOME.path, 0o755, 900)
    assert permissions(home=open_home, files=(Kept(EVENTS.path, 0o666, 900),)).level is Level.FAIL
    assert permissions(home=open_home, files=(Kept(EVENTS.path, 0o644, 900),)).level is Level.WARN


def test_what_others_cannot_reach_may_have_any_mode() -> None:
    files = (Kept(EVENTS.path, 0o666, 900),)
    assert permissions(files=files).level is Level.OK
    assert permissions(home=Kept(HOME.path, 0o777, 900), files=files, others_reach_home=False).level is Level.OK


def test_a_database_of_another_user_than_the_home_fails() -> None:
    found = permissions(files=(Kept(EVENTS.path, 0o640, 0),))
    assert (found.level, found.fix) == (Level.FAIL, "sudo chown -R edged: /var/lib/edged")


def test_a_home_of_another_user_that_edged_may_not_use_fails_with_the_command_that_gives_it_to_edged() -> None:
    facts = {"place": "/data/edged", "refusal": "cannot use the home", "files": (), "servant": EDGED}
    roots = Kept("/data/edged", 0o755, 0)
    for home in (roots, None):
        found = permissions(home=home, **facts)
        assert (found.level, found.fix) == (Level.FAIL, GIVE_TO_EDGED)
    assert permissions(home=roots, **{**facts, "servant": SOMEBODY}).level is Level.SKIP
    assert permissions(home=roots, **{**facts, "refusal": ""}).level is Level.OK  # by its group, say


def test_who_is_not_edged_is_told_to_be_edged_and_not_the_homes_owner() -> None:
    found = permissions(home=Kept("/data/edged", 0o755, 0), files=(), owner_name="root", user=1000, servant=SOMEBODY)
    assert (found.level, "sudo -u edged edged doctor" in found.what) == (Level.SKIP, True)


def test_a_user_who_is_neither_root_nor_the_owner_is_told_that_not_all_is_seen() -> None:
    assert permissions(user=1000).level is Level.SKIP
    assert storage.judge_permissions(Permissions(home=None)).level is Level.SKIP


@pytest.mark.parametrize(
    ("version", "has_fts5", "level"),
    [((3, 40, 1), True, Level.OK), ((3, 40, 1), False, Level.FAIL), ((3, 34, 1), True, Level.FAIL)],
)
def test_sqlite_must_be_new_enough_and_have_fts5(version: tuple[int, ...], has_fts5: bool, level: Level) -> None:
    assert storage.judge_sqlite(Sqlite(version, has_fts5)).level is level


# --- kernel ----------------------------------------------------------------------------------------


def cgroup(command_line: str = "", *, controllers: str | None = "cpu io pids", boot_file: str = "") -> Finding:
    words = None if controllers is None else frozenset(controllers.split())
    return kernel.judge_memory_cgroup(
        kernel.MemoryCgroup(words, is_v1=False, command_line=tuple(command_line.split()), boot_file=boot_file)
    )


def test_a_memory_controller_of_cgroup_v2_is_right_whatever_the_command_line_says() -> None:
    assert cgroup("cgroup_disable=memory", controllers="cpu memory").level is Level.OK


def test_the_fix_of_a_disabled_memory_cgroup_is_the_word_that_is_missing_or_the_later_one_that_undoes_it() -> None:
    file = "/boot/firmware/cmdline.txt"
    missing = cgroup("cgroup_disable=memory console=tty1", boot_file=file)
    assert missing.level is Level.WARN
    assert missing.fix == f"sudo sed -i '1s/$/ cgroup_enable=memory/' {file} && sudo reboot"
    undone = cgroup("cgroup_enable=memory cgroup_memory=1 cgroup_disable=memory", boot_file=file)
    assert undone.fix == f"sudo sed -i 's/ *cgroup_disable=memory//g' {file} && sudo reboot"
    assert "full-upgrade" in cgroup("cgroup_disable=memory cgroup_enable=memory", boot_file=file).fix


@pytest.mark.parametrize(
    ("boot_file", "part"),
    [
        ("/boot/extlinux/extlinux.conf", "/^ *APPEND/s/$/ systemd.unified"),
        ("/etc/default/grub", "sudo update-grub"),
        ("", "boot loader"),
    ],
)
def test_without_cgroup_v2_the_fix_is_for_this_boot_loader(boot_file: str, part: str) -> None:
    found = cgroup(controllers=None, boot_file=boot_file)
    assert found.level is Level.WARN
    assert part in found.fix


def test_pages_of_16_kb_warn_and_a_pi_is_told_which_kernel_has_others() -> None:
    assert kernel.judge_page_size(kernel.PageSize(4096, "")).level is Level.OK
    found = kernel.judge_page_size(kernel.PageSize(16384, "Raspberry Pi 5 Model B Rev 1.0"))
    assert found.level is Level.WARN
    assert "kernel8.img" in found.fix
    assert "CONFIG_ARM64_4K_PAGES" in kernel.judge_page_size(kernel.PageSize(65536, "")).fix


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ("6.12.25+rpt-rpi-2712", "linux-headers-rpi-2712"),
        ("6.12.25+rpt-rpi-v8", "linux-headers-rpi-v8"),
        ("5.15.148-tegra", "nvidia-l4t-kernel-headers"),
        ("6.1.0-30-arm64", "linux-headers-6.1.0-30-arm64"),
    ],
)
def test_missing_kernel_headers_warn_and_name_the_package_of_this_kernel(release: str, package: str) -> None:
    found = kernel.judge_tracing(kernel.Tracing(release, has_btf=True, has_headers=False, has_bcc=True))
    assert (found.level, found.fix) == (Level.WARN, f"sudo apt-get install {package}")
    assert kernel.judge_tracing(kernel.Tracing(release, False, True, True)).level is Level.OK


def test_headers_without_bcc_warn_and_name_its_package() -> None:
    found = kernel.judge_tracing(kernel.Tracing("6.1.0-30-arm64", has_btf=True, has_headers=True, has_bcc=False))
    assert (found.level, found.fix) == (Level.WARN, "sudo apt-get install python3-bpfcc")


@pytest.mark.parametrize(
    ("now", "is_synchronised", "level"),
    [
        (1.8e9, True, Level.OK),
        (1.8e9, False, Level.WARN),
        (1.8e9, None, Level.SKIP),
        (0.0, True, Level.FAIL),
    ],
)
def test_a_clock_that_drifts_warns_and_one_that_was_never_set_fails(
    now: float, is_synchronised: bool | None, level: Level
) -> None:
    assert kernel.judge_clock(kernel.Clock(now, is_synchronised)).level is level


# --- models ----------------------------------------------------------------------------------------

PI_5 = frozenset({"asimd", "asimddp", "asimdhp"})


@pytest.mark.parametrize(
    ("flags", "features", "level"),
    [
        (PI_5, ("NEON", "DOTPROD", "FP16_VA"), Level.OK),
        (PI_5, ("NEON",), Level.WARN),
        (frozenset({"asimd"}), ("NEON",), Level.OK),
        (PI_5, (), Level.SKIP),
        (frozenset(), ("NEON",), Level.SKIP),
        (PI_5, None, Level.FAIL),
    ],
)
def test_a_build_without_instructions_that_are_there_warns_and_one_that_does_not_load_fails(
    flags: frozenset[str], features: tuple[str, ...] | None, level: Level
) -> None:
    found = models.judge_build(Build(flags, features))
    assert found.level is level
    assert level is not Level.WARN or "DOTPROD, FP16_VA" in found.what


def test_a_build_that_is_only_slow_to_load_is_no_failure() -> None:
    found = models.judge_build(Build(PI_5, None, is_late=True))
    assert (found.level, "within 9 s" in found.what) == (Level.SKIP, True)


def memory(available: int | None, **facts: Any) -> Finding:
    return models.judge_memory(
        Memory(
            **{
                "needed": 1_000_000_000,
                "weights": 400_000_000,
                "available": available,
                "context_tokens": 8192,
                "kv_per_token": 23_000,
                **facts,
            }
        )
    )


@pytest.mark.parametrize(
    ("available", "level"),
    [(1_100_000_000, Level.OK), (1_000_000_000, Level.WARN), (640_000_000, Level.WARN), (600_000_000, Level.FAIL)],
)
def test_models_that_do_not_fit_warn_while_only_weights_must_go_and_fail_beyond(available: int, level: Level) -> None:
    assert memory(available).level is level


def test_the_fix_for_too_little_memory_is_a_context_that_fits_or_else_a_smaller_model() -> None:
    assert "chat.context_tokens = 5888 " in memory(1_000_000_000).fix  # 50 MB less room: 2,174 tokens, in steps of 256
    assert "chat.model" in memory(600_000_000).fix
    assert "chat.model" in memory(900_000_000, kv_per_token=0).fix


@given(st.integers(100_000_000, 1_050_000_000))
def test_the_context_proposed_really_makes_the_models_fit(available: int) -> None:
    fix = memory(available).fix
    if "context_tokens = " in fix:
        tokens = int(fix.split("context_tokens = ")[1].split()[0])
        assert memory(available, needed=1_000_000_000 - (8192 - tokens) * 23_000).level is Level.OK


def test_without_a_model_or_without_a_word_of_the_kernel_nothing_is_said_of_memory() -> None:
    assert memory(None).level is Level.SKIP
    assert memory(10**10, missing=("tiny",)).level is Level.SKIP
    assert memory(10**10, is_silent=True).level is Level.SKIP


@pytest.mark.parametrize(
    ("found", "level"),
    [
        ([Checked("a", "1", "1"), Checked("b", "", "2")], Level.OK),
        ([Checked("a", "1", "2"), Checked("b", "", None, "not installed", "pull")], Level.FAIL),
        ([Checked("a", "1", "1"), Checked("b", "", None, "not installed", "pull")], Level.WARN),
        ([Checked("a", "1", None)], Level.SKIP),
    ],
)
def test_another_content_than_was_installed_fails_before_all_else(found: list[Checked], level: Level) -> None:
    assert models.judge_checksums(tuple(found)).level is level


def test_each_wrong_file_comes_again_on_its_own_way() -> None:
    wrong = (
        Checked("a", "1", "2", again="edged models pull a"),
        Checked("b", "1", "2", again="edged models import FILE --name b"),
    )
    assert models.judge_checksums(wrong).fix == "edged models pull a && edged models import FILE --name b"


# --- broker ----------------------------------------------------------------------------------------


def broker_says(reply: Reply | None, error: str = "", **settings: Any) -> Finding:
    return broker.judge_broker(Broker(Mqtt(**settings), reply, error))


def granted(version: str = "5", **limits: Any) -> Reply:
    return Reply(version=version, code=0, **limits)


def test_an_unreachable_broker_fails_and_a_broker_that_is_not_wanted_is_skipped() -> None:
    assert broker_says(None, "Connection refused").level is Level.FAIL
    assert broker_says(None, enabled=False).level is Level.SKIP


def test_a_broker_whose_name_has_no_address_fails_with_the_name_server_to_mend() -> None:
    found = broker.judge_broker(Broker(Mqtt(), None, "the name x cannot be resolved", has_address=False))
    assert (found.level, "name server" in found.fix) == (Level.FAIL, True)


@pytest.mark.parametrize("code", [134, 135])
def test_wrong_credentials_are_said_with_the_user_and_missing_ones_with_the_settings(code: int) -> None:
    refused = Reply(version="5", code=code, reason="Not authorized")
    wrong = broker_says(refused, username="edged")
    assert wrong.level is Level.FAIL
    assert "user 'edged'" in wrong.what
    missing = broker_says(refused)
    assert missing.fix == "set mqtt.username and mqtt.password_file"


def test_a_session_of_the_length_asked_for_is_right_and_shown() -> None:
    assert "7.0 days" in broker_says(granted()).what
    assert broker_says(granted(session_expiry_seconds=604_800)).level is Level.OK


@pytest.mark.parametrize(
    ("reply", "settings", "level"),
    [
        (granted(session_expiry_seconds=60), {}, Level.WARN),
        (granted(), {"session_expiry_seconds": 0}, Level.WARN),
        (granted(maximum_packet_bytes=1000), {}, Level.WARN),
        (granted(maximum_packet_bytes=1_000_000), {}, Level.OK),
        (granted(has_retain=False), {}, Level.WARN),
        (granted(maximum_qos=0), {}, Level.FAIL),
        (granted(refused_topics=("plant/# (Not authorized)",)), {}, Level.FAIL),
        (granted("3.1.1"), {}, Level.WARN),
        (granted("3.1.1"), {"protocol": "3.1.1"}, Level.OK),
    ],
)
def test_what_the_broker_does_not_grant_is_said(reply: Reply, settings: dict[str, Any], level: Level) -> None:
    assert broker_says(reply, **settings).level is level


# --- service ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "error", "level", "part"),
    [
        ("0.1", 0, Level.OK, "edged 0.1 serves"),
        ("", 0, Level.OK, "free"),
        ("", errno.EADDRINUSE, Level.FAIL, "taken"),
        ("", errno.EACCES, Level.FAIL, "below 1024"),
        ("", errno.EADDRNOTAVAIL, Level.FAIL, "cannot assign"),
    ],
)
def test_a_port_is_free_or_ours_or_a_failure(version: str, error: int, level: Level, part: str) -> None:
    found = service.judge_port(Port("127.0.0.1:3000", version, error, "cannot assign"))
    assert found.level is level
    assert part in found.what


@pytest.mark.parametrize(
    ("reach", "error", "level", "part"),
    [
        (Reach.RUNS, 0, Level.WARN, "edged runs, but does not say"),
        (Reach.CLOSED, 0, Level.SKIP, "edged serves at"),
        (Reach.WAITS, errno.EADDRINUSE, Level.OK, "held by edged.socket"),
        (Reach.STRANGER, errno.EADDRINUSE, Level.FAIL, "taken"),
        (Reach.SILENT, errno.EADDRINUSE, Level.FAIL, "taken"),
    ],
)
def test_an_edged_that_does_not_answer_is_no_other_program(reach: Reach, error: int, level: Level, part: str) -> None:
    found = service.judge_port(Port("127.0.0.1:3000", "", error, "no answer", reach))
    assert (found.level, part in found.what, "stop it" in found.fix) == (level, True, level is Level.FAIL)


RUNNING = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "UnitFileState": "enabled",
    "Result": "success",
    "NRestarts": "0",
    "NeedDaemonReload": "no",
}


@pytest.mark.parametrize(
    ("changed", "level"),
    [
        ({}, Level.OK),
        ({"ActiveState": "failed", "Result": "watchdog"}, Level.FAIL),
        ({"LoadState": "bad-setting"}, Level.FAIL),
        ({"LoadState": "not-found"}, Level.SKIP),
        ({"ActiveState": "inactive"}, Level.WARN),
        ({"UnitFileState": "disabled"}, Level.WARN),
        ({"NeedDaemonReload": "yes"}, Level.WARN),
        ({"NRestarts": "3"}, Level.WARN),
        ({"ActiveState": "activating", "SubState": "start"}, Level.OK),
        ({"ActiveState": "activating", "SubState": "start", "NRestarts": "4711"}, Level.FAIL),
        ({"ActiveState": "activating", "SubState": "start", "NRestarts": "1"}, Level.WARN),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, Level.FAIL),  # it ended without an error
        ({"ActiveState": "activating", "SubState": "start-pre", "Result": "exit-code"}, Level.FAIL),
    ],
)
def test_a_failed_unit_fails_and_one_that_is_not_as_it_should_be_warns(changed: dict[str, str], level: Level) -> None:
    assert service.judge_unit(Unit({**RUNNING, **changed})).level is level


def test_a_unit_that_ends_again_and_again_says_by_what_and_how_often() -> None:
    crashing = {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code", "NRestarts": "4711"}
    found = service.judge_unit(Unit({**RUNNING, **crashing}))
    assert found.what == "edged.service ended by itself and is to start again (4711 times so far): exit-code"


CONFINED = {"ProtectSystem": "strict", "ProtectHome": "yes", "StateDirectory": "edged", "ReadWritePaths": ""}


@pytest.mark.parametrize(
    ("home", "changed", "level"),
    [
        ("/var/lib/edged", {}, Level.OK),
        ("/var/lib/edged/data", {}, Level.OK),
        ("/var/lib/edged-2", {}, Level.FAIL),
        ("/mnt/ssd/edged", {}, Level.FAIL),
        ("/mnt/ssd/edged", {"ReadWritePaths": "/srv -/mnt/ssd"}, Level.OK),
        ("/mnt/ssd/edged", {"ProtectSystem": "full"}, Level.OK),
        ("", {}, Level.OK),
    ],
)
def test_a_home_that_the_service_cannot_write_to_fails(home: str, changed: dict[str, str], level: Level) -> None:
    found = service.judge_unit(Unit({**RUNNING, **CONFINED, **changed}, home))
    assert found.level is level
    assert level is Level.OK or f"ReadWritePaths={home}" in found.fix


def test_files_that_the_service_does_not_see_warn_with_their_settings() -> None:
    files = {"chat.path": "/home/joe/m.gguf", "http.tls_key": "/root/key.pem", "mqtt.ca_file": "/etc/edged/ca.pem"}
    found = service.judge_unit(Unit({**RUNNING, **CONFINED}, "/var/lib/edged", files))
    assert found.level is Level.WARN
    assert "chat.path = /home/joe/m.gguf, http.tls_key = /root/key.pem" in found.what
    assert "ca_file" not in found.what
    seen = Unit({**RUNNING, **CONFINED, "ProtectHome": "no"}, "/var/lib/edged", files)
    assert service.judge_unit(seen).level is Level.OK


def test_without_systemd_nothing_is_said_of_the_unit() -> None:
    assert service.judge_unit(Unit({})).level is Level.SKIP


# --- the table -------------------------------------------------------------------------------------


def test_names_are_unique_and_each_check_says_what_it_is_about() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.about for check in CHECKS)


def test_a_check_that_hangs_is_a_warning_and_one_that_breaks_a_skip_and_the_others_are_heard() -> None:
    for_ever = threading.Event()

    def hang(_device: Device) -> Finding:
        for_ever.wait()
        return ok("never")

    def broken(_device: Device) -> Finding:
        raise ZeroDivisionError("of a check")

    checks = [
        Check("a", "", hang, when_late="knock harder"),
        Check("b", "", broken),
        Check("c", "", lambda _device: ok("well")),
    ]
    found = dict(carry_out(checks, NO_DEVICE, seconds=0.05))
    for_ever.set()
    assert [found[name].level for name in "abc"] == [Level.WARN, Level.SKIP, Level.OK]
    assert found["a"].fix == "knock harder"
    assert "ZeroDivisionError: of a check" in found["b"].what


def test_findings_are_counted_by_level() -> None:
    assert count([ok(""), skip(""), ok("")]) == {"ok": 2, "warn": 0, "fail": 0, "skip": 1}


# --- the probe -------------------------------------------------------------------------------------


def sampled(step: Step, reason: str = "") -> Probe:
    cost = Cost(cpu_seconds=0.0, resident_bytes=0)
    return Probe(
        True, Sample(at=0.0, seconds=1.0, step=step, reason=reason, processes=(), node=NodeSample(), cost=cost)
    )


def test_a_probe_at_the_top_is_right_and_below_it_the_reason_is_said() -> None:
    assert probe.judge_probe(sampled(Step.EBPF)).level is Level.OK
    found = probe.judge_probe(sampled(Step.COUNTERS, "bcc is not installed"))
    assert found.level is Level.WARN
    assert "counters alone: bcc is not installed" in found.what


def test_without_a_probe_it_is_said_how_edged_measures_and_how_to_start_one() -> None:
    found = probe.judge_probe(Probe(True, problem="no such file", alone=Step.PROCFS))
    assert found.level is Level.WARN
    assert "by procfs alone" in found.what
    assert found.fix == "sudo systemctl enable --now edged-probe"
    assert probe.judge_probe(Probe(enabled=False)).level is Level.SKIP
