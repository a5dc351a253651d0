"""`parallel: accelerate`: it prepares the model, and all the rest is as with DDP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import ddpkit
from ddpkit import accelerated
from ddpkit.errors import ConfigError
from ddpkit.testing import run_ranks
from tests import toy
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, cli, start, to_the_end, tree, write

FILE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
downcast_bf16: 'no'
enable_cpu_affinity: false
ipex_config: {}
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 7
rdzv_backend: static
same_network: false
use_cpu: true
"""


def test_a_run_is_that_of_ddp_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text(FILE)
    how = {"model__parallel": "accelerate", "model__accelerate_config": str(tmp_path / "accelerate.yaml")}
    assert start(tree(tmp_path / "ddp", train__epochs=2), 3) == "done"
    env = plan(tmp_path / "faults", Fault("train", 6, rank=1, do="SIGTERM"), Fault("train", 4, rank=2, whom="group"))
    ends = to_the_end(tree(tmp_path / "run", train__epochs=2, **how), 3, env)
    assert sorted(ends) == ["SIGTERM", "done", "killed"]
    assert not pending(tmp_path / "faults")
    assert_same_end(tmp_path / "run", tmp_path / "ddp")


def _one_after_the_other() -> list[Any]:
    found = []
    for _ in range(2):
        with ddpkit.runtime() as rt:
            model = rt.wrap(toy.model(), parallel="accelerate")
            model(toy.dataset()[0][0].repeat(2, 1)).sum().backward()
            found.append(type(model).__name__)
    return found


def test_several_runtimes_in_one_process() -> None:
    assert run_ranks(_one_after_the_other, 2) == [["DistributedDataParallel"] * 2] * 2
    assert run_ranks(_one_after_the_other, 1) == [["Sequential"] * 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            FILE.replace("MULTI_CPU", "FSDP"),
            "distributed_type: FSDP: ddpkit cannot have accelerate prepare it; model.p",
        ),
        (
            FILE.replace("MULTI_CPU", "MEGATRON_LM"),
            "accelerate prepare it; use one of NO, MULTI_CPU, MULTI_GPU, DEEPSPEED",
        ),
        (FILE.replace("mixed_precision: 'no'", "mixed_precision: bf16"), "bf16, and train.precision: fp32; give both"),
        (FILE.replace("mixed_precision: 'no'", "mixed_precision: fp8"), "mixed_precision: fp8: use no, bf16 or fp16"),
        (FILE + "dynamo_config: {dynamo_backend: INDUCTOR}\n", "compiling is the run's own: model.compile: true"),
        ("num_processes: 2\n", "not a file of `accelerate config`"),
        ("{", "x.yaml:"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_cannot_be_followed_are_refused_before_anything_starts(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    config = tree(tmp_path / "run", model__parallel="accelerate", model__accelerate_config=str(path))
    ended = cli(capsys, "run", str(write(tmp_path / "config.yaml", config)))
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.startswith("ddpkit: model.accelerate_config: ")


def test_deepspeed_that_is_not_there_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text(FILE.replace("MULTI_CPU", "DEEPSPEED"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed here: pip install --no-build-isolation"):
        accelerated.read(tmp_path / "x.yaml")


def test_a_file_is_for_accelerate_only(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(FILE)
    assert accelerated.read(tmp_path / "x.yaml") == accelerated.Settings("MULTI_CPU", "no")
    from ddpkit import config as configs

    with pytest.raises(ConfigError, match=r"model\.accelerate_config: it is for model\.parallel: accelerate"):
        configs.from_tree(tree(tmp_path, model__accelerate_config="x.yaml"))
    with pytest.raises(ConfigError, match=r"model\.fsdp2: it is for model\.parallel: fsdp2"):
        configs.from_tree(tree(tmp_path, model__fsdp2={"layers": ["Linear"]}))
    # Beside a choice that is written down, FSDP2's section may lie ready.
    assert configs.from_tree(tree(tmp_path, model__fsdp2={"layers": ["Linear"]}, model__parallel="ddp"))
    with pytest.raises(ConfigError, match=r"model\.fsdp2\.cpu_offload: not with train\.precision: fp16"):
        offloaded = {"model__parallel": "fsdp2", "model__fsdp2": {"cpu_offload": True}}
        configs.from_tree(tree(tmp_path, train__precision="fp16", **offloaded))
