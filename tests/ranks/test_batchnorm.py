from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ddpkit
from ddpkit.batchnorm import convert_sync_batchnorm, revert_sync_batchnorm
from ddpkit.errors import UserError
from ddpkit.testing import run_ranks

Result = dict[str, Any]


# N ranks against one process with the concatenated batch.


@dataclass(frozen=True)
class Case:
    """A layer and how many samples of shape (4, *tail) each rank brings to a pass."""

    layer: Callable[[], nn.Module]
    batches: tuple[tuple[int, ...], tuple[int, ...]]  # two ranks', three ranks'
    tail: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64


class NoBias(nn.BatchNorm1d):
    """A user's subclass without a forward pass of its own."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_parameter("bias", None)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.eval().requires_grad_(False)


CASES = {
    "1d": Case(lambda: nn.BatchNorm1d(4), ((5, 3), (2, 4, 3))),
    "1d with length": Case(lambda: nn.BatchNorm1d(4), ((2, 3), (1, 2, 3)), (6,)),
    "2d": Case(lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), ((4, 1), (3, 1, 2)), (3, 2)),
    "3d": Case(lambda: nn.BatchNorm3d(4), ((2, 1), (1, 1, 2)), (2, 3, 2)),
    "a rank without samples": Case(lambda: nn.BatchNorm1d(4), ((0, 5), (2, 0, 3))),
    "an image on one rank only": Case(lambda: nn.BatchNorm2d(4), ((0, 1), (0, 0, 1)), (3, 3)),
    "single samples": Case(lambda: nn.BatchNorm1d(4), ((1, 1), (1, 1, 1))),
    "not affine": Case(lambda: nn.BatchNorm2d(4, affine=False), ((2, 3), (2, 0, 3)), (2, 2)),
    "cumulative average": Case(lambda: nn.BatchNorm1d(4, momentum=None), ((5, 2), (1, 5, 2))),
    "no running statistics": Case(lambda: nn.BatchNorm2d(4, track_running_stats=False), ((2, 3), (2, 0, 3)), (2, 2)),
    "lazy": Case(lambda: nn.LazyBatchNorm1d(dtype=torch.float64), ((2, 3), (2, 0, 3))),
    "torch's own": Case(lambda: nn.SyncBatchNorm(4), ((2, 3), (2, 0, 3)), (2,)),
    "a subclass without bias": Case(lambda: NoBias(4), ((2, 3), (2, 0, 3))),
    "frozen between trained": Case(
        lambda: nn.Sequential(nn.BatchNorm1d(4), frozen(nn.BatchNorm1d(4)), nn.BatchNorm1d(4)),
        ((4, 3), (2, 0, 3)),
    ),
    "the same layer twice": Case(
        lambda: (lambda norm: nn.Sequential(norm, nn.Linear(4, 4), norm))(nn.BatchNorm1d(4)),
        ((4, 3), (2, 0, 3)),
    ),
    "float32": Case(lambda: nn.BatchNorm2d(4), ((2, 3), (2, 0, 3)), (4, 4), torch.float32),
}


def passes(case: Case, ranks: int, share: slice, build: Callable[[nn.Module], nn.Module]) -> Result:
    """Take two passes over this ``share`` of the global batch, and collect all that comes out."""
    torch.manual_seed(0)
    layer = case.layer().to(case.dtype)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point() and not nn.parameter.is_lazy(tensor):
                tensor.uniform_(0.5, 1.5)
    model = build(layer)
    result: Result = {}
    samples = sum(case.batches[ranks - 2])
    for number in range(2):
        batch = torch.randn(samples, 4, *case.tail, dtype=case.dtype) * 3 + 2
        slope = torch.randn_like(batch)[share]
        mine = batch[share].clone().requires_grad_()
        output = model(mine)
        (output * slope).sum().backward()
        result[f"output {number}"], result[f"input gradient {number}"] = output.detach(), mine.grad
    result["gradients"] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result["state"] = {k: v for k, v in model.state_dict().items() if k not in result["gradients"]}
    return result


def on_a_rank(case: Case) -> Result:
    batches = case.batches[dist.get_world_size() - 2]
    start = sum(batches[: dist.get_rank()])
    share = slice(start, start + batches[dist.get_rank()])
    return passes(case, dist.get_world_size(), share, convert_sync_batchnorm)


@pytest.mark.parametrize("name", CASES)
def test_as_one_process_with_the_concatenated_batch(results: list[Result], name: str) -> None:
    case = CASES[name]
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    one = passes(case, len(results), slice(None), lambda layer: layer)
    ranks = [result[name] for result in results]
    for key in [k for k in one if k.startswith(("output", "input"))]:
        joined = torch.cat([rank[key] for rank in ranks])
        torch.testing.assert_close(joined, one[key], atol=tolerance, rtol=tolerance)
    assert all(rank["gradients"].keys() == one["gradients"].keys() for rank in ranks)
    for key, gradient in one["gradients"].items():
        total = sum(rank["gradients"][key] for rank in ranks)
        torch.testing.assert_close(total, gradient, atol=10 * tolerance, rtol=tolerance)
    for rank in ranks:
        assert rank["state"].keys() == one["state"].keys()
        torch.testing.assert_close(rank["state"], one["state"], atol=tolerance, rtol=tolerance)
        assert all(torch.equal(rank["state"][k], ranks[0]["state"][k]) for k in rank["state"])


# What else the ranks do; each function's result is looked at by the test of the same name.


def data_parallel() -> Result:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before the conversion
    batch, target = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    if dist.is_initialized():
        share = 12 // dist.get_world_size()
        mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        batch, target = batch[mine], target[mine]
        trained: nn.Module = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(model))
    else:
        trained = model
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(trained(batch), target)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return model.state_dict()


def test_data_parallel_training(results: list[Result]) -> None:
    one = data_parallel()
    for rank in results:
        torch.testing.assert_close(rank["data_parallel"], one, atol=1e-10, rtol=1e-10)


def a_group_of_its_own() -> Result:
    group = dist.new_group([0, 1])  # a third rank is not a member: it normalises alone
    layer = convert_sync_batchnorm(nn.BatchNorm1d(1), group)
    copied = copy.deepcopy(nn.Sequential(layer))  # as an average of the weights would
    layer(torch.full((2, 1), float(dist.get_rank())))
    copied(torch.full((2, 1), float(dist.get_rank())))
    assert convert_sync_batchnorm(layer).process_group is group
    return {
        "mean": layer.state_dict()["running_mean"].item(),
        "copied": copied[0].state_dict()["running_mean"].item(),
    }


def test_a_group_of_its_own(results: list[Result]) -> None:
    for rank, result in enumerate(results):
        mean = pytest.approx(0.1 * (0.5 if rank < 2 else 2))
        assert result["a_group_of_its_own"] == {"mean": mean, "copied": mean}


def one_value_in_all() -> Result:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(3))
    try:
        layer(torch.ones(1 if dist.get_rank() == 1 else 0, 3))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def test_one_value_in_all_is_an_error_on_every_rank(results: list[Result]) -> None:
    for rank in results:
        assert "Expected more than 1 value per channel when training" in rank["one_value_in_all"]["error"]


def nothing_at_all() -> Result:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    batch = torch.ones(0, 3, 2, 2, requires_grad=True)
    layer(batch).sum().backward()
    return {**layer.state_dict(), "gradient": batch.grad}


def test_nothing_at_all_changes_nothing(results: list[Result]) -> None:
    for rank in results:
        result = rank["nothing_at_all"]
        assert result["gradient"].shape == (0, 3, 2, 2)
        assert result["running_mean"].tolist() == [0, 0, 0] and result["running_var"].tolist() == [1, 1, 1]


def alone_in_eval() -> Result:
    if dist.get_rank() != 1:
        return {}
    batch = torch.randn(6, 3)
    outputs = {}
    for tracked in (True, False):  # a layer that waited for the other ranks would end in the group's timeout
        layer = nn.BatchNorm1d(3, track_running_stats=tracked).eval()
        plain = layer(batch)
        outputs[str(tracked)] = bool(torch.equal(convert_sync_batchnorm(layer)(batch), plain))
    return outputs


def test_a_layer_in_eval_mode_needs_no_other_rank(results: list[Result]) -> None:
    assert results[1]["alone_in_eval"] == {"True": True, "False": True}


def large_mean() -> Result:
    torch.manual_seed(0)
    batch = torch.randn(3000, 4) + 1e4 + 10 * dist.get_rank()
    layer = convert_sync_batchnorm(nn.BatchNorm1d(4, momentum=1.0))
    layer(batch)
    return {"var": layer.running_var, "batch": batch}


def test_a_large_mean_costs_no_digits_of_the_variance(results: list[Result]) -> None:
    batch = torch.cat([rank["large_mean"]["batch"] for rank in results]).double()
    for rank in results:
        torch.testing.assert_close(rank["large_mean"]["var"].double(), batch.var(0), atol=0, rtol=1e-4)


def mixed_precision() -> Result:
    torch.manual_seed(0)
    batch = torch.randn(12, 3, 8, 8)
    if dist.is_initialized():  # the first rank brings an empty batch
        cuts = [0, 0, 5, 12] if dist.get_world_size() == 3 else [0, 0, 12]
        batch = batch[cuts[dist.get_rank()] : cuts[dist.get_rank() + 1]]
    layer = convert_sync_batchnorm(nn.BatchNorm2d(4, momentum=1.0))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    output.float().square().sum().backward()
    whole = nn.BatchNorm2d(4).bfloat16()
    convert_sync_batchnorm(whole)(batch.new_zeros(2, 4, 2, 2).bfloat16())
    return {
        "output": output.detach(),
        "gradient": layer.weight.grad,
        "var": layer.running_var,
        "whole": whole.running_var,
    }


def test_mixed_precision_keeps_statistics_in_float32(results: list[Result]) -> None:
    one, ranks = mixed_precision(), [rank["mixed_precision"] for rank in results]
    output = torch.cat([rank["output"] for rank in ranks])
    assert output.dtype == one["output"].dtype == torch.bfloat16
    torch.testing.assert_close(output, one["output"], atol=0.05, rtol=0.02)
    gradient = sum(rank["gradient"] for rank in ranks)
    torch.testing.assert_close(gradient, one["gradient"], rtol=0.01, atol=0)
    for rank in ranks:
        assert rank["var"].dtype == torch.float32 and rank["whole"].dtype == torch.bfloat16
        torch.testing.assert_close(rank["var"], one["var"], rtol=1e-4, atol=0)


def without_gradients() -> Result:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(1, momentum=1.0))
    with torch.no_grad():
        output = layer(torch.tensor([[float(dist.get_rank())], [0.0]]))
    return {"mean": layer.state_dict()["running_mean"].item(), "requires_grad": output.requires_grad}


def test_training_mode_without_gradients_follows_the_statistics(results: list[Result]) -> None:
    ranks = len(results)
    mean = sum(range(ranks)) / (2 * ranks)
    for rank in results:
        assert rank["without_gradients"] == {"mean": pytest.approx(mean), "requires_grad": False}


ON_RANKS = (
    data_parallel,
    a_group_of_its_own,
    one_value_in_all,
    nothing_at_all,
    alone_in_eval,
    large_mean,
    mixed_precision,
    without_gradients,
)


def work() -> Result:
    with ddpkit.runtime(timeout_s=30):
        result: Result = {name: on_a_rank(case) for name, case in CASES.items()}
        return result | {function.__name__: function() for function in ON_RANKS}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def results(request: pytest.FixtureRequest) -> list[Result]:
    """What `work` gave on each rank. All cases share one group of ranks, as starting ranks takes a while."""
    return run_ranks(work, int(request.param), timeout_s=90)


# One process.


def model_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm3d(4, momentum=None, dtype=torch.bfloat16),
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.LazyBatchNorm2d(),
        lambda: NoBias(4),
    ],
)
def test_conversion_changes_the_class_alone_and_is_undone(make: Callable[[], _BatchNorm]) -> None:
    layer = make()
    layer.eval()
    for parameter in layer.parameters():
        parameter.requires_grad = False
    kind, before = type(layer), dict(layer.__dict__)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    model = model_of(layer)
    keys = list(model.state_dict())
    assert convert_sync_batchnorm(convert_sync_batchnorm(model)) is model
    assert model[1] is layer and type(layer) is not kind and isinstance(layer, _BatchNorm)
    assert kind is nn.SyncBatchNorm or isinstance(layer, kind)
    assert list(model.state_dict()) == keys and not layer.training
    after = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert all(after[name] is tensor and not tensor.requires_grad for name, tensor in tensors.items())
    assert revert_sync_batchnorm(revert_sync_batchnorm(model)) is model
    assert type(layer) is kind and layer.__dict__ == before


def test_the_root_itself_is_converted_in_place() -> None:
    layer = nn.BatchNorm1d(3)
    assert convert_sync_batchnorm(layer) is layer
    assert repr(layer) == repr(nn.BatchNorm1d(3)).replace("BatchNorm1d", "SyncBatchNorm1d")


def test_without_a_group_a_converted_layer_is_a_plain_one() -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4)
    converted = convert_sync_batchnorm(copy.deepcopy(plain))
    batch = torch.randn(3, 4, 2, 2)
    assert torch.equal(converted(batch), plain(batch))
    assert all(torch.equal(a, b) for a, b in zip(converted.buffers(), plain.buffers(), strict=True))
    for wrong, error in [(torch.ones(1, 4, 1, 1), "more than 1 value"), (torch.ones(3, 4), "expected 4D")]:
        with pytest.raises(ValueError, match=error):
            converted(wrong)


def test_a_lazy_layer_becomes_the_converted_layer_of_its_kind() -> None:
    model = convert_sync_batchnorm(model_of(nn.LazyBatchNorm1d()))
    model(torch.randn(5, 4))
    assert type(model[1]) is type(convert_sync_batchnorm(nn.BatchNorm1d(4)))
    assert model[1].num_features == 4 and model[1].weight.shape == (4,)
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm1d


def test_copies_and_pickles_are_converted_too_and_share_nothing() -> None:
    norm = nn.BatchNorm1d(4)
    model = convert_sync_batchnorm(model_of(norm, nn.ReLU(), norm))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is type(norm) and other[1] is other[3] and other[1] is not norm
        assert other[1].weight is not norm.weight and torch.equal(other[1].weight, norm.weight)
        other(torch.randn(5, 4))
        counted = [layer.state_dict()["num_batches_tracked"].item() for layer in (other[1], norm)]
        assert counted == [2, 0]
        assert type(revert_sync_batchnorm(other)[1]) is nn.BatchNorm1d


def test_a_layer_that_refers_to_itself_is_copied_whole() -> None:
    layer = convert_sync_batchnorm(nn.BatchNorm1d(4))
    layer.__dict__["hook"] = layer.extra_repr  # a bound method, such as lazy layers have for hooks
    copied = copy.deepcopy(layer)
    assert copied.__dict__["hook"].__self__ is copied


class WithActivation(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class TheirSync(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_forward_pass_of_its_own_is_refused_by_name() -> None:
    model = model_of(nn.BatchNorm1d(4), WithActivation(4))
    with pytest.raises(UserError, match=r"^2 is a .*WithActivation, .*sync_batchnorm to false"):
        convert_sync_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm1d  # nothing is half converted
    theirs = convert_sync_batchnorm(TheirSync(4))
    assert type(theirs) is TheirSync
