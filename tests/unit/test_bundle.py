"""How a bundle is put together: what it says of itself, which wheels belong into it, the same bytes for the same."""

import contextlib
import io
import json
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edged import __version__
from edged.bundle import archive, debian, gather, manifest, sign, unpack, wheels
from edged.bundle.manifest import TARGETS, Declared, Manifest
from edged.bundle.wheels import Wheel
from edged.cli import app
from edged.errors import BundleError, BundleInvalidError, DiskFullError, ModelNotFoundError
from edged.models.catalog import Catalog
from edged.models.sources import no_progress

CHECKOUT = Path(__file__).parents[2]
BARE = Manifest(edged="0.1.0", machine="aarch64", python=("3.11",), files={})


def write(out: Path, files: dict[str, archive.Content]) -> Manifest:
    """A bundle of these files."""
    described = Manifest(edged="0.1.0", machine="aarch64", python=("3.11",), files=archive.declare(files, no_progress))
    archive.write(out, manifest.encode(described), None, files, no_progress)
    return described


# --- the manifest --------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written() -> None:
    files = {"wheels/a.whl": Declared("0" * 64, 3), "models/b.gguf": Declared("1" * 64, 0)}
    described = Manifest(edged="0.1.0", machine="aarch64", python=("3.11",), models=("b",), files=files)
    assert manifest.decode(manifest.encode(described)) == described


@given(st.permutations(["a", "b/c", "b/d", "e"]))
def test_a_manifests_bytes_do_not_depend_on_the_order_its_files_were_found_in(names: list[str]) -> None:
    described = Manifest(
        edged="1", machine="x86_64", python=("3.12",), files={name: Declared(name, len(name)) for name in names}
    )
    in_order = Manifest(
        edged="1", machine="x86_64", python=("3.12",), files={name: Declared(name, len(name)) for name in sorted(names)}
    )
    assert manifest.encode(described) == manifest.encode(in_order)


def test_a_manifest_of_the_wrong_kind_is_a_broken_bundle() -> None:
    text = manifest.encode(BARE).replace(b'"chat": ""', b'"chat": 1')
    with pytest.raises(unpack.BrokenBundleError, match="chat"):
        manifest.decode(text)


def test_every_target_is_one_that_llama_cpp_is_compiled_for() -> None:
    script = (CHECKOUT / "scripts/cross-wheel.sh").read_text()
    cases = script.split('case "$1" in')[1].split("*)")[0]
    compiled = {name.strip() for line in cases.splitlines() if ")" in line for name in line.split(")")[0].split("|")}
    assert compiled == TARGETS.keys()
    for target in TARGETS.values():
        assert f"machine={target.machine}" in next(line for line in cases.splitlines() if target.name in line)


def test_a_pi_4_asks_for_no_instructions_that_it_lacks() -> None:
    assert TARGETS["rpi4"].cpu_features == ()
    assert "asimddp" in TARGETS["rpi5"].cpu_features


def test_the_system_follows_from_the_python() -> None:
    assert TARGETS["rpi5"].system(None)[1].suite == "bookworm"
    assert TARGETS["rpi5"].system("3.13")[1].suite == "trixie"
    assert TARGETS["jetson"].system(None)[1].suite == "jammy"
    with pytest.raises(BundleError) as refused:
        TARGETS["jetson"].system("3.13")
    assert refused.value.hint == "choose --python 3.11 or 3.12"


def test_a_target_that_nobody_knows_is_answered_with_those_there_are() -> None:
    with pytest.raises(BundleError) as refused:
        manifest.find_target("rpi3")
    assert "rpi4" in refused.value.hint


# --- the archive ---------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes_whoever_and_whenever_packs_them(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder, mode in ((first, 0o600), (second, 0o777)):
        folder.mkdir()
        (folder / "a.sh").write_bytes(b"a")
        (folder / "a.sh").chmod(mode)
    write(tmp_path / "1.tar", {"b": b"b", "installer/a.sh": first / "a.sh"})
    write(tmp_path / "2.tar", {"installer/a.sh": second / "a.sh", "b": b"b"})
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_the_manifest_comes_first_and_only_the_installer_can_be_run(tmp_path: Path) -> None:
    scripts: dict[str, archive.Content] = dict.fromkeys(("installer/a.sh", "installer/scripts/bundle.py"), b"")
    write(tmp_path / "b.tar", {"debs/a.deb": b"", "wheels/a.sh": b"", **scripts})
    with tarfile.open(tmp_path / "b.tar") as packed:
        members = packed.getmembers()
    assert members[0].name == "manifest.json"
    assert {member.name for member in members if member.mode & 0o111} == scripts.keys()
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members} == {(0, 0, "", archive.MTIME)}


