"""Read the header of a GGUF file: what the model is, and whether the file is whole.

Format: the GGUF specification of the ggml project, versions 2 and 3. Read with buffered I/O rather than a memory map,
so that a file that shrinks meanwhile is an error and not a SIGBUS.
"""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from edged.errors import GgufError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

KEY_LIMIT: Final = 65_535  # bytes of a key, from the specification
TEXT_LIMIT: Final = 4_194_304  # bytes of one text value; the longest chat templates have some ten thousand
ARRAY_LIMIT: Final = 4_096  # numbers kept of an array; longer ones (token scores) are stepped over
DEPTH_LIMIT: Final = 3  # arrays in arrays
DIMENSION_LIMIT: Final = 4  # GGML_MAX_DIMS
SKIP_BUFFER: Final = 65_536

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    code: struct.Struct(f"<{letter}")
    for code, letter in enumerate("BbHhIif?--Qqd")  # 8 and 9 are text and array
    if letter != "-"
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml tensor type → (name, elements in a block, bytes of a block), from ggml's type traits."""

FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
"""``general.file_type`` → quantisation, from llama.h's ``llama_ftype``."""

_PRE_TOKENIZERS_WITH_BOS: Final = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "chameleon"}
)
_POOLING: Final[Mapping[int, str]] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}

Value = int | float | bool | str | tuple[int | float | bool, ...]


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a model file says about itself. Counts are 0 and texts empty where it does not say.

    ``head_counts_kv`` has one entry per block; ``tensor_bytes``, those by ggml type and ``file_bytes`` are bytes;
    ``quantisation`` is such as ``Q4_K_M``; ``pooling`` is ``none``, ``mean``, ``cls``, ``last``, ``rank`` or empty;
    ``adds_bos``: the tokenizer puts ``bos_token`` in front of a text by itself.
    """

    version: int
    architecture: str
    name: str
    context_tokens: int
    blocks: int
    embedding_length: int
    heads: int
    head_counts_kv: tuple[int, ...]
    key_length: int
    value_length: int
    causal: bool
    pooling: str
    quantisation: str
    chat_template: str
    vocabulary_size: int
    bos_token: str
    eos_token: str
    adds_bos: bool
    tensor_count: int
    tensor_bytes: int
    tensor_bytes_by_type: dict[str, int]
    file_bytes: int


def read_header(path: Path) -> GgufHeader:
    """The header of ``path``, after checking that the file holds every tensor its table lists.

    Raises :class:`GgufError` for anything that is no complete GGUF file, and for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise GgufError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions", file=path
        ) from error
    except _BrokenError as broken:
        raise GgufError(
            f"{path.name} is no usable GGUF file: {broken}",
            hint="fetch the file again; it must be a complete GGUF model",
            file=path,
        ) from broken


class _BrokenError(Exception):
    """Why the bytes are no GGUF file; :func:`read_header` adds which file."""


