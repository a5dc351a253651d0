"""A trace of chosen steps on chosen ranks, by torch.profiler; for chrome://tracing, Perfetto and the like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from ddpkit.callbacks import Callback
from ddpkit.errors import UserError

if TYPE_CHECKING:
    from ddpkit.run import Run

log = logging.getLogger("ddpkit")


class Profile(Callback):
    """Writes ``run_dir/profile/steps-10-20-rank-0.json``. For one run.

    A run that goes on, or leaves, among these steps traces those that it does.

    Args:
        steps: the first and the last one.
        ranks: those that are traced.
        shapes: record the shapes of operators' inputs.
        memory: record what is allocated and freed.
        stacks: record where in the code each operator was called from.
    """

    def __init__(
        self,
        steps: Sequence[int],
        ranks: Sequence[int] = (0,),
        *,
        shapes: bool = False,
        memory: bool = False,
        stacks: bool = False,
    ) -> None:
        if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
            raise UserError(f"profile: steps={list(steps)}; give the first and the last one, such as [10, 20]")
        self._first, self._last = steps
        self._ranks = ranks
        self._options: dict[str, Any] = {"record_shapes": shapes, "profile_memory": memory, "with_stack": stacks}
        self._profiler: profile | None = None
        self._began = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:  # the run has failed
            self._profiler.stop()
            self._profiler = None

    def on_start(self, run: Run) -> None:
        """The first step may be one of them."""
        self._begin_if_due(run)

    def on_step_end(self, run: Run) -> None:
        """Begin before the first one, end after the last one."""
        if self._profiler is None:
            self._begin_if_due(run)
        elif run.progress.step == self._last:
            self._write(run)

    def on_end(self, run: Run, reason: str | None) -> None:
        """Write what there is."""
        if self._profiler is not None:
            self._write(run)

    def _begin_if_due(self, run: Run) -> None:
        upcoming = run.progress.step + 1
        if not (self._first <= upcoming <= self._last and run.rt.rank in self._ranks):
            return
        activities = [ProfilerActivity.CPU]
        if run.rt.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._began = upcoming
        self._profiler = profile(activities=activities, **self._options)
        self._profiler.start()

    def _write(self, run: Run) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None  # it has begun
        if run.rt.device.type == "cuda":
            torch.cuda.synchronize(run.rt.device)  # what the last step has asked for belongs to it
        profiler.stop()
        path = run.run_dir / "profile" / f"steps-{self._began}-{run.progress.step}-rank-{run.rt.rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a full disk costs the trace, not the run
            log.warning("%s: the trace could not be written: %s", path, error)
        else:
            log.info("the trace of steps %d to %d is in %s", self._began, run.progress.step, path)
