#!/usr/bin/env python3
"""Checks an offline bundle and unpacks it: signed by the key given, each file as in its manifest, fit for this machine.

Usage: bundle.py [--key PUB.pem] FILE DIRECTORY [MACHINE PYTHON…]. DIRECTORY must not exist; it does afterwards only if
all was right. FILE may be a directory with the same content. This one file imports nothing of edged and runs on a
system's own Python, from 3.9 on, before edged is installed. docs/BUNDLE.md describes the layout.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Generator, Iterator, Set
from pathlib import Path
from typing import IO, Any, NamedTuple

FORMAT = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"  # of the manifest, which therefore cannot list it
PIECE_BYTES = 1 << 20
LARGEST_MANIFEST_BYTES = 4 << 20
LEFT_FREE_BYTES = 16 << 20
WANTED = {"edged": str, "machine": str, "python": list, "files": dict}
KNOWN = {"target": str, "suite": str, "glibc": str, "cpu_features": list}
LISTS = ("python", "cpu_features")
OLDEST_PYTHON = (3, 11)  # that edged runs on
MAKE_ROOM = "make room on that disk"
VERSION = re.compile(r"[0-9][\w.+!-]*", re.ASCII)
NAME = re.compile(r"(?!.*\.\.(/|$))[\w.+~-]+(/[\w.+~-]+)*", re.ASCII)
"""A file's name in a bundle: nothing that leads out of it, and nothing that a terminal or a shell takes for more."""


class BrokenBundleError(Exception):
    """The bundle is not what it should be; says how. ``advice`` is what to do where copying it again would not help."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


# --- the whole of it -----------------------------------------------------------------------------------


def unpack(source: Path, target: Path, public_key: bytes | None = None) -> dict[str, Any]:
    """The manifest, once all of the bundle lies in ``target``. On any error ``target`` does not exist."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _reading():
            partial.mkdir(parents=True)
        manifest = check(source, public_key, partial)
        with _reading():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check(source: Path, public_key: bytes | None = None, target: Path | None = None) -> dict[str, Any]:
    """The manifest, once every byte was compared with it; what was compared is written to ``target``, if one is given.

    With ``public_key`` (32 bytes) the manifest is signed by it, or nothing else of the bundle is even looked at.
    """
    with _reading():
        text, signature = head(source)
        if public_key is not None:
            _check_signature(text, signature, public_key)
        manifest = parse(text)
        if target is not None:
            _need_space(target, sum(declared["bytes"] for declared in manifest["files"].values()))
        _compare(source, manifest["files"], target)
        if target is not None:
            (target / MANIFEST).write_bytes(text)
            if signature is not None:
                (target / SIGNATURE).write_bytes(signature)
    return manifest


def head(source: Path) -> tuple[bytes, bytes | None]:
    """The manifest as it stands in the bundle, and its signature, if it has one."""
    found: dict[str, bytes] = {}
    with _reading(), contextlib.closing(_members(source)) as members:
        for name, content in members:
            if name in (MANIFEST, SIGNATURE):
                found.setdefault(name, content.read(LARGEST_MANIFEST_BYTES))
            if len(found) == 2:
                break
    if MANIFEST not in found:
        raise BrokenBundleError(f"there is no {MANIFEST} in it: it is no bundle, or was cut off")
    return found[MANIFEST], found.get(SIGNATURE)


