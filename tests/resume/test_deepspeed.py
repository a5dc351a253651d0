"""DeepSpeed, stopped and killed: the same bits on the same ranks, the same numbers on others and in one piece."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ddpkit
from ddpkit.checkpoint.contents import load_model_tensors
from ddpkit.errors import StopRequested, UserError
from ddpkit.testing import run_ranks
from tests import pages, toy
from tests.resume.faults import Fault, is_agreed, pending, plan, watch
from tests.resume.runs import (
    assert_close_end,
    assert_same_end,
    cli,
    last_checkpoint,
    metrics,
    shell,
    start,
    to_the_end,
    tree,
)
from tests.resume.test_training_state import planted_tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install --no-build-isolation deepspeed",
    ),
]

# A bias before a BatchNorm has no gradient but rounding errors, and Adam makes whole steps of them. An odd width: what
# ranks have of a parameter is not equally long.
PLAIN: dict[str, Any] = {
    "model__args": {"dropout": 0.0, "batchnorm": False, "width": 15},
    "data__train__args": {"length": 50, "augment": False},
    "data__eval__args": {"length": 11, "augment": False},
    "train__clip_grad_norm": 0.5,
}


def deepspeed(directory: Path, stage: int, bf16: bool = False) -> dict[str, Any]:
    """What a config needs for it; stage 3 by a file of DeepSpeed's own, that has small parameters spread as well."""
    said: dict[str, Any] = {"zero_stage": stage}
    if stage == 3:
        options = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
        zero = {"zero_optimization": options, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
        (directory / "ds.json").write_text(json.dumps(zero))
        said = {"deepspeed_config_file": str(directory / "ds.json")}
    file = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16" if bf16 else "no", "deepspeed_config": said}
    (directory / "accelerate.json").write_text(json.dumps(file))
    found: dict[str, Any] = {
        "model__parallel": "accelerate",
        "model__accelerate_config": str(directory / "accelerate.json"),
    }
    return found | {"train__precision": "bf16" if bf16 else "fp32"}


@pytest.mark.parametrize(("stage", "ranks", "bf16"), [(2, 3, False), (3, 2, True)])
def test_killed_and_stopped_it_goes_on_with_the_same_bits(stage: int, ranks: int, bf16: bool, tmp_path: Path) -> None:
    changes = {"data__micro_batch_size": 2, "train__clip_grad_norm": 1.0, "train__epochs": 2}
    changes |= deepspeed(tmp_path, stage, bf16) | {"model__args": {"width": 15, "batchnorm": not bf16}}
    assert start(tree(tmp_path / "reference", **changes), ranks) == "done"
    env = plan(
        tmp_path / "faults",
        Fault("train", 16, rank=1, do="SIGTERM"),
        Fault("train", 11, rank=ranks - 1, whom="group"),
    )
    ends = to_the_end(tree(tmp_path / "run", **changes), ranks, env)
    assert sorted(ends) == ["SIGTERM", "done", "killed"]
    assert not pending(tmp_path / "faults")
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_killed_on_two_ranks_it_goes_on_with_three_and_in_one_piece(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tree(tmp_path / "whole", **PLAIN), 1) == "done"
    run_dir = tmp_path / "run"
    spread = tree(run_dir, **PLAIN | deepspeed(tmp_path, 3) | {"data__micro_batch_size": 2})
    assert start(spread, 2, plan(tmp_path / "faults", Fault("train", 11, rank=1, whom="group"))) == "killed"
    assert [len(list(path.glob("sharded-*"))) for path in (run_dir / "checkpoints").iterdir()] == [2]
    assert start(spread, 3, plan(tmp_path / "more", Fault("train", 5, do="SIGTERM")), attempt=1) == "SIGTERM"
    # The same checkpoint goes into a model that is whole on each rank, and back.
    in_one = tree(run_dir, **PLAIN)
    assert start(in_one, 2, plan(tmp_path / "third", Fault("train", 3, do="SIGTERM")), attempt=2) == "SIGTERM"
    assert start(spread, 1, plan(tmp_path / "fourth", Fault("train", 9, do="SIGTERM")), attempt=3) == "SIGTERM"
    assert start(spread, 2, attempt=4) == "done"

    assert_close_end(run_dir, tmp_path / "whole", rtol=1e-4, atol=1e-5)
    assert cli(capsys, "verify", str(run_dir)).code == 0
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "model.safetensors")).code == 0
    model = toy.model(batchnorm=False, width=15)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_nan_on_one_rank_stops_all_and_is_traced(tmp_path: Path) -> None:
    config = planted_tree(tmp_path / "run", [22], **deepspeed(tmp_path, 3))
    end = start(config, 2, errors=True)
    assert end.startswith("NotFinite: step 3 cannot be taken: the loss is nan on rank 1"), end
    assert "it appeared first in the forward pass of 1 (Trip)" in end, end
    assert last_checkpoint(tmp_path / "run").name == "step-00000002"
    skipping = planted_tree(tmp_path / "run", [22], train__on_nonfinite="skip", **deepspeed(tmp_path, 3))
    assert start(skipping, 2, attempt=1) == "done"
    reference = planted_tree(tmp_path / "ddp", [22], train__on_nonfinite="skip")
    assert start(reference, 2) == "done"
    pairs = zip(metrics(tmp_path / "run"), metrics(tmp_path / "ddp"), strict=True)
    for one, other in [pair for pair in pairs if pair[0]["kind"] == "train"]:
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


