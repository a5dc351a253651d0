"""ddpkit: train on any number of ranks, stop anywhere, go on as if nothing had happened.

The public names are resolved when they are first used, so that ``import ddpkit`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.checkpoint.foreign import Weights, load_weights
    from ddpkit.errors import DdpkitError, StopRequested, UserError
    from ddpkit.loop import Evaluation, Saving, fit
    from ddpkit.session import Runtime, runtime
    from ddpkit.world import World

__all__ = [
    "DdpkitError",
    "Evaluation",
    "Runtime",
    "Saving",
    "StopRequested",
    "UserError",
    "Weights",
    "World",
    "fit",
    "load_weights",
    "runtime",
]

_HOMES = {
    "DdpkitError": "errors",
    "StopRequested": "errors",
    "UserError": "errors",
    "Evaluation": "loop",
    "Saving": "loop",
    "Weights": "checkpoint.foreign",
    "fit": "loop",
    "load_weights": "checkpoint.foreign",
    "Runtime": "session",
    "runtime": "session",
    "World": "world",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ddpkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
