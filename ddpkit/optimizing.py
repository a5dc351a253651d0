"""What an optimizer works on, and with which settings: parameter groups, learning rates, the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ddpkit.errors import UserError
from ddpkit.parts import chosen

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        params: patterns of parameter names (``*.bias``).
        modules: names of classes, or patterns of module names, with all parameters in them.
        args: the settings, over those of the optimizer.
    """

    params: Sequence[str] = ()
    modules: Sequence[str] = ()
    args: Mapping[str, Any] = field(default_factory=dict)


def parameter_groups(
    module: nn.Module, groups: Sequence[Group] = (), *, no_decay: Sequence[str] = (), key: str = "groups"
) -> list[dict[str, Any]]:
    """A module's trainable parameters as an optimizer takes them: each in the first group that names it, the rest last.

    Args:
        module: wrapped or not.
        groups: in this order.
        no_decay: "norms" (all of normalisation layers), "biases" or both: kinds that have a weight decay of 0, in
            whatever group they are.
        key: where the groups come from, for messages.

    Raises:
        UserError: there is nothing to train, or a group is left without parameters.
    """
    left = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not left:
        raise UserError("the model has no parameter to train")
    without_decay = _kinds(module, no_decay)
    made: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        names = _named_by(group, module, left, f"{key}.{index}")
        if not names:
            raise UserError(
                f"{key}.{index}: {', '.join([*group.params, *group.modules])} names no trainable parameter that an "
                f"earlier group has not taken; the model has {', '.join(list(left)[:8])}, ..."
            )
        made += _split({name: left.pop(name) for name in names}, group.args, without_decay)
    return made + _split(left, {}, without_decay)


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Multiply the learning rate of every group; before a scheduler is made for the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] *= factor


def scale_for_batch(rule: str, global_batch_size: int, base_batch_size: int) -> float:
    """What learning rates that are right for ``base_batch_size`` grow by: "linear"ly or as the "sqrt"."""
    ratio = global_batch_size / base_batch_size
    return ratio if rule == "linear" else math.sqrt(ratio)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate as ``lr``; those of groups after the first one as ``lr/1`` and so on."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    return {f"lr/{index}" if index else "lr": rate for index, rate in enumerate(rates)}


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector, as torch's ``clip_grad_norm_`` has it; also of sparse ones."""
    return nn.utils.get_total_norm([_values(gradient) for gradient in gradients])


def are_finite(gradients: Sequence[Tensor], norm: Tensor | None = None) -> bool:
    """Whether no gradient has an infinite value or one that is not a number.

    Gradients that DDP has averaged are the same on all ranks, and one rank's NaN is in the average: so all ranks come
    to the same answer, by themselves.
    """
    norm = gradient_norm(gradients) if norm is None else norm
    # A norm may be infinite of finite values: of those there is one look more.
    return math.isfinite(norm) or all(bool(torch.isfinite(_values(gradient)).all()) for gradient in gradients)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _named_by(group: Group, module: nn.Module, left: Mapping[str, Tensor], key: str) -> list[str]:
    inside = [name for name, _ in chosen(module, group.modules, f"{key}.modules")] if group.modules else []
    return [
        name
        for name in left
        if any(fnmatchcase(name, pattern) for pattern in group.params)
        or any(name.startswith(f"{outer}.") for outer in inside)
    ]


def _split(named: Mapping[str, Tensor], args: Mapping[str, Any], without_decay: set[int]) -> list[dict[str, Any]]:
    """One group, or one of those with weight decay and one of those without."""
    decayed = [parameter for parameter in named.values() if id(parameter) not in without_decay]
    others = [parameter for parameter in named.values() if id(parameter) in without_decay]
    made = [{"params": decayed, **args}] if decayed else []
    return [*made, {"params": others, **args, "weight_decay": 0.0}] if others else made


def _kinds(module: nn.Module, kinds: Sequence[str]) -> set[int]:
    """The parameters of some kinds, by identity."""
    found = set()
    if "norms" in kinds:
        for part in module.modules():
            # Models bring classes of their own, and call them so (LlamaRMSNorm).
            if isinstance(part, _NORMS) or type(part).__name__.endswith("Norm"):
                found |= {id(parameter) for parameter in part.parameters(recurse=False)}
    if "biases" in kinds:
        found |= {id(parameter) for name, parameter in module.named_parameters() if name.split(".")[-1] == "bias"}
    return found
