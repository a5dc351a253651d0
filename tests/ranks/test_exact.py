"""N ranks against one process, in double precision: after an epoch the parameters are the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpkit
from ddpkit.model import unwrap
from ddpkit.step import TrainStep
from ddpkit.testing import run_ranks
from tests import toy

FEATURES = 5


@dataclass(frozen=True)
class Case:
    """How to train an epoch."""

    length: int = 50
    batch: int = 12
    micro: int | None = None
    drop_last: bool = True
    batchnorm: bool = True
    weighted: bool = False
    clip: float | None = None


CASES = {
    "shares that are equal on some numbers of ranks": Case(),
    "a batch of the world's size": Case(batch=4, length=24),
    "shares of one and two samples": Case(batch=5, length=20),
    "an incomplete last batch": Case(drop_last=False),
    "a last batch smaller than the world": Case(length=26, drop_last=False),
    "micro batches that do not divide": Case(micro=5, batchnorm=False),
    "passes without samples": Case(batch=5, micro=1, length=22, drop_last=False, batchnorm=False),
    "weights of the user's": Case(weighted=True, drop_last=False),
    "weights and micro batches": Case(weighted=True, batch=5, micro=1, length=22, drop_last=False, batchnorm=False),
    "clipping": Case(clip=0.05),
    "clipping with micro batches": Case(clip=0.05, micro=2, batch=7, batchnorm=False, drop_last=False),
    "clipping with weights": Case(clip=0.05, micro=2, batch=7, batchnorm=False, drop_last=False, weighted=True),
}


def build(case: Case) -> nn.Module:
    return toy.model(FEATURES, 8, dropout=0.0, batchnorm=case.batchnorm, dtype="float64")


def weights_of(targets: Tensor) -> Tensor:
    return 1.0 + 10 * (targets > 0).double()


def plain_step(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = toy.step(model, batch)["loss"]
    return loss


def weighted_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    inputs, targets, _ = batch
    weights = weights_of(targets)
    loss = (weights * (model(inputs) - targets).square()).sum() / weights.sum()
    # Many a step guards its division like this; a pass without samples must count nothing all the same.
    return {"loss": loss, "weight": weights.sum().clamp(min=1)}


def data(case: Case) -> Any:
    return toy.dataset(case.length, FEATURES, augment=False, dtype="float64")


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(unwrap(model).state_dict())


def by_fit(case: Case) -> dict[str, Tensor]:
    """An epoch by the step and the loader that `fit` uses."""
    with ddpkit.runtime(seed=3, timeout_s=30) as rt:
        model = rt.wrap(build(case))
        loader = rt.loader(
            data(case), global_batch_size=case.batch, micro_batch_size=case.micro, drop_last=case.drop_last
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        function = weighted_step if case.weighted else plain_step
        step = TrainStep(model, optimizer, function, rt.world, rt.device, clip_grad_norm=case.clip)
        for batch in loader:
            assert loader.current is not None
            step.accumulate(batch, loader.current, keep_values=False)
            if loader.current.is_last:
                step.update()
        return state(model)


def by_hand(case: Case, run_dir: Path) -> dict[str, Tensor]:
    """The same in a loop of one's own."""
    with ddpkit.runtime(seed=3, timeout_s=30) as rt:
        model = rt.wrap(build(case))
        loader = rt.loader(
            data(case), global_batch_size=case.batch, micro_batch_size=case.micro, drop_last=case.drop_last
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = rt.resume(run_dir, model=model, optimizer=optimizer, loader=loader, every_steps=None)
        for _ in run.epochs(1):
            for batch in loader:
                loss = plain_step(model, batch)
                run.backward(loss)
                assert loader.current is not None
                if loader.current.is_last:
                    if case.clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step(loss=loss)
        return state(model)


def by_torch(case: Case) -> dict[str, Tensor]:
    """What it all has to equal: torch alone, whole batches, in the order that one rank's loader gives."""
    with ddpkit.runtime(seed=3) as rt:
        model = build(case)
        loader = rt.loader(data(case), global_batch_size=case.batch, drop_last=case.drop_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for inputs, targets, _ in loader:
            errors = (model(inputs) - targets).square()
            weights = weights_of(targets) if case.weighted else torch.ones_like(errors)
            optimizer.zero_grad()
            ((weights * errors).sum() / weights.sum()).backward()
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
        return state(model)


def all_by_both(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for index, (name, case) in enumerate(CASES.items()):
        found[f"fit: {name}"] = by_fit(case)
        if not case.weighted:
            found[f"by hand: {name}"] = by_hand(case, run_dir / str(index))
    return found


@pytest.fixture(scope="module")
def torchs() -> Iterator[dict[str, dict[str, Tensor]]]:
    yield {name: by_torch(case) for name, case in CASES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_an_epoch_gives_the_parameters_of_one_process_with_whole_batches(
    ranks: int, torchs: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    for found in run_ranks(all_by_both, ranks, tmp_path, timeout_s=100):
        for name, tensors in found.items():
            expected = torchs[name.partition(": ")[2]]
            assert tensors.keys() == expected.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-10, msg=f"{name}: {key} differs")


def step_that_needs_a_sample() -> None:
    def first_error(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets, _ = batch
        error: Tensor = (model(inputs) - targets)[0].square().mean()
        return error

    with ddpkit.runtime(timeout_s=20) as rt:
        model = rt.wrap(nn.Linear(FEATURES, 1).double())
        step = TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), first_error, rt.world, rt.device)
        loader = rt.loader(data(Case()), global_batch_size=3, micro_batch_size=1)
        for batch in loader:
            assert loader.current is not None
            step.accumulate(batch, loader.current, keep_values=True)


def test_a_step_that_needs_samples_is_told_which_batch_sizes_fit() -> None:
    with pytest.raises(ddpkit.UserError, match=r"no sample in a pass over a global batch of 3 .* \(2 or 4, say\)"):
        run_ranks(step_that_needs_a_sample, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda model, inputs: model(inputs).square(), r"the loss has shape \(4, 1\)"),
        (lambda model, inputs: 3.0, "returned float"),
        (lambda model, inputs: {"cost": model(inputs).mean()}, r"a mapping with \['cost'\]"),
        (lambda model, inputs: torch.ones(()), "does not depend on the parameters"),
        (lambda model, inputs: None, "returned NoneType"),
    ],
)
def test_a_step_that_answers_something_else_is_told_so(answer: Any, message: str) -> None:
    with ddpkit.runtime() as rt:
        model = rt.wrap(nn.Linear(FEATURES, 1).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrainStep(model, optimizer, lambda model, batch: answer(model, batch[0]), rt.world, rt.device)
        loader = rt.loader(data(Case()), global_batch_size=4)
        batch = next(iter(loader))
        assert loader.current is not None
        with pytest.raises(ddpkit.UserError, match=message):
            step.accumulate(batch, loader.current, keep_values=True)


def zero_weights() -> list[float]:
    with ddpkit.runtime(timeout_s=20) as rt:
        model = rt.wrap(nn.Linear(FEATURES, 1).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def nothing_counts(model: nn.Module, batch: Any) -> dict[str, Any]:
            return {"loss": plain_step(model, batch), "weight": torch.zeros(())}

        step = TrainStep(model, optimizer, nothing_counts, rt.world, rt.device)
        before = state(model)
        loader = rt.loader(data(Case()), global_batch_size=4)
        batch = next(iter(loader))
        assert loader.current is not None
        step.accumulate(batch, loader.current, keep_values=True)
        step.update()
        return [float((value - before[key]).abs().max()) for key, value in state(model).items()]


def test_a_step_in_which_nothing_counts_changes_nothing() -> None:
    assert run_ranks(zero_weights, 2) == [[0.0, 0.0]] * 2
