"""A run directory in use: progress, what is recorded, when to save, when to stop.

`Run` is what `rt.resume` gives to a script of one's own, and what `fit` works on; both loops count, record, save and
stop by the same few calls.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ddpkit import requeue, selection
from ddpkit.callbacks import Callbacks
from ddpkit.checkpoint.claim import Claim, Claimant, acquire
from ddpkit.checkpoint.listing import complete
from ddpkit.checkpoint.shards import Sharded, fitted, fitted_optimizer, holds_spread, is_spread
from ddpkit.checkpoint.store import CheckpointStore, Loaded, Snapshot
from ddpkit.errors import EXIT_STOPPED, NotFinite, SaveFailed, UserError
from ddpkit.ledger import EVALUATION, SAVING, Ledger
from ddpkit.loader import Loader
from ddpkit.loops import Loops
from ddpkit.means import RankMeans
from ddpkit.measuring import Gauges, StepClock
from ddpkit.model import unsynced, unwrap
from ddpkit.nonfinite import Fault
from ddpkit.permutation import derive
from ddpkit.progress import Lines, ProgressBar
from ddpkit.record import Recorder
from ddpkit.sampler import Pass
from ddpkit.saving import Saver
from ddpkit.seeding import seed_generators
from ddpkit.selection import Best, EarlyStopping
from ddpkit.state import pack, rng_state, set_rng_state
from ddpkit.zero import Zero, ZeroOptimizer

if TYPE_CHECKING:
    from ddpkit.session import Runtime

log = logging.getLogger("ddpkit")

_CALLBACKS = "callbacks"  # under which name a checkpoint has their states
_TIME = "time."  # marks what depends on time among values of which the means are formed
_TELL_AT_ONCE = 64  # ranks whose own times are in every line; of more, in every so-and-so-many-th


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be part of a checkpoint."""

    def state_dict(self) -> Any:
        """What to save."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take up what was saved."""
        ...


@dataclass
class Progress:
    """How far a run is. Optimizer steps and samples are its only clocks."""

    step: int = 0
    samples: int = 0
    epoch: int = 0
    """Epochs completed, with the work that belongs to their ends."""
    evaluated: int = -1
    """The step of the newest evaluation."""
    values: dict[str, float] = field(default_factory=dict)
    """What that gave, as far as it is finite."""
    best: dict[str, str] | None = None
    """Which of the values makes the best checkpoint, and how; see `selection.Best`."""
    stopping: dict[str, Any] | None = None
    """How long early stopping has waited; see `selection.EarlyStopping`."""
    ended: str | None = None
    """Why a callback has ended the run before its time."""
    skipped: int = 0
    """Steps in a row that were not taken since the newest one that was."""


@dataclass(frozen=True)
class _Line:
    """A line of training that is due when the means of its values are there.

    Attributes:
        unix: when its step was done.
        step_s: the time a step since the line before.
        steps: how many that were.
        samples_per_s: over all ranks.
        phases: what of the values is a part of a step's time, by name.
        of_itself: what each rank has told of itself, by name.
    """

    unix: float
    step_s: float
    steps: int
    samples_per_s: float
    phases: tuple[str, ...]
    of_itself: tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """Which start of the run this is, who started it, and the config it goes by."""

    number: int | None = None
    """None where no launcher of ours counts: one more than the run's events know of."""
    launcher_pid: int | None = None
    config: str | None = None
    """Kept as config.yaml once the run stands: an attempt that never got so far must not change what the run is."""


