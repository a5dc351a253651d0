"""Who this process is among the ranks. The one place that reads environment variables; imports nothing of torch.

Whoever started the ranks (ddpkit, torchrun, srun, mpirun, a person) describes each of them by variables of its own;
`World.from_env` reads them once into a frozen value, and everything else takes that value as an argument.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ddpkit import slurm
from ddpkit.errors import UserError


class Allocation(NamedTuple):
    """The Slurm job that a process is part of, however it was started there."""

    job_id: str
    """As Slurm's commands take it: 7, or 7_2 in an array. The number of an array's last job is that of the whole array,
    so by it Slurm would tell of another job, and requeue all of them."""
    restart_count: int
    """How often Slurm has started the job again, with the same id."""
    array_index: int | None
    """Which job of an array of jobs this is."""
    ends_at: float | None = None
    """When Slurm will end it, in seconds since the epoch; None where its version sets no such variable."""


@dataclass(frozen=True)
class World:
    """This rank, the ranks around it, and where they meet.

    The default is an ordinary single process: rank 0 of 1, with nowhere to meet.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    """The rendezvous store is served by the launcher, not by rank zero."""
    restart_count: int = 0
    """How often this launcher has restarted the group; part of the rendezvous, so that attempts never mix."""
    job: str | None = None
    """What these ranks have in common, and no others: where no port was given, they find each other's by it."""
    source: str = "one process: no launcher has set anything"
    """Where the numbers come from, for people."""
    allocation: Allocation | None = None
    """The Slurm job around this process, if there is one."""
    has_launcher: bool = False
    """A launcher (ddpkit's, torchrun, mpirun) stands between this process and whatever else: signals, ends and
    restarts are its business as well."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero."""
        return self.rank == 0

    @property
    def nnodes(self) -> int:
        """Nodes, all with the same number of ranks."""
        return self.world_size // self.local_world_size

    @property
    def node_rank(self) -> int:
        """The node of this rank, counted from zero."""
        return self.rank // self.local_world_size

    @property
    def host(self) -> str:
        """The name of this host, for messages; nothing connects to it."""
        return socket.gethostname()

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> World:
        """Read the variables of whoever started this rank: torchrun and the like, MPI, Slurm, or nobody.

        Args:
            env: the variables; by default this process's own environment.

        Raises:
            UserError: some are set and others not, one is no number, or they contradict each other.
        """
        env = os.environ if env is None else env
        found = next((world for _, read in ENVIRONMENTS if (world := read(env)) is not None), None)
        if found is None:
            _check_alone(env)
        return replace(found or cls(source=_why_alone(env)), allocation=allocation(env))

    def to_env(self) -> dict[str, str]:
        """Give the variables that `from_env` reads, and that plain torch scripts expect."""
        env: dict[str, str | int] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_RANK": self.node_rank,
            "GROUP_WORLD_SIZE": self.nnodes,
        }
        if self.master_addr is not None and self.master_port is not None:
            env |= {"MASTER_ADDR": self.master_addr, "MASTER_PORT": self.master_port}
        if self.agent_store:
            env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": self.restart_count}
        return {name: str(value) for name, value in env.items()}


