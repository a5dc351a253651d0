"""The examples learn what they are to learn; killed in the middle of a save, they go on to the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.finetune.pretrain import pretrain
from tests.examples.starting import EXAMPLES, killed_in_save, script, tree
from tests.ports import free_port
from tests.resume.runs import Tree, assert_same_end, events, metrics, start, to_the_end

SEGMENTATION = (
    *("data.train.args.count=128", "data.eval.args.count=21", "model.args.width=8"),
    *("train.epochs=4", "scheduler.args.total_iters=32", "checkpoint.every_steps=7", "launch.timeout_s=300"),
)
LANGUAGE_MODEL = (
    "model.args={width: 32, depth: 2, heads: 2, context: 32}",
    *(f"data.{part}.args={{context: 32, megabytes: 0.1}}" for part in ("train", "eval")),
    *("train.max_steps=40", "train.eval_every.steps=8", "checkpoint.every_steps=7", "launch.timeout_s=60"),
    "scheduler.args={max_lr: 0.03, total_steps: 40, pct_start: 0.1}",
)
FINETUNE = ("train.epochs=20", "train.callbacks.0.args.epoch=5", "checkpoint.every_steps=30")


def evaluations(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run_dir) if line["kind"] == "eval"]


def killed_and_whole(make: Callable[[str], Tree], at: int, ranks: tuple[int, int] = (2, 2)) -> tuple[Path, Path]:
    """Two runs to their ends; one was killed in the save of step ``at``, and went on on the second number of ranks."""
    whole, killed = make("whole"), make("killed")
    assert start(whole, ranks[0]) == "done"
    run_dir = Path(killed["run_dir"])
    assert to_the_end(killed, list(ranks), killed_in_save(run_dir.parent / "faults", at)) == ["killed", "done"]
    [restored] = events(run_dir, "restored")
    assert 0 < restored["step"] < at
    return run_dir, Path(whole["run_dir"])


def test_minimal(tmp_path: Path) -> None:
    path = EXAMPLES / "minimal.py"
    assert len(path.read_text().splitlines()) <= 40
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told = script(path, 2, whole)
    assert told is not None
    right = [float(each) for each in re.findall(r"epoch \d+: ([\d.]+)% right", told)]
    assert len(right) == 8 and right[-1] >= 97 > right[0]
    assert script(path, 2, killed, killed_in_save(tmp_path / "faults", 80)) is None
    rest = script(path, 2, killed, {"TOY_FAULTS": str(tmp_path / "faults")})
    assert rest is not None and told.endswith(rest) and rest.startswith("epoch 3")
    assert_same_end(killed / "runs/minimal", whole / "runs/minimal")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "smaller", "at", "measure", "bar"),
    [
        ("digits", ("train.epochs=3", "checkpoint.every_steps=15"), 45, "accuracy", 0.9),
        ("segmentation", SEGMENTATION, 21, "iou/mean", 0.5),
    ],
    ids=["digits", "segmentation"],
)
def test_an_example_by_config(
    tmp_path: Path, example: str, smaller: tuple[str, ...], at: int, measure: str, bar: float
) -> None:
    killed, whole = killed_and_whole(lambda name: tree(example, tmp_path / name, *smaller), at)
    assert_same_end(killed, whole)
    found = evaluations(whole, measure)
    assert found[-1] > bar > found[0]


@pytest.mark.slow
def test_segmentation_in_fp16_goes_on_on_three_ranks(tmp_path: Path) -> None:
    """Small, for fp16 is slow on a CPU. Sums differ by their order: all samples are used, to nearly the same end."""
    small = ("data.train.args.count=32", "data.eval.args.count=7", "checkpoint.every_steps=2", "train.precision=fp16")

    def make(name: str) -> Tree:
        return tree("segmentation", tmp_path / name, *SEGMENTATION, *small)

    killed, whole = killed_and_whole(make, at=6, ranks=(2, 3))
    found = evaluations(killed, "iou/mean")
    assert found == pytest.approx(evaluations(whole, "iou/mean"), rel=0.02)
    assert len(found) == 4 and found[-1] > 0.3 > found[0]
    clocks = [[(line["kind"], line["step"], line["samples"]) for line in metrics(each)] for each in (killed, whole)]
    assert clocks[0] == clocks[1]


@pytest.mark.slow
def test_intersection_over_union_is_that_of_all_pixels_together(tmp_path: Path) -> None:
    """On one rank and on three, of which the last batch leaves one without a sample: the same numbers."""
    found = []
    for ranks in (1, 3):
        run = tree("segmentation", tmp_path / str(ranks), *SEGMENTATION, "train.max_steps=1", "train.epochs=null")
        run["data"]["eval"]["args"]["count"], run["data"]["eval_batch_size"] = 7, 2
        run["train"]["precision"], run["optimizer"]["args"]["lr"] = "fp32", 0.0
        run["optimizer"]["groups"] = []
        assert start(run, ranks) == "done"
        found.append([line for line in metrics(tmp_path / str(ranks)) if line["kind"] == "eval"])
    assert found[0] == found[1] and len(found[0]) == 1


@pytest.mark.slow
def test_finetune(tmp_path: Path) -> None:
    weights = tmp_path / "pretrained.pth"
    pretrain(weights, epochs=3)

    def make(name: str) -> Tree:
        return tree("finetune", tmp_path / name, *FINETUNE, f"model.init_from.path={weights}")

    killed, whole = killed_and_whole(make, at=60)
    assert_same_end(killed, whole)
    found = evaluations(whole, "accuracy")
    assert found[-1] > 0.85 > found[0]


@pytest.mark.parametrize(
    "spread", [(), pytest.param(("model.parallel=fsdp2",), marks=pytest.mark.slow)], ids=["ddp", "fsdp2"]
)
def test_language_model(tmp_path: Path, spread: tuple[str, ...]) -> None:
    def make(name: str) -> Tree:
        return tree("language_model", tmp_path / name, *LANGUAGE_MODEL, *spread)

    killed, whole = killed_and_whole(make, at=28)
    assert_same_end(killed, whole)
    found = evaluations(whole, "bits_per_byte")
    assert found[-1] < 4.6 < 4.8 < found[0] < 8


@pytest.mark.slow
def test_before_and_after_print_the_same_losses(tmp_path: Path) -> None:
    folder = EXAMPLES / "before_after"
    before = subprocess.run(
        [sys.executable, folder / "before.py", "2"],
        cwd=tmp_path,
        env=os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert before.returncode == 0, before.stderr
    after = script(folder / "after.py", 2, tmp_path / "whole")
    assert after == before.stdout
    losses = [float(line.rpartition(" ")[2]) for line in before.stdout.splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.1 < losses[0]

    killed = tmp_path / "killed"
    assert script(folder / "after.py", 2, killed, killed_in_save(tmp_path / "faults", 30)) is None
    rest = script(folder / "after.py", 2, killed, {"TOY_FAULTS": str(tmp_path / "faults")})
    assert_same_end(killed / "runs/signals", tmp_path / "whole/runs/signals")
    assert rest == "".join(after.splitlines(keepends=True)[1:])
