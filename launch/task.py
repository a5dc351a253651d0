"""What srun starts in each task of a job of ours: the launcher of one node, or of one rank.

``child.py task DIR``: DIR is where the submission has left the plan. The task with rank zero leads the others. Its end
is the job's, unless Slurm starts the job again: then the same happens once more, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil

from ddpkit import rendezvous, world
from ddpkit.errors import EXIT_DONE, DdpkitError, UserError
from ddpkit.world import Allocation, World

from . import attempts, group
from .job import STOP_SIGNALS
from .members import FollowingNode, LeadingNode, Membership
from .output import Output
from .plan import Plan, visible_gpus
from .ranks import Place
from .requests import passing_on_signals, signal_number


def main(directory: str) -> int:
    """Do this task's part of the job that was submitted from ``directory``. Gives the exit code of the whole job."""
    try:
        me = World.from_env()
        if me.allocation is None:
            raise UserError("this is for tasks of a Slurm job: `ddpkit run CONFIG --launcher slurm` submits one")
        return _Task(Path(directory), me, me.allocation).run()
    except DdpkitError as error:
        _say(str(error))
        return error.exit_code


def files(directory: Path, allocation: Allocation) -> tuple[Path, Path]:
    """Where the plan of this job is, one of an array perhaps, and where its outcome goes."""
    suffix = "" if allocation.array_index is None else f"-{allocation.array_index}"
    return directory / f"plan{suffix}.json", directory / f"outcome{suffix}.json"


class _Task:
    def __init__(self, directory: Path, me: World, allocation: Allocation) -> None:
        plan, self._outcome = files(directory, allocation)
        self._me = me
        text = plan.read_bytes()
        self._token = hashlib.sha256(text).hexdigest()
        self._plan = _here(Plan.from_json(json.loads(text)), directory)

    def run(self) -> int:
        """Do it. Gives the exit code."""
        try:
            return self._run()
        except DdpkitError as error:
            if self._me.is_main:
                self._tell_outcome(group.Ended(error.exit_code, report=str(error)))
            raise

    def _run(self) -> int:
        place = _place(self._plan, self._me)
        env = _environment(self._plan, self._me, place)
        nproc = self._plan.nproc if self._plan.start_method == "warm" else 1
        membership = Membership(
            place=self._me.rank,
            count=self._me.world_size,
            meeting=f"launchers of {self._me.job}",
            token=self._token,
            gpus=None if self._plan.backend == "gloo" else visible_gpus(world.environment()),
        )
        if self._me.is_main:
            return self._lead(nproc, env, place, membership)
        return self._follow(nproc, env, place, membership)

    def _lead(self, nproc: int, env: dict[str, str], place: Place, membership: Membership) -> int:
        plan = self._plan
        self._outcome.unlink(missing_ok=True)  # of a job that had ended, and was requeued by hand
        with ExitStack() as stack:
            listener = None
            if membership.count > 1:
                listener = stack.enter_context(rendezvous.meeting_point(place.master_addr, membership.meeting))
            node = LeadingNode(nproc, plan.start_method, env, place, membership, listener)
            try:
                ended = group.run(plan, node)
                if not ended.comes_back:
                    self._tell_outcome(ended)  # now: somebody may end this job soon, and the followers take their time
            finally:
                node.finish()
        return ended.exit_code

    def _follow(self, nproc: int, env: dict[str, str], place: Place, membership: Membership) -> int:
        plan = self._plan
        assert plan.run_dir is not None  # `_here` sees to it
        signals = (*STOP_SIGNALS, signal_number(plan.warning_signal))
        following = FollowingNode(nproc, plan.start_method, env, place, membership)
        with following as node, passing_on_signals(node.requests, signals):
            node.join()
            while (order := node.await_order()) is not None:
                job = replace(plan.job, options=plan.job.options | {"attempt": order["attempt"]})
                node.attempt(job, order, Output(attempts.log_dir(plan.run_dir, order["attempt"]), plan.tee_all))
        return EXIT_DONE  # the leader's exit code is the job's

    def _tell_outcome(self, ended: group.Ended) -> None:
        """For those who wait for the job: Slurm forgets it, and knows neither reports nor results."""
        outcome = ended.outcome
        tree = {
            "exit_code": ended.exit_code,
            "failures": [failure.to_json() for failure in outcome.failures] if outcome is not None else [],
            "results": list(outcome.results) if outcome is not None else [],
            "report": ended.report,
        }
        attempts.write(self._outcome, tree)


def _here(plan: Plan, directory: Path) -> Plan:
    """The plan as it is carried out here: this process is the ranks' launcher, not the one that submitted the job."""
    options = plan.job.options | {"launcher_pid": os.getpid()}
    # What keeps no records has logs all the same, where all nodes can write.
    return replace(plan, job=replace(plan.job, options=options), run_dir=plan.run_dir or directory)


def _place(plan: Plan, me: World) -> Place:
    """Where this task's ranks lie among all.

    Raises:
        UserError: these are not the tasks that were asked for.
    """
    address = me.master_addr or "127.0.0.1"
    asked = plan.nnodes if plan.start_method == "warm" else plan.world_size
    per_node = 1 if plan.start_method == "warm" else plan.nproc
    if (me.world_size, me.local_world_size) != (asked, per_node):
        raise UserError(
            f"{asked} task(s) were asked for, {per_node} on each of {plan.nnodes} node(s), and there are "
            f"{me.world_size}, {me.local_world_size} on a node ({me.source}); leave the numbers of tasks and nodes to "
            "launch.nnodes and launch.nproc_per_node"
        )
    if plan.start_method == "warm":
        return Place(me.rank * plan.nproc, plan.world_size, 0, plan.nproc, address)
    return Place(me.rank, plan.world_size, me.local_rank, plan.nproc, address)


def _environment(plan: Plan, me: World, place: Place) -> dict[str, str]:
    """Variables for the ranks of this node: decided here, on the machine that they are for."""
    env = world.environment()
    # As asked for, where something was: whether Slurm also binds tasks to cores is the cluster's affair.
    per_task = world.cpus_per_task(env)
    cores = per_task * me.local_world_size if per_task is not None else len(os.sched_getaffinity(0))
    added = world.thread_and_network_defaults(env, plan.nproc, cores, plan.nnodes)
    # A host name, which gloo would take otherwise, may lead to another network than the nodes' own, or nowhere.
    interface = _interface_towards(place.master_addr)
    if plan.nnodes > 1 and interface is not None and "GLOO_SOCKET_IFNAME" not in env:
        added["GLOO_SOCKET_IFNAME"] = interface
    return added | plan.env


def _interface_towards(address: str) -> str | None:
    """The network interface through which ``address`` is reached, as the kernel routes it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return name
    return None


def _say(text: str) -> None:
    print(f"ddpkit: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
