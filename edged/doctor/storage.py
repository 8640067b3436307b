"""Checks of the disk under EDGED_HOME: room, how long a flush takes, swap, permissions, SQLite."""

import contextlib
import errno
import math
import os
import pwd
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from edged.config import Config
from edged.doctor import systemd
from edged.doctor.device import Device
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.runtime import home as homes

MEGABYTE = 1_000_000


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: where it would be made."""
    # Path.is_dir() raises for one below a folder that this user may not look into.
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # noqa: PTH112


class Servant(msgspec.Struct, frozen=True):
    """Whom edged runs as: the unit's user, or, without a unit, who looks. ``is_me``: the doctor runs as that user, so
    what the doctor may not, edged may not. ``is_given_home``: there is none yet, and systemd makes it.
    """

    user: str
    is_me: bool
    is_given_home: bool = False


def read_servant(device: Device) -> Servant:
    user, home = systemd.user_of_unit(device), device.config.home
    if user is None:
        return Servant(_user_name(os.geteuid()), is_me=True)
    return Servant(user, systemd.is_me(user), not os.path.isdir(home) and systemd.makes(device, home))  # noqa: PTH112


def hand_over(folder: str, user: str) -> str:
    """The command that makes a folder, where it is missing, and gives it to edged's user."""
    return f"sudo mkdir -p {folder} && sudo chown -R {user}: {folder} && sudo chmod u+rwx {folder}"


# --- room ------------------------------------------------------------------------------------------

LITTLE_ROOM_BYTES = 500 * MEGABYTE
NO_ROOM_BYTES = 50 * MEGABYTE  # both write-ahead logs and a backup of the databases no longer fit


class Room(msgspec.Struct, frozen=True):
    folder: str
    free_bytes: int


def read_room(device: Device) -> Room:
    folder = existing(device.config.home)
    status = os.statvfs(folder)
    return Room(str(folder), status.f_bavail * status.f_frsize)


def judge_room(facts: Room) -> Finding:
    free = f"{facts.free_bytes / MEGABYTE:.0f} MB free in {facts.folder}"
    fix = f"sudo du -xh --max-depth=2 {facts.folder} | sort -h | tail; lower events.keep_bytes and events.keep_days"
    if facts.free_bytes < NO_ROOM_BYTES:
        return fail(f"{free}: events can soon not be stored", fix)
    return warn(free, fix) if facts.free_bytes < LITTLE_ROOM_BYTES else ok(free)


# --- flushes ---------------------------------------------------------------------------------------

FLUSHES = 100  # so that the slowest one alone does not decide
FLUSH_BYTES = 4096
FLUSH_BUDGET_SECONDS = 2.0
FAST_FLUSH_SECONDS = 0.020
SLOW_FLUSH_SECONDS = 0.200
HOW_TO_MOVE = "docs/OPERATIONS.md, Moving the data"
VOLATILE = frozenset({"tmpfs", "ramfs"})


class Flushes(msgspec.Struct, frozen=True):
    """How long each flush of a written block took; ``error`` is the errno that ended it, 0 for none.

    ``folder`` is the nearest one of ``home`` that is there.
    """

    folder: str
    filesystem: str
    seconds: tuple[float, ...]
    error: int = 0
    home: str = ""
    servant: Servant = Servant("edged", is_me=False)


def read_flushes(device: Device) -> Flushes:
    folder = existing(device.config.home)
    filesystem = _mount_of(folder, _mounts(device)).filesystem
    seconds: list[float] = []
    try:
        seconds.extend(_flush_times(folder))
    except OSError as error:
        number, home = error.errno or errno.EIO, str(device.config.home)
        return Flushes(str(folder), filesystem, (), number, home, read_servant(device))
    return Flushes(str(folder), filesystem, tuple(seconds))


def _flush_times(folder: Path) -> Iterator[float]:
    """Appends to a file of ours, as a write-ahead log does. It has no name: cut off at any time, it leaves nothing."""
    block, until = os.urandom(FLUSH_BYTES), time.monotonic() + FLUSH_BUDGET_SECONDS
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(FLUSHES):
            begun = time.monotonic()
            file.write(block)
            os.fsync(file.fileno())
            yield time.monotonic() - begun
            if time.monotonic() > until:
                return