def test_what_was_packed_is_a_bundle_as_a_device_checks_it(tmp_path: Path) -> None:
    described = write(tmp_path / "b.tar", {"models/m.gguf": b"model" * 999})
    assert archive.check(tmp_path / "b.tar", None) == described
    assert archive.read(tmp_path / "b.tar") == (described, False)


def test_a_file_with_a_name_that_devices_refuse_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no name for a file"):
        write(tmp_path / "b.tar", {"wheels/a b.whl": b""})


def test_an_error_while_packing_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "b.tar"
    out.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), archive.staged(out) as staging:
        staging.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.tar", b"before")]


def test_without_room_for_all_of_it_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    with (tmp_path / "sparse").open("r+b") as file:
        file.truncate(1 << 42)
    with pytest.raises(DiskFullError):
        archive.write(tmp_path / "b.tar", b"{}", None, {"models/m.gguf": tmp_path / "sparse"}, no_progress)
    assert not (tmp_path / "b.tar").exists()


def test_progress_reaches_the_size_of_all(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    archive.declare({"a": b"12345", "b": b"67"}, lambda done, total: told.append((done, total)))
    assert told[-1] == (7, 7)


# --- keys ----------------------------------------------------------------------------------------------


def test_a_private_key_is_for_its_owner_alone_and_never_written_over(tmp_path: Path) -> None:
    private, public = tmp_path / "k.pem", tmp_path / "k.pub"
    sign.make_key(private, public)
    assert private.stat().st_mode & 0o077 == 0
    kept = private.read_bytes(), public.read_bytes()
    with pytest.raises(BundleError, match="is there already"):
        sign.make_key(private, public)
    private.unlink()
    with pytest.raises(BundleError, match="is there already"):
        sign.make_key(private, public)
    assert not private.exists()
    assert public.read_bytes() == kept[1]


def test_an_encrypted_key_signs_with_its_passphrase_only(tmp_path: Path) -> None:
    known = sign.make_key(tmp_path / "k.pem", tmp_path / "k.pub", "secret")
    key = sign.load_key(tmp_path / "k.pem", lambda: "secret")
    assert unpack.is_signed(b"text", key.sign(b"text"), known)
    with pytest.raises(BundleError, match="cannot be used"):
        sign.load_key(tmp_path / "k.pem", lambda: "wrong")


def test_a_key_that_cannot_be_read_is_not_the_bundles_fault(tmp_path: Path) -> None:
    write(tmp_path / "b.tar", {})
    with pytest.raises(BundleInvalidError) as refused:
        archive.check(tmp_path / "b.tar", tmp_path / "missing.pub")
    assert "missing.pub" in refused.value.message
    assert "edged bundle keygen" in refused.value.hint


def test_what_is_no_private_key_is_refused_by_its_name(tmp_path: Path) -> None:
    sign.make_key(tmp_path / "k.pem", tmp_path / "k.pub")
    for name in ("k.pub", "missing.pem"):
        with pytest.raises(BundleError, match=name):
            sign.load_key(tmp_path / name, lambda: "")


def test_a_bundle_is_checked_with_the_key_that_signed_it_and_refused_with_another(tmp_path: Path) -> None:
    for name in ("k", "other"):
        sign.make_key(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
    key: Ed25519PrivateKey = sign.load_key(tmp_path / "k.pem", lambda: "")
    text = manifest.encode(BARE)
    archive.write(tmp_path / "b.tar", text, key.sign(text), {}, no_progress)
    assert archive.check(tmp_path / "b.tar", tmp_path / "k.pub") == BARE
    with pytest.raises(BundleInvalidError, match="not of the key asked for") as refused:
        archive.check(tmp_path / "b.tar", tmp_path / "other.pub")
    assert refused.value.hint


# --- wheels ----------------------------------------------------------------------------------------------

ON_PI = wheels.environments("3.11", "aarch64")


def test_what_is_needed_is_judged_for_the_device() -> None:
    """Markers of its Python and machine hold, those of the PC's do not."""
    found = [
        Wheel(
            "edged",
            "1",
            (
                "on-arm; platform_machine == 'aarch64'",
                "for-old; python_version < '3.12'",
                "for-new; python_version >= '3.12'",
                "for-windows; sys_platform == 'win32'",
                "only-extra; extra == 'demo'",
                "web[fast]>=2",
            ),
        ),
        Wheel("on-arm", "1", ("deep",)),
        Wheel("deep", "1", ()),
        Wheel("for-old", "1", ()),
        Wheel("web", "2.5", ("speed; extra == 'fast'",)),
        Wheel("speed", "1", ("edged",)),
        Wheel("left-over", "1", ()),
    ]
    assert wheels.closure(found, "edged", ON_PI) == ({"edged", "on-arm", "deep", "for-old", "web", "speed"}, [])


def test_what_only_some_patch_releases_need_is_taken_along() -> None:
    found = [Wheel("edged", "1", ("backport; python_full_version < '3.11.3'",)), Wheel("backport", "1", ())]
    assert wheels.closure(found, "edged", ON_PI)[0] == {"edged", "backport"}


def test_what_pip_left_out_or_brought_too_old_is_named_without_its_marker() -> None:
    found = [Wheel("edged", "1", ("Some.Thing[x]>=2; python_version < '3.12'", "old>=2")), Wheel("old", "1", ())]
    assert wheels.closure(found, "edged", ON_PI)[1] == ["Some.Thing[x]>=2", "old>=2"]


def make_wheel(folder: Path, tags: str, libraries: dict[str, bytes]) -> Path:
    path = folder / f"some_thing-1.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            "some_thing-1.0.dist-info/METADATA", "Name: some-thing\nRequires-Dist: a>=1\n\nRequires-Dist: b\n"
        )
        for name, content in libraries.items():
            wheel.writestr(name, content)
    return path


def test_a_wheel_tells_its_name_and_what_it_needs(tmp_path: Path) -> None:
    assert wheels.read_wheel(make_wheel(tmp_path, "py3-none-any", {})) == Wheel("some-thing", "1.0", ("a>=1",))


@pytest.mark.parametrize(
    ("tags", "glibc"),
    [
        ("py3-none-any", (0, 0)),
        ("cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64", (2, 17)),
        ("cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64", (2, 27)),
        ("cp36-abi3-manylinux1_x86_64.manylinux_2_5_x86_64", (2, 5)),
        ("py3-none-linux_aarch64", (2, 34)),
    ],
)
def test_the_c_library_that_a_wheel_needs_is_known(tmp_path: Path, tags: str, glibc: tuple[int, int]) -> None:
    libraries = {"lib/a.so.1": b"\0GLIBC_2.17\0GLIBC_2.34\0GLIBCXX_3.4.99\0", "lib/data": b"\0GLIBC_2.99\0"}
    assert wheels.glibc_needed([make_wheel(tmp_path, tags, libraries)]) == glibc


# --- Debian packages ----------------------------------------------------------------------------------


def test_each_distribution_has_its_archives_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _path: True)
    lines = debian.sources(TARGETS["rpi5"].system(None)[1], "arm64", {"Debian": "http://near/debian"})
    assert [line.split("] ")[1] for line in lines] == [
        "http://near/debian bookworm main",
        "http://near/debian bookworm-updates main",
        "http://deb.debian.org/debian-security bookworm-security main",
    ]
    jetson = debian.sources(TARGETS["jetson"].system(None)[1], "arm64", {"Ubuntu": "http://near/ubuntu"})
    assert {line.split("] ")[1].split(" ", 1)[0] for line in jetson} == {"http://ports.ubuntu.com/ubuntu-ports"}
    assert all("signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg" in line for line in jetson)