class Tied(nn.Module):
    """A weight used twice, a frozen layer, a norm, a buffer, and a parameter with fewer rows than ranks."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 7).requires_grad_(False)
        self.body = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.back = nn.Linear(5, 7, bias=False)
        self.head = nn.Linear(7, 1)
        self.last = nn.Linear(7, 5, bias=False)
        self.last.weight = self.body.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, inputs: torch.Tensor) -> Any:
        hidden = self.norm(self.body(self.frozen(inputs)).tanh())
        return self.head(self.back(hidden * self.scale[1])) + self.last(self.back(hidden)).mean(1, keepdim=True)


def tied() -> nn.Module:
    return Tied()


def weighted_step(model: nn.Module, batch: Any) -> Any:
    watch().come_to("train")
    inputs, targets, index = batch
    weight = (index + 1).double()
    errors = (model(inputs) - targets).square().squeeze(1)
    return {"loss": (errors * weight).sum() / weight.sum().clamp(min=1), "weight": weight.sum()}


def test_groups_weights_frozen_and_tied_parameters_are_as_with_ddp(tmp_path: Path) -> None:
    this = "tests.resume.test_deepspeed"
    groups = [{"params": ["back.*"], "args": {"lr": 0.002}}]
    how = PLAIN | {
        "model__factory": f"{this}:tied",
        "model__args": {},
        "train__step": f"{this}:weighted_step",
        "data__global_batch_size": 7,
        "data__drop_last": False,
        "data__micro_batch_size": 2,
        "checkpoint__asynchronous": True,
        "model__activation_checkpointing": ["LayerNorm", "back"],
    }
    how |= {"optimizer__groups": groups, "optimizer__no_decay": ["norms", "biases"], "optimizer__args": {"lr": 0.02}}
    assert start(tree(tmp_path / "ddp", **how), 2) == "done"
    spread = how | deepspeed(tmp_path, 1)
    env = plan(tmp_path / "faults", Fault("train", 21, rank=1, whom="group"))
    assert to_the_end(tree(tmp_path / "run", **spread), [2, 3], env) == ["killed", "done"]
    ours, theirs = (load_model_tensors(last_checkpoint(tmp_path / name)) for name in ("run", "ddp"))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(ours["body.weight"], ours["last.weight"])
    for one, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "ddp"), strict=True):
        assert one == {key: pytest.approx(other[key], rel=1e-3) for key in one if key != "kind"} | {"kind": one["kind"]}


def _script(directory: str, max_steps: int, deepspeed: bool) -> list[float]:
    losses: list[float] = []
    with contextlib.suppress(StopRequested):
        _train(directory, max_steps, deepspeed, losses)
    return losses


def _train(directory: str, max_steps: int, deepspeed: bool, losses: list[float]) -> None:
    config: dict[str, Any] = {"parallel": "accelerate", "config": f"{directory}/accelerate.json"} if deepspeed else {}
    with ddpkit.runtime() as rt:
        model = rt.wrap(toy.model(batchnorm=False, dropout=0.0, width=15), **config)
        optimizer = rt.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        loader = rt.loader(toy.dataset(48, augment=False), global_batch_size=12, micro_batch_size=2)
        run = rt.resume(
            f"{directory}/{rt.world_size if deepspeed else 'ddp'}",
            every_steps=2,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=loader,
        )
        for _ in run.epochs(3):
            for inputs, targets, _ in loader:
                with run.accumulate():
                    loss = (model(inputs) - targets).square().mean()
                    run.backward(loss)
                if loader.current is not None and loader.current.is_last:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    losses.append(rt.mean(float(loss.detach())))
                    run.step(loss=loss)
                    if len(losses) == max_steps:
                        run.ask_to_stop("enough")
                        while not is_agreed():
                            time.sleep(0.005)


def _accumulated_by_hand(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
    optimizer.step()


def _refusals(directory: str) -> list[str]:
    said = []
    with ddpkit.runtime() as rt:
        config: dict[str, Any] = {"parallel": "accelerate", "config": f"{directory}/accelerate.json"}
        model = rt.wrap(nn.Linear(6, 1), **config)
        adam = torch.optim.Adam(model.parameters())
        for call in (
            lambda: model(torch.ones(2, 6)),
            lambda: rt.train_step(model, adam, toy.step),
            lambda: rt.wrap_optimizer(torch.optim.Adafactor(model.parameters()), model),
            lambda: rt.wrap_optimizer(torch.optim.Adam(list(model.parameters())[:1]), model),
            lambda: rt.wrap(nn.Linear(6, 1).half(), **config),
            lambda: rt.resume(f"{directory}/x", model=model, optimizer=adam),
            lambda: _accumulated_by_hand(rt.wrap_optimizer(adam, model), model),
        ):
            with pytest.raises(UserError) as caught:
                call()
            said.append(str(caught.value))
    return said


class Branches(nn.Module):
    """Of two layers, a pass takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])

    def forward(self, number: int, inputs: torch.Tensor) -> Any:
        return self.layers[number](inputs)


