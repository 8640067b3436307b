"""Offline bundles end to end: made by the command line, checked and installed by the installer that is in them."""

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edged.bundle import debian, gather, unpack
from edged.bundle.command import run
from edged.errors import BundleError
from tests.fake_system import System

CHECKOUT = Path(__file__).parents[2]
EDGED = Path(sys.executable).with_name("edged")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OFFLINE = {"PIP_NO_INDEX": "1", "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
NAMED = ("--model", "smollm2-135m-instruct")
X86_64_V3 = {"avx2", "bmi2", "fma", "f16c"}

Shell = Callable[[str], subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(600)


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's, with a home of its own and the usual cache; this Python is the first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name == "EDGED_CACHE" or not name.startswith("EDGED_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"EDGED_HOME": str(home), "PATH": path} | changes


def call(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def edged(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return call(EDGED, *arguments, env=environment(home))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree that nobody else writes to."""
    source = tmp_path_factory.mktemp("source")
    for part in ("edged", "models", "scripts", "systemd", "docs", "README.md", *gather.INSTALLER[:3]):
        origin = CHECKOUT / part
        if origin.is_dir():
            shutil.copytree(origin, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source / part)
    return source


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def create(home: Path, source: Path, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    usual = ("--target", "amd64", "--python", PYTHON, "--no-packages", "--source", source, "--out", out, "--json")
    return edged(home, "bundle", "create", *usual, *options)


@pytest.fixture(scope="module")
def bundle(home: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle for this machine, with ``k.pub`` beside it."""
    if platform.machine() != "x86_64":
        pytest.skip("the bundle that is made here is for x86-64")
    if not unpack.cpu_features(Path("/proc/cpuinfo").read_text()) >= X86_64_V3:
        pytest.skip("this processor has no AVX2, which the build for amd64 uses")
    cached = call(CHECKOUT / "scripts/cross-wheel.sh", "--cached", "amd64")
    if cached.returncode != 0:
        pytest.skip("the cache holds no llama-cpp-python wheel for amd64, and compiling takes minutes")
    folder = tmp_path_factory.mktemp("bundle")
    assert edged(home, "bundle", "keygen", "--out", folder / "k").returncode == 0
    made = create(home, source, folder / "edged.tar", *NAMED, "--sign", folder / "k.pem")
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["edged.tar", "k.pem", "k.pub"]
    return folder / "edged.tar"


# --- made ----------------------------------------------------------------------------------------------


@pytest.mark.models
def test_a_bundle_holds_what_it_was_asked_for_and_says_so(bundle: Path, home: Path) -> None:
    shown = edged(home, "bundle", "show", bundle, "--json")
    body = json.loads(shown.stdout)
    assert body["signed"] is True
    assert body["manifest"]["python"] == [PYTHON]
    assert body["manifest"]["models"] == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    kinds = {name.partition("/")[0] for name in body["manifest"]["files"]}
    assert kinds == {"installer", "models", "wheels"}
    assert "none" in edged(home, "bundle", "show", bundle).stdout.split("packages:")[1].splitlines()[0]


@pytest.mark.models
def test_a_bundle_is_checked_with_its_key_and_refused_with_another(bundle: Path, home: Path, tmp_path: Path) -> None:
    assert "signed by" in edged(home, "bundle", "check", bundle, "--key", bundle.with_name("k.pub")).stdout
    assert edged(home, "bundle", "keygen", "--out", tmp_path / "other").returncode == 0
    refused = edged(home, "bundle", "check", bundle, "--key", tmp_path / "other.pub", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stderr)["error"]["code"] == "bundle_invalid"


@pytest.mark.models
def test_openssl_verifies_the_signature_too(bundle: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None or "OpenSSL 3" not in call("openssl", "version").stdout:
        pytest.skip("openssl 3 is not installed")
    extract(bundle, tmp_path, "manifest.json")
    key, text = bundle.with_name("k.pub"), tmp_path / "manifest.json"
    verify = (
        "openssl",
        "pkeyutl",
        "-verify",
        "-rawin",
        "-pubin",
        "-inkey",
        key,
        "-in",
        text,
        "-sigfile",
        f"{text}.sig",
    )
    assert call(*verify).returncode == 0


@pytest.mark.models
def test_made_twice_it_is_the_same_byte_for_byte(bundle: Path, home: Path, source: Path, tmp_path: Path) -> None:
    again = create(home, source, tmp_path / "again.tar", *NAMED, "--sign", bundle.with_name("k.pem"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()


@pytest.mark.models
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: str(number.name))
def test_interrupted_it_leaves_neither_a_file_nor_a_process(
    source: Path, home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """While llama.cpp is being compiled, which is when people lose patience."""
    spoiled, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, spoiled)
    folder.mkdir()
    os.mkfifo(tmp_path / "began")
    compiler = spoiled / "scripts/cross-wheel.sh"
    half_made = tmp_path / "half-made"
    compiler.write_text(
        f"#!/bin/sh\ntrap \"rm -f '{half_made}'; exit 1\" TERM\ntouch '{half_made}'\n"
        f"sleep 600 & echo $! > '{tmp_path}/began'\nwait\n"
    )
    options = ("--target", "amd64", "--no-packages", "--source", str(spoiled), "--out", str(folder / "b.tar"))
    command = ["env", "--default-signal=INT", str(EDGED), "bundle", "create", *options]  # as a terminal starts it
    with subprocess.Popen(command, env=environment(home), stderr=subprocess.DEVNULL) as it:
        sleeper = os.pidfd_open(int((tmp_path / "began").read_text()))
        it.send_signal(number)
        assert it.wait(60) != 0
    with os.fdopen(sleeper):
        assert select.select([sleeper], [], [], 60)[0], "what it had started runs on"
    assert list(folder.iterdir()) == []
    assert not half_made.exists(), "the script had no time to remove what it made"


# --- installed -----------------------------------------------------------------------------------------


def extract(bundle: Path, folder: Path, prefix: str) -> None:
    """As ``tar -xf BUNDLE PREFIX`` does."""
    with tarfile.open(bundle) as archive:
        wanted = [member for member in archive if member.name.startswith(prefix)]
        archive.extractall(folder, wanted, filter="data")


@pytest.fixture
def installer(bundle: Path, tmp_path: Path, home: Path) -> Shell:
    """``installer(script)`` runs shell with the functions of the installer that came with the bundle, offline.

    A machine without systemd would install for a user only, which bundles are not for.
    """
    extract(bundle, tmp_path, "installer/")
    functions = f"set -euo pipefail; source '{tmp_path}/installer/install-edge.sh'; installs_service() {{ :; }}\n"

    def shell(script: str) -> subprocess.CompletedProcess[str]:
        return call("bash", "-c", functions + script, "install-edge.sh", env=environment(home, **OFFLINE), cwd=tmp_path)

    return shell


@pytest.mark.models
def test_a_dry_run_checks_the_bundle_and_changes_nothing(installer: Shell, bundle: Path, tmp_path: Path) -> None:
    key, prefix = bundle.with_name("k.pub"), tmp_path / "prefix"
    told = installer(f"main --bundle '{bundle}' --key '{key}' --prefix '{prefix}' --dry-run")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "the bundle is whole, and signed by the key" in told.stdout
    assert f"would install version {unpack.check(bundle)['edged']}-" in told.stdout
    assert not prefix.exists()


@pytest.mark.models
def test_a_tampered_bundle_is_refused_with_what_is_wrong_and_what_to_do(
    installer: Shell, bundle: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    shutil.copy(bundle, cut)
    os.truncate(cut, bundle.stat().st_size // 2)
    told = installer(f"main --bundle '{cut}' --prefix '{tmp_path}/prefix' --dry-run")
    assert told.returncode == 1
    assert "cannot be used: it cannot be read or unpacked" in told.stderr
    assert "Nothing was changed" in told.stderr


@pytest.mark.models
def test_a_model_that_is_not_in_the_bundle_is_refused_at_once(installer: Shell, bundle: Path, tmp_path: Path) -> None:
    told = installer(f"main --bundle '{bundle}' --prefix '{tmp_path}/prefix' --model gemma3-270m --dry-run")
    assert told.returncode == 1
    assert "the bundle has no model gemma3-270m" in told.stderr
    assert "smollm2-135m-instruct" in told.stderr


@pytest.mark.models
def test_without_a_network_it_becomes_an_edged_with_its_models(installer: Shell, bundle: Path, tmp_path: Path) -> None:
    """A version as the service gets it, its models out of the bundle, and the installer for the next bundle."""
    prefix, new_home = tmp_path / "prefix", tmp_path / "new-home"
    script = f"""
        bundle='{bundle}' key='{bundle.with_name("k.pub")}' prefix='{prefix}'
        source "$here/scripts/service.sh"
        settle_places && mkdir -p "$state"
        check_service
        make_version first
        broker=mqtt://hub config_text
        EDGED_HOME='{new_home}' EDGED_CACHE="$unpacked" "$prefix/versions/first/bin/edged" models pull
    """
    told = installer(script)
    assert told.returncode == 0, told.stdout + told.stderr
    assert '\n[chat]\nmodel = "smollm2-135m-instruct"\n' in told.stdout
    assert f'\n[mqtt]\nurl = "mqtt://hub"\nclient_id = "edged-{platform.node()}-' in told.stdout
    assert "[embed]" not in told.stdout, "nobody named an embedder: the default one needs no setting"
    assert len(list((new_home / "models").glob("*.gguf"))) == 2
    version = prefix / "versions/first"
    assert call(version / "bin/edged", "version", env=environment(new_home)).stdout.startswith("edged ")
    refused = call(version / "installer/install-edge.sh", "--user")
    assert refused.returncode == 1
    assert "Name a bundle: --bundle FILE" in refused.stderr


# --- Debian packages -------------------------------------------------------------------------------------


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A package with an epoch, as apt's cache names it."""
    if shutil.which("dpkg-deb") is None or shutil.which("apt-get") is None:
        pytest.skip("apt and dpkg are not on this machine")
    return build_deb(tmp_path, "edged-nothing")


def build_deb(folder: Path, name: str) -> Path:
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1:2.0+x\nArchitecture: all\nMaintainer: nobody <a@b.c>\n"
        "Description: nothing\n Over two\n lines.\n"
    )
    file = folder / f"{name}_1%3a2.0+x_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, file], check=True, capture_output=True)
    return file


def test_apt_takes_packages_from_the_index_of_a_bundle(deb: Path, tmp_path: Path) -> None:
    """Without root and the machine's own configuration: what a device does with debs/, but for installing."""
    debs = tmp_path / "debs"
    debs.mkdir()
    name = debian.file_name(deb.name)
    assert unpack.NAME.fullmatch(name)
    shutil.copy(deb, debs / name)
    (debs / debian.INDEX).write_bytes(debian.index({name: debs / name}))
    for each in ("lists/partial", "archives/partial"):
        (tmp_path / "apt" / each).mkdir(parents=True)
    (tmp_path / "apt/status").touch()
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{debs} ./\n")
    options = {
        "Dir::Etc::SourceList": tmp_path / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": tmp_path / "apt",
        "Dir::State::status": tmp_path / "apt/status",
        "Dir::Cache": tmp_path / "apt",
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-q", "-y", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    run([*apt, "update"], "apt does not read the index", hint="")
    found = run([*apt, "--print-uris", "install", "edged-nothing"], "apt does not find the package", hint="")
    assert found.startswith(f"'file:{debs}/")
    assert f" {deb.name} " in found


def test_apt_installs_a_bundles_package_but_takes_none_of_the_operators_for_it(deb: Path, tmp_path: Path) -> None:
    """By the installer's own call of apt, which here only says what it would do, of a system that is made up."""
    system = System(tmp_path / "system")
    debs = system.root / "bundle/debs"
    debs.mkdir(parents=True)
    packages = {debian.file_name(path.name): path for path in (deb, build_deb(tmp_path, "edged-less"))}
    for name, path in packages.items():
        shutil.copy(path, debs / name)
    (debs / debian.INDEX).write_bytes(debian.index(packages))
    status = system.root / "status"
    settings = {"Dir::State": system.root, "Dir::State::status": status, "APT::Get::Simulate": "true"}
    (system.root / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    script = """
    export APT_CONFIG="$root/apt.conf"; dpkg() { :; }; coming=(edged-nothing)
    unpacked="$root/bundle" scratch="$root"; offline_packages; cat "$root/apt.log"
    """
    status.write_text("")
    assert "Inst edged-nothing" in system.run(script)
    status.write_text(operators_package("Conflicts: edged-nothing"))
    refused = system.attempt(script)
    assert refused.returncode == 1
    assert "remove is disabled" in refused.stderr
    status.write_text(operators_package("Depends: edged-less", status="unpacked"))
    system.attempt(script)
    log = (system.root / "apt.log").read_text()
    assert "Inst edged-less" in log, "what a power cut left half installed is finished first"


def operators_package(relation: str, *, status: str = "installed") -> str:
    about = "Version: 1\nArchitecture: all\nMaintainer: nobody <a@b.c>\nDescription: theirs\n"
    return f"Package: operators\nStatus: install ok {status}\n{about}{relation}\n"


# --- programs that are run -----------------------------------------------------------------------------


def test_a_program_that_fails_is_told_with_its_last_lines() -> None:
    with pytest.raises(BundleError) as failed:
        run(["sh", "-c", "seq 100; echo no luck >&2; exit 3"], "it failed", hint="try again")
    assert failed.value.message.startswith("it failed (exit code 3)\n")
    assert failed.value.message.endswith("\n  | 100\n  | no luck")
    assert failed.value.hint == "try again"


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(BundleError, match="edged-no-such-program is not on this machine"):
        run(["edged-no-such-program"], "it failed", hint="")


def test_a_programs_last_line_is_its_result_and_each_is_seen() -> None:
    seen: list[str] = []
    assert run(["printf", "one\ntwo\n"], "it failed", hint="", on_line=seen.append) == "two"
    assert seen == ["one\n", "two\n"]
