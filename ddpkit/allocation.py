"""The end of a Slurm allocation, seen coming: a stop is asked for while there is still time to save."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ddpkit import slurm
from ddpkit.heartbeat import Heartbeat
from ddpkit.slurm import JobState, SlurmFailed
from ddpkit.world import Allocation

log = logging.getLogger("ddpkit")

ENDS = "the allocation ends at"
_LOOK_S = 1.0
_ASK_S = 60.0  # the controller is everybody's: one question in so long
_RESERVE_S = 10.0  # for agreeing and leaving
_LAST_S = 4.0  # before the end; ranks that are still there will not have stopped by then


class End:
    """When to stop for the end of a job, by what is known of it.

    Args:
        allocation: the job.
        ask: Slurm, for when the job ends; it may be extended meanwhile.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        allocation: Allocation,
        ask: Callable[[str], JobState] = slurm.job_state,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._job_id = allocation.job_id
        self._ends_at = allocation.ends_at
        self._ask = ask
        self._clock = clock
        self._asked_at: float | None = None

    def why_now(self, save_s: float, first_s: float) -> str | None:
        """Why to stop now; None to go on. May take as long as Slurm's commands.

        Args:
            save_s: seconds that a save takes.
            first_s: seconds that what is to be finished first takes: a step, and a save that is under way.
        """
        if self._ends_at is None and self._asked_at is None:
            self._look()
        margin_s = _RESERVE_S + 2 * save_s + first_s
        if not self.is_within(margin_s):
            return None
        if self._asked_at is None or self._clock() - self._asked_at >= _ASK_S:
            self._look()
        if not self.is_within(margin_s):
            return None
        return f"{ENDS} {time.strftime('%H:%M:%S', time.localtime(self._ends_at))}"

    def is_within(self, seconds: float) -> bool:
        """Whether the job ends in so many seconds or less, as far as is known."""
        return self._ends_at is not None and self._clock() > self._ends_at - seconds

    def _look(self) -> None:
        self._asked_at = self._clock()
        try:
            self._ends_at = self._ask(self._job_id).ends_at
        except SlurmFailed as error:  # then what was known so far has to do
            log.debug("when the job ends: %s", error)


class AllocationWatch:
    """Asks for a stop before the job's end, from entering the context to leaving it. For rank zero.

    If the ranks are still there when it ends, for whatever reason, the last resort is called.

    In a thread of its own: Slurm's commands may take long, and the vote's thread is needed.

    Args:
        allocation: the job.
        heartbeat: knows how long steps and saves take.
        request: told why, once.
        last_resort: called once.
    """

    def __init__(
        self,
        allocation: Allocation,
        heartbeat: Heartbeat,
        request: Callable[[str], None],
        last_resort: Callable[[], None],
    ) -> None:
        self._end = End(allocation)
        self._heartbeat = heartbeat
        self._request = request
        self._last_resort = last_resort
        self._leaving = threading.Event()
        # A daemon, and not waited for: a command of Slurm's may be under way.
        self._thread = threading.Thread(target=self._watch, name="ddpkit-allocation", daemon=True)

    def __enter__(self) -> AllocationWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()

    def _watch(self) -> None:
        asked = False
        while not self._leaving.wait(_LOOK_S):
            if not asked:
                first_s = self._heartbeat.longest_step_s + self._heartbeat.save_left_s
                reason = self._end.why_now(self._heartbeat.longest_save_s, first_s)
                if reason is not None and not self._leaving.is_set():
                    asked = True
                    self._request(reason)
            elif self._end.is_within(_LAST_S):
                self._last_resort()
                return
