"""Saves beside training: the training thread copies the state, another one writes it, and both go on.

A save is of the step that it names: the copy is made at the end of that step, on every rank, before training goes on.
All the rest (hashes, fsync, what ranks tell each other, the commit, the pruning) is done as if training waited, in a
thread with a connection to the store of its own. One save is under way at most, and the next one waits for it: which
steps are saved does not depend on how fast the disk is, and one buffer is enough.

Every rank's thread comes to the same end, but at a time of its own. So the training thread looks at that end only where
all ranks do: before the next save, at a stop, at the run's end. An error that must not wait so long asks for a stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ddpkit.agree import is_consequence
from ddpkit.checkpoint import contents
from ddpkit.checkpoint.contents import Part, Snapshot
from ddpkit.checkpoint.staging import Staging
from ddpkit.checkpoint.store import CheckpointStore
from ddpkit.errors import SaveFailed, is_orderly
from ddpkit.heartbeat import Heartbeat
from ddpkit.record import Recorder

if TYPE_CHECKING:
    from ddpkit.session import Runtime

log = logging.getLogger("ddpkit")

_LOOK_S = 0.2  # how often a training thread that waits for a save looks at where that one is
_GIVE_UP_S = 5.0  # for a save to end once the run has failed; after that it is left to the end of the process
_LONG_WAIT_S = 1.0  # of one save for another: worth a warning


@dataclass
class _Save:
    """A save, from the copy to its end. The thread's alone until that has ended.

    Attributes:
        step: which it is of.
        holds: whether training waits for it.
        must: whether the run cannot do without it.
        began: when, on the monotonic clock.
        held_s: for how long the copy alone held training.
        error: why it failed.
        is_fatal: whether the run fails with it.
    """

    step: int
    holds: bool
    must: bool
    began: float
    held_s: float = 0.0
    error: BaseException | None = None
    is_fatal: bool = False


class Saver:
    """Saves a run's state, from entering the context to leaving it. Leaving without an error waits for the last save.

    Args:
        rt: the runtime.
        store: where to.
        recorder: notes what was saved, and what was not.
        asynchronous: False has training wait for each save, and copies nothing.
        max_failures: saves in a row that may fail before the run fails.
    """

    def __init__(
        self, rt: Runtime, store: CheckpointStore, recorder: Recorder, *, asynchronous: bool, max_failures: int
    ) -> None:
        self._rt = rt
        self._heartbeat = Heartbeat()  # of the saving thread
        self._leaving = threading.Event()
        self._store = store.beside(rt.ranks_beside(self._heartbeat, self._leaving))
        self._recorder = recorder
        self._staging = Staging(rt.device)
        self._asynchronous = asynchronous
        self._max_failures = max_failures
        self._failures = 0
        self._newest: dict[str, Any] | None = None
        self._under_way: tuple[_Save, threading.Thread] | None = None
        self._has_warned = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or is_orderly(error):
            self.wait()
        elif self._under_way is not None:
            self._leaving.set()  # other ranks may not come any more
            self._under_way[1].join(_GIVE_UP_S)

    def restored(self, progress: dict[str, Any]) -> None:
        """The state is that of a checkpoint, and need not be saved again."""
        self._newest = progress

    def save(self, progress: dict[str, Any], snapshot: Callable[[], Snapshot], *, must: bool = False) -> None:
        """Save the state as it is now, unless it is saved already or under way. Collective.

        Args:
            progress: says which state it is.
            snapshot: gives it.
            must: wait until it is there, and raise if it cannot be.

        Raises:
            SaveFailed: it failed and it must not, or saves have failed too often in a row, the last one included.
            Superseded, StateError: of this save or the last one.
        """
        if not must and self._newest == progress:
            return
        self._make_way(progress["step"], must)
        if self._newest == progress:
            return
        save = _Save(progress["step"], must or not self._asynchronous, must, began=time.monotonic())
        self._rt.heartbeat.saving_since = save.began
        take = self._take(snapshot(), save.holds)
        save.held_s = time.monotonic() - save.began
        thread = threading.Thread(target=self._work, args=(save, take), name="ddpkit-save", daemon=True)
        self._newest, self._under_way = progress, (save, thread)
        thread.start()
        if save.holds:
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one. Collective.

        Raises:
            SaveFailed: it failed, and it must not, or saves have failed too often in a row.
            Superseded, StateError: another reason for which the run cannot go on.
        """
        if self._under_way is None:
            return
        save, thread = self._under_way
        # Where the saving thread is, this one is too, for those who ask: waiting for other ranks, or at work.
        heartbeat, seen = self._rt.heartbeat, self._heartbeat.beats
        with heartbeat.during("saving"):
            while thread.is_alive():
                heartbeat.waits_for = self._heartbeat.waits_for
                if seen != self._heartbeat.beats:
                    seen = self._heartbeat.beats
                    heartbeat.beat()
                thread.join(_LOOK_S)
            heartbeat.waits_for = None
        self._under_way = None
        if save.error is not None:
            self._newest = None
            if save.is_fatal:
                raise save.error

    def _make_way(self, step: int, must: bool) -> None:
        """Wait for the save before this one; say so, unless the run is at a stop or its end anyway."""
        before = self._under_way
        has_to_wait = before is not None and before[1].is_alive()
        began = time.monotonic()
        self.wait()
        if before is None or not has_to_wait or must:
            return
        seconds = time.monotonic() - began
        self._recorder.event("save_delayed", step=step, behind=before[0].step, seconds=round(seconds, 4))
        if seconds > _LONG_WAIT_S and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"the save of step {step} has waited {seconds:.1f} s for that of step {before[0].step}, and training "
                "with it: saves are due faster than they can be written. checkpoint.every_steps is how often."
            )

    def _take(self, snapshot: Snapshot, holds: bool) -> Callable[[], Part]:
        try:
            part = contents.take(snapshot, self._rt.rank, self._rt.world_size)
            if not holds:
                return self._staging.copy(part)
        except Exception as error:  # noqa: BLE001 - the other ranks wait for this rank's word, whatever happened
            return partial(_raise, error)
        if self._rt.device.type == "cuda":
            torch.cuda.synchronize(self._rt.device)  # the thread has streams of its own
        return lambda: part

    def _work(self, save: _Save, take: Callable[[], Part]) -> None:
        try:
            self._recorder.make_durable()  # the lines up to this step, before the checkpoint that counts on them
            saved = self._store.save(save.step, take)
        except BaseException as error:  # noqa: BLE001 - raised again in the training thread
            save.error = error
        self._rt.heartbeat.saving_since = None
        if self._leaving.is_set():
            return  # nobody looks at it any more
        if save.error is not None:
            self._note_failure(save, save.error)
            return
        self._failures = 0
        seconds = time.monotonic() - save.began
        self._rt.heartbeat.saved(seconds)
        if saved.written:
            self._recorder.event(
                "saved",
                step=saved.step,
                bytes=saved.bytes,
                seconds=round(seconds, 4),
                durable_s=round(saved.durable_at - save.began, 4),  # the rest is the removal of older ones
                held_s=round(seconds if save.holds else save.held_s, 4),
                staging_bytes=self._staging.bytes,
            )

    def _note_failure(self, save: _Save, error: BaseException) -> None:
        save.is_fatal = True
        if isinstance(error, SaveFailed):
            self._failures += 1
            self._recorder.event("save_failed", step=save.step, cause=str(error))
            save.is_fatal = save.must or self._failures >= self._max_failures
            if not save.is_fatal:
                count = f"({self._failures} failed in a row)"
                self._warn(f"{error}. The run goes on; older checkpoints are kept {count}.")
        # The end of another rank is met in training too, and ranks that are gone have no vote.
        if save.is_fatal and not save.holds and not is_consequence(error):
            self._rt.stop.request("a save has failed")

    def _warn(self, message: str) -> None:
        if self._rt.is_main:
            log.warning("%s", message)


def _raise(error: Exception) -> NoReturn:
    raise error
