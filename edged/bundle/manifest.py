"""What a bundle is for and what it says of itself: boards, the systems they run, and the manifest's bytes."""

import json
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from edged.bundle import unpack
from edged.errors import BundleError

Distribution = Literal["debian", "ubuntu"]


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A board's system. ``suite`` is the release as its package archive calls it, ``glibc`` the C library's version."""

    name: str
    distribution: Distribution
    suite: str
    glibc: tuple[int, int]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of board. ``cpu_features`` are what its build of llama.cpp needs, in the words of the board's kernel.

    ``systems`` maps the Python of each system it may run to that system, the usual one first.
    """

    name: str
    machine: str
    cpu_features: tuple[str, ...]
    systems: Mapping[str, System]

    @property
    def architecture(self) -> str:
        """As Debian calls the machine."""
        return {"aarch64": "arm64", "x86_64": "amd64"}[self.machine]

    def system(self, python: str | None) -> tuple[str, System]:
        """The Python asked for, or the usual one, and the system that has it."""
        chosen = next(iter(self.systems)) if python is None else python
        if chosen not in self.systems:
            raise BundleError(
                f"nothing is known of a {self.name} with Python {chosen}",
                hint=f"choose --python {' or '.join(self.systems)}",
                target=self.name,
            )
        return chosen, self.systems[chosen]


_BOOKWORM: Final = System(name="Debian 12", distribution="debian", suite="bookworm", glibc=(2, 36))
_TRIXIE: Final = System(name="Debian 13", distribution="debian", suite="trixie", glibc=(2, 41))
_JAMMY: Final = System(name="Ubuntu 22.04", distribution="ubuntu", suite="jammy", glibc=(2, 35))
_NOBLE: Final = System(name="Ubuntu 24.04", distribution="ubuntu", suite="noble", glibc=(2, 39))
_USUAL: Final = {"3.11": _BOOKWORM, "3.12": _NOBLE, "3.13": _TRIXIE}
_JETPACK: Final = {"3.11": _JAMMY, "3.12": _NOBLE}  # JetPack 6, whose own Python is 3.10, and JetPack 7
_A76: Final = ("atomics", "asimddp", "fphp", "asimdhp")  # what armv8.2-a+dotprod+fp16 may use
_X86_64_V3: Final = ("sse4_2", "avx", "avx2", "bmi2", "fma", "f16c")

TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target(name="rpi5", machine="aarch64", cpu_features=_A76, systems=_USUAL),
        Target(name="rpi4", machine="aarch64", cpu_features=(), systems=_USUAL),
        Target(name="jetson", machine="aarch64", cpu_features=_A76, systems=_JETPACK),
        Target(name="rk3588", machine="aarch64", cpu_features=_A76, systems=_USUAL),
        Target(name="amd64", machine="x86_64", cpu_features=_X86_64_V3, systems=_USUAL),
    )
}
"""The boards that scripts/cross-wheel.sh compiles llama.cpp for, by name."""


def find_target(name: str) -> Target:
    """A board by its name. Raises :class:`BundleError` with the names there are."""
    if name not in TARGETS:
        raise BundleError(f"there is no target '{name}'", hint=f"choose --target {', '.join(TARGETS)}", target=name)
    return TARGETS[name]


class Declared(msgspec.Struct, frozen=True):
    """What the manifest says of one file."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is and holds; docs/BUNDLE.md explains each key.

    ``chat`` and ``embed`` are what a new installation is to use instead of the defaults, ``packages`` Debian's.
    """

    format: int = unpack.FORMAT
    edged: str
    target: str = ""
    machine: str
    python: tuple[str, ...]
    suite: str = ""
    glibc: str = "0"
    cpu_features: tuple[str, ...] = ()
    chat: str = ""
    embed: str = ""
    models: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    files: dict[str, Declared]


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes: the same for the same content, one value a line, so that people and sed can read it."""
    body = msgspec.to_builtins(manifest)
    body["files"] = dict(sorted(body["files"].items()))
    return (json.dumps(body, indent=1) + "\n").encode()


def decode(text: bytes) -> Manifest:
    """The manifest of a bundle. Raises :class:`unpack.BrokenBundleError`."""
    try:
        return msgspec.convert(unpack.parse(text), Manifest)
    except msgspec.ValidationError as error:
        raise unpack.BrokenBundleError(f"its {unpack.MANIFEST} is broken: {error}") from error
