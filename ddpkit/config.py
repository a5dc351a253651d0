"""The config: a frozen tree, checked as a whole before any process starts. Imports nothing of torch."""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeGuard, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ddpkit import references, yaml_files
from ddpkit.errors import ConfigError
from ddpkit.explain import NestedProblems, brief, explain, shown
from ddpkit.world import environment
from ddpkit.yaml_files import KeyPath, Located, dotted

# ---------------------------------------------------------------------- the kinds of values


def _well_formed(ref: str) -> str:
    try:
        references.parse(ref)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return ref


def _usable_path(path: str) -> str:
    if not path or "\0" in path:
        raise ValueError(f"{path!r} cannot be a path")
    return os.path.expanduser(path)  # noqa: PTH111 - a Path would make more of it than that: runs/x/ is runs/x then


def _is_range(text: str) -> str:
    fewest, colon, most = text.partition(":")
    if not (colon and fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most) < 2**31):
        raise ValueError(f"expected an integer of at least 1 or a range such as '2:4', got {shown(text)}")
    return text


def _in_order(steps: tuple[int, ...]) -> tuple[int, ...]:
    if steps[0] > steps[1]:
        raise ValueError(f"the first one, {steps[0]}, comes after the last one, {steps[1]}")
    return steps


def _substitutable(rename: dict[str, str]) -> dict[str, str]:
    problems: list[tuple[KeyPath, str]] = []
    for pattern, replacement in rename.items():
        try:
            re.compile(pattern).sub(replacement, "")
        except (re.error, IndexError) as error:
            problems.append(((pattern,), f"{pattern!r} -> {replacement!r} cannot be substituted: {error}"))
    if problems:
        raise NestedProblems(problems)
    return rename


def _buildable(args: dict[str, JsonValue]) -> dict[str, JsonValue]:
    problems = [problem for name, value in args.items() for problem in _arg_problems(value, (name,))]
    if problems:
        raise NestedProblems(problems)
    return args


def _arg_problems(value: JsonValue, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if is_reference(value):
        yield from _reference_problems(value["ref"], (*path, "ref"))
    elif is_factory(value):
        yield from _reference_problems(value["factory"], (*path, "factory"))
        for key in value.keys() - {"factory", "args"}:
            yield (
                (*path, key),
                "unknown key; a mapping with the key factory is built, from args and nothing else",
            )
        args = value.get("args", {})
        if isinstance(args, dict):
            for key, child in args.items():
                yield from _arg_problems(child, (*path, "args", key))
        else:
            yield (*path, "args"), f"expected a mapping, got {shown(args)}"
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _arg_problems(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _arg_problems(child, (*path, index))


def _reference_problems(ref: JsonValue, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if not isinstance(ref, str):
        yield path, f"expected a reference such as 'package.module:name', got {shown(ref)}"
        return
    try:
        references.parse(ref)
    except ConfigError as error:
        yield path, str(error)


Ref: TypeAlias = Annotated[str, AfterValidator(_well_formed), WithJsonSchema({"type": "string", "format": "reference"})]
"""``package.module:name`` or ``path/to/file.py:name``, a path being relative to the current directory."""

Args: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_buildable)]
"""Keyword arguments. A value ``{factory: ..., args: ...}`` is built, ``{ref: ...}`` is the object itself."""

Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**63)]
NodeRange: TypeAlias = Annotated[
    str, AfterValidator(_is_range), WithJsonSchema({"type": "string", "format": "range of numbers"})
]
"""``"2:4"``: from 2 to 4 machines."""

