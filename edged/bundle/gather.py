"""Makes a bundle: wheels, models, Debian packages and the installer, with a manifest of all that and its signature."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import msgspec

from edged import __version__
from edged.bundle import archive, debian, wheels
from edged.bundle.archive import Content
from edged.bundle.manifest import Manifest, System, Target, encode, find_target
from edged.config import Chat, Embed
from edged.errors import BundleError
from edged.models.catalog import IDENTITY_LENGTH, Catalog
from edged.models.landing import read_record
from edged.models.manifest import load_manifests, manifests_directory
from edged.models.sources import Progress, require_space

Steps = Callable[[str], AbstractContextManager[Progress]]
"""Called with what is done now; what it yields is told how far that is."""

INSTALLER: Final = (
    "install-edge.sh",
    "pyproject.toml",
    "LICENSE",
    "scripts/*.sh",
    "scripts/bundle.py",
    "scripts/llama/*",
    "systemd/*",
    "docs/*.md",
)
"""What of the source tree installs edged: the same paths below ``installer/`` of a bundle."""
RUNTIME: Final = ("libgomp1", "libstdc++6")  # what llama.cpp is linked with
WORKING_BYTES: Final = 400_000_000  # wheels and packages, gathered before they are packed


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle shall hold. ``chat`` and ``embed`` are the models that its maker named for these roles, if any.

    ``packages`` are Debian's, beside those that edged itself needs; None is none at all. ``source`` is edged's source
    tree, ``cache`` the directory of compiled wheels.
    """

    target: Target
    python: str
    system: System
    chat: str
    embed: str
    models: tuple[str, ...]
    packages: tuple[str, ...] | None
    source: Path
    cache: Path


def plan(
    catalog: Catalog,
    target: str,
    *,
    python: str | None = None,
    models: Sequence[str] = (),
    packages: Sequence[str] | None = (),
    source: Path | None = None,
    cache: Path,
) -> Order:
    """An order from what its maker says. Where no chat model or no embedder is named, edged's default comes along.

    Raises :class:`BundleError` for a target, Python or source tree that is not known, :class:`ModelNotFoundError`.
    """
    board = find_target(target)
    chosen, system = board.system(python)
    kinds = {name: catalog.info(name).kind for name in models}
    imported = kinds.keys() - load_manifests(manifests_directory()).keys()
    if imported:
        raise BundleError(
            f"'{min(imported)}' was imported here, and a device installs the catalogue's models only",
            hint="leave it out, copy its file to the device, and run 'edged models import' there",
        )
    chat = next((name for name, kind in kinds.items() if kind == "chat"), "")
    embed = next((name for name, kind in kinds.items() if kind == "embed"), "")
    return Order(
        target=board,
        python=chosen,
        system=system,
        chat=chat,
        embed=embed,
        models=tuple(dict.fromkeys((chat or Chat().model, embed or Embed().model, *models))),
        packages=None if packages is None else tuple(packages),
        source=_find_source(source),
        cache=cache,
    )


def _find_source(named: Path | None) -> Path:
    """edged's source tree: the one named, or the one that this program runs from."""
    source = Path(__file__).resolve().parents[2] if named is None else named.resolve()
    missing = [name for name in INSTALLER if not any(source.glob(name))]
    if not missing:
        return source
    if named is None:
        raise BundleError(
            "a bundle is made from edged's source tree, and this edged was installed without it",
            hint="unpack the source of edged somewhere and name it: --source DIRECTORY",
        )
    raise BundleError(f"{named} is not edged's source tree: {missing[0]} is missing", hint="name another --source")


