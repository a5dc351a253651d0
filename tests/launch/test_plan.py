"""Plans: what would be started, as a value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ddpkit import config as configs
from ddpkit.errors import UserError
from launch import plan as plans
from launch.attempts import report_failure
from launch.causes import ENDED_BY_US, cause_of, explain, is_consequence_like, order_by_cause
from launch.job import Failure, Job
from launch.plan import Plan, visible_gpus


def _plan(*overrides: str, env: dict[str, str], gpus: int = 0, cores: int = 8, job: Job | None = None) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpkit.world.environment", lambda: env)
        patch.setattr(plans, "visible_gpus", lambda _: gpus)
        patch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        return plans.make(
            configs.load_launch(overrides),
            job or Job("script", target="train.py", argv=("--lr", "1")),
            run_dir=Path("runs/x"),
            tee_all=False,
            command=("ddpkit", "launch"),
            deterministic=True,
            global_batch_size=16,
        )


def test_golden_plans() -> None:
    assert _plan(env={}).describe() == (
        "launcher: local\nranks: 4\nstart_method: warm\nmax_restarts: 0\njob: script train.py\n"
        "env: GLOO_SOCKET_IFNAME=lo\nenv: NCCL_SOCKET_IFNAME=lo\nenv: OMP_NUM_THREADS=2"
    )
    chosen = ("launch.nproc_per_node=3", "launch.start_method=spawn", "launch.max_restarts=2")
    assert _plan(*chosen, env={"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth0"}).describe() == (
        "launcher: local\nranks: 3\nstart_method: spawn\nmax_restarts: 2\njob: script train.py\n"
        "env: NCCL_SOCKET_IFNAME=lo"
    )
    assert _plan(env={}, gpus=2, job=Job("run")).describe() == (
        "launcher: local\nranks: 2\nstart_method: warm\nmax_restarts: 0\njob: run runs/x\n"
        "env: CUBLAS_WORKSPACE_CONFIG=:4096:8\nenv: GLOO_SOCKET_IFNAME=lo\nenv: NCCL_SOCKET_IFNAME=lo\n"
        "env: OMP_NUM_THREADS=4"
    )
    assert _plan("launch.launcher=inline", env={}, cores=3).describe().startswith("launcher: inline\nranks: 1\n")


def test_inline_ranks_that_somebody_else_has_started() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "h0", "MASTER_PORT": "1"}
    plan = _plan("launch.launcher=inline", env=env)
    assert (plan.nproc, plan.nnodes, plan.world_size) == (2, 2, 4)
    assert plan.env == {"OMP_NUM_THREADS": "4"}  # the loopback would not do
    for launcher in ("local", "torchrun"):
        with pytest.raises(UserError, match=r"this process is rank 3 of 4 already \(torchrun, ddpkit or a person, by"):
            _plan(f"launch.launcher={launcher}", env=env)


def test_a_range_of_nodes() -> None:
    meet = ("launch.launcher=torchrun", "launch.nproc_per_node=4", "launch.nnodes=2:3", "launch.rdzv_endpoint=h0:1")
    plan = _plan(*meet, env={})
    assert plan.describe().startswith("launcher: torchrun\nranks: 8 to 12\nnodes: 2 to 3, which meet at h0:1\n")
    assert (plan.fewest_nodes, plan.nnodes, plan.world_size) == (2, 3, 12)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UserError, match=r"16 samples cannot be split over 20 ranks"):
        _plan(*meet, "launch.nnodes=2:5", env={})


def test_a_launcher_on_each_node() -> None:
    env = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    env |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_ADDR": "h0"}
    meet = ("launch.launcher=torchrun", "launch.nproc_per_node=4", "launch.nnodes=2", "launch.rdzv_endpoint=h0:1")
    assert _plan(*meet, env=env).describe() == (
        "launcher: torchrun\nranks: 8\nnodes: 2, which meet at h0:1\nmax_restarts: 0\n"
        "job: script train.py\nenv: OMP_NUM_THREADS=2"
    )


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (("launch.nproc_per_node=3",), 2, "launch.nproc_per_node: 3 ranks, but this machine has 2 GPU(s)"),
        (("launch.backend=nccl",), 0, "launch.backend: nccl needs GPUs"),
        (("launch.nproc_per_node=17",), 0, "data.global_batch_size: 16 samples cannot be split over 17 ranks"),
        (("launch.launcher=inline", "launch.nproc_per_node=2"), 0, "launch.nproc_per_node: 2 ranks, but the inline"),
    ],
)
def test_refusals(overrides: tuple[str, ...], gpus: int, words: str) -> None:
    with pytest.raises(UserError, match="^" + words.replace("(", r"\(").replace(")", r"\)")):
        _plan(*overrides, env={}, gpus=gpus)


def test_more_ranks_than_gpus_are_fine_on_the_cpu() -> None:
    assert _plan("launch.nproc_per_node=3", "launch.backend=gloo", env={}, gpus=2).nproc == 3


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        *((None, 3), ("", 0), ("0", 1), ("2,0", 2), ("0,1,2,3", 3), ("1,-1,2", 1), ("-1", 0), ("7,0", 0), ("0,7", 1)),
        ("GPU-aa,GPU-bb", 2),
    ],
)
def test_visible_gpus(tmp_path: Path, chosen: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    env = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert visible_gpus(env, tmp_path) == count
    assert visible_gpus(env, tmp_path / "none") == 0


def test_causes_come_before_consequences() -> None:
    told = [
        Failure(0, "h", 1.0, 1, "RuntimeError", "[gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1"),
        Failure(1, "h", 1.1, 1, "RankFailed", "rank 3 failed: ValueError: x"),
        Failure(2, "h", 1.3, 1, "RuntimeError", "of the user's own"),
        Failure(3, "h", 1.2, -9, message="SIGKILL"),
        Failure(4, "h", 1.0, 1, "DistBackendError", "NCCL error in ..."),
    ]
    failures = [replace(each, is_consequence=is_consequence_like(each.kind, each.message)) for each in told]
    assert [failure.rank for failure in order_by_cause(failures)] == [3, 2, 0, 4, 1]
    assert order_by_cause([]) == ()


def test_a_dead_worker_that_is_told_of_late_was_where_the_script_was() -> None:
    try:
        raise EOFError
    except EOFError as lost:
        told = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        told.__context__ = lost
    cause = cause_of(told)
    assert cause.kind == "LoaderWorkerDied" and "raise EOFError" in cause.traceback


def test_of_a_stall_the_rank_that_others_wait_for_has_failed() -> None:
    noticed = Failure(2, "here", 1.0, 1, "Stalled", "no progress", is_consequence=True, late=(1, "there"))
    ended = [Failure(rank, "there", 2.0, -9, message=ENDED_BY_US) for rank in (0, 1)]
    told = Failure(3, "here", 0.9, 1, "RankFailed", "rank 2: Stalled: no progress", is_consequence=True)
    first, *others = order_by_cause([*ended, told, Failure.from_json(noticed.to_json())])
    assert (first.rank, first.host, first.kind) == (1, "there", "Stalled")
    assert [each.rank for each in others] == [3, 0]
    crashed = Failure(3, "here", 3.0, -11, message="SIGSEGV")  # a failure of its own, and the cause of all else
    assert [each.rank for each in order_by_cause([noticed, *ended, crashed])] == [3, 2, 0, 1]


def test_consequences_share_a_line() -> None:
    pair = "[/src/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:{}. This is typically ..."
    failures = (
        Failure(70, "h", 1.0, -6, message=explain(-6), last_lines=("a word", "another")),
        *(Failure(rank, "h", 1.1, 1, "RuntimeError", pair.format(rank), is_consequence=True) for rank in range(40)),
        Failure(40, "h", 1.2, 1, "RankFailed", "rank 70 failed: this. And that", is_consequence=True),
        Failure(41, "h", 1.3, 1, "ValueError", "of its own. With more\nlines"),
        Failure(42, "h", 1.4, -6, message=explain(-6)),
    )
    assert report_failure(failures, None).splitlines() == [
        "rank 70 on h failed: SIGABRT (native code gave up)",
        "  its last words:",
        "  | a word",
        "  | another",
        "  the same on rank(s) 42",
        f"  then ranks {', '.join(map(str, range(16)))} and 24 more: RuntimeError: Connection closed by peer",
        "  then rank 40: RankFailed: rank 70 failed: this",
        "  then rank 41: ValueError: of its own. With more",
        "run with --run-dir DIR to keep each rank's output",
    ]


def test_an_exception_around_a_consequence_is_one_too() -> None:
    def wrapped() -> None:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1")
        except RuntimeError as error:
            raise ValueError("the step failed") from error

    with pytest.raises(ValueError) as caught:
        wrapped()
    assert cause_of(caught.value).is_consequence
    assert not cause_of(ValueError("the step failed")).is_consequence


def test_exit_statuses_in_words() -> None:
    assert explain(7) == "exit code 7"
    assert explain(-9).startswith("SIGKILL (killed from outside")
    assert explain(-15) == "SIGTERM"
    assert explain(-41) == "signal 41"
