"""Copies of models with eight-bit weights, where this device computes them faster than the file as it came.

llama.cpp has kernels for many tokens at a time for some types of weights only (ggml-cpu: llamafile/sgemm.cpp,
repack.cpp). A file in another type is copied into one that has them; eight bits hold a value of four within half a
hundredth of the largest in its block of 32. Both are tried, and the copy is kept where a typical answer comes sooner.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec

from edged.errors import ChecksumError, GgufError, ModelError
from edged.models import landing, sources
from edged.models.gguf import TENSOR_TYPES, GgufHeader, read_header
from edged.types import TokenSeconds, Trial

LLAMA: Final = "llama-cpp-python"

COMMAND: Final = (sys.executable, "-m", "edged.engine.widen")

WITHOUT_KERNELS: Final = frozenset({"Q4_1", "Q5_1"})
"""Types whose tokens are computed one by one, however many there are (measured: a prompt half as fast as in Q8_0)."""

EIGHT_BITS: Final = {
    name: 34 / 32 * elements / size
    for name, elements, size in TENSOR_TYPES.values()
    if name not in ("F32", "F64", "I8", "I16", "I32", "I64")
}
"""Bytes of Q8_0 for one byte of a type, from the sizes of ggml's blocks. What is F32 is no matrix, and stays."""