def create(
    order: Order, catalog: Catalog, out: Path, steps: Steps, sign: Callable[[bytes], bytes] | None = None
) -> Manifest:
    """Write the bundle ``out``; whatever goes wrong, that is as it was, and nothing else is left beside it.

    ``sign`` makes the signature of the manifest. Raises :class:`BundleError`, :class:`DiskFullError`, and what
    :meth:`Catalog.pull` raises.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise BundleError(f"{out} cannot be written", hint="name a file in a directory that exists", file=out)
    models_bytes = sum(catalog.info(name).size_bytes for name in order.models)
    require_space(out.parent, models_bytes + 2 * WORKING_BYTES)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as working:
        files, manifest = _gather(order, catalog, Path(working), steps)
        with steps("checksums") as advance:
            manifest = msgspec.structs.replace(manifest, files=archive.declare(files, advance))
        text = encode(manifest)
        signature = sign(text) if sign is not None else None
        with archive.staged(out) as staging:
            with steps(f"writing {out.name}") as advance:
                archive.write(staging, text, signature, files, advance)
            with steps("checking it as a device does"):
                archive.check(staging, None)
    return manifest


def _gather(order: Order, catalog: Catalog, working: Path, steps: Steps) -> tuple[dict[str, Content], Manifest]:
    """Every file by its name in the bundle, and the manifest but for these. What takes long comes last."""
    directories = {name: working / name for name in ("own", "wheels", "apt")}
    for directory in directories.values():
        directory.mkdir()
    with steps("edged's own wheel"):
        edged = wheels.build_edged(order.source, directories["own"])
    version = _checked_version(edged, order.source)
    packages = _packages_wanted(order)
    debs = _debs(packages, order, directories["apt"], steps)
    models = {name: content for model in order.models for name, content in _model(catalog, model, steps).items()}
    with steps(f"llama.cpp for {order.target.name}") as advance:
        llama = wheels.build_llama(order.source, order.target, order.cache, advance)
    with steps(f"packages for Python {order.python} on {order.target.machine}"):
        found = wheels.download([edged, llama], order.target, order.python, order.system, directories["wheels"])
    files: dict[str, Content] = {
        **{f"wheels/{path.name}": path for path in found},
        **models,
        **{f"debs/{name}": content for name, content in debs.items()},
        **installer(order.source),
    }
    manifest = Manifest(
        edged=version,
        target=order.target.name,
        machine=order.target.machine,
        python=(order.python,),
        suite=order.system.suite,
        glibc=_checked_glibc(found, order.system),
        cpu_features=order.target.cpu_features,
        chat=order.chat,
        embed=order.embed,
        models=order.models,
        packages=packages,
        files={},
    )
    return files, manifest


def _checked_version(edged: Path, source: Path) -> str:
    """Models, boards and packages are chosen by this program, the rest of the bundle is of the source tree."""
    version = wheels.read_wheel(edged).version
    if version != __version__:
        raise BundleError(
            f"{source} is edged {version}, and this program is edged {__version__}",
            hint=f"run edged from that source tree: pip install -e '{source}[bundle]'",
        )
    return version


def _packages_wanted(order: Order) -> tuple[str, ...]:
    """With those that edged runs on, which a bare system may lack."""
    if order.packages is None:
        return ()
    return tuple(dict.fromkeys((f"python{order.python}-venv", *RUNTIME, *order.packages)))


def _debs(names: tuple[str, ...], order: Order, directory: Path, steps: Steps) -> Mapping[str, Content]:
    if not names:
        return {}
    with steps(f"{order.system.name} packages: {', '.join(names)}") as advance:
        return debian.fetch(names, order.system, order.target.architecture, directory, advance)


def _model(catalog: Catalog, name: str, steps: Steps) -> dict[str, Content]:
    """The model's file and its record, named as the cache of a device names them."""
    with steps(f"model {name}") as advance:
        path = catalog.pull(name, advance)
    record = read_record(path)
    assert record is not None  # the catalogue has just written it
    inside = f"models/{name}-{record.sha256[:IDENTITY_LENGTH]}.gguf"
    timeless = msgspec.structs.replace(record, mtime_ns=archive.MTIME * 10**9)
    return {inside: path, f"{inside}.json": msgspec.json.format(msgspec.json.encode(timeless), indent=2) + b"\n"}


def _checked_glibc(found: Sequence[Path], system: System) -> str:
    needed = wheels.glibc_needed(found)
    if needed > system.glibc:
        raise BundleError(
            f"llama.cpp was compiled against glibc {_dotted(needed)}, and {system.name} has {_dotted(system.glibc)}",
            hint=f"remove its wheel from the cache and make the bundle on a machine or in a container of {system.name}",
        )
    return _dotted(needed)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def installer(source: Path) -> dict[str, Content]:
    """What installs the bundle, by its name in it."""
    found = sorted(path for pattern in INSTALLER for path in source.glob(pattern) if path.is_file())
    return {f"installer/{path.relative_to(source).as_posix()}": path for path in found}