Seconds: TypeAlias = Annotated[float, Field(gt=0, le=10_000_000, allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """What all parts of the tree share: frozen, exact types, no unknown keys."""

    # Not use_attribute_docstrings: it reads this file anew for each class, 6 % of a dry run; see `schema`.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _list() -> Any:
    """Give a field that takes a YAML list and keeps it as a tuple; empty by default."""
    return Field(default=(), strict=False)


# ---------------------------------------------------------------------- the tree


class Factory(Section):
    """Something that is called to make an object of yours."""

    factory: Ref
    """What is called: `package.module:name` or `path/to/file.py:name`."""
    args: Args = {}
    """Its keyword arguments. A value `{factory: ..., args: ...}` is built, `{ref: ...}` is the object."""


class Launch(Section):
    """Where and how the ranks are started."""

    launcher: Literal["inline", "local", "torchrun", "slurm"] = "local"
    """inline: this process, alone or as the rank that somebody else (torchrun, srun, mpirun) has made it. local:
    processes on this machine. torchrun, slurm: through them."""
    nnodes: Count | NodeRange = 1
    """Number of machines; torchrun also takes a range such as "2:4" (a string in YAML): they may come and go."""
    nproc_per_node: Count | Literal["auto"] = "auto"
    """Ranks on each machine; auto: one per GPU, and where there is none, as `nproc_without_gpu` says."""
    nproc_without_gpu: Count | None = None
    """What auto means on a machine without a GPU; null: one rank per two cores."""
    start_method: Literal["warm", "spawn"] = "warm"
    """local, slurm: warm: one process a node imports torch and forks the ranks. spawn: each rank is a new
    interpreter; under slurm a task of its own."""
    max_restarts: int = Field(default=0, ge=0, lt=2**31)
    """How often the launcher itself starts a failed group of ranks again."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """The process group's backend; auto: nccl on GPUs, gloo on CPU."""
    timeout_s: Seconds = 1800.0
    """Seconds after which a collective that does not complete fails."""
    stall_timeout_s: Seconds = 600.0
    """Seconds without a step, while ranks wait for each other, after which each rank is asked where it is."""
    rdzv_endpoint: str | None = None
    """host:port at which several machines meet (torchrun)."""
    cpus_per_rank: Count | None = None
    """Cores for each rank; null: the machine's, shared out evenly (slurm: one, unless the job has whole nodes)."""
    warning_signal: Literal["USR1", "USR2", "HUP"] = "USR2"
    """slurm: the signal that comes before the time limit, and asks all ranks to stop and save."""
    max_idle_requeues: int = Field(default=3, ge=0, lt=2**31)
    """slurm: how often in a row a job comes back (after a preemption, a time limit) without having got any further."""
    snapshot: bool = False
    """slurm: whether the job runs a copy of the code, taken when it is submitted, instead of what is there by then."""
    slurm: dict[str, JsonValue] = {}
    """Options of the Slurm submission by submitit's names; the prefix `slurm_` may be left out."""


def node_range(nnodes: int | str) -> tuple[int, int]:
    """The fewest and the most machines that ``launch.nnodes`` asks for."""
    if isinstance(nnodes, int):
        return nnodes, nnodes
    fewest, _, most = nnodes.partition(":")
    return int(fewest), int(most)


class Init(Factory):
    """First values for the model, or a part: `factory(module, **args)`, with `params` `factory(parameter, **args)`."""

    modules: tuple[str, ...] = _list()
    """Class names, or patterns of module names, for which it is called; empty: for all modules."""
    params: tuple[str, ...] = _list()
    """Patterns of parameter names (`*.weight`), for which it is called instead, as functions of `torch.nn.init` are."""

    @model_validator(mode="after")
    def _for_one_kind(self) -> Init:
        if self.modules and self.params:
            raise ValueError("modules and params are both given; leave one out")
        return self


class ModelSummary(Section):
    """What is told of the model when the run starts, in `model.txt`."""

    depth: int = Field(default=2, ge=0, lt=2**31)
    """Down to where its parts are listed."""
    graph: bool = False
    """Whether the graph of its first pass is written, to `model.dot`."""


class InitFrom(Section):
    """Weights to start from, out of a checkpoint that is not ddpkit's. A run that goes on has its own."""

    path: Annotated[str, AfterValidator(_usable_path)]
    """The file: safetensors if it ends in .safetensors, a list of several files if in .json (`*.index.json`), else one
    of `torch.save` (.pt, .pth, .bin, .ckpt)."""
    key: str | None = None
    """Where in the file the state dict is, dots leading further in; null: it is the file."""
    strip_prefix: str | None = None
    """A prefix to take off the names in it. What torch's wrappers have added (`module.`, `_orig_mod.`) goes anyway."""
    rename: Annotated[dict[str, str], AfterValidator(_substitutable)] = {}
    """Regular expressions, and what takes the place of what they find in its names; one after the other."""
    strict: bool = True
    """Whether each name must be there, and none besides."""
    skip_mismatched: bool = False
    """Whether a tensor of another shape is left out instead of refused."""


Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


class Fsdp2(Section):
    """How FSDP2 spreads the model over the ranks; for `parallel: fsdp2`. Beside `parallel: ddp` it may lie ready."""

    layers: tuple[str, ...] = _list()
    """Class names, or patterns of module names, of what is gathered and forgotten as a unit: a transformer's blocks,
    say. Without any, the whole model is."""
    param_dtype: Precision | None = None
    """What layers compute in; null: what the parameters are in."""
    reduce_dtype: Precision | None = None
    """What gradients are summed in over the ranks; null: as they come."""
    reshard_after_forward: bool = True
    """Whether a unit is forgotten between its forward and its backward pass; false takes memory and saves time."""
    cpu_offload: bool = False
    """Whether each rank's part, its gradients and its optimizer state are kept in the host's memory."""
    meta_init: bool = False
    """Whether `factory` runs under `torch.device("meta")`: no rank ever holds the whole model, whose first values come
    from its modules' `reset_parameters`."""


class Ddp(Section):
    """Options of `DistributedDataParallel`, by torch's names."""

    find_unused_parameters: bool = False
    """Whether parameters may be without gradient in a step, at the price of a walk over the graph in each."""
    static_graph: bool = False
    """Whether each step uses the same parameters in the same way, which lets torch do less."""
    gradient_as_bucket_view: bool = False
    """Whether gradients live in the buffers that are sent, which saves the memory of one set of gradients."""
    bucket_cap_mb: Positive | None = None
    """Size of those buffers in MB; null: torch's default."""


class Model(Factory):
    """The model: `factory(**args)` gives an `nn.Module`."""

    sync_batchnorm: bool = True
    """Whether batch normalisation takes its statistics over the batches of all ranks."""
    parallel: Literal["ddp", "fsdp2", "accelerate"] = "ddp"
    """ddp: each rank has all of it. fsdp2: each rank has a part, for models that are too large for one. accelerate: as
    a file of `accelerate config` says."""
    fsdp2: Fsdp2 = Fsdp2()
    """How FSDP2 spreads the model over the ranks; for `parallel: fsdp2`. Beside `parallel: ddp` it may lie ready."""
    accelerate_config: Annotated[str, AfterValidator(_usable_path)] | None = None
    """A file of `accelerate config`, for `parallel: accelerate`; it may ask for DeepSpeed. null: its defaults."""
    ddp: Ddp = Ddp()
    """Options of `DistributedDataParallel`, by torch's names."""
    compile: bool | dict[str, JsonValue] = False
    """Whether the model goes through `torch.compile`; a mapping has options of it (`{mode: reduce-overhead}`)."""
    channels_last: bool = False
    """Whether images and the weights of convolutions are kept with the channels last in memory."""
    freeze: tuple[str, ...] = _list()
    """Class names, or patterns of module or parameter names, of parts that are not trained."""
    activation_checkpointing: tuple[str, ...] = _list()
    """Class names, or patterns of module names, whose activations are computed again instead of kept."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of the weights; null: none is kept."""
    init: tuple[Init, ...] = _list()
    """What gives the model other first values than `factory` does, one after the other."""
    summary: ModelSummary | None = None
    """What is told of the model when the run starts; null: nothing."""
    init_from: InitFrom | None = None
    """Weights to start from; null: those that the factory gives."""


class Loader(Section):
    """How each rank loads its samples. Free to change between attempts."""

    num_workers: int = Field(default=0, ge=0, lt=2**31)
    """Loader processes of each rank; 0: the rank loads for itself."""
    pin_memory: Literal["auto"] | bool = "auto"
    """Whether batches are put into page-locked memory; auto: where there is a GPU."""
    prefetch_factor: Count = 2
    """Batches that each worker has ready."""
    persistent_workers: bool = True
    """Whether the workers live on between epochs."""
    collate_fn: Ref | None = None
    """What makes a batch out of a list of samples; null: torch's default."""
    worker_init_fn: Ref | None = None
    """Called with the worker's number in each worker when it starts."""


class Data(Section):
    """The datasets, and how they are cut into batches."""

    train: Factory
    """The training data: `factory(**args)` gives a `Dataset`, map-style or iterable."""
    eval: Factory | None = None
    """The evaluation data, likewise; it goes together with `train.eval_step`."""
    global_batch_size: Count
    """Samples per optimizer step over all ranks: the same on 1 rank or 100."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Samples per rank and forward pass; gradients are accumulated over the passes. null: one pass. auto: as many as
    fit into memory, tried out at the start."""
    eval_batch_size: Count | None = None
    """Samples per rank and forward pass in evaluation; null: as in training."""
    shuffle: bool = True
    """Whether each epoch has an order of its own, given by the seed."""
    drop_last: bool = True
    """Whether an incomplete global batch at the end of an epoch is left out."""
    sampler: Literal["elastic", "distributed"] | Factory = "elastic"
    """elastic: ddpkit's, the same order on any number of ranks. distributed: torch's. Or one of yours."""
    loader: Loader = Loader()
    """How each rank loads its samples."""


class ParamGroup(Section):
    """Parameters with settings of their own."""

    params: tuple[str, ...] = _list()
    """Patterns of parameter names, as in a shell (`*.bias`); the first group that matches has it."""
    modules: tuple[str, ...] = _list()
    """Class names, or patterns of module names, with all parameters in them."""
    args: dict[str, JsonValue] = {}
    """The settings of the group, over those of the optimizer."""


class ScaleLr(Section):
    """A rule by which learning rates follow the global batch size."""

    rule: Literal["linear", "sqrt"]
    """Whether they grow as the batch size does, or as its square root."""
    batch_size: Count
    """The global batch size for which they are right as given."""


class Optimizer(Factory):
    """The optimizer: `factory(params, **args)`."""

    groups: tuple[ParamGroup, ...] = _list()
    """Parameters with settings of their own; all others have those of `args`."""
    no_decay: tuple[Literal["norms", "biases"], ...] = _list()
    """Kinds of parameters without weight decay, in all groups: those of normalisation layers, and biases."""
    scale_lr: ScaleLr | None = None
    """A rule by which learning rates follow the global batch size; null: they are as given."""


class Scheduler(Factory):
    """The learning rate's schedule: `factory(optimizer, **args)`; a factory inside `args` gets the optimizer too, if it
    has a parameter `optimizer`."""

    interval: Literal["step", "epoch"] = "step"
    """After what the schedule moves on: each optimizer step, or each epoch."""
    metric: str | None = None
    """A value of `train.eval_step`: the schedule moves on after each evaluation, whatever `interval` says, and gets it
    (ReduceLROnPlateau). null: it gets none."""


class Steps(Section):
    """An interval in optimizer steps."""

    steps: Count
    """Number of optimizer steps."""


class EarlyStopping(Section):
    """When evaluations that are not better end the run."""

    metric: str
    """Name of a value that `train.eval_step` gives."""
    patience: Count
    """How many evaluations in a row have to be no better than the best one before them."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """By how much it has to be better."""


class Profile(Section):
    """A trace of some steps, by torch.profiler, in `profile/`."""

    steps: Annotated[tuple[Count, ...], AfterValidator(_in_order)] = Field(strict=False, min_length=2, max_length=2)
    """The first and the last one."""
    ranks: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), strict=False)
    """The ranks that are traced."""
    shapes: bool = False
    """Whether the shapes of operators' inputs are recorded."""
    memory: bool = False
    """Whether it is recorded what memory is allocated and freed."""
    stacks: bool = False
    """Whether it is recorded where in the code each operator was called from."""


class Train(Section):
    """The loop."""

    step: Ref
    """`(model, batch) -> loss`, or `{"loss": mean, "weight": n (optional), other scalars}`."""
    eval_step: Ref | None = None
    """`(model, batch) -> {name: tensor of shape (batch,)}`, one value a sample; needs `data.eval`."""
    metrics: dict[str, Factory] = {}
    """Metric objects by name, as torchmetrics has them; `eval_step` then gives what they are updated with."""
    epochs: Count | None = None
    """Passes over the training data; either this or `max_steps`."""
    max_steps: Count | None = None
    """Optimizer steps in all; either this or `epochs`."""
    eval_every: Count | Steps = 1
    """Epochs between evaluations, or `{steps: N}`."""
    eval_ema: bool = False
    """Whether the moving average of the weights is evaluated instead of the weights; needs `model.ema_decay`."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-true", "fp16-true"] = "fp32"
    """bf16 and fp16: autocast around the step, whatever the weights are in; fp16 with loss scaling. With -true the
    weights themselves, and all that is computed with them, are in it."""
    tf32: bool | None = None
    """Whether a GPU may round float32 to 19 bits in matrix products and convolutions; null: torch's default."""
    clip_grad_norm: Positive | None = None
    """Largest norm of the gradient, over all parameters; null: no limit. The norm is recorded."""
    clip_grad_value: Positive | None = None
    """Largest absolute value in the gradient; null: no limit."""
    log_grad_norm: bool = False
    """Whether the gradient's norm is recorded when it is not limited, too."""
    on_nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    """What is done when the loss or the gradient of a step is infinite or not a number on any rank. stop: say where it
    came from, and fail, with the state before the step saved. skip: say so, and go on without the step. ignore: do not
    look."""
    max_skipped: int = Field(default=20, ge=0, lt=2**31)
    """Steps in a row that may be skipped, also those by which fp16 finds its loss scale, before the run fails."""
    deterministic: bool = False
    """Bit-exactness on a GPU, at its price; on CPU it holds anyway."""
    early_stopping: EarlyStopping | None = None
    """When evaluations that are not better end the run; null: they do not."""
    callbacks: tuple[Ref | Factory, ...] = _list()
    """What is called at the moments of a run: classes or functions that give a `ddpkit.Callback`, or one itself."""
    profile: Profile | None = None
    """Steps that are traced; null: none."""


class Cudnn(Section):
    """Settings of cuDNN; null: torch's default."""

    benchmark: bool | None = None
    """Whether the fastest of several ways to convolve is tried out for each shape."""
    deterministic: bool | None = None
    """Whether only ways are taken that give the same bits each time."""


class Best(Section):
    """Which checkpoint is the best one."""

    metric: str
    """Name of a value that `train.eval_step` gives."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""


class Checkpoint(Section):
    """When a checkpoint is written, and how many are kept."""

    every_steps: Count | None = 50
    """Optimizer steps between saves; null: not by steps."""
    every_minutes: Positive | None = None
    """Minutes between saves; null: not by time."""
    keep: Count = 3
    """How many of the newest are kept."""
    best: Best | None = None
    """The best one, by a metric, is kept as well; null: none is."""
    max_failures: Count = 3
    """Saves in a row that may fail before the run fails."""
    asynchronous: bool = True
    """Whether training goes on while a save is written, from a copy in host memory; false: it waits, without a copy."""


TrackerName: TypeAlias = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


class Tracker(Section):
    """A service that metrics are sent to, with options."""

    name: TrackerName
    """Of a tracker of accelerate's."""
    args: dict[str, JsonValue] = {}
    """Arguments of its class there, over those that ddpkit gives."""


def _form_of_tracker(given: Any) -> str:
    """Which of the three forms is meant, so that a message speaks of that one alone."""
    if not isinstance(given, (dict, Section)):
        return "name"
    return "factory" if isinstance(given, Factory) or (isinstance(given, dict) and "factory" in given) else "options"


AnyTracker: TypeAlias = Annotated[
    Annotated[TrackerName, Tag("name")] | Annotated[Tracker, Tag("options")] | Annotated[Factory, Tag("factory")],
    Discriminator(_form_of_tracker),
]


def _each_once(trackers: tuple[str | Tracker | Factory, ...]) -> tuple[str | Tracker | Factory, ...]:
    names = [each.name if isinstance(each, Tracker) else each for each in trackers if not isinstance(each, Factory)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return trackers


class Config(Section):
    """A run."""

    run_dir: Annotated[str, AfterValidator(_usable_path)]
    """Folder for all that the run writes, relative to the current directory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """What all randomness of the run follows from."""
    launch: Launch = Launch()
    """Where and how the ranks are started."""
    model: Model
    """The model."""
    data: Data
    """The datasets, and how they are cut into batches."""
    optimizer: Optimizer
    """The optimizer."""
    scheduler: Scheduler | None = None
    """The learning rate's schedule; null: it stays."""
    train: Train
    """The loop."""
    cudnn: Cudnn = Cudnn()
    """Settings of cuDNN."""
    checkpoint: Checkpoint = Checkpoint()
    """When a checkpoint is written, and how many are kept."""
    trackers: Annotated[tuple[AnyTracker, ...], AfterValidator(_each_once)] = _list()
    """Services that metrics are sent to: by name, by name with options, or a factory of one of yours."""
    log_every: Count = 10
    """Optimizer steps between lines of metrics."""
    progress_bar: Literal["auto"] | bool = "auto"
    """Whether progress is shown as a bar; auto: where the launcher writes to a terminal."""


# ---------------------------------------------------------------------- in and out


def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Config:
    """Read a config file with its ``defaults``, apply ``key.path=value`` overrides, check all of it.

    The value of an override is YAML; a number in its key path is the index into a list (``trackers.0``). With the
    name of a group of ``defaults`` as its key (``model=resnet``), it says which file of the group is meant.
    ``${env:NAME}`` in a value is what the variable holds in ``env``, by default this process's environment.

    Raises ``ConfigError`` with all problems, one a line, each with its file and line (or override) and key
    path.
    """
    env = environment() if env is None else env
    given = [_parsed(override, env) for override in overrides]
    choices = yaml_files.Choices({key: value for key, value in given if isinstance(value.value, str)})
    tree = yaml_files.read(path, env, choices)
    for key, value in given:
        if not (key in choices.used and isinstance(value.value, str)):
            tree = yaml_files.replace_at(tree, key.split("."), value)
    return _checked(tree.plain(), tree, Config)


class _LaunchAlone(Section):
    launch: Launch = Launch()


def load_launch(overrides: Sequence[str]) -> Launch:
    """Give the ``launch`` section that ``launch.key=value`` overrides make of the defaults, for plain scripts.

    Raises ``ConfigError`` as ``load`` does.
    """
    tree = yaml_files.parse("launch: {}", "the defaults", numbered=False)
    for key, value in (_parsed(override, environment()) for override in overrides):
        tree = yaml_files.replace_at(tree, key.split("."), value)
    return _checked(tree.plain(), tree, _LaunchAlone).launch


def launch_section(tree: JsonValue) -> Launch:
    """Check a ``launch`` section of plain values.

    Raises ``ConfigError`` with all problems, one a line.
    """
    return _checked({"launch": tree}, None, _LaunchAlone).launch


def from_tree(tree: JsonValue) -> Config:
    """Check a tree of plain values, as ``to_tree`` gives it.

    Raises ``ConfigError`` with all problems, one a line.
    """
    return _checked(tree, None, Config)


def to_tree(config: Config) -> dict[str, JsonValue]:
    """Give the config as plain values, complete with defaults, in containers of their own."""
    tree: dict[str, JsonValue] = config.model_dump(mode="json")
    return tree


def dump(config: Config) -> str:
    """Give the config as YAML, complete with defaults, that ``load`` reads back to an equal one."""
    return yaml_files.dump(yaml_files.escaped(to_tree(config)))


def schema() -> dict[str, Any]:
    """JSON schema of the config file, with a description of each key."""
    tree = Config.model_json_schema()
    for name, section in [(Config.__name__, tree), *tree["$defs"].items()]:
        kind = globals().get(name)
        texts = _docstrings(kind) if isinstance(kind, type) and issubclass(kind, Section) else {}
        for key, node in section.get("properties", {}).items():
            if key in texts:
                node["description"] = texts[key]
    return tree


def _docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a section, and of those that it is built on."""
    found: dict[str, str] = {}
    for part in (each for each in reversed(kind.__mro__) if each.__module__ == __name__):
        (section,) = ast.parse(inspect.getsource(part)).body
        assert isinstance(section, ast.ClassDef)  # its source
        for field, text in itertools.pairwise(section.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[key] = inspect.cleandoc(said)
    return found


def is_factory(value: JsonValue) -> TypeGuard[dict[str, JsonValue]]:
    """Whether a value inside ``args`` is to be built: a mapping with the key ``factory``."""
    return isinstance(value, dict) and "factory" in value


def is_reference(value: JsonValue) -> TypeGuard[dict[str, JsonValue]]:
    """Whether a value inside ``args`` stands for an object: a mapping with the key ``ref`` alone."""
    return isinstance(value, dict) and value.keys() == {"ref"}


def _parsed(override: str, env: Mapping[str, str]) -> tuple[str, Located]:
    place = f"-o {override if len(override) <= 80 else override[:77] + '...'}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not (equals and all(key.split("."))):
        raise ConfigError(f"{place}: expected key.path=value, such as optimizer.args.lr=0.1")
    return key, yaml_files.parse(text, place, numbered=False, env=env)


# ---------------------------------------------------------------------- what changed


class Absent(enum.Enum):
    """Stands for a value that only the other config has; null is a value."""

    ABSENT = "not there"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Difference:
    """A key with another value in the new config than in the old one."""

    key: str
    old: JsonValue | Absent
    new: JsonValue | Absent

    def __str__(self) -> str:
        old, new = (str(value) if isinstance(value, Absent) else brief(value) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


_FREE_TO_CHANGE = (
    "launch",
    "model.fsdp2.layers",
    "model.fsdp2.reshard_after_forward",
    "model.fsdp2.cpu_offload",
    "model.fsdp2.meta_init",
    "data.loader",
    "data.micro_batch_size",
    "data.eval_batch_size",
    "checkpoint",
    "trackers",
    "log_every",
    "progress_bar",
    "model.summary",
    "train.early_stopping.patience",
    "train.profile",
    "train.epochs",
    "train.max_steps",
    "train.on_nonfinite",
    "train.max_skipped",
    "train.log_grad_norm",
    "run_dir",
)


def differences(old: Config, new: Config) -> list[Difference]:
    """List the keys whose values differ, but for those that are free to change; a list is one value."""
    found = _differences(to_tree(old), to_tree(new), "")
    return [difference for difference in found if not _is_free(difference.key)]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_TO_CHANGE)


def _differences(old: JsonValue | Absent, new: JsonValue | Absent, key: str) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            below = f"{key}.{name}" if key else name
            yield from _differences(old.get(name, Absent.ABSENT), new.get(name, Absent.ABSENT), below)
    elif repr(old) != repr(new):  # unlike ==, this tells 1 from true and from 1.0, and nan is nan
        yield Difference(key, old, new)


# ---------------------------------------------------------------------- checks


@dataclass(frozen=True)
class _Problem:
    path: KeyPath
    sentence: str


def _checked(tree: JsonValue, source: Located | None, kind: type[S]) -> S:
    problems = list(_not_plain(tree, ()))
    if not problems:
        problems = list(_contradictions(tree)) if kind is Config else []
        try:
            config = kind.model_validate(tree)
        except ValidationError as error:
            found = explain(error, tree, kind.model_json_schema())
            problems = [*(_Problem(path, sentence) for path, sentence in found.items()), *problems]
    if problems:
        raise ConfigError("\n".join(_line(problem, source) for problem in problems))
    return config


def _line(problem: _Problem, source: Located | None) -> str:
    place = f"{source.place_of(problem.path)}: " if source else ""
    key = f"{dotted(problem.path)}: " if problem.path else ""
    return f"{place}{key}{problem.sentence}"


def _not_plain(value: object, path: KeyPath) -> Iterator[_Problem]:
    """What is no JSON-like value. A file cannot hold such things; a tree made in Python can."""
    if len(path) > yaml_files.MAX_DEPTH:
        yield _Problem(path[:3], f"nested more than {yaml_files.MAX_DEPTH} levels deep")
    elif isinstance(value, dict):
        for key, child in value.items():
            if isinstance(key, str):
                yield from _not_plain(child, (*path, key))
            else:
                yield _Problem(path, f"the key {key!r} is not a string; quote it")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _not_plain(child, (*path, index))
    elif type(value) not in (type(None), bool, int, float, str):
        kind = type(value).__name__
        yield _Problem(path, f"{kind} is no YAML value; use a string, a number, a list or a mapping")


def _contradictions(tree: JsonValue) -> Iterator[_Problem]:
    """Keys that do not go together. On the bare tree, so that they are told along with all other problems."""
    yield from _contradictions_of_the_model(tree)
    yield from _unclear_lengths(tree)
    for one, other, sentence in _AT_ODDS:
        if _given(tree, one) and _given(tree, other):
            yield _Problem(tuple(one.split(".")), sentence)
    for one, other, sentence in _NEEDED:
        if _given(tree, one) and not _given(tree, other):
            yield _Problem(tuple(one.split(".")), sentence)
    groups = _value(tree, "optimizer.groups")
    for index, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict) and not (group.get("params") or group.get("modules")):
            yield _Problem(("optimizer", "groups", index), "names no parameters; give params, modules or both")


_AT_ODDS = (
    ("train.clip_grad_value", "train.clip_grad_norm", "given with train.clip_grad_norm; give one of them"),
    ("model.init", "model.fsdp2.meta_init", "given with model.fsdp2.meta_init, with which layers give them"),
    ("cudnn.benchmark", "train.deterministic", "given with train.deterministic, which rules it out"),
)
_NEEDED = (
    ("data.eval", "train.eval_step", "given without train.eval_step; give both or neither"),
    ("train.eval_step", "data.eval", "given without data.eval; give both or neither"),
    ("train.eval_ema", "model.ema_decay", "given without model.ema_decay, so there is no average to evaluate"),
    ("train.early_stopping", "train.eval_step", "given without data.eval and train.eval_step, which it goes by"),
    ("checkpoint.best", "train.eval_step", "given without data.eval and train.eval_step, which it goes by"),
    ("scheduler.metric", "train.eval_step", "given without data.eval and train.eval_step, which it comes from"),
)


def _unclear_lengths(tree: JsonValue) -> Iterator[_Problem]:
    train = _value(tree, "train")
    if not isinstance(train, dict):
        return
    lengths = [key for key in ("epochs", "max_steps") if train.get(key) is not None]
    if not lengths:
        yield _Problem(("train",), "neither train.epochs nor train.max_steps is given; give one of them")
    elif len(lengths) == 2:
        sentence = "train.epochs and train.max_steps are both given; leave one out, or set it to null"
        yield _Problem(("train", "max_steps"), sentence)


def _given(tree: JsonValue, key: str) -> bool:
    return _value(tree, key) not in (None, False, [])


def _value(tree: JsonValue, key: str) -> JsonValue:
    """What is at a key's path; null where there is no such place."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _contradictions_of_the_model(tree: JsonValue) -> Iterator[_Problem]:
    path = str(_value(tree, "model.init_from.path"))
    ending = next((ending for ending in (".safetensors", ".json") if path.endswith(ending)), None)
    if ending is not None and _value(tree, "model.init_from.key") is not None:
        yield _Problem(("model", "init_from", "key"), f"a file that ends in {ending} is one state dict; leave it out")
    parallel = _value(tree, "model.parallel") or "ddp"
    belongs_to: tuple[tuple[str, str, Section | None], ...] = (
        ("ddp", "ddp", Ddp()),
        ("fsdp2", "fsdp2", Fsdp2()),
        ("accelerate_config", "accelerate", None),
    )
    # Beside a choice that is written down, the other's section may lie ready: `-o model.parallel=fsdp2` is enough then.
    ready = {"ddp", "fsdp2"} if _value(tree, "model.parallel") else set()
    for key, way, defaults in belongs_to:
        if parallel != way and not {parallel, way} <= ready and _differs(_value(tree, f"model.{key}"), defaults):
            yield _Problem(("model", key), f"it is for model.parallel: {way}; choose that, or leave it out")
    if parallel != "fsdp2":
        return
    if _value(tree, "model.fsdp2.cpu_offload") is True and _value(tree, "train.precision") == "fp16":
        sentence = "not with train.precision: fp16, whose scaling needs the gradients on the GPU; choose bf16"
        yield _Problem(("model", "fsdp2", "cpu_offload"), sentence)
    if _value(tree, "data.micro_batch_size") == "auto":
        sentence = (
            "auto: not with model.parallel: fsdp2, which a trial on each rank for itself says nothing of; give a number"
        )
        yield _Problem(("data", "micro_batch_size"), sentence)


def _differs(given: JsonValue, defaults: Section | None) -> bool:
    """Whether a value was set to something else than it is by default."""
    if defaults is None:
        return given is not None
    usual = defaults.model_dump(mode="json")
    return isinstance(given, dict) and {**usual, **given} != usual