def test_without_the_archives_keys_their_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _path: False)
    with pytest.raises(BundleError) as refused:
        debian.sources(TARGETS["rpi5"].system(None)[1], "arm64", {})
    assert "debian-archive-keyring" in refused.value.hint


@pytest.mark.parametrize("name", ["-o", "Foo", "a b", "mosquitto=1", "../x", ""])
def test_what_is_no_package_name_never_reaches_apt(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="no name of a Debian package"):
        debian.fetch([name], TARGETS["rpi5"].system(None)[1], "arm64", tmp_path / "apt", no_progress)


# --- the plan ------------------------------------------------------------------------------------------


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models", tmp_path / "cache")


def plan(catalog: Catalog, *models: str, source: Path | None = None) -> gather.Order:
    return gather.plan(catalog, "rpi5", models=models, source=source, cache=Path("/nowhere"))


def test_models_of_a_kind_that_is_not_named_are_the_default_ones(catalog: Catalog) -> None:
    order = plan(catalog)
    assert order.models == ("smollm2-135m-instruct", "all-minilm-l6-v2")
    assert (order.chat, order.embed) == ("", "")
    order = plan(catalog, "qwen2.5-0.5b-instruct", "qwen2.5-1.5b-instruct")
    assert (order.chat, order.embed) == ("qwen2.5-0.5b-instruct", "")
    assert order.models == ("qwen2.5-0.5b-instruct", "all-minilm-l6-v2", "qwen2.5-1.5b-instruct")
    assert plan(catalog, "bge-small-en-v1.5").models == ("smollm2-135m-instruct", "bge-small-en-v1.5")


