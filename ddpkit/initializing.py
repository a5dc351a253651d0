"""A model's first values, by functions of torch's or the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ddpkit.errors import UserError


def initialize(
    model: nn.Module,
    function: Callable[[Any], Any],
    *,
    modules: Sequence[str] = (),
    params: Sequence[str] = (),
    key: str = "initialize",
) -> None:
    """Give a model its first values, before it is wrapped: inside a runtime they are the same on all ranks.

    Args:
        model: not wrapped.
        function: called with each module, as by `torch.nn.Module.apply`, or, with ``params``, with each parameter, as
            those of `torch.nn.init` are.
        modules: class names, or patterns of module names: only these modules. Empty: all.
        params: patterns of parameter names: these parameters instead of modules.
        key: what asks for it, for messages.

    Raises:
        UserError: nothing in the model has such a name, or both are given.
    """
    if modules and params:
        raise UserError(f"{key}: modules and params are both given; give one of them")
    parts: list[tuple[str, Any]] = list(model.named_parameters()) if params else _modules(model)
    patterns = params or modules
    chosen = [(name, part) for name, part in parts if not patterns or _is_meant(name, part, patterns)]
    if not chosen:
        there = ", ".join([name for name, _ in parts if name][:8])
        raise UserError(f"{key}: {', '.join(patterns)} fits nothing in the model; it has {there}")
    with torch.no_grad():
        for name, part in chosen:
            try:
                function(part)
            except ValueError as error:  # of torch.nn.init's: fans of a tensor with one dimension, say
                raise UserError(f"{key}: {name}: {error}") from error


def _modules(model: nn.Module) -> list[tuple[str, Any]]:
    """In the order of `torch.nn.Module.apply`, so that the same numbers are drawn for each."""
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[str, Any]] = []
    model.apply(lambda module: found.append((names[module], module)))
    return found


def _is_meant(name: str, part: Any, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or type(part).__name__ == pattern for pattern in patterns)
