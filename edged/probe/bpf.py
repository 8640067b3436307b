"""The bpf(2) calls that the probe makes once its programs are loaded, without bcc: attach them and read their maps.

All of it lives in file descriptors of this process. Nothing is pinned: when it ends, however it ends, the kernel
detaches and frees everything. The layouts are those of ``union bpf_attr`` in linux/bpf.h.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edged.hardware.cores import parse_list

CALL_NUMBERS: Final = {"x86_64": 321, "aarch64": 280}
"""Of bpf(2), by ``uname -m``: the machines whose registers the programs know."""

LOOKUP, UPDATE, DELETE, INFO, RAW_TRACEPOINT_OPEN, TAKE, LOOKUP_BATCH = 1, 2, 3, 15, 17, 21, 24
ANY, ONLY_NEW = 0, 1
"""Flags of an update: BPF_ANY, BPF_NOEXIST."""

ELEMENT: Final = struct.Struct("=I4xQQQ")  # map, key, value, flags
BATCH: Final = struct.Struct("=QQQQIIQQ")  # where to begin, where it ended, keys, values, count, map, flags, flags
BATCH_COUNT_OFFSET: Final = 32
RAW_TRACEPOINT: Final = struct.Struct("=QI4x")  # name, program
OBJECT: Final = struct.Struct("=IIQ")  # descriptor, size of the answer, the answer
RUN_SECONDS: Final = struct.Struct("=192xQQ")  # run_time_ns and run_cnt of struct bpf_prog_info

Buffer = ctypes.Array[ctypes.c_char]

_libc = ctypes.CDLL(None, use_errno=True)


def call(command: int, attributes: Buffer) -> int:
    """One bpf(2); the kernel may write into ``attributes``. Raises ``OSError``."""
    result: int = _libc.syscall(CALL_NUMBERS[platform.machine()], command, attributes, len(attributes))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def attach(tracepoint: str, program: int) -> int:
    """Run a program at a raw tracepoint until the descriptor that is returned is closed. Raises ``OSError``."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return call(RAW_TRACEPOINT_OPEN, _buffer(RAW_TRACEPOINT.pack(ctypes.addressof(name), program)))


def run_seconds(program: int) -> float:
    """How long a program has run, which the kernel counts while ``kernel.bpf_stats_enabled`` is set."""
    answer = ctypes.create_string_buffer(RUN_SECONDS.size)
    call(INFO, _buffer(OBJECT.pack(program, len(answer), ctypes.addressof(answer))))
    nanoseconds: int = RUN_SECONDS.unpack(answer)[0]
    return nanoseconds / 1e9


def possible_cores(file: Path = Path("/sys/devices/system/cpu/possible")) -> int:
    """How many values a map has that has one a core: also of cores that could be plugged in."""
    return len(parse_list(file.read_text(encoding="ascii")))


class Map:
    """A map by its descriptor, which it owns. ``value_bytes`` of one that has a value for each core: of all ``cores``
    one after another, each rounded up to 8."""

    def __init__(self, descriptor: int, key_bytes: int, value_bytes: int, *, cores: int = 1) -> None:
        self._descriptor = descriptor
        self._key_bytes = key_bytes
        self._value_bytes = value_bytes if cores == 1 else -(-value_bytes // 8) * 8 * cores
        self._key = ctypes.create_string_buffer(max(key_bytes, 1))
        self._value = ctypes.create_string_buffer(self._value_bytes)
        self._element = ctypes.create_string_buffer(ELEMENT.size)
        self._all: tuple[Buffer, Buffer] | None = None

    def lookup(self, key: bytes) -> bytes | None:
        return self._value.raw if self._ask(LOOKUP, key) else None

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> bool:
        """False where the flags forbid it, or there is no room."""
        self._value.raw = value
        return self._ask(UPDATE, key, flags)

    def clear(self, key: bytes) -> None:
        """Let the value be zeros, of each core."""
        self.update(key, bytes(self._value_bytes))

    def delete(self, key: bytes) -> None:
        self._ask(DELETE, key)

    def take(self) -> Iterator[bytes]:
        """Empty a queue."""
        while self._ask(TAKE, b""):
            yield self._value.raw

    def items(self, most: int) -> tuple[bytes, bytes]:
        """All keys of a hash, and all values, one after another; ``most`` is how many it can hold."""
        if self._all is None:
            keys, values = (ctypes.create_string_buffer(size * most) for size in (self._key_bytes, self._value_bytes))
            self._all = keys, values
        keys, values = self._all
        end = ctypes.c_uint64()  # a position, of at most 8 bytes
        where = (ctypes.addressof(each) for each in (end, keys, values))
        batch = _buffer(BATCH.pack(0, *where, most, self._descriptor, 0, 0))
        with contextlib.suppress(FileNotFoundError):  # says that these were the last
            call(LOOKUP_BATCH, batch)
        (count,) = struct.unpack_from("=I", batch, BATCH_COUNT_OFFSET)
        return (
            memoryview(keys)[: count * self._key_bytes].tobytes(),
            memoryview(values)[: count * self._value_bytes].tobytes(),
        )

    def close(self) -> None:
        os.close(self._descriptor)

    def _ask(self, command: int, key: bytes, flags: int = ANY) -> bool:
        """False where there is no such entry, where there is one and must not be, or where there is no room."""
        self._key.raw = key
        address = ctypes.addressof(self._key) if key else 0
        value = 0 if command == DELETE else ctypes.addressof(self._value)
        ELEMENT.pack_into(self._element, 0, self._descriptor, address, value, flags)
        try:
            call(command, self._element)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.E2BIG):
                raise
            return False
        return True


def _buffer(content: bytes) -> Buffer:
    return ctypes.create_string_buffer(content, len(content))