class _Reader:
    """Bounded reads: no length taken from the file is trusted before it is compared with what is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.position = 0

    def bytes(self, count: int) -> bytes:
        self._require(count)
        data = self._file.read(count)
        if len(data) != count:
            raise _BrokenError("it became shorter while it was read")
        self.position += count
        return data

    def skip(self, count: int) -> None:
        self._require(count)
        if count < SKIP_BUFFER:
            self.bytes(count)  # staying in the buffer is faster than seeking
            return
        self.position += count
        self._file.seek(self.position)

    def seek(self, position: int) -> None:
        self.position = position
        self._file.seek(position)

    def u32(self) -> int:
        return int(_U32.unpack(self.bytes(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.bytes(8))[0])

    def text(self, limit: int, what: str) -> str:
        length = self.u64()
        if length > limit:
            raise _BrokenError(f"{what} claims {length} bytes, more than any real one")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _BrokenError(f"{what} is not UTF-8") from None

    def _require(self, count: int) -> None:
        if count > self.size - self.position:
            raise _BrokenError(f"it ends at byte {self.size}, inside its header")


class _Metadata:
    """Key-value pairs. Long arrays are stepped over; where text arrays lie is kept, to look single entries up."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._values: dict[str, Value] = {}
        self._text_arrays: dict[str, tuple[int, int]] = {}  # key → (position of the first entry, entries)

    def read(self, count: int) -> None:
        for _ in range(count):
            key = self._reader.text(KEY_LIMIT, "a key")
            if key in self._values or key in self._text_arrays:
                raise _BrokenError(f"it has the key '{key}' twice")
            self._read_value(key)

    def _read_value(self, key: str) -> None:
        code = self._reader.u32()
        if code == _STRING:
            self._values[key] = self._reader.text(TEXT_LIMIT, f"the value of '{key}'")
        elif code == _ARRAY:
            self._read_array(key, DEPTH_LIMIT)
        else:
            self._values[key] = _scalar(self._reader, code)

    def _read_array(self, key: str, depth: int) -> None:
        code, count = self._reader.u32(), self._reader.u64()
        if code == _ARRAY:
            if depth == 0:
                raise _BrokenError(f"'{key}' nests arrays too deeply")
            for _ in range(count):
                self._read_array("", depth - 1)
        elif code == _STRING:
            self._text_arrays[key] = (self._reader.position, count)
            for _ in range(count):
                self._reader.skip(self._reader.u64())
        else:
            self._read_numbers(key, code, count)

    def _read_numbers(self, key: str, code: int, count: int) -> None:
        width = _format(code).size
        if count > ARRAY_LIMIT:
            self._reader.skip(count * width)
            return
        data = self._reader.bytes(count * width)
        self._values[key] = tuple(item[0] for item in _format(code).iter_unpack(data))

    def text(self, key: str) -> str:
        value = self._values.get(key, "")
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int = 0) -> int:
        """A count; a per-block array gives its largest entry. What is no sensible count gives ``default``."""
        value = self._values.get(key)
        if isinstance(value, tuple):
            return max(_counts(value), default=default)
        return _count(value, default)

    def per_block(self, key: str, blocks: int, default: int) -> tuple[int, ...]:
        """One count per block, whether the file gives one for all or one each."""
        value = self._values.get(key)
        if isinstance(value, tuple):
            return _counts(value)[:blocks]
        return (_count(value, default),) * blocks

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key, default)
        return value if isinstance(value, bool) else default

    def array_length(self, key: str) -> int:
        return self._text_arrays.get(key, (0, 0))[1]

    def entry(self, key: str, index: int) -> str:
        """Entry ``index`` of a text array; empty where there is none."""
        start, count = self._text_arrays.get(key, (0, 0))
        if not 0 <= index < count:
            return ""
        self._reader.seek(start)
        for _ in range(index):
            self._reader.skip(self._reader.u64())
        return self._reader.text(TEXT_LIMIT, f"an entry of '{key}'")


def _format(code: int) -> struct.Struct:
    try:
        return _SCALARS[code]
    except KeyError:
        raise _BrokenError(f"it has a value of the unknown type {code}") from None


def _scalar(reader: _Reader, code: int) -> int | float | bool:
    layout = _format(code)
    value = layout.unpack(reader.bytes(layout.size))[0]
    assert isinstance(value, int | float)
    return value


def _count(value: object, default: int) -> int:
    usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
    return value if usable and isinstance(value, int) else default


def _counts(values: Sequence[object]) -> tuple[int, ...]:
    return tuple(_count(value, 0) for value in values)


def _read(file: BinaryIO, size: int) -> GgufHeader:
    reader = _Reader(file, size)
    if size < len(MAGIC) or reader.bytes(len(MAGIC)) != MAGIC:
        raise _BrokenError("it does not start with 'GGUF'")
    version = reader.u32()
    if version not in VERSIONS:
        raise _BrokenError(f"its version is {version}, readable are {VERSIONS[0]} and {VERSIONS[1]}")
    tensor_count, pairs = reader.u64(), reader.u64()
    metadata = _Metadata(reader)
    metadata.read(pairs)
    bytes_by_type = _check_tensors(reader, tensor_count, metadata.number("general.alignment", 32))
    return _header(metadata, version, tensor_count, bytes_by_type, size)


