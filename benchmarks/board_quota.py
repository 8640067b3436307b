"""quota.py on an emulated board: with cgroups v2 and systemd, and the wheel that is compiled for the board.

edged is installed there from a bundle, as users install it, and stopped for the time of the benchmark. llama-server is
left out, as nothing compiles it for boards. Ratios within one run tell something; speeds are those of an emulator: a
token of the whole model takes a second there, ten times a quota's period. With few layers it takes as long, about, as
that of the whole model on a board.

    python benchmarks/board_quota.py amd64|arm64 [--layers N] [OPTIONS OF quota.py]
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import get_args

from shallow import shallow

from edged.config import Config
from edged.models.catalog import Catalog
from tests.device.board import Architecture, Board, Hardware, Image
from tests.device.installed import CHECKOUT, install_from_bundle, make_share

PARTS = ("benchmarks", "tests/ports.py")
MEASURED = "/var/tmp/measured"
SHALLOW = "shallow.gguf"
MEMORY_MB = 4096  # three servers are measured beside each other
MODELS = Path("/var/lib/edged/models")  # as the service has them
PYTHON = "/opt/edged/current/bin/python"


def add_benchmarks(share: Path) -> None:
    """Put them beside the installer, with what they need of the tests."""
    for part in PARTS:
        source, target = CHECKOUT / part, share / "measured" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)


def add_model(share: Path, layers: int) -> None:
    """Put the default model beside them, with so many layers."""
    config = Config()
    catalog = Catalog(share.with_name("models"), config.models_cache_dir)
    shallow(catalog.pull(config.chat.model), share / "measured" / SHALLOW, layers)


def installed_model() -> Path:
    """The default model, as it is installed on the board."""
    config = Config()
    return Catalog(MODELS, config.models_cache_dir).info(config.chat.model).path


def measure(board: Board, model: Path, options: list[str]) -> int:
    """Install, and run it; its exit status. What it prints is printed as it comes."""
    install_from_bundle(board)
    board.run("systemctl stop edged edged-probe", timeout_seconds=300)
    board.run(f"cp -r /mnt/share/measured {MEASURED}")  # the share cannot be written, and Python wants to
    return board.follow(
        f"cd {MEASURED} && PYTHONPATH=. {PYTHON} benchmarks/quota.py --alone --path {model} {' '.join(options)}"
    )


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("architecture", choices=get_args(Architecture))
    arguments.add_argument("--layers", type=int, help="of the default model's, as many as are kept")
    given, options = arguments.parse_known_args()
    image = Image.cached_or_made(given.architecture)
    with tempfile.TemporaryDirectory(prefix="edged-board-") as name:
        folder = Path(name)
        (folder / "share").mkdir()
        share = make_share(given.architecture, folder / "share")
        add_benchmarks(share)
        if given.layers:
            add_model(share, given.layers)
        model = Path(MEASURED) / SHALLOW if given.layers else installed_model()
        board = Board(image, folder, Hardware(memory_mb=MEMORY_MB, shares={"share": share}))
        try:
            return measure(board, model, options)
        finally:
            board.discard()


if __name__ == "__main__":
    sys.exit(main())
