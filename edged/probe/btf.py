"""Where fields lie in the structures of the running kernel, from what it says of itself (kernel: bpf/btf.rst). Pure.

The headers of another build put them elsewhere; with this the programs read the right place all the same.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Final

HEADER: Final = struct.Struct("=HBBIIIII")  # magic, version, flags, length, type offset and length, string o. and l.
TYPE: Final = struct.Struct("=III")  # name, info, size or type
MEMBER: Final = struct.Struct("=III")  # name, type, offset in bits
MAGIC: Final = 0xEB9F

STRUCT, UNION = 4, 5
MORE_BYTES: Final[Mapping[int, tuple[int, int]]] = {
    1: (4, 0),  # an integer
    3: (12, 0),  # an array
    STRUCT: (0, 12),
    UNION: (0, 12),
    6: (0, 8),  # an enumeration
    13: (0, 8),  # a function's type
    14: (4, 0),  # a variable
    15: (0, 12),  # a section
    17: (4, 0),  # a tag
    19: (0, 12),  # an enumeration of 64 bits
}
"""By the kind of a type: bytes that follow it, and bytes that follow for each of its members."""


class Types:
    """The types of ``/sys/kernel/btf/vmlinux``. Raises ``ValueError`` for what is none."""

    def __init__(self, content: bytes) -> None:
        magic, _, _, length, types, types_length, strings, strings_length = HEADER.unpack_from(content)
        if magic != MAGIC:
            raise ValueError("not BTF of this machine's byte order")
        self._types = content[length + types : length + types + types_length]
        self._strings = content[length + strings : length + strings + strings_length]
        self._places = [0, *self._walk()]  # type 0 is void

    def offset(self, structure: str, field: str) -> int | None:
        """Bytes from the beginning of a structure to a field, which may be in an unnamed part of it."""
        for place in self._places[1:]:
            name, info, _ = TYPE.unpack_from(self._types, place)
            if info >> 24 & 0x1F == STRUCT and self._name(name) == structure:
                bits = self._find(place, field)
                if bits is not None:  # else another structure has the same name
                    return bits // 8
        return None

    def _find(self, place: int, field: str) -> int | None:
        _, info, _ = TYPE.unpack_from(self._types, place)
        for index in range(info & 0xFFFF):
            name, type_, bits = MEMBER.unpack_from(self._types, place + TYPE.size + index * MEMBER.size)
            bits &= 0xFFFFFF if info >> 31 else 0xFFFFFFFF  # with bit fields, the length is above
            if name:
                if self._name(name) == field:
                    return int(bits)
                continue
            inner = self._find(self._places[type_], field) if self._is_composite(type_) else None
            if inner is not None:
                return int(bits) + inner
        return None

    def _is_composite(self, type_: int) -> bool:
        _, info, _ = TYPE.unpack_from(self._types, self._places[type_])
        return info >> 24 & 0x1F in (STRUCT, UNION)

    def _walk(self) -> Iterator[int]:
        place = 0
        while place < len(self._types):
            yield place
            _, info, _ = TYPE.unpack_from(self._types, place)
            once, each = MORE_BYTES.get(info >> 24 & 0x1F, (0, 0))
            place += TYPE.size + once + each * (info & 0xFFFF)

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()
