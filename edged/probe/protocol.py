"""What a client and the probe say to each other: msgpack frames over a Unix stream socket.

A frame is as in :mod:`edged.workers.protocol`. The client says what it wants to know (:class:`Watch`), and again when
that changes; the probe answers with one :class:`~edged.probe.sample.Sample` a second, until the connection ends.
"""

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from edged.errors import ProbeError
from edged.probe.sample import VERSION, Sample, Watched
from edged.workers.protocol import FrameError, frame

SOCKET: Final = Path("/run/edged-probe/probe.sock")
MAX_WATCH_BYTES: Final = 64 * 1024
MAX_WATCHED: Final = 32
"""Processes that one client may watch."""


class Watch(msgspec.Struct, tag=True, frozen=True):
    """Measure these processes from now on, and no others. Those of other users are left out of the samples, but for
    root; so are those that have ended."""

    processes: tuple[Watched, ...]
    version: int = VERSION


class _Version(msgspec.Struct):
    version: int


M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()
_watch_decoder = msgspec.msgpack.Decoder(Watch)
_sample_decoder = msgspec.msgpack.Decoder(Sample)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def encode(message: Watch | Sample) -> bytes:
    """One message as a frame."""
    return frame(_encoder.encode(message))


def decode_watch(payload: bytes) -> Watch:
    """Raises :class:`FrameError` for what is none, :class:`ProbeError` for one of another version."""
    return _decode(_watch_decoder, payload)


def decode_sample(payload: bytes) -> Sample:
    """Raises :class:`FrameError` for what is none, :class:`ProbeError` for one of another version."""
    return _decode(_sample_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[M], payload: bytes) -> M:
    """The version first: what another one says may not even be readable."""
    try:
        version = _version_decoder.decode(payload).version
        if version != VERSION:
            raise ProbeError(
                f"the other side speaks version {version}, this one {VERSION}",
                hint="restart both: systemctl restart edged-probe edged",
            )
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a message of this protocol: {error}") from error
