"""States of stable prefixes on disk, so that a restarted worker need not compute them again.

A file is trusted only when its checksum is right and it was written for this model file and this build of llama.cpp.
"""

import contextlib
import hashlib
import os
import queue
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edged.engine.prefix import State, key_of

MAGIC = b"edgedkv1"
MOST_FILES = 16
_HEADER = struct.Struct("<8s32s32s")  # magic, owner, checksum of what follows
_COUNT = struct.Struct("<I")  # tokens, before the tokens and the state


class Snapshots:
    """The files of one model in ``folder``. ``owner`` names everything a state depends on besides its tokens."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder = folder
        self._owner = hashlib.sha256(owner.encode()).digest()
        self._waiting: queue.SimpleQueue[State] = queue.SimpleQueue()
        threading.Thread(target=self._write_all, daemon=True, name="snapshots").start()

    def load(self) -> Iterator[State]:
        """The states that fit, the oldest first; whatever else the folder holds is left alone."""
        for path in self._files():
            with contextlib.suppress(OSError):
                state = self._parse(path.read_bytes())
                if state is not None:
                    yield state

    def save(self, state: State) -> None:
        """Write a state in the background: a slow disk must not hold up decoding."""
        self._waiting.put(state)

    def _write_all(self) -> None:
        while True:
            self._write(self._waiting.get())

    def _write(self, state: State) -> None:
        """Best effort: without the file the prefix is merely computed again after a restart."""
        with contextlib.suppress(OSError, MemoryError):
            body = _COUNT.pack(len(state.tokens)) + state.tokens.astype("<i4").tobytes() + state.data
            header = _HEADER.pack(MAGIC, self._owner, hashlib.sha256(body).digest())
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{key_of(state.tokens).hex()}.kv"
            staging = path.with_suffix(".part")
            with os.fdopen(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(header)
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
            for old in self._files()[:-MOST_FILES]:
                old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.kv"), key=lambda path: path.stat().st_mtime)

    def _parse(self, content: bytes) -> State | None:
        if len(content) < _HEADER.size + _COUNT.size:
            return None
        magic, owner, checksum = _HEADER.unpack_from(content)
        body = memoryview(content)[_HEADER.size :]
        if (magic, owner, checksum) != (MAGIC, self._owner, hashlib.sha256(body).digest()):
            return None
        (count,) = _COUNT.unpack_from(body)
        tokens = np.frombuffer(body, "<i4", count, _COUNT.size).astype(np.int32)
        return State(tokens, bytes(body[_COUNT.size + 4 * count :]), prompt_tokens=count)