def allocation(env: Mapping[str, str]) -> Allocation | None:
    """The Slurm job around a process with these variables, if there is one."""
    if "SLURM_JOB_ID" not in env:
        return None
    restarts = _number(env, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in env else 0  # absent at first
    index = _number(env, "SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_TASK_ID" in env else None
    ends_at = float(_number(env, "SLURM_JOB_END_TIME")) if "SLURM_JOB_END_TIME" in env else None
    job_id = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env and index is not None:
        job_id = f"{env['SLURM_ARRAY_JOB_ID']}_{index}"
    return Allocation(job_id, restarts, index, ends_at)


def cpus_per_task(env: Mapping[str, str]) -> int | None:
    """The cores of each task of a Slurm step; None if nobody has asked for a number."""
    return _number(env, "SLURM_CPUS_PER_TASK") if "SLURM_CPUS_PER_TASK" in env else None


def environment() -> dict[str, str]:
    """A copy of this process's environment, for launchers that compose that of their children."""
    return dict(os.environ)


def adopt(variables: Mapping[str, str]) -> None:
    """Make a forked rank's environment what an exec'd one would have been given."""
    os.environ.update(variables)


@contextlib.contextmanager
def adopted(variables: Mapping[str, str]) -> Iterator[None]:
    """Add variables that are not set yet for as long as the context lasts: for what a library reads on its import."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def replaced(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for as long as the context lasts: for a library that can be told in no other way."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def as_torchrun_has_it(world: World) -> Iterator[None]:
    """Have the environment say who this rank is in torchrun's words alone, for a library that asks it.

    Of one process alone it says nothing: such libraries would make a process group of it.
    """
    stated = world.to_env() if world.world_size > 1 else {}
    replaced = {name: os.environ.pop(name) for name in list(os.environ) if _PLACE.match(name)}
    os.environ.update(stated)
    try:
        yield
    finally:
        for name in [name for name in os.environ if _PLACE.match(name)]:
            del os.environ[name]
        os.environ.update(replaced)


_PLACE = re.compile(
    r"SLURM_|SLURMD_|SRUN_|RANK$|WORLD_SIZE$|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|OMPI_|PMI\d?_|PMIX_|SUBMITIT_"
    r"|MPI_LOCAL"
)
_SLURM_ITSELF = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}
_SBATCH_DEFAULTS = {  # where the variable is not called as the option is
    "time": ("SBATCH_TIMELIMIT",),
    "mem": ("SBATCH_MEM_PER_NODE",),
    "array": ("SBATCH_ARRAY_INX",),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
}


def not_for_a_job(env: Mapping[str, str], stated: Sequence[str]) -> list[str]:
    """Names of variables that a job submitted from here must not inherit.

    Those of a place that is not the job's: an allocation, or a rank, in which its submission was typed. The user's own
    defaults for sbatch stay (``SBATCH_ACCOUNT``), but for the options that a script has ``stated``: sbatch would take
    the variable's word over the script's.
    """
    overruled = {
        name
        for option in stated
        for name in _SBATCH_DEFAULTS.get(option, (f"SBATCH_{option.upper().replace('-', '_')}",))
    }
    return sorted(name for name in env if name in overruled or (_PLACE.match(name) and name not in _SLURM_ITSELF))


def thread_and_network_defaults(
    env: Mapping[str, str], local_world_size: int, cores: int, nnodes: int = 1
) -> dict[str, str]:
    """Variables for the ranks of a machine, leaving what the user has set.

    Threads: the cores divided by the ranks, or they fight over them. Network: gloo and NCCL otherwise take the
    host name's address, which may be public; ranks on one machine need the loopback only.
    """
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // local_world_size))}
    if nnodes == 1:
        wanted |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in wanted.items() if name not in env}


# ---------------------------------------------------------------------- who started the ranks


def survey(env: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each of `ENVIRONMENTS` by name, with what it says of this process; for people."""
    said = []
    decided = False
    for name, read in ENVIRONMENTS:
        try:
            world = read(env)
        except UserError as error:
            said.append((name, f"broken: {error}"))
            decided = True
            continue
        if world is None:
            said.append((name, "not there"))
            continue
        place = f"rank {world.rank} of {world.world_size}, local rank {world.local_rank} of {world.local_world_size}"
        said.append((name, f"{'there too' if decided else 'decides'}: {place} ({world.source})"))
        decided = True
    if decided:
        return said
    try:
        _check_alone(env)
    except UserError as error:
        return [*said, ("what is left", f"broken: {error}")]
    return [*said, ("so it is", _why_alone(env))]


class _Names(NamedTuple):
    """How a launcher calls the four numbers; in messages."""

    rank: str
    size: str
    local_rank: str
    local_size: str


def _standard(env: Mapping[str, str]) -> World | None:
    """RANK and WORLD_SIZE: torchrun, ddpkit's own launchers, a person. Who sets them means this very process."""
    names = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not _is_set(env, (names.rank, names.size), "a launcher sets both"):
        return None
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    # Without the local ones: variables set by hand, on one machine.
    local_world_size = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world_size
    local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank % max(local_world_size, 1)
    world = _met(
        env,
        World(
            rank,
            world_size,
            local_rank,
            local_world_size,
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in env else 0,
            source=_told(env, "torchrun, ddpkit or a person", (*names, "TORCHELASTIC_RUN_ID")),
            has_launcher=True,
        ),
    )
    _check(world, names, numbered_by_node="LOCAL_RANK" in env and "LOCAL_WORLD_SIZE" in env)
    _check_against_step(env, world)
    if world_size > 1 and (world.master_addr is None or world.master_port is None):
        name = "MASTER_ADDR" if world.master_addr is None else "MASTER_PORT"
        raise UserError(
            f"WORLD_SIZE={world_size} needs {name} as well: where rank 0 meets the others. "
            "Start the ranks with a launcher (ddpkit launch, torchrun), or set it."
        )
    return world


def _open_mpi(env: Mapping[str, str]) -> World | None:
    """Open MPI's mpirun."""
    names = _Names(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    if not _is_set(env, names, "mpirun sets all of them"):
        return None
    _check_other_mpi(env, names)
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    return _mpi(env, names, "Open MPI", f"openmpi {job}" if job else None)


def _check_other_mpi(env: Mapping[str, str], names: _Names) -> None:
    """One MPI's mpirun inside another's: nothing tells which of the two is the inner one."""
    for own, other in ((names.rank, _HYDRA.rank), (names.size, _HYDRA.size)):
        if all(name in env for name in _HYDRA) and env[own] != env[other]:
            raise UserError(
                f"{own}={env[own]} (Open MPI) and {other}={env[other]} (MPICH) contradict each other; unset the "
                "variables of the one that has not started this process"
            )


_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _hydra(env: Mapping[str, str]) -> World | None:
    """MPICH's mpiexec (Hydra), and those built from it: Intel MPI, MVAPICH.

    Slurm sets the two of PMI alone, for MPI programs that srun starts; those are a Slurm step.
    """
    names = _HYDRA
    is_slurms = _has_step(env) and not any(name in env for name in (names.local_rank, names.local_size))
    if is_slurms or not _is_set(env, names, "mpiexec sets all of them"):
        return None
    # Nothing that it sets is the same on all ranks of one mpiexec and on no others, but they have one starter.
    return _mpi(env, names, "MPICH or a relative of it", f"hydra {_starter('PMI_RANK')}")


def _mpi(env: Mapping[str, str], names: _Names, who: str, job: str | None) -> World:
    rank, world_size, local_rank, local_world_size = (_number(env, name) for name in names)
    told = _told(env, who, names)
    world = _met(env, World(rank, world_size, local_rank, local_world_size, job=job, source=told, has_launcher=True))
    _check(world, names, numbered_by_node=True)
    if world.world_size > 1 and world.master_addr is None:
        if world.nnodes > 1:
            raise UserError(
                f"{names.size}={world.world_size} on {world.nnodes} machines needs MASTER_ADDR as well: the address of "
                "the one with rank 0. Pass it on (mpirun -x MASTER_ADDR=..., mpiexec -genv MASTER_ADDR ...)."
            )
        world = replace(world, master_addr="127.0.0.1")
    if world.world_size > 1 and world.master_port is None and job is None:
        raise UserError(
            f"{names.size}={world.world_size} needs MASTER_PORT as well: this mpirun sets nothing that tells its ranks "
            "from those of another one (PMIX_NAMESPACE). Pass it on: mpirun -x MASTER_PORT=..."
        )
    return world


def _slurm_step(env: Mapping[str, str]) -> World | None:
    """A task of srun. The batch shell, and a python of one's own inside salloc, are one process each."""
    if not _has_step(env):
        return None
    others = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    _is_set(env, ("SLURM_STEP_ID", *others), "srun sets all of them")
    names = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    rank, world_size, local_rank = (_number(env, name) for name in names[:3])
    per_node = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    if sum(per_node) != world_size:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']} and SLURM_STEP_NUM_TASKS={world_size} "
            "contradict each other: the one makes "
            f"{sum(per_node)} tasks. Something has changed them after srun set them; unset all SLURM_STEP_* variables "
            "for a single process."
        )
    if len(set(per_node)) > 1:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']}: every node needs the same number of "
            "ranks; give srun --ntasks-per-node"
        )
    job = "slurm " + "/".join(
        env.get(name, "") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    told = ("SLURM_JOB_ID", "SLURM_STEP_ID", *others)
    world = _met(
        env, World(rank, world_size, local_rank, per_node[0], job=job, source=_told(env, "a Slurm step", told))
    )
    _check(world, names, numbered_by_node=True)
    if world_size > 1 and world.master_addr is None:
        nodes = env.get("SLURM_STEP_NODELIST")
        if world.nnodes > 1 and nodes is None:
            raise UserError("the environment sets SLURM_STEP_ID but not SLURM_STEP_NODELIST: srun sets both")
        world = replace(world, master_addr="127.0.0.1" if world.nnodes == 1 else slurm.first_address(nodes or ""))
    return world


ENVIRONMENTS: tuple[tuple[str, Callable[[Mapping[str, str]], World | None]], ...] = (
    ("RANK and WORLD_SIZE", _standard),
    ("Open MPI", _open_mpi),
    ("MPICH", _hydra),
    ("a Slurm step", _slurm_step),
)
"""What can have started the ranks, the innermost first: torchrun runs inside a step, and mpirun starts its own
helpers by srun, whose variables its ranks then inherit. The first that is there decides."""


def tasks_per_node(text: str) -> list[int]:
    """Read Slurm's ``2(x3),1``: three nodes with two tasks each, then one with one.

    Raises:
        UserError: it is written otherwise.
    """
    counts: list[int] = []
    for part in text.split(","):
        if not (found := re.fullmatch(r"([1-9]\d*)(?:\(x([1-9]\d*)\))?", part)):
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} in the environment is not of the form 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _is_set(env: Mapping[str, str], names: Sequence[str], rule: str) -> bool:
    """Whether all of ``names`` are set; False if none is."""
    given = [name for name in names if name in env]
    missing = [name for name in names if name not in env]
    if given and missing:
        raise UserError(
            f"the environment sets {given[0]}={env[given[0]]} but not {' and '.join(missing)}: {rule}. "
            f"Unset {' and '.join(given)} for a single process, or start the ranks with a launcher."
        )
    return not missing


def _met(env: Mapping[str, str], world: World) -> World:
    """Add where the ranks meet, as far as somebody has said so."""
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    return replace(world, master_addr=env.get("MASTER_ADDR") or None, master_port=port)  # empty: nobody's word


def _check(world: World, names: _Names, *, numbered_by_node: bool) -> None:
    if not 0 <= world.rank < world.world_size:
        raise UserError(f"{names.rank}={world.rank} is not within {names.size}={world.world_size}: ranks count from 0")
    if not 0 <= world.local_rank < world.local_world_size:
        raise UserError(
            f"{names.local_rank}={world.local_rank} is not within {names.local_size}={world.local_world_size}: "
            "local ranks count from 0"
        )
    if world.world_size % world.local_world_size:
        raise UserError(
            f"{names.size}={world.world_size} is not a multiple of {names.local_size}={world.local_world_size}: "
            "every node needs the same number of ranks"
        )
    if numbered_by_node and world.rank % world.local_world_size != world.local_rank:
        raise UserError(
            f"{names.rank}={world.rank} and {names.local_rank}={world.local_rank} do not fit {names.local_size}="
            f"{world.local_world_size}: ranks are to be numbered node by node (srun --distribution=block, "
            "mpirun --map-by core)"
        )
    if world.master_port is not None and not 0 < world.master_port < 1 << 16:
        raise UserError(f"MASTER_PORT={world.master_port} is no port: they go from 1 to 65535")


def _check_against_step(env: Mapping[str, str], world: World) -> None:
    """What a person has set for all tasks of a Slurm step alike: each would be alone, and rank 0.

    A launcher of one's own in each task may have made several ranks of it; they are those of the task, in its order.
    """
    has_launcher = any(name in env for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"))
    is_mpi = any(name in env for name in ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"))  # whose helpers are the tasks
    given = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if has_launcher or is_mpi or not (_has_step(env) and all(name in env for name in given)):
        return
    task, tasks = (_number(env, name) for name in given)
    if tasks <= 1 or (world.world_size % tasks == 0 and world.rank // (world.world_size // tasks) == task):
        return
    raise UserError(
        f"RANK={world.rank} and WORLD_SIZE={world.world_size} contradict SLURM_PROCID={task} and SLURM_STEP_NUM_TASKS="
        f"{tasks}: this is one of {tasks} tasks of a Slurm step. Unset RANK and WORLD_SIZE to be rank {task} of "
        f"{tasks}; unset SLURM_STEP_ID for what they say."
    )


_LAST_STEP = 0xFFFFFFF0  # above it, Slurm numbers the shells that it starts itself: batch, interactive


def _has_step(env: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_ID") < _LAST_STEP


def _starter(mark: str) -> int:
    """The pid of the nearest ancestor without the variable ``mark``: the one that gave it to the ranks."""
    pid = os.getppid()
    try:
        while f"\0{mark}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            # "pid (name) state ppid ..."; the name may hold anything, a parenthesis too
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        pass  # another user's: no rank, then
    return pid


def _told(env: Mapping[str, str], who: str, names: Sequence[str]) -> str:
    given = [f"{name}={env[name]}" for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name in env]
    return f"{who}, by {', '.join(given)}"


def _check_alone(env: Mapping[str, str]) -> None:
    """A single process is the first of all; a variable that says otherwise has lost those that belong to it."""
    for name, whole in (
        ("LOCAL_RANK", "RANK and WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_ID"),
        ("SLURM_LOCALID", "SLURM_STEP_ID"),
    ):
        if name in env and whole not in env and _number(env, name) > 0:
            raise UserError(
                f"the environment sets {name}={env[name]} but not {whole}: a launcher sets all of them. Unset {name} "
                "for a single process, or start the ranks with a launcher."
            )


def _why_alone(env: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" in env:
        return (
            f"one process: in Slurm's job {env['SLURM_JOB_ID']}, but not started by srun (SLURM_STEP_ID is not set, or "
            "that of a shell)"
        )
    return World.source


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{name}={env[name]!r} in the environment is not a whole number of 0 or more")
    return value