def _check_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, int]:
    """Bytes of all tensors by type, after checking that the file reaches to the end of the last."""
    if alignment == 0 or alignment & (alignment - 1):
        raise _BrokenError(f"its alignment is {alignment}, not a power of two")
    bytes_by_type: dict[str, int] = {}
    end = 0
    for _ in range(count):
        type_name, offset, length = _tensor(reader)
        bytes_by_type[type_name] = bytes_by_type.get(type_name, 0) + length
        end = max(end, offset + length)
    start = -(-reader.position // alignment) * alignment
    if count and start + end > reader.size:
        raise _BrokenError(f"it is cut off: {reader.size} bytes long, its tensors reach to byte {start + end}")
    return bytes_by_type


def _tensor(reader: _Reader) -> tuple[str, int, int]:
    """Type, offset from the start of the tensor data, and length, in bytes."""
    name = reader.text(KEY_LIMIT, "a tensor's name")
    dimensions = reader.u32()
    if dimensions > DIMENSION_LIMIT:
        raise _BrokenError(f"tensor '{name}' has {dimensions} dimensions")
    shape = [reader.u64() for _ in range(dimensions)]
    code, offset = reader.u32(), reader.u64()
    if code not in TENSOR_TYPES:
        raise _BrokenError(f"tensor '{name}' has the unknown type {code}")
    type_name, block, width = TENSOR_TYPES[code]
    if shape and shape[0] % block:
        raise _BrokenError(f"tensor '{name}': rows of {shape[0]} do not divide into blocks of {type_name}")
    return type_name, offset, math.prod(shape) // block * width


def _header(
    metadata: _Metadata, version: int, tensor_count: int, bytes_by_type: dict[str, int], file_bytes: int
) -> GgufHeader:
    architecture = metadata.text("general.architecture")
    if not architecture:
        raise _BrokenError("it names no architecture")
    blocks = min(metadata.number(f"{architecture}.block_count"), 65_536)
    embedding_length = metadata.number(f"{architecture}.embedding_length")
    heads = metadata.number(f"{architecture}.attention.head_count")
    head_length = embedding_length // heads if heads else 0
    tokens = "tokenizer.ggml.tokens"
    file_type = metadata.number("general.file_type", -1)
    return GgufHeader(
        version=version,
        architecture=architecture,
        name=metadata.text("general.name"),
        context_tokens=metadata.number(f"{architecture}.context_length"),
        blocks=blocks,
        embedding_length=embedding_length,
        heads=heads,
        head_counts_kv=metadata.per_block(f"{architecture}.attention.head_count_kv", blocks, heads),
        key_length=metadata.number(f"{architecture}.attention.key_length", head_length),
        value_length=metadata.number(f"{architecture}.attention.value_length", head_length),
        causal=metadata.flag(f"{architecture}.attention.causal", default=True),
        pooling=_POOLING.get(metadata.number(f"{architecture}.pooling_type", -1), ""),
        quantisation=FILE_TYPES.get(file_type, ""),
        chat_template=metadata.text("tokenizer.chat_template"),
        vocabulary_size=metadata.array_length(tokens),
        bos_token=metadata.entry(tokens, metadata.number("tokenizer.ggml.bos_token_id", -1)),
        eos_token=metadata.entry(tokens, metadata.number("tokenizer.ggml.eos_token_id", -1)),
        adds_bos=metadata.flag("tokenizer.ggml.add_bos_token", default=_adds_bos(metadata)),
        tensor_count=tensor_count,
        tensor_bytes=sum(bytes_by_type.values()),
        tensor_bytes_by_type=bytes_by_type,
        file_bytes=file_bytes,
    )


def _adds_bos(metadata: _Metadata) -> bool:
    """What llama.cpp does with a file that does not say."""
    by_model = metadata.text("tokenizer.ggml.model") in ("llama", "bert")
    return by_model or metadata.text("tokenizer.ggml.pre") in _PRE_TOKENIZERS_WITH_BOS
