"""Where a run's time has gone since it was first started, and when it will be done: from what `history` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .history import Line

PHASES = {
    "data_s": "waiting for data",
    "forward_backward_s": "forward and backward passes",
    "optimizer_s": "optimizer",
    "evaluation_s": "evaluation",
    "saving_s": "saves",
}
"""What training spends its time on, by its name in the totals that each line of metrics has."""


@dataclass(frozen=True)
class Account:
    """Where the time since the first start went, in seconds; the parts add up to the whole.

    Attributes:
        wall_s: from the first start until now, or until the run ended.
        steps_s: in steps that survive: one that was done again after a kill counts once.
        evaluation_s, saving_s: training was held by an evaluation or a save, of these steps too.
        starting_s: from each start of ranks until their state was there.
        between_s: nobody was at work: between attempts, waiting in a queue.
        other_s: all else: steps that were undone, ends, what was not recorded.
    """

    wall_s: float
    steps_s: float
    evaluation_s: float
    saving_s: float
    starting_s: float
    between_s: float
    other_s: float

    @property
    def goodput(self) -> float:
        """Time in steps that survive over all time since the first start."""
        return min(1.0, self.steps_s / self.wall_s) if self.wall_s > 0 else 0.0


def spent(lines: Sequence[Line], saved_step: int | None) -> dict[str, float] | None:
    """The totals that lines of metrics carry, of the steps that survive; None if these lines have none.

    Args:
        lines: the newest ones.
        saved_step: if nobody is at work, where the run would go on: later steps are lost. None while all count.
    """
    total: dict[str, float] | None = None
    before = 0
    for line in lines:
        found = line["time"].get("spent")
        if not isinstance(found, dict):
            continue  # of a version that kept no totals
        if saved_step is not None and line["step"] > saved_step:
            return _to_checkpoint(total or {}, saved_step - before, line["time"])
        total, before = dict(found), line["step"]
    return total


def _to_checkpoint(total: dict[str, float], steps: int, following: Line) -> dict[str, float]:
    """The steps between the newest line and the checkpoint survive too; the line after it tells what they took."""
    more = {"steps_s": following.get("step_s", 0.0)} | {name: following[name] for name in PHASES if name in following}
    return total | {name: total.get(name, 0.0) + steps * seconds for name, seconds in more.items()}


def account(attempts: Sequence[Line], totals: dict[str, float], end: float, waits: bool) -> Account | None:
    """Where the time went until ``end``; None if it is not known when the run was first started.

    Args:
        attempts: all that is known of each, as of `history.attempts`.
        totals: of `spent`.
        end: in Unix time.
        waits: whether since the last attempt the run has been waiting for the next one.
    """
    spans = [each for each in attempts if isinstance(each.get("started"), (int, float))]
    if not spans:
        return None
    started = [float(each["started"]) for each in spans]
    ended = [max(float(each.get("seen", start)), start) for each, start in zip(spans, started, strict=True)]
    if not waits:
        ended[-1] = max(end, ended[-1])
    starting = sum(
        max(0.0, min(each.get("began") or stop, stop) - start)
        for each, start, stop in zip(spans, started, ended, strict=True)
    )
    between = sum(max(0.0, start - stop) for start, stop in zip(started[1:], ended[:-1], strict=True))
    between += max(0.0, end - ended[-1])
    wall = max(end, ended[-1]) - started[0]
    steps, evaluation, saving = (totals.get(name, 0.0) for name in ("steps_s", "evaluation_s", "saving_s"))
    left = max(0.0, wall - steps - evaluation - saving - starting)
    between = min(between, left)  # where nobody has noted an end, it begins at the newest sign of life
    return Account(wall, steps, evaluation, saving, starting, between, left - between)


def phases(totals: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, of those that are known."""
    return {name: totals[name] for name in PHASES if name in totals}


def pace(lines: Sequence[Line], since: float | None, most: int = 100) -> float | None:
    """Seconds a step of late, with the evaluations and saves between; None if no line of training tells.

    Args:
        lines: the newest ones.
        since: when the present start began: the time between attempts is no part of a step.
        most: lines of training to look at.
    """
    trained = [line for line in lines if line["kind"] == "train" and {"step_s", "unix"} <= line["time"].keys()]
    recent = [line for line in trained if since is None or line["time"]["unix"] >= since][-most:]
    if len(recent) > 1 and (steps := int(recent[-1]["step"]) - int(recent[0]["step"])) > 0:
        seconds = float(recent[-1]["time"]["unix"]) - float(recent[0]["time"]["unix"])
        return max(0.0, seconds / steps)
    return float(trained[-1]["time"]["step_s"]) if trained else None
