"""ddpkit: train on any number of ranks, stop anywhere, go on as if nothing had happened.

The public names are resolved when they are first used, so that ``import ddpkit`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpkit.callbacks import Callback
    from ddpkit.capturing import capture
    from ddpkit.errors import DdpkitError, StopRequested, UserError
    from ddpkit.initializing import initialize
    from ddpkit.loop import Evaluation, Saving, fit
    from ddpkit.profiling import Profile
    from ddpkit.progress import ProgressBar
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
    "ModelSummary",
    "Profile",
    "ProgressBar",
    "Runtime",
    "Saving",
    "StopRequested",
    "Tracker",
    "Trackers",
    "UserError",
    "World",
    "capture",
    "fit",
    "initialize",
    "runtime",
    "summarize",
]

_HOMES = {
    "Callback": "callbacks",
    "capture": "capturing",
    "DdpkitError": "errors",
    "StopRequested": "errors",
    "UserError": "errors",
    "initialize": "initializing",
    "Evaluation": "loop",
    "Saving": "loop",
    "fit": "loop",
    "Profile": "profiling",
    "ProgressBar": "progress",
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
