"""The GGUF header reader: what it finds, and that nothing but GgufError comes of bad bytes."""

import contextlib
import resource
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edged.errors import GgufError
from edged.models.gguf import TENSOR_TYPES, GgufHeader, read_header
from tests.gguf_files import ARRAY, F32, Q4_0, STRING, gguf_bytes

CHAT_MODEL = gguf_bytes(
    {
        "general.name": "Tiny",
        "general.file_type": 15,
        "llama.context_length": 2048,
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    },
    [("first", (64, 2), Q4_0, 72), ("second", (8,), F32, 32)],
)
reuses_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def read(path: Path, content: bytes) -> GgufHeader:
    file = path / "model.gguf"
    file.write_bytes(content)
    return read_header(file)


def test_a_header_tells_what_the_model_is(tmp_path: Path) -> None:
    header = read(tmp_path, CHAT_MODEL)
    assert (header.architecture, header.name, header.quantisation) == ("llama", "Tiny", "Q4_K_M")
    assert (header.context_tokens, header.blocks, header.embedding_length, header.heads) == (2048, 3, 64, 4)
    assert header.head_counts_kv == (2, 2, 2)
    assert (header.key_length, header.value_length) == (16, 16)
    assert (header.bos_token, header.eos_token, header.adds_bos) == ("<s>", "</s>", True)
    assert (header.vocabulary_size, header.chat_template, header.causal) == (3, "{{ messages }}", True)
    assert (header.tensor_count, header.tensor_bytes, header.file_bytes) == (2, 104, len(CHAT_MODEL))
    assert header.tensor_bytes_by_type == {"Q4_0": 72, "F32": 32}


def test_per_block_head_counts_are_taken_as_they_are(tmp_path: Path) -> None:
    header = read(tmp_path, gguf_bytes({"llama.block_count": 3, "llama.attention.head_count_kv": [1, 0, 4]}))
    assert header.head_counts_kv == (1, 0, 4)


@pytest.mark.parametrize(
    ("metadata", "adds_bos"),
    [
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "gpt2"}, False),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_whether_the_tokenizer_adds_a_first_token_follows_llama_cpp(
    tmp_path: Path, metadata: dict[str, str], adds_bos: bool
) -> None:
    assert read(tmp_path, gguf_bytes({**metadata})).adds_bos is adds_bos


def test_a_long_score_array_is_stepped_over(tmp_path: Path) -> None:
    header = read(tmp_path, gguf_bytes({"tokenizer.ggml.scores": list(range(50_000)), "general.name": "after"}))
    assert header.name == "after"


def test_every_truncation_is_found(tmp_path: Path) -> None:
    """The file's last padding may miss; every byte before it counts."""
    for length in range(len(CHAT_MODEL)):
        with pytest.raises(GgufError):
            read(tmp_path, CHAT_MODEL[:length])


def test_a_cut_off_file_says_how_long_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cut off") as caught:
        read(tmp_path, CHAT_MODEL[:-20])
    assert str(len(CHAT_MODEL)) in caught.value.message
    assert caught.value.hint


@reuses_tmp_path
@given(content=st.binary(max_size=400))
@example(content=b"")
@example(content=b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 2**64 - 1))
def test_arbitrary_bytes_are_a_gguf_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(GgufError):
        read(tmp_path, content)


@reuses_tmp_path
@given(tail=st.binary(max_size=300), pairs=st.integers(0, 2**64 - 1), tensors=st.integers(0, 2**64 - 1))
def test_arbitrary_bytes_after_a_good_start_are_read_or_a_gguf_error(
    tmp_path: Path, tail: bytes, pairs: int, tensors: int
) -> None:
    with contextlib.suppress(GgufError):
        read(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + tail)


@reuses_tmp_path
@given(position=st.integers(4, len(CHAT_MODEL) - 1), replacement=st.binary(min_size=1, max_size=8))
def test_a_flipped_piece_is_read_or_a_gguf_error(tmp_path: Path, position: int, replacement: bytes) -> None:
    broken = CHAT_MODEL[:position] + replacement + CHAT_MODEL[position + len(replacement) :]
    try:
        header = read(tmp_path, broken)
    except GgufError:
        return
    assert sum(header.tensor_bytes_by_type.values()) == header.tensor_bytes >= 0


def test_a_length_from_the_file_is_never_allocated_unread(tmp_path: Path) -> None:
    """A sparse file of 4 GiB claims texts and arrays of its own size; reading it stays small."""
    file = tmp_path / "huge.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for claim in (struct.pack("<IQ", STRING, 2**31), struct.pack("<IIQ", ARRAY, F32, 2**31)):
        with file.open("wb") as writable:
            writable.write(start + claim)
            writable.truncate(2**32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(GgufError):
            read_header(file)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 65_536  # KiB


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04 a wheel", "does not start with"),
        (gguf_bytes(version=1), "version is 1"),
        (gguf_bytes({"general.alignment": 3}), "power of two"),
        (gguf_bytes({"general.alignment": 0}), "power of two"),
        (gguf_bytes(tensors=[("w", (32,), 99, 128)]), "unknown type 99"),
        (gguf_bytes(tensors=[("w", (31,), Q4_0, 128)]), "do not divide"),
        (gguf_bytes(tensors=[("w", (1, 1, 1, 1, 1), F32, 4)]), "5 dimensions"),
        (gguf_bytes({"general.architecture": ""}), "no architecture"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(GgufError, match=reason):
        read(tmp_path, content)


def test_a_missing_file_is_a_gguf_error(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cannot read"):
        read_header(tmp_path / "none.gguf")


def test_tensor_sizes_agree_with_the_reference_library() -> None:
    gguf = pytest.importorskip("gguf")
    ours = {code: (block, size) for code, (_, block, size) in TENSOR_TYPES.items()}
    theirs = {int(code): sizes for code, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {code: theirs[code] for code in ours if code in theirs} == {
        code: sizes for code, sizes in ours.items() if code in theirs
    }
