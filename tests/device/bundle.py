"""An offline bundle for a board, as docs/BUNDLE.md describes it: what install-edge.sh installs without a network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edged import __version__
from tests.device.board import Architecture

CHECKOUT = Path(__file__).parents[2]
MACHINES: dict[Architecture, str] = {"amd64": "x86_64", "arm64": "aarch64"}
TARGETS: dict[Architecture, str] = {"amd64": "amd64", "arm64": "rpi5"}
PYTHON = "3.11"  # the boards' Debian
GLIBC_TAGS = ("manylinux_2_17", "manylinux_2_28", "manylinux_2_34", "manylinux2014", "linux")
MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")


def make_bundle(architecture: Architecture, directory: Path, *, version: str = __version__) -> Path:
    """A bundle, unpacked, with this checkout's edged; takes the packages from pip's cache or the registry."""
    wheels = directory / "wheels"
    wheels.mkdir(parents=True)
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(CHECKOUT))
    llama = _llama_wheel(architecture)
    shutil.copy(llama, wheels)
    platforms = [part for tag in GLIBC_TAGS for part in ("--platform", f"{tag}_{MACHINES[architecture]}")]
    wanted = ["--only-binary=:all:", "--python-version", PYTHON, *platforms, "--find-links", str(wheels)]
    _pip("download", *wanted, "--dest", str(wheels), f"edged=={__version__}")
    _copy_models(directory / "models")
    (directory / "debs").mkdir()
    write_manifest(directory, architecture, version)
    return directory


def with_packages(bundle: Path, target: Path, architecture: Architecture, *packages: str) -> Path:
    """The same bundle with Debian packages, and what they need, for a board that lacks them."""
    shutil.copytree(bundle, target, copy_function=os.link)
    script = CHECKOUT / "scripts/board-image.sh"
    subprocess.run([script, "--packages", target / "debs", architecture, *packages], check=True, capture_output=True)
    write_manifest(target, architecture)
    return target


def write_manifest(directory: Path, architecture: Architecture, version: str = __version__) -> None:
    """Sizes and sums of all that is there."""
    manifest = directory / "manifest.json"
    manifest.unlink(missing_ok=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    body = {
        "format": 1,
        "edged": version,
        "target": TARGETS[architecture],
        "machine": MACHINES[architecture],
        "python": [PYTHON],
        "files": {
            path.relative_to(directory).as_posix(): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in files
        },
    }
    manifest.write_text(json.dumps(body, indent=1))


def pack(directory: Path, archive: Path) -> Path:
    subprocess.run(["tar", "-cf", str(archive), "-C", str(directory), "."], check=True)
    return archive


def _pip(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command: Sequence[str] = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)


def _llama_wheel(architecture: Architecture) -> Path:
    """The one of the board's processor; compiling it takes minutes when it is not in the cache."""
    script = CHECKOUT / "scripts/cross-wheel.sh"
    done = subprocess.run([script, TARGETS[architecture]], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def _copy_models(target: Path) -> None:
    """As edged's cache keeps them, each with its record."""
    target.mkdir()
    cache = Path(os.environ.get("EDGED_CACHE", "~/.cache/edged")).expanduser() / "models"
    for model in MODELS:
        for path in cache.glob(f"{model}-*.gguf*"):
            shutil.copy(path, target)
