"""What is done to a model before it is wrapped: recomputing, formats, order in memory, averages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpkit.ema import averaged, weights_in
from ddpkit.errors import UserError
from ddpkit.parts import channels_last
from ddpkit.precision import Precision, set_exactness
from ddpkit.recompute import recompute_activations


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        outputs: Tensor = inputs + self.layers(inputs)
        return outputs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 1))


def trained(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(3):
        module(torch.randn(16, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("patterns", [["Block"], ["1", "2"], ["[12]"]])
def test_recomputing_changes_no_bit(patterns: list[str]) -> None:
    module = net()
    recompute_activations(module, patterns)
    assert_same(trained(module), trained(net()))
    assert [part.calls for part in module if isinstance(part, Block)] == [6, 6]


def test_parts_without_buffers_recompute_in_a_compiled_model() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))
    plain = copy.deepcopy(module)
    recompute_activations(module, ["1"])
    module.compile(backend="aot_eager")
    assert_same(trained(module), trained(plain))


def test_a_copy_of_a_recomputing_module_is_on_its_own() -> None:
    module = net()
    recompute_activations(module, ["Block"])
    copied = copy.deepcopy(module)
    trained(copied)
    assert_same(module, net())
    assert [part.calls for part in module if isinstance(part, Block)] == [0, 0]


def test_a_recomputing_module_can_be_compiled() -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()))

    compiled = recompute_activations(made(), ["1"])
    compiled.compile(backend="aot_eager", fullgraph=True)
    ours, theirs = trained(compiled).state_dict(), trained(made()).state_dict()
    assert int(ours["1.1.num_batches_tracked"]) == 3
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_nothing_to_recompute_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"key: 'Blok' names no part of the model; its parts are 0, 1, .* Linear, Block"
    ):
        recompute_activations(net(), ["Block", "Blok"], "key")


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_channels_last_is_an_order_in_memory_alone() -> None:
    inputs = torch.randn(2, 3, 8, 8)
    plain, module = images(), images()
    channels_last(module)
    seen = []
    module[1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(module(inputs), plain(inputs))
    assert seen == [True] and module.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert [value.shape for value in module.state_dict().values()] == [v.shape for v in plain.state_dict().values()]


@pytest.mark.parametrize("name", ["bf16-true", "fp16-true"])
def test_true_half_has_its_weights_in_it_and_talks_float32(name: str) -> None:
    dtype = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}[name]
    module = net()
    Precision.named(name).convert(module)
    assert {value.dtype for value in module.parameters()} == {dtype}
    outputs = module(torch.randn(16, 4))
    assert outputs.dtype == torch.float32
    outputs.square().mean().backward()
    assert {value.grad.dtype for value in module.parameters() if value.grad is not None} == {dtype}
    assert not Precision.named(name).scaler(torch.device("cpu")).is_enabled()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_is_around_the_step_alone(name: str, dtype: torch.dtype | None) -> None:
    precision, cpu = Precision.named(name), torch.device("cpu")
    seen: list[Any] = []

    def step(model: nn.Module) -> Tensor:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        output: Tensor = model(torch.randn(16, 4))
        return output

    module = precision.convert(net())
    assert precision.applied_to(step, cpu)(module).dtype == (dtype or torch.float32)
    assert seen == [dtype] and not torch.is_autocast_enabled("cpu")
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert precision.scaler(cpu).is_enabled() is (name == "fp16")


def test_fp16_on_the_cpu_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("fp32", "bf16", "bf16-true"):
        Precision.named(name).warn_if_slow(torch.device("cpu"))
    assert not caplog.records
    Precision.named("fp16").warn_if_slow(torch.device("cpu"))
    assert "fp16 is slow on a CPU" in caplog.text
    with pytest.raises(UserError, match="'half' is none; choose one of fp32, bf16"):
        Precision.named("half")


def test_exactness_is_set_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)
    set_exactness()
    assert before == (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)
    try:
        set_exactness(tf32=True, cudnn_benchmark=True, cudnn_deterministic=True)
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32) == (True,) * 4
        set_exactness(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_the_average_follows_the_weights() -> None:
    module = net()
    average = averaged(module, 0.9)
    expected: dict[str, Tensor] = {}
    for _ in range(3):
        trained(module)
        average.update_parameters(module)
        for name, value in module.named_parameters():
            expected[name] = value.detach() * 0.1 + expected[name] * 0.9 if name in expected else value.detach().clone()
    found = weights_in(average.state_dict())
    assert list(found) == list(module.state_dict())
    for name, value in found.items():
        # Running statistics are the model's.
        torch.testing.assert_close(value, expected.get(name, module.state_dict()[name]))


def test_half_precision_is_averaged_in_float32() -> None:
    module = net()
    Precision.named("bf16-true").convert(module)
    average = averaged(module, 0.999)
    average.update_parameters(module)
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1.0)
    weight = average.module.get_parameter("0.weight")
    before = weight.clone()
    for _ in range(10):
        average.update_parameters(module)
    moved = weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**10), rtol=0.05, atol=0)
    assert average.module(torch.randn(16, 4)).dtype == torch.float32
