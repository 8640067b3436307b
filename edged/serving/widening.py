"""An eight-bit copy of the chat model as this device would compute with it: its memory, its threads."""

from pathlib import Path

from edged.config import Config
from edged.hardware import detect
from edged.hardware.placement import place
from edged.models import wide
from edged.models.gguf import read_header
from edged.serving.keeper import wishes
from edged.workers.process import COMPUTE_ENVIRONMENT


def unsuitable(config: Config, file: Path) -> str:
    """Why no copy of ``file`` should be made here, empty if one may. Raises :class:`GgufError`."""
    if not config.chat.widen:
        return "chat.widen = false"
    if config.chat.gpu_layers:
        return "chat.gpu_layers leaves it to a GPU"
    return wide.unsuitable(
        read_header(file), memory_bytes=detect.machine().memory_bytes, available_bytes=detect.available_memory()
    )


def widen(config: Config, identity: str, file: Path) -> wide.Copied:
    """Make the copy and try it; see :meth:`wide.Copies.make`."""
    threads = place(detect.machine(), wishes(config)).chat_threads
    return wide.Copies(config.wide_dir).make(identity, file, threads, COMPUTE_ENVIRONMENT)


def widen_once(config: Config, identity: str, file: Path) -> wide.Copied | None:
    """As :func:`widen`; None where it is known what becomes of a copy, or none should be made: one of an earlier file
    of the model goes then."""
    copies = wide.Copies(config.wide_dir)
    if _is_known(copies, identity):
        return None
    if unsuitable(config, file):
        copies.drop_former(identity)
        return None
    return widen(config, identity, file)


def _is_known(copies: wide.Copies, identity: str) -> bool:
    copied = copies.tried(identity)
    return copied is not None and (not copied.kept or copies.find(identity) is not None)
