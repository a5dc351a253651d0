"""One optimizer step on this rank: forward and backward over its passes, then the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.errors import UserError
from ddpkit.model import unsynced, unwrap
from ddpkit.nonfinite import Fault, Watch, overflow
from ddpkit.optimizing import are_finite, clip_to_norm_, clip_values_, gradient_norm, learning_rates
from ddpkit.precision import Precision
from ddpkit.sampler import Pass
from ddpkit.unused import check_all_reduced
from ddpkit.world import World
from ddpkit.zero import Zero, ZeroOptimizer

StepFunction = Callable[[nn.Module, Any], Any]
"""(model, batch) -> mean loss | {"loss": mean loss, "weight": n (optional), other scalars}."""


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
        precision: "fp32", "bf16" or "fp16" (with loss scaling): autocast covers the user's step; or one of a module
            that was converted (`Precision.convert`).
        clip_grad_norm: the largest norm of the whole gradient; None does not clip.
        clip_grad_value: the largest absolute value in it; None does not clip.
        log_grad_norm: give the norm as a value also where it is not clipped.
        watch: looks for what is not finite; None does not look.

    Attributes:
        scaler: of the loss, for fp16; a part of the run's state.
        recorded_weight: what this rank's values of the last `update` count for in a mean over the ranks: its samples,
            or the sum of the user's weights.
        fault: why the last `update` did not take the step, the same on all ranks; None: it did.
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
        clip_grad_value: float | None = None,
        log_grad_norm: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self._model = model
        self._parameters = dict(unwrap(model).named_parameters())
        self._zero = model if isinstance(model, Zero) else None
        self._parts_on = None if self._zero is None else device
        self._optimizer = optimizer
        self._function = function
        self._world = world
        self._device = device
        self._precision = Precision.named(precision)
        self._clip_grad_norm = clip_grad_norm
        self._clip_grad_value = clip_grad_value
        self._log_grad_norm = log_grad_norm
        self._looks_at_gradients = (
            watch is not None or clip_grad_norm is not None or clip_grad_value is not None or log_grad_norm
        )
        self._watch = watch
        self.scaler = self._precision.scaler(device)
        if self._zero is not None:
            self._check_can_be_zero(self._zero)
            if clip_grad_norm is not None:
                self._zero.clip(clip_grad_norm)
        self.recorded_weight = 0.0
        self.fault: Fault | None = None
        self._weight_sum: Tensor | None = None
        self._kept: list[tuple[Pass, Any, Mapping[str, Any]]] = []

    def accumulate(self, batch: Any, part: Pass, keep_values: bool = True) -> None:
        """Forward and backward over one pass; gradients are reduced over the ranks in the last one. Collective.

        Args:
            batch: what the loader gave out.
            part: the loader's ``current``.
            keep_values: have `update` return the step's values.
        """
        if self._watch is not None:
            self._watch.begin(part, batch)
        with unsynced(self._model) if not part.is_last else nullcontext():
            with self._precision.autocast(self._device):
                loss, weight, values = self._outcome(batch, part)
            factor = part.weight(self._world.world_size) if weight is None else weight
            # A factor of one, the common case, changes no bit: no operation, and the same bits as without ddpkit.
            scaled = loss if isinstance(factor, float) and factor == 1.0 else loss * factor
            if self.scaler.is_enabled():
                scaled = self.scaler.scale(scaled)
            start = self._watch.start_of_backward(scaled, factor) if self._watch is not None else None
            scaled.backward(start)  # type: ignore[no-untyped-call]  # torch's
        if part.is_last:
            check_all_reduced(self._model)
        if weight is not None:
            # A copy: the sum over the ranks is formed in place, and the user's tensor is recorded later.
            own = torch.as_tensor(weight, dtype=torch.float64, device=self._device).detach().clone()
            self._weight_sum = own if self._weight_sum is None else self._weight_sum + own
        if keep_values:
            self._kept.append((part, weight, values))

    def update(self) -> dict[str, float]:
        """Step the optimizer, unless something is not finite: then `fault` says what. Collective.

        Returns:
            This rank's mean of each value over the passes that were to be kept; empty if none were.
        """
        if self._weight_sum is not None:
            self._divide_by_weight(self._weight_sum)
            self._weight_sum = None
        values = self._step_optimizer()
        self._optimizer.zero_grad(set_to_none=True)
        if self.fault is None and self._kept:
            means, self.recorded_weight = _means_of(self._kept)
            values |= means
        self._kept.clear()
        return values

    def _step_optimizer(self) -> dict[str, float]:
        """Unscale, look, clip, step: in this order, and on the gradient of the whole batch."""
        loss_scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        if self._looks_at_gradients:
            self.scaler.unscale_(self._optimizer)
            norm = gradient_norm(self._gradients(), self._parts_on)
            if self._watch is not None and not are_finite(self._gradients(), norm, self._parts_on):
                self.fault = self._explained(self._watch, loss_scale)
                self.scaler.update()
                return {}
        values: dict[str, float] = {}
        if self._kept:
            values |= learning_rates(self._optimizer)
            if self._clip_grad_norm is not None or self._log_grad_norm:
                values["grad_norm"] = float(norm)
        if self._clip_grad_norm is not None and self._zero is None:
            clip_to_norm_(self._parameters.values(), self._clip_grad_norm, norm)
        if self._clip_grad_value is not None:
            clip_values_(self._parameters.values(), self._clip_grad_value)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self.fault = None
        if isinstance(self._optimizer, ZeroOptimizer) and not self._optimizer.has_stepped:
            self.fault = Fault("the norm of the gradients is not finite, and DeepSpeed does not step with them")
            if self._watch is not None:
                self._watch.take_back()
            return {}
        if self._watch is not None:
            self._watch.end()
        elif loss_scale is not None and self.scaler.get_scale() < loss_scale:
            self.fault = overflow(loss_scale)
        return values

    def _explained(self, watch: Watch, loss_scale: float | None) -> Fault:
        gradients = self._named_gradients()
        bad = [name for name, gradient in gradients.items() if not are_finite([gradient], parts_on=self._parts_on)]
        gradients.clear()
        if self._zero is not None:
            self._optimizer.step()  # DeepSpeed sees it too, leaves the step out, and forgets the gradients
        self._optimizer.zero_grad(set_to_none=True)  # memory for those that are now computed again
        return watch.explain(self._loss, bad, loss_scale)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self._precision.autocast(self._device):
            return _read(self._function(model, batch))[0]

    def _gradients(self) -> Sequence[Tensor]:
        return list(self._named_gradients().values())

    def _named_gradients(self) -> dict[str, Tensor]:
        if self._zero is not None:
            return self._zero.gradients()
        return {name: value.grad for name, value in self._parameters.items() if value.grad is not None}

    def _check_can_be_zero(self, model: Zero) -> None:
        if not (isinstance(self._optimizer, ZeroOptimizer) and self._optimizer.model is model):
            raise UserError("DeepSpeed: give the model's optimizer to it: rt.wrap_optimizer(optimizer, model)")
        if self.scaler.is_enabled():
            raise UserError("DeepSpeed: fp16's loss scaling is not supported; use bf16")
        if self._clip_grad_value is not None:
            raise UserError("DeepSpeed: clip_grad_value is not supported; use clip_grad_norm")

    def _outcome(self, batch: Any, part: Pass) -> tuple[Tensor, Any, Mapping[str, Any]]:
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

    def _divide_by_weight(self, total: Tensor) -> None:
        if self._world.world_size > 1:
            torch.distributed.all_reduce(total)
        # DDP has divided by the world size already. Where nothing counts, the gradient is zero, not 0 / 0.
        factor = torch.where(total > 0, self._world.world_size / total, 0.0)
        if self._zero is not None:
            self._zero.scale_gradients(factor)
            return
        for gradient in self._gradients():
            gradient.mul_(factor.to(gradient.dtype))


def _read(output: Any) -> tuple[Tensor, Any, Mapping[str, Any]]:
    """The user's step's answer as (loss, weight or None, values to record)."""
    if isinstance(output, Tensor):
        output = {"loss": output}
    if not isinstance(output, Mapping) or not isinstance(output.get("loss"), Tensor):
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
        name: value.detach() if isinstance(value, Tensor) else value
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
