"""Records of a disk's writes: what is read of them, and which writes a power cut may lose."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device.writes import ENTRY, MAGIC, SUPERBLOCK, VERSION, Flag, Write, apply, read_record, replay, surviving

SECTOR = 512


def record_of(entries: list[tuple[int, bytes, Flag]], *, count: int | None = None) -> bytes:
    """A record as QEMU makes it: (sector, data, flags) each; ``count`` is what the superblock claims."""
    superblock = SUPERBLOCK.pack(MAGIC, VERSION, len(entries) if count is None else count, SECTOR)
    parts = [superblock.ljust(SECTOR, b"\0")]
    for sector, data, flags in entries:
        parts.append(ENTRY.pack(sector, len(data) // SECTOR, flags, 0).ljust(SECTOR, b"\0"))
        parts.append(b"" if Flag.DISCARD in flags else data)
    return b"".join(parts)


def sectors(letter: bytes, count: int = 1) -> bytes:
    return letter * (SECTOR * count)


NONE = Flag(0)
EXAMPLE = [
    (0, sectors(b"a", 2), NONE),
    (0, b"", Flag.FLUSH),
    (8, sectors(b"x", 8), Flag.DISCARD),
    (2, sectors(b"b"), NONE),
    (3, sectors(b"c"), Flag.FUA),
]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    record = tmp_path / "record"
    record.write_bytes(record_of(EXAMPLE))
    return record


def test_a_record_is_read_with_offsets_flags_and_the_place_of_the_data(example: Path) -> None:
    assert read_record(example) == [
        Write(0, 1024, NONE, 1024),
        Write(0, 0, Flag.FLUSH, 2560),
        Write(8 * SECTOR, 8 * SECTOR, Flag.DISCARD, 3072),
        Write(2 * SECTOR, SECTOR, NONE, 3584),
        Write(3 * SECTOR, SECTOR, Flag.FUA, 4608),
    ]


@pytest.mark.parametrize("lost_bytes", [1, SECTOR, SECTOR + 1])
def test_an_entry_that_the_power_cut_off_ends_the_record(example: Path, lost_bytes: int) -> None:
    whole = read_record(example)
    example.write_bytes(example.read_bytes()[:-lost_bytes])
    assert read_record(example) == whole[:-1]


@pytest.mark.parametrize("content", [b"", b"too short", bytes(SECTOR)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record").write_bytes(content)
    with pytest.raises(ValueError, match="no record of writes"):
        read_record(tmp_path / "record")


def test_replayed_disks_have_what_was_flushed_and_perhaps_the_rest(example: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(sectors(b".", 16))
    seen = set()
    for seed in range(20):
        replay(example, before, after, cut=len(EXAMPLE), seed=seed)
        seen.add(after.read_bytes())
    old_third, new_third = sectors(b"."), sectors(b"b")
    assert seen == {sectors(b"a", 2) + third + sectors(b"c") + sectors(b".", 12) for third in (old_third, new_third)}
    assert before.read_bytes() == sectors(b".", 16)


def test_a_cut_before_any_request_leaves_the_disk_as_it_was(example: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(sectors(b".", 16))
    replay(example, before, after, cut=0, seed=1)
    assert after.read_bytes() == before.read_bytes()


def test_a_long_write_may_be_torn_between_pieces_of_4096_bytes_and_nowhere_else(tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.write_bytes(record_of([(0, sectors(b"n", 24), NONE)]))
    (write,) = read_record(record)
    disk = tmp_path / "disk"
    seen = set()
    for seed in range(100):
        disk.write_bytes(sectors(b".", 24))
        apply(record, surviving([write], 1, random.Random(seed)), disk)
        pieces = [disk.read_bytes()[start : start + 4096] for start in range(0, 24 * SECTOR, 4096)]
        assert all(len(set(piece)) == 1 for piece in pieces)
        seen.add("".join(chr(piece[0]) for piece in pieces))
    assert len(seen) == 8


writes = st.lists(
    st.builds(
        Write,
        offset=st.integers(0, 100).map(lambda sector: sector * SECTOR),
        length=st.integers(0, 20).map(lambda count: count * SECTOR),
        flags=st.sampled_from([NONE, NONE, Flag.FLUSH, Flag.FUA, Flag.DISCARD]),
        data=st.integers(0, 10_000),
    ),
    max_size=30,
)


@given(writes=writes, seed=st.integers(), share=st.floats(0, 1))
def test_no_flushed_write_is_lost_and_none_comes_from_after_the_cut(
    writes: list[Write], seed: int, share: float
) -> None:
    cut = round(share * len(writes))
    last_flush = max((index for index, write in enumerate(writes[:cut]) if write.is_flush), default=0)
    kept = surviving(writes, cut, random.Random(seed))
    flushed = [write for write in writes[:last_flush] if write.changes_disk]
    assert kept[: len(flushed)] == flushed
    for piece in kept[len(flushed) :]:
        assert any(
            write.offset <= piece.offset
            and piece.offset + piece.length <= write.offset + write.length
            and piece.data - write.data == piece.offset - write.offset
            for write in writes[last_flush:cut]
        )
