"""Killed in the middle of an accumulation window, a warm-up or a search for a loss scale: the same bits at the end."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests import toy
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import (
    assert_same_end,
    cli,
    events,
    last_checkpoint,
    metrics,
    shell,
    start,
    to_the_end,
    tree,
)

HERE = "tests.resume.test_training_state"
TORCH = "torch.optim.lr_scheduler"
WARMED_UP = {
    "factory": f"{TORCH}:SequentialLR",
    "args": {
        "schedulers": [
            {"factory": f"{TORCH}:LinearLR", "args": {"start_factor": 0.1, "total_iters": 6}},
            {"factory": f"{TORCH}:CosineAnnealingLR", "args": {"T_max": 12}},
        ],
        "milestones": [6],
    },
}
# Passes 5 and 6 are those of the third step, in the warm-up.
MID_STEP = Fault("train", 6, whom="group")

WINDOWS: dict[str, Any] = {"data__micro_batch_size": 2, "scheduler": WARMED_UP}
VARIANTS: dict[str, tuple[int, dict[str, Any], list[Fault]]] = {
    "a warm-up, an average, recomputed activations": (
        2,
        {
            **WINDOWS,
            "model": {
                "factory": "tests.resume.faults:model",
                "args": {},
                "ema_decay": 0.9,
                "activation_checkpointing": ["Linear", "BatchNorm1d", "Dropout"],
                "ddp": {"gradient_as_bucket_view": True},
            },
            "optimizer": {
                "factory": "torch.optim:AdamW",
                "args": {"lr": 0.01},
                "no_decay": ["norms", "biases"],
                "groups": [{"modules": ["0"], "args": {"lr": 0.02}}],
                "scale_lr": {"rule": "sqrt", "batch_size": 32},
            },
        },
        [MID_STEP],
    ),
    "fp16, clipped, three ranks": (
        3,
        {**WINDOWS, "train__precision": "fp16", "train__clip_grad_norm": 0.1, "data__global_batch_size": 12},
        [MID_STEP, Fault("train", 8, rank=2, whom="group")],
    ),
    "weights in half precision, a plateau": (
        2,
        {
            "data__micro_batch_size": 2,
            "train__precision": "bf16-true",
            "model": {"factory": "tests.resume.faults:model", "args": {}, "ema_decay": 0.9},
            "train__eval_ema": True,
            "scheduler": {
                "factory": f"{TORCH}:ReduceLROnPlateau",
                "args": {"patience": 0, "threshold": 0.5},
                "metric": "error",
            },
            "train__eval_every": {"steps": 2},
        },
        [Fault("eval", 3, whom="group"), MID_STEP, Fault("train", 7, rank=1, whom="group")],
    ),
    "images with channels last": (
        2,
        {
            "model": {"factory": f"{HERE}:images_model", "channels_last": True, "ddp": {"static_graph": True}},
            "data__train": {"factory": f"{HERE}:images"},
            "data__eval": {"factory": f"{HERE}:images"},
            "data__micro_batch_size": 2,
        },
        [MID_STEP],
    ),
}
FAST = "a warm-up, an average, recomputed activations"


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in VARIANTS]
)
def test_a_killed_run_ends_with_the_same_bits(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks, changes, faults = VARIANTS[variant]
    assert start(tree(tmp_path / "reference", **changes), ranks) == "done"
    env = plan(tmp_path / "faults", *faults)
    ends = to_the_end(tree(tmp_path / "killed", **changes), ranks, env)
    assert not pending(tmp_path / "faults") and len(ends) > 1
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    train = [line for line in metrics(tmp_path / "killed") if line["kind"] == "train"]
    assert len({line["lr"] for line in train}) > 1
    if variant == FAST:
        # Two groups with the first layer's rate, of which one has no decay, and two with the others'; in the warm-up.
        for name, rate in {"lr": 0.01, "lr/1": 0.01, "lr/2": 0.005, "lr/3": 0.005}.items():
            assert train[0][name] == pytest.approx(rate * (0.1 + 0.9 * 2 / 6)), name
        export_and_evaluate(tmp_path, capsys)


def export_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plain, average = (str(folder / name) for name in ("killed", "plain.safetensors", "average.safetensors"))
    assert cli(capsys, "export", run, plain).code == 0
    assert cli(capsys, "export", run, average, "--ema").code == 0
    weights, averaged = load_file(plain), load_file(average)
    assert weights.keys() == averaged.keys() == toy.model().state_dict().keys()
    assert not torch.equal(weights["0.weight"], averaged["0.weight"])
    assert torch.equal(weights["1.running_mean"], averaged["1.running_mean"])
    refused = cli(capsys, "export", str(folder / "reference"), average.replace("average", "x"), "--ema", "--step", "99")
    assert refused.code == 2


@pytest.mark.slow
def test_an_average_is_evaluated_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"factory": "tests.resume.faults:model", "args": {}, "ema_decay": 0.9}
    config = tree(tmp_path / "run", model=model, train__eval_ema=True, train__epochs=1)
    assert start(config, 1) == "done"
    recorded = next(line for line in metrics(tmp_path / "run") if line["kind"] == "eval")
    for extra, same in (("train.eval_ema=true", True), ("train.eval_ema=false", False)):
        one = ("--launcher", "inline", "-o", "launch.nproc_per_node=1")
        ended = shell("eval", str(tmp_path / "run"), *one, "-o", extra, env={"OMP_NUM_THREADS": "1"})  # as `start` has
        assert ended.code == 0, ended.err
        assert (json.loads(ended.out)["error"] == recorded["error"]) is same
    refused = cli(capsys, "eval", str(tmp_path / "run"), "--ema", "-o", "model.ema_decay=null")
    assert refused.code == 2 and "train.eval_ema: given without model.ema_decay" in refused.err


class Images(Dataset[Any]):
    def __init__(self) -> None:
        self.images = torch.randn(50, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index], self.images[index].mean().reshape(1), index


def images() -> Images:
    return Images()


def images_model() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 1))


class Trip(nn.Module):
    """Gives infinity for a value that it does not like."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.where(inputs == 77.0, math.inf, inputs)


