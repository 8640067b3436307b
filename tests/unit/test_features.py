"""What a build of llama.cpp leaves unused of real CPUs: flags of /proc/cpuinfo and system infos as recorded."""

from pathlib import Path

import pytest

from edged.hardware.detect import cpu_flags
from edged.hardware.features import built_with, unused

PI_4 = "fp asimd evtstrm crc32 cpuid"
PI_5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
ORIN = PI_5 + " uscat ilrcpc flagm paca pacg"
GB10 = (
    PI_5 + " jscvt fcma sha3 sm3 sm4 sha512 sve asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp sve2 sveaes "
    "svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svebf16 i8mm bf16 dgh bti ecv afp wfxt"
)
EPYC = (
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx "
    "pni pclmulqdq ssse3 fma cx16 pcid sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand bmi1 avx2 smep bmi2 "
    "avx512f avx512dq rdseed adx smap avx512ifma avx512cd sha_ni avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vnni"
)
HASWELL = "fpu sse sse2 ssse3 fma sse4_1 sse4_2 popcnt aes avx f16c rdrand bmi1 avx2 bmi2"
ATOM = "fpu sse sse2 ssse3 sse4_1 sse4_2 movbe popcnt aes rdrand sha_ni"

ARM_PORTABLE = "CPU : NEON = 1 | ARM_FMA = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
ARM_DOTPROD = "CPU : NEON = 1 | ARM_FMA = 1 | FP16_VA = 1 | DOTPROD = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
ORIN_CUDA_PORTABLE = (
    "CUDA : ARCHS = 600,610,700,750,800,860,890,900 | F16 = 1 | USE_GRAPHS = 1 | PEER_MAX_BATCH_SIZE = 128 | "
    "FA_ALL_QUANTS = 1 | CPU : NEON = 1 | ARM_FMA = 1 | LLAMAFILE = 1 | AARCH64_REPACK = 1 | "
)
X86_NATIVE = (
    "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AVX512 = 1 | AVX512_VBMI = 1 | "
    "AVX512_VNNI = 1 | AVX512_BF16 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "
)
X86_HASWELL = (
    "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | LLAMAFILE = 1 | OPENMP = 1 | "
    "REPACK = 1 | "
)
X86_BARE = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 0 | AVX2 = 0 | FMA = 0 | LLAMAFILE = 1 | OPENMP = 1 | "


@pytest.mark.parametrize(
    ("flags", "system_info", "missing"),
    [
        pytest.param(PI_4, ARM_PORTABLE, (), id="Pi 4 has none of the fast ones"),
        pytest.param(PI_5, ARM_DOTPROD, (), id="Pi 5, built on it"),
        pytest.param(PI_5, ARM_PORTABLE, ("DOTPROD", "FP16_VA"), id="Pi 5, built for any"),
        pytest.param(ORIN, ORIN_CUDA_PORTABLE, ("DOTPROD", "FP16_VA"), id="Orin, CUDA, built for any"),
        pytest.param(ORIN, ARM_DOTPROD, (), id="Orin, built on it"),
        pytest.param(GB10, ARM_DOTPROD, ("MATMUL_INT8",), id="i8mm unused"),
        pytest.param(EPYC, X86_NATIVE, (), id="x86-64, built on it"),
        pytest.param(EPYC, X86_HASWELL, ("AVX512",), id="x86-64, built on an older one"),
        pytest.param(HASWELL, X86_HASWELL, (), id="Haswell, built on it"),
        pytest.param(HASWELL, X86_BARE, ("AVX2", "FMA", "F16C"), id="Haswell, built for any"),
        pytest.param(ATOM, X86_BARE, (), id="Atom has none of the fast ones"),
    ],
)
def test_what_the_cpu_has_and_the_build_leaves_out_is_unused(
    flags: str, system_info: str, missing: tuple[str, ...]
) -> None:
    assert unused(frozenset(flags.split()), system_info) == missing


@pytest.mark.parametrize("system_info", ["", "a build that says nothing", "CUDA : ARCHS = 870 | ", "CPU : "])
def test_a_build_that_does_not_say_what_it_has_is_not_accused(system_info: str) -> None:
    assert unused(frozenset(EPYC.split()), system_info) == ()


def test_the_features_of_each_backend_are_told_apart_and_those_that_are_off_left_out() -> None:
    assert built_with(ORIN_CUDA_PORTABLE) == {
        "CUDA": (
            "ARCHS=600,610,700,750,800,860,890,900",
            "F16",
            "USE_GRAPHS",
            "PEER_MAX_BATCH_SIZE=128",
            "FA_ALL_QUANTS",
        ),
        "CPU": ("NEON", "ARM_FMA", "LLAMAFILE", "AARCH64_REPACK"),
    }
    assert built_with(X86_BARE) == {"CPU": ("SSE3", "SSSE3", "LLAMAFILE", "OPENMP")}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n", {"asimddp"}),
        ("processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu avx2 fma\nbugs\t\t: spectre_v1\n", {"avx2", "fma"}),
    ],
    ids=["arm64", "x86-64"],
)
def test_the_flags_of_the_first_core_are_read(tmp_path: Path, text: str, flags: set[str]) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_flags(file) > flags
    assert cpu_flags(tmp_path / "missing") == frozenset()
