"""Ports for servers of one's own."""

import socket


def find_free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
