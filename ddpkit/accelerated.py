"""Models that Hugging Face's accelerate prepares, as a file of `accelerate config` says. Imports torch when it does so.

Preparing is accelerate's; all else stays ddpkit's: the launcher, the sampler, the loop, checkpoints. So what such a
file says of processes, machines and ports is not looked at, and what it says of the rest has to agree with the run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpkit.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

_REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")  # all of them DDP, where there are several ranks
_INSTEAD = {
    "FSDP": "model.parallel: fsdp2 is torch's own FSDP",
    # Its engine's state is flat parts of this number of ranks, and objects that take a pickle.
    "DEEPSPEED": "model.parallel: fsdp2 spreads parameters, gradients and optimizer state as ZeRO does, and can be "
    "saved, and go on at any number of ranks",
}
_CHOICES = ", ".join(_REPLICATED)


@dataclass(frozen=True)
class Settings:
    """What a file of `accelerate config` asks for, as far as it is for accelerate to see to here.

    Attributes:
        distributed_type: "NO", "MULTI_CPU" or "MULTI_GPU".
        mixed_precision: "no", "bf16" or "fp16".
    """

    distributed_type: str = "NO"
    mixed_precision: str = "no"


def read(path: str | Path | None) -> Settings:
    """Read a file of `accelerate config`; None stands for one that asks for nothing in particular.

    Raises ConfigError for what cannot be read, and for what cannot be done here; without importing accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("accelerate is not installed here: pip install accelerate")
    if path is None:
        return Settings()
    found = _parsed(Path(path))
    kind = str(found.get("distributed_type"))
    if kind not in _REPLICATED:
        is_missing = kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None
        why = "DeepSpeed is not installed here" if is_missing else "ddpkit cannot have accelerate prepare it"
        raise ConfigError(f"{path}: distributed_type: {kind}: {why}; {_INSTEAD.get(kind, 'use one of ' + _CHOICES)}")
    dynamo = found.get("dynamo_config") or {}
    if str(dynamo.get("dynamo_backend", "NO") if isinstance(dynamo, Mapping) else dynamo).upper() != "NO":
        raise ConfigError(f"{path}: dynamo_config: compiling is the run's own: model.compile: true")
    mixed_precision = str(found.get("mixed_precision") or "no").lower()
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"{path}: mixed_precision: {mixed_precision}: use no, bf16 or fp16")
    return Settings(kind, mixed_precision)


def check(path: str | Path | None, precision: str) -> None:
    """Raise ConfigError unless the file can be followed, and agrees with the run on the precision."""
    settings = read(path)
    if settings.mixed_precision not in ("no", precision):
        raise ConfigError(
            f"{path}: mixed_precision: {settings.mixed_precision}, and train.precision: {precision}; give both the same"
        )


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