def parse(text: bytes) -> dict[str, Any]:
    """The manifest's content, as far as all depends on it."""
    try:
        manifest = json.loads(text.decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise BrokenBundleError(f"its format is {manifest['format']!r}, this installer knows {FORMAT}")
        wrong = next(_wrong_keys(manifest), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenBundleError(f"its {MANIFEST} is broken: {error!r}") from error
    if wrong is not None:
        raise BrokenBundleError(f"its {MANIFEST} is broken: {wrong}")
    return dict(manifest)


def _wrong_keys(manifest: dict[str, Any]) -> Iterator[str]:
    yield from (name for name, kind in WANTED.items() if not isinstance(manifest[name], kind))
    yield from (name for name, kind in KNOWN.items() if not isinstance(manifest.get(name, kind()), kind))
    yield from (name for name in LISTS if not all(isinstance(each, str) for each in manifest.get(name, ())))
    yield from () if VERSION.fullmatch(manifest["edged"]) else ("edged",)
    yield from (repr(name) for name, declared in manifest["files"].items() if not _is_declaration(name, declared))


def _is_declaration(name: str, declared: Any) -> bool:
    return (
        NAME.fullmatch(name) is not None
        and name not in (MANIFEST, SIGNATURE)
        and isinstance(declared["sha256"], str)
        and type(declared["bytes"]) is int
        and declared["bytes"] >= 0
    )


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Of memory and recursion an archive takes as much as its headers claim."""
    try:
        yield
    except (
        OSError,
        EOFError,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        ValueError,
        MemoryError,
        RecursionError,
    ) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        said = str(error) or type(error).__name__
        raise BrokenBundleError(f"it cannot be read or unpacked: {said}", MAKE_ROOM if is_full else "") from error


# --- its files -----------------------------------------------------------------------------------------


def _members(source: Path) -> Generator[tuple[str, IO[bytes]], None, None]:
    """The name and content of every file, in the order they lie there."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_symlink() or not path.is_dir()):
            name = path.relative_to(source).as_posix()
            _check_kind(name, is_plain=path.is_file() and not path.is_symlink())
            with path.open("rb") as content:
                yield name, content
        return
    with tarfile.open(source) as archive:
        for member in archive:
            name = member.name[2:] if member.name.startswith("./") else member.name
            if member.isdir():
                continue
            _check_kind(name, is_plain=member.isreg())
            extracted = archive.extractfile(member)
            assert extracted is not None  # of a plain file there is one
            yield name, extracted


def _check_kind(name: str, *, is_plain: bool) -> None:
    """No link, no device, no pipe, and no name that leads elsewhere."""
    if not is_plain or not NAME.fullmatch(name):
        raise BrokenBundleError(f"{name!r} is no plain file within the bundle")


def _compare(source: Path, files: dict[str, Any], target: Path | None) -> None:
    seen: set[str] = set()
    for name, content in _members(source):
        if name in seen:
            raise BrokenBundleError(f"{name} is in it twice")
        if name not in files and name not in (MANIFEST, SIGNATURE):
            raise BrokenBundleError(f"{name} is not in its manifest")
        seen.add(name)
        if name in files:
            _take(name, content, files[name], target)
    missing = sorted(files.keys() - seen)
    if missing:
        raise BrokenBundleError(
            f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )


def _take(name: str, content: IO[bytes], declared: dict[str, Any], target: Path | None) -> None:
    """Compare a file with what is declared of it, and write no more of it than that."""
    digest, left = hashlib.sha256(), declared["bytes"]
    with contextlib.ExitStack() as opened:
        file = None
        if target is not None:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(path.open("xb"))
        while left >= 0:
            piece = content.read(PIECE_BYTES)
            if not piece:
                break
            left -= len(piece)
            digest.update(piece)
            if file is not None:
                file.write(piece)
    if left or digest.hexdigest() != declared["sha256"]:
        raise BrokenBundleError(f"{name} is changed: its size or sha256 is not what the manifest says")


def _need_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes + LEFT_FREE_BYTES:
        raise BrokenBundleError(
            f"unpacked it takes {needed_bytes >> 20} MB, and {directory} has {free_bytes >> 20} MB free", MAKE_ROOM
        )


# --- its signature -------------------------------------------------------------------------------------
# In Python and not by the openssl program: small systems have none, and before 3.0 it cannot do this (-rawin). Who only
# verifies knows no secrets, so that nothing is given away by the time it takes.


def read_key(path: Path) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM form (RFC 8410). Raises :class:`BrokenBundleError`."""
    advice = "name the file of the public key, which 'edged bundle keygen --out NAME' writes as NAME.pub"
    try:
        lines = path.read_text(encoding="ascii").strip().splitlines()
        encoded = base64.b64decode("".join(lines[1:-1]), validate=True)
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise BrokenBundleError(f"the key {path} cannot be read: {error}", advice) from error
    prefix = bytes.fromhex("302a300506032b6570032100")
    if not lines or lines[0] != "-----BEGIN PUBLIC KEY-----" or encoded[:12] != prefix or len(encoded) != 44:
        raise BrokenBundleError(f"{path} is no Ed25519 public key in PEM form", advice)
    return encoded[12:]


def _check_signature(text: bytes, signature: bytes | None, public_key: bytes) -> None:
    if signature is None:
        raise BrokenBundleError("it is not signed, and a key is asked for")
    if not is_signed(text, signature, public_key):
        raise BrokenBundleError("its signature is not of the key asked for, or the manifest was changed since")


_PRIME = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _PRIME) % _PRIME
_ROOT_OF_MINUS_1 = pow(2, (_PRIME - 1) // 4, _PRIME)
_Point = tuple[int, int, int, int]  # extended coordinates X, Y, Z, T: x = X/Z, y = Y/Z, x·y = T/Z


def is_signed(message: bytes, signature: bytes, public_key: bytes) -> bool:
    """Whether this is the key's Ed25519 signature of the message (RFC 8032, section 5.1.7)."""
    if len(signature) != 64 or len(public_key) != 32:
        return False
    key, commitment = _decode(public_key), _decode(signature[:32])
    scalar = int.from_bytes(signature[32:], "little")
    if key is None or commitment is None or scalar >= _ORDER:
        return False
    hashed = hashlib.sha512(signature[:32] + public_key + message).digest()
    challenge = int.from_bytes(hashed, "little") % _ORDER
    left, right = _multiply(scalar, _BASE), _add(commitment, _multiply(challenge, key))
    return all((left[axis] * right[2] - right[axis] * left[2]) % _PRIME == 0 for axis in (0, 1))


def _decode(encoded: bytes) -> _Point | None:
    number = int.from_bytes(encoded, "little")
    sign, y = number >> 255, number & ((1 << 255) - 1)
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _PRIME) % _PRIME
    x = pow(square, (_PRIME + 3) // 8, _PRIME)
    if (x * x - square) % _PRIME:
        x = x * _ROOT_OF_MINUS_1 % _PRIME
    if y >= _PRIME or (x * x - square) % _PRIME or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = _PRIME - x
    return x, y, 1, x * y % _PRIME


def _add(one: _Point, other: _Point) -> _Point:
    a = (one[1] - one[0]) * (other[1] - other[0]) % _PRIME
    b = (one[1] + one[0]) * (other[1] + other[0]) % _PRIME
    c = 2 * one[3] * other[3] * _D % _PRIME
    d = 2 * one[2] * other[2] % _PRIME
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _PRIME, g * h % _PRIME, f * g % _PRIME, e * h % _PRIME


def _multiply(scalar: int, point: _Point) -> _Point:
    product: _Point = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            product = _add(product, point)
        point = _add(point, point)
        scalar >>= 1
    return product


_BASE = _decode(b"\x58" + 31 * b"\x66") or (0, 1, 1, 0)  # y = 4/5


# --- this machine --------------------------------------------------------------------------------------


class Device(NamedTuple):
    """What a bundle must fit: ``machine`` as uname has it, ``pythons`` such as 3.11, the processor's features in the
    kernel's words, the C library's version, and the names of the distribution's release.
    """

    machine: str
    pythons: Set[str]
    cpu_features: Set[str]
    glibc: tuple[int, ...]
    suites: Set[str]


def fit(manifest: dict[str, Any], device: Device) -> None:
    """Raise :class:`BrokenBundleError` unless what is in the bundle runs on the device."""
    for_another_board = f"{_one_for(device)}; docs/BUNDLE.md lists the boards"
    if manifest["machine"] != device.machine:
        raise BrokenBundleError(f"it is for {manifest['machine']}, this machine is {device.machine}", for_another_board)
    lacking = [feature for feature in manifest.get("cpu_features", ()) if feature not in device.cpu_features]
    if lacking:
        raise BrokenBundleError(
            f"it is for {manifest.get('target')}: this processor lacks {', '.join(lacking)}", for_another_board
        )
    if device.glibc < version(manifest.get("glibc", "0")):
        has = ".".join(map(str, device.glibc))
        raise BrokenBundleError(
            f"its programs need glibc {manifest['glibc']}, this machine has {has}",
            f"{_one_for(device, manifest.get('target'))}, or on a system that is as old as this one",
        )
    pythons = set(device.pythons)
    if manifest.get("suite") in device.suites:
        pythons |= {python for python in manifest["python"] if _brings(manifest, f"python{python}")}
    if not pythons & set(manifest["python"]):
        here = ", ".join(sorted(device.pythons)) or "none"
        raise BrokenBundleError(
            f"its packages are for Python {', '.join(manifest['python'])}, this machine has {here}",
            _one_for(device, manifest.get("target")),
        )


def _one_for(device: Device, target: str | None = None) -> str:
    usable = sorted((python for python in device.pythons if version(python) >= OLDEST_PYTHON), key=version)
    python = f" --python {usable[-1]}" if usable else ""  # else one that comes with the bundle
    return f"make one with 'edged bundle create --target {target or 'BOARD'}{python}'"


def _brings(manifest: dict[str, Any], package: str) -> bool:
    return any(name.startswith(f"debs/{package}_") for name in manifest["files"])


def version(text: str) -> tuple[int, ...]:
    """Of dotted numbers; what is no number ends it."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text)[0])))


def this_device(machine: str, pythons: Set[str]) -> Device:
    """The device this runs on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    release = Path("/etc/os-release").read_text(encoding="utf-8", errors="replace")
    glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").replace("glibc ", "")
    return Device(machine, pythons, cpu_features(cpuinfo), version(glibc), codenames(release))


def cpu_features(cpuinfo: str) -> set[str]:
    """From /proc/cpuinfo: what all of the processor can do, in the kernel's words."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    cores = [set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")]
    return set.intersection(*cores) if cores else set()


def codenames(os_release: str) -> set[str]:
    """From /etc/os-release: the release's own name, and that of the Ubuntu it is made from."""
    return set(re.findall(r'^(?:VERSION|UBUNTU)_CODENAME="?([a-z]+)', os_release, re.MULTILINE))


def main(arguments: list[str]) -> str | None:
    """What is wrong and, on a second line, what helps against it; or None, and the version of edged is printed."""
    try:
        public_key = read_key(Path(arguments[1])) if arguments[0] == "--key" else None
        source, target, *here = arguments if public_key is None else arguments[2:]
        manifest = unpack(Path(source), Path(target), public_key)
        try:
            if here:
                fit(manifest, this_device(here[0], set(here[1:])))
        except BrokenBundleError:
            shutil.rmtree(target)
            raise
    except BrokenBundleError as error:
        return f"{error}\n{error.advice}".rstrip()
    sys.stdout.write(f"{manifest['edged']}\n")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