def tripping_model() -> nn.Module:
    return nn.Sequential(nn.Identity(), Trip(), toy.model())


class Planted(Dataset[Any]):
    """Samples of toy, of which some have a value that `Trip` does not like."""

    def __init__(self, at: list[int]) -> None:
        self.samples = toy.dataset(50)
        self.at = at

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        inputs, *rest = self.samples[index]
        return (torch.full_like(inputs, 77.0) if index in self.at else inputs), *rest


def planted(at: list[int]) -> Planted:
    return Planted(at)


def planted_tree(run_dir: Path, at: list[int], **changes: Any) -> dict[str, Any]:
    return tree(
        run_dir,
        **{
            "model": {"factory": f"{HERE}:tripping_model", "args": {}},
            "data__train": {"factory": f"{HERE}:planted", "args": {"at": at}},
            "data__shuffle": False,
            "data__micro_batch_size": 2,
            "train__epochs": 1,
            **changes,
        },
    )


def test_a_nan_in_one_ranks_data_stops_all_with_a_report_and_a_state(tmp_path: Path) -> None:
    config = planted_tree(tmp_path / "run", [22], checkpoint={"every_steps": None, "keep": 9})
    end = start(config, 2, errors=True)  # the same on all ranks
    assert end.startswith(
        "NotFinite: step 3 cannot be taken: the loss is nan on rank 1 (and then on 0), in pass 2 of 2, samples 22 to 23"
    ), end
    assert "it appeared first in the forward pass of 1 (Trip)" in end and "2.0.weight" in end
    assert end.endswith("The update was not made; the state before it, of step 2, is saved")
    assert last_checkpoint(tmp_path / "run").name == "step-00000002"
    assert [event["cause"] for event in events(tmp_path / "run", "failed")] == [end]
    # The step comes again; skipped from there, the run is the same as if it had been so from the start.
    assert start(config, 2, attempt=1, errors=True) == end
    skipping = planted_tree(tmp_path / "run", [22], train__on_nonfinite="skip")
    assert start(skipping, 2, attempt=2) == "done"
    assert [event["step"] for event in events(tmp_path / "run", "skipped")] == [2]
    assert metrics(tmp_path / "run")[-1]["step"] == 5 and metrics(tmp_path / "run")[-1]["samples"] == 48