LEAST_SHARE: Final = 0.5  # of the weights; where others decide the speed, a copy changes little
MOST_OF_MEMORY: Final = 0.25
MOST_OF_AVAILABLE: Final = 0.5
TRIAL_SECONDS: Final = 3600.0  # an emulated processor takes minutes
TYPICAL_PROMPT_TOKENS: Final = 128
TYPICAL_ANSWER_TOKENS: Final = 24
LEAST_GAIN: Final = 1.1


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a copy, made with the named version of llama-cpp-python. A device that gained nothing by it keeps
    this alone, so as not to try again: size, time of change and checksum are those of a copy that is kept.
    """

    trial: Trial
    llama: str
    size_bytes: int = 0
    mtime_ns: int = 0
    sha256: str = ""

    @property
    def kept(self) -> bool:
        return worth(self.trial)


def unsuitable(header: GgufHeader, *, memory_bytes: int | None, available_bytes: int | None) -> str:
    """Why a copy could not help or has no room, empty if it may.

    ``memory_bytes`` is what the device has, ``available_bytes`` what processes may still take of it, a cgroup's limit
    included; None where the system does not say.
    """
    slow = sum(count for kind, count in header.tensor_bytes_by_type.items() if kind in WITHOUT_KERNELS)
    if not header.causal or header.pooling not in ("", "none"):
        return "only chat models are copied"
    if slow < LEAST_SHARE * header.tensor_bytes:
        return f"llama.cpp computes {header.quantisation or 'its weights'} fast as they are"
    if memory_bytes is not None and size(header) > MOST_OF_MEMORY * memory_bytes:
        return f"it would take {size(header) / 1e6:.0f} MB, more than a quarter of this device's memory"
    if available_bytes is not None and size(header) > MOST_OF_AVAILABLE * available_bytes:
        return f"it would take {size(header) / 1e6:.0f} MB, more than half of the memory that is free now"
    return ""


def size(header: GgufHeader) -> int:
    """Bytes of the copy, about."""
    return int(sum(count * EIGHT_BITS.get(kind, 1.0) for kind, count in header.tensor_bytes_by_type.items()))


def worth(trial: Trial) -> bool:
    """Whether a typical answer is there sooner from the copy, by enough to hold it in memory."""
    return _typical_seconds(trial.file) >= LEAST_GAIN * _typical_seconds(trial.copy)


def _typical_seconds(token: TokenSeconds) -> float:
    return TYPICAL_PROMPT_TOKENS * token.prompt + TYPICAL_ANSWER_TOKENS * token.answer


class Copies:
    """The copies in ``directory``, by the identity of the file that each was made from. All methods block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, identity: str) -> Path | None:
        """The copy to use in the place of a file; None where there is none, or not the one that was tried."""
        copied, copy = self.tried(identity), self._copy(identity)
        if copied is None or not copied.kept:
            return None
        try:
            read_header(copy)
            status = copy.stat()
        except (GgufError, OSError):
            return None
        return copy if (status.st_size, status.st_mtime_ns) == (copied.size_bytes, copied.mtime_ns) else None

    def verify(self, identity: str) -> None:
        """Read a whole copy again, if there is one. Raises :class:`ChecksumError` when it is not as it was made."""
        copied, copy = self.tried(identity), self.find(identity)
        if copied is None or copy is None:
            return
        try:
            landing.check(copy, copied.sha256)
        except ChecksumError as error:
            name = identity.rpartition("@")[0]
            error.hint = f"the disk may be failing; 'edged models widen {name}' makes the copy again"
            raise

    def tried(self, identity: str) -> Copied | None:
        """What became of the copy, if one was made with this llama.cpp: another may be faster or slower with it."""
        try:
            copied = msgspec.json.decode(self._note(identity).read_bytes(), type=Copied)
        except (OSError, msgspec.DecodeError):
            return None
        return copied if copied.llama == version(LLAMA) else None

    def make(
        self, identity: str, file: Path, threads: int, environment: Mapping[str, str], command: Sequence[str] = COMMAND
    ) -> Copied:
        """Copy ``file``, try both, and keep what is faster. Takes seconds; another copy of the model's name goes then.

        A worker that has that one goes on, and loads the model's file if it is started anew. ``environment`` is what
        its threads compute in. Raises :class:`ModelError`, :class:`DiskFullError`.
        """
        staging = self._directory / ".staging"
        with sources.disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            with landing.exclusive(self._directory):
                staging.unlink(missing_ok=True)  # of a run that lost its power
                try:
                    sources.require_space(self._directory, size(read_header(file)))
                    trial = _tried([*command, str(file), str(staging), str(threads)], environment)
                    for former in self._of_name(identity.rpartition("@")[0]):
                        former.unlink()
                    return self._land(identity, staging, trial)
                finally:
                    staging.unlink(missing_ok=True)

    def drop_former(self, identity: str) -> None:
        """Remove the copies of the model's earlier files: nobody will load them again."""
        if self._directory.exists():
            with sources.disk_errors(self._directory), landing.exclusive(self._directory):
                for each in self._of_name(identity.rpartition("@")[0]):
                    if each.stem != identity:
                        each.unlink()

    def drop(self, name: str) -> None:
        """Remove all copies of a model; a worker that has one goes on."""
        if self._directory.exists():
            with sources.disk_errors(self._directory), landing.exclusive(self._directory):
                for each in self._of_name(name):
                    each.unlink()

    def _of_name(self, name: str) -> list[Path]:
        return [each for each in self._directory.iterdir() if each.name.rpartition("@")[0] == name]

    def _land(self, identity: str, staging: Path, trial: Trial) -> Copied:
        """The copy first, if it is kept: without the note it is not used, and made again."""
        copied, copy = Copied(trial=trial, llama=version(LLAMA)), self._copy(identity)
        try:
            if copied.kept:
                sha256 = landing.checksum(staging)
                landing.put(staging, copy)
                status = copy.stat()
                copied = msgspec.structs.replace(
                    copied, sha256=sha256, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns
                )
            staging.write_bytes(msgspec.json.encode(copied))
            landing.put(staging, self._note(identity))
        except OSError:
            copy.unlink(missing_ok=True)
            raise
        return copied

    def _copy(self, identity: str) -> Path:
        return self._directory / f"{identity}.gguf"

    def _note(self, identity: str) -> Path:
        return self._directory / f"{identity}.json"


def _tried(command: Sequence[str], environment: Mapping[str, str]) -> Trial:
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, check=False, timeout=TRIAL_SECONDS
        )
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Trial)
        reason = words[-1] if words else f"exit status {done.returncode}"
    except (subprocess.TimeoutExpired, msgspec.DecodeError, OSError) as error:
        reason = str(error)
    raise ModelError(
        f"no eight-bit copy could be made: {reason}",
        hint="the model is used as it is; chat.widen = false keeps edged from trying",
    )