class Run:
    """An open run directory. A context manager; entering restores, and is collective. Made by `Runtime.resume`.

    Attributes:
        progress: how far the run is.
    """

    def __init__(
        self,
        rt: Runtime,
        run_dir: Path,
        objects: Mapping[str, Any],
        *,
        every_steps: int | None = 1000,
        every_minutes: float | None = None,
        keep: int = 3,
        max_failures: int = 3,
        best: Best | None = None,
        early_stopping: EarlyStopping | None = None,
        callbacks: Sequence[Any] = (),
        asynchronous: bool = True,
        log_every: int = 10,
        attempt: Attempt = Attempt(),
        wait_for_claim_s: float = 15.0,
        is_fit: bool = False,
    ) -> None:
        _check_objects(objects)
        self.progress = Progress()
        self._rt = rt
        self._run_dir = run_dir
        self._objects = dict(objects)
        self._loaders = [item for item in objects.values() if isinstance(item, Loader)]
        self._loader = self._loaders[0] if self._loaders else None
        self._every_steps = every_steps
        self._every_minutes = every_minutes
        self._keep = keep
        self._max_failures = max_failures
        self._best = best
        self._early_stopping = early_stopping
        has_bar = any(isinstance(each, ProgressBar) for each in callbacks)
        self._callbacks = Callbacks([*callbacks, *([] if has_bar else [Lines()])])
        self._noted: dict[str, Any] = {}
        self._asks_to_end: str | None = None
        self._asynchronous = asynchronous
        self._log_every = log_every
        self._attempt = attempt
        self._wait_for_claim_s = wait_for_claim_s
        self._stack = ExitStack()
        self._means = RankMeans(rt.ranks, rt.device)
        self._line: _Line | None = None  # whose means are under way
        self._tried_at = time.monotonic()
        self._save_is_due = False
        self._loops = Loops(self._loader, _keeps_place(objects))
        self._is_fit = is_fit
        self._counted: Pass | None = None
        self._is_ended = True  # nothing has been done yet that is not saved
        self._is_past_epochs = False
        self._length: tuple[int | None, int | None] = (None, None)
        self._clock = StepClock(rt.device)
        self._gauges = Gauges(rt.device, [item for item in objects.values() if isinstance(item, nn.Module)])
        self._step_began: float | None = None
        self._ledger = Ledger()
        self._logged = (time.monotonic(), 0, 0)
        self._claim: Claim | None = None
        self._recorder: Recorder
        self._store: CheckpointStore
        self._saver: Saver

    def __enter__(self) -> Run:
        ranks = self._rt.ranks
        self._stack.callback(self._means.close)
        try:
            ranks.on_main("run_dir", self._take_directory)
            self._recorder = Recorder(self._run_dir, self._rt.is_main, self._attempt.number)
            self._stack.callback(self._recorder.close)
            self._store = CheckpointStore(
                self._run_dir / "checkpoints",
                self._keep,
                self._rt.ranks,
                event=self._recorder.event,
                warn=self._warn,
                fence=self._fence,
                best=self._best,
            )
            self._saver = self._stack.enter_context(
                Saver(
                    self._rt,
                    self._store,
                    self._recorder,
                    asynchronous=self._asynchronous,
                    max_failures=self._max_failures,
                )
            )
            self._rt.begin(self._run_dir, self._note_requeue)
            self._stop_before_the_first_step()
            ranks.on_main("leftovers", self._store.clean)
            self._check_state()
            with self._rt.heartbeat.during("restoring"):
                self._restore()
            ranks.on_main("config", self._store_config)
            self._stop_before_the_first_step()
            self._callbacks.entered(self._stack)
            self._callbacks.tell("on_start", self)
        except BaseException:
            self._stack.close()
            raise
        for loader in self._loaders:
            loader.watch = self
        self._clock.begin(is_recorded=self.records_next_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loader in self._loaders:
            loader.watch = None
        if error is None:
            with self._stack:
                self._end_with_script()
            return
        try:
            if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_STOPPED):
                self._write_line()
                if error.code != EXIT_STOPPED and self._is_past_epochs:
                    self._tell_end()
            else:
                self._recorder.event("failed", step=self.progress.step, cause=f"{type(error).__name__}: {error}")
        finally:  # whatever comes of the line, the claim is given back
            self._stack.__exit__(kind, error, trace)

    @property
    def rt(self) -> Runtime:
        """The runtime that the run is in."""
        return self._rt

    @property
    def run_dir(self) -> Path:
        """Where everything that the run writes is."""
        return self._run_dir

    @property
    def objects(self) -> Mapping[str, Any]:
        """What belongs to the run's state, by name: "model", "optimizer" and so on."""
        return self._objects

    # -- a loop of one's own ---------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Count epochs from where the run stands up to ``count``; save and stop between them where that is due.

        What a script does after its inner loop (validation, a scheduler's step) belongs to the epoch: it is done
        before the epoch's last step is saved, so that a restart neither repeats nor skips it. A restart in the middle
        of an epoch comes to that epoch's beginning again, and its loop goes on at the batch where it stopped. After
        the last one the run is saved, and finished when the script leaves it: until then it may count further, as one
        with several phases does. Collective at every turn.
        """
        self.is_to_last(epochs=count)
        while self.progress.epoch < count and self.ended_early is None:
            self._loops.begin_epoch()
            self.begin_epoch()
            yield self.progress.epoch
            self.end_epoch(is_last=self.progress.epoch + 1 >= count)
        self._save(must=True)
        self._is_ended, self._is_past_epochs = False, True

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around a batch's forward and backward pass: gradients are averaged over the ranks in a step's last one only.

        Without it they are averaged in each, which gives the same, later.
        """
        part = self._loops.part
        with ExitStack() as stack:
            if part is not None and not part.is_last:
                for model in self._objects.values():
                    if isinstance(model, nn.Module):
                        stack.enter_context(unsynced(model))
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass weighted by this rank's share, so that the gradient is the mean over the global batch.

        ``loss`` is the mean over the batch that was given out last, of the run's loaders. Collective, as DDP's
        backward is.
        """
        part = self._loops.part
        weight = 1.0 if part is None else part.weight(self._rt.world_size)
        (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]  # torch's
        self.passed()

    def step(self, **values: Any) -> None:
        """Count an optimizer step; record, save and stop when due. Call it after ``optimizer.step()``. Collective.

        The run is saved, and stops, where the loop over the loader begins its next turn: what a script does between
        this call and there belongs to the step. With several loaders that is the outermost loop's; see `ddpkit.loops`.
        The end of an epoch's loop is part of the epoch's end. A run without a loader is saved here, but in
        `epochs` at their ends only, unless something else in it can be iterated and has a state.

        Where the loader has a ``micro_batch_size``, a step takes several batches, and the optimizer steps, and this is
        called, after the last of them: ``if loader.current.is_last:``.

        Args:
            values: numbers or one-element tensors of this rank; their means over the ranks, weighted by samples, are
                recorded every ``log_every`` steps. At other steps they are not looked at.

        Raises:
            StopRequested: all ranks have agreed to stop; the state is saved. It ends a script with exit code 75.
            SaveFailed: saving has failed too often in a row.
            UserError: called in the middle of a step's batches, or the batch is of a loader that the run does not know.
        """
        if self._loops.is_mid_step:
            raise UserError(
                "run.step: called after a batch that is not the last of its optimizer step. With micro_batch_size a "
                "step takes several batches: call run.backward(loss) after each, and optimizer.step(), zero_grad() and "
                "run.step() only `if loader.current.is_last:`"
            )
        if self._rt.feeds_from_outside(self._loaders):
            raise UserError(
                "run.step: the batches come from a loader that is not part of the run, so a restart would not know "
                "where it stopped; give it to rt.resume(..., loader=loader)"
            )
        self.count(values)
        if self._loops.counted():
            self.boundary()

    def record(self, kind: str, values: Mapping[str, float], **clock: float) -> None:
        """Write a line of metrics for the present step.

        Args:
            kind: "eval" for what an evaluation gave: the best checkpoint and early stopping go by it, and rank zero's
                values count. Collective then. Otherwise "train".
            values: by name.
            clock: what depends on time, by name.
        """
        if kind != "eval":
            self._write(kind, values, clock)
            return
        self.evaluated({name: _number(value) for name, value in values.items()}, **clock)
        if self._save_is_due and not self._is_fit and self._loops.is_alone:
            self._save()  # the next step's boundary is too late for it

    def note(self, **values: Any) -> None:
        """Add to the values of the step under way (in ``on_step_end``: just done); as in `step`, means are recorded."""
        self._noted.update(values)

    def ask_to_stop(self, reason: str) -> None:
        """Ask all ranks to stop, as a signal does: they finish the same step, save and leave; the run can go on later.

        Any rank may ask, at any time.
        """
        self._rt.stop.request(reason)

    def end(self, reason: str) -> None:
        """Ask for the end of the run, for good, at the next end of an evaluation or epoch. Any rank may ask."""
        self._asks_to_end = self._asks_to_end or reason

    @property
    def ended_early(self) -> str | None:
        """Why the run ends before its time: early stopping, or somebody's `end`. None if it does not."""
        return selection.ended_early(vars(self.progress), self._early_stopping)

    @property
    def total_steps(self) -> int | None:
        """How many optimizer steps there are from the run's start to its end, if that is known."""
        max_steps, epochs = self._length
        if max_steps is not None or epochs is None or self._loader is None:
            return max_steps
        in_epoch = self._loader.steps_in_epoch
        return None if in_epoch is None else epochs * in_epoch

    # -- what `fit` adds its own work between ----------------------------------------------------------------------

    @property
    def records_next_step(self) -> bool:
        """Whether the values of the step under way will be recorded."""
        return (self.progress.step + 1) % self._log_every == 0

    def count(self, values: Mapping[str, Any], weight: float | None = None) -> None:
        """The first half of `step`: count it and record its values.

        ``weight`` is what this rank's values count for in their means; by default the samples of its last pass.
        """
        self._write_line()
        self.progress.step += 1
        self.progress.skipped = 0
        self._note_samples()
        self._tell_step()
        self._callbacks.tell("on_step_end", self)
        if self.progress.step % self._log_every == 0:
            self._record_step({**values, **self._noted}, weight)
        self._noted.clear()
        if self._every_steps is not None and self.progress.step % self._every_steps == 0:
            self._save_is_due = True

    def skip(self, fault: Fault, at_most: int = 20) -> None:
        """In place of `step`, for one that was not taken because of ``fault``. Collective.

        Its samples count, the step does not, and no schedule is to move on either.

        Args:
            fault: from `TrainStep`.
            at_most: steps in a row that may be skipped.

        Raises:
            NotFinite: that were too many; the state before this step is saved.
        """
        self.let_go(fault, at_most)
        if self._loops.counted():
            self.boundary()

    def let_go(self, fault: Fault, at_most: int) -> None:
        """The first half of `skip`: count it, or end the run."""
        if self.progress.skipped >= at_most:
            self._end_before_step(fault)
        self._write_line()
        self.progress.skipped += 1
        self._note_samples()
        self._rt.heartbeat.beat()
        self._recorder.event("skipped", step=self.progress.step, cause=fault.text)
        self._warn(f"step {self.progress.step + 1} was skipped: {fault.text}")

    def boundary(self, may_stop: bool = True) -> None:
        """The second half of `step`: save when due, stop when agreed. Collective."""
        if self._save_is_due:
            self._save()
        if may_stop and (reason := self._rt.stop.poll()) is not None:
            self.leave(reason)
        self._rt.heartbeat.phase = "loading"  # what comes next; `fetching` ends it
        self._clock.begin(is_recorded=self.records_next_step)
        self._step_began = self._clock.now

    def passed(self) -> None:
        """A forward and backward pass of the step under way is done."""
        self._clock.passed()

    def is_to_last(self, *, max_steps: int | None = None, epochs: int | None = None) -> None:
        """Say how long the run is, for those who ask for its `total_steps`."""
        self._length = (max_steps, epochs)

    def begin_epoch(self) -> None:
        """An epoch begins, or goes on."""
        self._callbacks.tell("on_epoch_start", self)

    def end_epoch(self, is_last: bool = False) -> None:
        """Close the epoch: the loaders go to the next one; save when due, stop when agreed. Collective.

        After the last epoch of the run a stop comes too late to matter: all that is left is `finish`.
        """
        self._write_line()
        self._callbacks.tell("on_epoch_end", self)
        self._agree_on_end(self._rt.ranks.exchange("end of an epoch", self._asks_to_end))
        for loader in self._loaders:
            if self._is_fit or not loader.is_open:
                loader.end_epoch()
        self.progress.epoch += 1
        if self._loops.end_epoch():
            self.boundary(may_stop=not is_last and self.ended_early is None)

    def evaluated(self, values: Mapping[str, float], **clock: float) -> None:
        """The present step has been evaluated: record it, and see what follows from it. Collective.

        Args:
            values: by name; rank zero's count.
            clock: what depends on time, by name.

        Raises:
            UserError: a value that selection goes by is missing.
        """
        self._write_line()
        self.progress.evaluated = self.progress.step
        # Whoever does not say how long it took has done nothing else since the clock was looked at last.
        self._ledger.away(EVALUATION, clock.get("eval_s", time.perf_counter() - self._clock.now))
        self._write("eval", values, clock)
        self._callbacks.tell("on_evaluation_end", self, values)
        if self._best is not None:
            self._saver.wait()  # it is compared with what is there
        told = self._rt.ranks.exchange("evaluation", [values, self._would_be_best(values), self._asks_to_end])
        values, is_best, _ = told[0]
        self.progress.values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._best is not None:
            selection.value_of(self._best.metric, values, "checkpoint.best.metric")
            self._save_is_due |= is_best
        if (rule := self._early_stopping) is not None:
            value = selection.value_of(rule.metric, values, "train.early_stopping.metric")
            self.progress.stopping = rule.waited(self.progress.stopping, value)
        self._agree_on_end([asks for _, _, asks in told])
        self._clock.begin(is_recorded=self.records_next_step)

    def leave(self, reason: str) -> NoReturn:
        """Save and leave, as all ranks have agreed. Collective; does not return.

        Raises:
            StopRequested: the state is saved.
            SaveFailed: it could not be.
        """
        self._save(must=True)
        self._callbacks.tell("on_end", self, reason)
        self._depart(reason, self.progress.step)

    def _depart(self, reason: str, step: int) -> NoReturn:
        latency_s = self._rt.stop.latency_s
        self._recorder.event("stopped", step=step, reason=reason, time={"latency_s": round(latency_s, 4)})
        if self._rt.is_main:
            log.info("stopped at step %d (%s), saved %.1f s after the request", step, reason, latency_s)
        self._rt.leave(reason)

    def _note_requeue(self, step: int, why: str) -> None:
        self._recorder.event(requeue.EVENT, step=step, reason=why)

    def _stop_before_the_first_step(self) -> None:
        if (reason := self._rt.stop.poll()) is not None:
            saved = complete(self._run_dir / "checkpoints")  # it may not have been restored yet
            self._depart(reason, step=saved[0][0] if saved else 0)  # all that there is to save is there already

    def finish(self) -> None:
        """Save the end of the run. A run that cannot save its end has failed. Collective."""
        self._save(must=True)
        self._tell_end()

    def _tell_end(self) -> None:
        self._is_ended, self._is_past_epochs = True, False
        early = self.ended_early
        self._recorder.event("finished", step=self.progress.step, **({} if early is None else {"reason": early}))
        if early is not None and self._rt.is_main:
            log.info("ends early at step %d: %s", self.progress.step, early)
        self._callbacks.tell("on_end", self, early)

    # -- what the run's loaders tell; `fit` knows by itself where its loop is ----------------------------------------

    def asked(self, loader: Loader) -> None:
        """The next batch has been asked for, and not been fetched yet."""
        if not self._is_fit and self._loops.asked(loader):
            self.boundary()

    def fetching(self, loader: Loader, is_done: bool) -> None:
        """What comes of a fetch: before an optimizer step has begun, a stop may take place here too."""
        if is_done:
            self._clock.fetched()
        # Once a pass of the step has been given out, its samples would be lost.
        if not (loader.current is self._counted if self._is_fit else self._loops.may_stop(loader)):
            return
        stop = self._rt.stop
        # Nothing that a rank does for others comes after a fetch without a poll: the wait for one may be left.
        if (reason := stop.poll() if is_done else stop.look()) is not None:
            self.leave(reason)
        if is_done:
            self._rt.heartbeat.phase = "training"

    def given(self, loader: Loader) -> None:
        """A batch is given out."""
        self._rt.heartbeat.beat()  # there may be many before the next poll
        if not self._is_fit:
            self._loops.given(loader)

    def ended(self, loader: Loader, is_left: bool) -> None:
        """An iteration has come to its end, or was left before it; `fit` still has work that belongs to its epoch."""
        if not self._is_fit:
            self._loops.ended(loader, is_left)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _write(
        self,
        kind: str,
        values: Mapping[str, float],
        clock: Mapping[str, float],
        of_run: Mapping[str, Any] | None = None,
    ) -> None:
        place = {"step": self.progress.step, "epoch": self.progress.epoch, "samples": self.progress.samples}
        length = {} if self.total_steps is None else {"total_steps": self.total_steps}
        self._recorder.metrics(kind, place, values, {**(of_run or {}), **length, "spent": self._ledger.totals}, **clock)
        self._callbacks.tell("on_record", self, kind, values, clock)

    def _would_be_best(self, values: Mapping[str, float]) -> bool:
        if self._best is None or not self._rt.is_main or self._best.metric not in values:
            return False
        try:
            return self._store.would_be_best(values[self._best.metric])
        except UserError:  # the directory cannot be read; the save will say why
            return True

    def _agree_on_end(self, asked: Sequence[str | None]) -> None:
        self._asks_to_end = None
        self.progress.ended = self.progress.ended or next((reason for reason in asked if reason), None)

    def _end_with_script(self) -> None:
        """Keep what a script has done since the newest save, when it comes to its end by itself. Collective."""
        self._write_line()
        if self._is_ended:
            return
        if not self._loops.is_in_epoch:
            self.finish()
        elif self._loops.is_between_steps:  # it has left its loop over epochs, and may go on with it in another start
            self._save(must=True)

    def _note_samples(self) -> None:
        self._is_ended = self._is_past_epochs = False
        if self._loader is not None:
            self.progress.samples = self._loader.consumed
            self._counted = self._loader.current

    def _end_before_step(self, fault: Fault) -> NoReturn:
        """Save the state from before the step under way, and fail, on all ranks alike."""
        step, skipped = self.progress.step, self.progress.skipped
        if self._loader is not None:
            self._loader.take_back()
        try:
            self._save(must=True)
            saved = f"the state before it, of step {step}, is saved"
        except SaveFailed as error:
            saved = f"the state before it could not be saved ({error})"
        before = f", after {skipped} that were skipped" if skipped else ""
        raise NotFinite(f"step {step + 1} cannot be taken{before}: {fault.text}. The update was not made; {saved}")

    def _tell_step(self) -> None:
        heartbeat = self._rt.heartbeat
        heartbeat.beat()
        heartbeat.step = self.progress.step
        heartbeat.phase = "training"
        self._clock.updated()
        if self._step_began is not None:  # not the first one, which also compiles and allocates
            heartbeat.stepped(self._clock.now - self._step_began)
            self._step_began = None

    def _record_step(self, values: dict[str, Any], weight: float | None) -> None:
        part = self._loops.part
        if weight is None:
            weight = 1.0 if part is None else float(part.size)
        late = self._every_minutes is not None and time.monotonic() - self._tried_at > self._every_minutes * 60
        own = {name: _number(value) for name, value in values.items()}
        phases = self._clock.means()
        measured = phases | self._gauges.read(self.progress.step)
        own |= {f"{_TIME}{name}": value for name, value in measured.items()}
        of_itself = self._times_of_its_own(phases, measured) if self._tells_of_ranks else {}
        self._means.begin(own, weight, late and self._rt.is_main, list(of_itself.values()))
        now, step, samples = time.monotonic(), self.progress.step, self.progress.samples
        elapsed, steps = now - self._logged[0], step - self._logged[1]
        rate = (samples - self._logged[2]) / elapsed
        self._logged = (now, step, samples)
        self._line = _Line(time.time(), elapsed / max(steps, 1), steps, rate, tuple(phases), tuple(of_itself))
        if self._rt.world_size == 1:
            self._write_line()

    def _write_line(self) -> None:
        """Write the line of the step that was recorded last, before anything that comes after it. Collective."""
        if self._line is None:
            return
        line, self._line = self._line, None
        means, save_now, told = self._means.end()
        self._save_is_due |= save_now
        clock = {name.removeprefix(_TIME): means.pop(name) for name in list(means) if name.startswith(_TIME)}
        phases = {name: clock[name] for name in line.phases if name in clock}
        self._ledger.stepped(self.progress.step, line.step_s, line.steps, phases)
        by_rank = dict(zip(line.of_itself, zip(*told, strict=True), strict=True))
        rounded = {name: [round(seconds, 6) for seconds in times] for name, times in by_rank.items()}
        of_run: dict[str, Any] = {"unix": round(line.unix, 3)} | ({"by_rank": rounded} if rounded else {})
        self._write("train", means, {"step_s": line.step_s, "samples_per_s": line.samples_per_s} | clock, of_run)

    @property
    def _tells_of_ranks(self) -> bool:
        """Whether the line under way has each rank's own times. The same on all ranks."""
        world_size = self._rt.world_size
        lines, every = self.progress.step // self._log_every, math.ceil(world_size / _TELL_AT_ONCE)
        return world_size > 1 and lines % every == 0

    def _times_of_its_own(self, phases: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
        """What this rank alone has measured, in seconds a step. The same names on all ranks."""
        names = ("data_s", "communication_s")
        return {"step_s": sum(phases.values())} | {name: measured.get(name, 0.0) for name in names}

    def _save(self, must: bool = False) -> None:
        self._write_line()
        self._save_is_due = False
        self._tried_at = began = time.monotonic()
        try:
            with self._rt.heartbeat.during("saving"):
                self._saver.save(asdict(self.progress), self._snapshot_to_save, must=must)
        except BaseException:
            self._is_ended = True  # whoever goes on after that: the script's end cannot be saved either
            raise
        self._ledger.away(SAVING, time.monotonic() - began)

    def _snapshot_to_save(self) -> Snapshot:
        self._callbacks.tell("on_save", self)
        return self._snapshot()

    def _snapshot(self) -> Snapshot:
        replicated: dict[str, Any] = {}
        main: dict[str, Any] = {}
        for name, item in self._objects.items():
            if isinstance(item, nn.Module):
                # Buffers may differ between ranks (BatchNorm's, unsynchronised); rank zero's are the ones DDP uses.
                module = unwrap(item)
                parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
                state = item.whole_state() if isinstance(item, Zero) else module.state_dict()
                shared = {key for key, value in state.items() if key in parameters or is_spread(value)}
                replicated[name] = {key: value for key, value in state.items() if key in shared}
                main[name] = {key: value for key, value in state.items() if key not in shared}
                main[f"{name}_keys"] = list(state)  # the order of the whole, for export
            elif isinstance(item, Optimizer):
                replicated[name] = item.state_dict()
            else:
                state = item.state_dict()
                (replicated if holds_spread(state) else main)[name] = state
        if states := self._callbacks.state_dict():
            main[_CALLBACKS] = states
        return Snapshot(asdict(self.progress), replicated, main, own={"rng": rng_state(self._rt.device)})

    def _check_state(self) -> None:
        """Say now what cannot be saved, not after the first hour."""
        snapshot = self._snapshot()
        pack({**snapshot.main, **snapshot.replicated})
        self._rt.check_same_parameters(
            {name: item for name, item in self._objects.items() if isinstance(item, nn.Module)}
        )

    def _restore(self) -> None:
        parameters = {
            name: dict(unwrap(item).named_parameters(remove_duplicate=False))
            for name, item in self._objects.items()
            if isinstance(item, nn.Module) and not isinstance(item, Zero)
        }
        loaded = self._store.load_newest(into=parameters)
        if loaded is not None:
            self._take_up(loaded)
        else:
            for loader in self._loaders:
                loader.rewind()
        progress = self.progress
        progress.best = None if self._best is None else asdict(self._best)
        left = self._recorder.open_metrics(progress.step, evaluated=progress.evaluated == progress.step)
        self._ledger.take_up(left, progress.step)
        self._logged = (time.monotonic(), progress.step, progress.samples)
        self._recorder.event(
            "started" if loaded is None else "restored", step=progress.step, world_size=self._rt.world_size
        )
        if loaded is not None and self._rt.is_main:
            log.info("goes on at step %d (epoch %d), from %s", progress.step, progress.epoch, self._run_dir)

    def _take_up(self, loaded: Loaded) -> None:
        self._check_same_objects(loaded)
        for name, item in self._objects.items():
            if isinstance(item, nn.Module):
                load_state(name, item, {**loaded.replicated[name], **loaded.main[name]})
            elif isinstance(item, Optimizer):
                _check_same_groups(name, item, loaded.replicated[name])
                saved = loaded.replicated[name]
                item.load_state_dict(saved if isinstance(item, ZeroOptimizer) else fitted_optimizer(saved, item))
            else:
                saved = loaded.replicated[name] if name in loaded.replicated else loaded.main[name]
                item.load_state_dict(fitted(saved, item.state_dict()))
        afresh = self._callbacks.load_state_dict(loaded.main.get(_CALLBACKS, {}))
        if afresh:
            self._warn(f"the checkpoint of step {loaded.step} has no state of the callbacks {', '.join(afresh)}")
        self.progress = Progress(**loaded.progress)
        self._saver.restored(loaded.progress)
        self._rt.heartbeat.step = self.progress.step
        if loaded.own is not None:
            set_rng_state(loaded.own["rng"], self._rt.device)
        else:  # there were fewer ranks: this one's stream begins here, the same in every such restart
            seed_generators(derive(self._rt.seed, "rank", self._rt.rank, "joined", self.progress.step))

    def _check_same_objects(self, loaded: Loaded) -> None:
        saved = {*loaded.replicated, *loaded.main}
        saved -= {_CALLBACKS, *(f"{name}_keys" for name in saved)}
        if saved != set(self._objects):
            raise UserError(
                f"{self._run_dir}: the checkpoint of step {loaded.step} holds {sorted(saved)}, but the run has "
                f"{sorted(self._objects)}; give the same objects under the same names, or another run_dir"
            )

    def _take_directory(self) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: {self._run_dir} cannot be made: {error.strerror}") from error
        allocation = self._rt.world.allocation
        # A requeued job, on whatever node, takes over at once from its own start before.
        job_id, restarts = (None, self._rt.world.restart_count) if allocation is None else allocation[:2]
        claimant = Claimant.here(self._attempt.launcher_pid, job_id, restarts)
        self._claim = self._stack.enter_context(acquire(self._run_dir, claimant, self._wait_for_claim_s))

    def _store_config(self) -> None:
        if self._attempt.config is None:
            return
        temporary = self._run_dir / ".config.yaml.tmp"  # the claim is held: nobody else writes here
        try:
            temporary.write_text(self._attempt.config)
            temporary.replace(self._run_dir / "config.yaml")
        except OSError as error:
            raise UserError(f"{self._run_dir / 'config.yaml'}: cannot be written: {error.strerror}") from error

    def _fence(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _warn(self, message: str) -> None:
        if self._rt.is_main:
            log.warning("%s", message)


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)  # a loss as it comes: it has a graph


def _keeps_place(objects: Mapping[str, Any]) -> bool:
    """Whether one of them, a data loader of somebody else's that has a state, knows how far an epoch is."""
    return any(isinstance(item, Iterable) and not isinstance(item, (nn.Module, Loader)) for item in objects.values())


def _check_objects(objects: Mapping[str, Any]) -> None:
    optimizers = [item for item in objects.values() if isinstance(item, Optimizer)]
    if any(isinstance(item, Zero) for item in objects.values()) and not all(
        isinstance(item, ZeroOptimizer) for item in optimizers
    ):
        raise UserError("DeepSpeed: the model needs its optimizer: optimizer = rt.wrap_optimizer(optimizer, model)")
    for name, item in objects.items():
        if not isinstance(item, Stateful):
            raise UserError(
                f"resume: {name}={type(item).__name__} cannot be part of a checkpoint: it needs state_dict() and "
                "load_state_dict(state)"
            )


def load_state(name: str, module: nn.Module, saved: dict[str, Any]) -> None:
    """Load a model, as it is spread over the ranks here, from a checkpoint. Raises UserError if it does not fit."""
    if isinstance(module, Zero):
        _check_same_tensors(name, module.shapes(), saved)
        module.load_whole_state(saved)
        return
    module = unwrap(module)
    own = module.state_dict()
    _check_same_tensors(name, own, saved)
    module.load_state_dict(fitted(saved, own))


def _check_same_tensors(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise UserError, with the keys and shapes that differ, unless ``saved`` fits a model whose state is ``own``."""
    lines = [f"  {key}: in the model, not in the checkpoint" for key in own if key not in saved]
    lines += [f"  {key}: in the checkpoint, not in the model" for key in saved if key not in own]
    lines += [
        f"  {key}: {tuple(saved[key].shape)} in the checkpoint, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in saved
        and isinstance(value, torch.Tensor)
        and isinstance(saved[key], (torch.Tensor, Sharded))
        and value.shape != saved[key].shape
    ]
    if lines:
        more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise UserError(
            "\n".join([f"{name}: the checkpoint is of another model:", *lines[:20], *more])
            + "\nGive the model it was made with, or another run_dir."
        )


def _check_same_groups(name: str, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if own_sizes != saved_sizes:
        raise UserError(
            f"{name}: the checkpoint's optimizer has parameter groups of {saved_sizes} parameters, this one's are "
            f"{own_sizes}; give the same groups, or another run_dir"
        )
