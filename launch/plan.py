"""What a command will do, as a value that can be printed, tested and then carried out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpkit import world
from ddpkit.config import Launch, node_range
from ddpkit.errors import UserError
from ddpkit.world import World

from .job import Job


@dataclass(frozen=True)
class Plan:
    """A start of ranks.

    Attributes:
        launcher: "inline", "local", "torchrun" or "slurm".
        nproc: ranks on this machine.
        nnodes: machines; with a range of them, the most.
        rdzv_endpoint: where several machines meet.
        start_method: "warm" or "spawn".
        backend: of the process group, as the config has it.
        max_restarts: of a failed group.
        max_idle_requeues: how often in a row a Slurm job comes back without having got further.
        warning_signal: the name, without SIG, of what Slurm sends before the time limit.
        slurm: what is asked of Slurm, as `sbatch.parameters` gives it; empty for other launchers.
        env: variables that every rank gets besides those that say who it is.
        job: what the ranks do.
        run_dir: where attempts, logs and failure reports go; None keeps none.
        tee_all: show the output of all ranks.
        command: what was typed, for the record.
        snapshot: whether a Slurm job gets a copy of the code.
        waits: whether the launcher follows a Slurm job to its end.
        min_nodes: with a range of machines, the fewest.
    """

    launcher: str
    nproc: int
    nnodes: int
    rdzv_endpoint: str | None
    start_method: str
    backend: str
    max_restarts: int
    max_idle_requeues: int
    warning_signal: str
    slurm: dict[str, Any]
    env: dict[str, str]
    job: Job
    run_dir: Path | None
    tee_all: bool
    command: tuple[str, ...]
    snapshot: bool = False
    waits: bool = False
    min_nodes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A tree that `from_json` takes back."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        return vars(self) | {"job": self.job.to_json(), "run_dir": run_dir}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        given = tree | {
            "job": Job.from_json(tree["job"]),
            "run_dir": None if tree["run_dir"] is None else Path(tree["run_dir"]),
            "command": tuple(tree["command"]),
        }
        return cls(**given)

    @property
    def world_size(self) -> int:
        """Ranks on all machines; with a range of them, the most."""
        return self.nproc * self.nnodes

    @property
    def fewest_nodes(self) -> int:
        """Machines; with a range of them, the fewest."""
        return self.nnodes if self.min_nodes is None else self.min_nodes

    def describe(self) -> str:
        """The plan as YAML-like lines, for ``--dry-run``."""
        what = self.job.target or (str(self.run_dir) if self.run_dir else self.job.kind)
        lines = [
            f"launcher: {self.launcher}",
            f"ranks: {_from_to(self.nproc * self.fewest_nodes, self.world_size)}",
            *([f"nodes: {_from_to(self.fewest_nodes, self.nnodes)}{self._meeting()}"] if self.nnodes > 1 else []),
            *([f"start_method: {self.start_method}"] if self.launcher != "torchrun" else []),
            f"max_restarts: {self.max_restarts}",
            f"job: {self.job.kind} {what}",
            *(f"env: {name}={value}" for name, value in sorted(self.env.items())),
        ]
        return "\n".join(lines)

    def _meeting(self) -> str:
        return "" if self.rdzv_endpoint is None else f", which meet at {self.rdzv_endpoint}"


def _from_to(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"


def make(
    launch: Launch,
    job: Job,
    *,
    run_dir: Path | None,
    tee_all: bool,
    command: tuple[str, ...],
    deterministic: bool = False,
    global_batch_size: int | None = None,
    waits: bool = False,
) -> Plan:
    """Decide how many ranks start, and with which environment.

    Raises:
        UserError: more ranks than GPUs or than samples in a global batch, or somebody has started ranks already.
    """
    env = world.environment()
    slurm: dict[str, Any] = {}
    added: dict[str, str] = {}
    fewest, most = node_range(launch.nnodes)
    if fewest != most and launch.launcher != "torchrun":
        raise UserError(
            f"launch.nnodes: {launch.nnodes} is a range, and machines can come and go with launch.launcher=torchrun "
            f"alone; give {launch.launcher} one number"
        )
    if launch.launcher == "slurm":
        from . import sbatch  # with submitit, for this alone

        nproc, slurm = sbatch.parameters(launch)
        nnodes, has_gpus = most, launch.backend != "gloo"  # what its nodes are like, the job will see
    else:
        nproc, nnodes, has_gpus, added = _here(launch, env)
    if global_batch_size is not None and global_batch_size < nproc * nnodes:
        raise UserError(
            f"data.global_batch_size: {global_batch_size} samples cannot be split over {nproc * nnodes} ranks; give at "
            f"least {nproc * nnodes}, or start fewer ranks (launch.nproc_per_node)"
        )
    if deterministic and has_gpus and "CUBLAS_WORKSPACE_CONFIG" not in env:
        added["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts; torch asks for it
    return Plan(
        launcher=launch.launcher,
        nproc=nproc,
        nnodes=nnodes,
        rdzv_endpoint=launch.rdzv_endpoint,
        start_method=launch.start_method,
        backend=launch.backend,
        max_restarts=launch.max_restarts,
        max_idle_requeues=launch.max_idle_requeues,
        warning_signal=launch.warning_signal,
        slurm=slurm,
        env=added,
        job=job,
        run_dir=run_dir,
        tee_all=tee_all,
        command=command,
        snapshot=launch.snapshot,
        waits=waits,
        min_nodes=fewest if fewest < most else None,
    )


def _here(launch: Launch, env: Mapping[str, str]) -> tuple[int, int, bool, dict[str, str]]:
    """Ranks on this machine, machines, whether the ranks have GPUs, and variables for them."""
    here = World.from_env(env)
    nnodes = _nodes(launch, here)
    gpus = 0 if launch.backend == "gloo" else visible_gpus(env)
    cores = len(os.sched_getaffinity(0))
    nproc = _ranks(launch, gpus, cores, here)
    if gpus and nproc > gpus:
        raise UserError(
            f"launch.nproc_per_node: {nproc} ranks, but this machine has {gpus} GPU(s), and one rank needs one GPU. "
            "Give at most that many, or launch.backend=gloo to train on the CPU."
        )
    if launch.backend == "nccl" and not gpus:
        raise UserError("launch.backend: nccl needs GPUs, and this machine shows none; use auto or gloo")
    added = world.thread_and_network_defaults(env, nproc, (launch.cpus_per_rank or 0) * nproc or cores, nnodes)
    return nproc, nnodes, gpus > 0, added


def visible_gpus(env: Mapping[str, str], device_files: Path = Path("/dev")) -> int:
    """GPUs that ranks will see, without torch: the driver's device files, and CUDA_VISIBLE_DEVICES."""
    devices = [entry for entry in device_files.glob("nvidia[0-9]*") if entry.name[6:].isdigit()]
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not devices:
        return len(devices)
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    # CUDA stops at the first that is no device.
    bad = next((place for place, name in enumerate(names) if _is_no_device(name, len(devices))), len(names))
    return min(bad, len(devices))


