"""What llama.cpp was built with, and what of the CPU that leaves unused: pure.

A build for a whole family of devices runs on all of them and leaves the fast kernels of most of them out.
"""

from collections.abc import Mapping

CPU_FLAGS: Mapping[str, frozenset[str]] = {
    # arm64: arch/arm64/include/uapi/asm/hwcap.h
    "DOTPROD": frozenset({"asimddp"}),
    "MATMUL_INT8": frozenset({"i8mm"}),
    "FP16_VA": frozenset({"asimdhp"}),
    # x86-64: arch/x86/include/asm/cpufeatures.h
    "AVX2": frozenset({"avx2"}),
    "FMA": frozenset({"fma"}),
    "F16C": frozenset({"f16c"}),
    "AVX512": frozenset({"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}),
}
"""llama.cpp's name of a feature that makes its kernels faster, and the CPU flags (as Linux names them) it takes."""


def built_with(system_info: str) -> dict[str, tuple[str, ...]]:
    """Features by backend (``CPU``, ``CUDA``) from the words of ``llama_print_system_info``.

    They read ``CPU : AVX2 = 1 | FMA = 1 | …``, backend after backend. What is 0 is left out; a value that is not 1
    is kept with its name (``ARCHS=870``).
    """
    backends: dict[str, tuple[str, ...]] = {}
    backend = ""
    for part in system_info.split("|"):
        before, separator, setting = part.rpartition(" : ")
        if separator:
            backend = before.strip()
            backends[backend] = ()
        name, equals, value = (side.strip() for side in setting.partition("="))
        if backend and equals and value != "0":
            backends[backend] += (name if value == "1" else f"{name}={value}",)
    return backends


def unused(cpu_flags: frozenset[str], system_info: str) -> tuple[str, ...]:
    """Features, in llama.cpp's names, that this CPU has and this build does not use.

    ``cpu_flags`` are those of /proc/cpuinfo. Nothing is unused where the build does not say what it has.
    """
    built = built_with(system_info).get("CPU")
    if not built:
        return ()
    return tuple(name for name, flags in CPU_FLAGS.items() if flags <= cpu_flags and name not in built)
