"""Fixtures for all tests: the event loop is guarded against blocking calls; brokers, ports and models to use."""

import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog
from blockbuster import BlockBuster, blockbuster_ctx

from edged.config import Config
from edged.errors import EdgedError
from edged.models.catalog import Catalog
from tests.broker import Mosquitto
from tests.ports import find_free_port

# Its deadline is of wall-clock time, which a busy machine makes meaningless.
hypothesis.settings.register_profile("edged", deadline=None)
hypothesis.settings.load_profile("edged")

MAY_BLOCK = {
    # A stat, mkdir or unlink of the worker's socket file on the local disk is not worth a thread.
    "edged/workers/process.py": {"_listen", "start"},
    # So of the socket for profiles.
    "edged/probe/broadcast.py": {"_listen", "run"},
    # Before the daemon serves anybody, nobody waits for the loop.
    "edged/daemon.py": {"_one_blas_thread"},
    "edged/credentials.py": {"require", "server_context"},
    "edged/runtime/home.py": {"hold_home"},
    "edged/hardware/detect.py": {"cpu_flags"},
    # What the kernel makes up waits for no disk.
    "edged/hardware/usage.py": {"read_usage"},
    # The traceback of a defect is read from the source files; it must not be cut short for speed.
    "/traceback.py": {"print_exception"},
    "structlog/dev.py": {"__call__"},
}
"""Functions of edged that may block the loop, by file, each with its reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What :mod:`tests.device.conftest` goes by; pytest asks for options before it looks there."""
    parser.addoption("--board", choices=("amd64", "arm64", "auto"), help="the emulated board to test on; auto: both")
    parser.addoption("--board-until", type=float, help="begin no test on a board that may not end by then (Unix time)")
    parser.addoption("--long", action="store_true", help="also what takes hours on a board")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test that sets the log's level hides no lines from the next one."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def loop_guard(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """In asynchronous tests, a blocking call made from edged's code on the event loop raises BlockingError."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield None
        return
    with blockbuster_ctx("edged") as guard:
        for file, functions in MAY_BLOCK.items():
            for guarded in guard.functions.values():
                guarded.can_block_in(file, functions)
        yield guard


@pytest.fixture(scope="session")
def models_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory whose ``models/`` holds both default models. Leave it as it is; link the files elsewhere."""
    home = tmp_path_factory.mktemp("home")
    defaults = Config()
    catalog = Catalog(home / "models", defaults.models_cache_dir)
    try:
        for name in (defaults.chat.model, defaults.embed.model):
            catalog.pull(name)
    except EdgedError as error:
        pytest.skip(f"the default models cannot be had: {error.message}")
    return home


@pytest.fixture
def link_models(models_home: Path) -> Callable[[Path], None]:
    """``link_models(home)`` gives another home the models, without copying them."""

    def link(home: Path) -> None:
        target = home / "models"
        target.mkdir(parents=True)
        for file in (models_home / "models").iterdir():
            (target / file.name).hardlink_to(file)

    return link


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    return find_free_port()


@pytest.fixture
def make_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """``make_mosquitto(options="allow_anonymous true", port=None)``: a broker of the test's own, running."""
    if shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed")
    made: list[Mosquitto] = []

    def make(options: str = "allow_anonymous true", port: int | None = None) -> Mosquitto:
        folder = tmp_path / f"mosquitto-{len(made)}"
        folder.mkdir()
        broker = Mosquitto(folder, port or find_free_port(), options)
        made.append(broker)
        broker.start()
        return broker

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture
def mosquitto(make_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """A running broker that anybody may use: ``port``, ``url``, ``stop()``, ``kill()``, ``start()``."""
    return make_mosquitto()