def _moves(directory: str) -> list[tuple[bool, bool]]:
    """Of each step, whether the weights of the layer that it took have moved, and those of the other one."""
    moves = []
    with ddpkit.runtime() as rt:
        model: Any = rt.wrap(Branches(), parallel="accelerate", config=f"{directory}/accelerate.json")
        optimizer = rt.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        with pytest.raises(UserError, match="the model has an optimizer already"):
            rt.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        for step in range(4):
            taken = step % 2
            before = [_weights(model, number) for number in (taken, 1 - taken)]
            model(taken, torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            after = [_weights(model, number) for number in (taken, 1 - taken)]
            moves.append((not torch.equal(before[0], after[0]), not torch.equal(before[1], after[1])))
    return moves


def _weights(model: Any, number: int) -> torch.Tensor:
    found: torch.Tensor = model.whole_state()[f"layers.{number}.weight"].full_tensor()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_what_has_no_gradient_in_a_step_stays(stage: int, tmp_path: Path) -> None:
    deepspeed(tmp_path, stage)
    assert run_ranks(_moves, 2, str(tmp_path)) == [[(True, False)] * 4] * 2


def _as_on_the_page(directory: str, code: str) -> float:
    os.chdir(directory)
    with ddpkit.runtime() as rt:
        names: dict[str, Any] = {"rt": rt, "torch": torch, "Net": lambda: nn.Linear(6, 1)}
        exec(code, names)
        loss: torch.Tensor = names["model"](torch.ones(2, 6)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        names["optimizer"].step()
        return float(names["model"](torch.ones(2, 6)).square().mean().detach() - loss.detach())


def test_what_models_md_says_of_it(tmp_path: Path) -> None:
    file, code = (block for block in pages.by_section("docs/models.md")["DeepSpeed"] if block.language != "indented")
    (tmp_path / "accelerate.yaml").write_text(file.text)
    assert all(change < 0 for change in run_ranks(_as_on_the_page, 2, str(tmp_path), code.text))


def test_scripts(tmp_path: Path) -> None:
    deepspeed(tmp_path, 2)
    whole = run_ranks(_script, 2, str(tmp_path), 0, False)[0]
    first = run_ranks(_script, 2, str(tmp_path), 5, True)[0]
    rest = run_ranks(_script, 2, str(tmp_path), 0, True)[0]
    assert len(first) in (5, 6)
    assert [*first, *rest] == pytest.approx(whole, rel=1e-4)
    for said in run_ranks(_refusals, 2, str(tmp_path)):
        assert "the model needs its optimizer: optimizer = rt.wrap_optimizer(optimizer, model)" in said[0]
        assert "rt.wrap_optimizer(optimizer, model)" in said[1]
        assert "the optimizer Adafactor may not be right for ZeRO" in said[2]
        assert "the optimizer has other parameters than those of the model that are trained" in said[3]
        assert "weight is in float16; give it a model in float32" in said[4]
        assert "rt.wrap_optimizer(optimizer, model)" in said[5]
        assert "2 backward passes in this step, each as if it were the step's last" in said[6]


def test_from_the_shell_and_evaluated_on_other_ranks(tmp_path: Path) -> None:
    how = deepspeed(tmp_path, 3, bf16=True) | {"model__args": {"batchnorm": False}}
    (tmp_path / "x.yaml").write_text(json.dumps(tree(tmp_path / "run", **how)))
    done = shell("run", str(tmp_path / "x.yaml"))
    assert done.code == 0, done.err
    assert not done.out, done.out
    evaluated = shell("eval", str(tmp_path / "run"), "-o", "launch.nproc_per_node=3")
    assert evaluated.code == 0, evaluated.err
    recorded, found = metrics(tmp_path / "run")[-1], json.loads(evaluated.out)
    assert found == {key: pytest.approx(recorded[key], rel=1e-5) for key in ("step", "error", "within")}
