"""What a launcher of ours hands to the runtime of a rank that it has started, beside the environment. No torch here.

A script enters `ddpkit.runtime` by itself, and variables are no channel for arguments. So it stands in the context in
which the launcher runs the script; outside of a launcher there is nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


def _to_nobody() -> None:
    return None


@dataclass(frozen=True)
class Launched:
    """What surrounds a rank.

    Attributes:
        timeout_s: of collectives, as the launcher was told; None leaves it to the script.
        stall_timeout_s: alike.
        begun: called by the runtime as soon as this rank takes part in agreements.
        stopped: called if this process is about to end by a stop that came before.
    """

    timeout_s: float | None = None
    stall_timeout_s: float | None = None
    begun: Callable[[], None] = _to_nobody
    stopped: Callable[[], None] = _to_nobody


_surrounding: ContextVar[Launched] = ContextVar("ddpkit.launched", default=Launched())  # noqa: B039 - it is frozen


def surrounding() -> Launched:
    """What the launcher of this rank has handed over; nothing in a thread of the script's own."""
    return _surrounding.get()


@contextmanager
def surrounded(by: Launched) -> Iterator[None]:
    """Hand something over to what is called inside."""
    token = _surrounding.set(by)
    try:
        yield
    finally:
        _surrounding.reset(token)
