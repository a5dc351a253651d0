"""SIGKILL at places chosen beforehand, and the run started again: the same bits as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events, start, to_the_end, tree

# Each is the end of an attempt, of all its ranks at once (the launcher would end the others anyway, only later).
TRAINING = Fault("train", 6, whom="group")
STARTING = Fault("build", rank=1, whom="group")
WRITING = Fault("open", 1, path="own-00000", whom="group")
BEFORE_COMMIT = Fault("os.rename", 1, path="/.step-", whom="group")
PRUNING = Fault("shutil.rmtree", 2, whom="group")
EVALUATING = Fault("eval", 2, whom="group")
RESTORING = Fault("open", 1, path="metrics.jsonl", whom="group")

VARIANTS: dict[str, tuple[int, dict[str, Any], list[Fault]]] = {
    "one process": (1, {}, [TRAINING, WRITING, BEFORE_COMMIT, PRUNING, EVALUATING, RESTORING]),
    "two ranks with loader workers": (
        2,
        {"data__loader": {"num_workers": 2}},
        [STARTING, TRAINING, Fault("train", 9, rank=1, whom="group"), Fault("fetch", 5, rank=1, whom="self")],
    ),
    "three ranks, a rank killed alone": (
        3,
        {"checkpoint": {"every_steps": 1, "keep": 1}},
        [Fault("train", 5, rank=2), Fault("open", 3, rank=1, path="replicated-00001"), Fault("eval", 1, rank=0)],
    ),
    "four ranks, micro batches, an epoch's scheduler, an incomplete last batch": (
        4,
        {
            "data__micro_batch_size": 1,
            "data__drop_last": False,
            "data__global_batch_size": 11,
            "scheduler": {"factory": "torch.optim.lr_scheduler:StepLR", "args": {"step_size": 1}, "interval": "epoch"},
        },
        [TRAINING, EVALUATING, Fault("os.rename", 2, path="/.step-", whom="group")],
    ),
    "two ranks, in training while a save is written": (
        2,
        {},
        [
            Fault("open", 1, path="own-00000", do="", until=99),  # the first save is not written before the kill
            TRAINING,
            Fault("os.rename", 2, path="/.step-", do="", until=99),  # the second one not committed
            Fault("train", 11, rank=1, whom="group"),
            Fault("open", 1, rank=1, path="replicated-00001", do="", until=99),
            Fault("train", 3, rank=1, do="SIGKILL", whom="self"),
        ],
    ),
    "evaluation by steps, an end in mid-epoch, saves that training waits for": (
        2,
        {
            "checkpoint__asynchronous": False,
            "train__eval_every": {"steps": 4},
            "train__epochs": None,
            "train__max_steps": 15,
        },
        [EVALUATING, Fault("eval", 4, rank=1, whom="group"), Fault("train", 7, whom="group")],
    ),
    "a stream": (
        2,
        {"data__train__args": {"length": 50, "stream": True}, "data__loader": {"num_workers": 2}},
        [TRAINING, Fault("train", 3, rank=1, whom="group"), BEFORE_COMMIT],
    ),
    "batch statistics of each rank's own, half precision": (
        2,
        {"model__sync_batchnorm": False, "train__precision": "fp16"},
        [TRAINING, EVALUATING],
    ),
    "clipped, decayed, three ranks": (
        3,
        {"train__clip_grad_norm": 0.1, "optimizer": {"factory": "torch.optim:SGD", "args": {"momentum": 0.9}}},
        [TRAINING, TRAINING, Fault("train", 10, whom="group")],
    ),
}


# Left to the slower suites, so that the README's test command stays quick.
SLOW = {
    "evaluation by steps, an end in mid-epoch, saves that training waits for",
    "a stream",
    "batch statistics of each rank's own, half precision",
    "clipped, decayed, three ranks",
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VARIANTS]
)
def test_a_killed_run_ends_with_the_same_bits(variant: str, tmp_path: Path) -> None:
    ranks, changes, faults = VARIANTS[variant]
    assert start(tree(tmp_path / "reference", **changes), ranks) == "done"
    env = plan(tmp_path / "faults", *faults)
    ends = to_the_end(tree(tmp_path / "killed", **changes), ranks, env)
    assert not pending(tmp_path / "faults")
    assert len(ends) > 1
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert len(events(tmp_path / "killed", "finished")) == 1


def test_a_kill_at_the_last_step_and_right_at_the_end(tmp_path: Path) -> None:
    config = tree(tmp_path / "run", checkpoint={"every_steps": None, "keep": 2})
    reference = tree(tmp_path / "reference", checkpoint={"every_steps": None, "keep": 2})
    assert start(reference, 2) == "done"
    env = plan(
        tmp_path / "faults",
        Fault("train", 18, rank=1, whom="group"),  # the last step: nothing has ever been saved
        Fault("os.rename", 1, path="/.step-", whom="group"),  # with everything trained, just before the commit
        Fault("open", 1, path="/checkpoints'", whom="group"),  # just after it, before the end was noted
    )
    assert to_the_end(config, 2, env)[:-1] == ["killed", "killed", "killed"]
    assert not pending(tmp_path / "faults")
    assert_same_end(tmp_path / "run", tmp_path / "reference")


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "os.truncate", "shutil.rmtree")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_random_operations_on_files(ranks: int, tmp_path: Path) -> None:
    """Saves, restores, prunings and records are made of these; any of them may be the last that a process does."""
    chance = random.Random(ranks)
    assert start(tree(tmp_path / "reference"), ranks) == "done"
    for number in range(8):
        faults = [
            Fault(
                chance.choice(FILE_EVENTS),
                chance.randint(1, 9),
                chance.randrange(ranks),
                path=f"run-{number}",
                whom="group",
            )
            for _ in range(6)
        ]
        env = plan(tmp_path / f"faults-{number}", *faults)
        to_the_end(tree(tmp_path / f"run-{number}"), ranks, env)
        assert_same_end(tmp_path / f"run-{number}", tmp_path / "reference")