def judge_flushes(facts: Flushes) -> Finding:
    """An event is acknowledged after one flush and answered after another.

    Below 20 ms that is lost beside an answer's own time; from 200 ms on, flushes one by one allow fewer than five
    events a second, and an alarm waits longer for the disk than for the model's first word.
    """
    if facts.error in (errno.EACCES, errno.EPERM):
        return _judge_refused(facts)
    if facts.error:
        what = f"{facts.folder} cannot be written: {os.strerror(facts.error)}"
        return fail(what, "see 'sudo dmesg | tail'; after an error of the disk it may be mounted read-only")
    if facts.filesystem in VOLATILE:
        what = f"{facts.folder} is in memory ({facts.filesystem}): everything is lost when the power goes"
        return warn(what, f"move the data to a disk ({HOW_TO_MOVE})")
    p99 = percentile(facts.seconds, 0.99)
    what = f"p99 of {len(facts.seconds)} flushes {p99 * 1e3:.1f} ms, median {percentile(facts.seconds, 0.5) * 1e3:.1f}"
    fix = f"move the data to an SSD, an NVMe disk or eMMC ({HOW_TO_MOVE}); among SD cards, one of class A2"
    if p99 >= SLOW_FLUSH_SECONDS:
        return fail(what, fix)
    return warn(what, fix) if p99 >= FAST_FLUSH_SECONDS else ok(what)


def _judge_refused(facts: Flushes) -> Finding:
    user = facts.servant.user
    if facts.servant.is_given_home:
        return skip(f"{facts.home} is not there yet; systemd makes it at the first start")
    if not facts.servant.is_me:
        return skip(f"{facts.folder} is not writable for this user; run it as edged's: sudo -u {user} edged doctor")
    return fail(f"{user}, whom edged runs as, cannot write to {facts.folder}", hand_over(facts.home, user))


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank; there is at least one value."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# --- swap ------------------------------------------------------------------------------------------


class Swap(msgspec.Struct, frozen=True):
    """A swap area, and what kind of disk it is on: ``SD``, ``MMC`` (soldered eMMC), or empty for others."""

    path: str
    card: str


def read_swaps(device: Device) -> tuple[Swap, ...]:
    areas = [line.split() for line in device.read("proc/swaps").splitlines()[1:]]
    mounts = _mounts(device)
    return tuple(Swap(area[0], _card(device, area[0], area[1], mounts)) for area in areas)


