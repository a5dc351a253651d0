"""A submission to Slurm: a folder with the plan in it, and a job that carries it out.

``RUN_DIR/slurm/submission-3/`` has plan.json (in an array plan-0.json, plan-1.json, ...), the copy of the code if one
was asked for, the script as it was submitted, the jobs' logs, and at the end outcome.json (outcome-0.json, ...).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from ddpkit import config as configs
from ddpkit import slurm, world
from ddpkit.errors import UserError

from . import sbatch, snapshot, submitting
from .job import Job
from .plan import Plan

PLAN = "plan.json"
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Submission:
    """A job, or an array of jobs, that was submitted.

    Attributes:
        job_id: Slurm's number of it.
        folder: where its plan, logs and outcome are.
        runs: the run directories of an array's jobs; empty for a single job.
    """

    job_id: str
    folder: Path
    runs: tuple[str, ...] = ()

    @property
    def indices(self) -> Sequence[int | None]:
        """Of an array's jobs; None stands for a single job."""
        return range(len(self.runs)) if self.runs else (None,)

    def file(self, name: str, index: int | None) -> Path:
        """Where `PLAN` or `OUTCOME` of one job lies."""
        return self.folder / _numbered(name, index)

    def logs(self, index: int | None, tasks: str = "0") -> list[Path]:
        """What has been logged so far by these ``tasks``, a pattern: standard output, and standard error."""
        job = self.job_id if index is None else f"{self.job_id}_{index}"
        return sorted(self.folder.glob(f"{job}_{tasks}_log.out")) + sorted(self.folder.glob(f"{job}_{tasks}_log.err"))

    def hints(self) -> str:
        """How to see what becomes of it, and how to end it."""
        return f"its output: tail -F {self.folder}/{self.job_id}*.out; to end it: scancel {self.job_id}"


def new_home(name: str) -> Path:
    """A directory for a job without a run directory, where all nodes see it; it is not there yet."""
    return next(path for number in itertools.count() if not (path := Path("runs") / f"{name}-{number}").exists())


def folder_for(home: Path) -> Path:
    """The folder of the next submission from a run directory; it is not made."""
    taken = [int(path.name[11:]) for path in (home / "slurm").glob("submission-*") if path.name[11:].isdigit()]
    return sbatch.usable_folder(home.absolute() / "slurm" / f"submission-{max(taken, default=-1) + 1}")


def script(plans: Sequence[Plan], home: Path, is_array: bool) -> str:
    """The very script that `submit` would give to sbatch now."""
    return sbatch.text(plans[0].slurm, folder_for(home), home.absolute().name, len(plans) if is_array else None)


def submit(plans: Sequence[Plan], home: Path, is_array: bool = False) -> Submission:
    """Have Slurm carry the plans out when it can: a single one, or an array of jobs of the same shape.

    Args:
        plans: what is to be done.
        home: the run directory, or the common one of an array; made if it is not there.
        is_array: whether they are an array.

    Raises:
        UserError: there is no Slurm here, it refuses the job, or the folder cannot be written.
    """
    require_slurm()
    with _alone(home):
        return _submit(plans, home, is_array)


def submit_once(plans: Sequence[Plan], home: Path, is_array: bool = False) -> tuple[Submission, bool]:
    """`submit`, unless Slurm still has work to do for what was submitted before; says whether it is new."""
    require_slurm()
    if (there := unfinished(home, is_array)) is not None:
        return there, False
    with _alone(home):
        if (there := unfinished(home, is_array)) is not None:  # somebody else was faster by a moment
            return there, False
        return _submit(plans, home, is_array), True


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    try:
        with submitting.alone(home):
            yield
    except OSError as error:
        raise UserError(
            f"run_dir: {home} cannot be written: {error.strerror}. Choose another one, or make room or change its "
            "permissions."
        ) from error


def require_slurm() -> None:
    """Raise UserError where Slurm's commands are not to be found."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"launch.launcher: slurm needs Slurm's commands, and {' and '.join(missing)} cannot be found on PATH. Type "
            "it on the cluster's login node, or see what would be submitted: --dry-run"
        )


def unfinished(home: Path, is_array: bool = False) -> Submission | None:
    """The newest submission from a run directory, if Slurm still has work to do for it."""
    plan = _numbered(PLAN, 0 if is_array else None)  # the directory of a sweep may be that of a run as well
    found = [
        (int(path.parent.name[11:]), path)
        for path in (home.absolute() / "slurm").glob("submission-*/*_submission.sh")
        if path.parent.name[11:].isdigit() and (path.parent / plan).exists()
    ]
    if not found:
        return None
    path = max(found)[1]
    job_id = path.name.partition("_")[0]
    try:
        states = slurm.job_states(job_id).values()
    except slurm.JobForgotten:
        return None
    runs = _runs(path.parent) if is_array else ()
    return Submission(job_id, path.parent, runs) if any(not state.has_ended for state in states) else None


def covers(submission: Submission, plans: Sequence[Plan]) -> bool:
    """Whether a submission does what ``plans`` say, and perhaps more."""
    try:
        theirs = [Plan.from_json(json.loads(submission.file(PLAN, index).read_text())) for index in submission.indices]
    except (OSError, ValueError, TypeError, KeyError):
        return False  # of another version of ddpkit, or half removed
    essences = [_essence(plan) for plan in theirs]
    return all(_essence(plan) in essences for plan in plans)


def _essence(plan: Plan) -> Plan:
    job = plan.job
    if plan.snapshot and job.kind == "run":  # whose config names files of the copy, and has the one it was made from
        job = Job("run", options={"config": job.options.get("config") or configs.dump(configs.from_tree(job.config))})
    return replace(plan, job=job, command=(), waits=False, tee_all=False)


def _runs(folder: Path) -> tuple[str, ...]:
    plans = sorted(folder.glob("plan-*.json"), key=lambda path: int(path.stem[5:]))
    return tuple(str(json.loads(path.read_text())["run_dir"]) for path in plans)


def _numbered(name: str, index: int | None) -> str:
    return name if index is None else name.replace(".", f"-{index}.")


def _submit(plans: Sequence[Plan], home: Path, is_array: bool) -> Submission:
    folder = folder_for(home)
    folder.mkdir()
    try:
        return _submit_from(folder, plans, home, is_array)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _submit_from(folder: Path, plans: Sequence[Plan], home: Path, is_array: bool) -> Submission:
    if plans[0].snapshot:
        plans = snapshot.take(plans, folder / "code")
    for index, plan in enumerate(plans):
        path = folder / _numbered(PLAN, index if is_array else None)
        path.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    made = sbatch.text(plans[0].slurm, folder, home.absolute().name, len(plans) if is_array else None)
    job_id = _Executor(folder, made).submit_script()
    return Submission(job_id, folder, tuple(str(plan.run_dir) for plan in plans) if is_array else ())


class _Executor(SlurmExecutor):
    """submitit's way from a script to a job id, with a script that is there already."""

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder)
        self._script = script

    def submit_script(self) -> str:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows Slurm's words, and raises them as well
            try:
                return str(self._submit_command("").job_id)
            except (FailedJobError, FailedSubmissionError) as error:
                raise UserError(f"sbatch refused the job: {str(error).strip()}") from error

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        # Not submitit's clean_env, which takes SLURM_CONF away too.
        dropped = world.not_for_a_job(world.environment(), sbatch.stated(self._script))
        unset = [word for name in dropped for word in ("-u", name)]
        return ["env", *unset, "sbatch", str(submission_file_path)]
