"""Power cuts: the board dies at random moments while events and documents pour in, and nothing acknowledged is lost.

Broker, sensors and people live outside. One board goes through all cuts; the tests look at what came of it. Its last
boot is recorded write by write, and replayed as disks that lost what had not been flushed.
"""

import json
import random
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import httpx
import pytest

from tests.broker import Mosquitto
from tests.device.board import Board, Hardware, check_file_system, flatten, read_file
from tests.device.conftest import MakeBoard
from tests.device.installed import BROKER_PORT, HTTP_PORT
from tests.device.load import ANSWER_TOPIC, Kind, Ledger, Load, first_word, last_word
from tests.device.stores import DATABASES, FILES, HOME, SOUND, Stores
from tests.device.writes import SUPERBLOCK, read_record, replay
from tests.ports import find_free_port

pytestmark = [pytest.mark.timeout(5 * 3600), pytest.mark.broker, pytest.mark.prepares(amd64=10, arm64=30)]

CUTS = 5
LONG_CUTS = 25
REPLAYS = 6
LONG_REPLAYS = 60
READY_SECONDS = 900.0
BUSY_EVENTS = 20
"""A cut under load comes after at most so many events."""
CLOCK_SLACK_WRITES = 16
"""Requests on their way at one time: their entries in the record may be counted in another order."""


class Phase(Enum):
    """What the board is doing when the power goes."""

    BOOTING = "the kernel or systemd starts"
    STARTING = "edged starts"
    CATCHING_UP = "the broker hands over what waited"
    BUSY = "events and documents pour in"


def phases(count: int, chance: random.Random) -> list[Phase]:
    """Each as often as the others, in any order."""
    planned = [list(Phase)[number % len(Phase)] for number in range(count)]
    chance.shuffle(planned)
    return planned


@dataclass
class Course:
    """A board on its way through the cuts, and what is found after each."""

    board: Board
    load: Load
    ledger: Ledger
    chance: random.Random
    flaws: list[str] = field(default_factory=list)
    ready_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The first boot: HTTP is opened to the outside, and the load begins."""
        self.board.boot()
        listen = 's/^.http.$/&\\nlisten = "0.0.0.0:3000"/'
        began = time.monotonic()
        self.board.run(
            f"sed -i '{listen}' /etc/edged/edged.toml && systemctl restart edged", timeout_seconds=READY_SECONDS
        )
        self.wait_until_ready()
        self.ready_seconds = time.monotonic() - began
        self.load.start(self.board.port(HTTP_PORT), self.board.run("cat /etc/edged/api-key").strip())

    def cut(self, phase: Phase) -> None:
        """Cut the power now; what was seen until then is shown when a test fails."""
        self.board.cut_power()
        seen = ", ".join(f"{len(self.ledger.names(kind))} {kind.value}" for kind in Kind)
        print(f"{time.monotonic() - self.began:.0f} s: power cut while {phase.value}; {seen}")  # noqa: T201

    def cut_when(self, phase: Phase) -> None:
        """From switched on to switched off."""
        match phase:
            case Phase.BOOTING:
                self.board.switch_on()
                self.let_pass(self.board.boot_seconds[0])
            case Phase.STARTING:
                self.board.boot()
                self.let_pass(self.ready_seconds)
            case Phase.CATCHING_UP:
                accepted = len(self.ledger.names(Kind.ACCEPTED))
                self.board.switch_on()
                self.ledger.wait_until(Kind.ACCEPTED, accepted + 1, seconds=READY_SECONDS)
                self.let_pass(2.0)
            case Phase.BUSY:
                self.come_back()
                self.be_busy()
        self.cut(phase)

    def come_back(self, *, record: Path | None = None) -> None:
        """Boot, be ready without a hand, and look at both databases."""
        self.board.boot(record_writes=record)
        self.wait_until_ready()
        self.look()

    def be_busy(self) -> None:
        """Until some more events and a document were acknowledged, and a moment longer."""
        for kind, more in ((Kind.STORED, 1), (Kind.ACCEPTED, self.chance.randrange(1, BUSY_EVENTS))):
            self.ledger.wait_until(kind, len(self.ledger.names(kind)) + more, seconds=READY_SECONDS)
        self.let_pass(1.0)

    def look(self) -> None:
        for name in DATABASES:
            told = self.board.run(f"sqlite3 -cmd '.timeout 10000' {HOME}/{name} '{SOUND}'")
            self.flaws += [] if told == "ok\n" else [f"boot {len(self.board.boot_seconds)}, {name}: {told}"]

    def let_pass(self, most_seconds: float) -> None:
        self.board.expect_running(self.chance.uniform(0.0, most_seconds))

    def wait_until_ready(self) -> None:
        wait_until_ready(self.board)


def wait_until_ready(board: Board) -> None:
    """Return when it says that it takes questions. Nobody does anything for that."""
    deadline = time.monotonic() + READY_SECONDS
    while not _is_ready(board):
        board.expect_running()
        assert time.monotonic() < deadline, board.attempt("edged status; journalctl -u edged -n 40 -o cat").stdout


def _is_ready(board: Board) -> bool:
    address = f"http://127.0.0.1:{board.port(HTTP_PORT)}/health/ready"
    try:
        return httpx.get(address, timeout=5.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Aftermath:
    """What is left when it is over: all that was sent and acknowledged, the databases, and the last boot's record."""

    course: Course
    stores: Stores
    record: Path
    disk_before_record: Path


