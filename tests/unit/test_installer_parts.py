"""The installer's parts without a machine to install on: boards told apart, build flags, options."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fake_system import System

CHECKOUT = Path(__file__).parents[2]
PI_4_FEATURES = "fp asimd evtstrm crc32 cpuid"
A76_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


# --- boards ------------------------------------------------------------------------------------------


class FakeRoot:
    """What a board shows of itself, below a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, path: str, content: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def ask(self, function: str, machine: str = "aarch64") -> str:
        """What a function of scripts/board.sh prints on this board."""
        script = (
            f"set -euo pipefail; root='{self.folder}'; uname() {{ echo {machine}; }};"
            f" source scripts/board.sh; {function}"
        )
        done = subprocess.run(["bash", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def board(tmp_path: Path) -> FakeRoot:
    board = FakeRoot(tmp_path)
    board.has("proc/cpuinfo", f"processor\t: 0\nFeatures\t: {A76_FEATURES}\n")
    return board


@pytest.mark.parametrize(
    ("model", "compatible", "name"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0\0", "raspberrypi,5-model-b\0brcm,bcm2712\0", "rpi5"),
        ("Raspberry Pi 4 Model B Rev 1.4\0", "raspberrypi,4-model-b\0brcm,bcm2711\0", "rpi4"),
        ("Raspberry Pi Compute Module 4 Rev 1.1\0", "", "rpi4"),
        ("Orange Pi 5\0", "xunlong,orangepi-5\0rockchip,rk3588s\0", "rk3588"),
        ("Radxa ROCK 3C\0", "radxa,rock-3c\0rockchip,rk3566\0", "rk3566"),
        ("Some board\0", "vendor,board\0", "arm64"),
    ],
)
def test_a_board_is_told_by_its_device_tree(board: FakeRoot, model: str, compatible: str, name: str) -> None:
    board.has("proc/device-tree/model", model)
    board.has("proc/device-tree/compatible", compatible)
    assert board.ask("board_name") == name


def test_a_machine_without_a_device_tree_is_its_architecture(board: FakeRoot) -> None:
    assert board.ask("board_name", machine="x86_64") == "amd64"
    assert board.ask("llama_flags", machine="x86_64") == ""


@pytest.mark.parametrize(
    ("model", "device"),
    [("Raspberry Pi 5 Model B Rev 1.0\0", "DeviceAllow=/dev/vcio"), ("Orange Pi 5\0", None)],
)
def test_a_raspberry_pi_lets_the_service_ask_its_firmware(system: System, model: str, device: str | None) -> None:
    (system.root / "proc/device-tree").mkdir(parents=True)
    (system.root / "proc/device-tree/model").write_text(model)
    system.run("chown() { :; }; let_devices_in")
    drop_in = system.root / "etc/systemd/system/edged.service.d/devices.conf"
    assert drop_in.exists() == (device is not None)
    if device is not None:
        assert {"PrivateDevices=no", device, "SupplementaryGroups=video"} < set(drop_in.read_text().splitlines())


def test_a_jetson_is_built_with_cuda_where_the_compiler_is(board: FakeRoot) -> None:
    board.has("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    board.has("proc/device-tree/compatible", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    assert board.ask("board_name") == "jetson"
    assert board.ask("l4t_release") == "36.4.3"
    board.has("usr/local/cuda/bin/nvcc", "")
    (board.folder / "usr/local/cuda/bin/nvcc").chmod(0o755)
    flags = board.ask("llama_flags")
    assert "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16" in flags
    assert f"-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER={board.folder}/usr/local/cuda/bin/nvcc" in flags
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in flags


@pytest.mark.parametrize(
    ("features", "architecture"),
    [
        (PI_4_FEATURES, "armv8-a"),
        (A76_FEATURES, "armv8.2-a+dotprod+fp16"),
        (f"{A76_FEATURES} i8mm", "armv8.2-a+dotprod+fp16+i8mm"),
    ],
)
def test_llama_cpp_is_compiled_for_what_the_processor_can(board: FakeRoot, features: str, architecture: str) -> None:
    board.has("proc/cpuinfo", f"processor\t: 0\nFeatures\t: {features}\n")
    assert board.ask("llama_flags") == f"-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH={architecture}"


def test_a_raspberry_pi_without_the_memory_controller_is_told_what_to_boot_with(board: FakeRoot) -> None:
    board.has("proc/device-tree/model", "Raspberry Pi 5 Model B\0")
    board.has("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
    assert "cgroup_enable=memory" in board.ask("board_advice")
    board.has("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    assert board.ask("board_advice") == ""


# --- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "complaint"),
    [
        (["--mode", "cluster"], 1, "does not form clusters yet"),
        (["--mode=ring"], 2, "no mode 'ring'"),
        (["--arch", "mips"], 2, "no architecture 'mips'"),
        (["--purge"], 2, "--purge goes with --uninstall"),
        (["--model", "../etc"], 2, "no model's name"),
        (["--broker", 'mqtt://a"b'], 2, "no broker's URL"),
        (["--bundle"], 2, "--bundle needs a value"),
        (["--key", "k.pub"], 2, "--key goes with --bundle"),
        (["--demo", "--bundle=x"], 2, "--bundle is for the service"),
        (["--user", "--broker", "local"], 2, "--broker local is for the service"),
        (["--user", "--uninstall"], 2, "--uninstall is for the service"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_done(
    options: list[str], status: int, complaint: str
) -> None:
    done = subprocess.run([str(CHECKOUT / "install-edge.sh"), *options], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert complaint in done.stderr
    assert done.stdout == ""


# --- for the user who runs it ------------------------------------------------------------------------


class Login:
    """A user whose home is a directory, where everything of edged is installed but the program is an echo."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.link = home / ".local/bin/edged"
        self.program = home / ".local/share/edged/venv/bin/edged"
        self.program.parent.mkdir(parents=True)
        self.program.write_text('#!/bin/sh\necho "ran: edged $*"\n')
        self.program.chmod(0o755)

    def install(self, *options: str, path: str = "") -> list[str]:
        """What the installer prints with these options, line by line."""
        script = (
            "source ./install-edge.sh; source scripts/user.sh;"
            " check_all() { :; }; prepare_prefix() { :; }; is_current() { :; }; make_api_key() { :; };"
            ' pull_models() { :; }; parse_options "$@"; install_for_user'
        )
        environment = {"HOME": str(self.home), "PATH": f"{path}:{os.environ['PATH']}"}
        command = ["bash", "-c", script, "bash", *options]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


def test_with_the_demo_edged_is_a_command_too_and_it_is_said_how_to_start_it(login: Login) -> None:
    said = login.install("--demo", path=str(login.link.parent))
    assert said.index("edged serve") < said.index("ran: edged demo")
    assert login.link.resolve() == login.program


def test_where_its_directory_is_not_on_path_yet_the_command_is_linked_and_told_in_full(login: Login) -> None:
    said = login.install()
    assert {f"{login.program} demo", f"{login.program} serve"} <= {*said}
    assert login.link.resolve() == login.program


def test_somebody_elses_command_of_that_name_is_left_alone(login: Login) -> None:
    login.link.parent.mkdir(parents=True)
    login.link.write_text("mine")
    assert f"{login.program} serve" in login.install(path=str(login.link.parent))
    assert login.link.read_text() == "mine"


# --- the service -------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_the_commands_told_at_the_end_are_for_who_may_read_the_configuration(system: System) -> None:
    said = system.run("sudo() { :; }; say_how_to_use")
    assert "  sudo edged status\n" in said
    assert "sudo usermod -aG edged NAME" in said


def test_what_runs_as_edged_knows_the_way_to_the_network_and_nothing_else_of_roots_environment(system: System) -> None:
    place_program(system.root / "bin/setpriv", 'shift 5; exec "$@"')
    roots = "https_proxy=http://proxy:3128 PIP_INDEX_URL=https://packages.plant/simple PIP_TARGET=/root/t SECRET=s"
    said = system.run(f'export PATH="{system.root}/bin:$PATH" {roots}; mkdir -p "$data_dir"; as_edged env')
    variables = dict(line.partition("=")[::2] for line in said.splitlines())
    assert variables["https_proxy"] == "http://proxy:3128"
    assert variables["PIP_INDEX_URL"] == "https://packages.plant/simple"
    assert variables["HOME"] == str(system.root / "var/lib/edged")
    assert not variables.keys() & {"PIP_TARGET", "SECRET"}


def wanted_lines(refusal: "subprocess.CompletedProcess[str]") -> str:
    """What a refusal says to set."""
    lines = [line.removeprefix("       ") for line in refusal.stderr.splitlines() if line.startswith("       ")]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("option", "there"),
    [
        ("broker=local", ""),
        ("broker=local", '[mqtt]\nurl = "mqtt://127.0.0.1:1883"\nusername = "edged"\n'),
        ("broker=mqtt://hub:1883", ""),
        ("broker=mqtt://hub:1883", '[mqtt]\nurl = "mqtt://other"\n'),
        ("model=qwen2.5-0.5b-instruct", '[chat]\nmodel = "smollm2-135m-instruct"\n'),
    ],
)
def test_an_option_that_an_installed_configuration_does_not_say_is_refused_with_the_lines_that_it_takes(
    system: System, option: str, there: str
) -> None:
    system.config.write_text(there)
    refused = system.attempt(f"{option}; check_service")
    assert refused.returncode == 1
    assert "Nothing was changed" in refused.stderr
    assert "systemctl restart edged" in refused.stderr
    assert [path for path in system.root.rglob("*") if path.is_file()] == [system.config]
    system.config.write_text(wanted_lines(refused))
    system.run(f"{option}; check_settings; make_config")
    assert system.config.read_text() == wanted_lines(refused)


def test_options_that_an_installed_configuration_says_already_are_fine(system: System) -> None:
    system.config.write_text("")
    system.run("broker=mqtt://127.0.0.1:1883; check_settings")
    system.config.unlink()
    system.run("broker=local; model=m; check_settings; make_config; check_settings")
    assert 'password_file = "' in system.config.read_text()


NEW_VERSION_FAILS = """
prefix="$root/opt/edged"; settle_places
mkdir -p "$state" "$unit_dir" "$prefix"/versions/{old,new}
for each in old new; do cp -r systemd "$prefix/versions/$each/"; done
sed -i "s|/opt/edged|$prefix|g" "$prefix"/versions/*/systemd/*
[[ -e "$prefix/current" ]] || ln -s versions/old "$prefix/current"
as_edged() {
    case "$*" in
        *check*) printf 'configuration: f\nhome: %s\nstore events.db: schema 1 → 2\n' "$root/data" ;;
        *) "$@" ;;
    esac
}
is_whole() { [[ -d "$prefix/versions/$1" ]]; }; serves() { return 1; }
reach_disk() { :; }; show_why_not() { :; }; becomes_ready() { :; }
start_service() { [[ "$(current_version)" == old ]] || { echo new >"$root/data/events.db" && return 1; }; }
trap on_exit EXIT
"""
UPGRADE = NEW_VERSION_FAILS + "settle_switch new; rehearse new; serve_version new"


def test_a_version_that_does_not_start_leaves_the_stores_as_they_were_wherever_they_lie(system: System) -> None:
    stores = system.root / "data"
    stores.mkdir()
    (stores / "events.db").write_text("old")
    (stores / "events.db-wal").write_text("of the old one")
    told = system.attempt(UPGRADE)
    assert told.returncode == 1
    assert "new does not become ready; old serves again" in told.stderr
    assert {file.name: file.read_text() for file in stores.glob("*.db*")} == {
        "events.db": "old",
        "events.db-wal": "of the old one",
    }
    assert (stores / "failed-new/events.db").read_text() == "new\n"
    assert current_version(system) == "old"
    assert not list(stores.glob("before-*"))
    assert not note(system).exists()


def test_it_goes_back_also_where_there_were_no_stores(system: System) -> None:
    (system.root / "data").mkdir()
    told = system.attempt(UPGRADE)
    assert "new does not become ready; old serves again" in told.stderr
    assert current_version(system) == "old"
    assert (system.root / "data/failed-new/events.db").exists()
    assert not (system.root / "data/events.db").exists()


# In the place of a function that is reached at some moment: the power fails, and the shell is not asked.
POWER_CUT = "{ kill -KILL $$; }; "


def current_version(system: System) -> str:
    return (system.root / "opt/edged/current").resolve().name


def note(system: System) -> Path:
    return system.root / "opt/edged/install/switching"


@pytest.fixture
def stores(system: System) -> Path:
    stores = system.root / "data"
    (stores / "run").mkdir(parents=True)
    (stores / "events.db").write_text("old")
    return stores


def upgrade_cut_at(system: System, moment: str) -> None:
    cut = UPGRADE.replace("settle_switch new;", f"{moment}() {POWER_CUT}")
    assert system.attempt(cut).returncode == -9


@pytest.mark.parametrize("moment", ["start_service", "go_back", "bring_back"])
def test_after_a_power_cut_between_two_versions_the_way_back_is_still_there(
    system: System, stores: Path, moment: str
) -> None:
    upgrade_cut_at(system, moment)
    (stores / "events.db").write_text("new at the boot")
    told = system.attempt(UPGRADE)
    assert "old serves again" in told.stderr
    assert (stores / "events.db").read_text() == "old"
    assert current_version(system) == "old"
    assert not note(system).exists()


def test_after_a_power_cut_the_version_before_can_be_asked_for(system: System, stores: Path) -> None:
    upgrade_cut_at(system, "start_service")
    (stores / "events.db").write_text("new at the boot")
    told = system.run(NEW_VERSION_FAILS + "settle_switch old; current_version; exit 0")
    assert "going back to old" in told
    assert told.endswith("old\n")
    assert (stores / "events.db").read_text() == "old"


def test_when_a_run_fails_after_it_went_back_the_version_before_serves(system: System, stores: Path) -> None:
    upgrade_cut_at(system, "bring_back")
    told = system.attempt(
        NEW_VERSION_FAILS + 'start_service() { echo "started $(current_version)"; }; settle_switch new; false'
    )
    assert told.stdout.endswith("started old\n")


@pytest.mark.parametrize("moment", ["reach_disk", "end_switch"])
def test_what_the_version_before_made_since_is_never_taken_back(system: System, stores: Path, moment: str) -> None:
    """The power failed before the newer version was switched to, or after all was back."""
    upgrade_cut_at(system, moment)
    assert (stores / "events.db").read_text() == "old"
    (stores / "events.db").write_text("of weeks")
    system.run(NEW_VERSION_FAILS + "settle_switch old")
    assert (stores / "events.db").read_text() == "of weeks"
    assert current_version(system) == "old"
    assert not note(system).exists()
    assert not list(stores.glob("before-*"))


def test_stopped_before_the_switch_nothing_is_left_to_go_back_to(system: System, stores: Path) -> None:
    cut = UPGRADE.replace("settle_switch new;", "trap on_interrupt TERM; reach_disk() { kill -TERM $$; };")
    assert system.attempt(cut).returncode == 130
    assert current_version(system) == "old"
    assert not note(system).exists()
    assert not list(stores.glob("before-*"))


@pytest.mark.parametrize("wanted", ["newer", "old"])
def test_a_version_that_became_ready_after_a_power_cut_stays_and_its_data_too(
    system: System, stores: Path, wanted: str
) -> None:
    (stores / "run/ready").write_text("by the old one")
    upgrade_cut_at(system, "start_service")
    (stores / "events.db").write_text("of weeks")
    (stores / "run/ready").write_text("by the new one, whatever the clock says")
    system.run(NEW_VERSION_FAILS + f"settle_switch {wanted}")
    assert (stores / "events.db").read_text() == "of weeks"
    assert not list(stores.glob("before-*"))
    assert current_version(system) == "new"


def test_what_was_kept_stays_where_a_step_of_the_way_back_fails(system: System, stores: Path) -> None:
    told = system.attempt(UPGRADE.replace("settle_switch new;", 'mv() { [[ "$*" != *failed* ]] && command mv "$@"; };'))
    assert told.returncode == 1
    assert "run this again once the cause is mended" in told.stderr
    assert "old serves again" in system.attempt(UPGRADE).stderr
    assert (stores / "events.db").read_text() == "old"


def test_nothing_cuts_the_way_back_short_not_a_second_ctrl_c_and_not_a_closed_terminal(system: System) -> None:
    script = """
    trap on_exit EXIT; trap on_interrupt INT TERM HUP
    undo() { kill -INT $$; kill -HUP $$; kill -TERM $$; say "nobody reads this"; touch "$root/undone"; }
    exec >/dev/full 2>&1
    kill -TERM $$; sleep 5 # unlike the others it is not ignored where a test runs by nohup or in the background
    """
    assert system.attempt(script).returncode == 130
    assert (system.root / "undone").exists()


def test_the_key_of_the_first_installation_is_kept_also_where_that_never_becomes_ready(system: System) -> None:
    script = """
    key=k.pub scratch="$root/scratch"; mkdir -p "$scratch"; echo "${signed_by:-first}" >"$scratch/bundle.pub"
    check_service() { :; }; wanted_version() { echo v; }; prepare_service() { :; }; settle_switch() { :; }
    serves() { return 1; }; make_user() { :; }; make_version() { :; }; pull_service_models() { :; }; rehearse() { :; }
    serve_version() { give_up "it is slow"; }
    install_service
    """
    assert system.attempt(script).returncode == 1
    kept = system.root / "etc/edged/bundle.pub"
    assert kept.read_text() == "first\n"
    assert system.attempt("signed_by=second" + script).returncode == 1
    assert kept.read_text() == "first\n", "another key is kept only once a bundle that it signed serves"


def test_an_installation_elsewhere_is_found_again_and_another_one_beside_it_is_refused(system: System) -> None:
    unit = (CHECKOUT / "systemd/edged.service").read_text().replace("/opt/edged", "/srv/edged")
    system.run('mkdir -p "$unit_dir"')
    (system.root / "etc/systemd/system/edged.service").write_text(unit)
    assert system.run('prefix=""; settle_places; echo "$prefix"') == "/srv/edged\n"
    system.run("prefix=/srv/edged; settle_places")
    (system.root / "disk").mkdir()
    (system.root / "link").symlink_to("disk")
    (system.root / "etc/systemd/system/edged.service").write_text(unit.replace("/srv/edged", f"{system.root}/link"))
    assert system.run('prefix=""; settle_places; echo "$prefix"') == f"{system.root}/disk\n"
    (system.root / "etc/systemd/system/edged.service").write_text(unit)
    refused = system.attempt("prefix=/opt/edged; settle_places")
    assert refused.returncode == 1
    assert "edged is installed in /srv/edged" in refused.stderr
    assert "Nothing was changed" in refused.stderr


@pytest.mark.parametrize(("answers", "active", "well"), [(0, 0, True), (0, 3, False), (1, 0, False)])
def test_the_service_is_well_where_edged_answers_and_the_service_runs(
    system: System, answers: int, active: int, well: bool
) -> None:
    """Somebody else's edged may answer at its port."""
    place_program(system.root / "bin/setpriv", 'shift 5; exec "$@"')
    place_program(system.root / "opt/edged/versions/v/bin/edged", f"exit {answers}")
    told = system.attempt(f"""
    export PATH="{system.root}/bin:$PATH"; prefix="$root/opt/edged"; mkdir -p "$data_dir"
    systemctl() {{ return {active}; }}
    is_well v
    """)
    assert (told.returncode == 0) == well


# --- from a bundle -----------------------------------------------------------------------------------

FROM_BUNDLE = """
export PATH="$root/bin:$PATH"; offline=yes unpacked="$root/bundle" scratch="$root/scratch" prefix="$root/opt/edged"
mkdir -p "$data_dir" "$cache_dir/models" "$unpacked/models" "$scratch"
"""


@pytest.fixture
def as_anybody(system: System) -> System:
    """What runs as edged runs as whoever tests."""
    place_program(system.root / "bin/setpriv", 'shift 5; exec "$@"')
    return system


def note_calls(system: System, *programs: str) -> Path:
    """These programs only write down how they are called, and what they read."""
    asked = system.root / "asked"
    for name in programs:
        place_program(system.root / f"bin/{name}", f'echo "{name} $*$(cat)" >>{asked}')
    return asked


def test_packages_take_no_others_away_ask_nobody_and_go_on_after_a_power_cut(system: System) -> None:
    asked = note_calls(system, "apt-get", "dpkg")
    system.run(FROM_BUNDLE + "coming=(mosquitto python3.11-venv); offline_packages < <(echo typed)")
    update, configure, mend, install = asked.read_text().splitlines()
    assert update.endswith(" update")
    assert configure == "dpkg --force-confdef --force-confold --configure -a"
    assert mend.endswith(" --fix-broken install")
    assert install.endswith(" install mosquitto python3.11-venv")
    for call in (mend, install):
        assert {"-y", "--no-remove", "Dpkg::Options::=--force-confdef", "Dpkg::Options::=--force-confold"} <= {
            *call.split()
        }


def test_so_do_packages_from_the_network(system: System) -> None:
    asked = note_calls(system, "apt-get", "dpkg")
    system.run('PATH="$root/bin:$PATH"; install_packages g++ < <(echo typed)')
    calls = asked.read_text()
    assert "typed" not in calls
    assert "dpkg --force-confdef --force-confold --configure -a\n" in calls
    assert "--no-remove" in calls.splitlines()[-1]
    assert calls.endswith(" install g++\n")


def test_when_packages_cannot_be_installed_it_says_what_apt_wanted(system: System) -> None:
    place_program(system.root / "bin/dpkg", "")
    place_program(system.root / "bin/apt-get", "echo E: Packages need to be removed but remove is disabled.; exit 100")
    told = system.attempt(FROM_BUNDLE + "coming=(mosquitto); offline_packages")
    assert told.returncode == 1
    assert "| E: Packages need to be removed" in told.stderr
    assert "Where apt says that it wanted to remove packages" in told.stderr


# A bundle for a Python that is not here, on a machine without mosquitto.
BARE_MACHINE = (
    FROM_BUNDLE
    + """
bundle=b.tar broker=local pythons=(3.99); open_bundle() { :; }
need_tool() { lacks "$1" "$2"; }; packages_wanted() { printf '%s\n' $brings; }
offline_packages() { echo "installed packages"; }
"""
)


@pytest.mark.parametrize("dry_run", ["yes", "no"])
@pytest.mark.parametrize(
    ("brings", "missing"), [("python3.99-venv", "mosquitto_passwd"), ("mosquitto", "Python"), ("", "Python")]
)
def test_what_the_bundles_packages_do_not_bring_is_named_before_they_are_installed(
    system: System, brings: str, missing: str, dry_run: str
) -> None:
    refused = system.attempt(BARE_MACHINE + f"brings='{brings}' dry_run={dry_run}; check_service")
    assert refused.returncode == 1
    assert f"   - {missing}" in refused.stderr
    assert "Nothing was changed" in refused.stderr
    assert "installed packages" not in refused.stdout


def test_what_the_bundles_packages_bring_is_not_missed_by_a_dry_run(system: System) -> None:
    said = system.run(BARE_MACHINE + "brings='python3.99-venv mosquitto' dry_run=yes; check_service")
    assert "would install from the bundle: python3.99-venv mosquitto" in said


def test_once_packages_were_installed_it_is_not_said_that_nothing_was_changed(system: System) -> None:
    refused = system.attempt(BARE_MACHINE + "brings='python3.99-venv mosquitto'; check_service")
    assert refused.returncode == 1
    assert "installed packages" in refused.stdout
    assert "Python 3.11, 3.12 or 3.13 with its venv module" in refused.stderr
    assert "Nothing was changed" not in refused.stderr
    assert "edged was left as it was" in refused.stderr


def test_offline_without_a_bundle_takes_a_version_that_is_installed_already_and_no_other(system: System) -> None:
    offline = "prefix=$root/opt/edged offline=yes; cached_wheel() { :; }; "
    refused = system.attempt(offline + "check_service")
    assert refused.returncode == 1
    assert "a bundle (--bundle FILE), or this version" in refused.stderr
    assert "Nothing was changed" in refused.stderr
    system.run(offline + "is_whole() { :; }; check_service")


@pytest.mark.parametrize(
    ("configuration", "refused"),
    [
        ('[chat]\nmodel = "other"', True),
        ('cache = "/elsewhere"\n[chat]\nmodel = "other"', True),
        ('[chat]\nmodel = "brought"', False),
        ('[chat]\nmodel = "installed"\n[embed]\nmodel = "brought"', False),
        ('[chat]\nmodel = "other"\npath = "/srv/other.gguf"', False),
        ("chat = 1", False),
        ("[chat", False),
    ],
)
def test_a_model_that_the_configuration_names_must_come_with_the_bundle_or_be_there(
    system: System, configuration: str, refused: bool
) -> None:
    """A configuration that cannot be read is for the check with the new version."""
    models = system.root / "home/models"
    models.mkdir(parents=True)
    (models / "any.gguf.json").write_text('{\n  "name": "installed",\n  "kind": "chat"\n}\n')
    system.config.write_text(f'home = "{system.root}/home"\n{configuration}')
    told = system.attempt(FROM_BUNDLE + """echo '{"models": ["brought"]}' >"$unpacked/manifest.json"; check_models""")
    assert (told.returncode == 1) == refused, told.stderr
    if refused:
        assert "names the model other, which is neither installed nor in the bundle" in told.stderr
        assert "Nothing was changed" in told.stderr


@pytest.mark.parametrize(
    ("folder", "configuration"),
    [
        ("var/lib/edged/.local/share/edged", ""),
        ("var/lib/edged/here", 'home = "~/here"\n'),
        ("ssd", 'home = "/nowhere"\ncache = "{root}/ssd"\n'),
        ("var/cache/edged", 'home = "/nowhere"\ncache = "/elsewhere"\n'),
    ],
)
def test_a_model_is_looked_for_wherever_edged_would_find_it(system: System, folder: str, configuration: str) -> None:
    models = system.root / folder / "models"
    models.mkdir(parents=True)
    (models / "any.gguf.json").write_text('{\n  "name": "there"\n}\n')
    system.config.write_text(configuration.format(root=system.root) + '[chat]\nmodel = "there"')
    system.run(FROM_BUNDLE + """echo '{"models": ["brought"]}' >"$unpacked/manifest.json"; check_models""")


def test_the_models_of_a_bundle_need_room_beside_the_version_but_for_those_that_are_there(system: System) -> None:
    """800 MB are free: enough for a version with its models, and not for one and 499 MB."""
    script = (
        FROM_BUNDLE
        + """
    df() { printf 'header\n/dev/x 1 1 819200 1%% /\n'; }
    truncate -s 499M "$unpacked/models/m-1.gguf"
    check_service_machine; echo "${missing[*]}"
    """
    )
    assert "900 MB free for the bundle's models" in system.run(script)
    (system.root / "var/cache/edged/models").mkdir(parents=True, exist_ok=True)
    cached = system.root / "var/cache/edged/models/m-1.gguf"
    cached.with_name("m-1.gguf.new").write_bytes(bytes(1 << 20))
    assert "899 MB free for the bundle's models" in system.run(script)
    cached.touch()
    assert system.run(script) == "\n"


PULL = FROM_BUNDLE + 'echo model >"$unpacked/models/m-1.gguf"; pull_service_models v\n'


def place_edged(system: System, knows: str, *, fails_in: str | None = None) -> None:
    """An edged that says which options it ``knows``, and finds a model everywhere but in one cache."""
    fails = "" if fails_in is None else f'[ "$EDGED_CACHE" != "{fails_in}" ] || exit 1; '
    place_program(
        system.root / "opt/edged/versions/v/bin/edged",
        f'case "$*" in *--help) echo "{knows}" ;; *) {fails}echo "pulled with: $*; cache: $EDGED_CACHE" ;; esac',
    )


def test_the_models_of_a_bundle_are_installed_from_where_it_put_them_and_without_the_network(
    as_anybody: System,
) -> None:
    cache = as_anybody.root / "var/cache/edged"
    as_anybody.config.write_text(f'cache = "{cache}"\n')
    place_edged(as_anybody, "--offline  Download nothing")
    assert as_anybody.run(PULL) == "pulled with: models pull --offline; cache: \n"
    assert (cache / "models/m-1.gguf").read_text() == "model\n"


def test_where_the_configuration_has_another_cache_the_bundles_is_used_for_what_is_not_there(
    as_anybody: System,
) -> None:
    as_anybody.config.write_text('cache = "/elsewhere"\n')
    place_edged(as_anybody, "--offline  Download nothing")
    assert as_anybody.run(PULL) == ""  # all was there: a copy on the cache's disk would be one too many
    place_edged(as_anybody, "--offline  Download nothing", fails_in="")
    cache = as_anybody.root / "var/cache/edged"
    assert as_anybody.run(PULL) == f"pulled with: models pull --offline; cache: {cache}\n"


def test_an_older_edged_is_not_given_an_option_that_it_does_not_know(as_anybody: System) -> None:
    place_edged(as_anybody, "--json")
    assert "pulled with: models pull;" in as_anybody.run(PULL)


def test_with_the_network_the_configured_cache_is_used(as_anybody: System) -> None:
    place_edged(as_anybody, "--offline")
    assert as_anybody.run(PULL.replace("pull_service", "offline=no unpacked=''; pull_service")) == (
        "pulled with: models pull; cache: \n"
    )


def test_a_model_that_is_there_already_stays_the_one_file_that_it_is(as_anybody: System) -> None:
    place_edged(as_anybody, "--offline")
    as_anybody.run(PULL)
    cached = as_anybody.root / "var/cache/edged/models/m-1.gguf"
    installed = as_anybody.root / "var/lib/edged/m.gguf"
    installed.hardlink_to(cached)
    as_anybody.run(PULL)
    assert installed.samefile(cached)
    as_anybody.run(PULL.replace("echo model", "echo another"))
    assert cached.read_text() == "another\n"
    assert installed.read_text() == "model\n"


def test_of_a_copy_that_fails_or_was_cut_short_nothing_is_left(as_anybody: System) -> None:
    models = as_anybody.root / "var/cache/edged/models"
    models.mkdir(parents=True)
    (models / "cut-short.gguf.new").write_text("half")
    place_program(as_anybody.root / "bin/dd", 'echo half >"${1#of=}"; exit 1')
    told = as_anybody.attempt(PULL)
    assert told.returncode == 1
    assert "could not copy the bundle's models" in told.stderr
    assert list(models.iterdir()) == []


def test_pip_takes_from_the_bundle_alone_whatever_it_is_configured_to_find(system: System) -> None:
    elsewhere = system.root / "elsewhere"
    make_wheel(system.root / "bundle/wheels", "1.0")
    make_wheel(elsewhere, "2.0")
    (system.root / "pip.conf").write_text(f"[global]\nfind-links = {elsewhere}\n")
    installed = system.root / "installed"
    place_program(system.root / "bin/python", f'exec {sys.executable} "$@" --target {installed}')
    system.run(
        FROM_BUNDLE
        + f"""
        export PIP_FIND_LINKS={elsewhere} PIP_CONFIG_FILE="$root/pip.conf"
        run_logged() {{
            case "$1" in
                venv) install -D -t "$prefix/versions/v/bin" "$root/bin/python" ;;
                pip-edged) "${{@:3}}" ;;
            esac
        }}
        mkdir -p "$state"; make_version v
        """
    )
    assert [path.name for path in installed.glob("*.dist-info")] == ["edged-1.0.dist-info"]


def make_wheel(folder: Path, version: str) -> None:
    folder.mkdir(parents=True)
    about = f"edged-{version}.dist-info"
    with zipfile.ZipFile(folder / f"edged-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: edged\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.parametrize(
    ("complaint", "refusal"),
    [
        (
            '"it is cut off"',
            "it is cut off\n   Nothing was changed. Copy or make it again; it must be signed by the key in",
        ),
        ('"it is large" "make room on that disk"', "it is large\n   Nothing was changed. Make room on that disk.\n"),
        ('"$4 is no key" "name another"', "fleet.pub is no key\n   Nothing was changed. Name another.\n"),
        ('Traceback 1 2 "MemoryError"', "Traceback\n   Nothing was changed. 1.\n   2\n   MemoryError\n"),
    ],
)
def test_a_bundle_is_refused_with_advice_for_its_case(system: System, complaint: str, refusal: str) -> None:
    (system.root / "fleet.pub").write_text("")
    place_program(system.root / "bin/checker", f"printf '%s\\n' {complaint} >&2; exit 1")
    refused = system.attempt(
        'prefix="$root/opt" bundle="$root" key=fleet.pub; cd "$root"; find_checker() { echo "$root/bin/checker"; }\n'
        "open_bundle"
    )
    assert refused.returncode == 1
    assert f"cannot be used: {refusal}" in refused.stderr


def test_a_wheel_for_x86_64_has_its_instructions_however_it_is_compiled() -> None:
    """llama.cpp's own choice depends on the environment, which the cache does not know of."""
    script = "source scripts/cross-wheel.sh; choose_target amd64; cmake_arguments"
    done = subprocess.run(["bash", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    wanted = {f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")}
    assert {"-DGGML_NATIVE=OFF", *wanted} <= {*done.stdout.split()}
    assert "ARM" not in done.stdout


# --- the rest ----------------------------------------------------------------------------------------


def test_modules_that_lie_where_the_installer_is_called_are_not_taken(system: System) -> None:
    (system.root / "ssl.py").write_text(f"open('{system.root}/taken', 'w')")
    system.run('cd "$root"; find_python python_makes_venvs')
    assert not (system.root / "taken").exists()


def test_what_runs_left_behind_is_removed_and_what_is_in_use_stays(system: System) -> None:
    (system.root / ".work.999999999.gone").mkdir()
    used = system.root / f".work.{os.getpid()}.used"
    used.mkdir()
    made = system.run('make_own_directory "$root" work').strip()
    assert sorted(system.root.glob(".work.*")) == sorted([used, Path(made)])


def test_a_data_directory_that_is_a_mount_is_emptied_and_stays(system: System) -> None:
    file = system.root / "var/lib/edged/run/lock"
    file.parent.mkdir(parents=True)
    file.write_text("")
    mounted = 'mountpoint() { [[ "$2" == "$data_dir" ]]; };'
    said = system.run(f"{mounted} getent() {{ return 2; }}; remove_data")
    assert "is a mount: remove it from /etc/fstab" in said
    assert list(file.parents[1].iterdir()) == []
    assert not system.config.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "who"),
    [
        ("status", "edged"),
        ("models import m.gguf", "edged"),
        ("models activate m --golden g.toml", "root"),
        ("docs add manual.md", "root"),
        ("profile show minute.jsonl", "root"),
        ("", "edged"),
    ],
)
def test_for_root_the_command_is_the_user_edged_but_where_it_reads_or_writes_roots_files(
    system: System, arguments: str, who: str
) -> None:
    place_program(system.root / "bin/id", "echo 0")
    place_program(system.root / "bin/setpriv", 'shift 5; WHO=edged exec "$@"')
    place_program(system.root / "opt/edged/current/bin/edged", 'echo "${WHO:-root}: $*"')
    system.run('prefix="$root/opt/edged"; mkdir -p "${command_path%/*}"; make_command')
    said = system.run(f"PATH='{system.root}/bin':$PATH; \"$command_path\" {arguments}")
    assert said == f"{who}: {arguments}\n"


def place_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
