"""Messages between the launchers of one job: the one with rank zero leads, the others follow.

Lines of JSON over TCP. Followers tell what happens to their ranks, the leader says what to do; torch has no part in it.
A connection that ends means that the other side, or its node, is gone: a lost node says nothing, so the kernel asks.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

from .lines import Lines

_SEND_S = 10.0  # a message is small: one that cannot be sent for so long has nobody to read it
_PIECE = 1 << 20
_ASK_AFTER_S, _ASK_EVERY_S, _ASK_TIMES = 10, 5, 4  # a silent peer counts as lost after half a minute


class Peer:
    """One end of a connection; takes the socket over."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _ASK_AFTER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_EVERY_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASK_TIMES)
        self.connection = connection
        self._lines = Lines()

    def send(self, **message: Any) -> None:
        """Send one message. One that cannot be sent is lost, and `receive` will say that the peer is."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Give the messages that have come, perhaps none yet; None if the peer is gone. Call it when it is readable."""
        try:
            data = self.connection.recv(_PIECE)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        try:
            return [dict(json.loads(line)) for line in self._lines.feed(data)]
        except (ValueError, TypeError):
            return None  # no launcher of ours

    def close(self) -> None:
        """End the connection."""
        self.connection.close()
