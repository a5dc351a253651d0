"""Ports for servers that tests start."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port that no one listens on."""
    [port] = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Choose ports that no one listens on.

    They lie below those that the kernel gives to connections, or one could take the port of a stopped node, or of a
    rank that has torch to import before it listens.
    """
    chooser = random.Random()  # not the global one: a test may have seeded it
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = chooser.randrange(10_000, 30_000)
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # in use
                listener.bind(("", port))
                ports.append(port)
        return ports
