"""Batch normalisation over the batches of all ranks, on GPU and on CPU.

``torch.nn.SyncBatchNorm`` refuses CPU tensors as soon as a process group exists. Here a converted layer uses
torch's kernels for tensors on a GPU and an exchange of its own on the CPU, and each time it gives what one
process with the concatenated batch would. Converting a layer changes its class and nothing else: parameters,
buffers, hooks and identity stay, so state_dict keys, optimizers, tied layers and ``isinstance`` hold on.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as TorchExchange
from torch.nn.modules.batchnorm import _BatchNorm

from ddpkit.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def convert_sync_batchnorm(module: Model, process_group: dist.ProcessGroup | None = None) -> Model:
    """Make every batch normalisation in ``module`` work on the batches of all ranks; return the same object.

    In training mode the converted layers' forward and backward passes are collective over ``process_group``
    (default: the default group, found at each pass, so conversion may come before there is one). Ranks may
    bring batches of different sizes, empty ones too. Statistics are float64 for float64 input, else at least
    float32. Gradients of weight and bias are this rank's share, for DDP to average as all others.

    A layer in eval mode never communicates: neither frozen layers inside a training model nor evaluation with
    unequal numbers of passes can hang. With ``track_running_stats=False`` such a layer normalises by this
    rank's batch alone. Without a group, or with a group of one, a layer is what it was before.

    Lazy layers and ``torch.nn.SyncBatchNorm`` are converted too; layers converted earlier keep their group.
    Convert before wrapping in DDP. Raises `UserError`, before changing any layer, for a subclass with a
    forward pass of its own (subclasses of ``torch.nn.SyncBatchNorm`` apart: they synchronise by themselves).
    """
    found = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not _synchronises_itself(layer)
    ]
    for name, layer in found:
        _check_convertible(layer, name)
    for _, layer in found:
        plain: Any = type(layer)
        if plain is not nn.SyncBatchNorm or process_group is not None:  # torch's brings its group along
            layer.__dict__["process_group"] = process_group
        layer.__class__ = _synchronised(plain)
    return module


def revert_sync_batchnorm(module: Model) -> Model:
    """Undo `convert_sync_batchnorm` and return the same object: every layer has the class that it had before.

    A lazy layer that has seen its first input has become the plain layer of its kind.
    """
    for layer in module.modules():
        if isinstance(layer, _SyncBatchNorm):
            plain = layer.plain_class
            if plain is not nn.SyncBatchNorm:  # the others have no such attribute
                del layer.process_group
            layer.__class__ = plain
    return module


def _synchronises_itself(layer: _BatchNorm) -> bool:
    """Whether ``layer`` is converted, or of a subclass of torch's synchronised one (timm has such)."""
    return isinstance(layer, (_SyncBatchNorm, nn.SyncBatchNorm)) and type(layer) is not nn.SyncBatchNorm


def _check_convertible(layer: _BatchNorm, name: str) -> None:
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise UserError(
            f"{name or 'the model'} is a {kind}, a batch normalisation with a forward() of its own, which "
            "cannot be synchronised from outside: use a class of torch's in its place, or set sync_batchnorm "
            "to false and synchronise it yourself where needed"
        )


class _SyncBatchNorm(_BatchNorm):
    """What a converted layer's class has before its plain class in its bases."""

    plain_class: Any  # what the layer was; mypy takes no class of torch's modules for hashable, hence Any
    process_group: dist.ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, of shape (N, C, ...), to the same shape and dtype.

        Collective in training mode. Raises ``ValueError``, on every rank, if all batches together have one
        value per channel.
        """
        if not self.training or self._world_size() < 2:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        exchange = _on_gpu if input.is_cuda else _on_cpu
        return exchange(input, self.weight, self.bias, *running, self.eps, self._count_batch(), self._group())

    def _group(self) -> dist.ProcessGroup:
        group = dist.group.WORLD if self.process_group is None else self.process_group
        assert group is not None, "asked for only where a group exists"
        return group

    def _world_size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._group())  # -1 where this rank is not a member

    def _count_batch(self) -> float:
        """Count the batch, and return the weight of its statistics in the running ones."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def __deepcopy__(self, memo: dict[int, Any]) -> _SyncBatchNorm:
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group  # a copied layer talks to the same ranks
        memo[id(self)] = copied = _new(self.plain_class)
        state = copy.deepcopy(self.__dict__, memo)
        copied.__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by name.
        return _new, (self.plain_class,), self.__dict__


