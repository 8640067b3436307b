"""edged as a service on a board: installed without a network, kept alive, upgraded with a way back, removed.

The board is installed once; the tests boot copies of its disk, whatever their order.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.broker import Mosquitto
from tests.device.board import Board, Image
from tests.device.bundle import pack, write_manifest
from tests.device.conftest import Boot
from tests.device.installed import (
    ANSWER_SECONDS,
    INSTALL_SECONDS,
    QUESTION,
    READY_SECONDS,
    install,
    other_than,
    reload_with,
    show,
    wait_until,
    wait_until_ready,
)
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.timeout(5400)

VERSION_AND_STATE = (
    "readlink /opt/edged/current; sha256sum /etc/edged/*; sqlite3 /var/lib/edged/events.db 'PRAGMA user_version'"
)
CANNOT_START = """

async def _migrate(config: Config) -> None:
    await (await Inbox.open(config.events_db)).close()


def serve(config: Config, read_again: Callable[[], Config]) -> int:
    asyncio.run(_migrate(config))
    raise RuntimeError("this version cannot start")
"""


@pytest.fixture(scope="module")
def broken(share: Path, board_image: Image) -> Path:
    """A bundle whose edged cannot start; the board sees it as /mnt/share/broken."""
    broken = shutil.copytree(share / "bundle", share / "broken")
    spoil(next((broken / "wheels").glob("edged-*.whl")))
    write_manifest(broken, board_image.architecture)
    return broken


def spoil(wheel: Path) -> None:
    """An edged that passes its own check, brings the stores to a new schema, and then ends."""
    with zipfile.ZipFile(wheel, "a") as archive:
        migrations = [name for name in archive.namelist() if name.startswith("edged/events/migrations/")]
        archive.writestr(f"edged/events/migrations/{len(migrations) + 1:04d}_newer.sql", "CREATE TABLE newer (n);\n")
        daemon = archive.read("edged/daemon.py").decode() + CANNOT_START
    without(wheel, "edged/daemon.py")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("edged/daemon.py", daemon)


def without(archive: Path, name: str) -> None:
    """The same archive less one member."""
    copy = archive.with_suffix(".copy")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            if member.filename != name:
                target.writestr(member, source.read(member))
    copy.replace(archive)


@pytest.fixture
def board(installed_board: Board) -> Board:
    """The installed board, ready."""
    wait_until_ready(installed_board)
    return installed_board


# --- it serves ---------------------------------------------------------------------------------------


@pytest.mark.essential
def test_a_question_by_mqtt_is_answered_from_the_documents(board: Board, broker: Mosquitto) -> None:
    board.run("edged docs add /mnt/share/manual.md", timeout_seconds=READY_SECONDS)
    wait_until(board, 'edged status | grep -q "mqtt: *connected"')
    with MqttClient(broker.port, "sensor", "edged/answer/q1") as sensor:
        sensor.publish("edged/query", {"id": "q1", "query": QUESTION})
        answer = json.loads(sensor.messages.get(timeout=ANSWER_SECONDS).payload)
    assert "dry" in json.dumps(answer)


def test_the_service_is_confined_and_its_secrets_are_for_it_alone(board: Board) -> None:
    board.run("systemd-analyze security --threshold=20 --no-pager edged.service")
    modes = board.run("stat -c '%a %U:%G' /etc/edged/api-key /etc/edged/edged.toml /var/lib/edged /var/lib/edged/run")
    assert modes.split("\n")[:4] == ["640 root:edged", "640 root:edged", "750 edged:edged", "700 edged:edged"]
    uid = board.run(f"stat -c %U /proc/{show(board, 'MainPID')}").strip()
    assert uid == "edged"


def test_log_lines_have_their_values_as_fields_of_the_journal(board: Board) -> None:
    line = board.run("journalctl --unit edged --output json --lines 1 EDGED_EVENT=ready")
    entry = json.loads(line)
    assert entry["PRIORITY"] == "6"
    assert float(entry["EDGED_SECONDS"]) > 0
    assert entry["_SYSTEMD_SLICE"] == "edged.slice"


# --- it is kept alive --------------------------------------------------------------------------------


def test_a_daemon_that_hangs_is_started_again_and_tells_where_it_hung(board: Board) -> None:
    before = show(board, "MainPID")
    board.run(f"kill -STOP {before}")
    wait_until(board, other_than(before))
    wait_until_ready(board)
    said = board.run(f"journalctl --unit edged --output cat _PID={before} + UNIT=edged.service")
    assert "most recent call first" in said
    assert "Failed with result 'watchdog'" in said


def test_after_a_kill_it_serves_again_and_leaves_nothing_behind(board: Board) -> None:
    board.run("pgrep -f edged.engine > /run/workers-before")
    before = show(board, "MainPID")
    board.run(f"kill -KILL {before}")
    wait_until(board, other_than(before))
    wait_until_ready(board)
    board.run("! pgrep -f edged.engine | grep -qxFf /run/workers-before")


def test_stopped_it_leaves_no_process_and_no_socket(board: Board) -> None:
    board.run("systemctl stop edged")
    try:
        assert board.run("pgrep -u edged || true") == ""
        assert board.run("ls /var/lib/edged/run") == "lock\nready\n"
        assert board.run("edged cleanup") == "removed: 0 sockets, 0 workers, 0 cgroups\n"
    finally:
        board.run("systemctl start edged", timeout_seconds=READY_SECONDS)


# --- it takes a new configuration ----------------------------------------------------------------------


def test_a_wrong_configuration_leaves_the_old_in_force_and_says_so(board: Board) -> None:
    before = show(board, "MainPID")
    try:
        reload_with(board, "$a nonsense = 1")
        wait_until(board, "systemctl show --property StatusText edged | grep -q config_refused")
        board.run("! edged check | grep -q .")
    finally:
        reload_with(board, "/^nonsense/d")
    wait_until(board, "systemctl show --property StatusText edged | grep -qv config_refused")
    assert show(board, "MainPID") == before


def test_a_setting_that_needs_a_restart_is_named(board: Board) -> None:
    try:
        reload_with(board, "$a [chat]\\nthreads = 1")
        wait_until(board, "edged status | grep -q chat.threads")
    finally:
        reload_with(board, "/^.chat.$/,$d")
    wait_until(board, "systemctl show --property StatusText edged | grep -qv restart_needed")


def test_with_socket_activation_a_request_starts_the_service_and_waits_for_it(board: Board) -> None:
    board.run(
        "systemctl stop edged && systemctl enable --now edged.socket && systemctl start edged",
        timeout_seconds=READY_SECONDS,
    )
    try:
        wait_until_ready(board)
        board.run("systemctl stop edged.service")
        body = board.run(
            "python3 -c 'import urllib.request as r; print(r.urlopen(\"http://127.0.0.1:3000/health/live\").status)'",
            timeout_seconds=READY_SECONDS,
        )
        assert body == "200\n"
        assert show(board, "TriggeredBy") == "edged.socket"
    finally:
        board.run("systemctl disable --now edged.socket && systemctl restart edged", timeout_seconds=READY_SECONDS)


MOVE = """
systemctl stop edged.socket edged
mv /var/lib/edged /srv/edged && mkdir /var/lib/edged
echo '/srv/edged /var/lib/edged none bind,nofail 0 0' >>/etc/fstab
systemctl daemon-reload && mount /var/lib/edged
systemctl start edged
"""
MOVE_BACK = """
systemctl stop edged && umount /var/lib/edged
sed -i '/^.srv.edged/d' /etc/fstab && systemctl daemon-reload
rmdir /var/lib/edged && mv /srv/edged /var/lib/edged
systemctl start edged
"""


def test_the_data_are_moved_by_a_mount_and_another_home_is_warned_of(board: Board) -> None:
    board.run(MOVE, timeout_seconds=READY_SECONDS)
    try:
        wait_until_ready(board)
        assert "var-lib-edged.mount" in show(board, "Requires")
        board.run("test -S /srv/edged/profile.sock && test -s /srv/edged/events.db")
    finally:
        board.run(MOVE_BACK, timeout_seconds=READY_SECONDS)
    wait_until_ready(board)
    board.run("sed 's|^home = .*|home = \"/srv/edged\"|' /etc/edged/edged.toml >/run/elsewhere.toml")
    board.run("install -d -o edged -g edged /srv/edged")
    try:
        told = board.run("EDGED_CONFIG=/run/elsewhere.toml edged check")
    finally:
        board.run("rm -r /srv/edged")
    assert "cannot write to home = /srv/edged" in told


# --- it is upgraded and removed --------------------------------------------------------------------------


def test_a_second_run_changes_nothing(board: Board) -> None:
    before = show(board, "MainPID")
    told = install(board, "--bundle", "/mnt/share/bundle")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "is installed and serves" in told.stdout
    assert show(board, "MainPID") == before


def test_an_option_that_the_configuration_does_not_say_is_refused_with_what_to_set(board: Board) -> None:
    before = show(board, "MainPID")
    told = install(board, "--bundle", "/mnt/share/bundle", "--broker", "local")
    assert told.returncode == 1
    assert "Nothing was changed" in told.stderr
    assert 'password_file = "/etc/edged/mqtt-password"' in told.stderr
    board.run("test ! -e /etc/edged/mqtt-password")
    assert show(board, "MainPID") == before


def test_a_tampered_bundle_installs_nothing(board: Board, share: Path, tmp_path: Path) -> None:
    """Of a bundle cut off, and of one with a byte changed."""
    whole = pack(share / "bundle", tmp_path / "bundle.tar")
    cut = share / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:-5_000_000])
    changed = shutil.copytree(share / "bundle", share / "changed", dirs_exist_ok=True)
    wheel = next((changed / "wheels").glob("edged-*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"?")
    before = board.run("ls /opt/edged/versions; readlink /opt/edged/current")
    for bundle in ("cut.tar", "changed"):
        told = install(board, "--bundle", f"/mnt/share/{bundle}")
        assert told.returncode == 1
        assert "cannot be used" in told.stderr
        assert "Nothing was changed" in told.stderr
    assert board.run("ls /opt/edged/versions; readlink /opt/edged/current") == before


@pytest.mark.takes(amd64=8, arm64=14)
def test_an_upgrade_that_cannot_start_leaves_the_old_version_serving_on_its_own_stores(
    boot: Boot, installed_disk: Path, broken: Path
) -> None:
    board = boot(installed_disk, reaches_broker=False)
    wait_until_ready(board)
    before = board.run(VERSION_AND_STATE)
    told = install(board, "--bundle", f"/mnt/share/{broken.name}")
    assert told.returncode == 1
    assert "this version cannot start" in told.stderr
    assert "serves again" in told.stderr
    wait_until_ready(board)
    assert board.run(VERSION_AND_STATE) == before
    assert len(board.run("ls /opt/edged/versions").split()) == 1
    board.discard()


@pytest.mark.takes(amd64=12, arm64=20)
def test_after_a_power_cut_in_an_upgrade_that_cannot_start_another_run_goes_back(
    boot: Boot, installed_disk: Path, broken: Path
) -> None:
    board = boot(installed_disk, reaches_broker=False)
    wait_until_ready(board)
    before = board.run(VERSION_AND_STATE)
    options = f"--bundle /mnt/share/{broken.name}"
    board.run(f"cd /mnt/share; setsid nohup ./install-edge.sh {options} </dev/null >/root/upgrade.log 2>&1 &")
    old, _, _ = before.partition("\n")
    failed = "systemctl show --property NRestarts --value edged | grep -qvx 0"
    wait_until(board, f"! readlink /opt/edged/current | grep -qx {old} && {failed}", seconds=INSTALL_SECONDS)
    board.cut_power()
    board.boot()
    board.mount("share")
    wait_until(board, failed)
    told = install(board, options)
    assert told.returncode == 1
    assert "serves again" in told.stderr
    wait_until_ready(board)
    assert board.run(VERSION_AND_STATE) == before
    assert not board.run("ls -A /var/lib/edged | grep before || true")
    board.discard()


def test_uninstall_leaves_data_and_purge_leaves_nothing(boot: Boot, installed_disk: Path) -> None:
    board = boot(installed_disk, reaches_broker=False)
    wait_until_ready(board)
    assert install(board, "--uninstall").returncode == 0
    left = "find /etc /opt /usr /var /run -iname '*edged*' -not -path '/var/log/*'"
    for path in board.run(left).split():
        assert path.startswith(("/etc/edged", "/var/lib/edged", "/var/cache/edged")), path
    board.run("test -s /etc/edged/api-key && test -s /var/lib/edged/events.db")
    assert install(board, "--uninstall", "--purge").returncode == 0
    assert board.run(left) == ""
    assert board.attempt("getent passwd edged").returncode == 2
    assert board.run("systemctl is-system-running").strip() == "running"
    board.discard()
