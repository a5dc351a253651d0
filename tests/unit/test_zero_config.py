"""What a file of `accelerate config` may say of DeepSpeed, and what is said of the rest."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from ddpkit import accelerated, zero_config
from ddpkit.errors import ConfigError
from ddpkit.zero_config import ZeroConfig
from tests.resume.runs import cli, tree, write

_find = importlib.util.find_spec


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name == "deepspeed" else _find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def accelerate(directory: Path, said: Any, **more: Any) -> str:
    path = directory / "accelerate.json"
    path.write_text(json.dumps({"distributed_type": "DEEPSPEED", "deepspeed_config": said, **more}))
    return str(path)


def test_what_accelerate_config_writes_is_taken_up(tmp_path: Path) -> None:
    said = {
        "deepspeed_multinode_launcher": "standard",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": False,
        "zero_stage": 3,
    }
    path = accelerate(tmp_path, said, mixed_precision="bf16")
    assert accelerated.read(path).zero == ZeroConfig(3, {}, bf16=True, clip_grad_norm=1.0)
    assert accelerated.read(accelerate(tmp_path, {})).zero == ZeroConfig(2)  # accelerate's own default
    assert accelerated.read(accelerate(tmp_path, {"zero_stage": 0})).zero is None  # nothing is spread: DDP
    for of_the_run in ({"zero_stage": 0, "gradient_clipping": 1.0}, {"zero_stage": 0, "bf16": {"enabled": True}}):
        with pytest.raises(ConfigError, match=r"with stage 0 it is the run|ddpkit does not follow it"):
            accelerated.read(accelerate(tmp_path, of_the_run))
    zero = {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False, "offload_optimizer": {"device": "none"}}
    whole = {"zero_optimization": zero, "bf16": {"enabled": True}, "fp16": {"enabled": False}}
    whole |= {"train_batch_size": "auto", "zero_allow_untested_optimizer": True}
    (tmp_path / "ds.json").write_text(json.dumps(whole))
    found = accelerated.read(accelerate(tmp_path, {"deepspeed_config_file": str(tmp_path / "ds.json")})).zero
    assert found == ZeroConfig(1, {"overlap_comm": False}, bf16=True, takes_any_optimizer=True)
    assert found.for_engine()["zero_optimization"] == {"overlap_comm": False, "stage": 1}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"zero_stage": 4}, "zero_optimization.stage: 4: use 0, 1, 2 or 3"),
        ({"zero_stag": 2}, "deepspeed_config.zero_stag: ddpkit does not follow it; did you mean 'zero_stage'?"),
        ({"offload_optimizer_device": "cpu"}, "ddpkit cannot save what is kept elsewhere; model.parallel: fsdp2"),
        ({"gradient_accumulation_steps": 4}, "say 1 or auto: it follows from data.global_batch_size and data.micro"),
        ({"gradient_clipping": "much"}, "gradient_clipping: 'much': use a number, or auto"),
        (["x"], "deepspeed_config: expected names with values, found ['x']"),
        ({"deepspeed_config_file": "nowhere.json"}, "nowhere.json: cannot be read: No such file or directory"),
        ({"deepspeed_config_file": "x.json", "zero_stage": 2}, "deepspeed_config.zero_stage: it belongs into x.json"),
    ],
)
def test_what_cannot_be_followed_is_refused(said: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        zero_config.parse(said, "no")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer: the run's own is used: optimizer"),
        ({"fp16": {"enabled": True}}, "fp16: ddpkit cannot save its loss scaling; use bf16"),
        ({"train_batch_size": 64}, "train_batch_size: say auto: batches are the run's: data.global_batch_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param: ddpkit cannot"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights: ddpkit does"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler: ddpkit does not follow it"),
    ],
)
def test_what_a_file_of_deepspeed_s_own_may_not_say(whole: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **whole}))
    with pytest.raises(ConfigError) as caught:
        zero_config.parse({"deepspeed_config_file": str(tmp_path / "ds.json")}, "no")
    assert str(caught.value).startswith(f"{tmp_path / 'ds.json'}: ")
    assert message in str(caught.value)
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"ds\.json: not JSON"):
        zero_config.parse({"deepspeed_config_file": str(tmp_path / "ds.json")}, "no")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__precision": "bf16"}, "it is to compute in fp32, and train.precision: bf16; give both the same"),
        ({"train__clip_grad_norm": 2.0}, "gradient_clipping: 1, and train.clip_grad_norm: 2.0; give both the same"),
        ({}, "gradient_clipping: 1, and train.clip_grad_norm: null; give both the same"),
        ({"model__ema_decay": 0.9, "train__clip_grad_norm": 1.0}, "not with model.ema_decay"),
        ({"model__compile": True, "train__clip_grad_norm": 1.0}, "not with model.compile"),
        (
            {"optimizer": {"factory": "torch.optim:Adafactor"}, "train__clip_grad_norm": 1.0},
            "the optimizer Adafactor may not be right for ZeRO",
        ),
    ],
)
def test_what_a_run_may_not_ask_for_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = accelerate(tmp_path, {"zero_stage": 2, "gradient_clipping": 1.0})
    config = tree(tmp_path / "run", model__parallel="accelerate", model__accelerate_config=path, **changes)
    ended = cli(capsys, "run", str(write(tmp_path / "config.yaml", config)))
    assert ended.code == 2
    assert ended.err.startswith(f"ddpkit: model.accelerate_config: {path}: distributed_type: DEEPSPEED: ")
    assert message in ended.err
