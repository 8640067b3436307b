"""Fixtures for tests on an emulated board. They run when a board is chosen: ``just device amd64``."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.device.board import Board, BoardError, Hardware, Image

MakeBoard = Callable[..., Board]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--board", choices=("amd64", "arm64"), help="the emulated board to test on")
    parser.addoption("--long", action="store_true", help="also what takes hours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a board are skipped where none is chosen, and long ones where they are not asked for."""
    for item in items:
        if "board_image" in getattr(item, "fixturenames", ()) and config.getoption("board", None) is None:
            item.add_marker(pytest.mark.skip(reason="no board is chosen: just device amd64|arm64"))
        if item.get_closest_marker("long") and not config.getoption("long", default=False):
            item.add_marker(pytest.mark.skip(reason="takes hours: just device-long"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its boards printed last."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for board in (value for value in item.funcargs.values() if isinstance(value, Board)):
            boots = ", ".join(f"{seconds:.0f} s" for seconds in board.boot_seconds)
            report.sections.append((f"{board.console}; boots: {boots}", board.last_console_lines()))
    return report


@pytest.fixture(scope="session")
def board_image(request: pytest.FixtureRequest) -> Image:
    """The chosen board's Debian, made when it is not in the cache."""
    try:
        return Image.cached_or_made(request.config.getoption("board"))
    except BoardError as error:
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
