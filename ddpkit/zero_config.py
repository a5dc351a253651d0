"""What a file of `accelerate config` says of DeepSpeed, and whether ddpkit can follow it. Imports neither.

DeepSpeed's engine does a great many things; here it spreads parameters, gradients and optimizer state (ZeRO), and all
else stays ddpkit's. So a key counts if it is about that; one that is about what ddpkit does is refused, and said whose
it is; and so is every other: a setting that is not followed would look as if it were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpkit.errors import ConfigError, nearest

OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop")
"""Of torch.optim: those that treat each number by itself, and so do not notice that ZeRO gives them flat parts."""

_OF_ACCELERATE = ("zero_stage", "gradient_clipping", "gradient_accumulation_steps")
_OF_LAUNCHING = (
    "deepspeed_multinode_launcher",
    "deepspeed_hostfile",
    "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter",
    "zero3_init_flag",  # of transformers' from_pretrained; here the user's factory builds the model
    "zero3_save_16bit_model",
)
_OF_ZERO = (
    "stage",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "contiguous_gradients",
    "sub_group_size",
    "ignore_unused_parameters",
    "memory_efficient_linear",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
_FOLLOWED = ("zero_optimization", "gradient_clipping", "zero_allow_untested_optimizer")
_OF_NO_CONSEQUENCE = (
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "stage3_gather_16bit_weights_on_model_save",
)
_WHOSE = {
    "optimizer": "the run's own is used: optimizer",
    "scheduler": "the run's own is used: scheduler",
    "fp16": "ddpkit cannot save its loss scaling; use bf16",
    "train_batch_size": "say auto: batches are the run's: data.global_batch_size",
    "train_micro_batch_size_per_gpu": "say auto: batches are the run's: data.micro_batch_size",
    "gradient_accumulation_steps": "say 1 or auto: it follows from data.global_batch_size and data.micro_batch_size",
    "activation_checkpointing": "the run's own is used: model.activation_checkpointing",
}
_OFFLOAD = "ddpkit cannot save what is kept elsewhere; model.parallel: fsdp2 has cpu_offload"


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed is to spread a model.

    Attributes:
        stage: 1: the optimizer's state is spread over the ranks; 2: gradients are, too; 3: and parameters.
        options: others of DeepSpeed's ``zero_optimization``.
        bf16: the model computes in bfloat16, and the optimizer steps float32 copies of the parameters.
        clip_grad_norm: the largest norm of the gradient, if the file says one.
        takes_any_optimizer: also those that are not known to step flat parts as they would the parameters.
    """

    stage: int
    options: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    clip_grad_norm: float | None = None
    takes_any_optimizer: bool = False

    def for_engine(self) -> dict[str, Any]:
        """The config that DeepSpeed's engine is made with."""
        made: dict[str, Any] = {
            # Each backward pass comes with word on whether it is a step's last.
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": self.clip_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {**self.options, "stage": self.stage},
        }
        # Unless it is asked to look, it steps with NaN in this format.
        return made | ({"bf16": {"enabled": True, "check_grad_overflow": True}} if self.bf16 else {})


def unknown_optimizer(name: str) -> str:
    """What to say of one that might not be right over flat parts."""
    return (
        f"the optimizer {name} may not be right for ZeRO, which gives it flat parts that are not the "
        f"parameters; of torch.optim, {', '.join(OPTIMIZERS)} are. If you know that it treats each number by itself, "
        "say zero_allow_untested_optimizer: true in DeepSpeed's config"
    )


def parse(found: object, mixed_precision: str) -> ZeroConfig | None:
    """Take up the ``deepspeed_config`` of such a file; None if nothing is to be spread (stage 0), which is DDP.

    Args:
        found: what stands there.
        mixed_precision: of the same file: "no", "bf16" or "fp16".

    Raises:
        ConfigError: ddpkit cannot follow it.
    """
    inline = _mapping(found or {}, "deepspeed_config")
    if mixed_precision == "fp16":
        raise ConfigError(f"mixed_precision: fp16: {_WHOSE['fp16']}")
    path = inline.get("deepspeed_config_file")
    if path is not None:
        others = [key for key in inline if key not in (*_OF_LAUNCHING, "deepspeed_config_file")]
        if others:
            raise ConfigError(f"deepspeed_config.{others[0]}: it belongs into {path}, deepspeed_config_file")
        try:
            return _whole(_of_file(Path(str(path)).expanduser()), mixed_precision)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return _whole(_as_whole(inline), mixed_precision)