class _AnyBatchNorm(_BatchNorm):
    """The base in place of ``nn.SyncBatchNorm``: as open to any input shape, but DDP takes it on CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


@cache
def _synchronised(plain: Any) -> Any:
    """Derive the synchronised class from a plain one, so that ``isinstance(layer, plain)`` still holds."""
    base = _AnyBatchNorm if plain is nn.SyncBatchNorm else plain
    members = {"plain_class": plain, "__module__": __name__, "__doc__": _SyncBatchNorm.__doc__}
    becomes = getattr(plain, "cls_to_become", None)  # the class of a lazy layer after its first input
    if becomes is not None:
        members["cls_to_become"] = _synchronised(becomes)
    return type(f"Sync{plain.__name__.removeprefix('Sync')}", (_SyncBatchNorm, base), members)


def _new(plain: Any) -> _SyncBatchNorm:
    layer: _SyncBatchNorm = object.__new__(_synchronised(plain))
    return layer


def _on_gpu(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float,
    group: dist.ProcessGroup,
) -> Tensor:
    # torch exchanges an empty batch's statistics in the dtype of the input, the others' in float32: with bf16
    # or fp16 input the messages would not fit each other.
    exchanged = input.float() if input.numel() == 0 and input.dtype != torch.float64 else input
    output: Tensor = TorchExchange.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        exchanged, weight, bias, running_mean, running_var, eps, momentum, group, dist.get_world_size(group)
    )
    return output.to(input.dtype)


def _on_cpu(*args: Any) -> Tensor:
    output: Tensor = _Exchange.apply(*args)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return output


class _Exchange(torch.autograd.Function):
    """Normalise by the statistics of all ranks' batches: one all_gather forward, one all_reduce backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        mean, squares, count = _gather(*_moments(input.to(dtype)), group)
        if count == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{input.shape} here and one value on all {dist.get_world_size(group)} ranks together"
            )
        variance = squares / max(count, 1)
        if count and running_mean is not None and running_var is not None:
            _follow(running_mean, mean, momentum)
            _follow(running_var, squares / (count - 1), momentum)
        ctx.group, ctx.count = group, count
        ctx.save_for_backward(input, weight, mean.to(dtype), (variance + eps).rsqrt().to(dtype))
        return F.batch_norm(
            input,
            mean.to(dtype),
            variance.to(dtype),
            None if weight is None else weight.to(dtype),
            None if bias is None else bias.to(dtype),
            training=False,  # by the statistics given
            eps=eps,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std = ctx.saved_tensors
        grad = grad_output.to(mean.dtype)
        centred = input.to(mean.dtype) - _per_channel(mean, input)
        sums = _channel_sum(grad), _channel_sum(grad * centred)

        grad_weight = (sums[1] * inverse_std).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[0].to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_input = None
        if ctx.needs_input_grad[0]:
            means = torch.stack(sums).double()
            dist.all_reduce(means, group=ctx.group)
            mean_grad, mean_product = (means / max(ctx.count, 1)).to(mean.dtype)
            scale = inverse_std if weight is None else inverse_std * weight
            # (grad - mean_grad - centred * mean_product * inverse_std**2) * scale, in the memory of `centred`
            centred *= _per_channel(-mean_product * inverse_std.square(), input)
            centred += grad
            centred -= _per_channel(mean_grad, input)
            centred *= _per_channel(scale, input)
            grad_input = centred.to(input.dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _moments(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the mean, the sum of squared deviations from it (shape (C,) each) and the count per channel."""
    count = values.numel() // max(values.size(1), 1)
    mean = _channel_sum(values) / max(count, 1)
    # Two passes: a mean of squares less the square of the mean loses all its digits where the mean is large.
    squares = _channel_sum((values - _per_channel(mean, values)).square_())
    return mean, squares, count


def _gather(mean: Tensor, squares: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, int]:
    """Combine the ranks' moments in float64 (Chan et al. 1979): the same bits on every rank. Collective."""
    mine = torch.cat([mean.double(), squares.double(), torch.tensor([count], dtype=torch.float64)])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    means, squared, counts = torch.split(torch.stack(ranks), [mean.numel(), squares.numel(), 1], dim=1)
    total = counts.sum()
    combined = (counts * means).sum(0) / total.clamp(min=1)
    between = (counts * (means - combined).square()).sum(0)
    return combined, squared.sum(0) + between, int(total)


def _follow(running: Tensor, new: Tensor, momentum: float) -> None:
    running.copy_((1 - momentum) * running + momentum * new)


def _channel_sum(values: Tensor) -> Tensor:
    return values.sum([dim for dim in range(values.dim()) if dim != 1])


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view([-1 if dim == 1 else 1 for dim in range(like.dim())])
