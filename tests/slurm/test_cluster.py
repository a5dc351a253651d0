"""What the other tests here take for granted of Slurm, and of the cluster that they run on."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.slurm import cluster as cluster_module
from tests.slurm.cluster import NODES, Cluster, alive

pytestmark = pytest.mark.slow

# Prints each signal as it comes; ends on the one given as its argument, if any.
TASK = """\
#!/bin/bash
for name in TERM CONT USR2; do
    trap "echo task \\$SLURM_PROCID got $name; [ $name != '$1' ] || exit 0" $name
done
echo "task $SLURM_PROCID starts, restarts: ${SLURM_RESTART_COUNT-none}"
while true; do sleep 0.1; done
"""


VARIABLES = (
    "SLURMD_NODENAME",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_PROCID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
)


def batch(commands: str) -> str:
    return f"#!/bin/bash\n{commands}\n"


@pytest.fixture
def task(cluster: Cluster) -> str:
    path = cluster.work / "task.sh"
    path.write_text(TASK)
    path.chmod(0o755)
    return str(path)


def wait_for_output(cluster: Cluster, job_id: int, text: str) -> None:
    output = cluster.job(job_id).output
    cluster.wait_until(lambda: output.exists() and text in output.read_text(), f"job {job_id} prints {text!r}")


def test_a_step_on_four_nodes(cluster: Cluster) -> None:
    # One short line each: srun mixes what the tasks print when it comes in pieces.
    dump = f"import json, os; print(json.dumps({{name: os.environ[name] for name in {VARIABLES}}}))"
    printed = cluster.run("srun", "-N4", "--ntasks-per-node=2", sys.executable, "-c", dump).stdout
    tasks = sorted((json.loads(line) for line in printed.splitlines()), key=lambda task: int(task["SLURM_PROCID"]))
    assert [int(task["SLURM_PROCID"]) for task in tasks] == list(range(8))
    assert [int(task["SLURM_LOCALID"]) for task in tasks] == [0, 1] * 4
    assert [int(task["SLURM_NODEID"]) for task in tasks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [task["SLURMD_NODENAME"] for task in tasks] == [name for name in NODES for _ in range(2)]
    for task in tasks:
        assert task["SLURM_STEP_NUM_TASKS"] == "8"
        assert task["SLURM_STEP_NUM_NODES"] == "4"
        assert task["SLURM_STEP_TASKS_PER_NODE"] == "2(x4)"
        assert task["SLURM_STEP_ID"] == "0"
        assert task["SLURM_LAUNCH_NODE_IPADDR"] == "127.0.0.1"


def test_preemption(cluster: Cluster, task: str) -> None:
    """Slurm requeues the job that stays until the grace is over, but not the one that leaves before."""
    options = ("--partition=hasty", "--nodes=1", "--exclusive", "--requeue", "--open-mode=append")
    stays = cluster.submit(batch(f"srun --unbuffered {task}"), *options)
    leaves = cluster.submit(batch(f"srun --unbuffered {task} TERM"), *options)
    requeues = cluster.submit(batch(f"srun --unbuffered {task} TERM; scontrol requeue $SLURM_JOB_ID"), *options)
    for job_id in (stays, leaves, requeues):
        wait_for_output(cluster, job_id, "task 0 starts, restarts: none")

    preemptor = cluster.submit(batch("true"), "--partition=high", "--nodes=4", "--exclusive")
    left = cluster.wait_for(leaves, "COMPLETED")
    assert left.restarts == 0
    asked = cluster.wait_for(requeues, "PENDING", restarts=1)
    assert "task 0 got TERM" in asked.output.read_text()
    assert cluster.job(stays).restarts == 0

    cluster.wait_for(preemptor, "COMPLETED")
    for job_id in (stays, requeues):
        again = cluster.wait_for_restart(job_id)
        assert again.restarts == 1
        wait_for_output(cluster, job_id, "task 0 starts, restarts: 1")
    output = cluster.job(stays).output.read_text()
    assert "task 0 got TERM" in output
    assert "task 0 got CONT" in output


def test_a_warning_before_the_time_limit(cluster: Cluster, task: str) -> None:
    # Slurm looks at time limits every 30 s only: this comes 10 to 40 s after the start.
    job_id = cluster.submit(batch(f"srun --unbuffered {task} USR2"), "--time=1", "--signal=USR2@20")
    ended = cluster.wait_for(job_id, "COMPLETED", timeout=90)
    assert "task 0 got USR2" in ended.output.read_text()


def test_a_lost_node(cluster: Cluster, task: str) -> None:
    script = batch(f"srun --unbuffered --ntasks-per-node=1 {task}")
    job_id = cluster.submit(script, "--nodes=2", "--requeue", "--open-mode=append")
    wait_for_output(cluster, job_id, "task 1 starts, restarts: none")
    lost = cluster.job(job_id).nodes[1]

    cluster.stop_node(lost)
    again = cluster.wait_for_restart(job_id)
    assert lost not in again.nodes
    wait_for_output(cluster, job_id, "task 1 starts, restarts: 1")

    cluster.start_node(lost)
    everywhere = cluster.run("srun", "-N4", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(everywhere.stdout.split()) == list(NODES)


def test_nothing_is_left_of_a_cluster(cluster: Cluster) -> None:
    with Cluster() as other:  # beside the one that runs already
        escapes = "trap '' TERM; env -i setsid sleep 1000 & echo escaped; sleep 1001; sleep 1002"
        job_id = other.submit(batch(f'srun bash -c "{escapes}"'), "--nodes=2", "--ntasks-per-node=1")
        wait_for_output(other, job_id, "escaped\nescaped\n")
        began = other.processes()
        assert [process.name() for process in began].count("slurmstepd") == 3  # of the batch shell, and of two tasks
        assert not set(began) & set(cluster.processes())
    assert [process for process in began if alive(process)] == []
    assert not other.directory.exists()
    assert cluster.run("srun", "-N4", "true").returncode == 0


def test_a_daemon_that_cannot_start(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    with socket.create_server(("", 0)) as taken:
        ports = [taken.getsockname()[1], *free_ports(len(NODES))]
        monkeypatch.setattr(cluster_module, "free_ports", lambda count: ports)
        other = Cluster()
        with pytest.raises(RuntimeError, match=r"(?s)slurmctld exited with 1:.*Address already in use"), other:
            pass
    assert other.processes() == []
    assert not Path(other.directory).exists()
