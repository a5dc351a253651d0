"""The training step on several ranks beside one process with whole batches; what ranks have to agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpkit
from ddpkit.batch_size import largest_that_fits
from ddpkit.errors import NotFinite, UserError
from ddpkit.model import unwrap
from ddpkit.precision import Precision
from ddpkit.sampler import Pass
from ddpkit.session import Runtime
from ddpkit.testing import run_ranks
from tests import toy


@dataclass(frozen=True)
class Case:
    """A step over one global batch of 12."""

    precision: str = "fp32"
    micro: int | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    tolerance: float = 1e-5
    options: tuple[tuple[str, Any], ...] = ()


CASES = {
    "fp32": Case(micro=5),
    "bf16": Case("bf16", micro=3, tolerance=0.05),
    "fp16": Case("fp16", micro=5, tolerance=0.01),
    "fp16, clipped": Case("fp16", micro=1, clip_norm=0.05, tolerance=0.01),
    "bf16, clipped by value": Case("bf16", micro=5, clip_value=0.01, tolerance=0.1),
    "bf16 through and through": Case("bf16-true", micro=5, tolerance=0.1),
    "fp16 through and through": Case("fp16-true", micro=5, tolerance=0.05),
    "gradients as views": Case(micro=5, clip_norm=0.05, options=(("gradient_as_bucket_view", True),)),
    "static graph": Case(micro=5, options=(("static_graph", True),)),
    "small buckets": Case(micro=5, options=(("bucket_cap_mb", 1e-5),)),
    "search for unused": Case(micro=5, options=(("find_unused_parameters", True),)),
}


def sum_step(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).sum()
    return loss


def change_of_weights(rt: Runtime, case: Case, micro: int | None) -> tuple[list[Tensor], dict[str, float]]:
    """By one optimizer step, which is -gradient; and the step's values."""
    torch.manual_seed(5)
    module = Precision.named(case.precision).convert(toy.model(dropout=0.0, batchnorm=False))
    before = [parameter.detach().clone().float() for parameter in module.parameters()]
    model = rt.wrap(module, **dict(case.options))
    step = rt.train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        toy.step,
        precision=case.precision,
        clip_grad_norm=case.clip_norm,
        clip_grad_value=case.clip_value,
        log_grad_norm=True,
    )
    loader = rt.loader(toy.dataset(12, augment=False), global_batch_size=12, micro_batch_size=micro, shuffle=False)
    passes = [(batch, loader.current) for batch in loader]
    for _ in range(20):  # fp16 finds its scale
        for batch, part in passes:
            assert part is not None
            step.accumulate(batch, part)
        values = step.update()
        if step.fault is None:
            break
        assert step.fault.is_overflow
    return [p.detach().float() - old for p, old in zip(unwrap(model).parameters(), before, strict=True)], values