def test_a_model_that_nobody_knows_is_refused_before_anything_is_made(catalog: Catalog) -> None:
    with pytest.raises(ModelNotFoundError):
        plan(catalog, "qwen3.5")


def test_what_is_not_edgeds_source_tree_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"install-edge\.sh is missing"):
        plan(catalog, source=tmp_path)


def test_an_edged_without_its_source_tree_says_what_is_needed(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "__file__", str(tmp_path / "site-packages/edged/bundle/gather.py"))
    with pytest.raises(BundleError) as refused:
        plan(catalog)
    assert "--source" in refused.value.hint


def test_the_installer_in_a_bundle_is_all_that_it_sources() -> None:
    installer = gather.installer(CHECKOUT)
    scripts = {name for name in installer if name.endswith(".sh")}
    for name in scripts:
        content = installer[name]
        assert isinstance(content, Path)
        for line in content.read_text().splitlines():
            if line.strip().startswith('source "$here/'):
                assert f"installer/{line.split('$here/')[1].rstrip().rstrip(chr(34))}" in installer
    assert {"installer/scripts/bundle.py", "installer/scripts/llama/barrier.c"} <= installer.keys()
    assert "installer/systemd/edged.service" in installer
    assert not [name for name in installer if "__pycache__" in name]


def test_a_source_tree_of_another_version_is_refused(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_source: Path, directory: Path) -> Path:
        path = directory / "edged-9.9-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("edged-9.9.dist-info/METADATA", "Name: edged\nVersion: 9.9\n")
        return path

    monkeypatch.setattr(wheels, "build_edged", build)
    with pytest.raises(BundleError, match=f"is edged 9.9, and this program is edged {__version__}") as refused:
        gather.create(plan(catalog), catalog, tmp_path / "b.tar", lambda _step: contextlib.nullcontext(no_progress))
    assert f"pip install -e '{CHECKOUT}[bundle]'" in refused.value.hint
    assert not list(tmp_path.glob("*b.tar*"))


def test_an_imported_model_is_refused_because_devices_do_not_know_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalog.info("smollm2-135m-instruct")
    monkeypatch.setattr(Catalog, "info", lambda _catalog, _name: known)
    with pytest.raises(BundleError, match="'mine' was imported here"):
        plan(catalog, "mine")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--target", "rpi3"], "bundle_failed"),
        (["--target", "jetson", "--python", "3.13"], "bundle_failed"),
        (["--target", "rpi5", "--model", "nonsense"], "model_not_found"),
        (["--target", "rpi5", "--packages", "mosquitto,less", "--no-packages"], "request_invalid"),
    ],
)
def test_what_cannot_be_made_is_refused_by_the_command_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: str
) -> None:
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)
    monkeypatch.setenv("EDGED_HOME", str(tmp_path / "home"))
    refused = CliRunner().invoke(app, ["bundle", "create", *options, "--out", str(tmp_path / "b.tar"), "--json"])
    assert refused.exit_code == 1
    assert json.loads(refused.stderr)["error"]["code"] == code
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_cannot_be_written_where_there_is_no_directory(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be written"):
        gather.create(plan(catalog), catalog, tmp_path / "missing/b.tar", lambda _step: pytest.fail("began"))


def test_reading_what_is_no_bundle_says_so(tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"hello")
    with pytest.raises(BundleInvalidError, match="cannot be used"):
        archive.read(tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(BundleInvalidError, match=r"there is no manifest\.json"):
        archive.read(tmp_path / "b.tar")
