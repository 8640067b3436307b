"""Checks of what the kernel was built and booted with: memory cgroup, page size, headers, and its clock."""

import ctypes
import time

import msgspec

from edged.doctor.device import Device
from edged.doctor.finding import Finding, fail, ok, skip, warn

BOOT_FILES = ("boot/firmware/cmdline.txt", "boot/cmdline.txt", "boot/extlinux/extlinux.conf", "etc/default/grub")
"""Where systems keep the kernel's command line: Raspberry Pi OS (new, old), Jetson and others with U-Boot, GRUB."""

EARLIEST_CLOCK = 1_735_689_600  # 2025-01-01, Unix time: before edged was written
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
SYNCHRONISED_FOR_SECONDS = 3 * 3600.0  # timesyncd asks for the time every 34 minutes at the latest
TIMESYNCD_MARK = "run/systemd/timesync/synchronized"


# --- memory cgroup ---------------------------------------------------------------------------------


class MemoryCgroup(msgspec.Struct, frozen=True):
    """``controllers`` of cgroup v2 (None: not mounted); ``boot_file`` holds the kernel's command line, if known."""

    controllers: frozenset[str] | None
    is_v1: bool
    command_line: tuple[str, ...]
    boot_file: str


def read_memory_cgroup(device: Device) -> MemoryCgroup:
    mounts = [device.path("sys/fs/cgroup"), device.path("sys/fs/cgroup/unified")]
    found = [mount / "cgroup.controllers" for mount in mounts if (mount / "cgroup.controllers").exists()]
    return MemoryCgroup(
        frozenset(device.read(found[0]).split()) if found else None,
        device.path("sys/fs/cgroup/memory/memory.limit_in_bytes").exists(),
        tuple(device.read("proc/cmdline").split()),
        next((f"/{file}" for file in BOOT_FILES if device.path(file).exists()), ""),
    )


def judge_memory_cgroup(facts: MemoryCgroup) -> Finding:
    """Not by /proc/cgroups: kernels without CONFIG_MEMCG_V1 leave memory out there (raspberrypi/linux issue 6980)."""
    if facts.controllers is not None and "memory" in facts.controllers:
        return ok("cgroup v2 can limit memory")
    if facts.is_v1 or facts.controllers is None:
        what = "memory is under cgroup v1" if facts.is_v1 else "no cgroup v2 is mounted"
        fix = add_to_command_line(facts.boot_file, "systemd.unified_cgroup_hierarchy=1")
        return warn(f"{what}: workers run without limits of their own", fix)
    return warn("the memory cgroup is off: a worker that grows takes memory from everybody", _enable_memory(facts))


def _enable_memory(facts: MemoryCgroup) -> str:
    """The last of these words counts, and what the firmware adds comes before the file's words."""
    switches = [word for word in facts.command_line if word in ("cgroup_enable=memory", "cgroup_disable=memory")]
    if "cgroup_enable=memory" not in switches:
        return add_to_command_line(facts.boot_file, "cgroup_enable=memory")
    if switches[-1] == "cgroup_disable=memory":
        return f"sudo sed -i 's/ *cgroup_disable=memory//g' {facts.boot_file or 'the boot file'} && sudo reboot"
    return "this kernel ignores cgroup_enable=memory: sudo apt-get update && sudo apt-get full-upgrade && sudo reboot"


def add_to_command_line(boot_file: str, word: str) -> str:
    """The command that adds a word to the kernel's command line, for the boot loader that has this file."""
    match boot_file.rpartition("/")[2]:
        case "cmdline.txt":
            return f"sudo sed -i '1s/$/ {word}/' {boot_file} && sudo reboot"
        case "extlinux.conf":
            return f"sudo sed -i '/^ *APPEND/s/$/ {word}/' {boot_file} && sudo reboot"
        case "grub":
            return f"sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{word} /' {boot_file} && sudo update-grub && sudo reboot"
        case _:
            return f"add {word} to the kernel's command line in the boot loader, then reboot"


# --- page size -------------------------------------------------------------------------------------


class PageSize(msgspec.Struct, frozen=True):
    """``model`` is the board's name; empty on a PC."""

    page_bytes: int
    model: str


def read_page_size(device: Device) -> PageSize:
    return PageSize(device.page_bytes, device.model)


