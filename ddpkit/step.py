"""One optimizer step on this rank: forward and backward over its passes, then the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ddpkit.errors import UserError
from ddpkit.model import unsynced
from ddpkit.sampler import Pass
from ddpkit.sharding import clip_grad_norm_
from ddpkit.world import World

StepFunction = Callable[[nn.Module, Any], Any]
"""(model, batch) -> mean loss | {"loss": mean loss, "weight": n (optional), other scalars}."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Accumulates gradients over passes, so that they are those of the mean over the global batch, then updates.

    Each pass counts by its samples, or by the ``weight`` that the user's step returns (tokens, say). Weights by samples
    are known beforehand and scale the loss. Weights of the user's are known afterwards only: the losses are summed by
    weight, and the gradients divided by the weight of all ranks.

    Args:
        model: as `wrap` gave it.
        optimizer: over its parameters.
        function: the user's step.
        world: who this rank is.
        device: of this rank.
        precision: "fp32", "bf16" or "fp16" (with loss scaling); autocast covers the user's step.
        clip_grad_norm: the largest norm of the whole gradient; None does not clip.

    Attributes:
        scaler: of the loss, for fp16.
        recorded_weight: what this rank's values of the last `update` count for in a mean over the ranks: its samples,
            or the sum of the user's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        function: StepFunction,
        world: World,
        device: torch.device,
        precision: str = "fp32",
        clip_grad_norm: float | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._function = function
        self._world = world
        self._device = device
        self._dtype = _DTYPES.get(precision)
        self._clip_grad_norm = clip_grad_norm
        self.scaler = GradScaler(device.type, enabled=precision == "fp16")
        self.recorded_weight = 0.0
        self._weight_sum: torch.Tensor | None = None
        self._kept: list[tuple[Pass, Any, Mapping[str, Any]]] = []

    def accumulate(self, batch: Any, part: Pass, keep_values: bool) -> None:
        """Forward and backward over one pass; gradients are reduced over the ranks in the last one. Collective."""
        with unsynced(self._model) if not part.is_last else nullcontext():
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
                loss, weight, values = self._outcome(batch, part)
            factor = part.weight(self._world.world_size) if weight is None else weight
            # A factor of one, the common case, changes no bit: no operation, and the same bits as without ddpkit.
            scaled = loss if isinstance(factor, float) and factor == 1.0 else loss * factor
            if self.scaler.is_enabled():
                scaled = self.scaler.scale(scaled)
            scaled.backward()  # type: ignore[no-untyped-call]  # torch's
        if weight is not None:
            # A copy: the sum over the ranks is formed in place, and the user's tensor is recorded later.
            own = torch.as_tensor(weight, dtype=torch.float64, device=self._device).detach().clone()
            self._weight_sum = own if self._weight_sum is None else self._weight_sum + own
        if keep_values:
            self._kept.append((part, weight, values))

    def update(self) -> dict[str, float]:
        """Step the optimizer. Collective if the user gives weights.

        Returns:
            This rank's mean of each value over the passes that were to be kept; empty if none were.
        """
        if self._weight_sum is not None:
            self._divide_by_weight(self._weight_sum)
            self._weight_sum = None
        values: dict[str, float] = {}
        if self._clip_grad_norm is not None:
            self.scaler.unscale_(self._optimizer)
            norm = clip_grad_norm_(self._model.parameters(), self._clip_grad_norm)
            if self._kept:
                values["grad_norm"] = float(norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        means, self.recorded_weight = _means_of(self._kept)
        values |= means
        self._kept.clear()
        return values

    def _outcome(self, batch: Any, part: Pass) -> tuple[torch.Tensor, Any, Mapping[str, Any]]:
        if part.size:
            return _read(self._function(self._model, batch))
        # This rank has no samples here, but takes part in the collectives of the others with a batch of length zero.
        try:
            loss, weight, values = _read(self._function(self._model, batch))
        except Exception as error:
            below = part.batch_size - part.batch_size % self._world.world_size
            fits = [size for size in (below, below + self._world.world_size) if size]
            raise UserError(
                f"train.step: rank {self._world.rank} has no sample in a pass over a global batch of {part.batch_size} "
                f"on {self._world.world_size} ranks, and the step cannot take a batch of length zero "
                f"({type(error).__name__}: {error}). Choose a data.global_batch_size that the ranks divide evenly "
                f"({' or '.join(map(str, fits))}, say) and drop_last: true."
            ) from error
        return loss, None if weight is None else 0.0, values  # whatever the step makes of nothing, it counts nothing

    def _divide_by_weight(self, total: torch.Tensor) -> None:
        if self._world.world_size > 1:
            torch.distributed.all_reduce(total)
        # DDP has divided by the world size already. Where nothing counts, the gradient is zero, not 0 / 0.
        factor = torch.where(total > 0, self._world.world_size / total, 0.0)
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))


def _read(output: Any) -> tuple[torch.Tensor, Any, Mapping[str, Any]]:
    """The user's step's answer as (loss, weight or None, values to record)."""
    if isinstance(output, torch.Tensor):
        output = {"loss": output}
    if not isinstance(output, Mapping) or not isinstance(output.get("loss"), torch.Tensor):
        found = f"a mapping with {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise UserError(
            f"train.step returned {found}; it is to return the mean loss (a tensor), or a mapping with 'loss' and "
            "other scalars"
        )
    loss = output["loss"]
    if loss.numel() != 1 or not loss.requires_grad:
        fault = f"has shape {tuple(loss.shape)}" if loss.numel() != 1 else "does not depend on the parameters"
        raise UserError(f"train.step: the loss {fault}; it is to be the mean over the batch, ready for backward()")
    weight = output.get("weight")
    values = {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in output.items()
        if name != "weight"
    }
    return loss.reshape(()), weight, values


def _means_of(kept: list[tuple[Pass, Any, Mapping[str, Any]]]) -> tuple[dict[str, float], float]:
    """The means over this rank's passes, and the weight of all of them."""
    counted = [(part.size if weight is None else float(weight), values) for part, weight, values in kept]
    counted = [(weight, values) for weight, values in counted if weight > 0]  # an empty pass's loss is NaN
    total = float(sum(weight for weight, _ in counted))
    if not counted:
        return {name: 0.0 for _, _, values in kept for name in values}, 0.0
    means = {name: sum(weight * float(values[name]) for weight, values in counted) / total for name in counted[0][1]}
    return means, total
