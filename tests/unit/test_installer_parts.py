"""The installer's parts without a machine to install on: boards told apart, build flags, bundles checked, options."""

import hashlib
import importlib.util
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
PI_4_FEATURES = "fp asimd evtstrm crc32 cpuid"
A76_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


# --- boards ------------------------------------------------------------------------------------------


class FakeRoot:
    """What a board shows of itself, below a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, path: str, content: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def ask(self, function: str, machine: str = "aarch64") -> str:
        """What a function of scripts/board.sh prints on this board."""
        script = (
            f"set -euo pipefail; root='{self.folder}'; uname() {{ echo {machine}; }};"
            f" source scripts/board.sh; {function}"
        )
        done = subprocess.run(["bash", "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def board(tmp_path: Path) -> FakeRoot:
    board = FakeRoot(tmp_path)
    board.has("proc/cpuinfo", f"processor\t: 0\nFeatures\t: {A76_FEATURES}\n")
    return board


@pytest.mark.parametrize(
    ("model", "compatible", "name"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0\0", "raspberrypi,5-model-b\0brcm,bcm2712\0", "rpi5"),
        ("Raspberry Pi 4 Model B Rev 1.4\0", "raspberrypi,4-model-b\0brcm,bcm2711\0", "rpi4"),
        ("Raspberry Pi Compute Module 4 Rev 1.1\0", "", "rpi4"),
        ("Orange Pi 5\0", "xunlong,orangepi-5\0rockchip,rk3588s\0", "rk3588"),
        ("Radxa ROCK 3C\0", "radxa,rock-3c\0rockchip,rk3566\0", "rk3566"),
        ("Some board\0", "vendor,board\0", "arm64"),
    ],
)
def test_a_board_is_told_by_its_device_tree(board: FakeRoot, model: str, compatible: str, name: str) -> None:
    board.has("proc/device-tree/model", model)
    board.has("proc/device-tree/compatible", compatible)
    assert board.ask("board_name") == name


def test_a_machine_without_a_device_tree_is_its_architecture(board: FakeRoot) -> None:
    assert board.ask("board_name", machine="x86_64") == "amd64"
    assert board.ask("llama_flags", machine="x86_64") == ""


def test_a_jetson_is_built_with_cuda_where_the_compiler_is(board: FakeRoot) -> None:
    board.has("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    board.has("proc/device-tree/compatible", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    assert board.ask("board_name") == "jetson"
    assert board.ask("l4t_release") == "36.4.3"
    board.has("usr/local/cuda/bin/nvcc", "")
    (board.folder / "usr/local/cuda/bin/nvcc").chmod(0o755)
    flags = board.ask("llama_flags")
    assert "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16" in flags
    assert f"-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER={board.folder}/usr/local/cuda/bin/nvcc" in flags
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in flags


@pytest.mark.parametrize(
    ("features", "architecture"),
    [
        (PI_4_FEATURES, "armv8-a"),
        (A76_FEATURES, "armv8.2-a+dotprod+fp16"),
        (f"{A76_FEATURES} i8mm", "armv8.2-a+dotprod+fp16+i8mm"),
    ],
)
def test_llama_cpp_is_compiled_for_what_the_processor_can(board: FakeRoot, features: str, architecture: str) -> None:
    board.has("proc/cpuinfo", f"processor\t: 0\nFeatures\t: {features}\n")
    assert board.ask("llama_flags") == f"-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH={architecture}"


def test_a_raspberry_pi_without_the_memory_controller_is_told_what_to_boot_with(board: FakeRoot) -> None:
    board.has("proc/device-tree/model", "Raspberry Pi 5 Model B\0")
    board.has("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
    assert "cgroup_enable=memory" in board.ask("board_advice")
    board.has("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    assert board.ask("board_advice") == ""


# --- bundles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    """scripts/bundle.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("bundle", CHECKOUT / "scripts/bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle with all that belongs into one, as a directory."""
    folder = tmp_path / "bundle"
    contents = {"wheels/edged-0.1.0-py3-none-any.whl": b"wheel", "models/m.gguf": b"model" * 1000}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest = {"format": 1, "edged": "0.1.0", "machine": "aarch64", "python": ["3.11"], "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def packed(bundle: Path) -> Path:
    archive = bundle.with_suffix(".tar")
    with tarfile.open(archive, "w") as tar:
        tar.add(bundle, ".")
    return archive


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", [lambda bundle: bundle, packed], ids=["directory", "archive"])
def test_a_whole_bundle_is_unpacked(
    checker: ModuleType, bundle: Path, tmp_path: Path, form: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checker.main([str(form(bundle)), str(tmp_path / "out"), "aarch64", "3.11"]) is None
    assert capsys.readouterr().out == "0.1.0\n"
    assert (tmp_path / "out/models/m.gguf").read_bytes() == b"model" * 1000


SPOILINGS: dict[str, Callable[[Path], object]] = {
    "models/m.gguf is changed": lambda bundle: (bundle / "models/m.gguf").write_bytes(b"Model" + b"model" * 999),
    "models/m.gguf is missing": lambda bundle: (bundle / "models/m.gguf").unlink(),
    "wheels/more.whl is not in its manifest": lambda bundle: (bundle / "wheels/more.whl").write_bytes(b""),
    "there is no manifest.json": lambda bundle: (bundle / "manifest.json").unlink(),
    "manifest.json is broken": lambda bundle: (bundle / "manifest.json").write_text("{"),
    "its format is 2": lambda bundle: edit_manifest(bundle, lambda manifest: manifest.update(format=2)),
    "is for riscv64": lambda bundle: edit_manifest(bundle, lambda manifest: manifest.update(machine="riscv64")),
    "for Python 3.13, this machine has 3.11": lambda bundle: edit_manifest(
        bundle, lambda manifest: manifest.update(python=["3.13"])
    ),
}


@pytest.mark.parametrize("complaint", SPOILINGS)
def test_a_bundle_that_is_not_as_its_manifest_says_leaves_nothing(
    checker: ModuleType, bundle: Path, tmp_path: Path, complaint: str
) -> None:
    SPOILINGS[complaint](bundle)
    told = checker.main([str(packed(bundle)), str(tmp_path / "out"), "aarch64", "3.11"])
    assert complaint in told
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_bundle_cut_off_anywhere_leaves_nothing(checker: ModuleType, bundle: Path, tmp_path: Path) -> None:
    archive = packed(bundle)
    whole = archive.read_bytes()
    needed = len(whole.rstrip(b"\0"))
    for length in range(0, needed, 700):
        archive.write_bytes(whole[:length])
        assert checker.main([str(archive), str(tmp_path / "out"), "aarch64", "3.11"]) is not None
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "wheels/../../escaped"])
def test_a_member_that_leads_out_of_the_bundle_is_refused(
    checker: ModuleType, bundle: Path, tmp_path: Path, name: str
) -> None:
    archive = packed(bundle)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert "no plain file within the bundle" in checker.main([str(archive), str(tmp_path / "out")])
    assert not list(tmp_path.rglob("escaped"))


def test_a_link_is_refused(checker: ModuleType, bundle: Path, tmp_path: Path) -> None:
    (bundle / "wheels/link").symlink_to("/etc/passwd")
    assert "no plain file" in checker.main([str(packed(bundle)), str(tmp_path / "out")])
    assert "is a link" in checker.main([str(bundle), str(tmp_path / "out")])


# --- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "complaint"),
    [
        (["--mode", "cluster"], 1, "does not form clusters yet"),
        (["--mode=ring"], 2, "no mode 'ring'"),
        (["--arch", "mips"], 2, "no architecture 'mips'"),
        (["--purge"], 2, "--purge goes with --uninstall"),
        (["--model", "../etc"], 2, "no model's name"),
        (["--broker", 'mqtt://a"b'], 2, "no broker's URL"),
        (["--bundle"], 2, "--bundle needs a value"),
        (["--demo", "--bundle=x"], 2, "--bundle is for the service"),
        (["--user", "--broker", "local"], 2, "--broker local is for the service"),
        (["--user", "--uninstall"], 2, "--uninstall is for the service"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_done(
    options: list[str], status: int, complaint: str
) -> None:
    done = subprocess.run([str(CHECKOUT / "install-edge.sh"), *options], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert complaint in done.stderr
    assert done.stdout == ""