@pytest.fixture(scope="module")
def chance() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - shown when a test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, chance: random.Random) -> Iterator[Load]:
    mosquitto = Mosquitto(tmp_path_factory.mktemp("broker"), find_free_port())
    mosquitto.start()
    load = Load(mosquitto.port, Ledger(), chance.randrange(1 << 32))
    yield load
    load.close()
    mosquitto.stop()


@pytest.fixture(scope="module")
def aftermath(
    make_board: MakeBoard,
    installed_disk: Path,
    load: Load,
    chance: random.Random,
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Aftermath:
    """The cuts, one after the other, and the end: all events answered, edged stopped, its databases fetched."""
    folder = tmp_path_factory.mktemp("aftermath")
    hardware = Hardware(serves=(HTTP_PORT,), reaches={BROKER_PORT: load.tap_port})
    course = Course(make_board(hardware, disk=installed_disk), load, load.ledger, chance)
    cuts = LONG_CUTS if pytestconfig.getoption("long") else CUTS
    return go_through(course, phases(cuts - 2, chance), folder)


def go_through(course: Course, planned: Sequence[Phase], folder: Path) -> Aftermath:
    """A cut in each phase, before them one in the first boot's load, and after them one in a recorded boot's."""
    board, record = course.board, folder / "writes.log"
    course.begin()
    course.be_busy()
    course.cut(Phase.BUSY)
    for phase in planned:
        course.cut_when(phase)
    course.ledger.clock = lambda: count_entries(record) + CLOCK_SLACK_WRITES
    course.come_back(record=record)
    course.be_busy()
    course.cut(Phase.BUSY)
    flatten(board.disk_before_record, folder / "before.raw")
    course.come_back()
    course.load.stop(answered_within_seconds=READY_SECONDS)
    fetch_stores(board, folder)
    board.discard()
    return Aftermath(course, Stores(folder), record, folder / "before.raw")


def fetch_stores(board: Board, folder: Path) -> None:
    board.run("systemctl stop edged")
    for name in DATABASES:
        board.pull(f"{HOME}/{name}", folder / name)


def count_entries(record: Path) -> int:
    """How many requests a record has by now."""
    with record.open("rb") as file:
        try:
            return int(SUPERBLOCK.unpack(file.read(SUPERBLOCK.size))[2])
        except struct.error:  # nothing was written yet
            return 0


# --- what came of it ------------------------------------------------------------------------------------


def test_both_databases_are_sound_after_each_power_cut(aftermath: Aftermath) -> None:
    assert aftermath.course.flaws == []
    assert aftermath.stores.flaws() == []


def test_every_event_has_exactly_one_outcome_and_repetitions_are_identical(aftermath: Aftermath) -> None:
    load, stores = aftermath.course.load, aftermath.stores
    topics = {f"{ANSWER_TOPIC}/{number}" for number in range(load.published)}
    assert aftermath.course.ledger.names(Kind.ACCEPTED) == topics
    assert stores.events() == dict.fromkeys(topics, 1)
    assert load.answers == {topic: {body} for topic, body in stores.answers().items()}
    assert load.answers.keys() == topics


def test_some_events_were_answered_by_the_model(aftermath: Aftermath) -> None:
    steps = {json.loads(body)["step"] for body in aftermath.stores.answers().values()}
    assert steps & {"generated", "unverified"}
    assert steps & {"passages", "not_found"}


def test_documents_answered_with_success_are_there_and_found_and_no_document_is_there_in_part(
    aftermath: Aftermath,
) -> None:
    sent, stored = aftermath.course.load.documents, aftermath.stores.documents()
    assert aftermath.course.ledger.names(Kind.STORED) <= stored.keys()
    assert stored.items() <= sent.items()
    for name in stored:
        number = int(name.removeprefix("d"))
        assert aftermath.stores.holding(first_word(number)) == {name}
        assert aftermath.stores.holding(last_word(number)) == {name}


def test_a_disk_that_lost_what_was_not_flushed_holds_all_that_was_acknowledged(
    aftermath: Aftermath, chance: random.Random, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    writes = len(read_record(aftermath.record))
    count = LONG_REPLAYS if pytestconfig.getoption("long") else REPLAYS
    for cut in sorted(chance.sample(range(writes + 1), count)):
        stores = stores_at(aftermath, cut, tmp_path / "disk.raw", tmp_path / f"stores-{cut}")
        assert stores.flaws() == [], f"after {cut} of {writes} writes"
        assert lost(aftermath.course, stores, cut) == set(), f"after {cut} of {writes} writes"


@pytest.mark.long
def test_a_disk_that_lost_what_was_not_flushed_boots_and_serves(
    aftermath: Aftermath, make_board: MakeBoard, load: Load, chance: random.Random, tmp_path: Path
) -> None:
    writes = len(read_record(aftermath.record))
    replay(aftermath.record, aftermath.disk_before_record, tmp_path / "disk.raw", cut=writes * 3 // 4, seed=1)
    board = make_board(Hardware(serves=(HTTP_PORT,), reaches={BROKER_PORT: load.tap_port}), disk=tmp_path / "disk.raw")
    board.boot()
    wait_until_ready(board)
    board.discard()


def stores_at(aftermath: Aftermath, cut: int, disk: Path, folder: Path) -> Stores:
    """The databases on a disk whose power went after ``cut`` requests of the recorded boot."""
    replay(aftermath.record, aftermath.disk_before_record, disk, cut=cut, seed=cut)
    assert check_file_system(disk) in {0, 1}
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(read_file(disk, f"{HOME}/{name}"))
    return Stores(folder)


def lost(course: Course, stores: Stores, cut: int) -> set[str]:
    """What was acknowledged before the cut and is not there, or is there otherwise than it was told."""
    accepted, answered, stored = (course.ledger.names(kind, until=cut) for kind in Kind)
    answers, documents = stores.answers(), stores.documents()
    return {
        *(topic for topic in accepted if stores.events()[topic] != 1),
        *(topic for topic in answered if {answers.get(topic)} != course.load.answers[topic]),
        *(name for name in stored if documents.get(name) != course.load.documents[name]),
    }
