"""Fixtures for tests on an emulated board. They run when a board is chosen: ``just device amd64``."""

import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.broker import Mosquitto
from tests.device.board import Architecture, Board, BoardError, Hardware, Image, flatten
from tests.device.choice import Facts, minutes_needed, obstacle, read_facts
from tests.device.installed import BROKER_PORT, install_from_bundle, make_share
from tests.ports import find_free_port

MakeBoard = Callable[..., Board]
Boot = Callable[..., Board]


FACTS = pytest.StashKey[Facts]()
BEGUN = pytest.StashKey[set[tuple[Architecture, Path]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGUN] = set()
    if config.getoption("board", None) is not None:
        config.stash[FACTS] = read_facts()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that needs a board is one for each board chosen."""
    if "board_image" in metafunc.fixturenames:
        boards: list[Architecture | None] = [*_boards(metafunc.config)] or [None]
        metafunc.parametrize("board_image", boards, indirect=True, scope="session", ids=lambda name: name or "no board")


def _boards(config: pytest.Config) -> list[Architecture]:
    chosen: Architecture | Literal["auto"] | None = config.getoption("board", None)
    match chosen:
        case None:
            return []
        case "auto":
            return ["amd64", "arm64"]
        case _:
            return [chosen]


def _board_of(item: pytest.Item) -> Architecture | None:
    """The board that a test was made for."""
    board: Architecture | None = item.callspec.params.get("board_image") if hasattr(item, "callspec") else None
    return board


def _needs_board(item: pytest.Item) -> bool:
    return "board_image" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)  # after they were put into a random order
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a board come last and are skipped where there is none; long ones where they are not asked for."""
    for item in items:
        board = _board_of(item)
        if _needs_board(item) and board is None:
            item.add_marker(pytest.mark.skip(reason="no board is chosen: just device amd64|arm64"))
        elif board is not None and (reason := obstacle(board, config.stash[FACTS])) is not None:
            item.add_marker(pytest.mark.skip(reason=f"no {board} board: {reason}"))
        if item.get_closest_marker("long") and not config.getoption("long", default=False):
            item.add_marker(pytest.mark.skip(reason="takes hours: just device-long"))
    _put_boards_last(items)


def _put_boards_last(items: list[pytest.Item]) -> None:
    """Board by board, module by module; those that matter most first, for as long as the time lasts."""
    boards = [None, "amd64", "arm64"]
    modules = list(dict.fromkeys(item.path for item in items))
    essential = {item.path for item in items if item.get_closest_marker("essential")}

    def rank(item: pytest.Item) -> tuple[int, bool, int, bool]:
        if not _needs_board(item):
            return (0, False, 0, False)
        module = modules.index(item.path)
        return (
            boards.index(_board_of(item)),
            item.path not in essential,
            module,
            item.get_closest_marker("essential") is None,
        )

    items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No test is begun that would not end in time."""
    board, until = _board_of(item), item.config.getoption("board_until", None)
    if board is None:
        return
    begun = item.config.stash[BEGUN]
    if until is not None:
        left = (until - time.time()) / 60
        needed = minutes_needed(
            board,
            item.config.stash[FACTS],
            {board for board, _ in begun},
            itself=_minutes(item, "takes", board),
            preparing=0.0 if (board, item.path) in begun else _minutes(item, "prepares", board) or 0.0,
        )
        if left < needed:
            pytest.skip(f"{item.name}: it may take {needed:.0f} min, and {max(left, 0):.0f} are left for boards")
    begun.add((board, item.path))


def _minutes(item: pytest.Item, name: str, board: Architecture) -> float | None:
    """What a marker says of this board."""
    marker = item.get_closest_marker(name)
    return None if marker is None else float(marker.kwargs[board])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its boards printed last, and the service's last lines where one still answers."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for board in (value for value in item.funcargs.values() if isinstance(value, Board)):
            boots = ", ".join(f"{seconds:.0f} s" for seconds in board.boot_seconds)
            report.sections.append((f"{board.console}; boots: {boots}", board.last_console_lines()))
            report.sections.append(("edged on the board", _last_journal_lines(board)))
    return report


def _last_journal_lines(board: Board) -> str:
    try:
        return board.attempt("journalctl --unit edged --lines 60 --output short-monotonic", timeout_seconds=30).stdout
    except subprocess.TimeoutExpired as error:
        return str(error)


@pytest.fixture(scope="session")
def board_image(request: pytest.FixtureRequest) -> Image:
    """The chosen board's Debian, made when it is not in the cache. Whoever named no board can do without."""
    try:
        return Image.cached_or_made(request.param)
    except BoardError as error:
        if request.config.getoption("board") == "auto":
            pytest.skip(str(error))
        pytest.fail(str(error))


@pytest.fixture(scope="module")
def make_board(board_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeBoard]:
    """``make_board(Hardware(...), disk=None)``: one for the tests of this module, switched off. Its logs outlive it."""
    made: list[Board] = []

    def make(hardware: Hardware | None = None, *, disk: Path | None = None) -> Board:
        made.append(Board(board_image, tmp_path_factory.mktemp("board"), hardware, disk=disk))
        return made[-1]

    yield make
    for board in made:
        board.discard()


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Where a record of writes may go."""
    return tmp_path / "writes.log"


# --- with edged installed ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def share(board_image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every board sees at /mnt/share: the installer, one bundle, a manual."""
    return make_share(board_image.architecture, tmp_path_factory.mktemp("share"))


@pytest.fixture(scope="session")
def installed_disk(board_image: Image, share: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of a board whose power was cut once the installer said that edged is ready. Boards boot copies of it."""
    folder = tmp_path_factory.mktemp("installed")
    board = Board(board_image, folder, Hardware(shares={"share": share}))
    try:
        install_from_bundle(board)
        board.cut_power()
        flatten(board.disk, folder / "disk.raw")
    finally:
        board.discard()
    return folder / "disk.raw"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """The sensors' broker, outside the board."""
    mosquitto = Mosquitto(tmp_path_factory.mktemp("broker"), find_free_port())
    mosquitto.start()
    yield mosquitto
    mosquitto.stop()


@pytest.fixture(scope="module")
def boot(make_board: MakeBoard, share: Path, broker: Mosquitto) -> Boot:
    """``boot(disk, reaches_broker=True)``: a board that sees the share, from a disk or (None) from the bare image.

    Copies of one disk have one name at the broker: only one at a time may reach it.
    """

    def boot(disk: Path | None, *, reaches_broker: bool = True) -> Board:
        reaches = {BROKER_PORT: broker.port} if reaches_broker else {}
        board = make_board(Hardware(serves=(BROKER_PORT,), reaches=reaches, shares={"share": share}), disk=disk)
        board.boot()
        board.mount("share")
        return board

    return boot


@pytest.fixture(scope="module")
def installed_board(boot: Boot, installed_disk: Path) -> Board:
    """A board of this module's own with edged installed."""
    return boot(installed_disk)
