"""Between a board and its broker: passes MQTT 5 on, and tells which messages the board acknowledged.

It lives outside the board, so that what it saw acknowledged was on its way before the power went.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

PUBLISH = 3
PUBACK = 4
SUBACK = 9


@dataclass(frozen=True, slots=True)
class Packet:
    """One MQTT control packet; ``body`` is what follows its length."""

    first: int
    length: bytes
    body: bytes

    @property
    def kind(self) -> int:
        return self.first >> 4

    @property
    def quality(self) -> int:
        """A PUBLISH's QoS."""
        return self.first >> 1 & 3

    @property
    def raw(self) -> bytes:
        return bytes([self.first]) + self.length + self.body


def read_packets(stream: BinaryIO) -> Iterator[Packet]:
    """Whole packets until the stream ends; one that is cut off is left out."""
    while first := stream.read(1):
        length, encoded = _read_length(stream)
        body = stream.read(length)
        if not encoded or encoded[-1] >= 0x80 or len(body) < length:
            return
        yield Packet(first[0], encoded, body)


def _read_length(stream: BinaryIO) -> tuple[int, bytes]:
    """MQTT 5.0, section 1.5.5: seven bits a byte, the lowest first."""
    length, encoded = 0, b""
    while byte := stream.read(1):
        length |= (byte[0] & 0x7F) << 7 * len(encoded)
        encoded += byte
        if byte[0] < 0x80:
            break
    return length, encoded


def identity(publish: Packet) -> tuple[int, bytes]:
    """Packet id of a QoS 1 PUBLISH, and what it carries: properties and payload."""
    topic_end = 2 + int.from_bytes(publish.body[:2], "big")
    return int.from_bytes(publish.body[topic_end : topic_end + 2], "big"), publish.body[topic_end + 2 :]


class Tap:
    """Listens on ``port`` of the loopback and connects whoever comes with the broker.

    ``on_acknowledged`` is called, from any thread, with properties and payload of each QoS 1 message that the client
    acknowledged, before the broker gets to know. ``subscribed`` is set once the broker granted a subscription: what is
    published before that reaches nobody.
    """

    def __init__(self, broker_port: int, on_acknowledged: Callable[[bytes], None]) -> None:
        self._broker_port = broker_port
        self._on_acknowledged = on_acknowledged
        self.subscribed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._serve, name="tap", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._join, args=(client,), name="tap-connection", daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        sent: dict[int, bytes] = {}
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._broker_port)) as broker:
            down = threading.Thread(target=self._pass_down, args=(broker, client, sent), name="tap-down", daemon=True)
            down.start()
            self._pass_up(client, broker, sent)
            down.join()

    def _pass_down(self, broker: socket.socket, client: socket.socket, sent: dict[int, bytes]) -> None:
        with suppress(OSError), broker.makefile("rb") as stream:
            for packet in read_packets(stream):
                if packet.kind == PUBLISH and packet.quality > 0:
                    number, content = identity(packet)
                    sent[number] = content
                client.sendall(packet.raw)
                if packet.kind == SUBACK:
                    self.subscribed.set()
        _end(client)

    def _pass_up(self, client: socket.socket, broker: socket.socket, sent: dict[int, bytes]) -> None:
        with suppress(OSError), client.makefile("rb") as stream:
            for packet in read_packets(stream):
                if packet.kind == PUBACK:
                    self._on_acknowledged(sent[int.from_bytes(packet.body[:2], "big")])
                broker.sendall(packet.raw)
        _end(broker)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
