"""Activations that are computed again in the backward pass instead of kept: less memory for more time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpkit.parts import chosen


def recompute_activations(module: nn.Module, patterns: Sequence[str], key: str = "patterns") -> nn.Module:
    """Have parts of a model keep their inputs only, and compute the rest again when its gradient is due; in place.

    The gradients are the same bits: dropout draws the same numbers again, and running statistics are not updated a
    second time. Names and classes of the parts stay, so checkpoints do.

    Args:
        module: the model, before it is wrapped.
        patterns: names of classes (``Block``), or patterns of module names (``layers.*``).
        key: where they come from, for messages.

    Raises:
        UserError: a pattern names nothing.
    """
    for _, part in list(chosen(module, patterns, key)):
        # Partial objects and bound methods, of which a deep copy of the module gets its own; a closure would not be.
        part.forward = partial(_recomputed, part, part.forward)
    return module


def _recomputed(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        # The compiler chooses what to compute again, changes buffers once, and takes no other contexts.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, part), **kwargs)


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, and for the second one."""
    return nullcontext(), _buffers_stay(part)


@contextmanager
def _buffers_stay(part: nn.Module) -> Iterator[None]:
    buffers = list(part.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:  # torch leaves by an exception as soon as it has what it needs
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
