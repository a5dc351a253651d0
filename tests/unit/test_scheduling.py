"""Schedules from a config, step by step beside torch's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

from ddpkit import scheduling
from ddpkit.config import Scheduler
from ddpkit.errors import ConfigError, UserError
from ddpkit.scheduling import Schedule
from ddpkit.state import pack, unpack

HERE = "tests.unit.test_scheduling"
TORCH = "torch.optim.lr_scheduler"


def decay(epoch: int) -> float:
    return 0.9**epoch


def make_decay(rate: float) -> Callable[[int], float]:
    return lambda epoch: rate**epoch


def own(opt: torch.optim.Optimizer, rate: float) -> Any:
    return torchs.ExponentialLR(opt, rate)


def _warmed_up(optimizer: torch.optim.Optimizer) -> Any:
    warm, main = torchs.LinearLR(optimizer, 0.1, total_iters=4), torchs.CosineAnnealingLR(optimizer, 8)
    return torchs.SequentialLR(optimizer, [warm, main], [4])


def _chained(optimizer: torch.optim.Optimizer) -> Any:
    return torchs.ChainedScheduler([torchs.ConstantLR(optimizer, 0.1, 3), torchs.ExponentialLR(optimizer, 0.9)])


WARMED_UP = {
    "schedulers": [
        {"factory": f"{TORCH}:LinearLR", "args": {"start_factor": 0.1, "total_iters": 4}},
        {"factory": f"{TORCH}:CosineAnnealingLR", "args": {"T_max": 8}},
    ],
    "milestones": [4],
}
CHAINED = {
    "schedulers": [
        {"factory": f"{TORCH}:ConstantLR", "args": {"factor": 0.1, "total_iters": 3}},
        {"factory": f"{TORCH}:ExponentialLR", "args": {"gamma": 0.9}},
    ]
}
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "StepLR": (f"{TORCH}:StepLR", {"step_size": 3}, lambda o: torchs.StepLR(o, 3)),
    "MultiStepLR": (f"{TORCH}:MultiStepLR", {"milestones": [2, 5]}, lambda o: torchs.MultiStepLR(o, [2, 5])),
    "LambdaLR": (f"{TORCH}:LambdaLR", {"lr_lambda": {"ref": f"{HERE}:decay"}}, lambda o: torchs.LambdaLR(o, decay)),
    "LambdaLR, made": (
        f"{TORCH}:LambdaLR",
        {"lr_lambda": {"factory": f"{HERE}:make_decay", "args": {"rate": 0.8}}},
        lambda o: torchs.LambdaLR(o, make_decay(0.8)),
    ),
    "ExponentialLR": (f"{TORCH}:ExponentialLR", {"gamma": 0.9}, lambda o: torchs.ExponentialLR(o, 0.9)),
    "CosineAnnealingLR": (f"{TORCH}:CosineAnnealingLR", {"T_max": 7}, lambda o: torchs.CosineAnnealingLR(o, 7)),
    "OneCycleLR": (
        f"{TORCH}:OneCycleLR",
        {"max_lr": 1.0, "total_steps": 14},
        lambda o: torchs.OneCycleLR(o, 1.0, total_steps=14),
    ),
    "CosineAnnealingWarmRestarts": (
        f"{TORCH}:CosineAnnealingWarmRestarts",
        {"T_0": 4},
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 4),
    ),
    "CyclicLR": (
        f"{TORCH}:CyclicLR",
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3},
        lambda o: torchs.CyclicLR(o, 0.1, 1.0, 3),
    ),
    "a warm-up chain": (f"{TORCH}:SequentialLR", WARMED_UP, _warmed_up),
    "all at once": (f"{TORCH}:ChainedScheduler", CHAINED, _chained),
    "a factory of one's own": (f"{HERE}:own", {"rate": 0.7}, lambda o: torchs.ExponentialLR(o, 0.7)),
}


def optimizer() -> torch.optim.Optimizer:
    layer = nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_is_torchs_step_by_step_and_goes_on_from_its_state(case: str) -> None:
    factory, args, by_hand = CASES[case]
    config = Scheduler(factory=factory, args=args)
    ours, theirs = optimizer(), optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own SequentialLR
        built, expected = scheduling.build(config, ours), by_hand(theirs)
        seen = set()
        for number in range(12):
            assert rates(ours) == rates(theirs), number
            seen.add(tuple(rates(ours)))
            if number == 6:  # another process takes over
                saved = unpack(*pack([ours.state_dict(), built.state_dict()]))
                ours = optimizer()
                built = scheduling.build(config, ours)
                ours.load_state_dict(saved[0])
                built.load_state_dict(saved[1])
            ours.step()
            theirs.step()
            Schedule(built).after_step()
            expected.step()
    assert len(seen) > 1, "it never moved"


def test_a_plateau_goes_by_the_evaluation() -> None:
    one = optimizer()
    config = Scheduler(factory=f"{TORCH}:ReduceLROnPlateau", args={"patience": 0, "factor": 0.1}, metric="error")
    schedule = Schedule(scheduling.build(config, one), config.interval, config.metric)
    for value in (3.0, 2.0, 2.5):
        schedule.after_step()
        schedule.after_epoch()
        schedule.after_evaluation({"loss": 0.0, "error": value})
    assert rates(one) == [0.05, 0.001]
    with pytest.raises(UserError, match="the evaluation gave no 'error'; it gave loss"):
        schedule.after_evaluation({"loss": 1.0})
    assert unpack(*pack(schedule.scheduler.state_dict()))["best"] == 2.0


def test_by_epochs_it_moves_after_epochs_only() -> None:
    one = optimizer()
    schedule = Schedule(torchs.ExponentialLR(one, 0.1), "epoch")
    one.step()  # or torch warns
    schedule.after_step()
    schedule.after_evaluation({})
    assert rates(one) == [0.5, 0.01]
    schedule.after_epoch()
    assert rates(one) == [0.05, 0.001]


def test_what_cannot_be_a_schedule() -> None:
    one = optimizer()
    with pytest.raises(UserError, match=r"scheduler.metric: ReduceLROnPlateau goes by a value"):
        Schedule(torchs.ReduceLROnPlateau(one))
    with pytest.raises(UserError, match="choose step or epoch"):
        Schedule(None, "day")
    with pytest.raises(ConfigError, match=r"scheduler.args.gama: .*ExponentialLR has no such parameter; did you mean"):
        scheduling.build(Scheduler(factory=f"{TORCH}:ExponentialLR", args={"gama": 1}), one)
    with pytest.raises(ConfigError, match=r"scheduler.args.schedulers.0.args.gama"):
        nested: Any = {"schedulers": [{"factory": f"{TORCH}:ExponentialLR", "args": {"gama": 1}}]}
        scheduling.build(Scheduler(factory=f"{TORCH}:ChainedScheduler", args=nested), one)
    with pytest.raises(ConfigError, match="returned float; a scheduler is needed"):
        scheduling.build(Scheduler(factory=f"{HERE}:not_one"), one)


def not_one(optimizer: Any) -> float:
    return 1.0
