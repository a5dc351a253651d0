"""A rank that torch's elastic agent has started: it says so, waits for its order, and is a rank like any other.

The agent hands no descriptors on; they are opened again through /proc, in the agent's process.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from ddpkit.errors import EXIT_STOPPED, EXIT_USER, UserError
from ddpkit.orphans import die_with_parent
from ddpkit.world import World

from . import rank
from .job import STOP_SIGNALS, Job, RankOrder

_LONGEST_LINE = 1 << 16
_UNTIL_ASKED_S = 2.0  # some looks of the agent


def main(places: str) -> int:
    """Do as the agent's launcher orders. Returns the exit code of the process."""
    agent = os.getppid()
    die_with_parent(agent)
    settings = json.loads(places)
    world = World.from_env()
    birth = {"local_rank": world.local_rank, "rank": world.rank, "world_size": world.world_size, "pid": os.getpid()}
    descriptor = _open(agent, settings["births"], os.O_WRONLY)
    os.write(descriptor, json.dumps(birth).encode() + b"\n")
    os.close(descriptor)
    told = _order(agent, settings["orders"][world.local_rank])
    with os.fdopen(_open(agent, told["job"], os.O_RDONLY)) as file:
        job = Job.from_json(json.load(file))
    given = told["order"]
    writers = {name: _open(agent, given[name], os.O_WRONLY) for name in RankOrder.PIPES}
    order = RankOrder(world.rank, {}, given["scratch"], **writers)
    if world.world_size not in (worlds := settings["worlds"]):
        # Seen with one machine's clock behind: an agent that trained as the only one, and said that all was well.
        rank.report_failure(
            order,
            UserError(
                f"{' or '.join(map(str, worlds))} ranks were asked for, and a world of {world.world_size} has formed: "
                "does each machine's launcher have the same nnodes, nproc_per_node and rdzv_endpoint, and the right "
                "time?"
            ),
            EXIT_USER,
            with_traceback=False,
        )
        return EXIT_USER
    code = rank.run(job, order)
    if code == EXIT_STOPPED:
        # To the agent, a rank that leaves like this is one that has failed, and it ends the others while they leave.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        if len(worlds) > 1:
            # Where machines come and go, the agents ask for this stop, each a moment after the other.
            signal.sigtimedwait(STOP_SIGNALS, _UNTIL_ASKED_S)
    return code


def _open(agent: int, descriptor: int, flags: int) -> int:
    return os.open(f"/proc/{agent}/fd/{descriptor}", flags)


def _order(agent: int, descriptor: int) -> dict[str, Any]:
    """Wait for this rank's order; those for ranks that were killed before they could take theirs are passed over."""
    reader = _open(agent, descriptor, os.O_RDONLY)
    with os.fdopen(reader, "rb", buffering=0) as file:
        while True:
            line = file.readline(_LONGEST_LINE)
            told: dict[str, Any] = json.loads(line)
            if told["pid"] == os.getpid():
                return told
