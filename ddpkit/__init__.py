"""ddpkit: train on any number of ranks, stop anywhere, go on as if nothing had happened.

The public names are resolved when they are first used, so that ``import ddpkit`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.batch_size import largest_that_fits
    from ddpkit.checkpoint.foreign import Weights, load_weights
    from ddpkit.ema import averaged
    from ddpkit.errors import DdpkitError, NotFinite, StopRequested, UserError
    from ddpkit.loop import Evaluation, Saving, fit
    from ddpkit.optimizing import Group, parameter_groups
    from ddpkit.parts import channels_last, freeze
    from ddpkit.precision import Precision, set_exactness
    from ddpkit.recompute import recompute_activations
    from ddpkit.session import Runtime, runtime
    from ddpkit.world import World

__all__ = [
    "DdpkitError",
    "Evaluation",
    "Group",
    "NotFinite",
    "Precision",
    "Runtime",
    "Saving",
    "StopRequested",
    "UserError",
    "Weights",
    "World",
    "averaged",
    "channels_last",
    "fit",
    "freeze",
    "largest_that_fits",
    "load_weights",
    "parameter_groups",
    "recompute_activations",
    "runtime",
    "set_exactness",
]

_HOMES = {
    "DdpkitError": "errors",
    "NotFinite": "errors",
    "StopRequested": "errors",
    "UserError": "errors",
    "largest_that_fits": "batch_size",
    "averaged": "ema",
    "Evaluation": "loop",
    "Saving": "loop",
    "Weights": "checkpoint.foreign",
    "fit": "loop",
    "load_weights": "checkpoint.foreign",
    "Group": "optimizing",
    "parameter_groups": "optimizing",
    "channels_last": "parts",
    "freeze": "parts",
    "Precision": "precision",
    "set_exactness": "precision",
    "recompute_activations": "recompute",
    "Runtime": "session",
    "runtime": "session",
    "World": "world",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ddpkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