def _as_whole(inline: Mapping[str, Any]) -> dict[str, Any]:
    """What `accelerate config` writes down of it, as DeepSpeed's own files have it."""
    whole: dict[str, Any] = {"zero_optimization": {"stage": inline.get("zero_stage", 2)}}  # accelerate's default
    for key, value in inline.items():
        if key in _OF_LAUNCHING or key == "zero_stage":
            continue
        if key.startswith("offload_"):
            if _is_something(value):
                raise ConfigError(f"deepspeed_config.{key}: {value}: {_OFFLOAD}")
        elif key in _OF_ACCELERATE:
            whole[key] = value
        else:
            raise ConfigError(f"deepspeed_config.{key}: ddpkit does not follow it{nearest(key, _OF_ACCELERATE)}")
    return whole


def _of_file(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(path.read_text()), "DeepSpeed's config")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None


def _whole(found: Mapping[str, Any], mixed_precision: str) -> ZeroConfig | None:
    zero = _mapping(found.get("zero_optimization") or {}, "zero_optimization")
    bf16 = mixed_precision == "bf16"
    for key, value in found.items():
        if key == "bf16":
            asked = _switch(value, "bf16")
            bf16 = bf16 if asked is None else asked
        elif not _can_be_followed(key, value):
            raise ConfigError(f"{key}: {_WHOSE.get(key, 'ddpkit does not follow it')}")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"zero_optimization.stage: {stage!r}: use 0, 1, 2 or 3")
    options = _options(zero)
    clip = found.get("gradient_clipping")
    clip = None if clip in (None, "auto", 0, 0.0) else clip
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or clip < 0):
        raise ConfigError(f"gradient_clipping: {clip!r}: use a number, or auto")
    if stage == 0:  # which is DDP, and the run's own
        if clip is not None:
            raise ConfigError("gradient_clipping: with stage 0 it is the run that clips: train.clip_grad_norm")
        if bf16 and mixed_precision != "bf16":
            raise ConfigError("bf16: with stage 0 it is the run's own: train.precision: bf16")
        return None
    return ZeroConfig(
        stage,
        options,
        bf16,
        None if clip is None else float(clip),
        takes_any_optimizer=found.get("zero_allow_untested_optimizer") is True,
    )


def _can_be_followed(key: str, value: object) -> bool:
    if key == "fp16":
        return not _switch(value, "fp16")
    if key == "gradient_accumulation_steps":
        return value in (1, "auto")
    return value == "auto" or key in _FOLLOWED or key in _OF_NO_CONSEQUENCE


def _options(zero: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, value in zero.items():
        if key.startswith("offload_"):
            if _is_something(value.get("device") if isinstance(value, Mapping) else value):
                raise ConfigError(f"zero_optimization.{key}: {_OFFLOAD}")
        elif key not in (*_OF_ZERO, *_OF_NO_CONSEQUENCE):
            raise ConfigError(f"zero_optimization.{key}: ddpkit does not follow it{nearest(key, _OF_ZERO)}")
        elif key in _OF_ZERO and key != "stage" and value != "auto":
            options[key] = value
    return options


def _is_something(value: object) -> bool:
    return str(value).lower() not in ("none", "false")


def _switch(section: object, name: str) -> bool | None:
    """Whether a section is enabled; None: as the file of accelerate says."""
    enabled = _mapping(section, name).get("enabled", False)
    return None if enabled == "auto" else enabled is True


def _mapping(found: object, name: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name}: expected names with values, found {found!r:.60}")
    return found
