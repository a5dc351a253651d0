"""The whole run of one rank, in the order in which it happens. Launchers end here; everything else is below."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import IterableDataset

from ddpkit import accelerated, batch_size, ema, factories, scheduling
from ddpkit.checkpoint.foreign import load_weights
from ddpkit.checkpoint.listing import checkpoints_directory, has_any
from ddpkit.checkpoint.store import CheckpointStore
from ddpkit.config import Config, Steps, dump, from_tree
from ddpkit.config import Loader as LoaderConfig
from ddpkit.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, StopRequested, UserError
from ddpkit.evaluate import evaluate
from ddpkit.fetching import LoaderOptions
from ddpkit.initializing import initialize
from ddpkit.loop import Evaluation, Saving, fit
from ddpkit.observers import observers
from ddpkit.optimizing import Group, parameter_groups, scale_for_batch, scale_learning_rates
from ddpkit.parts import channels_last, freeze
from ddpkit.precision import Precision, set_exactness
from ddpkit.recompute import recompute_activations
from ddpkit.run import Attempt, load_state
from ddpkit.selection import Best, EarlyStopping
from ddpkit.session import Runtime, choose_device
from ddpkit.world import World
from ddpkit.zero import alone

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
    _set_exactness(config)
    rt.stop_before_the_run()
    module = _module(config)
    _load_first_weights(rt, config, module)
    recompute_activations(module, config.model.activation_checkpointing, "model.activation_checkpointing")
    rt.stop_before_the_run()
    train_set = _dataset(config, "data.train")
    rt.stop_before_the_run()
    evaluation = _evaluation(rt, config)
    data, options = config.data, _loader_options(rt, config.data.loader)
    micro_batch_size = _micro_batch_size(rt, config, module, train_set, options)
    _compile(module, config.model.compile)
    model, average = _wrapped(rt, config, module)
    optimizer = rt.wrap_optimizer(_optimizer(config, module), model)
    loader = rt.loader(
        train_set,
        global_batch_size=data.global_batch_size,
        micro_batch_size=micro_batch_size,
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
        scheduler=scheduling.build(config.scheduler, optimizer) if config.scheduler else None,
        scheduler_interval=config.scheduler.interval if config.scheduler else "step",
        scheduler_metric=config.scheduler.metric if config.scheduler else None,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        evaluation=_in_batches_that_fit(config, evaluation, micro_batch_size),
        saving=Saving(
            saving.every_steps,
            saving.every_minutes,
            saving.keep,
            saving.max_failures,
            saving.asynchronous,
            Best(**dict(saving.best)) if saving.best else None,
        ),
        early_stopping=EarlyStopping(**dict(early)) if (early := config.train.early_stopping) else None,
        callbacks=observers(config, terminal),
        precision=config.train.precision,
        clip_grad_norm=config.train.clip_grad_norm,
        clip_grad_value=config.train.clip_grad_value,
        log_grad_norm=config.train.log_grad_norm,
        on_nonfinite=config.train.on_nonfinite,
        max_skipped=config.train.max_skipped,
        average=average,
        log_every=config.log_every,
        attempt=attempt,
    )


def evaluate_checkpoint(rt: Runtime, config: Config, step: int | None) -> None:
    """Evaluate a checkpoint and print the result, one JSON line, on rank zero. Writes nothing. Collective."""
    _set_exactness(config)
    evaluation = _evaluation(rt, config)
    if evaluation is None:
        raise UserError("data.eval: the config has no data.eval and train.eval_step, so there is nothing to evaluate")
    name, module = "model", _module(config)
    if evaluation.of_average and config.model.ema_decay is not None:
        name, module = ema.NAME, ema.averaged(module, config.model.ema_decay).module
    # Whole where it fits, so that a rank without a sample in the last pass has nothing to do.
    model = rt.wrap(module, **_spreading(config)) if config.model.parallel == "fsdp2" else module.to(rt.device)
    directory = checkpoints_directory(Path(config.run_dir))
    store = CheckpointStore(directory, 1, rt.ranks, event=_ignore, warn=log.warning, fence=_ignore)
    loaded = store.load_newest(step, read_only=True, into={"model": dict(model.named_parameters())})
    if loaded is None:
        raise UserError(f"{directory}: there is no checkpoint to evaluate yet")
    state = {**loaded.replicated[name], **loaded.main[name]}
    load_state("model", model, state if name == "model" else ema.weights_in(state))
    if config.model.parallel == "accelerate" and (spread := accelerated.read(config.model.accelerate_config).zero):
        model = alone(model, spread, rt.device)
    evaluation = _in_batches_that_fit(config, evaluation, loaded.main["loader"].get("micro_batch_size"))
    assert evaluation is not None  # it was there before
    values = evaluate(
        rt,
        model,
        evaluation.dataset,
        Precision.named(config.train.precision).applied_to(evaluation.step, rt.device),
        batch_size=evaluation.batch_size,
        options=evaluation.options,
        metrics=evaluation.metrics,
    )
    if rt.is_main:
        print(json.dumps({"step": loaded.step, **values}), file=sys.stdout, flush=True)  # noqa: T201 - the result


def _set_exactness(config: Config) -> None:
    set_exactness(
        deterministic=config.train.deterministic,
        tf32=config.train.tf32,
        cudnn_benchmark=config.cudnn.benchmark,
        cudnn_deterministic=config.cudnn.deterministic,
    )


def _module(config: Config) -> nn.Module:
    is_meta = config.model.parallel == "fsdp2" and config.model.fsdp2.meta_init
    with torch.device("meta") if is_meta else nullcontext():
        built = factories.build(config.model, key="model")
    module: nn.Module = factories.expect(built, nn.Module, "model.factory", "an nn.Module", ref=config.model.factory)
    for index, init in enumerate(config.model.init):
        key = f"model.init.{index}"
        function = partial(factories.build, init, key=key)
        initialize(module, function, modules=init.modules, params=init.params, key=key)
    freeze(module, config.model.freeze, "model.freeze")
    if config.model.channels_last:
        channels_last(module)
    return Precision.named(config.train.precision).convert(module)


def _compile(module: nn.Module, options: bool | Mapping[str, Any]) -> None:
    if options is False:
        return
    try:
        module.compile(**({} if options is True else options))
    except (TypeError, RuntimeError) as error:  # an option, mode or backend that there is none of
        raise ConfigError(f"model.compile: {error}") from error


def _micro_batch_size(
    rt: Runtime, config: Config, module: nn.Module, train_set: Any, options: LoaderOptions
) -> int | None:
    """As the config has it; auto: that with which the run goes on, or else the largest that fits. Collective."""
    if config.data.micro_batch_size != "auto":
        return config.data.micro_batch_size
    share = -(-config.data.global_batch_size // rt.world_size)
    known = batch_size.remembered(Path(config.run_dir), rt.world_size) if rt.is_main else None
    known = rt.ranks.decide("size of micro batches", known)
    if known is not None:
        return min(int(known), share)
    sizes = [each.nbytes for each in module.parameters() if each.requires_grad]
    in_buckets = rt.world_size > 1 and not config.model.ddp.gradient_as_bucket_view
    trial = batch_size.Trial(
        module,
        partial(_optimizer, config),
        _function(config.train.step, "train.step"),
        train_set,
        options,
        rt.device,
        config.train.precision,
        extra_bytes=sum(sizes) * (in_buckets + (config.model.ema_decay is not None)),
    )
    found = batch_size.largest_that_fits(rt.ranks, rt.device, trial, share)
    if rt.is_main:
        log.info("data.micro_batch_size: %d of %d samples fit into memory at once", found, share)
    return found


def _spreading(config: Config) -> dict[str, Any]:
    """How `Runtime.wrap` is to spread the model."""
    model = config.model
    if model.parallel == "accelerate":
        return {"parallel": "accelerate", "config": model.accelerate_config}
    if model.parallel == "fsdp2":
        return {"parallel": "fsdp2", **model.fsdp2.model_dump(exclude={"meta_init"})}
    return {name: value for name, value in dict(model.ddp).items() if value is not None}


def _wrapped(rt: Runtime, config: Config, module: nn.Module) -> tuple[nn.Module, AveragedModel | None]:
    """The model on all ranks, and the average of its weights, if there is to be one. Collective."""
    decay, options = config.model.ema_decay, {"sync_batchnorm": config.model.sync_batchnorm, **_spreading(config)}
    if decay is None:
        return rt.wrap(module, **options), None
    if config.model.parallel != "fsdp2":
        model = rt.wrap(module, **options)
        return model, ema.averaged(model, decay)
    average = ema.averaged(module, decay)  # a copy, which cannot be made of a model that is spread already
    model = rt.wrap(module, **options)
    average.module = rt.wrap(average.module, **options)
    return model, average


def _load_first_weights(rt: Runtime, config: Config, module: nn.Module) -> None:
    """What `model.init_from` asks for, in a run that begins: on rank zero, whose weights all get. Collective."""
    init_from = config.model.init_from
    if init_from is None:
        return

    def load() -> None:
        if has_any(Path(config.run_dir)):
            return
        try:
            found = load_weights(module, **dict(init_from))
        except UserError as error:
            raise UserError(f"model.init_from: {error}") from error
        extra = [name for name in found.taken if name.endswith("_extra_state")]
        if extra and rt.world_size > 1:
            raise UserError(f"model.init_from: {extra[0]} is no tensor, and cannot be given to the other ranks")
        log.info("model.init_from: %s", found)

    rt.ranks.on_main("init_from", load)


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
    every, micro = config.train.eval_every, config.data.micro_batch_size
    share = -(-config.data.global_batch_size // rt.world_size)
    return Evaluation(
        dataset=_dataset(config, "data.eval"),
        step=_function(config.train.eval_step, "train.eval_step"),
        batch_size=config.data.eval_batch_size or (micro if isinstance(micro, int) else share),
        every_epochs=None if isinstance(every, Steps) else every,
        every_steps=every.steps if isinstance(every, Steps) else None,
        options=_loader_options(rt, config.data.loader),
        metrics=_metrics(config),
        of_average=config.train.eval_ema,
    )


def _in_batches_that_fit(config: Config, evaluation: Evaluation | None, size: int | None) -> Evaluation | None:
    """With batches no larger than those that were found to fit, where the config leaves both open."""
    is_open = config.data.micro_batch_size == "auto" and config.data.eval_batch_size is None
    return (
        replace(evaluation, batch_size=size) if evaluation is not None and size is not None and is_open else evaluation
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
    settings = config.optimizer
    named = [Group(group.params, group.modules, group.args) for group in settings.groups]
    groups = parameter_groups(module, named, no_decay=settings.no_decay, key="optimizer.groups")
    built = factories.build(settings, groups, key="optimizer")
    optimizer: Optimizer = factories.expect(
        built, Optimizer, "optimizer.factory", "a torch.optim.Optimizer", ref=settings.factory
    )
    if (scale := settings.scale_lr) is not None:
        factor = scale_for_batch(scale.rule, config.data.global_batch_size, scale.batch_size)
        scale_learning_rates(optimizer, factor)
    return optimizer


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
