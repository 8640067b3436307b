"""Debian packages for a board, resolved and checked by apt itself with a configuration of its own, without root.

Nothing is taken for granted of the board: the packages come with all that they depend on, as a small archive that the
board's apt takes what it lacks from.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from edged.bundle.command import run
from edged.bundle.manifest import Distribution, System
from edged.errors import BundleError

INDEX: Final = "Packages"
_KEYRINGS: Final[Mapping[Distribution, tuple[str, str]]] = {
    "debian": ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    "ubuntu": ("/usr/share/keyrings/ubuntu-archive-keyring.gpg", "ubuntu-archive-keyring (Debian), ubuntu-keyring"),
}
"""The keys that the archives are signed with, and the package that brings them."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_DIRECTORIES: Final = ("lists/partial", "archives/partial", "parts")


def fetch(
    names: Sequence[str],
    system: System,
    architecture: str,
    directory: Path,
    advance: Callable[[int, int | None], None],
) -> dict[str, Path | bytes]:
    """The packages and all that they depend on, by file name, with the index that apt wants beside them.

    ``directory`` is for apt's own files and must outlive what is returned. Raises :class:`BundleError` for a name that
    nobody knows, where apt is not there, or where the archive cannot be reached or is not signed.
    """
    _check_names(names)
    for each in _DIRECTORIES:
        (directory / each).mkdir(parents=True)
    (directory / "status").touch()
    (directory / "sources.list").write_text("".join(f"{line}\n" for line in sources(system, architecture, _mirrors())))
    configuration = directory / "apt.conf"
    configuration.write_text(_configuration(directory, architecture))

    def follow(line: str) -> None:
        status = re.match(r"dlstatus:\d+:([\d.]+):", line)
        if status is not None:
            advance(round(float(status[1])), 100)

    def apt(*arguments: str) -> None:
        run(
            ["apt-get", "-o", "APT::Status-Fd=1", *arguments],
            f"the packages for {system.name} cannot be had",
            hint="check their names, and that this machine reaches a mirror; or leave them out: --no-packages",
            environment={"APT_CONFIG": str(configuration), "LC_ALL": "C.UTF-8"},
            on_line=follow,
        )

    apt("update")
    apt("install", "--yes", "--download-only", "--no-install-recommends", *names)
    debs = {file_name(path.name): path for path in (directory / "archives").glob("*.deb")}
    return {**debs, INDEX: index(debs)}


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise BundleError(f"{name!r} is no name of a Debian package", hint="such as mosquitto", package=name)


def sources(system: System, architecture: str, mirrors: Mapping[str, str]) -> list[str]:
    """The lines of sources.list for a system. ``mirrors`` are the archives this machine uses, by their label."""
    keyring, package = _KEYRINGS[system.distribution]
    if not Path(keyring).exists():
        raise BundleError(
            f"the keys of {system.name}'s archive are not on this machine", hint=f"install the package {package}"
        )
    if system.distribution == "debian":
        main = mirrors.get("Debian", "http://deb.debian.org/debian")
        security = mirrors.get("Debian-Security", "http://deb.debian.org/debian-security")
        components = "main"
    else:  # what is not for PCs lies apart from what is, and no mirror says which of the two it has
        is_pc = architecture == "amd64"
        main = "http://archive.ubuntu.com/ubuntu" if is_pc else "http://ports.ubuntu.com/ubuntu-ports"
        security = "http://security.ubuntu.com/ubuntu" if is_pc else main
        components = "main universe"
    places = {system.suite: main, f"{system.suite}-updates": main, f"{system.suite}-security": security}
    return [f"deb [signed-by={keyring}] {uri} {suite} {components}" for suite, uri in places.items()]


def _mirrors() -> dict[str, str]:
    """The archives that this machine takes its own packages from: one nearby, when it has one."""
    if shutil.which("apt-get") is None:
        raise BundleError(
            "Debian packages are gathered by apt, which is not on this machine",
            hint="make the bundle on Debian or Ubuntu, or leave them out: --no-packages",
        )
    lines: list[str] = []
    run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Identifier: Packages"],
        "apt does not say which mirrors it uses",
        hint="run 'apt-get update' as root",
        on_line=lambda line: lines.append(line.strip()),
    )
    return {label: uri for label, _, uri in (line.partition(" ") for line in reversed(lines))}


def _configuration(directory: Path, architecture: str) -> str:
    """apt's, with nothing of this machine's but how it reaches the network."""
    settings = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": directory / "parts",
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": directory,
        "Dir::State::status": directory / "status",
        "Dir::Cache": directory,
        "Dir::Log": directory,
        "APT::Architecture": architecture,
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
    }
    own = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    return f'{own}APT::Architectures {{ "{architecture}"; }};\n{_network_settings()}'


def _network_settings() -> str:
    kept: list[str] = []
    wanted = re.compile(r'Acquire::(http|https|Check-Valid-Until|Check-Date)\b.* "[^"]+";')
    run(
        ["apt-config", "dump"],
        "apt does not say how it is configured",
        hint="see what 'apt-config dump' says",
        on_line=lambda line: kept.append(line) if wanted.match(line) else None,
    )
    return "".join(kept)


def file_name(cached: str) -> str:
    """As an archive calls it: apt's cache adds the epoch, whose colon an address would have to quote."""
    return re.sub(r"_\d+%3a", "_", cached)


def index(debs: Mapping[str, Path]) -> bytes:
    """The index of an archive that holds these packages, in order of their file names."""
    return b"\n".join(_stanza(name, path) for name, path in sorted(debs.items()))


def _stanza(name: str, path: Path) -> bytes:
    lines: list[str] = []
    run(["dpkg-deb", "--field", path], f"{name} is no package", hint="run the command again", on_line=lines.append)
    with path.open("rb") as readable:
        sha256 = hashlib.file_digest(readable, "sha256").hexdigest()
    return f"{''.join(lines)}Filename: ./{name}\nSize: {path.stat().st_size}\nSHA256: {sha256}\n".encode()