@pytest.mark.slow
def test_skipped_steps_are_bounded_in_a_row_also_over_a_restart(tmp_path: Path) -> None:
    # Of the steps 3, 4 and 5 none can be taken.
    changes: dict[str, Any] = {"train__on_nonfinite": "skip", "train__max_skipped": 2}
    config = planted_tree(tmp_path / "run", [16, 31, 32], **changes)
    end = start(config, 2, errors=True)
    assert end.startswith("NotFinite: step 3 cannot be taken, after 2 that were skipped: the loss is nan on rank 0"), (
        end
    )
    assert start(config, 2, attempt=1, errors=True) == end  # the two are in the state
    more = planted_tree(tmp_path / "run", [16, 31, 32], **changes | {"train__max_skipped": 3})
    assert start(more, 2, attempt=2) == "done"
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], last["samples"]) == (3, 48)
    # The schedule counts steps that were taken.
    other = planted_tree(tmp_path / "other", [], train__epochs=None, train__max_steps=3)
    assert start(other, 2) == "done"
    for name in ("run", "other"):
        config = json.loads((last_checkpoint(tmp_path / name) / "manifest.json").read_text())
        assert config["shared"]["main"]["scheduler"]["last_epoch"] == 3


@pytest.mark.slow
def test_the_micro_batch_that_was_found_stays_with_the_run(tmp_path: Path) -> None:
    changes = {"data__micro_batch_size": "auto", "train__step": f"{HERE}:large_step", "train__epochs": 1}
    config = tree(tmp_path / "run", **changes)
    assert start(config, 2, {"TOY_MOST": "3"}) == "done"
    reference = tree(tmp_path / "reference", **changes | {"data__micro_batch_size": 3})
    assert start(reference, 2, {"TOY_MOST": "99"}) == "done"
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    more = tree(tmp_path / "run", **changes | {"train__epochs": 2})
    assert start(more, 2, {"TOY_MOST": "4"}, attempt=1) == "done"
    manifest = json.loads((last_checkpoint(tmp_path / "run") / "manifest.json").read_text())
    assert manifest["shared"]["main"]["loader"]["micro_batch_size"] == 3


def large_step(model: nn.Module, batch: Any) -> Any:
    if len(batch[0]) > int(os.environ["TOY_MOST"]):
        raise MemoryError
    return toy.step(model, batch)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compiled_model_trains_as_the_other_and_its_faults_are_found(tmp_path: Path) -> None:
    model = {"factory": f"{HERE}:tripping_model", "args": {}}
    losses = []
    for name, compiled in (("eager", False), ("compiled", {"mode": "default"})):
        config = planted_tree(tmp_path / name, [40], model=model | {"compile": compiled}, log_every=1)
        end = start(config, 1, errors=True, timeout_s=180)  # the first compilation on a machine takes long
        assert end.startswith("NotFinite: step 6 cannot be taken: the loss is nan on rank 0, in pass 1 of 4"), end
        assert "it appeared first in the forward pass of 1 (Trip)" in end
        losses.append([line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "train"])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_way_to_compile_that_there_is_none_of_is_bad_input(tmp_path: Path) -> None:
    model = {"factory": "tests.toy:model", "args": {}, "compile": {"backend": "nope"}}
    end = start(planted_tree(tmp_path, [], model=model), 1, errors=True)
    assert end.startswith("ConfigError: model.compile: Invalid backend: 'nope'"), end
