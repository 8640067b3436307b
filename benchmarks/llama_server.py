"""llama-server of the very llama.cpp that edged's engine is built from: compiled once per processor, then cached.

The source is the one inside the pinned llama-cpp-python sdist, the flags are those of the wheel's build. As a script it
builds (about eight minutes on two cores) or says where the finished one lies; ``--dry-run`` only shows the commands.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("EDGED_CACHE", "~/.cache/edged")).expanduser() / "llama-server"
WHEEL_SCRIPT = 'set -euo pipefail; here=$1; . "$here/scripts/llama-wheel.sh"; shift; "$@"'
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    # What the wheel has no use for either.
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    # The libraries lie beside the program, wherever the cache is.
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)


def cached() -> Path:
    """Where the program of this processor and of the pinned version belongs, built or not."""
    return CACHE / _wheel_script("llama_key") / "llama-server"


def ensure() -> Path:
    """The program, built if it is not there yet."""
    program = cached()
    if program.exists():
        return program
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building.", dir=CACHE) as name:
        folder = Path(name)
        print(f"building llama-server for {program.parent.name}: minutes", flush=True)
        _build(folder)
        _keep(folder / "build/bin", folder / "kept")
        (folder / "kept").rename(program.parent)
    return program


def _build(folder: Path) -> None:
    for part in ("tmp", "sdist", "source"):
        (folder / part).mkdir()
    _wheel_script("download_source", sys.executable, str(folder))
    (archive,) = (folder / "sdist").glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").glob("*/vendor/llama.cpp")
    for command in commands(source, folder / "build"):
        subprocess.run(command, check=True)


def commands(source: Path, build: Path) -> list[list[str]]:
    """The two of cmake: configure, and compile what llama-server needs."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = _wheel_script("build_jobs")
    return [
        ["cmake", *generator, "-S", str(source), "-B", str(build), *FLAGS],
        ["cmake", "--build", str(build), "--target", "llama-server", "--parallel", jobs],
    ]


def _keep(built: Path, kept: Path) -> None:
    """The program and its libraries, links as links."""
    kept.mkdir()
    for file in (built / "llama-server", *built.glob("lib*.so*")):
        shutil.copy2(file, kept / file.name, follow_symlinks=False)


def _wheel_script(*function: str) -> str:
    """What a function of scripts/llama-wheel.sh prints: version, processor and download are defined there alone."""
    command = ["bash", "-c", WHEEL_SCRIPT, "-", str(ROOT), *function]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dry-run", action="store_true", help="only show where it belongs and how it is built")
    if arguments.parse_args().dry_run:
        print(cached(), "is there" if cached().exists() else "is to be built")
        print("\n".join(map(shlex.join, commands(Path("SDIST/vendor/llama.cpp"), Path("BUILD")))))
    else:
        print(ensure())


if __name__ == "__main__":
    main()
