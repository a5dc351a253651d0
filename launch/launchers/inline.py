"""One rank in this very process: for debuggers, and where somebody else has started the ranks already."""

from __future__ import annotations

import logging
import sys

from ddpkit import world
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, StopRequested
from ddpkit.world import World

from ..attempts import begin
from ..plan import Plan


def run(plan: Plan) -> int:
    """Do the job here. Exceptions pass through, so that a debugger stops where they are raised."""
    world.adopt(plan.env)  # before torch reads it
    from ddpkit import worker

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ddpkit").setLevel(logging.INFO)
    sys.path[0:1] = plan.job.search_path
    writes = plan.run_dir is not None and World.from_env().is_main  # of ranks that somebody else has started, one
    attempt = begin(plan.run_dir, "inline", plan.world_size, plan.command) if plan.run_dir and writes else None
    options = plan.job.options | {"attempt": attempt.number if attempt else 0}
    try:
        worker.work(plan.job.kind, plan.job.config, options)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else EXIT_FAILED
        if isinstance(leaving, StopRequested) and leaving.reason == "SIGINT":
            code = EXIT_INTERRUPTED
        if attempt is not None:
            has_stopped = isinstance(leaving, StopRequested)
            attempt.end("stopped on request" if has_stopped else f"left with exit code {code}", code)
        return code
    except BaseException as error:
        if attempt is not None:
            attempt.end(f"{type(error).__name__}: {error}", getattr(error, "exit_code", EXIT_FAILED))
        raise
    if attempt is not None:
        attempt.end("done", EXIT_DONE)
    return EXIT_DONE
