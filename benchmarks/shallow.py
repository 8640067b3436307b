"""A model with fewer layers: what it says is nonsense, and on an emulator a token takes as long as on a board."""

import re
from pathlib import Path
from typing import Any

import gguf

BLOCK = re.compile(r"blk\.(\d+)\.")


def shallow(model: Path, out: Path, layers: int) -> None:
    """Write ``model`` with its first ``layers`` layers alone to ``out``."""
    reader = gguf.GGUFReader(model)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(out, architecture)
    _copy_fields(reader, writer, {gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture): layers})
    kept = [tensor for tensor in reader.tensors if _layer(tensor.name) < layers]
    for tensor in kept:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_fields(reader: Any, writer: Any, changed: dict[str, int]) -> None:
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer's own
        kind, *items = field.types
        writer.add_key_value(
            field.name, changed.get(field.name, field.contents()), kind, sub_type=items[-1] if items else None
        )


def _layer(tensor: str) -> int:
    """-1 for what belongs to none."""
    found = BLOCK.match(tensor)
    return -1 if found is None else int(found[1])
