"""ddpkit: train on any number of ranks, stop anywhere, go on as if nothing had happened.

The public names are resolved when they are first used, so that ``import ddpkit`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.batch_size import largest_that_fits
    from ddpkit.callbacks import Callback
    from ddpkit.capturing import capture
    from ddpkit.checkpoint.foreign import Weights, load_weights
    from ddpkit.ema import averaged
    from ddpkit.errors import DdpkitError, NotFinite, StopRequested, UserError
    from ddpkit.initializing import initialize
    from ddpkit.loop import Evaluation, Saving, fit
    from ddpkit.optimizing import Group, parameter_groups
    from ddpkit.parts import channels_last, freeze
    from ddpkit.precision import Precision, set_exactness
    from ddpkit.profiling import Profile
    from ddpkit.progress import ProgressBar
    from ddpkit.recompute import recompute_activations
    from ddpkit.selection import Best, EarlyStopping
    from ddpkit.session import Runtime, runtime
    from ddpkit.summary import ModelSummary, summarize
    from ddpkit.trackers import Tracker, Trackers
    from ddpkit.world import World

__all__ = [
    "Best",
    "Callback",
    "DdpkitError",
    "EarlyStopping",
    "Evaluation",
    "Group",
    "ModelSummary",
    "NotFinite",
    "Precision",
    "Profile",
    "ProgressBar",
    "Runtime",
    "Saving",
    "StopRequested",
    "Tracker",
    "Trackers",
    "UserError",
    "Weights",
    "World",
    "averaged",
    "capture",
    "channels_last",
    "fit",
    "freeze",
    "initialize",
    "largest_that_fits",
    "load_weights",
    "parameter_groups",
    "recompute_activations",
    "runtime",
    "set_exactness",
    "summarize",
]

_HOMES = {
    "largest_that_fits": "batch_size",
    "Callback": "callbacks",
    "capture": "capturing",
    "averaged": "ema",
    "DdpkitError": "errors",
    "NotFinite": "errors",
    "StopRequested": "errors",
    "UserError": "errors",
    "initialize": "initializing",
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
    "Profile": "profiling",
    "ProgressBar": "progress",
    "recompute_activations": "recompute",
    "Best": "selection",
    "EarlyStopping": "selection",
    "Runtime": "session",
    "runtime": "session",
    "ModelSummary": "summary",
    "summarize": "summary",
    "Tracker": "trackers",
    "Trackers": "trackers",
    "World": "world",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ddpkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