def judge_page_size(facts: PageSize) -> Finding:
    size = f"{facts.page_bytes // 1024} KB"
    if facts.page_bytes == 4096:
        return ok(f"pages of {size}")
    fix = "boot a kernel with pages of 4 KB (CONFIG_ARM64_4K_PAGES)"
    if facts.model.startswith("Raspberry Pi"):
        fix = "echo 'kernel=kernel8.img' | sudo tee -a /boot/firmware/config.txt && sudo reboot"
    return warn(f"pages of {size}: programs built for 4 KB (those with jemalloc) abort, and all take more memory", fix)


# --- headers for the probe -------------------------------------------------------------------------


class Tracing(msgspec.Struct, frozen=True):
    """What eBPF programs are made with on this kernel ``release``."""

    release: str
    has_btf: bool
    has_headers: bool
    has_bcc: bool


def read_tracing(device: Device) -> Tracing:
    release = device.read("proc/sys/kernel/osrelease")
    headers = (f"lib/modules/{release}/build/include", "sys/kernel/kheaders.tar.xz")
    return Tracing(
        release,
        device.path("sys/kernel/btf/vmlinux").exists(),
        any(device.path(place).exists() for place in headers),
        device.path("usr/lib/python3/dist-packages/bcc/__init__.py").exists(),
    )


def judge_tracing(facts: Tracing) -> Finding:
    """bcc compiles against headers; BTF alone serves only programs compiled before."""
    packages = [_headers_package(facts.release)] * (not facts.has_headers) + ["python3-bpfcc"] * (not facts.has_bcc)
    if not packages:
        return ok(f"bcc and kernel headers{' and BTF' if facts.has_btf else ', no BTF'}")
    headers = "no kernel headers, only BTF" if facts.has_btf else "neither kernel headers nor BTF"
    missing = " and ".join([headers] * (not facts.has_headers) + ["no bcc"] * (not facts.has_bcc))
    what = f"{missing}: the probe measures by /proc and perf events alone; nothing else needs them"
    return warn(what, f"sudo apt-get install {' '.join(packages)}")


def _headers_package(release: str) -> str:
    if release.endswith("-tegra"):
        return "nvidia-l4t-kernel-headers"
    before, separator, flavour = release.rpartition("-rpi-")  # such as 6.12.25+rpt-rpi-2712
    return f"linux-headers-rpi-{flavour}" if separator and before else f"linux-headers-{release}"


# --- clock -----------------------------------------------------------------------------------------


class Clock(msgspec.Struct, frozen=True):
    """``now`` is Unix time in seconds; ``is_synchronised`` is None where nobody says."""

    now: float
    is_synchronised: bool | None


def read_clock(device: Device) -> Clock:
    """The kernel knows whether someone disciplines its clock, whoever that is (chrony, ntpd, timesyncd).

    Where the battery-backed clock keeps local time, timesyncd does not tell the kernel: then the file counts that it
    touches at each synchronisation, and never removes.
    """
    now = time.time()
    said = _kernel_says_synchronised()
    return Clock(now, True if said or _has_fresh_mark(device, now) else said)


def _has_fresh_mark(device: Device, now: float) -> bool:
    try:
        age = now - device.path(TIMESYNCD_MARK).stat().st_mtime
    except OSError:
        return False
    return 0 <= age < SYNCHRONISED_FOR_SECONDS


def _kernel_says_synchronised() -> bool | None:
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    state = adjtimex(ctypes.create_string_buffer(512))  # struct timex, at most 208 bytes; modes = 0 only asks
    return None if state < 0 else state != TIME_ERROR


def judge_clock(facts: Clock) -> Finding:
    if facts.now < EARLIEST_CLOCK:
        shown = time.strftime("%Y-%m-%d", time.gmtime(facts.now))
        what = f"the clock says {shown}: certificates look invalid, and events expire or never do"
        return fail(what, "sudo timedatectl set-ntp true; without a network, a battery-backed clock (RTC)")
    if facts.is_synchronised is None:
        return skip("the system does not say whether its clock is synchronised")
    if not facts.is_synchronised:
        return warn("nothing synchronises the clock: it drifts, and may jump", "sudo timedatectl set-ntp true")
    return ok("synchronised")
