"""Models taken apart: captured outputs, first values, summaries and graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.errors import UserError
from ddpkit.summary import graph


def model() -> Any:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(nn.Linear(3, 4), block, nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False))


def test_captured_outputs_are_those_of_the_newest_pass() -> None:
    net, inputs = model(), torch.randn(5, 3)
    with ddpkit.capture(net, ["0", "1.*"]) as seen:
        assert seen == {}
        net(inputs + 1)
        net(inputs)
    assert list(seen) == ["0", "1.0", "1.1"]
    assert torch.equal(seen["0"], net[0](inputs))
    assert seen["0"].requires_grad
    assert torch.equal(seen["1.1"], seen["1.0"].relu())
    net(inputs + 1)
    assert torch.equal(seen["0"], net[0](inputs))  # nothing is kept any more
    with ddpkit.capture(net, ["3"], detach=True) as seen:
        net(inputs)
    assert not seen["3"].requires_grad
    with pytest.raises(UserError, match=r"has no layer '7\.\*'"), ddpkit.capture(net, ["0", "7.*"]):
        pass


def test_first_values_are_given_as_by_apply() -> None:
    def normal(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    ours, torchs = model(), model()
    torchs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    ddpkit.initialize(ours, normal)
    torch.manual_seed(1)
    torchs.apply(normal)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), torchs.parameters(), strict=True))


def test_first_values_of_chosen_parts() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.named_parameters()}
    ddpkit.initialize(net, lambda module: nn.init.ones_(module.weight), modules=["Linear"])
    ddpkit.initialize(net, partial(nn.init.constant_, val=7), params=["1.*.bias", "2.bias"])
    values = {name: value.unique().tolist() for name, value in net.named_parameters()}
    assert values["0.weight"] == values["1.0.weight"] == values["3.weight"] == [1.0]
    assert values["1.0.bias"] == values["2.bias"] == [7.0]
    assert torch.equal(net[0].bias, before["0.bias"])
    assert all(value.requires_grad for value in net.parameters())


def test_first_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"key: Conv2d fits nothing in the model; it has 0, 1"):
        ddpkit.initialize(model(), nn.init.ones_, modules=["Conv2d"], key="key")
    with pytest.raises(UserError, match=r"key: 0.bias: Fan in and fan out"):
        ddpkit.initialize(model(), nn.init.xavier_uniform_, params=["0.*"], key="key")


def test_a_summary_counts_what_is_shared_once() -> None:
    net = model()
    net[1][0].weight.requires_grad_(False)
    net.append(net[0])  # the same layer twice
    summary = ddpkit.summarize(net)
    assert (summary.model.parameters, summary.model.trainable) == (16 + 20 + 8 + 4, 16 + 4 + 8 + 4)
    assert summary.model.bytes == 48 * 4 + (4 + 4) * 4 + 8  # with BatchNorm's statistics and its count
    assert [part.name for part in summary.parts] == ["0", "1", "1.0", "1.1", "2", "3"]
    assert [part.name for part in ddpkit.summarize(net, depth=1).parts] == ["0", "1", "2", "3"]
    assert str(summary).splitlines()[-1].split() == ["all", "Sequential", "48", "32", "232", "B"]


def test_a_graph_has_parameters_by_name_and_operations() -> None:
    net = model()
    drawn = graph({"out": net(torch.randn(5, 3))}, net)
    assert drawn.startswith("digraph {") and drawn.endswith("}\n")
    for label in ("3.weight (1, 4)", "1.0.bias (4,)", "ReluBackward0", "NativeBatchNormBackward0"):
        assert drawn.count(f'label="{label}"') == 1, label
