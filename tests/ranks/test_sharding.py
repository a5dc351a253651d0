"""FSDP2: the same numbers as one process, with a part of the model on each rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpkit
from ddpkit import config as configs
from ddpkit import worker
from ddpkit.checkpoint.contents import load_model_tensors
from ddpkit.checkpoint.shards import is_spread
from ddpkit.errors import UserError
from ddpkit.sampler import Pass
from ddpkit.testing import run_ranks
from tests.resume.runs import last_checkpoint, metrics, tree

EXACT: dict[str, Any] = {
    "model__args": {"dropout": 0.0, "dtype": "float64"},
    "data__train__args": {"length": 30, "dtype": "float64"},
    "data__eval__args": {"length": 5, "dtype": "float64"},  # on three ranks, the last pass leaves one without a sample
    "data__global_batch_size": 7,
    "data__eval_batch_size": 1,
    "train__clip_grad_norm": 0.3,
    "train__epochs": 1,
    "log_every": 1,
}
SHARDED = {"model__parallel": "fsdp2", "model__fsdp2": {"layers": ["Linear"]}}


def weighted_step(model: nn.Module, batch: Any) -> Any:
    """Weights that are known afterwards only."""
    inputs, targets, _ = batch
    weights = inputs[:, 0].abs() + 0.1
    loss = ((model(inputs) - targets).square().squeeze(1) * weights).sum() / weights.sum()
    return {"loss": loss, "weight": weights.sum()}


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in passes": {"data__micro_batch_size": 1, "model__args": {**EXACT["model__args"], "batchnorm": False}},
    "weighted": {"train__step": f"{__name__}:weighted_step", "data__micro_batch_size": 2}
    | {"model__args": {**EXACT["model__args"], "batchnorm": False}},
    "averaged": {"model__ema_decay": 0.5, "train__eval_ema": True, "model__activation_checkpointing": ["Linear"]}
    | {"train__clip_grad_norm": None, "train__clip_grad_value": 0.02},
}


def _work(trees: list[Any]) -> None:
    for each in trees:
        worker.work("run", configs.to_tree(configs.from_tree(each)), {"attempt": 0})


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        # Before BatchNorm a bias has a gradient of nothing but rounding, which an adaptive step blows up.
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-8, msg=name)


def test_a_sharded_run_is_that_of_one_process(tmp_path: Path) -> None:
    """Uneven batches and shards, accumulation, weights, clipping, BatchNorm, evaluation; and the file is whole."""
    trees = {
        (name, kind, ranks): tree(tmp_path / f"{name}-{kind}-{ranks}", **EXACT | variant | how)
        for name, variant in VARIANTS.items()
        for kind, how, ranks in (("ddp", {}, 1), ("fsdp2", SHARDED, 1), ("fsdp2", SHARDED, 3))
    }
    for count in (1, 3):
        run_ranks(_work, count, [each for (_, _, ranks), each in trees.items() if ranks == count])
    for name in VARIANTS:
        whole = tmp_path / f"{name}-ddp-1"
        for count in (1, 3):
            sharded = tmp_path / f"{name}-fsdp2-{count}"
            files = {path.name for path in last_checkpoint(sharded).glob("sharded-*")}
            assert files == {f"sharded-{rank:05d}.safetensors" for rank in range(count)}
            for part in ("model", "ema") if name == "averaged" else ("model",):
                ours, theirs = (load_model_tensors(last_checkpoint(path), part) for path in (sharded, whole))
                _same(ours, theirs)
            for line, other in zip(metrics(sharded), metrics(whole), strict=True):
                assert line.pop("kind") == other["kind"]
                assert line == {key: pytest.approx(other[key], rel=1e-9) for key in line}


@pytest.mark.slow
def test_compiled_recomputed_and_averaged_it_is_the_same(tmp_path: Path) -> None:
    compiled = {"model__compile": {"backend": "aot_eager"}, "model__activation_checkpointing": ["Linear"]}
    for name, how in (("plain", {}), ("replicated", compiled), ("sharded", compiled | SHARDED)):
        variant = VARIANTS["in passes"] | {"model__ema_decay": 0.5, "train__eval_ema": True}
        run_ranks(_work, 2, [tree(tmp_path / name, **EXACT | variant | how)])
    for name in ("replicated", "sharded"):
        for part in ("model", "ema"):
            ours, theirs = (load_model_tensors(last_checkpoint(tmp_path / each), part) for each in (name, "plain"))
            _same(ours, theirs)


class _Spoilt(torch.autograd.Function):
    """Fine in the forward pass, and not in the backward pass of some."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, is_spoilt: bool) -> Tensor:
        ctx.is_spoilt = is_spoilt
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * (float("nan") if ctx.is_spoilt else 1.0), None


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.third = nn.Linear(4, 1)

    def forward(self, inputs: Tensor, is_spoilt: bool) -> Tensor:
        hidden = self.second(self.norm(self.first(inputs)))
        output: Tensor = self.third(_Spoilt.apply(hidden, is_spoilt))  # type: ignore[no-untyped-call]  # torch's
        return output


