"""Who a process is, read from the environment."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

import ddpkit
from ddpkit import slurm
from ddpkit.errors import UserError
from ddpkit.world import World, allocation, cpus_per_task, survey, tasks_per_node, thread_and_network_defaults
from launch import cli

RANK_3 = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h0",
    "MASTER_PORT": "1234",
}

# As srun sets them for the second task of the second node.
STEP = {
    "SLURM_CLUSTER_NAME": "c",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "8",  # of the job
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
ONE_NODE = STEP | {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1677328385",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def _numbers(world: World) -> tuple[int, int, int, int]:
    return world.rank, world.world_size, world.local_rank, world.local_world_size


@pytest.fixture(autouse=True)
def scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*command: str) -> str:
        return {"hostnames": "n1\nn2\n", "node": "NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=x"}[command[2]]

    monkeypatch.setattr(slurm, "_run", answer)


def test_no_launcher_is_a_world_of_one() -> None:
    for env in ({}, {"LOCAL_RANK": "0", "MASTER_PORT": "x"}):
        assert World.from_env(env) == World(0, 1, 0, 1)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"])
def test_a_single_process_is_the_first_of_all(name: str) -> None:
    with pytest.raises(UserError, match=rf"the environment sets {name}=1 but not .*Unset {name}"):
        World.from_env({name: "1"})
    assert name in survey({name: "1"})[-1][1]
    assert World.from_env(RANK_3 | {name: "1"}).rank == 3  # who decides is somebody else


def test_two_kinds_of_mpi_that_contradict_each_other() -> None:
    assert World.from_env(OPEN_MPI | HYDRA | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}).rank == 1
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_RANK=0 \(Open MPI\) and PMI_RANK=1 \(MPICH\) contradict"):
        World.from_env(OPEN_MPI | HYDRA | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})


def test_the_standard_variables() -> None:
    world = World.from_env(RANK_3)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (3, 4, 1, 2)
    assert (world.nnodes, world.node_rank, world.is_main) == (2, 1, False)
    assert (world.master_addr, world.master_port, world.agent_store) == ("h0", 1234, False)


def test_hand_set_variables_need_no_local_ones() -> None:
    world = World.from_env({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    assert (world.local_rank, world.local_world_size, world.nnodes) == (1, 2, 1)
    assert World.from_env({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1  # nobody to meet


def test_what_is_written_is_read_back() -> None:
    world = World(3, 4, 1, 2, "127.0.0.1", 5, agent_store=True, restart_count=2)
    again = World.from_env(world.to_env())
    assert again == World(3, 4, 1, 2, "127.0.0.1", 5, True, 2, source=again.source, has_launcher=True)
    assert World.from_env(World().to_env()).world_size == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, r"sets RANK=3 but not WORLD_SIZE.*Unset RANK"),
        ({"RANK": None}, r"sets WORLD_SIZE=4 but not RANK"),
        ({"RANK": "x"}, r"RANK='x' in the environment is not a whole number"),
        ({"RANK": ""}, r"RANK=''"),
        ({"WORLD_SIZE": "4.0"}, r"WORLD_SIZE='4.0'"),
        ({"RANK": "-1"}, r"RANK='-1'"),
        ({"RANK": "4"}, r"RANK=4 is not within WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, r"RANK=3 is not within WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK=2 is not within LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "3"}, r"WORLD_SIZE=4 is not a multiple of LOCAL_WORLD_SIZE=3"),
        ({"MASTER_ADDR": None}, r"WORLD_SIZE=4 needs MASTER_ADDR"),
        ({"MASTER_ADDR": ""}, r"WORLD_SIZE=4 needs MASTER_ADDR"),
        ({"MASTER_PORT": None}, r"WORLD_SIZE=4 needs MASTER_PORT"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT='http'"),
        ({"MASTER_PORT": "0"}, r"MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": "65536"}, r"MASTER_PORT=65536 is no port"),
    ],
)
def test_half_set_and_contradicting_variables_are_named(changes: dict[str, str | None], words: str) -> None:
    env = {name: value for name, value in (RANK_3 | changes).items() if value is not None}
    with pytest.raises(UserError, match=words):
        World.from_env(env)


def test_a_slurm_step() -> None:
    world = World.from_env(STEP)
    assert _numbers(world) == (3, 4, 1, 2)
    assert (world.master_addr, world.master_port, world.job) == ("10.0.0.7", None, "slurm c/17/0/")
    assert world.source.startswith("a Slurm step, by SLURM_JOB_ID=17, SLURM_STEP_ID=0, SLURM_PROCID=3")
    assert World.from_env(ONE_NODE).master_addr == "127.0.0.1"


def test_every_step_and_every_restart_is_another_job() -> None:
    others = [{"SLURM_JOB_ID": "18"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_CLUSTER_NAME": "d"}]
    assert len({World.from_env(ONE_NODE | other).job for other in [{}, *others]}) == 5


@pytest.mark.parametrize(
    "env",
    [
        # The batch shell of sbatch, and what an allocation leaks into a python of one's own.
        {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"},
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of an interactive salloc
    ],
)
def test_inside_slurm_without_a_step_is_one_process(env: dict[str, str]) -> None:
    world = World.from_env(env)
    assert _numbers(world) == (0, 1, 0, 1)
    assert "in Slurm's job 17, but not started by srun" in world.source


def test_mpi() -> None:
    for env, who in ((OPEN_MPI, "Open MPI, by OMPI_COMM_WORLD_RANK=1"), (HYDRA, "MPICH or a relative")):
        world = World.from_env(env)
        assert _numbers(world) == (1, 2, 1, 2)
        assert (world.master_addr, world.master_port) == ("127.0.0.1", None)
        assert world.source.startswith(who)
    assert World.from_env(OPEN_MPI).job == "openmpi 1677328385"
    assert World.from_env(HYDRA).job == f"hydra {os.getppid()}"
    far = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "h0"}
    assert World.from_env(OPEN_MPI | far).nnodes == 2


@pytest.mark.parametrize(
    ("env", "source"),
    [
        (STEP | RANK_3, "torchrun, ddpkit or a person"),
        (OPEN_MPI | RANK_3, "torchrun, ddpkit or a person"),
        (STEP | OPEN_MPI, "Open MPI"),  # mpirun starts its own helpers by srun
        (STEP | HYDRA, "MPICH"),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "a Slurm step"),  # srun --mpi=pmi2
    ],
)
def test_the_innermost_launcher_decides(env: dict[str, str], source: str) -> None:
    assert World.from_env(env).source.startswith(source)


def test_a_master_that_was_chosen_is_taken() -> None:
    chosen = {"MASTER_ADDR": "h9", "MASTER_PORT": "77"}
    for env in (STEP, OPEN_MPI, HYDRA):
        world = World.from_env(env | chosen)
        assert (world.master_addr, world.master_port) == ("h9", 77)


@pytest.mark.parametrize(
    ("env", "changes", "words"),
    [
        *(
            (STEP, {name: None}, rf"sets SLURM_STEP_ID=0 but not {name}: srun sets all")
            for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
        ),
        (STEP, {"SLURM_STEP_NODELIST": None}, r"sets SLURM_STEP_ID but not SLURM_STEP_NODELIST"),
        (STEP, {"SLURM_PROCID": "4"}, r"SLURM_PROCID=4 is not within SLURM_STEP_NUM_TASKS=4"),
        (STEP, {"SLURM_LOCALID": "2"}, r"SLURM_LOCALID=2 is not within"),
        (STEP, {"SLURM_PROCID": "2"}, r"SLURM_PROCID=2 and SLURM_LOCALID=1 do not fit.*--distribution=block"),
        (STEP, {"SLURM_STEP_NUM_TASKS": "8"}, r"TASKS_PER_NODE=2\(x2\) and SLURM_STEP_NUM_TASKS=8 contradict"),
        (STEP, {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, r"TASKS_PER_NODE=3,1: every node needs the same number"),
        (STEP, {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, r"TASKS_PER_NODE='2x2' in the environment is not of the form"),
        (STEP, {"SLURM_STEP_ID": "x"}, r"SLURM_STEP_ID='x'"),
        *((OPEN_MPI, {name: None}, rf"but not {name}: mpirun sets") for name in list(OPEN_MPI)[:4]),
        *((HYDRA, {name: None}, rf"but not {name}: mpiexec sets") for name in HYDRA),
        (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "1"}, r"OMPI_COMM_WORLD_RANK=1 is not within OMPI_COMM_WORLD_SIZE=1"),
        (OPEN_MPI, {"PMIX_NAMESPACE": None}, r"OMPI_COMM_WORLD_SIZE=2 needs MASTER_PORT as well"),
        (HYDRA, {"PMI_SIZE": "4", "PMI_RANK": "3"}, r"PMI_SIZE=4 on 2 machines needs MASTER_ADDR"),
        (RANK_3, {"LOCAL_RANK": "0"}, r"RANK=3 and LOCAL_RANK=0 do not fit LOCAL_WORLD_SIZE=2"),
    ],
)
def test_what_srun_and_mpirun_set_is_whole(env: dict[str, str], changes: dict[str, Any], words: str) -> None:
    changed = {name: value for name, value in (env | changes).items() if value is not None}
    with pytest.raises(UserError, match=words):
        World.from_env(changed)


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ({"RANK": "0"}, r"sets RANK=0 but not WORLD_SIZE: .* Unset RANK"),
        (
            {"RANK": "0", "WORLD_SIZE": "1"},
            r"RANK=0 and WORLD_SIZE=1 contradict SLURM_PROCID=3 and SLURM_STEP_NUM_TASK",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4"}, r"to be rank 3 of 4; unset SLURM_STEP_ID for what they say"),
        ({"RANK": "5", "WORLD_SIZE": "8"}, r"RANK=5 and WORLD_SIZE=8 contradict SLURM_PROCID=3"),
        ({"RANK": "6", "WORLD_SIZE": "8"}, None),  # the second of two that this task has started
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, None),  # torchrun's, in each task
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_ID": str(0xFFFFFFFA)}, None),  # in the shell of an salloc
        ({"RANK": "0", "WORLD_SIZE": "2"} | OPEN_MPI, None),
    ],
)
def test_ranks_set_by_hand_inside_a_step(
    rank: dict[str, str], words: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = STEP | {"MASTER_ADDR": "h0", "MASTER_PORT": "1"} | rank
    if words is None:
        assert World.from_env(env).rank == int(rank["RANK"])
        return
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):  # as a plain script sees it
        ddpkit.runtime()
    assert cli.main(["launch", "--nproc-per-node", "2", __file__]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"ddpkit: .*{words}", said) and said.count("\n") == 1


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("1(x2),3,1(x1)") == [1, 1, 3, 1]
    for text in ("", "2(x0)", "0", "2(x3", "2, 1", "(x2)"):
        with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
            tasks_per_node(text)


def test_scontrol_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match=r"scontrol show hostnames n\[1-2\].*does not say where rank 0 is.*Set MASTER_ADDR"
    ):
        World.from_env(STEP)


def test_defaults_leave_what_the_user_has_set() -> None:
    assert thread_and_network_defaults({}, 3, 8) == {
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert thread_and_network_defaults({}, 8, 2)["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "9", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": ""}
    assert thread_and_network_defaults(chosen, 3, 8) == {}


def test_cores_of_a_task() -> None:
    assert cpus_per_task({"SLURM_CPUS_PER_TASK": "6"}) == 6
    assert cpus_per_task({}) is None


def test_the_last_job_of_an_array_is_not_taken_for_the_whole_array() -> None:
    """Its number is the array's: Slurm would tell of another job by it, and requeue all of them."""
    env = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    found = allocation(env)
    assert found is not None and (found.job_id, found.array_index) == ("5_3", 3)
    alone = allocation({"SLURM_JOB_ID": "5"})
    assert alone is not None and (alone.job_id, alone.array_index) == ("5", None)
