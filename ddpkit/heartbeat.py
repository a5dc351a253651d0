"""Where this rank's main thread is: written by it in passing, read by the threads beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """What the main thread is doing. Plain attributes without a lock: nobody minds one that is a moment old.

    Attributes:
        phase: "starting", "restoring", "training", "loading", "evaluating", "saving", "main_first".
        step: optimizer steps finished.
        beats: grows with everything that the main thread gets done.
        waits_for: what it is waiting for other ranks for, outside of the process group; None if it is not.
        longest_save_s: the longest save so far, in seconds.
        saving_since: when the save that is under way began, on the monotonic clock; None if there is none. It may be
            one that a thread makes while the main thread trains.
        longest_step_s: the longest optimizer step so far, with the wait for its data.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.step = 0
        self.beats = 0
        self.waits_for: str | None = None
        self.longest_save_s = 0.0
        self.saving_since: float | None = None
        self.longest_step_s = 0.0

    def beat(self) -> None:
        """Something has been done."""
        self.beats += 1

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.longest_save_s = max(self.longest_save_s, seconds)

    @property
    def save_left_s(self) -> float:
        """Seconds that the save under way, if there is one, may still take: as long as the longest in all."""
        since = self.saving_since
        return 0.0 if since is None else max(0.0, since + self.longest_save_s - time.monotonic())

    def stepped(self, seconds: float) -> None:
        """An optimizer step took so long."""
        self.longest_step_s = max(self.longest_step_s, seconds)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in a phase."""
        before, self.phase = self.phase, phase
        self.beat()
        try:
            yield
        finally:
            self.phase = before
            self.beat()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Wait for other ranks."""
        before, self.waits_for = self.waits_for, what
        self.beat()
        try:
            yield
        finally:
            self.waits_for = before
            self.beat()
