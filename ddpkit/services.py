"""The services that accelerate's trackers send to: what each needs, and how it is told which run goes on.

Imports none of them. The names are accelerate's.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpkit.errors import nearest


@dataclass(frozen=True)
class Place:
    """Where a run stands when its tracker starts.

    Attributes:
        run_dir: of the run; absolute.
        step: optimizer steps done, in the state that was restored.
        identity: by which the service knows the run, from the first start on; None if it gives that itself and has not
            been asked yet, or needs none.
        goes_on: whether the run has been sent there before.
    """

    run_dir: Path
    step: int
    identity: str | None
    goes_on: bool

    @property
    def project(self) -> str:
        """What runs are compared within: the name of the folder that the run directory is in."""
        return self.run_dir.parent.name or "ddpkit"


@dataclass(frozen=True)
class Service:
    """One of accelerate's trackers.

    Attributes:
        packages: one of which has to be installed.
        arguments: of the tracker's constructor.
        new_identity: makes one, where it is for us to give.
        identity_of: reads it off the tracker that has started, where the service gives it.
    """

    packages: tuple[str, ...]
    arguments: Callable[[Place], dict[str, Any]]
    new_identity: Callable[[], str] | None = None
    identity_of: Callable[[Any], str] | None = None


def missing(name: str) -> str | None:
    """What keeps a tracker of this name from being used, as far as that can be seen without importing it."""
    if name not in SERVICES:
        return f"there is no tracker {name!r}{nearest(name, list(SERVICES))}; there are {', '.join(SERVICES)}"
    packages = SERVICES[name].packages
    if any(_is_installed(package) for package in packages):
        return None
    return f"{name} needs the package {' or '.join(packages)}, which is not installed: pip install {packages[0]}"


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # Without an origin it is a mere folder of this name, such as the one in which W&B keeps its files.
    return spec is not None and spec.origin is not None


def _tensorboard(place: Place) -> dict[str, Any]:
    # What was written of the steps that are now done again is not shown any more.
    return {"run_name": "", "logging_dir": str(place.run_dir / "tensorboard"), "purge_step": place.step + 1}


def _wandb(place: Place) -> dict[str, Any]:
    identity = {"id": place.identity, "resume": "allow"}
    return {"run_name": place.project, "name": place.run_dir.name, "dir": str(place.run_dir), **identity}


def _comet(place: Place) -> dict[str, Any]:
    return {"run_name": place.project, "experiment_key": place.identity, "mode": "get_or_create"}


def _mlflow(place: Place) -> dict[str, Any]:
    return {"experiment_name": place.project, "run_name": place.run_dir.name, "run_id": place.identity}


def _aim(place: Place) -> dict[str, Any]:
    return {"run_name": place.run_dir.name, "logging_dir": str(place.run_dir), "run_hash": place.identity}


def _clearml(place: Place) -> dict[str, Any]:
    # An offset of 0: steps keep their numbers. A number for this is how ClearML is asked for it.
    goes_on = {} if place.identity is None else {"reuse_last_task_id": place.identity, "continue_last_task": 0}
    return {"run_name": place.project, "task_name": place.run_dir.name, **goes_on}


def _dvclive(place: Place) -> dict[str, Any]:
    # Its dvc.yaml would otherwise be in the current directory, one for all runs there.
    return {
        "dir": str(place.run_dir / "dvclive"),
        "dvcyaml": str(place.run_dir / "dvc.yaml"),
        "resume": place.goes_on,
    }


def _swanlab(place: Place) -> dict[str, Any]:
    identity = {"id": place.identity, "resume": "allow"}
    folder = str(place.run_dir / "swanlab")
    return {"run_name": place.project, "experiment_name": place.run_dir.name, "logdir": folder, **identity}


def _trackio(place: Place) -> dict[str, Any]:
    return {"run_name": place.project, "name": f"{place.run_dir.name}-{place.identity}", "resume": "allow"}


def _random() -> str:
    return uuid.uuid4().hex


SERVICES: Mapping[str, Service] = {
    "aim": Service(("aim",), _aim, identity_of=lambda tracker: tracker.writer.hash),
    "clearml": Service(("clearml",), _clearml, identity_of=lambda tracker: tracker.task.id),
    "comet_ml": Service(("comet_ml",), _comet, new_identity=_random),
    "dvclive": Service(("dvclive",), _dvclive),
    "mlflow": Service(("mlflow",), _mlflow, identity_of=lambda tracker: tracker.active_run.info.run_id),
    "swanlab": Service(("swanlab",), _swanlab, new_identity=lambda: _random()[:21]),
    "tensorboard": Service(("tensorboard", "tensorboardX"), _tensorboard),
    "trackio": Service(("trackio",), _trackio, new_identity=lambda: _random()[:8]),
    "wandb": Service(("wandb",), _wandb, new_identity=lambda: _random()[:8]),
}
