"""What an optimizer works on, and with which settings: parameter groups, learning rates, the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ddpkit.checkpoint.shards import is_spread
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


def gradient_norm(gradients: Sequence[Tensor], parts_on: torch.device | None = None) -> Tensor:
    """The norm of all gradients as one vector, as torch's ``clip_grad_norm_`` has it; also of sparse ones.

    Of gradients that are spread over the ranks, each has its part, and the sum of their squares is of all ranks:
    collective then.

    Args:
        gradients: FSDP2's say themselves whether they are spread.
        parts_on: they are parts (DeepSpeed's) all of them; the device that the ranks sum on.
    """
    if parts_on is not None:
        return _summed(nn.utils.get_total_norm(gradients).double().square(), parts_on.type).sqrt()
    spread = [gradient for gradient in gradients if is_spread(gradient)]
    if not spread:
        return nn.utils.get_total_norm([_values(gradient) for gradient in gradients])
    whole = [_values(gradient) for gradient in gradients if not is_spread(gradient)]
    square = nn.utils.get_total_norm([_values(gradient) for gradient in spread]).double().square()
    square = _summed(square, spread[0].device_mesh.device_type)
    return (square + nn.utils.get_total_norm(whole).double().square().to(square.device)).sqrt()


def are_finite(gradients: Sequence[Tensor], norm: Tensor | None = None, parts_on: torch.device | None = None) -> bool:
    """Whether no gradient has an infinite value or one that is not a number.

    Gradients that DDP has averaged are the same on all ranks, and one rank's NaN is in the average: so all ranks come
    to the same answer, by themselves. Of those that are spread it is asked for: collective then (`gradient_norm`).
    """
    norm = gradient_norm(gradients, parts_on) if norm is None else norm
    if math.isfinite(norm):
        return True
    # A norm may be infinite of finite values: of those there is one look more.
    is_fine = all(bool(torch.isfinite(_values(gradient)).all()) for gradient in gradients)
    spread = [gradient.device_mesh.device_type for gradient in gradients if is_spread(gradient)]
    ranks_on = parts_on.type if parts_on is not None else spread[0] if spread else None
    return is_fine if ranks_on is None else bool(_summed(torch.tensor(float(not is_fine)), ranks_on) == 0)


def clip_to_norm_(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients, whose norm is ``norm`` (`gradient_norm`), down so that it is ``max_norm`` at most."""
    whole, parts = _gradients(parameters)
    nn.utils.clip_grads_with_norm_(whole, max_norm, norm)
    if parts:
        torch._foreach_mul_(parts, torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(parts[0].device))


def clip_values_(parameters: Iterable[Tensor], max_value: float) -> None:
    """Cut the values of the gradients down to ``max_value``, and up to minus that."""
    whole, parts = _gradients(parameters)
    if whole:  # torch's does not take nothing
        nn.utils.clip_grad_value_(whole, max_value)
    for part in parts:
        part.clamp_(-max_value, max_value)


def _gradients(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters with gradients that are whole, and what this rank has of the others' gradients."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    whole = [parameter for parameter in with_gradient if not is_spread(parameter.grad)]
    return whole, [parameter.grad.to_local() for parameter in with_gradient if is_spread(parameter.grad)]


def _summed(value: Tensor, device: str) -> Tensor:
    """The sum over ranks, on their device: also of parts that are kept in the host's memory. Collective."""
    value = value.to(device)
    torch.distributed.all_reduce(value)
    return value


def _values(gradient: Tensor) -> Tensor:
    """What this rank has of a gradient, as a dense tensor."""
    if is_spread(gradient):
        return gradient.to_local()
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
