"""A real Slurm cluster of four nodes on this machine, started and ended by the tests.

One munged, one slurmctld and four slurmd run from a directory of their own, on ports of their own: nothing is shared
with a Slurm that this machine may have, nor with another cluster of the tests. The nodes share the machine, so their
names do not resolve, and each claims more CPUs than there are.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.ports import free_ports

NODES = ("n1", "n2", "n3", "n4")
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
)

POLL_S = 0.2
COMMAND_S = 30.0  # for Slurm's own commands, which answer at once unless slurmctld is stuck

# The daemons lie in sbin, which is not on everyone's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# cred_expire: a requeued job stays held for that long, 2 minutes by default.
# RealMemory and CPUs are not what the machine has: config_overrides makes slurmd believe them.
# ClusterName: jobs of several clusters have the same numbers, and find their launchers and ranks by these two.
CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/steps-%n.log
{nodes}
PartitionName=low PriorityTier=1 GraceTime=20 Default=YES MaxTime=60 Nodes=ALL
PartitionName=hasty PriorityTier=1 GraceTime=10 MaxTime=60 Nodes=ALL
PartitionName=high PriorityTier=10 PreemptMode=OFF MaxTime=60 Nodes=ALL
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000"


def unavailable() -> str | None:
    """Say why no cluster can run here; None when one can."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs Slurm: run .ci/install-slurm (not found: {', '.join(missing)})"
    if os.geteuid() != 0:
        return "needs root: slurmd runs as root"
    return None


@dataclass(frozen=True)
class Job:
    """What Slurm says about a job."""

    id: int
    state: str  # as Slurm spells it: PENDING, RUNNING, COMPLETING, COMPLETED, ...
    reason: str  # why it is pending, or ended as it did
    restarts: int
    nodes: tuple[str, ...]  # empty before it has started
    exit_code: str  # of the batch script: "status:signal"
    output: Path


