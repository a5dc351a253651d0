"""The training loop: steps, evaluations, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ddpkit import ema
from ddpkit.errors import UserError
from ddpkit.evaluate import EvalStep, EvaluationStopped, evaluate
from ddpkit.fetching import LoaderOptions
from ddpkit.loader import Loader
from ddpkit.precision import Precision
from ddpkit.run import Attempt, Run
from ddpkit.scheduling import Schedule
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
    of_average: bool = False
    """Whether the moving average of the weights is evaluated, instead of the weights."""


@dataclass(frozen=True)
class Saving:
    """When to save, and what to keep; see the ``checkpoint`` section of a config."""

    every_steps: int | None = 1000
    every_minutes: float | None = None
    keep: int = 3
    max_failures: int = 3
    asynchronous: bool = True
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
    scheduler_metric: str | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    evaluation: Evaluation | None = None,
    saving: Saving = Saving(),
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Any] = (),
    precision: str = "fp32",
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    log_grad_norm: bool = False,
    on_nonfinite: str = "stop",
    max_skipped: int = 20,
    average: AveragedModel | None = None,
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
            each epoch. It counts steps that were taken.
        scheduler_interval: "step" or "epoch".
        scheduler_metric: a value of the evaluation: the scheduler is then stepped with it after each evaluation.
        epochs: passes over the data; exactly one of this and ``max_steps`` is given.
        max_steps: optimizer steps.
        evaluation: what to evaluate; None does not evaluate.
        saving: when to save.
        early_stopping: when evaluations that are not better end the run.
        callbacks: what is called at the moments of the run; see `ddpkit.callbacks.Callback`.
        precision: "fp32", "bf16" or "fp16"; or that of a module that was converted by `Precision.convert`.
        clip_grad_norm: the largest norm of the gradient.
        clip_grad_value: the largest absolute value in it.
        log_grad_norm: record the norm also where it is not clipped.
        on_nonfinite: what to do with a step whose loss or gradient is not finite on some rank: "stop", "skip" it or
            "ignore" it; see ``train.on_nonfinite`` of a config.
        max_skipped: steps in a row that may be skipped.
        average: of the model's weights (`ddpkit.ema.averaged`), moved on after each step.
        log_every: optimizer steps between recorded lines.
        attempt: which start of the run this is.

    Raises:
        StopRequested: all ranks agreed to stop; the state is saved.
        SaveFailed: the state could not be saved too often in a row, or at the end.
        NotFinite: a step could not be taken, or too many in a row; the state before it is saved.
    """
    if (epochs is None) == (max_steps is None):
        raise UserError(f"fit: give epochs or max_steps, not both; got epochs={epochs}, max_steps={max_steps}")
    schedule = Schedule(scheduler, scheduler_interval, scheduler_metric)
    train_step = rt.train_step(
        model,
        optimizer,
        step,
        precision=precision,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        log_grad_norm=log_grad_norm,
        looks_for_nonfinite=on_nonfinite != "ignore",
    )
    objects = {"model": model, "optimizer": optimizer, "loader": loader}
    if average is not None:
        objects[ema.NAME] = average
    if scheduler is not None:
        objects["scheduler"] = scheduler
    if train_step.scaler.is_enabled():
        objects["scaler"] = train_step.scaler
    with Run(
        rt,
        Path(run_dir).expanduser(),
        objects,
        every_steps=saving.every_steps,
        every_minutes=saving.every_minutes,
        keep=saving.keep,
        max_failures=saving.max_failures,
        best=saving.best,
        asynchronous=saving.asynchronous,
        early_stopping=early_stopping,
        callbacks=callbacks,
        log_every=log_every,
        attempt=attempt,
        is_fit=True,
    ) as run:
        run.is_to_last(max_steps=max_steps, epochs=epochs)
        if evaluation is not None:
            in_precision = Precision.named(precision).applied_to(evaluation.step, rt.device)
            evaluation = replace(evaluation, step=in_precision)
        _Loop(
            rt,
            run,
            model,
            average,
            loader,
            train_step,
            schedule,
            evaluation,
            epochs,
            max_steps,
            skips_at_most=max_skipped,
            skips_faults=on_nonfinite == "skip",
        ).to_the_end()


@dataclass(frozen=True)
class _Loop:
    rt: Runtime
    run: Run
    model: nn.Module
    average: AveragedModel | None
    loader: Loader
    train_step: TrainStep
    schedule: Schedule
    evaluation: Evaluation | None
    epochs: int | None
    max_steps: int | None
    skips_at_most: int
    skips_faults: bool

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
            self._finish_step()
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

    def _finish_step(self) -> None:
        """Take the step, or skip it, on all ranks alike."""
        train_step = self.train_step
        values = train_step.update()
        if (fault := train_step.fault) is not None:
            self.run.let_go(fault, self.skips_at_most if fault.is_overflow or self.skips_faults else 0)
            return
        self.schedule.after_step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.run.count(values, train_step.recorded_weight)

    def _close_epoch(self) -> None:
        every = self.evaluation.every_epochs if self.evaluation is not None else None
        if (every is not None and (self.run.progress.epoch + 1) % every == 0) or self._is_due_after_step():
            self._evaluate()
        self.schedule.after_epoch()
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
                self._evaluated_model(),
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
            self.schedule.after_evaluation(values)

    def _evaluated_model(self) -> nn.Module:
        if self.average is not None and self.evaluation is not None and self.evaluation.of_average:
            return self.average.module
        return self.model
