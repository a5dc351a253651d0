"""Where a run stands, read off what it has left: checkpoints, metrics, events and attempts."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpkit import config as configs
from ddpkit import selection
from ddpkit.checkpoint import claim, listing
from ddpkit.checkpoint.manifest import Manifest
from ddpkit.config import Config
from ddpkit.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, BrokenCheckpoint, UserError
from ddpkit.selection import EarlyStopping

_TAIL = 1 << 16  # bytes of metrics.jsonl that hold the newest lines


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
        samples: consumed over all ranks.
        samples_per_s: as recorded last.
        max_steps: where the run ends, if it is known.
        eta_s: seconds to the end at the present speed, if the end is known.
        metrics: the newest values by kind.
        checkpoints: "intact" or what is wrong, by step.
        best: of a run that keeps its best checkpoint: "step", "metric" and "value" of the best intact one.
        ended_early: why a finished run has ended before its time.
        attempts: what the launcher wrote about each.
        goodput: time in attempts over time since the first start.
    """

    run_dir: str
    state: str
    step: int
    saved_step: int | None
    epoch: int
    samples: int
    samples_per_s: float | None
    max_steps: int | None
    eta_s: float | None
    metrics: dict[str, dict[str, Any]]
    checkpoints: dict[int, str]
    best: dict[str, Any] | None
    ended_early: str | None
    attempts: list[dict[str, Any]]
    goodput: float | None


def read_status(run_dir: Path) -> Status:
    """Read a run directory; changes nothing.

    Raises:
        UserError: there is no run in it.
    """
    attempts = _attempts(run_dir)
    config = configs.load(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else None
    is_submitted = (run_dir / "slurm").is_dir()
    newest_event = _newest_event(
        run_dir / "events.jsonl"
    )  # of a script with a loop of its own they are all that there is
    if config is None and not attempts and not is_submitted and newest_event is None:
        raise UserError(f"{run_dir}: there is no run in it; `ddpkit run` and rt.resume make run directories")
    metrics = _newest_metrics(run_dir / "metrics.jsonl")
    checkpoints = {each.step: each.problem or "intact" for each in listing.listing(run_dir)}
    try:
        newest = listing.intact_newest(run_dir)
    except BrokenCheckpoint:
        newest = None
    progress: dict[str, Any] = dict(newest.progress) if newest is not None else {}
    last = max(metrics.values(), key=lambda line: int(line["step"]), default=progress)
    running = claim.holder(run_dir, claim.Claimant.here()) is not None
    step = max(int(last.get("step", 0)), int(progress.get("step", 0)))
    rate = metrics.get("train", {}).get("time", {})
    max_steps = config.train.max_steps if config is not None else None
    finished = newest is not None and (
        is_finished(config, newest) if config is not None else newest_event == "finished"
    )
    eta = (max_steps - step) * rate["step_s"] if max_steps is not None and "step_s" in rate else None
    return Status(
        run_dir=str(run_dir),
        state="running" if running else "finished" if finished else _state(attempts, is_submitted, newest_event),
        step=step,
        saved_step=newest.step if newest is not None else None,
        epoch=int(last.get("epoch", 0)),
        samples=int(last.get("samples", 0)),
        samples_per_s=rate.get("samples_per_s"),
        max_steps=max_steps,
        eta_s=eta,
        metrics=metrics,
        checkpoints=checkpoints,
        best=_best(run_dir),
        ended_early=ended_early(config, newest) if finished and config is not None and newest is not None else None,
        attempts=attempts,
        goodput=_goodput(attempts),
    )


def to_json(status: Status) -> str:
    """The status for programs."""
    return json.dumps(asdict(status), indent=1)


def describe(status: Status) -> str:
    """The status for people."""
    end = f" of {status.max_steps}" if status.max_steps is not None else ""
    lines = [
        f"{status.run_dir}: {status.state}, step {status.step}{end}, epoch {status.epoch}, {status.samples} samples"
    ]
    if status.samples_per_s is not None:
        lines.append(f"speed: {status.samples_per_s:.0f} samples/s")
    if status.eta_s is not None and status.state == "running":
        lines.append(f"to the end: {status.eta_s:.0f} s")
    for kind, line in status.metrics.items():
        skipped = ("kind", "step", "epoch", "samples", "time")
        values = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name not in skipped)
        lines.append(f"{kind} at step {line['step']}: {values}")
    if status.ended_early is not None:
        lines.append(f"ended early: {status.ended_early}")
    lines += [f"checkpoint {step}: {condition}" for step, condition in status.checkpoints.items()]
    if status.best is not None:
        lines.append("best checkpoint: {step} ({metric} {value:.6g})".format(**status.best))
    for attempt in status.attempts:
        how = attempt.get("how", "no end was noted")
        again = f"; queued again ({attempt['requeued']})" if "requeued" in attempt else ""
        where = " job ".join(str(attempt[key]) for key in ("launcher", "job") if key in attempt)
        lines.append(f"attempt {attempt.get('attempt')}: {attempt.get('ranks')} ranks, {where}: {how}{again}")
    if status.goodput is not None:
        lines.append(f"goodput: {status.goodput:.0%} of the time since the first start")
    return "\n".join(lines)


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


def _best(run_dir: Path) -> dict[str, Any] | None:
    try:
        found = listing.intact_best(run_dir)
    except BrokenCheckpoint:
        return None
    best, manifest = found or (None, None)
    if best is None or manifest is None:
        return None
    return {"step": manifest.step, "metric": best.metric, "value": manifest.progress["values"][best.metric]}


def _state(attempts: list[dict[str, Any]], is_submitted: bool, newest_event: str | None) -> str:
    """How the last attempt ended, of a run that nobody holds and that has not reached its end."""
    if not attempts:
        ends = {"stopped": "stopped", "failed": "failed", "requeued": "queued again"}
        return "submitted" if is_submitted else ends.get(newest_event or "", "interrupted")
    last = attempts[-1]
    if "exit_code" not in last:
        here = last.get("host") == socket.gethostname()
        return "starting" if here and Path(f"/proc/{last.get('pid')}").exists() else "interrupted"
    if "requeued" in last:
        return "queued again"
    return "stopped" if last["exit_code"] in (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED) else "failed"


def _newest_metrics(path: Path) -> dict[str, dict[str, Any]]:
    return {entry["kind"]: entry for entry in _newest_lines(path) if "kind" in entry}


def _newest_event(path: Path) -> str | None:
    names = [str(entry["event"]) for entry in _newest_lines(path) if "event" in entry]
    return names[-1] if names else None


def _newest_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue  # half a line
    return found


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for path in (run_dir / "attempts").glob("attempt-*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue  # taken, but not written yet
    return sorted(found, key=lambda attempt: int(attempt["attempt"]))


def _goodput(attempts: list[dict[str, Any]]) -> float | None:
    spans = [(attempt["started"], attempt["ended"]) for attempt in attempts if "ended" in attempt]
    if not spans:
        return None
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return min(1.0, sum(end - start for start, end in spans) / whole) if whole > 0 else None
