"""A run's status for people: plain text, the same on a terminal and in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator

from . import history
from .accounting import PHASES, Account
from .history import Line, is_number
from .status import Status

_BAR = 30  # characters of the progress bar
_SHOWN = 10  # attempts; of the earlier ones only the number


def describe(status: Status) -> str:
    """The status in a few lines, without any control character, whatever a run has written."""
    lines = [
        *_where(status),
        *_values(status),
        *_time(status),
        *_attempts(status),
        *_checkpoints(status),
        *_end(status),
    ]
    return "\n".join(printable(line) for line in lines)


def printable(text: str) -> str:
    """On one line, and no escape sequence for a terminal in it."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min 20 s", "5 h 2 min", "2 d 3 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for large, small, size, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < size * (60 if large == "min" else 24) or large == "d":
            rest = whole % size // part
            return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
    raise AssertionError("days have no end")


def clock_time(unix: float) -> str:
    """Date and time here."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))


def _where(status: Status) -> Iterator[str]:
    total = status.total_steps
    end = f" of {total}" if total is not None else ""
    epochs = f" of {status.epochs}" if status.epochs is not None and status.max_steps is None else ""
    waits = f", waits for Slurm job {status.job}" if status.job is not None else ""
    yield (
        f"{status.run_dir}: {status.state}, step {status.step}{end}, epoch {status.epoch}{epochs}, "
        f"{status.samples} samples{waits}"
    )
    if status.ended_early is not None:
        yield f"ended early: {status.ended_early}"
    elif total:
        part = min(1.0, status.step / total)
        done = int(part * _BAR)
        left = ""
        if status.eta_s is not None and status.state == "running":
            left = f", {duration(status.eta_s)} to the end (about {clock_time(status.at + status.eta_s)})"
        yield f"[{'#' * done}{'-' * (_BAR - done)}] {int(part * 100)} %{left}"


def _values(status: Status) -> Iterator[str]:
    if status.samples_per_s is not None:
        heard = ""
        if status.state == "running" and status.recorded_at is not None:
            heard = f"; last recorded {duration(max(0.0, status.at - status.recorded_at))} ago"
        yield f"speed: {status.samples_per_s:.4g} samples/s{heard}"
    for kind, line in status.metrics.items():
        values = "  ".join(f"{name} {value:.4g}" for name, value in history.values(line).items())
        yield f"{kind} at step {line['step']}: {values}"


def _time(status: Status) -> Iterator[str]:
    if status.account is not None:
        yield f"goodput: {status.account.goodput:.0%}; of {duration(status.account.wall_s)} since the first start:"
        yield "  " + ", ".join(f"{words} {duration(seconds)}" for words, seconds in parts(status.account) if seconds)
    total = sum(status.phases.values())
    if status.slowest_phase is not None:
        told = sorted(status.phases.items(), key=lambda phase: -phase[1])
        shares = ", ".join(f"{PHASES[name]} {seconds / total:.0%}" for name, seconds in told)
        yield f"slowest phase: {PHASES[status.slowest_phase]} ({shares})"


def parts(account: Account) -> list[tuple[str, float]]:
    """What an account consists of, in words."""
    return [
        ("steps", account.steps_s),
        ("evaluation", account.evaluation_s),
        ("saves", account.saving_s),
        ("starting", account.starting_s),
        ("between attempts", account.between_s),
        ("redone steps and the rest", account.other_s),
    ]


def _attempts(status: Status) -> Iterator[str]:
    again = sum("requeued" in attempt for attempt in status.attempts)
    if len(status.attempts) > _SHOWN:
        requeues = f", {again} of them queued again by Slurm" if again else ""
        yield f"{len(status.attempts)} attempts{requeues}; the newest:"
    for attempt in status.attempts[-_SHOWN:]:
        yield (
            f"attempt {attempt.get('attempt')}: {attempt.get('ranks')} ranks{_by_whom(attempt)}: "
            f"{how(attempt, status)}{_span(attempt)}"
        )


def how(attempt: Line, status: Status) -> str:
    """How an attempt ended, or that it has not."""
    is_newest = attempt is status.attempts[-1]
    ended = attempt.get("how") or (status.state if is_newest and status.state in ("running", "starting") else None)
    again = f"; queued again ({attempt['requeued']})" if "requeued" in attempt else ""
    return f"{ended or 'no end was noted'}{again}"


def _by_whom(attempt: Line) -> str:
    named = " job ".join(str(attempt[key]) for key in ("launcher", "job") if key in attempt)
    return f", {named}" if named else ""


def _span(attempt: Line) -> str:
    """From which step to which, and how long, as far as it is known."""
    steps = ""
    if attempt.get("from_step") is not None:
        to = attempt.get("to_step")
        steps = f"from step {attempt['from_step']}" + (f" to {to}" if to is not None else "")
    took = ""
    if is_number(attempt.get("started")) and is_number(attempt.get("ended")):
        took = duration(max(0.0, attempt["ended"] - attempt["started"]))
    told = ", ".join(filter(None, (steps, took)))
    return f" ({told})" if told else ""


def _checkpoints(status: Status) -> Iterator[str]:
    for step, condition in status.checkpoints.items():
        yield f"checkpoint {step}: {condition}"
    for step in status.set_aside:
        yield f"checkpoint {step}: broken, set aside earlier"
    if status.best is not None:
        yield "best checkpoint: {step} ({metric} {value:.6g})".format(**status.best)


def _end(status: Status) -> Iterator[str]:
    if status.failure is not None:
        first = (str(status.failure.get("message") or "").splitlines() or [""])[0]
        kind = status.failure.get("kind")
        yield f"failed: rank {status.failure.get('rank')} on {status.failure.get('host')}: " + ": ".join(
            filter(None, (kind, first))
        )
    yield from status.notes
