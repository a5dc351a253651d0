"""Where ranks' output goes: each rank's own log, and the console."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import BinaryIO

from .lines import Lines

_LONGEST = 1 << 16  # bytes of a line that are held back for its end (a progress bar may never end it)
_TAIL = 1 << 13  # bytes of a rank's output that are kept for a report
_LAST_LINES = 12
_WIDEST = 200  # characters of a line that a report quotes
_CRASH = "Fatal Python error"  # what faulthandler begins with; the innermost call follows first
_CRASH_LINES = 24
_NOTHING_NEW = (f'  File "{Path(__file__).parent}', "Extension modules: ")


class Output:
    """Takes what ranks write, as it comes.

    The console shows rank zero as it is, or with ``tee_all`` every rank line by line with its number. A log that
    cannot be written (a full disk) is given up with one word about it; the ranks never notice.

    Args:
        log_dir: gets ``rank-N.log`` for each rank; None keeps no logs.
        tee_all: show all ranks.
    """

    def __init__(self, log_dir: Path | None, tee_all: bool) -> None:
        self._log_dir = log_dir
        self._tee_all = tee_all
        self._logs: dict[int, BinaryIO | None] = {}
        self._lines: dict[tuple[int, str], Lines] = {}
        self._tails: dict[int, bytes] = {}

    def write(self, rank: int, stream: str, data: bytes) -> None:
        """Take what a rank wrote on "stdout" or "stderr"."""
        self.log(rank, data)
        if self._tee_all:
            lines = self._lines.setdefault((rank, stream), Lines())
            complete = lines.feed(data)
            if lines.pending > _LONGEST:
                complete.append(lines.take())
            if complete:
                self._show(stream, b"".join(b"[rank %d] %s\n" % (rank, line) for line in complete))
        elif rank == 0:
            self._show(stream, data)
        else:
            self._tails[rank] = (self._tails.get(rank, b"") + data[-_TAIL:])[-_TAIL:]

    def unseen(self, rank: int) -> tuple[str, ...]:
        """The last lines of a rank whose output the console does not show."""
        lines = self._tails.get(rank, b"").decode(errors="replace").rstrip().split("\n")
        crash = next((place for place, line in enumerate(lines) if line.startswith(_CRASH)), None)
        last = lines[-_LAST_LINES:] if crash is None else lines[max(crash - _LAST_LINES, 0) : crash + _CRASH_LINES]
        # Of a progress bar, which goes back in its line again and again, what was seen last.
        seen = [line.rstrip("\r").rpartition("\r")[2][:_WIDEST] for line in last]
        return tuple(line for line in seen if line and not line.startswith(_NOTHING_NEW))

    def flush(self) -> None:
        """Show lines that have not been ended, and close the logs."""
        for (rank, stream), lines in self._lines.items():
            if lines.pending:
                self._show(stream, b"[rank %d] %s\n" % (rank, lines.take()))
        self._lines.clear()
        for log in self._logs.values():
            if log is not None:
                log.close()
        self._logs.clear()

    def log(self, rank: int, data: bytes) -> None:
        """Write to a rank's log alone."""
        if self._log_dir is None:
            return
        path = self._log_dir / f"rank-{rank}.log"
        try:
            if rank not in self._logs:
                self._logs[rank] = path.open("ab", buffering=0)
            log = self._logs[rank]
            if log is not None:
                log.write(data)
        except OSError as error:
            self._logs[rank] = None
            self._show("stderr", f"{path}: cannot be written ({error.strerror}); this log ends here\n".encode())

    def _show(self, stream: str, data: bytes) -> None:
        # What reads our output may have gone (`| head`); that is no reason to end a training run.
        with contextlib.suppress(OSError, ValueError):
            target = sys.stdout if stream == "stdout" else sys.stderr
            target.flush()
            try:
                # A notebook's has one too: of the terminal in which its server was started.
                descriptor = target.fileno() if isinstance(target, io.TextIOWrapper) else None
            except (OSError, ValueError):  # a test's
                descriptor = None
            if descriptor is None:
                target.write(data.decode(errors="replace"))
                return
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
