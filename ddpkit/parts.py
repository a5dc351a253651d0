"""Parts of a model, chosen by class or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ddpkit.errors import UserError


def chosen(module: nn.Module, patterns: Sequence[str], key: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules in ``module`` that a pattern names, without those inside of one that is named already.

    Args:
        module: the model.
        patterns: each the name of a class (``Block``), or a pattern of module names as in a shell (``layers.*``).
        key: where the patterns come from, for messages.

    Raises:
        UserError: a pattern names nothing.
    """
    named = [(name, part) for name, part in module.named_modules() if name]
    for pattern in patterns:
        if not any(_is_named(name, part, pattern) for name, part in named):
            raise UserError(f"{key}: {pattern!r} names no part of the model{_what_there_is(named)}")
    taken: list[str] = []
    for name, part in named:
        if any(name.startswith(f"{outer}.") for outer in taken):
            continue
        if any(_is_named(name, part, pattern) for pattern in patterns):
            taken.append(name)
            yield name, part


def freeze(module: nn.Module, patterns: Sequence[str], key: str = "freeze") -> nn.Module:
    """Have parts of a model not trained, in place: their parameters take no gradient. Before it is wrapped.

    Their buffers (running statistics) go on following the batches they see; ``part.eval()`` in the step stops that.

    Args:
        module: the model.
        patterns: as in `chosen`, or patterns of parameter names.
        key: where they come from, for messages.

    Raises:
        UserError: a pattern names nothing.
    """
    parameters = dict(module.named_parameters())
    of_modules = []
    for pattern in patterns:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        for name in names:
            parameters[name].requires_grad_(False)
        if not names:
            of_modules.append(pattern)
    for _, part in list(chosen(module, of_modules, key)):
        part.requires_grad_(False)
    return module


def channels_last(module: nn.Module) -> nn.Module:
    """Keep a model's images with the channels last in memory, in place: the weights, and what the model is called with.

    Only the order in memory changes: shapes, values and checkpoints stay.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own way to call it
    module.register_forward_pre_hook(_images_with_channels_last, with_kwargs=True)
    return module


def _images_with_channels_last(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def converted(leaf: Any) -> Any:
        is_image = isinstance(leaf, torch.Tensor) and leaf.ndim == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

    return tree_map(converted, (args, kwargs))


def _is_named(name: str, part: nn.Module, pattern: str) -> bool:
    return pattern == type(part).__name__ or fnmatchcase(name, pattern)


def _what_there_is(named: Sequence[tuple[str, nn.Module]]) -> str:
    classes = list(dict.fromkeys(type(part).__name__ for _, part in named))
    names = [name for name, _ in named]
    if not names:
        return ": it has no parts"
    return f"; its parts are {_some(names)}, of the classes {_some(classes)}"


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
