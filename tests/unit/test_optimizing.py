"""What an optimizer works on: groups, frozen parts, learning rates; and whether gradients are finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpkit.errors import UserError
from ddpkit.optimizing import (
    Group,
    are_finite,
    gradient_norm,
    learning_rates,
    parameter_groups,
    scale_for_batch,
    scale_learning_rates,
)
from ddpkit.parts import freeze


class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.own = nn.Linear(4, 4), nn.LayerNorm(4), OwnRMSNorm()


def net() -> nn.Module:
    module = nn.Module()
    module.backbone = nn.Sequential(Block(), Block())
    module.head = nn.Linear(4, 2)
    return module


def names(module: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    by_identity = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        (
            [by_identity[id(parameter)] for parameter in group["params"]],
            {k: v for k, v in group.items() if k != "params"},
        )
        for group in groups
    ]


def test_without_groups_all_is_one() -> None:
    module = net()
    assert names(module, parameter_groups(module)) == [([name for name, _ in module.named_parameters()], {})]


def test_the_first_group_that_names_a_parameter_has_it() -> None:
    module = net()
    groups = [
        Group(params=["head.*"], args={"lr": 1.0}),
        Group(modules=["LayerNorm"], args={"lr": 2.0}),
        Group(params=["*.bias"], modules=["backbone.1"], args={"lr": 3.0}),
    ]
    made = names(module, parameter_groups(module, groups))
    assert [args for _, args in made] == [{"lr": 1.0}, {"lr": 2.0}, {"lr": 3.0}, {}]
    assert made[0][0] == ["head.weight", "head.bias"]
    assert made[1][0] == [f"backbone.{block}.norm.{kind}" for block in (0, 1) for kind in ("weight", "bias")]
    block = ["backbone.1.linear.weight", "backbone.1.linear.bias", "backbone.1.own.weight"]
    assert made[2][0] == ["backbone.0.linear.bias", *block]
    assert made[3][0] == ["backbone.0.linear.weight", "backbone.0.own.weight"]


def test_norms_and_biases_without_decay_in_every_group() -> None:
    module = net()
    made = names(module, parameter_groups(module, [Group(["head.*"], args={"lr": 1.0})], no_decay=["norms", "biases"]))
    assert made[0] == (["head.weight"], {"lr": 1.0})
    assert made[1] == (["head.bias"], {"lr": 1.0, "weight_decay": 0.0})
    assert made[2] == (["backbone.0.linear.weight", "backbone.1.linear.weight"], {})
    assert made[3][1] == {"weight_decay": 0.0}
    assert sorted(made[3][0]) == sorted(
        f"backbone.{block}.{name}"
        for block in (0, 1)
        for name in ("linear.bias", "norm.weight", "norm.bias", "own.weight")
    )
    only_norms = names(module, parameter_groups(module, no_decay=["norms"]))
    assert "head.bias" in only_norms[0][0] and "backbone.0.norm.bias" in only_norms[1][0]


def test_frozen_parts_are_in_no_group() -> None:
    module = freeze(net(), ["backbone.0", "OwnRMSNorm", "*.bias"])
    left = ["backbone.1.linear.weight", "backbone.1.norm.weight", "head.weight"]
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == left
    assert names(module, parameter_groups(module)) == [(left, {})]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: freeze(net(), ["backbon"], "model.freeze"), r"model.freeze: 'backbon' names no part .*Block, Linear"),
        (lambda: parameter_groups(freeze(net(), ["backbone", "head"])), "no parameter to train"),
        (lambda: parameter_groups(net(), [Group(["x.*"])], key="k"), r"k.0: x.\* names no trainable parameter"),
        (lambda: parameter_groups(net(), [Group(modules=["GroupNorm"])], key="k"), "k.0.modules: 'GroupNorm' names no"),
    ],
)
def test_what_names_nothing_is_refused(act: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        act()


def test_learning_rates_are_scaled_when_asked_for_and_listed_by_group() -> None:
    module = net()
    optimizer = torch.optim.SGD(parameter_groups(module, [Group(["head.*"], args={"lr": 0.5})]), lr=0.1)
    assert learning_rates(optimizer) == {"lr": 0.5, "lr/1": 0.1}
    scale_learning_rates(optimizer, scale_for_batch("linear", 1024, 256))
    assert learning_rates(optimizer) == {"lr": 2.0, "lr/1": 0.4}
    assert scale_for_batch("sqrt", 1024, 256) == 2.0


def sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.tensor([[3.0], [0.0]]), (5, 1), check_invariants=True)


def test_the_norm_is_torchs_and_takes_sparse_gradients() -> None:
    gradients = [torch.full((2, 2), 2.0), sparse()]
    assert float(gradient_norm(gradients)) == 5.0


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([torch.ones(3), torch.ones(2)], True),
        ([torch.ones(3), torch.tensor([1.0, math.nan])], False),
        ([torch.tensor([math.inf])], False),
        ([torch.full((2,), 3e38)], True),  # whose norm is infinite
        ([torch.full((2,), 6e4, dtype=torch.float16)], True),  # likewise
        ([sparse()], True),
        ([sparse() / 0], False),
        ([], True),
    ],
)
def test_what_is_finite(gradients: list[Tensor], expected: bool) -> None:
    assert are_finite(gradients) is expected