def _card(device: Device, path: str, kind: str, mounts: Sequence["Mount"]) -> str:
    """A swap file is on the disk of its mount, which may be named /dev/root: the device number names it."""
    name = PurePosixPath(path).name
    if kind == "file":
        number = _mount_of(Path(path), mounts).device_number
        lines = device.read(f"sys/dev/block/{number}/uevent").splitlines()
        name = next((line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")), "")
    if not name.startswith("mmcblk"):
        return ""
    disk = name.partition("p")[0]
    return device.read(f"sys/block/{disk}/device/type") or "SD"


def judge_swaps(swaps: tuple[Swap, ...]) -> Finding:
    if not swaps:
        return ok("none")
    on_card = [swap.path for swap in swaps if swap.card == "SD"]
    if not on_card:
        return ok(", ".join(swap.path for swap in swaps))
    off = "sudo systemctl disable --now dphys-swapfile" if "/var/swap" in on_card else f"sudo swapoff {on_card[0]}"
    return warn(
        f"swap on the SD card ({', '.join(on_card)}): it wears the card out, and a swapped worker stands still",
        f"{off}, and remove it from /etc/fstab; compressed memory instead: sudo apt-get install zram-tools",
    )


class Mount(msgspec.Struct, frozen=True):
    point: str
    device_number: str
    filesystem: str


def _mounts(device: Device) -> list[Mount]:
    """proc(5), mountinfo: id, parent, major:minor, root, mount point, options, …, "-", type, source, options."""
    found = []
    for line in device.read("proc/self/mountinfo").splitlines():
        fields = line.split()
        found.append(Mount(fields[4].replace("\\040", " "), fields[2], fields[fields.index("-") + 1]))
    return found


def _mount_of(path: Path, mounts: Sequence[Mount]) -> Mount:
    """The innermost mount that holds the path; of several in one place the last covers the others."""
    around = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(around), key=lambda mount: len(mount.point), default=Mount("/", "", ""))


# --- permissions -----------------------------------------------------------------------------------

OTHERS_READ = stat.S_IROTH
OTHERS_WRITE = stat.S_IWOTH


class Kept(msgspec.Struct, frozen=True):
    """A file or folder of the home: its mode's permission bits and its owner's user id."""

    path: str
    mode: int
    owner: int


class Permissions(msgspec.Struct, frozen=True, kw_only=True):
    """What is there of the home, and whether ``others_reach_home`` through the folders above it.

    ``owner_name`` is the home's owner's; ``user`` is the id of who looks. ``refusal`` says why who looks could not use
    the home, at ``place``.
    """

    home: Kept | None
    files: tuple[Kept, ...] = ()
    key: Kept | None = None
    others_reach_home: bool = True
    owner_name: str = ""
    user: int = 0
    place: str = ""
    refusal: str = ""
    servant: Servant = Servant("edged", is_me=False)


def read_permissions(device: Device) -> Permissions:
    config, servant = device.config, read_servant(device)
    home, place = _kept(config.home), str(config.home)
    refusal = next((error.message for error in homes.refusals(config)), "")
    if home is None:
        return Permissions(home=None, place=place, refusal=refusal, servant=servant)
    files = [_kept(file) for file in _private_files(config)]
    return Permissions(
        home=home,
        files=tuple(file for file in files if file is not None),
        key=_kept(config.api_key_path),
        others_reach_home=all(folder.stat().st_mode & stat.S_IXOTH for folder in config.home.absolute().parents),
        owner_name=_user_name(home.owner),
        user=os.geteuid(),
        place=place,
        refusal=refusal,
        servant=servant,
    )


def _private_files(config: Config) -> list[Path]:
    databases = [config.events_db, config.knowledge_db]
    logs = [file.with_name(file.name + ending) for file in databases for ending in ("-wal", "-shm")]
    return [*databases, *logs, config.models_dir, config.run_dir]


def _kept(path: Path) -> Kept | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return Kept(str(path), stat.S_IMODE(status.st_mode), status.st_uid)


def _user_name(user: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return str(user)


def judge_permissions(facts: Permissions) -> Finding:
    home, servant = facts.home, facts.servant
    if servant.is_given_home:
        return skip("the home is not there yet; systemd makes it at the first start")
    if facts.refusal and servant.is_me and (home is None or home.owner != facts.user):  # of one's own, 'disk' knows why
        return fail(f"{facts.refusal}, and edged runs as {servant.user}", hand_over(facts.place, servant.user))
    if home is None:
        return skip("the home is not there yet, or not for this user; it is made at the first start")
    good = ok(f"{home.path} is {facts.owner_name}'s alone")
    if facts.user not in (0, home.owner) and not servant.is_me:
        good = skip(f"the home is edged's, not this user's: sudo -u {servant.user} edged doctor sees all of it")
    return next(_too_open(facts, home), good)


def _too_open(facts: Permissions, home: Kept) -> Iterator[Finding]:
    """What others can do that they should not, and what edged cannot do that it must, the worst first."""
    if facts.key is not None and facts.key.mode & (OTHERS_READ | OTHERS_WRITE):
        yield fail(f"everybody on this device can read the API key {facts.key.path}", f"chmod 640 {facts.key.path}")
    others_enter = facts.others_reach_home and home.mode & stat.S_IXOTH
    exposed = (home, *facts.files) if others_enter else ()
    writable = [entry.path for entry in exposed if entry.mode & OTHERS_WRITE]
    if writable:
        yield fail(f"everybody on this device can change {', '.join(writable)}", f"chmod o-w {' '.join(writable)}")
    foreign = [file.path for file in facts.files if file.owner != home.owner]
    if foreign:
        what = f"{', '.join(foreign)}: not of {facts.owner_name}, whose the home is; edged was once run as another user"
        yield fail(what, f"sudo chown -R {facts.owner_name}: {home.path}")
    readable = [file.path for file in exposed if file.mode & OTHERS_READ and file.path.endswith((".db", ".db-wal"))]
    if readable:
        what = f"everybody on this device can read {', '.join(readable)}: documents, events and answers"
        yield warn(what, f"chmod o-rwx {home.path}")


# --- SQLite ----------------------------------------------------------------------------------------

OLDEST_SQLITE = (3, 37, 0)  # STRICT tables


class Sqlite(msgspec.Struct, frozen=True):
    version: tuple[int, ...]
    has_fts5: bool


def read_sqlite(_device: Device) -> Sqlite:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("CREATE VIRTUAL TABLE probe USING fts5(text)")
        except sqlite3.OperationalError:
            return Sqlite(sqlite3.sqlite_version_info, has_fts5=False)
    return Sqlite(sqlite3.sqlite_version_info, has_fts5=True)


def judge_sqlite(facts: Sqlite) -> Finding:
    version = ".".join(map(str, facts.version))
    fix = "use the system's Python (Debian 12 and later): sudo apt-get install python3 python3-venv, then install again"
    if facts.version < OLDEST_SQLITE:
        return fail(f"SQLite {version} is older than {'.'.join(map(str, OLDEST_SQLITE))}", fix)
    if not facts.has_fts5:
        return fail(f"SQLite {version} was built without FTS5, the keyword index", fix)
    return ok(f"SQLite {version} with FTS5")
