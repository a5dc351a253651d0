"""The whole run of one rank, in the order in which it happens. Launchers end here; everything else is below."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from ddpkit import factories
from ddpkit.checkpoint.listing import checkpoints_directory
from ddpkit.checkpoint.store import CheckpointStore
from ddpkit.config import Config, Steps, dump, from_tree
from ddpkit.config import Loader as LoaderConfig
from ddpkit.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, StopRequested, UserError
from ddpkit.evaluate import evaluate
from ddpkit.fetching import LoaderOptions
from ddpkit.initializing import initialize
from ddpkit.loop import Evaluation, Saving, fit
from ddpkit.observers import observers
from ddpkit.run import Attempt, check_same_tensors
from ddpkit.selection import Best, EarlyStopping
from ddpkit.session import Runtime, choose_device
from ddpkit.world import World

log = logging.getLogger("ddpkit")


def work(kind: str, tree: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Do this rank's part of a "run" or an "eval".

    Args:
        kind: which of the two.
        tree: the resolved config.
        options: "attempt" and "launcher_pid"; "terminal", its columns, if there is one; "config", as it was given,
            where the tree names files of a snapshot instead; for an evaluation the "step", or None for the newest.

    Raises:
        UserError: something in the config cannot work; found before the group forms wherever it can be.
        StopRequested: stopped on request, the state saved.
    """
    config = from_tree(tree)
    world = World.from_env()
    check(config, world)
    launch = config.launch
    with (
        Runtime(
            world,
            seed=config.seed,
            backend=launch.backend,
            timeout_s=launch.timeout_s,
            stall_timeout_s=launch.stall_timeout_s,
            warning_signal=launch.warning_signal,
            max_idle_requeues=launch.max_idle_requeues,
            run_dir=Path(config.run_dir) if kind == "run" else None,
        ) as rt,
        _no_leaving(kind),
    ):
        if kind == "run":
            record = options.get("config") or dump(config)
            attempt = Attempt(options["attempt"], options.get("launcher_pid"), record)
            train(rt, config, attempt, options.get("terminal"))
        else:
            evaluate_checkpoint(rt, config, options.get("step"))


@contextmanager
def _no_leaving(kind: str) -> Iterator[None]:
    """What the config refers to may not leave as if all were well: the other ranks go on, and wait for this one."""
    try:
        yield
    except SystemExit as leaving:
        if isinstance(leaving, StopRequested) or leaving.code not in (None, EXIT_DONE, EXIT_STOPPED):
            raise
        raise RuntimeError(
            f"sys.exit({'' if leaving.code is None else leaving.code}) in the middle of the {kind}; an exception says "
            "what is wrong, and train.max_steps or a signal ends it in order"
        ) from leaving


def check(config: Config, world: World) -> None:
    """Find what cannot work before the ranks wait for each other: import all that the config refers to."""
    choose_device(world, config.launch.backend)
    for key, ref in factories.all_references(config):
        factories.resolve(ref, key)
    if problems := factories.missing_trackers(config):
        raise ConfigError("\n".join(problems))


def train(rt: Runtime, config: Config, attempt: Attempt, terminal: int | None = None) -> None:
    """Build everything from the config, and train to the end. Collective.

    What the user's code does here may take long: between its parts a stop can take place.
    """
    _set_determinism(config)
    rt.stop_before_the_run()
    module = _module(config)
    rt.stop_before_the_run()
    train_set = _dataset(config, "data.train")
    rt.stop_before_the_run()
    evaluation = _evaluation(rt, config)
    if config.model.compile:
        module.compile()
    model = rt.wrap(module, sync_batchnorm=config.model.sync_batchnorm)
    optimizer = _optimizer(config, module)
    data, options = config.data, _loader_options(rt, config.data.loader)
    loader = rt.loader(
        train_set,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        sampler=_sampler(config),
        num_workers=options.num_workers,
        pin_memory=options.pin_memory,
        prefetch_factor=options.prefetch_factor,
        persistent_workers=options.persistent_workers,
        collate_fn=options.collate_fn,
        worker_init_fn=options.worker_init_fn,
    )
    saving = config.checkpoint
    fit(
        rt,
        config.run_dir,
        model=model,
        loader=loader,
        optimizer=optimizer,
        step=_function(config.train.step, "train.step"),
        scheduler=_scheduler(config, optimizer),
        scheduler_interval=config.scheduler.interval if config.scheduler else "step",
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        evaluation=evaluation,
        saving=Saving(
            saving.every_steps,
            saving.every_minutes,
            saving.keep,
            saving.max_failures,
            Best(**dict(saving.best)) if saving.best else None,
        ),
        early_stopping=EarlyStopping(**dict(early)) if (early := config.train.early_stopping) else None,
        callbacks=observers(config, terminal),
        precision=config.train.precision,
        clip_grad_norm=config.train.clip_grad_norm,
        log_every=config.log_every,
        attempt=attempt,
    )


