"""A job that was submitted by `launch.slurm`, as submitit's users know it."""

from __future__ import annotations

import contextlib
import time
from typing import Generic, TypeVar

from ddpkit import slurm
from ddpkit.errors import EXIT_DONE

from .calls import RankError, exception_of
from .following import ASK_S, POLL_S, Ended, Watch, ask
from .job import unpickled
from .submission import Submission

T = TypeVar("T")


class SlurmJob(Generic[T]):
    """A call on ranks in a Slurm job: what has become of it, and what it returned.

    Attributes:
        job_id: Slurm's number of it.
        folder: where the script, the logs and the outcome are.
    """

    def __init__(self, submission: Submission) -> None:
        self.job_id = submission.job_id
        self.folder = submission.folder
        self._submission = submission
        self._watch = Watch(submission)
        self._ended: Ended | None = None
        self._asked_at = -ASK_S

    @property
    def state(self) -> str:
        """Slurm's word for its state; of one that it no longer knows, COMPLETED, FAILED or UNKNOWN."""
        if not self.done() or self._ended is None:
            return self._watch.state.state if self._watch.state is not None else "UNKNOWN"
        return "COMPLETED" if self._ended.exit_code == EXIT_DONE else "FAILED"

    def done(self) -> bool:
        """Whether it has ended, and does not come back. Slurm is asked every two seconds at most."""
        if self._ended is None:
            self._ended = self._watch.outcome()
        now = time.monotonic()
        if self._ended is None and now - self._asked_at >= ASK_S:
            self._asked_at = now
            with contextlib.suppress(slurm.SlurmFailed):  # a controller that is away comes back
                self._ended = self._watch.look(ask(self._submission).get(None), now)
        return self._ended is not None

    def wait(self) -> None:
        """Return once it has ended."""
        while not self.done():
            time.sleep(POLL_S)

    def result(self) -> T:
        """Wait, and give what the function returned on rank zero.

        Raises:
            BaseException: what the first rank to fail raised, of its own type, with the report as its cause.
            RankError: that rank was killed, its exception cannot be pickled, or the job was ended.
        """
        return self.results()[0]

    def results(self) -> list[T]:
        """Wait, and give what the function returned on each rank; raises as `result` does."""
        if (error := self.exception()) is not None:
            raise error
        assert self._ended is not None  # it has been waited for
        return [unpickled(result) for result in self._ended.results]

    def exception(self) -> BaseException | None:
        """Wait, and give what `result` would raise, if it would."""
        self.wait()
        assert self._ended is not None  # it has been waited for
        ended = self._ended
        if not ended.failures and ended.exit_code == EXIT_DONE and ended.results:
            return None
        nothing = f"job {self.job_id} ended with exit code {ended.exit_code} and returned nothing; see {self.folder}"
        report = ended.report or nothing
        return exception_of(ended.failures, report) if ended.failures else RankError(report)

    def cancel(self) -> None:
        """Have Slurm end it."""
        slurm.cancel(self.job_id)

    def stdout(self) -> str | None:
        """What rank zero has written to its standard output so far; None before it has begun."""
        return self._log(".out")

    def stderr(self) -> str | None:
        """What it has written to its standard error so far, and the failure report; None before it has begun."""
        return self._log(".err")

    def _log(self, suffix: str) -> str | None:
        found = [path for path in self._submission.logs(None) if path.suffix == suffix]
        return "".join(path.read_text(errors="replace") for path in found) if found else None
