"""Ranks that were asked to stop, and do not: how long they are waited for, and what is said of them then."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from ddpkit.errors import DdpkitError

from .causes import WAITED, waits
from .job import BEGUN, Failure
from .ranks import Rank

_STACKS_S = 1.0  # for ranks to write where they are, before they are ended
_ASK_AGAIN_S = 2.0  # how much time there is left, of one who could not say
_IMPORTED = re.compile(r'  File "(.*)", line (\d+) in <module>')


class Patience:
    """Knows when the time is over.

    Attributes:
        time_left: asked in a thread, when the ranks are asked to stop (given the signal's name): why, and how many
            seconds they have at most; None if there is no end. Asked again if it raises a DdpkitError.
    """

    def __init__(self) -> None:
        self.time_left: Callable[[str], tuple[str, float] | None] | None = None
        self._is_asked = False
        self._ends: tuple[str, float] | None = None
        self._giving_up: tuple[str, float] | None = None

    def begin(self) -> None:
        """Forget the attempt before."""
        self._giving_up = None

    def asked(self, name: str) -> None:
        """The ranks have been asked to stop, by the signal of that name, and perhaps not for the first time."""
        if self.time_left is not None and not self._is_asked:
            self._is_asked = True
            # The answer may take long: not in the loop.
            threading.Thread(target=self._find_end, args=(name, self.time_left), daemon=True).start()

    def _find_end(self, name: str, ask: Callable[[str], tuple[str, float] | None]) -> None:
        while True:
            try:
                found = ask(name)
                break
            except DdpkitError:
                time.sleep(_ASK_AGAIN_S)
        if found is not None:
            self._ends = (found[0], time.monotonic() + found[1])

    def over(self) -> str | None:
        """Why to give up now; once."""
        if self._ends is None or time.monotonic() < self._ends[1]:
            return None
        (why, _), self._ends = self._ends, None
        return f"asked to stop ({why}), and did not in time"

    @property
    def given_up_for(self) -> str | None:
        """Why the ranks have been given up; None if they have not."""
        return self._giving_up[0] if self._giving_up else None

    def give_up(self, why: str) -> None:
        """Give the ranks a moment to say where they are, and no more."""
        self._giving_up = (why, time.monotonic() + _STACKS_S)

    @property
    def is_over(self) -> bool:
        """Whether ranks that were given up have had the time to say where they are."""
        return self._giving_up is not None and time.monotonic() > self._giving_up[1]


def unfinished(rank: Rank, why: str) -> Failure:
    """The failure of a rank that was given up: what it was at, as far as its stacks say."""
    stacks = rank.stacks.decode(errors="replace")
    if waits(stacks):
        return replace(rank.failed(-signal.SIGKILL, WAITED, stacks), is_consequence=True)
    return rank.failed(-signal.SIGKILL, f"{why}: {_what_it_did(stacks, BEGUN in rank.reached)}", stacks)


def _what_it_did(stacks: str, has_begun: bool) -> str:
    main = stacks.rpartition("(most recent call first):")[2]  # faulthandler shows the main thread last
    if "<frozen importlib." in main and (place := _IMPORTED.search(main)) is not None:
        return f"{'it was' if has_begun else 'still starting,'} importing, at {place[1]}, line {place[2]}"
    if not stacks and not has_begun:
        return "it did not say where it is; it had hardly started, or it is stopped"
    return "stuck, or its step or save took too long"
