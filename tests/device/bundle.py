"""An offline bundle for a board, made as a user makes one: what install-edge.sh installs without a network."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edged import __version__
from edged.bundle import archive, gather, unpack
from edged.bundle.archive import Content
from edged.bundle.manifest import decode, encode
from edged.config import Config
from edged.models.catalog import Catalog
from edged.models.sources import Progress, no_progress
from tests.device.board import Architecture

TARGETS: dict[Architecture, str] = {"amd64": "amd64", "arm64": "rpi5"}


def make_bundle(
    architecture: Architecture,
    directory: Path,
    *,
    version: str = __version__,
    packages: Sequence[str] | None = None,
) -> Path:
    """A bundle, unpacked, with this checkout's edged; takes the packages from pip's cache or the registry.

    Without Debian packages, unless they are asked for: the boards' image has those that edged needs.
    """
    out = directory.with_name(f"{directory.name}.tar")
    config = Config()
    catalog = Catalog(directory.with_name(f"{directory.name}.models"), config.models_cache_dir)
    order = gather.plan(
        catalog,
        TARGETS[architecture],
        packages=packages,
        cache=config.cache,
    )
    gather.create(order, catalog, out, _quietly)
    unpack.unpack(out, directory)
    out.unlink()
    shutil.rmtree(directory.with_name(f"{directory.name}.models"))
    if version != __version__:
        write_manifest(directory, architecture, version)
    return directory


@contextlib.contextmanager
def _quietly(_step: str) -> Iterator[Progress]:
    yield no_progress


def write_manifest(directory: Path, architecture: Architecture, version: str = __version__) -> None:
    """Sizes and sums of all that is there."""
    file = directory / unpack.MANIFEST
    files = archive.declare(_files(directory), no_progress)
    changes = {"edged": version, "target": TARGETS[architecture], "files": files}
    file.write_bytes(encode(msgspec.structs.replace(decode(file.read_bytes()), **changes)))


def pack(directory: Path, out: Path) -> Path:
    """The archive of a bundle that lies unpacked."""
    archive.write(out, (directory / unpack.MANIFEST).read_bytes(), None, _files(directory), no_progress)
    return out


def _files(directory: Path) -> dict[str, Content]:
    found = (path for path in directory.rglob("*") if path.is_file())
    files: dict[str, Content] = {path.relative_to(directory).as_posix(): path for path in found}
    return {name: path for name, path in files.items() if name not in (unpack.MANIFEST, unpack.SIGNATURE)}
