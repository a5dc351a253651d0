"""What becomes of a submitted job, seen from where it was submitted: its state, its output, its outcome."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ddpkit import slurm
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from ddpkit.slurm import JobState

from .job import Failure
from .submission import OUTCOME, Submission

POLL_S = 0.5  # looking into files
ASK_S = 2.0  # asking Slurm, for one job; users of a cluster share one controller
_LATE_S = 20.0  # a job's last words may take that long to be seen here, and Slurm to requeue it after all


_CODES = (EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_DONE)  # of several jobs, the first counts


@dataclass(frozen=True)
class Ended:
    """The end of a job, by itself or, where that says nothing, by Slurm.

    Attributes:
        exit_code: by ddpkit's rules.
        failures: of all ranks that failed, the cause first.
        results: what each rank's call returned, by rank: by cloudpickle, in base64.
        report: of the failure; what Slurm says, where the job said nothing.
    """

    exit_code: int
    failures: tuple[Failure, ...] = ()
    results: tuple[str, ...] = ()
    report: str | None = None


class Watch:
    """Watches one job, or one of an array: each look takes what Slurm says of it, and may find its end."""

    def __init__(self, submission: Submission, index: int | None = None, late_s: float = _LATE_S) -> None:
        self.submission = submission
        self.index = index
        self.state: JobState | None = None
        """What Slurm said last."""
        self._late_s = late_s
        self._over_since: float | None = None

    @property
    def name(self) -> str:
        """Of the job, as Slurm writes it."""
        return self.submission.job_id if self.index is None else f"{self.submission.job_id}_{self.index}"

    def outcome(self) -> Ended | None:
        """What the job has written at its end, as far as it can be seen here."""
        path = self.submission.file(OUTCOME, self.index)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # makes a network file system look again
        try:
            tree = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return Ended(
            tree["exit_code"],
            tuple(Failure.from_json(failure) for failure in tree["failures"]),
            tuple(tree["results"]),
            tree["report"],
        )

    def look(self, state: JobState | None, now: float) -> Ended | None:
        """Find the end, if it has come.

        Args:
            state: what Slurm says; None if it no longer knows the job.
            now: seconds on a monotonic clock.
        """
        self.state = state or self.state
        # COMPLETING may take Slurm minutes (an epilog); without an outcome it may also come before a requeue.
        is_over = state is None or state.has_ended or state.state == "COMPLETING"
        if not is_over:
            self._over_since = None
            return None
        if (outcome := self.outcome()) is not None:
            return outcome
        if state is not None and not state.has_ended:
            return None
        if state is not None and state.state == "CANCELLED" and not state.nodes:
            when = "while it waited to start again; what it had saved is there" if state.restarts else "before it began"
            return Ended(EXIT_STOPPED, report=f"job {self.name} was cancelled {when}")
        self._over_since = now if self._over_since is None else self._over_since
        return self._without_outcome(state) if now - self._over_since >= self._late_s else None

    def _without_outcome(self, state: JobState | None) -> Ended:
        where = f"its logs are in {self.submission.folder}"
        if state is None:
            return Ended(EXIT_FAILED, report=f"Slurm no longer knows job {self.name}, which left no word; {where}")
        why = f" ({state.reason})" if state.reason != "None" else ""
        code = state.exit_code if state.state in ("COMPLETED", "FAILED") else EXIT_FAILED
        if code == EXIT_DONE:
            return Ended(EXIT_DONE)
        return Ended(
            code if code in _CODES else EXIT_FAILED,
            report=f"job {self.name} ended as {state.state}{why} and left no word; {where}",
        )


def ask(submission: Submission) -> dict[int | None, JobState]:
    """What Slurm says about the job, or about each of an array, by index; empty if it has forgotten all.

    Raises:
        SlurmFailed: it does not answer.
    """
    try:
        return slurm.job_states(submission.job_id)
    except slurm.JobForgotten:
        return {}


def follow(submission: Submission, *, tee_all: bool, output: TextIO) -> int:
    """Show what a job writes and what becomes of it, until its end, through requeues; gives the exit code.

    Args:
        submission: the job, or the array, of which the worst exit code is given.
        tee_all: show what all tasks write, not only that with rank zero.
        output: gets what rank zero writes to its standard output; all else goes to standard error.
    """
    views = [_View(Watch(submission, index), "*" if tee_all else "0", output) for index in submission.indices]
    try:
        return _follow(submission, views)
    except KeyboardInterrupt:
        _say(f"no longer following; job {submission.job_id} goes on ({submission.hints()})")
        return EXIT_INTERRUPTED


def _follow(submission: Submission, views: Sequence[_View]) -> int:
    ask_s = ASK_S + 0.01 * len(views)
    asked_at = -ask_s
    silence = ""
    while any(view.ended is None for view in views):
        if time.monotonic() - asked_at >= ask_s:
            try:
                states = ask(submission)
                silence = ""
            except slurm.SlurmFailed as error:
                if not silence:
                    _say(f"{error}; still trying")
                silence = str(error)
            else:
                _look(views, states)
            asked_at = time.monotonic()
        for view in views:
            view.show()
        time.sleep(POLL_S)
    return _worst([view.ended.exit_code for view in views if view.ended is not None])


def _look(views: Sequence[_View], states: Mapping[int | None, JobState]) -> None:
    for view in views:
        if view.ended is None:
            view.look(states.get(view.watch.index), time.monotonic())


class _View:
    """What is shown of one job."""

    def __init__(self, watch: Watch, tasks: str, output: TextIO) -> None:
        self.watch = watch
        self.ended: Ended | None = None
        run = watch.submission.runs[watch.index] if watch.index is not None else ""
        self._tasks = tasks
        self._mark = f"[{Path(run).name}] " if run else ""
        self._output = output
        self._tails: dict[Path, _Tail] = {}
        self._said = ""
        self._restarts_told = 0

    def look(self, state: JobState | None, now: float) -> None:
        """Say what has changed."""
        self.ended = self.watch.look(state, now)
        said = self._in_words(state) if state is not None else ""
        if said and said != self._said:
            _say(said, self._mark)
            self._said = said
        if self.ended is not None:
            self.show()
            code = self.ended.exit_code
            words = {EXIT_DONE: "done", EXIT_STOPPED: "stopped on request, state saved; submit it again to continue"}
            report = self.ended.report if not self.ended.failures else None  # those have been shown, with the output
            _say(report or f"job {self.watch.name}: {words.get(code, f'exit code {code}')}", self._mark)

    def show(self) -> None:
        """Pass on what has been written since."""
        for path in self.watch.submission.logs(self.watch.index, self._tasks):
            tail = self._tails.setdefault(path, _Tail(path, self._mark))
            text = tail.read(is_over=self.ended is not None)
            target = self._output if path.suffix == ".out" else sys.stderr
            with contextlib.suppress(OSError, ValueError):  # what reads it may have gone (`| head`)
                target.write(text)
                target.flush()

    def _in_words(self, state: JobState) -> str:
        again = " again" if state.restarts else ""
        if state.state == "PENDING":
            self._restarts_told = state.restarts
            requeued = "is requeued, and " if state.restarts else ""
            why = f" ({state.reason})" if state.reason != "None" else ""
            return f"job {self.watch.name} {requeued}waits to start{again}{why}"
        # It may have waited for less than the time between two looks.
        requeued = "is requeued, and " if state.restarts > self._restarts_told else ""
        return f"job {self.watch.name} {requeued}runs{again} on {state.nodes}" if state.state == "RUNNING" else ""


class _Tail:
    """What is added to a file: as it comes, or with a mark in front of each line, line by line."""

    def __init__(self, path: Path, mark: str) -> None:
        self._path = path
        self._mark = mark
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = ""

    def read(self, is_over: bool) -> str:
        """What is new, and what was held back, once the file ``is_over``."""
        data = b""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
            self._position = file.tell()
        text = self._decoder.decode(data, final=is_over)
        if not self._mark:
            return text
        *lines, self._begun = (self._begun + text).split("\n")
        if is_over and self._begun:
            lines.append(self._begun)
            self._begun = ""
        return "".join(f"{self._mark}{line}\n" for line in lines)


def _worst(codes: Sequence[int]) -> int:
    return min((code for code in codes if code in _CODES), key=_CODES.index, default=EXIT_FAILED)


def _say(text: str, mark: str = "") -> None:
    print(f"{mark}ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
