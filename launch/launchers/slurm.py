"""Ranks in a Slurm job, which is submitted from here and starts when there is room."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ddpkit.errors import EXIT_DONE, UserError

from ..plan import Plan


def run(plan: Plan) -> int:
    """Submit a plan; follow the job if that was asked for. Gives the exit code: of the submission, or of the job."""
    return _run((plan,), home(plan), is_array=False)


def run_array(plans: Sequence[Plan], home: Path) -> int:
    """Submit plans that differ in nothing that Slurm sees, as one array of jobs from the folder ``home``."""
    return _run(plans, home, is_array=True)


def describe(plans: Sequence[Plan], home: Path, is_array: bool = False) -> str:
    """The script that would be submitted."""
    from .. import submission  # with submitit, only where something is submitted

    return submission.script(plans, home, is_array)


def new_home(name: str) -> Path:
    """A run directory for what was given none."""
    from .. import submission

    return submission.new_home(name)


def is_submitted(home: Path, is_array: bool = False) -> bool:
    """Whether Slurm has work to do, or does it, that was submitted from there."""
    from .. import submission

    submission.require_slurm()
    return submission.unfinished(home, is_array) is not None


def home(plan: Plan) -> Path:
    """The directory that the submission's own folder is made in."""
    return plan.run_dir if plan.run_dir is not None else Path(plan.job.config["run_dir"])


def _run(plans: Sequence[Plan], home: Path, is_array: bool) -> int:
    from .. import following, submission

    kind, waits = plans[0].job.kind, plans[0].waits
    if kind == "run":
        submitted, is_new = submission.submit_once(plans, home, is_array)
    else:
        submitted, is_new = submission.submit(plans, home, is_array), True
    if is_new:
        _say(f"submitted job {submitted.job_id} from {submitted.folder}")
        if not waits:
            _say(submitted.hints())
    elif submission.covers(submitted, plans):
        _say(f"job {submitted.job_id} was submitted for this and has not ended; {submitted.hints()}")
    else:
        raise UserError(
            f"run_dir: {home} is in use by job {submitted.job_id}, which has not ended and was given another plan; "
            f"wait for it, end it (scancel {submitted.job_id}), or choose another run_dir"
        )
    # The answer of an evaluation is what it prints; otherwise the one thing on standard output is the job's number.
    is_answer = kind == "eval"
    if not is_answer:
        print(submitted.job_id, flush=True)  # noqa: T201 - for scripts
    if not waits:
        return EXIT_DONE
    return following.follow(submitted, tee_all=plans[0].tee_all, output=sys.stdout if is_answer else sys.stderr)


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
