"""A step that cannot be taken is not taken, and the report says where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpkit
from ddpkit.nonfinite import Finding, describe
from ddpkit.sampler import Pass
from ddpkit.session import Runtime
from ddpkit.step import TrainStep


class Log(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()


class Outer(nn.Module):
    """Does something by itself between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.second((self.first(inputs) * 0 - 1).sqrt())
        return output


class Root(nn.Module):
    """Its forward pass is fine at zero, its backward pass is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output.abs().sqrt()


def mean_step(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def in_the_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return mean_step(model, batch) + math.inf  # whose gradient is finite


ONES = torch.ones(4, 3)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any], Tensor, list[str]]] = {
    "a layer": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(Log(), nn.Linear(3, 1))),
        mean_step,
        ONES,
        ["the loss is nan on rank 0", "first in the forward pass of 1.0 (Log)", "0.weight, 0.bias, 1.1.weight"],
    ),
    "between two layers": (
        lambda: nn.Sequential(nn.Linear(3, 3), Outer()),
        mean_step,
        ONES,
        ["first in the forward pass of 1 (Outer), before its part 1.second (Linear)"],
    ),
    "the data": (
        lambda: nn.Sequential(nn.Linear(3, 1)),
        mean_step,
        torch.tensor([[1.0, math.nan, 1.0]] * 4),
        ["first in what the model was called with", "the batch has values that are not finite: the batch"],
    ),
    "the loss": (
        lambda: nn.Linear(3, 1),
        in_the_loss,
        ONES,
        ["the loss is inf", "first in the loss itself, of outputs that are finite", "none of that rank alone"],
    ),
    "the backward pass": (
        Root,
        mean_step,
        torch.zeros(4, 3),
        ["it is finite, and so is all of the forward pass, but gradients are not", "not finite: layer.weight"],
    ),
}


def make(rt: Runtime, module: nn.Module, function: Any, **options: Any) -> TrainStep:
    return rt.train_step(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), function, **options)


def state(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def whole(size: int) -> Pass:
    return Pass(0, size, 0, size, is_last=True)


@pytest.mark.parametrize("case", CASES)
def test_the_report_says_where_it_came_from(case: str) -> None:
    build, function, batch, words = CASES[case]
    with ddpkit.runtime() as rt:
        torch.manual_seed(0)
        module = build()
        if case == "a layer":
            nn.init.constant_(module.get_parameter("0.bias"), -9.0)  # of which there is no logarithm
        step = make(rt, module, function)
        before = state(module)
        step.accumulate(batch, whole(4))
        assert step.update() == {}
        assert step.fault is not None and not step.fault.is_overflow
        for part in words:
            assert part in step.fault.text, step.fault.text
        assert all(map(torch.equal, before, state(module)))
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_skipped_step_leaves_no_trace() -> None:
    """Running statistics, momentum and the random streams are as if it had not been."""

    def run(batches: list[Tensor]) -> list[Tensor]:
        with ddpkit.runtime() as rt:
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
            module.register_buffer("constant", torch.ones(2))
            step = make(rt, module, mean_step)
            for batch in batches:
                step.accumulate(batch, whole(4))
                step.update()
                assert (step.fault is None) is bool(batch.isfinite().all())
            return state(module)

    good = list(torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1)))
    bad = good[0].clone()
    bad[2, 1] = math.inf
    expected = run(good)
    for at in (0, 1, 2):
        assert all(map(torch.equal, expected, run([*good[:at], bad, bad, *good[at:]])))


def test_passes_that_count_nothing_may_give_anything() -> None:
    def step_of_tokens(model: nn.Module, batch: Tensor) -> dict[str, Any]:
        count = (batch.sum(1) > 0).float().sum()
        return {"loss": model(batch).mean() + 0 / count, "weight": count}

    with ddpkit.runtime() as rt:
        module = nn.Linear(3, 1)
        step = make(rt, module, step_of_tokens)
        step.accumulate(-ONES, Pass(0, 4, 0, 8, is_last=False))
        step.accumulate(ONES, Pass(4, 8, 0, 8, is_last=True))
        values = step.update()
        assert step.fault is None and math.isfinite(values["loss"])


def test_fp16_finds_its_scale_by_steps_that_are_no_errors() -> None:
    def large(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).float().sum() * 20.0
        return loss

    with ddpkit.runtime() as rt:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        for looks in (True, False):
            step = make(rt, module, large, precision="fp16", looks_for_nonfinite=looks)
            assert step.scaler.is_enabled()
            taken = []
            before = state(module)
            for _ in range(14):
                step.accumulate(ONES, whole(4))
                values = step.update()
                taken.append(step.fault is None)
                if step.fault is not None:
                    assert step.fault.is_overflow and "too large for fp16 with a loss scale of" in step.fault.text
                    assert all(map(torch.equal, before, state(module)))
            assert not taken[0] and all(taken[-2:]) and values["loss"]
            # A loss that is not finite is an error, whatever the scale.
            step.accumulate(ONES * math.nan, whole(4))
            step.update()
            assert step.fault is not None and step.fault.is_overflow is not looks


def test_with_nothing_to_look_for_nothing_is_found() -> None:
    with ddpkit.runtime() as rt:
        module = nn.Linear(3, 1)
        step = make(rt, module, mean_step, looks_for_nonfinite=False)
        step.accumulate(ONES * math.nan, whole(4))
        step.update()
        assert step.fault is None and not module.weight.isfinite().any()


class Moody(nn.Module):
    """Has buffers that change late, or by being replaced; one that cannot be written to; and a norm that wakes up."""

    calls: Tensor
    late: Tensor
    replaced: Tensor
    none_yet: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("late", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("view", torch.zeros(1, 2).expand(3, 2))
        self.register_buffer("none_yet", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.norm.train(self.is_awake)
        if self.is_awake:
            self.late += 1
            self.replaced = self.replaced + 1
            self.none_yet = torch.ones(1)
        output: Tensor = self.layer(self.norm(inputs))
        return output

    @property
    def is_awake(self) -> bool:
        return bool(self.calls > 2)


def test_buffers_that_change_late_or_by_being_replaced_are_restored() -> None:
    with ddpkit.runtime() as rt:
        module = Moody()
        step = make(rt, module, mean_step)
        batches = list(torch.randn(5, 4, 3))
        for at, batch in enumerate(batches):
            before = {name: value.clone() for name, value in module.state_dict().items()}
            step.accumulate(batch * math.nan, whole(4))
            step.update()
            assert step.fault is not None
            after = module.state_dict()
            assert after.keys() == before.keys(), at
            assert all(torch.equal(value, before[name]) for name, value in after.items()), at
            step.accumulate(batch, whole(4))
            step.update()
            assert step.fault is None
        assert module.get_buffer("late").tolist() == module.get_buffer("replaced").tolist() == [3.0, 3.0]


def finding(order: int, batch: list[str], source: str | None = "x", gradients: tuple[str, ...] = ("w",)) -> Finding:
    return Finding("pass 1 of 2, samples 0 to 3 of the epoch", "nan", source, order, batch, [], list(gradients))


def test_of_several_ranks_the_one_it_came_from_is_named_first() -> None:
    assert "on rank 2 (and then on 0, 1), in pass 1 of 2" in describe(
        {0: finding(5, []), 1: finding(5, []), 2: finding(1, [])}, ["w"]
    )
    assert "on rank 1 (and then on 0)" in describe({0: finding(0, []), 1: finding(3, ["[0]"])}, ["w"])
    # A layer that exchanges statistics takes it to all ranks in the backward pass.
    assert "on rank 1 (and then on 0)" in describe({0: finding(3, [], None), 1: finding(3, [])}, ["w"])
    deeper = finding(3, [], None, ("w", "v"))
    assert "on rank 1 (and then on 0)" in describe({0: finding(3, [], None), 1: deeper}, ["w", "v"])
    assert "of w are not finite, but every rank's passes, run again, are" in describe({}, ["w"])


def test_what_is_asked_for_is_recorded_with_the_step() -> None:
    with ddpkit.runtime() as rt:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        values = {}
        asked: dict[str, Any] = {"plain": {}, "asked": {"log_grad_norm": True}, "clipped": {"clip_grad_norm": 1e-3}}
        for name, options in asked.items():
            step = make(rt, module, mean_step, **options)
            step.accumulate(ONES, whole(4))
            gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
            values[name] = step.update()
            assert values[name]["lr"] == 0.1
            if options:
                assert values[name]["grad_norm"] == pytest.approx(float(nn.utils.get_total_norm(gradients)))
        assert "grad_norm" not in values["plain"]


def test_gradients_are_clipped_by_value_after_unscaling() -> None:
    with ddpkit.runtime() as rt:
        for precision in ("fp32", "fp16"):
            torch.manual_seed(0)
            module = nn.Linear(3, 1)
            before = state(module)
            step = rt.train_step(
                module,
                torch.optim.SGD(module.parameters(), lr=1.0),
                mean_step,
                precision=precision,
                clip_grad_value=1e-3,
                clip_grad_norm=1e6,
            )
            while True:
                step.accumulate(ONES, whole(4))
                step.update()
                if step.fault is None:
                    break
            for old, new in zip(before, state(module), strict=True):
                torch.testing.assert_close((old - new).abs(), torch.full_like(old, 1e-3), rtol=0, atol=1e-6)
