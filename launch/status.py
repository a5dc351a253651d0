"""Where a run stands, read off what it has left: checkpoints, metrics, events and attempts."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpkit import config as configs
from ddpkit import selection
from ddpkit.checkpoint import claim, listing, manifest
from ddpkit.checkpoint.listing import Listed
from ddpkit.checkpoint.manifest import Manifest
from ddpkit.config import Config
from ddpkit.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError, UserError
from ddpkit.selection import Best, EarlyStopping

from . import accounting, history
from .accounting import Account
from .history import Line

_MANY = ("saved", "save_delayed", "skipped")  # events that say nothing of where a run stands
_WAITING = ("submitted", "queued again")
_AT_WORK = ("running", "starting")


@dataclass(frozen=True)
class Status:
    """A run as its directory shows it.

    Attributes:
        run_dir: of the run.
        state: "running", "starting", "finished", "stopped", "failed", "interrupted" (killed, or its launcher was),
            "queued again" (by Slurm, which has not started it yet) or "submitted".
        step: optimizer steps recorded.
        saved_step: of the newest intact checkpoint; None without one.
        epoch: the epoch under way.
        epochs: how many there are to be, if the run is so long.
        samples: consumed over all ranks.
        samples_per_s: as recorded last.
        max_steps: where the run ends, as its config says.
        total_steps: where it ends, by that or by its epochs, if it is known.
        eta_s: seconds to the end at the present speed, with evaluations and saves, if the end is known.
        recorded_at: when the newest line of metrics was written, in Unix time.
        at: the time of this status.
        metrics: the newest values by kind.
        checkpoints: "intact" or what is wrong, by step.
        set_aside: steps of checkpoints that were found broken earlier.
        best: of a run that keeps its best checkpoint: "step", "metric" and "value" of the best intact one.
        ended_early: why a finished run has ended before its time.
        attempts: what is known of each; see `history.attempts`.
        job: the number of the Slurm job that it waits for.
        goodput: time in steps that survive over all time since the first start; None if that was not recorded.
        account: that time, by what it went to.
        phases: seconds of training by phase, as far as they were recorded.
        slowest_phase: the one of them that took most.
        failure: the newest failure report, if the run has not got over it.
        notes: what could not be read.
    """

    run_dir: str
    state: str
    step: int
    saved_step: int | None
    epoch: int
    epochs: int | None
    samples: int
    samples_per_s: float | None
    max_steps: int | None
    total_steps: int | None
    eta_s: float | None
    recorded_at: float | None
    at: float
    metrics: dict[str, Line]
    checkpoints: dict[int, str]
    set_aside: list[int]
    best: dict[str, Any] | None
    ended_early: str | None
    attempts: list[Line]
    job: str | None
    goodput: float | None
    account: Account | None
    phases: dict[str, float]
    slowest_phase: str | None
    failure: dict[str, Any] | None
    notes: list[str]


def read_status(run_dir: Path) -> Status:
    """Read a run directory; changes nothing.

    Raises:
        UserError: there is no run in it.
    """
    files, told = history.attempt_files(run_dir), history.events(run_dir, but=_MANY)
    config, notes = _config(run_dir)
    if config is None and not (notes or files or told or (run_dir / "slurm").is_dir()):
        raise UserError(f"{run_dir}: there is no run in it; `ddpkit run` and rt.resume make run directories")
    at = history.now()
    checkpoints = listing.listing(run_dir)  # each is read to its last byte, once
    newest = next((manifest.read(each.path) for each in checkpoints if each.problem is None), None)
    finished = newest is not None and (
        is_finished(config, newest) if config is not None else bool(told) and told[-1]["event"] == "finished"
    )
    state, job = _state(run_dir, files, told, finished)
    is_at_work = state in _AT_WORK
    attempts = history.attempts(files, told)
    saved_step = newest.step if newest is not None else None
    lines = history.newest_lines(run_dir / "metrics.jsonl", None if is_at_work else saved_step)
    metrics = dict(sorted({line["kind"]: line for line in lines}.items(), reverse=True))  # what was trained first
    progress: dict[str, Any] = dict(newest.progress) if newest is not None else {}
    last = max(metrics.values(), key=lambda line: int(line["step"]), default=progress)
    recorded_at = lines[-1]["time"].get("unix") if lines else None
    step = max(int(last.get("step", 0)), int(progress.get("step", 0)))
    total_steps = _total_steps(config, lines)
    totals = accounting.spent(lines, None if is_at_work else saved_step or 0)
    end = at if is_at_work or state in _WAITING else max([recorded_at or 0.0, *(a.get("seen", 0.0) for a in attempts)])
    account = accounting.account(attempts, totals, end, state in _WAITING) if totals is not None else None
    phases = accounting.phases(totals or {})
    return Status(
        run_dir=str(run_dir),
        state=state,
        step=step,
        saved_step=saved_step,
        epoch=int(last.get("epoch", 0)),
        epochs=config.train.epochs if config is not None else None,
        samples=int(last.get("samples", 0)),
        samples_per_s=metrics.get("train", {}).get("time", {}).get("samples_per_s"),
        max_steps=config.train.max_steps if config is not None else None,
        total_steps=total_steps,
        eta_s=_eta_s(total_steps, step, lines, attempts, at - recorded_at if is_at_work and recorded_at else 0.0),
        recorded_at=recorded_at,
        at=at,
        metrics=metrics,
        checkpoints={each.step: each.problem or "intact" for each in checkpoints},
        set_aside=[step for step, _ in listing.set_aside(listing.checkpoints_directory(run_dir))],
        best=_best(run_dir, newest, checkpoints),
        ended_early=ended_early(config, newest) if finished and config is not None and newest is not None else None,
        attempts=attempts,
        job=job,
        goodput=account.goodput if account is not None else None,
        account=account,
        phases=phases,
        slowest_phase=max(phases, key=lambda name: phases[name]) if any(phases.values()) else None,
        failure=history.json_file(run_dir / "failure.json") if state in ("failed", "interrupted") else None,
        notes=notes,
    )


def to_json(status: Status) -> str:
    """The status for programs."""
    return json.dumps(asdict(status), indent=1)


def is_finished(config: Config, newest: Manifest) -> bool:
    """Whether nothing is left to do, by the newest intact checkpoint alone."""
    progress: Any = newest.progress
    train = config.train
    if ended_early(config, newest) is not None:
        trained = True
    elif train.max_steps is not None:
        trained = progress["step"] >= train.max_steps
    else:
        trained = train.epochs is not None and progress["epoch"] >= train.epochs
    return trained and (train.eval_step is None or progress["evaluated"] == progress["step"])


def ended_early(config: Config, newest: Manifest) -> str | None:
    """Why a run has ended before its time, by its newest intact checkpoint; None if it has not."""
    rule = config.train.early_stopping
    return selection.ended_early(newest.progress, EarlyStopping(**dict(rule)) if rule is not None else None)


def _config(run_dir: Path) -> tuple[Config | None, list[str]]:
    """The config, and what is wrong with it: a run can be looked at without."""
    try:
        return (configs.load(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else None), []
    except (ConfigError, OSError) as error:
        return None, [f"config.yaml cannot be read: {error}"]


def _best(run_dir: Path, newest: Manifest | None, checkpoints: Sequence[Listed]) -> dict[str, Any] | None:
    rule = newest.progress.get("best") if newest is not None else None
    if rule is None:
        return None
    best, intact = Best(**rule), {each.step for each in checkpoints if each.problem is None}
    for value, step, _ in listing.evaluated(listing.checkpoints_directory(run_dir), best):
        if step in intact:
            return {"step": step, "metric": best.metric, "value": value}
    return None


def _state(run_dir: Path, files: list[Line], told: list[Line], finished: bool) -> tuple[str, str | None]:
    """What the run is doing, and the number of the Slurm job that it waits for."""
    if claim.holder(run_dir, claim.Claimant.here()) is not None:
        return "running", None
    if finished:
        return "finished", None
    job = history.waiting_job(run_dir)
    last = files[-1] if files else {}
    if job is not None and job.since > max(last.get("started", 0.0), last.get("ended", 0.0)):
        return "submitted", job.number
    state = _ended(files, (run_dir / "slurm").is_dir(), told[-1]["event"] if told else None)
    return state, str(last["job"]) if state == "queued again" and "job" in last else None


def _ended(files: list[Line], is_submitted: bool, newest_event: str | None) -> str:
    """How the last attempt ended, of a run that nobody holds and that has not reached its end."""
    if not files:
        ends = {"stopped": "stopped", "failed": "failed", "requeued": "queued again"}
        return "submitted" if is_submitted else ends.get(newest_event or "", "interrupted")
    last = files[-1]
    if "exit_code" not in last:
        here = last.get("host") == socket.gethostname()
        return "starting" if here and Path(f"/proc/{last.get('pid')}").exists() else "interrupted"
    if "requeued" in last:
        return "queued again"
    return "stopped" if last["exit_code"] in (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED) else "failed"


def _total_steps(config: Config | None, lines: Sequence[Line]) -> int | None:
    """By the config, or by what the run itself knew last: how many steps its epochs have."""
    if config is not None and config.train.max_steps is not None:
        return config.train.max_steps
    return next((line["time"]["total_steps"] for line in reversed(lines) if "total_steps" in line["time"]), None)


def _eta_s(
    total_steps: int | None, step: int, lines: Sequence[Line], attempts: Sequence[Line], since_s: float
) -> float | None:
    pace = accounting.pace(lines, attempts[-1].get("began") if attempts else None)
    if total_steps is None or pace is None:
        return None
    return max(0.0, (total_steps - step) * pace - since_s)
