"""The user's module becomes one that trains on all ranks, whatever its parameters are like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ddpkit
from ddpkit.errors import UserError
from ddpkit.model import settle_buckets, unwrap
from ddpkit.testing import run_ranks


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.layer = nn.Linear(3, 1).double()

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer((inputs * self.turn).abs())
        return output


class Mixed(nn.Module):
    """Parameters of several types, one of them with values whose sum its type cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1).double()
        self.small = nn.Parameter(torch.full((4,), 3e4, dtype=torch.float16))
        self.scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.none = nn.Parameter(torch.empty(0, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs) * self.scalar.double() + 1e-5 * self.small.double().sum() + self.none.sum()
        return output


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 1)).double()


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 1)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (plain, {}),
    "small buckets": (plain, {"bucket_cap_mb": 1e-5}),
    "gradients as views": (plain, {"gradient_as_bucket_view": True}),
    "static graph": (shared, {"static_graph": True}),
    "search for unused": (shared, {"find_unused_parameters": True}),
    "shared parameters": (shared, {}),
    "some frozen": (partly_frozen, {}),
    "complex": (Complex, {}),
    "mixed types": (Mixed, {}),
    "sparse gradients": (sparse, {}),
}


def inputs_of(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "sparse gradients":
        return torch.randint(0, 9, (12, 3), generator=generator)
    return torch.randn(12, 3, generator=generator, dtype=torch.float64)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def gradients() -> dict[str, list[Tensor | None]]:
    """Of all models, after two passes over this rank's share of a batch of 12."""
    warnings.simplefilter("error")
    found = {}
    with ddpkit.runtime(seed=1, timeout_s=20) as rt:
        for name, (build, options) in MODELS.items():
            torch.manual_seed(3)
            module = build()
            before = [bits(tensor) for tensor in module.state_dict().values()]
            model = rt.wrap(module, **options)
            assert [bits(tensor) for tensor in module.state_dict().values()] == before
            assert all(parameter.grad is None for parameter in model.parameters())
            assert unwrap(model).state_dict().keys() == build().state_dict().keys()
            share = inputs_of(name).chunk(rt.world_size)[rt.rank]
            for _ in range(2):
                model(share).square().mean().backward()
            found[name] = [
                None if parameter.grad is None else parameter.grad.to_dense() for parameter in model.parameters()
            ]
    return found


def test_gradients_are_those_of_one_process() -> None:
    alone = gradients()
    for ranks in (2, 3):
        for found in run_ranks(gradients, ranks):
            for name, tensors in found.items():
                for tensor, expected in zip(tensors, alone[name], strict=True):
                    tolerance = 1e-10 if expected is not None and expected.dtype.itemsize >= 8 else 1e-1
                    torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=name)


def bucket_layouts() -> list[bool]:
    """Whether DDP still has to lay out its buckets anew: before settling, after it."""
    with ddpkit.runtime(timeout_s=20) as rt:
        raw = DistributedDataParallel(plain())
        found = [raw.reducer._rebuild_buckets()]  # nothing was recorded yet
        raw(inputs_of("plain")).sum().backward()
        found.append(raw.reducer._rebuild_buckets())
        settled = rt.wrap(plain())
        assert isinstance(settled, DistributedDataParallel)
        settled(inputs_of("plain")).sum().backward()
        found.append(settled.reducer._rebuild_buckets())
        settle_buckets(settled)  # harmless
        return found


def test_buckets_are_laid_out_before_the_first_step() -> None:
    assert run_ranks(bucket_layouts, 2) == [[False, True, False]] * 2


def nothing_to_train() -> list[Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        frozen = nn.Linear(2, 2).requires_grad_(False)
        without = nn.Sequential(nn.Tanh(), nn.Flatten())
        return [rt.wrap(frozen) is frozen, rt.wrap(without) is without]


def test_a_model_without_trainable_parameters_stays_as_it_is() -> None:
    assert run_ranks(nothing_to_train, 2) == [[True, True]] * 2


def after_the_end() -> list[Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        model = rt.wrap(plain())
        model(inputs_of("plain")).sum().backward()
    assert isinstance(model, DistributedDataParallel)
    # While DDP's reducer held the process group, a process now and then never ended.
    held = [name for name in ("reducer", "logger") if hasattr(model, name)]
    return [held, tuple(unwrap(model).eval()(inputs_of("plain")).shape), len(model.state_dict())]


def test_the_module_is_of_use_after_the_runtime_has_gone() -> None:
    assert run_ranks(after_the_end, 2) == [[[], (12, 1), 9]] * 2


@pytest.mark.slow
def test_ranks_always_end() -> None:
    for _ in range(150):
        run_ranks(after_the_end, 2, timeout_s=20)


def _two_models() -> Any:
    with ddpkit.runtime(seed=5) as rt:
        trained = rt.wrap(nn.Linear(2, 2))
        drawn = torch.rand(3).tolist()
        frozen = rt.wrap(nn.Linear(4, 4).requires_grad_(False))
        again = torch.rand(3).tolist()
        return [next(iter(model.parameters())).flatten().tolist() for model in (trained, frozen)], drawn, again


def test_a_second_frozen_model_is_the_same_on_all_ranks_and_no_number_is_drawn_twice() -> None:
    answers = run_ranks(_two_models, 3)
    assert all(models == answers[0][0] for models, _, _ in answers)
    for _, drawn, again in answers:
        assert not set(drawn) & set(again)
    assert len({tuple(drawn) for _, drawn, _ in answers}) == 3


def _wrap_lazy() -> None:
    with ddpkit.runtime() as rt:
        rt.wrap(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))


def test_a_lazy_model_is_told_to_see_a_batch_first() -> None:
    with pytest.raises(UserError, match=r"0\.weight.*have no shapes yet.*one batch"):
        run_ranks(_wrap_lazy, 2)
