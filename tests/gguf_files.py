"""Small GGUF files for tests, written from the specification rather than with the library under comparison."""

import struct
from collections.abc import Sequence

Value = str | int | bool | float | Sequence[str] | Sequence[float]

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
F32, Q4_0 = 0, 2


def gguf_bytes(
    metadata: dict[str, Value] | None = None,
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = (("weight", (32, 4), F32, 512),),
    *,
    fill: bytes = b"\x01",
    version: int = 3,
) -> bytes:
    """A whole file. A tensor is (name, shape, ggml type, bytes); its data are ``fill`` repeated."""
    values = {"general.architecture": "llama", **(metadata or {})}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    header += b"".join(_text(key) + _value(value) for key, value in values.items())
    data = b""
    for name, shape, kind, size in tensors:
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", kind, len(data))
        data += fill * size + b"\0" * (-size % 32)
    return header + b"\0" * (-len(header) % 32) + data


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    match value:
        case str():
            return struct.pack("<I", STRING) + _text(value)
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case _:
            return struct.pack("<I", ARRAY) + _items(value)


def _items(values: Sequence[str] | Sequence[float]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(_text(str(text)) for text in values)
    return struct.pack("<IQ", INT32, len(values)) + b"".join(struct.pack("<i", int(item)) for item in values)
