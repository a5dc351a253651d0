"""What a run writes down for people and programs: metrics.jsonl and events.jsonl, by rank zero.

What depends on the clock sits under ``time``; every other value in metrics.jsonl is bit-reproducible. A full disk
costs lines, never the run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("ddpkit")

_LINES_KEPT = 10_000  # for a disk that is full; some megabytes at most


class JsonLines:
    """A file of JSON lines that only grows, except that a restore may cut its end off.

    Lines for which a full disk has no room are kept, and written once there is some. Threads may write at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._lock = threading.Lock()
        self._complained = False
        self._waiting: deque[bytes] = deque(maxlen=_LINES_KEPT)
        if self._ends_torn():
            self._waiting.append(b"\n")  # so that half a line spoils itself alone

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, whole; on a full disk warn once and go on."""
        with self._lock:
            self._append(json.dumps(line).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        self._waiting.append(line)
        try:
            while self._waiting:
                written = self._file.write(self._waiting[0])
                if written != len(self._waiting[0]):
                    self._file.truncate(self._file.seek(0, os.SEEK_END) - written)  # no half line in the middle of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.popleft()
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning(
                    "%s: cannot be written (%s); the run goes on, and writes these lines when it can",
                    self._path,
                    error.strerror or error,
                )

    def _ends_torn(self) -> bool:
        """Whether the process before us was cut off, or ran out of disk, within a line."""
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def make_durable(self) -> None:
        """Have what was written survive a power cut."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            log.debug("%s: fsync: %s", self._path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_metrics(path: Path, step: int, evaluated: bool) -> dict[str, Any] | None:
    """Drop the lines of steps that a restore has undone, and half a line at the end. Gives the newest that stays.

    Args:
        path: metrics.jsonl; may be missing.
        step: the step restored; 0 for a fresh start.
        evaluated: whether the state was saved after the evaluation of that step, so that its line stays.
    """
    newest = None
    if not path.exists():
        return newest
    with path.open("r+b") as file:
        place = kept = 0
        for line in file:
            place += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # half a line, from a full disk or a kill; it stays if whole ones follow
            if not (line.endswith(b"\n") and _stays(entry, step, evaluated)):
                break
            kept, newest = place, entry
        file.truncate(kept)
    return newest


def _stays(entry: Any, step: int, evaluated: bool) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    return bool(entry["step"] < step or (entry["step"] == step and (evaluated or entry.get("kind") != "eval")))


def _next_attempt(path: Path) -> int:
    newest = -1
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line
            newest = max(newest, json.loads(line)["attempt"])
    return newest + 1


class Recorder:
    """Rank zero's two files; on the other ranks everything here does nothing.

    Args:
        run_dir: exists and can be written.
        is_main: whether this is rank zero.
        attempt: the number of this attempt, noted in every event; None takes one more than the newest event has.
    """

    def __init__(self, run_dir: Path, is_main: bool, attempt: int | None) -> None:
        self._attempt = _next_attempt(run_dir / "events.jsonl") if attempt is None and is_main else attempt
        self._metrics_path = run_dir / "metrics.jsonl"
        self._events = JsonLines(run_dir / "events.jsonl") if is_main else None
        self._metrics: JsonLines | None = None

    def open_metrics(self, step: int, evaluated: bool) -> dict[str, Any] | None:
        """Begin to write metrics after a restore of ``step``; gives the newest line left. Call once, at first."""
        if self._events is None:
            return None
        newest = cut_metrics(self._metrics_path, step, evaluated)
        self._metrics = JsonLines(self._metrics_path)
        return newest

    def metrics(
        self,
        kind: str,
        progress: Mapping[str, int],
        values: Mapping[str, float],
        of_run: Mapping[str, Any] | None = None,
        /,
        **clock: float,
    ) -> None:
        """Write one line: what was trained or evaluated at this step.

        ``of_run`` is what depends on time as well, but is no value of this step: it goes to nobody but the file.
        """
        if self._metrics is not None:
            time_part = {"unix": round(time.time(), 3)} | {name: round(value, 6) for name, value in clock.items()}
            self._metrics.write({"kind": kind, **progress, **values, "time": {**time_part, **(of_run or {})}})

    def event(self, name: str, **fields: Any) -> None:
        """Write one line: a start, a save, a restore, a stop, a failure."""
        if self._events is not None:
            self._events.write({"event": name, "attempt": self._attempt, **fields, "unix": round(time.time(), 3)})

    def make_durable(self) -> None:
        """Have the metrics of a step be durable before its checkpoint is."""
        if self._metrics is not None:
            self._metrics.make_durable()

    def close(self) -> None:
        """Close both files."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