def _is_no_device(name: str, count: int) -> bool:
    return name.startswith("-") or (name.isdigit() and int(name) >= count)


def _nodes(launch: Launch, here: World) -> int:
    """Machines, where that number and the launcher go together."""
    _, most = node_range(launch.nnodes)
    if launch.launcher == "inline":
        return here.nnodes
    if launch.launcher == "local" and most > 1:
        raise UserError(
            f"launch.nnodes: {launch.nnodes} machines, but the local launcher starts ranks on this one; use "
            "launch.launcher=torchrun on each of them"
        )
    if most > 1 and launch.rdzv_endpoint is None:
        raise UserError(
            f"launch.rdzv_endpoint: {launch.nnodes} machines need a place to meet; give HOST:PORT of one of them, the "
            "same on all"
        )
    if most == 1 and launch.rdzv_endpoint is not None:
        raise UserError(
            f"launch.rdzv_endpoint: {launch.rdzv_endpoint} is for launch.launcher=torchrun with launch.nnodes of 2 or "
            "more; leave it out"
        )
    # With several machines, srun may well start one launcher on each.
    if here.world_size > (1 if most == 1 else here.nnodes):
        raise UserError(
            f"launch.launcher: this process is rank {here.rank} of {here.world_size} already ({here.source}), and each "
            "of them would start ranks of its own; use launch.launcher=inline (--launcher inline) there"
        )
    return most


def _ranks(launch: Launch, gpus: int, cores: int, here: World) -> int:
    if launch.launcher == "inline":
        if launch.nproc_per_node not in ("auto", here.local_world_size) and here.world_size == 1:
            raise UserError(
                f"launch.nproc_per_node: {launch.nproc_per_node} ranks, but the inline launcher is this one process; "
                "give launch.nproc_per_node=auto for one rank here, or use launch.launcher=local"
            )
        return here.local_world_size
    if launch.nproc_per_node != "auto":
        return launch.nproc_per_node
    return gpus or launch.nproc_without_gpu or max(1, cores // 2)
