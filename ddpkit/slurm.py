"""What only Slurm's own commands know. Imports nothing of torch."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from dataclasses import dataclass

from ddpkit.errors import DdpkitError, UserError

_COMMAND_S = 60.0  # a busy controller lets its clients wait
_ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
)


class SlurmFailed(DdpkitError):
    """One of Slurm's commands failed; the message has its words."""


class JobForgotten(SlurmFailed):
    """Slurm does not know the job, or not any more: it keeps those that have ended for MinJobAge, minutes."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job.

    Attributes:
        state: as Slurm spells it: PENDING, RUNNING, COMPLETING, COMPLETED, TIMEOUT, ...
        reason: why it is pending, or ends as it does ("TimeLimit").
        restarts: how often it was started again; grows as soon as it is to be.
        is_requeueable: a batch job that Slurm may start again.
        is_preempted: it has been told to make room, and has the partition's grace time for that.
        ends_at: when Slurm will end it, in seconds since the epoch; None if it has no limit. In a preemption the end of
            the grace time.
        nodes: where it runs, as Slurm writes a list of them; empty before it has started.
        exit_code: of the batch script.
    """

    state: str
    reason: str
    restarts: int
    is_requeueable: bool
    is_preempted: bool
    ends_at: float | None
    nodes: str = ""
    exit_code: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether it is over, unless it is requeued after all."""
        return self.state in _ENDED


def job_state(job_id: str) -> JobState:
    """Ask the controller. Takes milliseconds, but a busy one may let us wait: not for a signal handler, or the loop.

    Raises:
        JobForgotten: it does not know the job any more.
        SlurmFailed: it does not answer.
    """
    return read_job_state(_said_of(job_id))


def job_states(job_id: str) -> dict[int | None, JobState]:
    """Ask the controller about each job of an array, by its index; a job that is in none has None.

    Jobs of an array that it has forgotten are not there.

    Raises:
        JobForgotten: it knows none of them any more.
        SlurmFailed: it does not answer.
    """
    found: dict[int | None, JobState] = {}
    for line in _said_of(job_id).splitlines():
        # Those that wait are one line: "ArrayTaskId=3-5,8%2", the last number being how many may run at once.
        if (indices := re.search(r"\bArrayTaskId=([\d,-]+)", line)) is None:
            return {None: read_job_state(line)}
        for part in indices[1].split(","):
            first, _, last = part.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), read_job_state(line))
    return found


def _said_of(job_id: str) -> str:
    try:
        return _run("scontrol", "show", "job", "--oneliner", job_id)
    except SlurmFailed as error:
        raise (JobForgotten(str(error)) if "Invalid job id" in str(error) else error) from error


def read_job_state(said: str) -> JobState:
    """Read one line of ``scontrol show job --oneliner``."""
    fields = dict(field.split("=", 1) for field in said.split() if "=" in field)
    ends = fields.get("EndTime", "Unknown")
    return JobState(
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", 0)),
        is_requeueable=fields.get("Requeue") == "1" and fields.get("BatchFlag") == "1",
        is_preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown"),
        # Local time, as this machine's Slurm commands print it; there is no zone in it.
        ends_at=None if ends in ("Unknown", "None") else time.mktime(time.strptime(ends, "%Y-%m-%dT%H:%M:%S")),
        nodes=fields.get("NodeList", "(null)").replace("(null)", ""),
        exit_code=int(fields.get("ExitCode", "0:0").partition(":")[0]),
    )


def requeue(job_id: str) -> None:
    """Have Slurm end a batch job and start it again, with the same id.

    Raises:
        SlurmFailed: it would not.
    """
    _run("scontrol", "requeue", job_id, may_be_silent=True)


def cancel(job_id: str) -> None:
    """Have Slurm end a job, or an array of jobs; one that has ended already stays as it is.

    Raises:
        SlurmFailed: it would not.
    """
    _run("scancel", job_id, may_be_silent=True)


def first_address(nodes: str) -> str:
    """The address of the first of ``nodes``, a list as Slurm writes it: the one by which Slurm itself reaches it.

    Its name may not resolve, and what variables hold is the address of wherever srun was typed.

    Raises:
        UserError: Slurm does not say.
    """
    try:
        name, *_ = _run("scontrol", "show", "hostnames", nodes).split()
        shown = _run("scontrol", "show", "node", "--oneliner", name)
    except SlurmFailed as error:
        raise UserError(
            f"{error}; so it does not say where rank 0 is. Set MASTER_ADDR to the address of the step's first node."
        ) from error
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise UserError(f"`scontrol show node {name}` names no NodeAddr; set MASTER_ADDR to the address of that node")
    return found[1]


_BROADCAST = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _run(*command: str, may_be_silent: bool = False) -> str:
    # What is read here must be whole, and as it is without a user's taste in times.
    plain = ("env", "SLURM_BITSTR_LEN=0", "SLURM_TIME_FORMAT=standard", *command)
    try:
        # Slurm signals every process of a step, one after the other: the command that asks why would get it as well.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BROADCAST)
        try:
            asked = subprocess.Popen(
                plain, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with asked:
            try:
                said, complaint = asked.communicate(timeout=_COMMAND_S)
            except BaseException:
                asked.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmFailed(f"`{' '.join(command)}`: {error}") from error
    if asked.returncode or not (said.strip() or may_be_silent):
        raise SlurmFailed(f"`{' '.join(command)}`: {complaint.strip() or f'exit status {asked.returncode}'}")
    return said
