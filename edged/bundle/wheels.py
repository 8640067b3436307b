"""The wheels of a bundle: edged's own, llama.cpp's for the board's processor, and all they need on the board's Python.

Needs the ``bundle`` extra (packaging).
"""

import email.parser
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from edged.bundle.command import run
from edged.bundle.manifest import System, Target
from edged.errors import BundleError

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version
except ImportError as error:
    raise BundleError(
        "making a bundle needs the package packaging", hint="install it: pip install 'edged[bundle]'"
    ) from error

OLDEST_TAG: Final = 17  # manylinux2014's glibc is 2.17
EDGED: Final = "edged"
LLAMA: Final = "llama-cpp-python"


class Wheel(msgspec.Struct, frozen=True):
    """What a wheel is called, and what it asks for. ``name`` is canonical: lower case, dashes."""

    name: str
    version: str
    requires: tuple[str, ...]


def build_edged(source: Path, directory: Path) -> Path:
    """edged's own wheel, made from its source tree."""
    command = [*_pip("wheel"), "--no-deps", "--wheel-dir", directory, source]
    run(command, "edged's own wheel cannot be made", hint="pip needs hatchling for it: from the network or its cache")
    return next(directory.glob("edged-*.whl"))


def build_llama(source: Path, target: Target, cache: Path, advance: Callable[[int, int | None], None]) -> Path:
    """The wheel of llama-cpp-python for the target's processor, out of the cache or compiled, which takes minutes."""

    def follow(line: str) -> None:
        step = re.search(r"compiling llama.cpp \[(\d+)/(\d+)\]", line)
        if step is not None:
            advance(int(step[1]), int(step[2]))

    wheel = run(
        [source / "scripts/cross-wheel.sh", target.name],
        f"llama.cpp cannot be compiled for {target.name}",
        hint="bring what is missing, then run the command again: what is finished is kept",
        environment={"EDGED_CACHE": str(cache)},
        on_line=follow,
    )
    return Path(wheel)


def download(own: Sequence[Path], target: Target, python: str, system: System, directory: Path) -> list[Path]:
    """``own`` and every wheel that they need there, from the index that pip is configured for.

    Markers are judged for the board: pip judges them for the Python that runs it, and leaves out what only that one
    does not need. Raises :class:`BundleError` where an index has no wheel for the board.
    """
    platforms = [f"manylinux_2_{minor}" for minor in range(system.glibc[1], OLDEST_TAG - 1, -1)]
    tags = (*platforms, "manylinux2014", "linux")
    options: list[str | Path] = ["--only-binary=:all:", "--python-version", python, "--dest", directory]
    options += [option for tag in tags for option in ("--platform", f"{tag}_{target.machine}")]
    further: list[str] = []
    while True:
        run(
            [*_pip("download"), *options, *own, *further],
            f"the packages for Python {python} on {target.machine} cannot be had",
            hint="check the network and pip's index settings (pip config list)",
        )
        wheels = {path: read_wheel(path) for path in sorted(directory.glob("*.whl"))}
        needed, missing = closure(wheels.values(), EDGED, environments(python, target.machine))
        if not missing:
            return [path for path, wheel in wheels.items() if wheel.name in needed]
        if set(missing) <= set(further):
            raise BundleError(f"pip brought another {missing[0]} than asked for", hint="use a newer pip")
        further += missing


def _pip(command: str) -> list[str | Path]:
    options = ("--no-input", "--disable-pip-version-check", "--progress-bar=off")
    return [sys.executable, "-m", "pip", command, *options]


def read_wheel(path: Path) -> Wheel:
    """Name, version and requirements of a wheel."""
    name, version, _, _ = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        entry = next(each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each))
        metadata = email.parser.Parser().parsestr(archive.read(entry).decode("utf-8"), headersonly=True)
    return Wheel(str(name), str(version), tuple(metadata.get_all("Requires-Dist", ())))


# --- what is needed there ------------------------------------------------------------------------------


def environments(python: str, machine: str) -> list[dict[str, str]]:
    """What markers are judged by on a board: for the first and the last patch release, as nobody knows which it has."""
    fixed = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_version": python,
        "sys_platform": "linux",
    }
    patches = (f"{python}.0", f"{python}.99")
    return [{**fixed, "python_full_version": full, "implementation_version": full} for full in patches]


def closure(wheels: Iterable[Wheel], root: str, judged_by: Sequence[Mapping[str, str]]) -> tuple[set[str], list[str]]:
    """The names of the wheels that ``root`` needs, directly or not, and the requirements that none of them meets."""
    here = {wheel.name: wheel for wheel in wheels}
    needed: set[tuple[str, str]] = set()
    missing: set[str] = set()
    waiting = [(root, "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in needed:
            continue
        needed.add((name, extra))
        for requirement in map(Requirement, here[name].requires):
            if not _applies(requirement, extra, judged_by):
                continue
            met = here.get(canonicalize_name(requirement.name))
            if met is None or not requirement.specifier.contains(Version(met.version), prereleases=True):
                requirement.marker = None
                missing.add(str(requirement))
            else:
                waiting += [(met.name, wanted) for wanted in ("", *sorted(requirement.extras))]
    return {name for name, _ in needed}, sorted(missing)


def _applies(requirement: Requirement, extra: str, judged_by: Sequence[Mapping[str, str]]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for environment in judged_by)


# --- the C library -------------------------------------------------------------------------------------


def glibc_needed(wheels: Iterable[Path]) -> tuple[int, int]:
    """The newest glibc that one of the wheels needs: by its name, or by its libraries where that promises nothing."""
    return max((_glibc_of(path) for path in wheels), default=(0, 0))


def _glibc_of(path: Path) -> tuple[int, int]:
    tags = [tag.platform for tag in parse_wheel_filename(path.name)[3]]
    promised = [_promised(tag) for tag in tags if not tag.startswith("linux_")]
    return min(promised) if promised else _linked(path)


def _promised(platform: str) -> tuple[int, int]:
    named = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
    numbered = re.match(r"manylinux_(\d+)_(\d+)_", platform)
    if numbered is not None:
        return int(numbered[1]), int(numbered[2])
    return named.get(platform.partition("_")[0], (0, 0))


def _linked(path: Path) -> tuple[int, int]:
    with zipfile.ZipFile(path) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if ".so" in name]
    minors = [int(minor) for library in libraries for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library)]
    return 2, max(minors, default=0)
