#!/usr/bin/env python3
"""Checks an offline bundle and unpacks it: every file is in its manifest with size and sha256, and none is missing.

Usage: bundle.py FILE DIRECTORY [MACHINE PYTHON]. DIRECTORY must not exist; it does afterwards only if all was right.
FILE may be a directory with the same content. Runs on a system's own Python, from 3.9 on, before edged is installed.
docs/BUNDLE.md describes the layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

FORMAT = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"  # checked by whoever has the key, and not by the manifest it signs
PIECE_BYTES = 1 << 20
LARGEST_MANIFEST_BYTES = 4 << 20


class BundleError(Exception):
    """The bundle is not what it should be; says how."""


def unpack(source: Path, target: Path) -> dict[str, Any]:
    """The manifest, once all of the bundle lies in ``target``. On any error ``target`` does not exist."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sums = {name: _write(content, partial / name) for name, content in _members(source)}
        manifest = _manifest(partial)
        _compare(manifest["files"], sums)
        partial.rename(target)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise BundleError(f"it cannot be read or unpacked: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file() or path.is_symlink()):
            if path.is_symlink():
                raise BundleError(f"{path} is a link")
            with path.open("rb") as content:
                yield path.relative_to(source).as_posix(), content
        return
    with tarfile.open(source) as archive:
        for member in archive:
            if not member.isdir():
                yield _safe_name(member), _content(archive, member)


def _safe_name(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if not member.isreg() or path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{member.name!r} is no plain file within the bundle")
    return path.as_posix()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # of a regular file there is one
    return content


def _write(content: IO[bytes], path: Path) -> tuple[str, int]:
    """sha256 and size of what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        while piece := content.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file() or path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise BundleError(f"there is no {MANIFEST} in it: it is no bundle, or was cut off")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BundleError(f"its format is {manifest['format']}, this installer knows {FORMAT}")
        wanted = {"edged": str, "machine": str, "python": list, "files": dict}
        wrong = [name for name, kind in wanted.items() if not isinstance(manifest[name], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"its {MANIFEST} is broken: {error!r}") from error
    if wrong:
        raise BundleError(f"its {MANIFEST} is broken: {', '.join(wrong)}")
    return dict(manifest)


def _compare(declared: dict[str, Any], found: dict[str, tuple[str, int]]) -> None:
    present = {name: {"sha256": sha256, "bytes": size} for name, (sha256, size) in found.items()}
    for name in (MANIFEST, SIGNATURE):
        present.pop(name, None)
    missing, added = sorted(declared.keys() - present.keys()), sorted(present.keys() - declared.keys())
    changed = sorted(name for name in declared.keys() & present.keys() if declared[name] != present[name])
    for what, names in (("missing", missing), ("not in its manifest", added), ("changed", changed)):
        if names:
            raise BundleError(f"{names[0]} is {what}" + (f", and {len(names) - 1} more" if len(names) > 1 else ""))


def _fit(manifest: dict[str, Any], machine: str, python: str) -> None:
    if manifest["machine"] != machine:
        raise BundleError(f"it is for {manifest['machine']}, this machine is {machine}")
    if python not in manifest["python"]:
        raise BundleError(f"its packages are for Python {', '.join(manifest['python'])}, this machine has {python}")


def main(arguments: list[str]) -> str | None:
    """What is wrong, or None; prints the version of edged in the bundle."""
    source, target = Path(arguments[0]), Path(arguments[1])
    try:
        manifest = unpack(source, target)
        try:
            if len(arguments) > 2:
                _fit(manifest, arguments[2], arguments[3])
        except BundleError:
            shutil.rmtree(target)
            raise
    except BundleError as error:
        return str(error)
    sys.stdout.write(f"{manifest['edged']}\n")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
