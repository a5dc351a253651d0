"""Ranks as processes on this machine."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER

from ..attempts import AttemptFile, begin, report_failure
from ..output import Output
from ..plan import Plan
from ..supervise import LaunchFailed, Node, Outcome, passing_on_signals


def run(plan: Plan) -> int:
    """Start the ranks, restart them as often as the plan allows, and give the exit code."""
    with ExitStack() as stack:
        run_dir = plan.run_dir
        if run_dir is None:  # a plain script that asked for no records: its ranks' output is kept until it ends well
            run_dir = Path(tempfile.mkdtemp(prefix="ddpkit-"))
        attempt = begin(run_dir, "local", plan.nproc, plan.command)
        node = stack.enter_context(Node(plan.nproc, plan.start_method, plan.env))
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
            attempt = begin(run_dir, "local", plan.nproc, plan.command)


def _attempt(plan: Plan, node: Node, attempt: AttemptFile, restart_count: int) -> Outcome | None:
    options = plan.job.options | {"attempt": attempt.number}
    job = replace(plan.job, options=options)
    try:
        outcome = node.run(job, restart_count, Output(attempt.log_dir, plan.tee_all))
    except LaunchFailed as error:
        attempt.end(str(error), EXIT_FAILED)
        _say(str(error))
        return None
    attempt.end(_how(outcome), outcome.exit_code)
    if outcome.failures:
        first = outcome.failures[0]
        _say(first.message if first.is_users_input else report_failure(outcome.failures, attempt))
    elif outcome.exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        _say("stopped on request, state saved; run it again to continue")
    return outcome


def _how(outcome: Outcome) -> str:
    if outcome.failures:
        first = outcome.failures[0]
        return f"rank {first.rank} failed: {first.kind or ''} {first.message}".replace(":  ", ": ")
    return "done" if outcome.exit_code == EXIT_DONE else f"stopped on request ({outcome.stopped_by})"


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
