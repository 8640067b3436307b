"""Joins standard input and output with a TCP port of this machine: how a board without a network reaches its broker.

QEMU starts one of these for each connection that the guest makes. It imports little, because each start is waited for.
"""

import os
import socket
import sys
import threading

PIECE_BYTES = 65536


def relay(port: int) -> None:
    """Carry bytes both ways until the host's side closes; the guest's end is passed on as it comes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        threading.Thread(target=_send, args=(connection,), daemon=True).start()
        while piece := connection.recv(PIECE_BYTES):
            _write_all(piece)


def _send(connection: socket.socket) -> None:
    while piece := os.read(0, PIECE_BYTES):
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)


def _write_all(piece: bytes) -> None:
    while piece:
        piece = piece[os.write(1, piece) :]


if __name__ == "__main__":
    try:
        relay(int(sys.argv[1]))
    except ConnectionError:  # nobody listens, or who listened is gone: the guest sees its connection end
        sys.exit(1)
