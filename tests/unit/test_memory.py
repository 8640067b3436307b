"""What a model's worker will take, and where it fits."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.hardware.detect import available_memory
from edged.models.gguf import GgufHeader, read_header
from edged.models.memory import need, room
from tests.gguf_files import F32, Q4_0, gguf_bytes

BLOCKS = {"llama.block_count": 3, "llama.embedding_length": 64, "llama.attention.head_count": 4}
GB = 10**9


def header_of(folder: Path, metadata: dict[str, str | int | bool], kind: int = F32) -> GgufHeader:
    file = folder / "model.gguf"
    file.write_bytes(gguf_bytes({**BLOCKS, **metadata}, [("weight", (64, 2), kind, 512 if kind == F32 else 72)]))
    return read_header(file)


def test_keys_and_values_are_two_bytes_an_entry(tmp_path: Path) -> None:
    header = header_of(tmp_path, {"llama.attention.head_count_kv": 2})
    found = need(header, context_tokens=10, batch_tokens=1, sequences=1, prefix_cache_bytes=5)
    assert found.kv == 10 * 3 * 2 * (16 + 16) * 2
    assert found.weights == header.file_bytes
    assert found.total == found.weights + found.kv + 5 + found.compute + found.process


def test_an_encoder_keeps_no_keys_and_values(tmp_path: Path) -> None:
    header = header_of(tmp_path, {"llama.attention.causal": False})
    assert need(header, context_tokens=512, batch_tokens=8, sequences=1).kv == 0


def test_weights_that_are_repacked_are_counted_twice(tmp_path: Path) -> None:
    assert need(header_of(tmp_path, {}), context_tokens=1, batch_tokens=1, sequences=1).repacked == 0
    assert need(header_of(tmp_path, {}, Q4_0), context_tokens=1, batch_tokens=1, sequences=1).repacked == 72


@pytest.mark.parametrize(
    ("available", "held", "expected"),
    [(10 * GB, 0, "beside"), (1 * GB, 0, "none"), (1 * GB, 2 * GB, "serial"), (0, 0, "none")],
)
def test_a_candidate_goes_where_the_memory_has_room(available: int, held: int, expected: str) -> None:
    assert room(2 * GB, available_bytes=available, held_by_active_bytes=held) == expected


@given(st.integers(0, GB), st.integers(0, GB), st.integers(0, GB))
def test_more_memory_never_makes_less_room(needed: int, available: int, more: int) -> None:
    better = {"none": 0, "serial": 1, "beside": 2}
    before = room(needed, available_bytes=available, held_by_active_bytes=10)
    after = room(needed, available_bytes=available + more, held_by_active_bytes=10)
    assert better[after] >= better[before]


def test_a_cgroup_limit_is_less_than_what_the_machine_has(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000000 kB\nMemAvailable:    3000000 kB\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/edged.slice\n")
    group = tmp_path / "fs" / "edged.slice"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000000\n")
    (group / "memory.current").write_text("600000000\n")
    (group / "memory.stat").write_text("anon 500000000\ninactive_file 50000000\n")
    assert available_memory(tmp_path / "fs", membership, meminfo) == 450_000_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path / "fs", membership, meminfo) == 3_000_000 * 1024


def test_a_version_1_cgroup_limits_memory_as_well(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:    3000000 kB\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/edged\n1:cpu:/\n")
    group = tmp_path / "fs" / "memory" / "edged"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("300000000\n")
    (group / "memory.usage_in_bytes").write_text("400000000\n")
    assert available_memory(tmp_path / "fs", membership, meminfo) == 0


def test_a_system_that_does_not_say_is_not_guessed_at(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none", tmp_path / "none") is None