def evaluate_checkpoint(rt: Runtime, config: Config, step: int | None) -> None:
    """Evaluate a checkpoint and print the result, one JSON line, on rank zero. Writes nothing. Collective."""
    evaluation = _evaluation(rt, config)
    if evaluation is None:
        raise UserError("data.eval: the config has no data.eval and train.eval_step, so there is nothing to evaluate")
    model = _module(config).to(rt.device)
    directory = checkpoints_directory(Path(config.run_dir))
    store = CheckpointStore(directory, 1, rt.ranks, event=_ignore, warn=log.warning, fence=_ignore)
    loaded = store.load_newest(step, read_only=True)
    if loaded is None:
        raise UserError(f"{directory}: there is no checkpoint to evaluate yet")
    state = {**loaded.replicated["model"], **loaded.main["model"]}
    check_same_tensors("model", model.state_dict(), state)
    model.load_state_dict(state)
    values = evaluate(
        rt,
        model,
        evaluation.dataset,
        evaluation.step,
        batch_size=evaluation.batch_size,
        options=evaluation.options,
        metrics=evaluation.metrics,
    )
    if rt.is_main:
        print(json.dumps({"step": loaded.step, **values}), file=sys.stdout, flush=True)  # noqa: T201 - the result


def _set_determinism(config: Config) -> None:
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _module(config: Config) -> nn.Module:
    built = factories.build(config.model, key="model")
    module: nn.Module = factories.expect(built, nn.Module, "model.factory", "an nn.Module", ref=config.model.factory)
    for index, init in enumerate(config.model.init):
        key = f"model.init.{index}"
        function = partial(factories.build, init, key=key)
        initialize(module, function, modules=init.modules, params=init.params, key=key)
    return module


def _dataset(config: Config, key: str) -> Any:
    spec = config.data.train if key == "data.train" else config.data.eval
    assert spec is not None  # asked for only where it is set
    dataset = factories.build(spec, key=key)
    if not isinstance(dataset, IterableDataset) and not (
        isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    ):
        raise ConfigError(
            f"{key}.factory: {spec.factory} returned {type(dataset).__name__}; a dataset is needed: __len__ and "
            "__getitem__, or a torch.utils.data.IterableDataset"
        )
    return dataset


def _evaluation(rt: Runtime, config: Config) -> Evaluation | None:
    if config.data.eval is None or config.train.eval_step is None:
        return None
    every = config.train.eval_every
    share = -(-config.data.global_batch_size // rt.world_size)
    return Evaluation(
        dataset=_dataset(config, "data.eval"),
        step=_function(config.train.eval_step, "train.eval_step"),
        batch_size=config.data.eval_batch_size or config.data.micro_batch_size or share,
        every_epochs=None if isinstance(every, Steps) else every,
        every_steps=every.steps if isinstance(every, Steps) else None,
        options=_loader_options(rt, config.data.loader),
        metrics=_metrics(config),
    )


def _metrics(config: Config) -> dict[str, Any] | None:
    made = {name: factories.build(spec, key=f"train.metrics.{name}") for name, spec in config.train.metrics.items()}
    for name, metric in made.items():
        if not all(hasattr(metric, method) for method in ("reset", "update", "compute")):
            raise ConfigError(
                f"train.metrics.{name}.factory: {config.train.metrics[name].factory} returned {type(metric).__name__}; "
                "a metric is needed: reset, update and compute"
            )
    return made or None


def _optimizer(config: Config, module: nn.Module) -> Optimizer:
    built = factories.build(config.optimizer, _parameter_groups(config, module), key="optimizer")
    optimizer: Optimizer = factories.expect(
        built, Optimizer, "optimizer.factory", "a torch.optim.Optimizer", ref=config.optimizer.factory
    )
    return optimizer


def _parameter_groups(config: Config, module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters by the first group whose pattern has their name; the rest come last."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not named:
        raise ConfigError(f"model.factory: {config.model.factory} has no parameter to train")
    groups = []
    for index, group in enumerate(config.optimizer.groups):
        names = [name for name in named if any(fnmatchcase(name, pattern) for pattern in group.params)]
        if not names:
            raise ConfigError(
                f"optimizer.groups.{index}.params: {', '.join(group.params)} names no trainable parameter that an "
                f"earlier group has not taken; the model has {', '.join(list(named)[:8])}, ..."
            )
        groups.append({"params": [named.pop(name) for name in names], **group.args})
    return [*groups, {"params": list(named.values())}] if named else groups


def _scheduler(config: Config, optimizer: Optimizer) -> Any:
    if config.scheduler is None:
        return None
    scheduler = factories.build(config.scheduler, optimizer, key="scheduler")
    if not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict")):
        raise ConfigError(
            f"scheduler.factory: {config.scheduler.factory} returned {type(scheduler).__name__}; a scheduler is "
            "needed: step, state_dict and load_state_dict"
        )
    return scheduler


def _sampler(config: Config) -> Any:
    sampler = config.data.sampler
    if isinstance(sampler, str):
        return sampler
    return lambda dataset: factories.build(sampler, dataset, key="data.sampler")


def _loader_options(rt: Runtime, loader: LoaderConfig) -> LoaderOptions:
    return LoaderOptions(
        num_workers=loader.num_workers,
        pin_memory=rt.device.type == "cuda" if loader.pin_memory == "auto" else loader.pin_memory,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        collate_fn=_function(loader.collate_fn, "data.loader.collate_fn") if loader.collate_fn else None,
        worker_init_fn=_function(loader.worker_init_fn, "data.loader.worker_init_fn")
        if loader.worker_init_fn
        else None,
    )


def _function(ref: str, key: str) -> Callable[..., Any]:
    found = factories.resolve(ref, key)
    if not callable(found):
        raise ConfigError(f"{key}: {ref} is {type(found).__name__}, which cannot be called")
    return found


def _ignore(*_: object, **__: object) -> None:
    return None
