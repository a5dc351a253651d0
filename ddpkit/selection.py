"""Which state of a run is the best one, and when training longer does not make it better. Imports no torch.

All that is known about it is in the progress that each checkpoint holds: the values of its evaluation, by which
checkpoints are compared, and how long early stopping has waited. So there is no mark that could be lost or go stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpkit.errors import UserError, nearest


@dataclass(frozen=True)
class Best:
    """The best checkpoint is kept beside the newest ones.

    Attributes:
        metric: name of a value of the evaluation.
        mode: "min" if less of it is better, "max" if more is.
    """

    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        _check_mode("best", self.mode)


@dataclass(frozen=True)
class EarlyStopping:
    """A run ends once evaluations in a row have not been better than the best one before them.

    Attributes:
        metric: name of a value of the evaluation.
        patience: how many evaluations.
        mode: "min" if less of it is better, "max" if more is.
        min_delta: by how much it has to be better.
    """

    metric: str
    patience: int
    mode: str = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _check_mode("early_stopping", self.mode)
        if self.patience < 1 or self.min_delta < 0:
            raise UserError(
                f"early_stopping: patience={self.patience}, min_delta={self.min_delta}; at least 1 and at least 0 "
                "are needed"
            )

    def waited(self, before: Mapping[str, Any] | None, value: float) -> dict[str, Any]:
        """What is remembered after an evaluation that gave ``value``.

        Args:
            before: the same of the evaluation before; None if there was none.
            value: of the metric.
        """
        best, waits = (before["best"], before["waits"]) if before and self._is_ours(before) else (None, 0)
        if is_better(value, best, self.mode, self.min_delta):
            best, waits = value, 0
        else:
            waits += 1
        return {"metric": self.metric, "mode": self.mode, "best": best, "waits": waits}

    def verdict(self, state: Mapping[str, Any] | None) -> str | None:
        """Why the run is to end, by what `waited` gave last; None if it is to go on."""
        if state is None or not self._is_ours(state) or state["waits"] < self.patience:
            return None
        than = "" if state["best"] is None else f" than {state['best']:.6g}"
        return f"{self.metric} was not better{than} in {state['waits']} evaluations"

    def _is_ours(self, state: Mapping[str, Any]) -> bool:
        return bool(state["metric"] == self.metric and state["mode"] == self.mode)


def is_better(value: float, than: float | None, mode: str, by: float = 0.0) -> bool:
    """Whether ``value`` is better; what is not finite never is, and is never kept to be compared with."""
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value < than - by if mode == "min" else value > than + by


def value_of(metric: str, values: Mapping[str, float], key: str) -> float:
    """The metric's value. Raises UserError if the evaluation does not give it; ``key`` asked for it."""
    if metric not in values:
        raise UserError(
            f"{key}: the evaluation gives no value {metric!r}{nearest(metric, list(values))}; it gives "
            f"{', '.join(values) or 'none'}"
        )
    return values[metric]


def ended_early(progress: Mapping[str, Any], early_stopping: EarlyStopping | None) -> str | None:
    """Why a run has ended before its time, by a checkpoint's progress; None if it has not."""
    ended: str | None = progress.get("ended")
    if ended is None and early_stopping is not None:
        ended = early_stopping.verdict(progress.get("stopping"))
    return ended


def _check_mode(what: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise UserError(f"{what}: mode={mode!r}; choose min or max")
