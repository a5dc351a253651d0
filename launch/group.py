"""A group of ranks from the first attempt to the last, whoever starts them: numbers, reports, exit codes."""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER

from .attempts import AttemptFile, begin, report_failure
from .output import Output
from .plan import Plan
from .supervise import LaunchFailed, Node, Outcome, passing_on_signals


def run(plan: Plan, node: Node) -> int:
    """Have ``node``, not entered yet, start the ranks; again as often as the plan allows. Gives the exit code."""
    if plan.run_dir is not None:
        return _run(plan, plan.run_dir, node)
    # No records were asked for; only the report of a failure refers to the ranks' output.
    run_dir = Path(tempfile.mkdtemp(prefix="ddpkit-"))
    code = EXIT_DONE
    try:
        code = _run(plan, run_dir, node)
    finally:
        if code != EXIT_FAILED:
            shutil.rmtree(run_dir, ignore_errors=True)
    return code


def _run(plan: Plan, run_dir: Path, node: Node) -> int:
    with ExitStack() as stack:
        attempt = begin(run_dir, plan.launcher, plan.world_size, plan.command)
        stack.enter_context(node)
        stack.enter_context(passing_on_signals(node))
        restart_count = 0
        while True:
            outcome = _attempt(plan, node, attempt, restart_count)
            if outcome is None:
                return EXIT_FAILED
            is_final = not outcome.failures or outcome.exit_code == EXIT_USER or outcome.stopped_by is not None
            if is_final or restart_count == plan.max_restarts:
                return outcome.exit_code
            restart_count += 1
            _say(f"restarting all ranks ({restart_count} of {plan.max_restarts})")
            attempt = begin(run_dir, plan.launcher, plan.world_size, plan.command)


def _attempt(plan: Plan, node: Node, attempt: AttemptFile, restart_count: int) -> Outcome | None:
    options = plan.job.options | {"attempt": attempt.number}
    job = replace(plan.job, options=options)
    try:
        outcome = node.run(job, restart_count, Output(attempt.log_dir, plan.tee_all))
    except LaunchFailed as error:
        attempt.end(str(error), EXIT_FAILED)
        _say(str(error))
        return None
    how = _how(outcome)
    attempt.end(how, outcome.exit_code)
    if outcome.failures:
        first = outcome.failures[0]
        _say(first.message if first.is_users_input else report_failure(outcome.failures, attempt))
    elif outcome.exit_code != EXIT_DONE:
        _say(f"{how}, state saved; run it again to continue" if outcome.is_saved else how)
    return outcome


def _how(outcome: Outcome) -> str:
    if outcome.failures:
        first = outcome.failures[0]
        return f"rank {first.rank} failed: {first.kind or ''} {first.message}".replace(":  ", ": ")
    if outcome.exit_code == EXIT_DONE:
        return "done"
    by = f" ({outcome.stopped_by})" if outcome.stopped_by else ""  # a script may stop by itself
    return f"stopped on request{by}" if outcome.is_saved else f"ended by {outcome.stopped_by}"


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
