"""Who this process is among the ranks. The one place that reads environment variables; imports nothing of torch.

A launcher (ours, torchrun, or a person) describes each rank by the standard variables; `World.from_env` reads them
once into a frozen value, and everything else takes that value as an argument.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ddpkit.errors import UserError


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
    source: str = "no launcher"
    """Where the numbers come from, for people."""

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
        """Read the variables that torchrun, ddpkit's launchers and most others set.

        Args:
            env: the variables; by default this process's own environment.

        Raises:
            UserError: some are set and others not, one is no number, or they contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        required = ("RANK", "WORLD_SIZE")
        if missing := [name for name in required if name not in env]:
            given = next(name for name in required if name in env)
            raise UserError(
                f"the environment sets {given}={env[given]} but not {missing[0]}: a launcher sets both. "
                f"Unset {given} for a single process, or start the ranks with a launcher."
            )
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_world_size = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None
        local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else None
        if local_world_size is None:
            local_world_size = world_size  # hand-set variables on one machine
        if local_rank is None:
            local_rank = rank % max(local_world_size, 1)
        world = cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            master_addr=env.get("MASTER_ADDR"),
            master_port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else None,
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in env else 0,
            source="RANK, WORLD_SIZE, ... in the environment",
        )
        world._check()
        return world

    def _check(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"RANK={self.rank} is not within WORLD_SIZE={self.world_size}: ranks count from 0")
        if not 0 <= self.local_rank < self.local_world_size:
            raise UserError(
                f"LOCAL_RANK={self.local_rank} is not within LOCAL_WORLD_SIZE={self.local_world_size}: "
                "local ranks count from 0"
            )
        if self.world_size % self.local_world_size:
            raise UserError(
                f"WORLD_SIZE={self.world_size} is not a multiple of LOCAL_WORLD_SIZE={self.local_world_size}: "
                "every node needs the same number of ranks"
            )
        if self.world_size > 1 and (self.master_addr is None or self.master_port is None):
            name = "MASTER_ADDR" if self.master_addr is None else "MASTER_PORT"
            raise UserError(
                f"WORLD_SIZE={self.world_size} needs {name} as well: where rank 0 meets the others. "
                "Start the ranks with a launcher (ddpkit launch, torchrun), or set it."
            )
        if self.master_port is not None and not 0 < self.master_port < 1 << 16:
            raise UserError(f"MASTER_PORT={self.master_port} is no port: they go from 1 to 65535")

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


def environment() -> dict[str, str]:
    """A copy of this process's environment, for launchers that compose that of their children."""
    return dict(os.environ)


def adopt(variables: Mapping[str, str]) -> None:
    """Make a forked rank's environment what an exec'd one would have been given."""
    os.environ.update(variables)


def thread_and_network_defaults(env: Mapping[str, str], local_world_size: int, cores: int) -> dict[str, str]:
    """Variables for ranks on one machine, leaving what the user has set.

    Threads: the cores divided by the ranks, or they fight over them. Network: gloo and NCCL otherwise take the
    host name's address, which may be public; ranks on one machine need the loopback only.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // local_world_size)),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    return {name: value for name, value in wanted.items() if name not in env}


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise UserError(f"{name}={env[name]!r} in the environment is not a whole number of 0 or more")
    return value
