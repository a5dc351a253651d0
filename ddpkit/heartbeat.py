"""Where this rank's main thread is: written by it in passing, read by the threads beside it."""

from __future__ import annotations

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
        longest_step_s: the longest optimizer step so far, with the wait for its data.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.step = 0
        self.beats = 0
        self.waits_for: str | None = None
        self.longest_save_s = 0.0
        self.longest_step_s = 0.0

    def beat(self) -> None:
        """Something has been done."""
        self.beats += 1

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self.longest_save_s = max(self.longest_save_s, seconds)

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
