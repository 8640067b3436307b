"""Files as the kernel shows them, under a temporary directory: the cores and sensors of boards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class CpuFiles(NamedTuple):
    """What a board's kernel says of one core; None where it has no such file."""

    max_khz: int | None
    capacity: int | None
    siblings: str


def write(root: Path, files: Mapping[str, str | int]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def write_cpus(root: Path, online: str, cpus: Sequence[CpuFiles]) -> Path:
    """``/sys/devices/system/cpu`` with these cores; returns ``root``."""
    write(root, {"online": online})
    for number, cpu in enumerate(cpus):
        write(root, {f"cpu{number}/topology/thread_siblings_list": cpu.siblings})
        if cpu.max_khz is not None:
            write(root, {f"cpu{number}/cpufreq/cpuinfo_max_freq": cpu.max_khz})
        if cpu.capacity is not None:
            write(root, {f"cpu{number}/cpu_capacity": cpu.capacity})
    return root


def alike(count: int, max_khz: int | None, capacity: int | None, first: int = 0) -> list[CpuFiles]:
    return [CpuFiles(max_khz, capacity, str(first + number)) for number in range(count)]


def hyperthreaded(cores: int, max_khz: int) -> list[CpuFiles]:
    """Each physical core twice, the second threads after all first ones, as Linux numbers them on x86-64."""
    return [CpuFiles(max_khz, None, f"{n % cores},{n % cores + cores}") for n in range(2 * cores)]


# Clusters and frequencies as sbc-bench (github.com/ThomasKaiser/sbc-bench) lists them for these boards; capacities as
# the kernel computes them from the device tree's capacity-dmips-mhz (A55 530, A76 1024) and the highest frequency.
PI4 = ("0-3", alike(4, 1_500_000, 1024))
PI5 = ("0-3", alike(4, 2_400_000, 1024))
RK3588 = (
    "0-7",
    [*alike(4, 1_800_000, 405), *alike(2, 2_304_000, 1003, first=4), *alike(2, 2_352_000, 1024, first=6)],
)
RK3399 = ("0-5", [*alike(4, 1_416_000, None), *alike(2, 1_800_000, None, first=4)])
ORIN_NX_15W = ("0-3", alike(8, 1_984_000, 1024))  # its power mode keeps half of the cores off
N150 = ("0-3", alike(4, 3_600_000, None))
X86_4C8T = ("0-7", hyperthreaded(4, 4_200_000))
VM = ("0-1", alike(2, None, None))