class Cluster:
    """A running cluster, from entering to leaving the context.

    The partition ``low`` is preempted by ``high`` with 20 s of grace, ``hasty`` with 10 s. What Slurm makes of it is
    longer by up to 8 s. An allocation shares its nodes unless it asks for ``--exclusive``.
    """

    directory: Path  # of the daemons' files
    work: Path  # where commands and jobs run
    env: dict[str, str]  # for subprocesses: Slurm's commands find this cluster by it

    def __enter__(self) -> Cluster:
        # Under /tmp, whatever TMPDIR says: the path of a socket has 108 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.work = self.directory / "work"
        self._configuration = self.directory / "slurm.conf"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env = {**inherited, "PATH": PATH, "SLURM_CONF": str(self._configuration)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._configure()
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    # Commands and jobs.

    def run(self, *argv: str, timeout: float = COMMAND_S, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command, such as ``srun``, on the cluster; with ``check``, raise when its exit status is not 0."""
        done = subprocess.run(
            argv,
            env=self.env,
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def submit(self, script: str, *options: str) -> int:
        """Give ``script``, the text of a batch script, to sbatch with these ``options``; return the job's id."""
        path = self.work / f"{secrets.token_hex(4)}.sh"
        path.write_text(script)
        return int(self.run("sbatch", "--parsable", *options, str(path)).stdout)

    def job(self, job_id: int) -> Job:
        """Return what Slurm says about a job, which it remembers for an hour after the end."""
        said = self.run("scontrol", "show", "job", "--oneliner", str(job_id)).stdout
        fields = dict(field.split("=", 1) for field in said.split() if "=" in field)
        return Job(
            id=job_id,
            state=fields["JobState"],
            reason=fields["Reason"],
            restarts=int(fields["Restarts"]),
            nodes=self._expanded(fields["NodeList"]),
            exit_code=fields["ExitCode"],
            output=Path(fields["StdOut"]),
        )

    def wait_for(self, job_id: int, *states: str, restarts: int = 0, timeout: float = 120) -> Job:
        """Wait until a job that was restarted ``restarts`` times or more is in one of ``states``.

        Raises TimeoutError after ``timeout`` seconds, or as soon as the job has ended otherwise, with its output.
        """
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job.state in states and job.restarts >= restarts:
                return job
            if job.state in ENDED or time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited for {' or '.join(states)} after {restarts} restarts, found {job}; "
                    f"its output:\n{tail(job.output)}"
                )
            time.sleep(POLL_S)

    def wait_for_restart(self, job_id: int, restarts: int = 1, timeout: float = 120) -> Job:
        """Wait until a job that was requeued has started again; make Slurm start it sooner than it would by itself."""
        started = ("RUNNING", "COMPLETED")
        job = self.wait_for(job_id, "PENDING", *started, restarts=restarts, timeout=timeout)
        if job.state == "PENDING":
            self.start_soon(job_id)
        return self.wait_for(job_id, *started, restarts=restarts, timeout=timeout)

    def start_soon(self, job_id: int) -> None:
        """Have a job that was requeued not wait until its old credentials have expired."""
        # Those are revoked at its end, and with them any that are made within the same second: such a start fails, and
        # the job with it. An error says that it has started by now.
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2", check=False)

    def cancel_all(self) -> None:
        """End all jobs, whatever they do on signals, and bring back the nodes that were stopped."""
        for name in NODES:
            if name not in self._daemons:
                self.start_node(name)
        self.wait_until(self._idle_without_jobs, "no job is left and all nodes are idle")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 120) -> None:
        """Wait until ``condition`` holds; raise, with what the daemons logged, when one ends or on the timeout."""
        deadline = time.monotonic() + timeout
        while not condition():
            for label, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{label} exited with {daemon.returncode}:\n{tail(self._log(label))}")
            if time.monotonic() > deadline:
                logs = "".join(f"\n== {label}\n{tail(self._log(label))}" for label in self._daemons)
                raise TimeoutError(f"not within {timeout:.0f} s: {what}{logs}")
            time.sleep(POLL_S)

    # Nodes.

    def stop_node(self, name: str) -> None:
        """Lose a node, as if its power had failed, and tell Slurm, which would take minutes to notice."""
        daemon = self._daemons.pop(name)
        for process in self._processes(name):  # or the first to be killed would be told of by others
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        self._kill(lambda: self._processes(name))
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=stopped")

    def start_node(self, name: str) -> None:
        """Bring back a node that was stopped, and wait until jobs can run on it."""
        self._start_node(name)
        # ReturnToService=2: up as soon as slurmd has registered, with nothing to resume.
        self.wait_until(lambda: self._states()[name] in ("idle", "mix", "alloc"), f"{name} is up")

    # Processes.

    def processes(self) -> list[psutil.Process]:
        """Return all that runs on this cluster: daemons, steps, tasks, and all that came of them."""
        return self._processes()

    def _processes(self, node: str | None = None) -> list[psutil.Process]:
        """Return the processes of a ``node``, or of the whole cluster.

        A step's processes are no children of slurmd; what marks them is the environment.
        """
        marks = {f"SLURM_CONF={self._configuration}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has just ended
                # Not psutil's environ(), which is empty once slurmstepd has written its title over the first variables.
                environ = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
                if marks <= set(environ.split("\0")):
                    found |= {process, *process.children(recursive=True)}
        return [process for process in found if alive(process)]

    def _tasks(self) -> list[psutil.Process]:
        """Return what users run: all but the daemons, and slurmstepd, which tells them how the tasks ended."""
        tasks = []
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                # The batch shell is called slurm_script.
                if process.name() not in ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"):
                    tasks.append(process)
        return tasks

    def _kill(self, processes: Callable[[], list[psutil.Process]]) -> None:
        """Kill until none is left: one may have started another in the meantime."""
        deadline = time.monotonic() + 20
        while left := processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if time.monotonic() > deadline:
                raise RuntimeError(f"still running after SIGKILL: {left}")
            time.sleep(POLL_S / 4)

    # Starting and ending.

    def _configure(self) -> None:
        host = socket.gethostname()
        controller_port, *node_ports = free_ports(1 + len(NODES))
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, node_ports, strict=True)]
        self._configuration.write_text(
            CONFIGURATION.format(
                name=self.directory.name,
                host=host,
                directory=self.directory,
                controller_port=controller_port,
                nodes="\n".join(nodes),
            )
        )
        self.work.mkdir()
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))

    def _start(self) -> None:
        directory = self.directory
        munge_socket = directory / "munge.socket"
        self._launch(
            "munged",
            "--foreground",
            "--force",  # accept a socket in a directory that others cannot enter
            f"--key-file={directory}/munge.key",
            f"--socket={munge_socket}",
            f"--pid-file={directory}/munged.pid",
            f"--log-file={directory}/munged.log",
            f"--seed-file={directory}/munge.seed",
        )
        self.wait_until(munge_socket.exists, "munged listens")
        self._launch("slurmctld", "-D", "-c")
        for name in NODES:
            self._start_node(name)
        self.wait_until(self._idle, "all nodes are idle")

    def _start_node(self, name: str) -> None:
        # The variable is inherited by the node's steps, which is how they are told from those of the other nodes.
        self._launch("slurmd", "-D", "-N", name, label=name, env={"SLURMD_NODENAME": name})

    def _launch(self, program: str, *options: str, label: str = "", env: dict[str, str] | None = None) -> None:
        label = label or program
        with self._log(label).open("ab") as log:
            # Ctrl-C is not for the daemons, but when this process is killed, they are too (their jobs are not).
            self._daemons[label] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *options],
                env={**self.env, **(env or {})},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self) -> None:
        # All are killed, jobs too: no state outlives the directory.
        self._kill(self._processes)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.directory)

    # States.

    def _states(self) -> dict[str, str]:
        """Return each node's state as sinfo abbreviates it; a ``*`` at the end says that it does not answer."""
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t", check=False).stdout
        return dict.fromkeys(NODES, "unknown") | dict(line.split() for line in listed.splitlines())

    def _idle(self) -> bool:
        return set(self._states().values()) == {"idle"}

    def _idle_without_jobs(self) -> bool:
        """Cancel what there is; a job may have been requeued or submitted by another since the last look."""
        jobs = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs, check=False)
            # At once: Slurm would leave a job that ignores SIGTERM running for KillWait.
            self._kill(self._tasks)
        return not jobs and self._idle()

    def _expanded(self, nodes: str) -> tuple[str, ...]:
        if nodes in ("", "(null)"):
            return ()
        return tuple(self.run("scontrol", "show", "hostnames", nodes).stdout.split())

    def _log(self, label: str) -> Path:
        return self.directory / f"{label}.log"


def alive(process: psutil.Process) -> bool:
    """Say whether a process runs; one that has ended and was not reaped does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def tail(path: Path, lines: int = 20) -> str:
    """Return the last ``lines`` of a file, which need not exist."""
    if not path.exists():
        return f"(no {path})"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