def changes(alone: bool) -> dict[str, tuple[list[Tensor], dict[str, float]]]:
    with ddpkit.runtime(timeout_s=30) as rt:
        return {name: change_of_weights(rt, case, None if alone else case.micro) for name, case in CASES.items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_is_that_of_one_process_with_the_whole_batch(ranks: int) -> None:
    alone = changes(alone=True)
    for found in run_ranks(changes, ranks, False):
        for name, case in CASES.items():
            (expected, values), (tensors, own_values) = alone[name], found[name]
            largest = max(float(tensor.abs().max()) for tensor in expected)
            for tensor, right in zip(tensors, expected, strict=True):
                torch.testing.assert_close(tensor, right, rtol=0, atol=case.tolerance * largest, msg=f"{name} differs")
            assert own_values["grad_norm"] == pytest.approx(values["grad_norm"], rel=case.tolerance), name
    full, clipped, by_value = (alone[name][0] for name in ("fp16", "fp16, clipped", "bf16, clipped by value"))
    assert float(nn.utils.get_total_norm(clipped)) == pytest.approx(0.05, rel=1e-3)
    assert float(nn.utils.get_total_norm(full)) == pytest.approx(alone["fp16"][1]["grad_norm"], rel=1e-3) != 0.05
    assert max(float(tensor.abs().max()) for tensor in by_value) == pytest.approx(0.01, rel=1e-4)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.used(self.frozen(inputs))
        return output


def agreements(folder: Path) -> dict[str, Any]:
    """Several things in one start of ranks."""
    found: dict[str, Any] = {}
    with ddpkit.runtime(timeout_s=30) as rt:
        inputs = torch.ones(2, 3) * (1 + rt.rank)

        # A parameter without gradient, in a step and in a loop of one's own.
        for by in ("step", "loop"):
            model = rt.wrap(TwoHeads())
            step = rt.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), sum_step)
            try:
                if by == "step":
                    step.accumulate(inputs, Pass(0, 2, 0, 4, is_last=True))
                else:
                    model(inputs).sum().backward()
                    model(inputs)
            except UserError as error:
                found[f"unused, {by}"] = str(error)
        model = rt.wrap(TwoHeads(), find_unused_parameters=True)
        for _ in range(2):
            model(inputs).sum().backward()

        # Passes inside a step leave gradients where they are.
        model = rt.wrap(nn.Linear(6, 1))
        loader = rt.loader(toy.dataset(24), global_batch_size=8, micro_batch_size=2)
        run = rt.resume(folder / "run", model=model, loader=loader)
        found["gradients"] = []
        for inputs, _, _ in loader:
            with run.accumulate():
                run.backward(model(inputs).sum())
            gradient = unwrap(model).get_parameter("weight").grad
            assert gradient is not None
            found["gradients"].append(gradient.clone())
            if loader.current is not None and loader.current.is_last:
                break

        # The largest that fits everywhere.
        def attempt(size: int) -> None:
            if size > 20 - 7 * rt.rank:
                raise MemoryError

        found["largest"] = largest_that_fits(rt.ranks, rt.device, attempt, 64)
        return found


def test_ranks_agree_and_are_told_by_name(tmp_path: Path) -> None:
    one, two = run_ranks(agreements, 2, tmp_path)
    assert one["largest"] == two["largest"] == 13
    assert not torch.equal(one["gradients"][0], two["gradients"][0])
    assert torch.equal(one["gradients"][1], two["gradients"][1])
    for rank, found in enumerate((one, two)):
        for by in ("step", "loop"):
            assert (
                f"model: unused.weight, unused.bias received no gradient in a step on rank {rank}"
                in found[f"unused, {by}"]
            )


def own_loop(folder: Path, most: int) -> dict[str, Any]:
    """A loop of one's own, in which rank 1 sees a NaN in the third step."""
    with ddpkit.runtime(seed=1, timeout_s=30) as rt:
        torch.manual_seed(0)
        model = rt.wrap(toy.model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        loader = rt.loader(toy.dataset(48), global_batch_size=8, shuffle=False)
        step = rt.train_step(model, optimizer, toy.step)
        run = rt.resume(folder, model=model, optimizer=optimizer, loader=loader, scheduler=scheduler, every_steps=None)
        try:
            for _ in run.epochs(1):
                for inputs, targets, index in loader:
                    assert loader.current is not None
                    spoilt = torch.where((index == 21).unsqueeze(1), math.nan, inputs)
                    step.accumulate((spoilt, targets, index), loader.current)
                    values = step.update()
                    if step.fault is None:
                        scheduler.step()
                        run.step(**values)
                    else:
                        run.skip(step.fault, most)
        except NotFinite as error:
            return {"error": str(error), "step": run.progress.step, "loader": loader.position}
        return {"rates": scheduler.get_last_lr(), "step": run.progress.step, "samples": run.progress.samples}


def test_a_nan_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    skipped = run_ranks(own_loop, 2, tmp_path / "skipped", 1)
    assert skipped == [{"rates": [0.1 * 0.5**5], "step": 5, "samples": 48}] * 2
    stopped = run_ranks(own_loop, 2, tmp_path / "stopped", 0)
    assert stopped[0] == stopped[1]
    error = stopped[0]["error"]
    assert error.startswith(
        "step 3 cannot be taken: the loss is nan on rank 1 (and then on 0), in pass 1 of 1, samples 20"
    )
    assert "first in what the model was called with" in error and "[0]" in error
    assert "The update was not made; the state before it, of step 2, is saved" in error
    assert stopped[0]["step"] == 2 and stopped[0]["loader"] == 16
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000002"]
    again = run_ranks(own_loop, 2, tmp_path / "stopped", 1)
    assert again == skipped