def _backward_step(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(*batch).square().mean()
    return loss


def _faults(parallel: str) -> tuple[str, list[str]]:
    with ddpkit.runtime(timeout_s=30) as rt:
        how: dict[str, Any] = {"parallel": "fsdp2", "layers": ["Linear"]} if parallel == "fsdp2" else {}
        model = rt.wrap(Backwards(), sync_batchnorm=True, **how)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = rt.train_step(model, optimizer, _backward_step)
        faults = []
        inputs = torch.randn(4, 3)
        for is_spoilt in (True, False):
            part = Pass(4 * rt.rank, 4 * rt.rank + 4, 0, 8, is_last=True)
            step.accumulate((inputs, is_spoilt and rt.rank == 1), part)
            step.update()
            faults.append("" if step.fault is None else step.fault.text)
        return faults[0], faults[1:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_gradient_that_is_spoilt_in_the_backward_pass_is_traced_to_its_rank(parallel: str) -> None:
    for fault, others in run_ranks(_faults, 2, parallel):
        # The statistics that ranks exchange take it to rank 0, too, but not into the parameters behind them.
        assert "on rank 1 (and then on 0), in pass 1 of 1, samples 4 to 7" in fault
        assert "it is finite, and so is all of the forward pass" in fault
        named = re.search("gradients that are not finite: (.*)$", fault)
        assert named is not None
        expected = {f"{part}.{kind}" for part in ("first", "norm", "second") for kind in ("weight", "bias")}
        assert set(named[1].split(", ")) == expected
        assert others == [""]


# ---------------------------------------------------------------------- a model that no rank could hold


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.tanh(self.inner(self.norm(inputs)))


class Large(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.embed.weight  # tied, as in language models

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.out(hidden)
        return output


def _memory(reset: bool = False) -> int:
    """The most bytes of memory that this process has had since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _larger_than_its_share(run_dir: Path, width: int, depth: int) -> Any:
    """This rank's part in bytes, and how far its memory rose: after a save, and after some steps."""
    with ddpkit.runtime(seed=2) as rt:
        with torch.device("meta"):
            first, module = Large(8, 1), Large(width, depth)
        rt.wrap(first, parallel="fsdp2", layers=["Block"])  # what torch needs for itself the first time
        before = _memory(reset=True)
        model = rt.wrap(module, parallel="fsdp2", layers=["Block"])
        held = sum(parameter.to_local().nbytes for parameter in model.parameters() if is_spread(parameter))
        rt.resume(run_dir, model=model).finish()
        saved = _memory() - before
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return held, saved, _memory() - before


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    width, depth = 512, 48
    whole = 4 * (depth * (width * width + 2 * width) + 11 * width)  # 48 MiB
    for held, saved, trained in run_ranks(_larger_than_its_share, 2, tmp_path / "run", width, depth):
        assert held == pytest.approx(whole / 2, rel=0.01)
        assert saved < 0.75 * whole, f"{saved >> 20} MiB for {whole >> 20} MiB of parameters"
        assert trained < 0.9 * 2 * whole, f"{trained >> 20} MiB for {whole >> 20} MiB, and gradients"
    sizes = [path.stat().st_size for path in last_checkpoint(tmp_path / "run").glob("sharded-*")]
    assert sizes == [pytest.approx(whole / 2, rel=0.01)] * 2


def _first_values(run_dir: Path, weights: Path, train: bool) -> Any:
    """A model from the meta device, of which rank zero has loaded a part; before and after three steps."""
    with ddpkit.runtime(seed=2) as rt:
        with torch.device("meta"):
            module = Large(8, 3)
        module.blocks[1].requires_grad_(False)
        if rt.is_main:
            ddpkit.load_weights(module, weights, strict=False)
        model = rt.wrap(module, parallel="fsdp2", layers=["blocks.*"])
        run = rt.resume(run_dir / f"{rt.world_size}", model=model)
        if train:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(3):
                model(torch.arange(6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        run.finish()
        return module.out.weight is module.embed.weight


def test_a_model_without_values_gets_the_same_ones_on_any_ranks(tmp_path: Path) -> None:
    torch.manual_seed(9)
    theirs = Large(8, 3).state_dict()
    del theirs["blocks.0.norm.bias"], theirs["blocks.2.inner.weight"]
    torch.save(theirs, tmp_path / "theirs.pt")
    found = {}
    for ranks in (1, 3):
        for train in (False, True):
            run_dir = tmp_path / f"{train}"
            assert run_ranks(_first_values, ranks, run_dir, tmp_path / "theirs.pt", train) == [True] * ranks
            found[ranks, train] = load_model_tensors(last_checkpoint(run_dir / f"{ranks}"))
    for name, value in found[1, False].items():
        assert torch.equal(found[3, False][name], value), name
        assert name not in theirs or torch.equal(theirs[name], value)
        torch.testing.assert_close(found[3, True][name], found[1, True][name], rtol=1e-4, atol=1e-6)
    assert found[1, False]["blocks.2.inner.weight"].std() > 0.1  # drawn, and not what was in the memory
    assert torch.equal(found[1, True]["blocks.1.inner.weight"], theirs["blocks.1.inner.weight"])
    assert not torch.equal(found[1, True]["out.weight"], theirs["out.weight"])


# ---------------------------------------------------------------------- precision, and what cannot be


def _precision(run_dir: Path) -> Any:
    """Losses in each of the ways to compute in less than single precision, and what the parameters are in."""
    losses = {}
    ways: dict[str, dict[str, Any]] = {
        "full": {},
        "autocast": {"train__precision": "bf16"},
        "scaled": {"train__precision": "fp16"},
        "policy": {"model__fsdp2": {"layers": ["Linear"], "param_dtype": "bf16", "reduce_dtype": "fp32"}},
        "offloaded": {"model__fsdp2": {"cpu_offload": True, "reshard_after_forward": False}},
    }
    for name, changes in ways.items():
        each = tree(run_dir / name, **SHARDED | {"train__epochs": 1, "log_every": 1} | changes)
        each["train"]["step"] = f"{__name__}:step_in_any_type"
        del each["data"]["eval"], each["train"]["eval_step"]
        _work([each])
        losses[name] = [line["loss"] for line in metrics(run_dir / name)]
    return losses


def step_in_any_type(model: nn.Module, batch: Any) -> Any:
    inputs, targets, _ = batch
    return (model(inputs).float() - targets).square().mean()


def test_precision(tmp_path: Path) -> None:
    losses = run_ranks(_precision, 2, tmp_path)[0]
    assert losses["offloaded"] == losses["full"]
    for name in ("autocast", "policy"):
        assert losses[name] == pytest.approx(losses["full"], rel=0.01)
        assert losses[name] != losses["full"]
    assert 1 <= len(losses["scaled"]) < 6  # until the scale fits, steps are left out
    assert max(losses["scaled"]) < 2
    for name in losses:
        kept = load_model_tensors(last_checkpoint(tmp_path / name))
        assert {value.dtype for key, value in kept.items() if "weight" in key} == {torch.float32}


def _overflow_on_one_rank() -> Any:
    with ddpkit.runtime() as rt:
        model = rt.wrap(nn.Linear(2, 4, bias=False), parallel="fsdp2")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        taken = []
        for bad_rank in (1, None):
            (loss,) = (model(torch.ones(1, 2)).sum(),)
            scaler.scale(loss).backward()
            (weight,) = model.parameters()
            assert is_spread(weight) and is_spread(weight.grad)
            before = weight.to_local().clone()
            if rt.rank == bad_rank:
                weight.grad.to_local()[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken.append(not torch.equal(weight.to_local(), before))
        return taken, scaler.get_scale()


def test_an_overflow_in_one_ranks_part_is_one_of_all() -> None:
    assert run_ranks(_overflow_on_one_rank, 2) == [([False, True], 2.0)] * 2


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))


class Unfilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def _refusals() -> list[str]:
    told = []
    with ddpkit.runtime() as rt, torch.device("meta"):
        loaded = rt.wrap(Large(4, 1), parallel="fsdp2")
        for build in (
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", layers=["Blok"]),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", layers=["Embedding"]),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", layers=["ModuleList"]),
            lambda: rt.wrap(Scalar(), parallel="fsdp2"),
            lambda: rt.wrap(nn.Sequential(Unfilled()), parallel="fsdp2"),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", layer=["Block"]),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", layers="Block"),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp2", param_dtype="int8"),
            lambda: rt.wrap(Large(4, 2), parallel="fsdp3"),
            lambda: ddpkit.load_weights(loaded, "x.pt"),
        ):
            with pytest.raises(UserError) as caught:
                build()
            told.append(str(caught.value))
    return told


def test_what_cannot_be_is_one_message() -> None:
    for message, told in zip(
        (
            "fsdp2: layers: no part of the model is a 'Blok', by class or by name; did you mean 'Block'?",
            "embed.weight and out.weight are one parameter, but belong to several units (embed, the rest)",
            "fsdp2: blocks: fully_shard does not support containers that do not implement forward",
            "factor is a single number, which cannot be spread",
            "0 (Unfilled) is on the meta device, and has no reset_parameters()",
            "wrap: parallel='fsdp2' has no option 'layer'; it has layers, param_dtype,",
            "layers='Block'; give a list of names",
            "param_dtype='int8'; choose fp32, bf16, fp16",
            "parallel='fsdp3'; choose one of ddp, fsdp2, accelerate",
            "spread over the ranks already; load the weights before rt.wrap",
        ),
        run_ranks(_refusals, 1)[0],
        strict=True,
    ):
        assert message in told
