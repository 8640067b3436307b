"""Compiles the programs with bcc, loads them into the kernel, and hands their descriptors to the probe: a program of
its own, ``python -m edged.probe.compiler SOCKET``, because the compiler's 150 MB are needed for a second only.

It says one JSON object on the socket: :class:`Loaded` with the descriptors beside it. A failure is an exit code and
what stands on stderr.
"""

import ctypes
import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from edged.probe import bpf, btf, layout

BCC: Final = Path("/usr/lib/python3/dist-packages/bcc")
"""Debian's python3-bpfcc belongs to the system's interpreter; nothing else is taken from there."""
PROGRAMS: Final = Path(__file__).with_name("programs")
SOURCES: Final = ("scheduler.c", "affinity.c", "blocks.c")
WARNINGS: Final = ("-Wno-macro-redefined", "-Wno-unknown-attributes")
PR_SET_PDEATHSIG: Final = 1
NICER: Final = 10
KERNEL_TYPES: Final = Path("/sys/kernel/btf/vmlinux")


class Loaded(msgspec.Struct, frozen=True):
    """The names that belong to the descriptors, in their order: ``programs`` first. ``sizes`` of the maps' values."""

    programs: tuple[str, ...]
    maps: tuple[str, ...]
    sizes: tuple[int, ...]


def main(descriptor: int) -> None:
    """Compile, load, hand over, end: behind all who have work to do. When the probe ends first, so does this."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(NICER)
    with socket.socket(fileno=descriptor) as probe:
        loaded, descriptors = load()
        socket.send_fds(probe, [msgspec.json.encode(loaded)], descriptors)


def load() -> tuple[Loaded, list[int]]:
    """The programs in the kernel, attached to nothing. Raises whatever bcc raises."""
    bcc = _import_bcc()
    module = bcc.BPF(text=source(), cflags=[f"-I{PROGRAMS}", *WARNINGS])
    library, handle = bcc.lib, module.module
    names = [library.bpf_function_name(handle, index) for index in range(library.bpf_num_functions(handle))]
    programs = {name.decode(): module.load_func(name, bcc.BPF.RAW_TRACEPOINT).fd for name in names}
    tables = {name: library.bpf_table_fd(handle, name.encode()) for name in layout.VALUES}
    leaf_size = library.bpf_table_leaf_size  # which bcc's Python does not declare
    leaf_size.restype, leaf_size.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_char_p]
    sizes = [leaf_size(handle, name.encode()) for name in tables]
    where = bpf.Map(tables["layout"], layout.NUMBER.size, layout.LAYOUT.size)
    where.update(layout.NUMBER.pack(0), layout.LAYOUT.pack(*_offsets(), *_namespace()))
    loaded = Loaded(tuple(programs), tuple(tables), tuple(sizes))
    return loaded, [*programs.values(), *tables.values()]


def source() -> bytes:
    """All files as one text: bcc understands maps and functions only in what it is given itself."""
    parts = (f'#line 1 "{name}"\n'.encode() + (PROGRAMS / name).read_bytes() for name in SOURCES)
    return b"\n".join(parts)


def _import_bcc() -> Any:
    specification = importlib.util.spec_from_file_location(
        "bcc", BCC / "__init__.py", submodule_search_locations=[str(BCC)]
    )
    assert specification is not None and specification.loader is not None
    sys.modules["bcc"] = bcc = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(bcc)
    return bcc


def _offsets() -> list[int]:
    """Where the kernel says that the fields are; 0 where it does not say."""
    if not KERNEL_TYPES.exists():
        return [0] * len(layout.FIELDS)
    types = btf.Types(KERNEL_TYPES.read_bytes())
    found = [[types.offset(*part) for part in path] for path in layout.FIELDS]
    return [0 if None in parts else sum(part or 0 for part in parts) for parts in found]


def _namespace() -> tuple[int, int]:
    found = Path("/proc/self/ns/pid").stat()
    return found.st_dev, found.st_ino


if __name__ == "__main__":
    main(int(sys.argv[1]))
