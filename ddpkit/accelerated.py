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

from ddpkit import yaml_files
from ddpkit.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

_REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")
_INSTEAD = {
    "FSDP": "use model.parallel: fsdp2, which is torch's own FSDP",
    "DEEPSPEED": "use model.parallel: fsdp2, which spreads parameters, gradients and optimizer state as its ZeRO does",
}


@dataclass(frozen=True)
class Settings:
    """What a file of `accelerate config` asks for, as far as it is for accelerate to see to here.

    Attributes:
        distributed_type: "NO", "MULTI_CPU" or "MULTI_GPU", which all give DDP where there are several ranks.
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
        if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(f"{path} asks for DeepSpeed, which is not installed here; {_INSTEAD[kind]}")
        advice = _INSTEAD.get(kind, f"{', '.join(_REPLICATED)} can be had")
        raise ConfigError(f"{path}: distributed_type: {kind} is not built; {advice}")
    dynamo = found.get("dynamo_config") or {}
    if str(dynamo.get("dynamo_backend", "NO") if isinstance(dynamo, Mapping) else dynamo).upper() != "NO":
        raise ConfigError(f"{path}: dynamo_config: compiling is the run's own: model.compile: true")
    mixed_precision = str(found.get("mixed_precision") or "no").lower()
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"{path}: mixed_precision: {mixed_precision} is not built; no, bf16 and fp16 are")
    return Settings(kind, mixed_precision)


def check(settings: Settings, precision: str) -> None:
    """Raise ConfigError unless the file and the run agree on what is computed in which precision."""
    if settings.mixed_precision not in ("no", precision):
        raise ConfigError(
            f"the file asks for mixed_precision: {settings.mixed_precision}, and the run for train.precision: "
            f"{precision}; give both the same"
        )


def accelerator(settings: Settings, device: torch.device, world_size: int) -> Accelerator:
    """Make the process's accelerator. To be let go of by `release`.

    Raises:
        UserError: it sees other ranks than there are.
    """
    from accelerate import Accelerator

    # Precision, accumulation and scaling are the loop's. On a CPU that is not named, each rank is one of one.
    made = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    if made.num_processes != world_size:
        raise UserError(f"accelerate sees {made.num_processes} processes, and there are {world_size} ranks")
    return made


def prepare(made: Accelerator, module: nn.Module) -> nn.Module:
    """Have it prepare a module: on its device, wrapped as its settings ask for. Collective."""
    prepared: nn.Module = made.prepare(module)
    return prepared


def release() -> None:
    """Forget the process's accelerator: the next runtime has other ranks, maybe."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    found = yaml_files.parse(text, str(path)).plain()
    if not isinstance(found, Mapping) or "distributed_type" not in found:
        raise ConfigError(f"{path}: not a file of `accelerate config`, which says a distributed_type")
    return found
