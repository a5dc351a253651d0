"""Whose loop it is: at which places of a loop a run may be saved, stopped, and later gone on with.

A restart begins a script at its top, and its loaders where they were saved. So a state can be gone on with if, when
the script comes to its loop again and asks for the next batch, all that belongs to the batches before has been done:
where the loop begins its next turn, not where the optimizer has stepped. What a script does after ``run.step`` (an
evaluation, a schedule, an average) then belongs to the step.

Where a script iterates several loaders, one of them leads: the outermost one in whose loop steps are counted. Of two in
a ``zip`` it is the first, of nested loops the outer one. The others are iterated anew in each turn, or go along.
"""

from __future__ import annotations

from ddpkit.errors import UserError
from ddpkit.loader import Loader
from ddpkit.sampler import Pass


class Loops:
    """The loops of a script of one's own: what has happened in them, and what may happen next.

    Args:
        first: the loader that was named first, if there is one.
        keeps_place: whether a restart in the middle of an epoch finds its place without a loader of ours.
    """

    def __init__(self, first: Loader | None, keeps_place: bool) -> None:
        self._newest = first  # which has given out a batch last
        self._keeps_place = keeps_place
        self._leader: Loader | None = None
        self._led_before: list[Loader] = []
        self._open: list[Loader] = []  # those being iterated, by their first batch: the outermost comes first
        self._is_touched = False  # a batch has been given out in this epoch, by whatever loader
        self._in_epoch = False
        self._has_ended = False  # the leader's loop of this epoch
        self._is_due = False  # a step has been counted, and no boundary has come since
        self._uncounted = 0  # batches of the leader since the newest step

    @property
    def part(self) -> Pass | None:
        """Of the batch that was given out last."""
        return self._newest.current if self._newest is not None else None

    @property
    def is_mid_step(self) -> bool:
        """Whether more batches belong to the optimizer step under way."""
        newest, leader = self._newest, self._leader  # often the same; asked at every step, so without a list of them
        return _is_mid_step(newest) or (leader is not newest and _is_mid_step(leader))

    @property
    def is_between_steps(self) -> bool:
        """Whether the leader has given out no batch since the newest step."""
        return not self._uncounted

    @property
    def is_in_epoch(self) -> bool:
        """Whether a turn of ``run.epochs`` is under way."""
        return self._in_epoch

    def counted(self) -> bool:
        """A step has been counted; whether this is the boundary, without a loader to wait for.

        Raises:
            UserError: several loaders lead by turns, and nothing tells a restart whose turn it is.
        """
        self._uncounted = 0
        if self._leader is None or not (self._in_epoch or self._leader.is_open):
            self._choose_leader()
        is_boundary = self.is_alone
        self._is_due = not is_boundary
        return is_boundary

    @property
    def is_alone(self) -> bool:
        """Whether nobody will ask for a batch, and the place is known all the same."""
        return self._leader is None and not self._open and (self._keeps_place or not self._in_epoch)

    def _choose_leader(self) -> None:
        leader = self._open[0] if self._open else None
        if leader is None or leader is self._leader:
            return
        if self._leader is not None:
            self._led_before.append(self._leader)
        if leader in self._led_before:
            raise UserError(
                "run.step: loops over several loaders take turns, and a restart could not tell whose turn it is. Put "
                "them into one epoch: `for epoch in run.epochs(n):` around both"
            )
        self._leader = leader

    def begin_epoch(self) -> None:
        """A turn of ``run.epochs`` begins."""
        self._in_epoch, self._has_ended, self._is_touched = True, False, False
        self._leader = None
        self._open.clear()
        self._led_before.clear()

    def end_epoch(self) -> bool:
        """It ends; whether the run may be saved now.

        Not in the middle of a step, whose gradients are in no checkpoint. And not if somebody still holds an iterator
        that is not at its end: it will be asked for more or forgotten, and a restart has to do the same.
        """
        self._in_epoch, self._has_ended, self._is_touched = False, False, False
        self._leader = None
        self._is_due = bool(self._uncounted or self._open)
        return not self._is_due

    def asked(self, loader: Loader) -> bool:
        """The loop of this loader begins a turn; whether this is the boundary of the step before."""
        if self._leader not in (None, loader) or self._in_epoch_s_end():
            return False
        is_due = self._is_due and not self._uncounted and not loader.at_end  # its last one belongs to the loop's end
        self._is_due &= not is_due
        return is_due

    def may_stop(self, loader: Loader) -> bool:
        """Whether this loader's fetch comes before anything else of a turn."""
        is_next = self._leader is loader or (self._leader is None and not self._is_touched)
        return is_next and not (self._uncounted or self._is_due or self._in_epoch_s_end())

    def given(self, loader: Loader) -> None:
        """A batch is given out."""
        self._newest, self._is_touched = loader, True
        if loader not in self._open:
            self._open.append(loader)
        if loader is self._leader:
            self._uncounted += 1

    def ended(self, loader: Loader, is_left: bool) -> None:
        """A loop has come to its end, or was left before it."""
        if is_left:
            loader.leave()
        if loader in self._open:
            self._open.remove(loader)
        self._has_ended |= loader is self._leader

    def _in_epoch_s_end(self) -> bool:
        return self._in_epoch and self._has_ended


def _is_mid_step(loader: Loader | None) -> bool:
    return loader is not None and loader.is_open and loader.current is not None and not loader.current.is_last
