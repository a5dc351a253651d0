"""In which number formats a model computes, and how exactly; on a GPU and on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._pytree import tree_map

from ddpkit.errors import UserError

log = logging.getLogger("ddpkit")

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """A number format, and what it is used for. `Precision.named` makes one.

    Attributes:
        autocast_dtype: what operations that bear it compute in, in forward passes and losses; None: no autocast.
        weights_dtype: what parameters and buffers are kept in; None: as the model is made.
    """

    autocast_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None

    @classmethod
    def named(cls, name: str) -> Precision:
        """ "fp32", "bf16" or "fp16" (autocast), "bf16-true" or "fp16-true" (the weights as well)."""
        if name not in _NAMED:
            raise UserError(f"precision: {name!r} is none; choose one of {', '.join(_NAMED)}")
        return _NAMED[name]

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context for a forward pass and its loss; the backward pass belongs outside of it."""
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def applied_to(self, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """The same function, called in that context."""
        return _InContext(self, function, device) if self.autocast_dtype is not None else function

    def scaler(self, device: torch.device) -> GradScaler:
        """What scales the loss, so that fp16's small gradients do not vanish; it does nothing for other formats.

        Weights that are fp16 themselves are not scaled for: torch refuses to unscale such gradients.
        """
        return GradScaler(device.type, enabled=self.autocast_dtype is torch.float16)

    def convert(self, module: nn.Module) -> nn.Module:
        """Have the weights in this format, in place; the module then takes float32 inputs and gives float32 outputs."""
        if self.weights_dtype is not None:
            module.to(self.weights_dtype)
            cast_around(module)
        return module

    def warn_if_slow(self, device: torch.device) -> None:
        """Say so where the processor has no instructions for the format."""
        if device.type == "cpu" and torch.float16 in (self.autocast_dtype, self.weights_dtype):
            log.warning(
                "train.precision: fp16 is slow on a CPU, and fit for tests alone; bf16 or fp32 are faster there"
            )


_NAMED = {
    "fp32": Precision(),
    "bf16": Precision(autocast_dtype=torch.bfloat16),
    "fp16": Precision(autocast_dtype=torch.float16),
    "bf16-true": Precision(weights_dtype=torch.bfloat16),
    "fp16-true": Precision(weights_dtype=torch.float16),
}


def set_exactness(
    *,
    deterministic: bool = False,
    tf32: bool | None = None,
    cudnn_benchmark: bool | None = None,
    cudnn_deterministic: bool | None = None,
) -> None:
    """Set how exactly torch's kernels compute in this process; None leaves a setting as it is.

    Args:
        deterministic: the same bits each time, or an error where an operation cannot; it rules ``cudnn_benchmark`` out.
        tf32: let GPUs round float32 to 19 bits in matrix products and convolutions.
        cudnn_benchmark: try out which way to convolve is the fastest, for each shape.
        cudnn_deterministic: take only ways to convolve that give the same bits each time.
    """
    if tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
    if cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = cudnn_benchmark
    if cudnn_deterministic is not None:
        torch.backends.cudnn.deterministic = cudnn_deterministic
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def cast_around(module: nn.Module) -> None:
    """Have a module take what its parameters' format can compute with, and give float32."""
    module.register_forward_pre_hook(_inputs_as_weights, with_kwargs=True)
    module.register_forward_hook(_outputs_as_float)


@dataclass(frozen=True)
class _InContext:
    precision: Precision
    function: Callable[..., Any]
    device: torch.device

    def __call__(self, *args: Any) -> Any:
        with self.precision.autocast(self.device):
            return self.function(*args)


def _inputs_as_weights(module: nn.Module, args: Any, kwargs: Any) -> Any:
    # Looked up each time: a copy of the module may have been converted back (an average kept in float32).
    dtype = next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)
    return tree_map(partial(_as, dtype=dtype, of=(torch.float32, *_HALVES)), (args, kwargs))


def _outputs_as_float(module: nn.Module, args: Any, outputs: Any) -> Any:
    return tree_map(partial(_as, dtype=torch.float32, of=_HALVES), outputs)


def _as(leaf: Any, dtype: torch.dtype, of: tuple[torch.dtype, ...]) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in of else leaf
