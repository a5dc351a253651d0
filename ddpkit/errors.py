"""What can go wrong, and the exit code each kind leads to. Imports nothing of torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1  # a rank failed; the report says which and why
EXIT_USER = 2  # the user's input is wrong; one message, no traceback
EXIT_STOPPED = 75  # stopped on request with the state saved (EX_TEMPFAIL: run it again)
EXIT_INTERRUPTED = 130  # from the keyboard


class DdpkitError(Exception):
    """The root of ddpkit's own errors; ``exit_code`` is what the process ends with."""

    exit_code = EXIT_FAILED


class UserError(DdpkitError):
    """What the user gave cannot work. The message says what was given, what was found, what to do."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A config, an override or a reference in it is wrong; the message starts with the path of the key."""


class StateError(UserError):
    """An object's state cannot be saved or restored; the message names the path inside the state."""


class BrokenCheckpoint(DdpkitError):
    """A checkpoint is truncated, altered or incomplete; the message names the file and what differs."""


class SaveFailed(DdpkitError):
    """A checkpoint could not be written (a full disk, say); the older ones are untouched."""


class Superseded(DdpkitError):
    """Another process has taken the run directory over; this one may not write to it any more."""


class Stalled(DdpkitError):
    """Some ranks wait, and others will not come; the message says who is where.

    Attributes:
        late: the first rank that does not come, and its host, if that is known: whoever raises this has only noticed.
    """

    def __init__(self, message: str, late: tuple[int, str] | None = None) -> None:
        super().__init__(message)
        self.late = late


class NotFinite(DdpkitError):
    """A loss or a gradient is infinite or not a number; the message says where, and the state before it is saved."""


class NoProgress(DdpkitError):
    """A Slurm job has come back too often without getting any further, so it does not come back again."""


class StopRequested(SystemExit):
    """An agreed stop: every rank has finished the same step and the state is saved. Ends a script with code 75."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.reason = reason


def is_orderly(error: BaseException) -> bool:
    """Whether all ranks leave this way: by an agreed stop, or by ``sys.exit()`` without a complaint."""
    return isinstance(error, StopRequested) or (isinstance(error, SystemExit) and error.code in (None, EXIT_DONE))


def nearest(word: str, words: Sequence[str], *, likeness: float = 0.6) -> str:
    """``"; did you mean 'x'?"`` with the word most like ``word``, or nothing where none is close."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=likeness)
    return f"; did you mean {close[0]!r}?" if close else ""
