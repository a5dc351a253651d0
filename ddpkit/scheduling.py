"""The learning rate's schedule: how one is made from a config, and when it moves on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddpkit import factories
from ddpkit.config import Scheduler
from ddpkit.errors import ConfigError, UserError


@dataclass(frozen=True)
class Schedule:
    """A scheduler, and after what it moves on. It does so by optimizer steps: one that was not taken does not count.

    Attributes:
        scheduler: torch's or alike; None: the learning rate stays.
        interval: "step" or "epoch".
        metric: the value of each evaluation that it is given, instead of moving on by ``interval``; None: none is.
    """

    scheduler: Any = None
    interval: str = "step"
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.interval not in ("step", "epoch"):
            raise UserError(f"scheduler.interval: {self.interval!r} is none; choose step or epoch")
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.metric is None:
            raise UserError(
                "scheduler.metric: ReduceLROnPlateau goes by a value of the evaluation; give its name (loss, say)"
            )

    def after_step(self) -> None:
        """An optimizer step was taken."""
        if self.interval == "step" and self.metric is None:
            self._move()

    def after_epoch(self) -> None:
        """An epoch has ended."""
        if self.interval == "epoch" and self.metric is None:
            self._move()

    def after_evaluation(self, values: Mapping[str, float]) -> None:
        """``values`` are those of all ranks together, so all ranks move alike.

        Raises:
            UserError: the metric is not among them.
        """
        if self.scheduler is None or self.metric is None:
            return
        if self.metric not in values:
            raise UserError(
                f"scheduler.metric: the evaluation gave no {self.metric!r}; it gave {', '.join(values) or 'nothing'}"
            )
        self.scheduler.step(values[self.metric])

    def _move(self) -> None:
        if self.scheduler is not None:
            self.scheduler.step()


def build(config: Scheduler, optimizer: Optimizer) -> Any:
    """The scheduler that a config asks for. Schedulers inside its args (of a warm-up chain, say) get the optimizer too.

    Raises:
        ConfigError: the factory does not take these args, or gives something else.
    """
    scheduler = factories.build(config, optimizer, key="scheduler", shared={"optimizer": optimizer})
    if not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict")):
        raise ConfigError(
            f"scheduler.factory: {config.factory} returned {type(scheduler).__name__}; a scheduler is "
            "needed: step, state_dict and load_state_dict"
        )
    return scheduler
