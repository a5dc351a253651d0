"""The training loop: steps, evaluations, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ddpkit.errors import UserError
from ddpkit.evaluate import EvalStep, EvaluationStopped, evaluate
from ddpkit.fetching import LoaderOptions
from ddpkit.loader import Loader
from ddpkit.run import Attempt, Run
from ddpkit.selection import Best, EarlyStopping
from ddpkit.step import StepFunction, TrainStep

if TYPE_CHECKING:
    from ddpkit.session import Runtime


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and when.

    Exactly one of ``every_epochs`` and ``every_steps`` is set. The end of the run is evaluated in any case.
    """

    dataset: Any
    step: EvalStep
    batch_size: int
    every_epochs: int | None = 1
    every_steps: int | None = None
    options: LoaderOptions = field(default_factory=LoaderOptions)
    metrics: Mapping[str, Any] | None = None
    """Torchmetrics-style objects by name; ``step`` then returns what they are updated with."""


@dataclass(frozen=True)
class Saving:
    """When to save, and what to keep; see the ``checkpoint`` section of a config."""

    every_steps: int | None = 1000
    every_minutes: float | None = None
    keep: int = 3
    max_failures: int = 3
    best: Best | None = None


def fit(
    rt: Runtime,
    run_dir: str | Path,
    *,
    model: nn.Module,
    loader: Loader,
    optimizer: Optimizer,
    step: StepFunction,
    scheduler: Any = None,
    scheduler_interval: str = "step",
    epochs: int | None = None,
    max_steps: int | None = None,
    evaluation: Evaluation | None = None,
    saving: Saving = Saving(),
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Any] = (),
    precision: str = "fp32",
    clip_grad_norm: float | None = None,
    log_every: int = 10,
    attempt: Attempt = Attempt(),  # noqa: B008 - frozen
) -> None:
    """Train, from wherever ``run_dir`` stands, to the end. Collective. What `ddpkit run` calls.

    Args:
        rt: the runtime.
        run_dir: everything that the run writes.
        model: as ``rt.wrap`` gave it.
        loader: from ``rt.loader``.
        optimizer: over the model's parameters.
        step: ``(model, batch) -> loss | {"loss": mean, "weight": n (optional), other scalars}``.
        scheduler: torch's or alike; stepped after each optimizer step, or with ``scheduler_interval="epoch"`` after
            each epoch.
        scheduler_interval: "step" or "epoch".
        epochs: passes over the data; exactly one of this and ``max_steps`` is given.
        max_steps: optimizer steps.
        evaluation: what to evaluate; None does not evaluate.
        saving: when to save.
        early_stopping: when evaluations that are not better end the run.
        callbacks: what is called at the moments of the run; see `ddpkit.callbacks.Callback`.
        precision: "fp32", "bf16" or "fp16".
        clip_grad_norm: the largest norm of the gradient.
        log_every: optimizer steps between recorded lines.
        attempt: which start of the run this is.

    Raises:
        StopRequested: all ranks agreed to stop; the state is saved.
        SaveFailed: the state could not be saved too often in a row, or at the end.
    """
    if (epochs is None) == (max_steps is None):
        raise UserError(f"fit: give epochs or max_steps, not both; got epochs={epochs}, max_steps={max_steps}")
    train_step = TrainStep(model, optimizer, step, rt.world, rt.device, precision, clip_grad_norm)
    objects = {"model": model, "optimizer": optimizer, "loader": loader}
    if scheduler is not None:
        objects["scheduler"] = scheduler
    if train_step.scaler.is_enabled():
        objects["scaler"] = train_step.scaler
    with Run(
        rt,
        Path(run_dir),
        objects,
        every_steps=saving.every_steps,
        every_minutes=saving.every_minutes,
        keep=saving.keep,
        max_failures=saving.max_failures,
        best=saving.best,
        early_stopping=early_stopping,
        callbacks=callbacks,
        log_every=log_every,
        attempt=attempt,
    ) as run:
        run.is_to_last(max_steps=max_steps, epochs=epochs)
        every_step, every_epoch = (scheduler, None) if scheduler_interval == "step" else (None, scheduler)
        _Loop(rt, run, model, loader, train_step, every_step, every_epoch, evaluation, epochs, max_steps).to_the_end()


@dataclass(frozen=True)
class _Loop:
    rt: Runtime
    run: Run
    model: nn.Module
    loader: Loader
    train_step: TrainStep
    step_scheduler: Any
    epoch_scheduler: Any
    evaluation: Evaluation | None
    epochs: int | None
    max_steps: int | None

    def to_the_end(self) -> None:
        """All epochs, then the end of the run."""
        if not self.loader.at_end and self._is_due_after_step():
            self._evaluate()  # the run was stopped in this evaluation
        # A run that was stopped in the evaluation of an epoch's end still has the rest of that end before it.
        while self.loader.at_end or not self._has_ended():
            if not (self.loader.at_end or self._train_epoch()):
                break  # max_steps, in the middle of the epoch
            self._close_epoch()
        if self.evaluation is not None and self.run.progress.evaluated != self.run.progress.step:
            self._evaluate()
        self.run.finish()

    def _train_epoch(self) -> bool:
        """Train until the epoch or the run ends; True if it is the epoch."""
        run, loader, train_step = self.run, self.loader, self.train_step
        run.begin_epoch()
        gave_batches = False
        for batch in loader:
            gave_batches = True
            part = loader.current
            assert part is not None  # the loader has just given out a pass
            train_step.accumulate(batch, part, keep_values=run.records_next_step)
            run.passed()
            if not part.is_last:
                continue
            values = train_step.update()
            if self.step_scheduler is not None:
                self.step_scheduler.step()
            run.count(values, train_step.recorded_weight)
            if loader.at_end:
                return True  # saved with the work of the epoch's end
            if self._has_ended():
                return False  # saved with the work of the run's end
            if self._is_due_after_step():
                self._evaluate()
                if self._has_ended():
                    return False  # it has ended the run
            run.boundary()
        if not gave_batches:
            raise UserError(f"data.train: the dataset gave no batch in epoch {run.progress.epoch}")
        return True

    def _close_epoch(self) -> None:
        every = self.evaluation.every_epochs if self.evaluation is not None else None
        if (every is not None and (self.run.progress.epoch + 1) % every == 0) or self._is_due_after_step():
            self._evaluate()
        if self.epoch_scheduler is not None:
            self.epoch_scheduler.step()
        self.run.end_epoch(is_last=self._has_ended(epochs_more=1))

    def _has_ended(self, epochs_more: int = 0) -> bool:
        progress = self.run.progress
        if self.run.ended_early is not None:
            return True
        if self.max_steps is not None:
            return progress.step >= self.max_steps
        return self.epochs is None or progress.epoch + epochs_more >= self.epochs

    def _is_due_after_step(self) -> bool:
        every = self.evaluation.every_steps if self.evaluation is not None else None
        progress = self.run.progress
        return every is not None and progress.step % every == 0 and progress.evaluated != progress.step > 0

    def _evaluate(self) -> None:
        evaluation = self.evaluation
        assert evaluation is not None  # it is due
        if self.run.progress.evaluated == self.run.progress.step:
            return
        started = time.monotonic()
        try:
            values = evaluate(
                self.rt,
                self.model,
                evaluation.dataset,
                evaluation.step,
                batch_size=evaluation.batch_size,
                options=evaluation.options,
                metrics=evaluation.metrics,
                stoppable=True,
            )
        except EvaluationStopped as stop:
            self.run.leave(stop.reason)
        else:
            self.run.evaluated(values, eval_s=time.monotonic() - started)
