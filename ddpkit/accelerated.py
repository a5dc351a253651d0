"""Models that are prepared as a file of `accelerate config` says. Imports torch when it does so.

Preparing is accelerate's; all else stays ddpkit's: the launcher, the sampler, the loop, checkpoints. So what such a
file says of processes, machines and ports is not looked at, and what it says of the rest has to agree with the run.
DeepSpeed is asked without accelerate, which on a CPU takes a file that asks for it and trains plain DDP, and otherwise
reads whether to use it from the environment: `ddpkit.zero`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpkit import zero_config
from ddpkit.errors import ConfigError, UserError
from ddpkit.zero_config import ZeroConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ddpkit.config import Config

_REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")  # all of them DDP, where there are several ranks
_DEEPSPEED = "DEEPSPEED"
_INSTEAD = {"FSDP": "model.parallel: fsdp2 is torch's own FSDP"}
_CHOICES = ", ".join([*_REPLICATED, _DEEPSPEED])


@dataclass(frozen=True)
class Settings:
    """What a file of `accelerate config` asks for, as far as it is for accelerate to see to here.

    Attributes:
        distributed_type: "NO", "MULTI_CPU", "MULTI_GPU" or "DEEPSPEED".
        mixed_precision: "no", "bf16" or "fp16".
        zero: how DeepSpeed is to spread the model; None: it is not spread.
    """

    distributed_type: str = "NO"
    mixed_precision: str = "no"
    zero: ZeroConfig | None = None


def read(path: str | Path | None) -> Settings:
    """Read a file of `accelerate config`; None stands for one that asks for nothing in particular.

    Raises ConfigError for what cannot be read, and for what cannot be done here; without importing accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("accelerate is not installed here: pip install accelerate")
    if path is None:
        return Settings()
    found = _parsed(Path(path).expanduser())
    kind = str(found.get("distributed_type"))
    if kind not in (*_REPLICATED, _DEEPSPEED):
        instead = _INSTEAD.get(kind, f"use one of {_CHOICES}")
        raise ConfigError(f"{path}: distributed_type: {kind}: ddpkit cannot have accelerate prepare it; {instead}")
    dynamo = found.get("dynamo_config") or {}
    if str(dynamo.get("dynamo_backend", "NO") if isinstance(dynamo, Mapping) else dynamo).upper() != "NO":
        raise ConfigError(f"{path}: dynamo_config: compiling is the run's own: model.compile: true")
    mixed_precision = str(found.get("mixed_precision") or "no").lower()
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"{path}: mixed_precision: {mixed_precision}: use no, bf16 or fp16")
    if kind != _DEEPSPEED:
        return Settings(kind, mixed_precision)
    try:
        zero = zero_config.parse(found.get("deepspeed_config"), mixed_precision)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if zero is not None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{path}: distributed_type: {kind}: DeepSpeed is not installed here: pip install --no-build-isolation "
            "deepspeed; or use model.parallel: fsdp2, which spreads parameters, gradients and optimizer state as well"
        )
    return Settings(kind, mixed_precision, zero)


def check(config: Config) -> None:
    """Raise ConfigError unless the config's file can be followed, and agrees with the run."""
    path, train = config.model.accelerate_config, config.train
    settings = read(path)
    if settings.zero is not None:
        _check_zero(settings.zero, config, f"{path}: distributed_type: {settings.distributed_type}")
    elif settings.mixed_precision not in ("no", train.precision):
        raise ConfigError(
            f"{path}: mixed_precision: {settings.mixed_precision}, and train.precision: {train.precision}; give both "
            "the same"
        )


def _check_zero(zero: ZeroConfig, config: Config, key: str) -> None:
    precision, train = "bf16" if zero.bf16 else "fp32", config.train
    if train.precision != precision:
        raise ConfigError(
            f"{key}: it is to compute in {precision}, and train.precision: {train.precision}; give both the same"
        )
    if zero.clip_grad_norm not in (None, train.clip_grad_norm):
        raise ConfigError(
            f"{key}: gradient_clipping: {zero.clip_grad_norm:g}, and train.clip_grad_norm: "
            f"{'null' if train.clip_grad_norm is None else train.clip_grad_norm}; give both the same"
        )
    refused = {
        "train.clip_grad_value": train.clip_grad_value is not None,
        "train.on_nonfinite: ignore": train.on_nonfinite == "ignore",
        "model.ema_decay": config.model.ema_decay is not None,
        "model.compile": config.model.compile is not False,
        "data.micro_batch_size: auto": config.data.micro_batch_size == "auto",
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise ConfigError(f"{key}: not with {name}; leave it out")
    module, _, name = config.optimizer.factory.partition(":")
    if module == "torch.optim" and name not in zero_config.OPTIMIZERS and not zero.takes_any_optimizer:
        raise ConfigError(f"{key}: {zero_config.unknown_optimizer(name)}")


def prepare(module: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """Have accelerate prepare a module: on its device, wrapped. Collective. Its state is one of the process: `release`.

    Raises:
        UserError: it sees other ranks than there are.
    """
    from accelerate import Accelerator

    # Where it is not told that this is a CPU, it takes each rank for the only one. Precision, accumulation and loss
    # scaling are the loop's.
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if accelerator.num_processes != world_size:
        raise UserError(f"accelerate sees {accelerator.num_processes} processes, and there are {world_size} ranks")
    prepared: nn.Module = accelerator.prepare(module)
    return prepared


def release() -> None:
    """Forget what accelerate knows of the process's ranks: the next runtime may have others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def _parsed(path: Path) -> Mapping[str, Any]:
    from ddpkit import yaml_files  # not for all those who have no such file: it takes 40 ms

    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    found = yaml_files.parse(text, str(path)).plain()
    if not isinstance(found, Mapping) or "distributed_type" not in found:
        raise ConfigError(f"{path}: not a file of `accelerate config`, which says a distributed_type")
    return found
