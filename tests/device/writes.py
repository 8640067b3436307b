"""Reads a record of a disk's writes and makes disks as a power cut may leave them.

The record is QEMU's ``blklogwrites``, in the format of Linux' dm-log-writes (Documentation/admin-guide/device-mapper/
log-writes.rst). A disk owes its user what was flushed, and nothing else: of later writes it may have kept any, in part.
"""

import os
import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import BinaryIO

MAGIC = 0x6A736677736872
VERSION = 1
SUPERBLOCK = struct.Struct("<QQQI")
"""Magic, version, number of entries, bytes of a sector."""
ENTRY = struct.Struct("<QQQQ")
"""First sector, number of sectors, flags, bytes of data that belong to no sector (a mark's text)."""
TORN_BYTES = 4096
"""What a disk writes whole or not at all."""
COPY_BYTES = 1 << 20


class Flag(IntFlag):
    """What an entry of the record is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True, slots=True)
class Write:
    """One request of the guest's: ``length`` bytes for ``offset`` on the disk, which lie at ``data`` in the record."""

    offset: int
    length: int
    flags: Flag
    data: int

    @property
    def is_flush(self) -> bool:
        return Flag.FLUSH in self.flags

    @property
    def changes_disk(self) -> bool:
        """Whether it has bytes to write. What a disk returns for discarded sectors is anything: the old bytes too."""
        return self.length > 0 and not self.flags & (Flag.DISCARD | Flag.MARK)


def read_record(path: Path) -> list[Write]:
    """The requests in the order they were made. An entry that the power cut off ends the record.

    Raises:
        ValueError: it is no record of writes.
    """
    with path.open("rb") as record:
        magic, version, count, sector_bytes = _unpack(SUPERBLOCK, record)
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(f"{path} is no record of writes: it begins with {magic:#x}, version {version}")
        size = os.fstat(record.fileno()).st_size
        return list(_entries(record, count, sector_bytes, size))


def _entries(record: BinaryIO, count: int, sector_bytes: int, size: int) -> Iterator[Write]:
    position = sector_bytes
    for _ in range(count):
        data = position + sector_bytes
        if data > size:
            return
        record.seek(position)
        sector, sectors, flags, data_bytes = _unpack(ENTRY, record)
        length = sectors * sector_bytes
        write = Write(sector * sector_bytes, length, Flag(flags), data)
        position = data + (length if write.changes_disk else _round_up(data_bytes, sector_bytes))
        if position > size:
            return
        yield write


def _unpack(layout: struct.Struct, record: BinaryIO) -> tuple[int, ...]:
    packed = record.read(layout.size)
    if len(packed) < layout.size:
        raise ValueError(f"{record.name} is no record of writes: it ends at {record.tell()} bytes")
    return layout.unpack(packed)


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def surviving(writes: Sequence[Write], cut: int, chance: random.Random) -> list[Write]:
    """What the disk holds when the power fails after ``writes[:cut]``, in the order to apply it.

    All that a flush follows is there, and what was written through the cache. Of the rest each write is there, is not,
    or is there in some of its 4096-byte pieces. That also covers a disk that writes in another order: of two writes
    to one place a disk keeps the later, or the earlier when the later is lost.
    """
    flushed = max((index for index, write in enumerate(writes[:cut]) if write.is_flush), default=0)
    kept = [write for write in writes[:flushed] if write.changes_disk]
    for write in writes[flushed:cut]:
        if write.changes_disk:
            kept += [write] if Flag.FUA in write.flags else _torn(write, chance)
    return kept


def _torn(write: Write, chance: random.Random) -> list[Write]:
    match chance.randrange(3):
        case 0:
            return []
        case 1:
            return [write]
        case _:
            return [piece for piece in _pieces(write) if chance.random() < 0.5]


def _pieces(write: Write) -> Iterator[Write]:
    for start in range(0, write.length, TORN_BYTES):
        length = min(TORN_BYTES, write.length - start)
        yield Write(write.offset + start, length, write.flags, write.data + start)


def apply(record: Path, writes: Sequence[Write], disk: Path) -> None:
    """Write them into a raw image of the disk as it was when the record began."""
    with record.open("rb") as source, disk.open("r+b") as target:
        for write in writes:
            for start in range(0, write.length, COPY_BYTES):
                source.seek(write.data + start)
                target.seek(write.offset + start)
                target.write(source.read(min(COPY_BYTES, write.length - start)))


def replay(record: Path, before: Path, target: Path, *, cut: int, seed: int) -> None:
    """Make ``target``, a raw image: the disk ``before`` (raw) after the first ``cut`` requests and a power cut.

    The same arguments make the same image.
    """
    subprocess.run(["cp", "--sparse=always", str(before), str(target)], check=True)
    apply(record, surviving(read_record(record), cut, random.Random(seed)), target)
