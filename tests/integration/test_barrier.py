"""scripts/llama/barrier.c, which the wheel's build puts in the place of libgomp's barrier."""

import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest

CHECKOUT = Path(__file__).parents[2]
WRAPPED = "-Wl,--wrap=GOMP_barrier,--wrap=GOMP_parallel,--wrap=syscall"
SECOND = 1_000_000_000

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def kernel_calls(directory: Path, *, spin_nanoseconds: int, threads: int) -> int:
    """Of two teams at a time, of 2 to ``threads`` threads, 4,000 barriers each; fails where one lets a thread pass."""
    program = directory / "barrier"
    sources = (CHECKOUT / "tests/integration/barrier.c", CHECKOUT / "scripts/llama/barrier.c")
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-fopenmp", f"-DSPIN_NANOSECONDS={spin_nanoseconds}", WRAPPED)
    subprocess.run(["gcc", *flags, *sources, "-o", program], check=True)
    ended = subprocess.run([program, str(threads)], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return int(ended.stdout)


@pytest.mark.parametrize("spin_nanoseconds", [0, 1_000, 75_000])
def test_nobody_passes_before_all_have_come(tmp_path: Path, spin_nanoseconds: int) -> None:
    kernel_calls(tmp_path, spin_nanoseconds=spin_nanoseconds, threads=8)


def test_nobody_calls_the_kernel_before_having_spun_long_enough(tmp_path: Path) -> None:
    assert kernel_calls(tmp_path, spin_nanoseconds=100 * SECOND, threads=2) == 0


def test_llama_cpp_was_built_with_it() -> None:
    library = Path(llama_cpp.__file__).parent / "lib/libggml-cpu.so"
    listed = subprocess.run(["nm", "--dynamic", library], stdout=subprocess.PIPE, text=True, check=True)
    assert " T __wrap_GOMP_barrier" in listed.stdout
