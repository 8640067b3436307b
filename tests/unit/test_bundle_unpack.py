"""A bundle is checked as a device does it: what was changed in any way, or is not signed as asked, installs nothing."""

import ast
import errno
import hashlib
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st

from edged.bundle import sign, unpack

CHECKOUT = Path(__file__).parents[2]
MODEL = b"model" * 1000
ORDER = 2**252 + 27742317777372353535851937790883648493


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    """scripts/bundle.py, as the installer runs it."""
    spec = importlib.util.spec_from_file_location("bundle", CHECKOUT / "scripts/bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def public(key: Ed25519PrivateKey) -> bytes:
    return sign.public_bytes(key)


@pytest.fixture
def bundle(tmp_path: Path, key: Ed25519PrivateKey) -> Path:
    """A small signed bundle, as a directory."""
    folder = tmp_path / "bundle"
    contents = {"wheels/edged-0.1.0-py3-none-any.whl": b"wheel", "models/m.gguf": MODEL}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest = {"format": 1, "edged": "0.1.0", "machine": "aarch64", "python": ["3.11"], "files": files}
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.json.sig").write_bytes(key.sign(text))
    return folder


def packed(bundle: Path) -> Path:
    archive = bundle.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(bundle, ".")
    return archive


def appended(bundle: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    archive = packed(bundle)
    member.size = len(content)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(member, io.BytesIO(content))
    return archive


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def complaint_of(source: Path, target: Path, public_key: bytes | None = None) -> str:
    """What is wrong with a bundle; nothing may be left of it."""
    with pytest.raises(unpack.BrokenBundleError) as caught:
        unpack.unpack(source, target, public_key)
    assert not target.exists()
    assert not target.with_name(target.name + ".partial").exists()
    return str(caught.value)


# --- whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda bundle: bundle, packed], ids=["directory", "archive"])
def test_a_whole_bundle_is_unpacked(
    checker: ModuleType, bundle: Path, tmp_path: Path, form: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checker.main([str(form(bundle)), str(tmp_path / "out"), "aarch64", "3.11"]) is None
    assert capsys.readouterr().out == "0.1.0\n"
    assert (tmp_path / "out/models/m.gguf").read_bytes() == MODEL


def test_what_was_unpacked_is_a_bundle_again_with_its_signature(bundle: Path, tmp_path: Path, public: bytes) -> None:
    unpack.unpack(packed(bundle), tmp_path / "out", public)
    assert unpack.check(tmp_path / "out", public)["edged"] == "0.1.0"


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_bundle_is_unpacked_or_refused_when_damaged(
    bundle: Path, tmp_path: Path, compression: str
) -> None:
    archive = tmp_path / f"bundle.tar.{compression}"
    with tarfile.open(archive, f"w:{compression}") as tar:  # type: ignore[call-overload]
        tar.add(bundle, ".")
    assert unpack.check(archive)["machine"] == "aarch64"
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    archive.write_bytes(damaged)
    assert complaint_of(archive, tmp_path / "out")


# --- damaged, changed, hostile -------------------------------------------------------------------------

SPOILINGS: dict[str, Callable[[Path], object]] = {
    "models/m.gguf is changed": lambda bundle: (bundle / "models/m.gguf").write_bytes(b"Model" + MODEL[5:]),
    "m.gguf is changed: its size": lambda bundle: (bundle / "models/m.gguf").write_bytes(MODEL + b"more"),
    "models/m.gguf is missing": lambda bundle: (bundle / "models/m.gguf").unlink(),
    "wheels/more.whl is not in its manifest": lambda bundle: (bundle / "wheels/more.whl").write_bytes(b""),
    "there is no manifest.json": lambda bundle: (bundle / "manifest.json").unlink(),
    "manifest.json is broken": lambda bundle: (bundle / "manifest.json").write_text("{"),
    "manifest.json is broken: RecursionError": lambda bundle: (bundle / "manifest.json").write_text("[" * 99_999),
    "manifest.json is broken: files": lambda bundle: edit_manifest(bundle, lambda manifest: manifest.update(files=[])),
    "manifest.json is broken: '../x'": lambda bundle: edit_manifest(
        bundle, lambda manifest: manifest["files"].update({"../x": {"sha256": "", "bytes": 0}})
    ),
    "manifest.json is broken: 'models/m.gguf'": lambda bundle: edit_manifest(
        bundle, lambda manifest: manifest["files"]["models/m.gguf"].update(bytes=-1)
    ),
    "manifest.json is broken: edged": lambda bundle: edit_manifest(bundle, lambda m: m.update(edged="../../bin")),
    "manifest.json is broken: cpu_features": lambda bundle: edit_manifest(bundle, lambda m: m.update(cpu_features=[1])),
    "its format is 2": lambda bundle: edit_manifest(bundle, lambda manifest: manifest.update(format=2)),
}


@pytest.mark.parametrize("complaint", SPOILINGS)
@pytest.mark.parametrize("form", [lambda bundle: bundle, packed], ids=["directory", "archive"])
def test_a_bundle_that_is_not_as_its_manifest_says_leaves_nothing(
    bundle: Path, tmp_path: Path, complaint: str, form: Callable[[Path], Path]
) -> None:
    SPOILINGS[complaint](bundle)
    assert complaint in complaint_of(form(bundle), tmp_path / "out")


def test_a_bundle_cut_off_anywhere_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    archive = packed(bundle)
    whole = archive.read_bytes()
    for length in range(0, len(whole.rstrip(b"\0")), 700):
        archive.write_bytes(whole[:length])
        complaint_of(archive, tmp_path / "out")


def test_any_byte_of_a_signed_bundle_that_is_changed_is_noticed_or_changes_nothing(
    bundle: Path, tmp_path: Path, public: bytes
) -> None:
    """Bytes that no file's name, kind or content depends on, such as times and padding, may change."""
    archive = packed(bundle)
    whole = archive.read_bytes()
    for position in range(0, len(whole), 97):
        archive.write_bytes(whole[:position] + bytes([whole[position] ^ 0x21]) + whole[position + 1 :])
        target = tmp_path / f"out-{position}"
        try:
            unpack.unpack(archive, target, public)
        except unpack.BrokenBundleError:
            continue
        assert (target / "models/m.gguf").read_bytes() == MODEL


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "wheels/../../escaped", "a\x1b[2Jescaped", "a b", ".."])
def test_a_member_that_leads_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    archive = appended(bundle, tarfile.TarInfo(name))
    assert "no plain file within the bundle" in complaint_of(archive, tmp_path / "out")
    assert not list(tmp_path.rglob("*escaped"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=repr
)
def test_a_member_that_is_no_plain_file_is_refused(bundle: Path, tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("wheels/more.whl")
    member.type, member.linkname = kind, "/etc/passwd"
    assert "no plain file within the bundle" in complaint_of(appended(bundle, member), tmp_path / "out")


def test_a_link_or_a_pipe_in_a_directory_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "wheels/link").symlink_to("/etc")
    assert "'wheels/link' is no plain file" in complaint_of(bundle, tmp_path / "out")
    (bundle / "wheels/link").unlink()
    os.mkfifo(bundle / "wheels/pipe")
    assert "'wheels/pipe' is no plain file" in complaint_of(bundle, tmp_path / "out")


@pytest.mark.parametrize("name", ["models/m.gguf", "manifest.json"])
def test_a_file_that_is_in_it_twice_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    archive = appended(bundle, tarfile.TarInfo(name), (bundle / name).read_bytes())
    assert f"{name} is in it twice" in complaint_of(archive, tmp_path / "out")


def test_a_bundle_that_does_not_fit_on_the_disk_is_refused_before_it_is_unpacked(
    checker: ModuleType, bundle: Path, tmp_path: Path
) -> None:
    edit_manifest(bundle, lambda manifest: manifest["files"]["models/m.gguf"].update(bytes=1 << 60))
    assert "MB free" in complaint_of(bundle, tmp_path / "out")
    assert checker.main([str(bundle), str(tmp_path / "out")]).splitlines()[1] == "make room on that disk"


def test_a_disk_that_fills_up_is_not_the_bundles_fault(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: Path, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(unpack.BrokenBundleError, match="No space left") as full:
        unpack.unpack(bundle, tmp_path / "out")
    assert full.value.advice == "make room on that disk"


def pax_header(claimed_bytes: int) -> bytes:
    """The beginning of an extended header that says it is so long."""
    header = tarfile.TarInfo("./PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, claimed_bytes
    return header.tobuf(tarfile.GNU_FORMAT)


SPARSE = b"21 GNU.sparse.map=no\n"


@pytest.mark.parametrize(
    "beginning",
    [pax_header(1 << 40), pax_header(0) * 3000, pax_header(len(SPARSE)) + SPARSE.ljust(tarfile.BLOCKSIZE, b"\0")],
    ids=["a terabyte", "thousands", "no number"],
)
def test_headers_that_no_archive_has_are_a_broken_bundle(bundle: Path, tmp_path: Path, beginning: bytes) -> None:
    archive = packed(bundle)
    archive.write_bytes(beginning + archive.read_bytes())
    assert "cannot be read or unpacked: " in complaint_of(archive, tmp_path / "out")


# --- signed ------------------------------------------------------------------------------------------


def test_a_bundle_signed_by_the_key_is_taken(bundle: Path, tmp_path: Path, public: bytes) -> None:
    assert unpack.unpack(packed(bundle), tmp_path / "out", public)["edged"] == "0.1.0"


def test_without_a_key_nobodys_signature_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json.sig").write_bytes(b"nonsense")
    assert unpack.unpack(packed(bundle), tmp_path / "out")["edged"] == "0.1.0"


def test_a_bundle_that_is_not_signed_by_the_key_is_refused(bundle: Path, tmp_path: Path, public: bytes) -> None:
    other = sign.public_bytes(Ed25519PrivateKey.generate())
    assert "not of the key asked for" in complaint_of(packed(bundle), tmp_path / "out", other)
    (bundle / "manifest.json.sig").unlink()
    assert "it is not signed" in complaint_of(packed(bundle), tmp_path / "out", public)


def test_a_file_changed_together_with_its_sum_is_refused_by_the_signature(
    bundle: Path, tmp_path: Path, public: bytes
) -> None:
    (bundle / "models/m.gguf").write_bytes(b"evil")
    declared = {"sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"models/m.gguf": declared}))
    assert unpack.check(bundle)
    assert "the manifest was changed since" in complaint_of(packed(bundle), tmp_path / "out", public)


def test_nothing_of_an_unsigned_manifest_is_believed_where_a_key_is_asked_for(
    bundle: Path, tmp_path: Path, public: bytes
) -> None:
    (bundle / "manifest.json").write_text("{")
    assert "signature" in complaint_of(bundle, tmp_path / "out", public)


def test_keys_are_read_as_openssl_and_keygen_write_them(tmp_path: Path) -> None:
    known = sign.make_key(tmp_path / "k.pem", tmp_path / "k.pub")
    assert unpack.read_key(tmp_path / "k.pub") == known
    loaded = load_pem_public_key((tmp_path / "k.pub").read_bytes())
    assert isinstance(loaded, Ed25519PublicKey)
    assert loaded.public_bytes_raw() == known


@pytest.mark.parametrize("content", [b"", b"\xff", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_public_key_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k.pub").write_bytes(content)
    with pytest.raises(unpack.BrokenBundleError, match=r"k\.pub"):
        unpack.read_key(tmp_path / "k.pub")


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    sign.make_key(tmp_path / "k.pem", tmp_path / "k.pub")
    with pytest.raises(unpack.BrokenBundleError, match="no Ed25519 public key"):
        unpack.read_key(tmp_path / "k.pem")


VECTORS = {
    "1": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "2": (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "3": (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    "SHA(abc)": (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
}
"""Public key, message and signature of RFC 8032, section 7.1, by the name of the test there."""


@pytest.mark.parametrize("name", VECTORS)
def test_the_vectors_of_rfc_8032_verify_and_with_another_message_do_not(name: str) -> None:
    public, message, signature = map(bytes.fromhex, VECTORS[name])
    assert unpack.is_signed(message, signature, public)
    assert not unpack.is_signed(message + b"x", signature, public)


def test_a_signature_has_one_form_only() -> None:
    """Adding the group's order to its scalar gives an equation that holds, and is refused (RFC 8032, 5.1.7)."""
    public, message, signature = map(bytes.fromhex, VECTORS["2"])
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not unpack.is_signed(message, signature[:32] + scalar.to_bytes(32, "little"), public)
    assert not unpack.is_signed(message, signature + b"\0", public)
    assert not unpack.is_signed(message, signature, public + b"\0")


@given(secret=st.binary(min_size=32, max_size=32), message=st.binary(max_size=200), flipped=st.integers(-1, 511))
def test_every_verdict_is_that_of_another_library(secret: bytes, message: bytes, flipped: int) -> None:
    private = Ed25519PrivateKey.from_private_bytes(secret)
    signature = int.from_bytes(private.sign(message), "big")
    spoiled = (signature ^ (1 << flipped if flipped >= 0 else 0)).to_bytes(64, "big")
    assert unpack.is_signed(message, spoiled, sign.public_bytes(private)) == verdict(private, message, spoiled)


def verdict(private: Ed25519PrivateKey, message: bytes, signature: bytes) -> bool:
    try:
        private.public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


# --- this machine --------------------------------------------------------------------------------------

PI_5 = unpack.Device("aarch64", {"3.11"}, {"asimd", "atomics", "asimddp"}, (2, 36), {"bookworm"})
MANIFEST = {
    "target": "rpi5",
    "machine": "aarch64",
    "python": ["3.11"],
    "suite": "bookworm",
    "glibc": "2.34",
    "cpu_features": ["atomics", "asimddp"],
    "files": {},
}


def test_a_bundle_for_this_machine_fits() -> None:
    unpack.fit(MANIFEST, PI_5)


@pytest.mark.parametrize(
    ("change", "complaint", "advice"),
    [
        ({"machine": "riscv64"}, "it is for riscv64, this machine is aarch64", "--target BOARD --python 3.11'"),
        ({"cpu_features": ["atomics", "i8mm"]}, "it is for rpi5: this processor lacks i8mm", "--target BOARD"),
        ({"glibc": "2.38"}, "its programs need glibc 2.38, this machine has 2.36", "a system that is as old"),
        ({"python": ["3.13"]}, "for Python 3.13, this machine has 3.11", "create --target rpi5 --python 3.11'"),
        (
            {"python": ["3.13"], "suite": "trixie", "files": {"debs/python3.13_1_arm64.deb": {}}},
            "for Python 3.13",
            "create --target rpi5 --python 3.11'",
        ),
    ],
)
def test_a_bundle_for_another_machine_is_refused_with_the_reason_and_how_to_make_a_fit_one(
    change: dict[str, Any], complaint: str, advice: str
) -> None:
    with pytest.raises(unpack.BrokenBundleError, match=complaint) as refused:
        unpack.fit({**MANIFEST, **change}, PI_5)
    assert advice in refused.value.advice


def test_where_python_comes_with_the_bundle_the_advice_names_none() -> None:
    with pytest.raises(unpack.BrokenBundleError) as refused:
        unpack.fit(MANIFEST, PI_5._replace(pythons={"3.10"}))
    assert refused.value.advice == "make one with 'edged bundle create --target rpi5'"


def test_a_python_that_comes_with_the_bundle_for_this_release_will_do() -> None:
    jetson = PI_5._replace(pythons={"3.10"}, suites={"jammy"})
    brings = {**MANIFEST, "suite": "jammy", "files": {"debs/python3.11_3.11.0_arm64.deb": {}}}
    unpack.fit(brings, jetson)


def test_what_the_kernel_and_the_distribution_say_is_understood() -> None:
    cores = "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"
    assert unpack.cpu_features(cores) == {"fp", "asimd"}
    assert unpack.cpu_features("flags\t\t: fpu avx2\nbugs\t\t: none\n") == {"fpu", "avx2"}
    mint = 'VERSION_CODENAME=wilma\nID=linuxmint\nUBUNTU_CODENAME="noble"\n'
    assert unpack.codenames(mint) == {"wilma", "noble"}
    assert unpack.version("2.36") == (2, 36)


def test_the_command_line_refuses_what_does_not_fit_and_leaves_nothing(
    checker: ModuleType, bundle: Path, tmp_path: Path
) -> None:
    told = checker.main([str(packed(bundle)), str(tmp_path / "out"), "riscv64", "3.11"])
    assert told.splitlines()[0] == "it is for aarch64, this machine is riscv64"
    assert not (tmp_path / "out").exists()


def test_the_command_line_asks_for_the_signature_of_the_key(
    checker: ModuleType, bundle: Path, tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    sign.make_key(tmp_path / "other.pem", tmp_path / "other.pub")
    arguments = ["--key", str(tmp_path / "other.pub"), str(bundle), str(tmp_path / "out"), "aarch64", "3.11"]
    assert "not of the key asked for" in checker.main(arguments)


def test_the_checker_is_one_file_that_a_systems_own_python_runs() -> None:
    """From 3.9 on, with nothing but the standard library."""
    tree = ast.parse((CHECKOUT / "scripts/bundle.py").read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in imported if name is None or name.startswith("edged")]
