"""What the batch shell of a job of ours does when srun has failed: see whether anybody has said why.

``child.py leave DIR STATUS``. A launcher that comes to its end leaves its word, and has asked for the job's return
where that was its business. There is none where the job was preempted before it began (Slurm then starts no step any
more), where a signal came before a launcher could hold it back, and where srun or the first launcher was killed.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from ddpkit import requeue, world
from ddpkit.errors import DdpkitError
from ddpkit.record import Recorder
from ddpkit.world import Allocation

from . import attempts
from .group import progress
from .plan import Plan
from .task import files

_KILLED = 128 + signal.SIGKILL


def main(directory: str, status: str) -> int:
    """Have Slurm start the job again if it would otherwise end for no reason of its own. Gives the job's exit code."""
    try:
        allocation = world.allocation(world.environment())
        if allocation is not None:
            _leave(Path(directory), allocation, int(status))
    except DdpkitError as error:
        _say(str(error))
    return int(status)


def _leave(directory: Path, allocation: Allocation, status: int) -> None:
    given, outcome = files(directory, allocation)
    if outcome.exists():
        return
    plan = Plan.from_json(json.loads(given.read_text()))
    run_dir = plan.run_dir or directory

    def note(step: int, reason: str) -> None:
        if run_dir.is_dir():
            recorder = Recorder(run_dir, True, max(attempts.newest(run_dir), 0))
            recorder.event(requeue.EVENT, step=step, reason=reason)
            recorder.close()
        _say(f"job {allocation.job_id} is queued again ({reason}), and goes on at step {step}")

    requeue.ask(
        allocation,
        signal_name=requeue.LOST_STEP if status == _KILLED else "SIGTERM",
        warning_signal=plan.warning_signal,
        run_dir=run_dir,
        step=progress(plan, run_dir),
        max_idle=plan.max_idle_requeues,
        note=note,
    )


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
