"""Does a Slurm job that has stopped in order come back, and who sees to that? Imports nothing of torch.

Slurm starts a preempted job again only if it is still there at the end of its grace time, and one that ran into its
time limit never. Ours save and leave as soon as they are told; so they ask for their return themselves, once, and not
where a person has ended the job.

Measured on Slurm 22.05: in a preemption's grace time a job is RUNNING with a PreemptTime. As long as a signal is on its
way to some node, it is SIGNALING instead. Where Slurm starts it again by itself (the end of the grace time, ``scontrol
requeue``, a lost node), Restarts has grown before anybody gets a signal. ``scancel`` makes it COMPLETING before anybody
gets a signal, and so does the time limit, with that reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ddpkit import slurm
from ddpkit.errors import NoProgress
from ddpkit.slurm import JobState, SlurmFailed
from ddpkit.world import Allocation

log = logging.getLogger("ddpkit")

EVENT = "requeued"
LOST_NODE = "a lost node"
LOST_STEP = "a lost step"
"""Stand for the signal where there was none: a launcher has found that one of its nodes is gone; the batch shell, that
all of the job's step is, without a word."""
Why = Literal["preempted", "time limit", "node lost", "step lost", "already", "cancelled", "asked"]
OURS: frozenset[Why] = frozenset({"preempted", "time limit", "node lost", "step lost"})
"""What is for us to requeue."""
COMES_BACK: frozenset[Why] = OURS | {"already"}
_GOES_ON = frozenset(("RUNNING", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"))


def why(state: JobState, allocation: Allocation, signal_name: str | None, warning_signal: str) -> Why:
    """Say why a job was told to stop. Only `OURS` are for us to requeue.

    Args:
        state: of the job, asked for after the stop was.
        allocation: this start of the job.
        signal_name: what the ranks were told to stop by ("SIGTERM"); None if nobody told them, but the allocation was
            about to end.
        warning_signal: the one that comes before the time limit, without SIG ("USR2").

    Returns:
        "preempted", "time limit", "node lost", "step lost"; "already" if Slurm starts the job again by itself;
        "cancelled" if somebody has ended it for good; "asked" if somebody has only signalled it, and the allocation
        goes on.
    """
    if state.restarts > allocation.restart_count:
        return "already"
    if state.is_preempted:  # first: clusters may announce this by the warning signal as well
        return "preempted"
    if state.state == "TIMEOUT" or state.reason == "TimeLimit":
        return "time limit"
    if state.state not in _GOES_ON:
        return "cancelled"
    if signal_name in (LOST_NODE, LOST_STEP):
        return "node lost" if signal_name == LOST_NODE else "step lost"
    return "time limit" if signal_name in (None, f"SIG{warning_signal}") else "asked"


def ask(
    allocation: Allocation,
    *,
    signal_name: str | None,
    warning_signal: str,
    run_dir: Path | None,
    step: int,
    max_idle: int,
    note: Callable[[int, str], None],
) -> Why | None:
    """Have Slurm start this job again, if it is for us to ask. The last thing that a job does: Slurm then ends it.

    Args:
        allocation: this start of the job.
        signal_name: as for `why`.
        warning_signal: as for `why`.
        run_dir: the run's directory, whose events.jsonl says how often it has come back before; None if it is not
            known yet.
        step: how far the run is, saved.
        max_idle: how often in a row a job comes back without having got any further.
        note: writes the event `EVENT` into events.jsonl, with ``step`` and ``reason``; called before Slurm is asked.

    Returns:
        Why the job was told to stop, whether or not that is a reason to requeue; None if Slurm does not say.

    Raises:
        NoProgress: the job would come back, but has done so too often without getting any further.
    """
    try:
        state = slurm.job_state(allocation.job_id)
        reason = why(state, allocation, signal_name, warning_signal)
        if reason in OURS and state.is_requeueable:
            idle = idle_requeues(run_dir, step) if run_dir is not None else 0
            # Before there is a run directory, nothing but the number of restarts could ever end this.
            if idle >= max_idle or (
                run_dir is None and reason == "time limit" and allocation.restart_count >= max_idle
            ):
                raise NoProgress(
                    f"job {allocation.job_id} does not come back ({reason}): it has done so {max_idle} times in a row "
                    f"(launch.max_idle_requeues) without getting beyond step {step}. Give it more time, or save more "
                    "often; then submit it again, and it goes on there."
                )
            note(step, reason)
            slurm.requeue(allocation.job_id)
            log.info("job %s comes back (%s): it goes on at step %d", allocation.job_id, reason, step)
        elif reason in OURS:
            log.warning(
                "job %s was stopped (%s) and does not come back: Slurm may not start it again (sbatch --requeue)",
                allocation.job_id,
                reason,
            )
    except SlurmFailed as error:
        log.warning("job %s may not come back: %s. Submit it again, and it goes on.", allocation.job_id, error)
        return None
    return reason


def idle_requeues(run_dir: Path, step: int) -> int:
    """How often in a row, until now, the job has come back at ``step`` (or even further on than that)."""
    try:
        lines = (run_dir / "events.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    count = 0
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # half a line, from a kill
        if isinstance(event, dict) and event.get("event") == EVENT:
            count = count + 1 if event.get("step", 0) >= step else 0
    return count
