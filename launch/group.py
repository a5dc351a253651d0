"""A group of ranks from the first attempt to the last, whoever starts them: numbers, reports, exit codes, returns."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ddpkit import requeue, slurm, world
from ddpkit.checkpoint import listing
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, DdpkitError, NoProgress
from ddpkit.record import Recorder
from ddpkit.world import Allocation

from .attempts import AttemptFile, begin, count_saved, follow, report_failure
from .job import STOP_SIGNALS
from .output import Output
from .plan import Plan
from .ranks import Outcome
from .requests import holding_back, passing_on_signals, signal_number
from .supervise import Node

_BEFORE_THE_LIMIT_S = 2.0  # a job that has come to its time limit is not started again, unless it asks in time
_NEAR_THE_END_S = 300.0  # ranks that stop unasked do so for the end of their allocation, if that is so near


@dataclass(frozen=True)
class Ended:
    """How a group of ranks ended, with all its attempts.

    Attributes:
        exit_code: of the command.
        outcome: of the last attempt; None if that could not be started.
        report: what was said about an end that is neither that of the work nor an agreed stop.
        comes_back: Slurm will start the whole job again.
    """

    exit_code: int
    outcome: Outcome | None = None
    report: str | None = None
    comes_back: bool = False


def run(plan: Plan, node: Node) -> Ended:
    """Have ``node``, not entered yet, start the ranks; again as often as the plan allows."""
    if plan.run_dir is not None:
        return _run(plan, plan.run_dir, node)
    # No records were asked for; only the report of a failure refers to the ranks' output.
    run_dir = Path(tempfile.mkdtemp(prefix="ddpkit-"))
    ended = Ended(EXIT_DONE)
    try:
        ended = _run(plan, run_dir, node)
    finally:
        if ended.exit_code != EXIT_FAILED:
            shutil.rmtree(run_dir, ignore_errors=True)
    return ended


def _run(plan: Plan, run_dir: Path, node: Node) -> Ended:
    allocation = world.allocation(world.environment())
    if allocation is None:
        return _attempts(plan, run_dir, node, None, STOP_SIGNALS)[0]
    # Slurm's warning goes to every process of a step; outside Slurm that signal belongs to others.
    signals = (*STOP_SIGNALS, signal_number(plan.warning_signal))
    with holding_back(signals):  # before there are ranks, and from their end until Slurm has been asked
        ended, attempt = _attempts(plan, run_dir, node, allocation, signals)
        # After the ranks' end: Slurm ends all that is left of the job as soon as it is asked.
        return _come_back(plan, allocation, attempt, ended) if attempt is not None else ended


def _attempts(
    plan: Plan, run_dir: Path, node: Node, allocation: Allocation | None, signals: tuple[signal.Signals, ...]
) -> tuple[Ended, AttemptFile | None]:
    """How it all ended, and the last attempt if there was one that began."""

    def take(ranks: int) -> AttemptFile:
        return begin(run_dir, plan.launcher, ranks, plan.command, allocation)

    attempt = None if node.is_numbered_late else take(plan.world_size)
    goes_on = "run it again to continue"
    if allocation is not None:
        goes_on = "it goes on when the job comes back, or is submitted again"
        # Slurm warns, and sends SIGTERM later, without being impatient.
        node.requests.insistent = frozenset({signal.SIGINT})
        node.patience.time_left = partial(_time_left, allocation, plan.warning_signal)
    node.is_run = plan.job.is_run
    with node, passing_on_signals(node.requests, signals):
        restart_count = 0
        while True:
            if attempt is None:
                numbered = _number(node, take, partial(follow, run_dir))
                if isinstance(numbered, Ended):
                    return numbered, None
                attempt = numbered
            ended = _attempt(plan, node, attempt, restart_count, goes_on)
            outcome = ended.outcome
            if outcome is None:
                return ended, attempt
            is_final = not outcome.failures or outcome.exit_code == EXIT_USER or outcome.stopped_by is not None
            if outcome.regroups:
                _say("nodes have come or gone: starting all ranks anew")
            elif is_final or restart_count == plan.max_restarts or outcome.has_lost_node:
                return ended, attempt
            else:
                restart_count += 1
                _say(f"restarting all ranks ({restart_count} of {plan.max_restarts})")
            attempt = None


def _number(
    node: Node, take: Callable[[int], AttemptFile], follow: Callable[[int], AttemptFile]
) -> AttemptFile | Ended:
    try:
        numbered = node.number(take, follow)
    except DdpkitError as error:
        _say(str(error))
        return Ended(error.exit_code, report=str(error))
    if isinstance(numbered, Outcome):
        _say(_how(numbered))
        return Ended(numbered.exit_code, numbered)
    return numbered


def _attempt(plan: Plan, node: Node, attempt: AttemptFile, restart_count: int, goes_on: str) -> Ended:
    options = plan.job.options | {"attempt": attempt.number}
    job = replace(plan.job, options=options)
    try:
        outcome = node.run(job, restart_count, Output(attempt.log_dir, plan.tee_all))
    except DdpkitError as error:
        attempt.end(str(error), error.exit_code)
        _say(str(error))
        return Ended(error.exit_code, report=str(error))
    how = _how(outcome)
    attempt.end(how, outcome.exit_code)
    report = None
    if plan.job.runtime and outcome.exit_code == EXIT_DONE and not outcome.has_begun:
        keys = " and ".join(f"launch.{key}" for key in plan.job.runtime)
        _say(f"{keys}: of no effect, as no rank has entered ddpkit.runtime()")
    if outcome.failures:
        first = outcome.failures[0]
        report = first.message if first.is_users_input else report_failure(outcome.failures, attempt)
        _say(report)
    elif outcome.is_saved and not outcome.regroups:
        _say(f"{how}, {_what_is_saved(plan, attempt.run_dir)}; {goes_on}")
    elif outcome.exit_code != EXIT_DONE and not outcome.regroups:
        report = how
        _say(report)
    return Ended(outcome.exit_code, outcome, report)


def _what_is_saved(plan: Plan, run_dir: Path) -> str:
    has_none = plan.job.kind == "run" and not listing.complete(listing.checkpoints_directory(run_dir))
    return "before there was anything to save" if has_none else "state saved"


def _how(outcome: Outcome) -> str:
    if outcome.regroups:
        return "nodes came or went"
    if outcome.failures:
        first = outcome.failures[0]
        return f"rank {first.rank} failed: {first.kind or ''} {first.message}".replace(":  ", ": ")
    if outcome.exit_code == EXIT_DONE:
        return "done"
    by = f" ({outcome.stopped_by})" if outcome.stopped_by else ""  # a script may stop by itself
    if outcome.is_saved:
        return f"stopped on request{by}"
    if outcome.exit_code == EXIT_STOPPED:
        after = f" after {outcome.stopped_by}" if outcome.stopped_by else ""
        return f"the script left by itself{after}, with exit code {EXIT_STOPPED}"
    return f"ended by {outcome.stopped_by}"


def _come_back(plan: Plan, allocation: Allocation, attempt: AttemptFile, ended: Ended) -> Ended:
    """Have Slurm start the job again, if it has ended this one before its work was done."""
    outcome = ended.outcome
    if outcome is None or outcome.exit_code in (EXIT_DONE, EXIT_USER):
        return ended
    if outcome.stopped_by is None and not outcome.has_lost_node and not (outcome.is_saved and _is_near_end(allocation)):
        return ended  # a failure, or a script that stops by itself
    step = progress(plan, attempt.run_dir)

    def note(step: int, reason: str) -> None:
        attempt.end(_how(outcome), outcome.exit_code, requeued=reason)
        recorder = Recorder(attempt.run_dir, True, attempt.number)
        recorder.event(requeue.EVENT, step=step, reason=reason)
        recorder.close()
        _say(f"job {allocation.job_id} is queued again ({reason}), and goes on at step {step}")

    try:
        why = requeue.ask(
            allocation,
            signal_name=requeue.LOST_NODE if outcome.has_lost_node else outcome.stopped_by,
            warning_signal=plan.warning_signal,
            run_dir=attempt.run_dir,
            step=step,
            max_idle=plan.max_idle_requeues,
            note=note,
        )
    except NoProgress as error:
        attempt.end(str(error), EXIT_FAILED)
        _say(str(error))
        return replace(ended, exit_code=EXIT_FAILED, report=str(error))
    return replace(ended, comes_back=why in requeue.COMES_BACK)


def _time_left(allocation: Allocation, warning_signal: str, signal_name: str) -> tuple[str, float] | None:
    """Why Slurm ends the job, and in how many seconds at the soonest; None if it does not.

    Raises:
        SlurmFailed: it does not say.
    """
    state = slurm.job_state(allocation.job_id)
    why = requeue.why(state, allocation, signal_name, warning_signal)
    if state.ends_at is None or why not in requeue.OURS:
        return None
    # A preempted job that is still there at the end comes back by Slurm's own doing.
    spare_s = _BEFORE_THE_LIMIT_S if why == "time limit" else 0.0
    return why, max(0.0, state.ends_at - time.time() - spare_s)


def _is_near_end(allocation: Allocation) -> bool:
    try:
        ends_at = slurm.job_state(allocation.job_id).ends_at
    except slurm.SlurmFailed:
        return False
    return ends_at is not None and ends_at - time.time() < _NEAR_THE_END_S


def progress(plan: Plan, run_dir: Path) -> int:
    """How far the work is: the newest checkpoint's step; of a script, which has its own, how often it has saved."""
    if plan.job.kind == "run":
        return max((step for step, _ in listing.complete(listing.checkpoints_directory(run_dir))), default=0)
    return count_saved(run_dir)


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
