"""Lines out of bytes that arrive in pieces."""

from __future__ import annotations


class Lines:
    """Takes pieces, gives lines; a line of many pieces costs no more than its length."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.pending = 0
        """Bytes of the line that has begun."""

    def feed(self, data: bytes) -> list[bytes]:
        """Take what has arrived; returns the lines that it completes, without their ends."""
        first, *others = data.split(b"\n")
        self._pieces.append(first)
        if not others:
            self.pending += len(first)
            return []
        complete = [self.take(), *others[:-1]]
        self._pieces.append(others[-1])
        self.pending = len(others[-1])
        return complete

    def take(self) -> bytes:
        """Give the line that has begun, as far as it has come."""
        line = b"".join(self._pieces)
        self._pieces.clear()
        self.pending = 0
        return line
