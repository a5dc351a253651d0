"""What a config has called at the moments of a run: ddpkit's own observers, and the user's callbacks."""

from __future__ import annotations

import inspect
from typing import Any

from ddpkit import callbacks, factories
from ddpkit.config import Config, Factory, Tracker, to_tree
from ddpkit.profiling import Profile
from ddpkit.progress import ProgressBar
from ddpkit.summary import ModelSummary
from ddpkit.trackers import Tracker as NamedTracker
from ddpkit.trackers import Trackers


def observers(config: Config, terminal: int | None) -> list[Any]:
    """Build them all, the user's last. The same on every rank.

    Args:
        config: of the run.
        terminal: columns of the launcher's terminal; None if it has none.

    Raises:
        ConfigError: a factory does not fit.
        UserError: something is no callback, or no tracker.
    """
    found: list[Any] = []
    if config.progress_bar is True or (config.progress_bar == "auto" and terminal is not None):
        found.append(ProgressBar(terminal))
    if config.trackers:
        found.append(Trackers(_trackers(config), to_tree(config)))
    if (summary := config.model.summary) is not None:
        found.append(ModelSummary(summary.depth, graph=summary.graph))
    if (profile := config.train.profile) is not None:
        found.append(Profile(**dict(profile)))
    return found + [_callback(each, f"train.callbacks.{index}") for index, each in enumerate(config.train.callbacks)]


def _trackers(config: Config) -> list[Any]:
    return [
        factories.build(each, key=f"trackers.{index}")
        if isinstance(each, Factory)
        else NamedTracker(each.name, each.args)
        if isinstance(each, Tracker)
        else each
        for index, each in enumerate(config.trackers)
    ]


def _callback(spec: str | Factory, key: str) -> Any:
    if isinstance(spec, Factory):
        found = factories.build(spec, key=key)
    else:
        found = factories.resolve(spec, key)
        if inspect.isclass(found) or inspect.isroutine(found):
            found = factories.build(Factory(factory=spec), key=key)
    callbacks.check(found, key)
    return found
