"""What a run shows while it goes on: a line for each that is recorded, or on a terminal a bar. Imports no torch."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ddpkit.callbacks import Callback

if TYPE_CHECKING:
    from tqdm import tqdm

    from ddpkit.run import Run

log = logging.getLogger("ddpkit")

_SHOWN_OF_CLOCK = ("step_s", "samples_per_s", "eval_s")  # the rest is in metrics.jsonl


class Lines(Callback):
    """Logs what is recorded, on rank zero."""

    def on_record(self, run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """Log a line."""
        if run.rt.is_main and log.isEnabledFor(logging.INFO):
            _log(run, kind, values, clock)


class ProgressBar(Callback):
    """Shows steps, speed, time to the end and the values recorded last in one line of the terminal, on rank zero.

    Evaluations are logged above it. For one run.

    Args:
        columns: of the terminal; None finds out.
    """

    def __init__(self, columns: int | None = None) -> None:
        self._columns = columns
        self._stack = ExitStack()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar = None
        self._stack.close()

    def on_start(self, run: Run) -> None:
        """Show the bar."""
        if not run.rt.is_main:
            return
        from tqdm.contrib.logging import logging_redirect_tqdm

        kind = _own_kind_of_bar()
        self._bar = self._stack.enter_context(
            kind(
                total=run.total_steps,
                initial=run.progress.step,
                unit="step",
                ncols=self._columns,
                dynamic_ncols=self._columns is None,
                mininterval=0.5,
                file=sys.stderr,
            )
        )
        self._stack.enter_context(logging_redirect_tqdm([log], tqdm_class=kind))

    def on_epoch_start(self, run: Run) -> None:
        """Only now a loop of one's own has said how many epochs there are."""
        if self._bar is not None:
            self._bar.total = run.total_steps

    def on_step_end(self, run: Run) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update()

    def on_record(self, run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """Show the newest values."""
        if self._bar is None:
            return
        if kind == "train":
            self._bar.set_postfix_str(shown(values, {"samples_per_s": clock.get("samples_per_s", 0.0)}), refresh=False)
        else:
            _log(run, kind, values, clock)


def _log(run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
    log.info("%s  epoch %d  step %d  %s", kind, run.progress.epoch, run.progress.step, shown(values, clock))


def shown(values: Mapping[str, float], clock: Mapping[str, float]) -> str:
    """Names and values in a line."""
    items = (*values.items(), *((name, clock[name]) for name in _SHOWN_OF_CLOCK if name in clock))
    return "  ".join(f"{name} {value:.4g}" for name, value in items)


def _own_kind_of_bar() -> type[tqdm[Any]]:
    """Without the thread and the lock between processes that tqdm would otherwise make for all bars there may be."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # no types are published
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar
