"""A probe of the tests: the real protocol on a real socket, with samples made up."""

import asyncio
import contextlib
from pathlib import Path

from edged.probe.protocol import Watch, decode_watch, encode
from edged.probe.sample import ProcessSample, Sample, Watched
from edged.workers.protocol import FrameBuffer
from tests.samples import NOW, process, sample


class FakeProbe:
    """Answers each :class:`Watch` with ``answer``, where there is one, and says more by ``send``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.watches: asyncio.Queue[tuple[Watched, ...]] = asyncio.Queue()
        self.answer = b""

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def stop(self) -> None:
        """As a probe that is killed: the socket's file stays."""
        if self._server is not None:
            self._server.close()
        for writer in self._serving.values():
            writer.transport.abort()
        await asyncio.gather(*self._serving)

    def send(self, told: Sample) -> None:
        """To all who are connected."""
        for writer in self._serving.values():
            writer.write(encode(told))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        with contextlib.suppress(ConnectionError):
            await self._hear(reader, writer)
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        del self._serving[task]

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameBuffer()
        while data := await reader.read(1 << 16):
            for payload in frames.feed(data):
                self.watched(decode_watch(payload))
                writer.write(self.answer)

    def watched(self, watch: Watch) -> None:
        self.watches.put_nowait(watch.processes)


class BusyProbe(FakeProbe):
    """Tells of a second many times in one: each watched process computed on core 0 without a pause."""

    def __init__(self, path: Path, pause_seconds: float = 0.02) -> None:
        super().__init__(path)
        self._pause_seconds = pause_seconds
        self._telling: asyncio.Task[None] | None = None
        self._watch = Watch(())
        self.told = 0

    async def start(self) -> None:
        await super().start()
        self._telling = asyncio.create_task(self._tell())

    async def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        await super().stop()

    def watched(self, watch: Watch) -> None:
        self._watch = watch

    async def _tell(self) -> None:
        while True:
            self.told += 1
            self.send(sample(*map(_computing, self._watch.processes), at=NOW + self.told))
            await asyncio.sleep(self._pause_seconds)


def _computing(watched: Watched) -> ProcessSample:
    return process(watched.name, watched.pid, cpu_seconds={0: 1.0}, minor_faults=1)
