"""Models that DeepSpeed's engine trains (ZeRO): spread over the ranks, and whole in checkpoints. Imports it when used.

The engine has the parameters, the gradients and the optimizer's state in flat parts, cut without regard to what a
parameter is. None of that is saved: parameters and states are put together one by one, and cut along their rows, which
is how FSDP2 spreads them and `ddpkit.checkpoint.shards` saves them. So any number of ranks takes them up again, and so
does a model that is not spread at all.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ddpkit.checkpoint.shards import Layout, Sharded
from ddpkit.errors import StateError, UserError
from ddpkit.precision import cast_around
from ddpkit.world import environment, replaced
from ddpkit.zero_config import OPTIMIZERS, ZeroConfig, unknown_optimizer


class Zero(nn.Module):
    """A module that DeepSpeed trains. It computes once it has its optimizer: `ZeroOptimizer`.

    Args:
        module: on its device, in float32, the same on all ranks.
        config: how it is to be spread.
        device: of this rank.
    """

    engine: Any

    def __init__(self, module: nn.Module, config: ZeroConfig, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.device = device
        self._is_apart = False
        self._surroundings = ExitStack()
        self._inner_passes = 0  # since the last step, those that were not a step's last
        self.__dict__["engine"] = None  # past nn.Module, which would take it for a part that has this one's parameters
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"DeepSpeed: {name} is in {str(parameter.dtype).removeprefix('torch.')}; give it a model in "
                    "float32, which with bf16 computes in bfloat16"
                )
            if parameter.ndim == 0:
                raise UserError(f"DeepSpeed: {name} is a single number; make it a tensor of shape (1,)")
        for name, part in module.named_modules() if config.bf16 else ():
            if isinstance(part, _NormBase) and part.running_mean is not None:
                raise UserError(
                    f"DeepSpeed: {name} ({type(part).__name__}) has running statistics, which DeepSpeed leaves in "
                    "float32, and torch cannot have beside parameters in bfloat16: use fp32, or another normalisation"
                )

    @property
    def spreads_parameters(self) -> bool:
        """Whether a forward pass gathers them from all ranks, so that all have to make as many."""
        return self.engine is not None and self.config.stage == 3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own. Collective, where parameters are spread."""
        if self.engine is None and not self._is_apart:
            raise UserError("DeepSpeed: the model needs its optimizer: optimizer = rt.wrap_optimizer(optimizer, model)")
        # Its formats are those that its parameters are in, whatever there is around it.
        with torch.autocast(self.device.type, enabled=False):
            is_for_training = torch.is_grad_enabled() and not self._is_apart
            return (self.engine if is_for_training else self.module)(*args, **kwargs)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around passes whose gradients are not those of a step, and do not go to the engine."""
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    @contextmanager
    def unsynced(self) -> Iterator[None]:
        """The context for passes that are not a step's last."""
        self._is_last_pass(False)
        before = self._passes()
        try:
            yield
        finally:
            self._is_last_pass(True)
            self._inner_passes += self._passes() - before

    def begin(self, optimizer: Optimizer) -> None:
        """Have the engine, over an optimizer of the module's parameters, which it changes. Collective."""
        from torch.distributed.device_mesh import init_device_mesh

        if self.engine is not None:
            raise UserError("DeepSpeed: the model has an optimizer already; one may have several groups")
        deepspeed = _imported(self.device)
        number = environment().get("LOCAL_RANK", "0") if self.device.index is None else str(self.device.index)
        self._surroundings.enter_context(replaced({"LOCAL_RANK": number}))  # it looks there again and again
        with contextlib.redirect_stdout(sys.stderr):  # it prints here and there
            engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=self.config.for_engine(), dist_init_required=False
            )
        if self.config.bf16:
            cast_around(self.module)
        self.__dict__["engine"] = engine
        self._mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        self._is_last_pass(True)

    def step(self) -> None:
        """Clip, step the optimizer, and forget the gradients. Collective.

        Raises:
            UserError: several passes were taken for the step's last one, of which DeepSpeed has not the sum.
        """
        last, self._inner_passes = self._passes() - self._inner_passes, 0
        if last > 1 and not self.spreads_parameters:
            raise UserError(
                f"DeepSpeed: {last} backward passes in this step, each as if it were the step's last. With a "
                "micro_batch_size for the loader, put each batch's forward and backward pass inside `with "
                "run.accumulate():`, one backward pass in each"
            )
        self.engine.step()
        if self.spreads_parameters:
            # DeepSpeed leaves them there, for the next step to use of parameters that have no gradient in it.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def release(self) -> None:
        """Let go of the engine, and of the groups of ranks that DeepSpeed knows: the next runtime may have others."""
        self._surroundings.close()
        if self.engine is None:
            return
        self.engine.destroy()
        self.__dict__["engine"] = None
        from deepspeed.utils import groups

        groups._release_process_group_references(None)

    # -- gradients, between a step's last backward pass and the step -------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        """What this rank has of each gradient, the mean over the ranks, by name; the same names on all of them."""
        return {name: self._gradient(parameter) for name, parameter in self._trained().items()}

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all of them."""
        api = _api()
        for parameter in self._trained().values():
            gradient = self._gradient(parameter)
            if self.spreads_parameters:  # what there is to read may be a copy
                api.safe_set_local_grad(parameter, gradient * factor.to(gradient.dtype))
            else:
                gradient.mul_(factor.to(gradient.dtype))

    def clip(self, max_norm: float) -> None:
        """Have steps scale the gradient so that its norm is this at most, whatever the config says."""
        self.engine.optimizer.clip_grad = max_norm

    def _gradient(self, parameter: Tensor) -> Tensor:
        if self.spreads_parameters:
            found: Tensor = _api().safe_get_local_grad(parameter)
            return found
        here = parameter._hp_mapping  # type: ignore[attr-defined]  # None: others have all of it
        if here is None:
            return torch.empty(0, device=self.device)
        part: Tensor = here.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return part

    # -- the state, whole --------------------------------------------------------------------------------------------

    def whole_state(self) -> dict[str, Tensor]:
        """As the module's state_dict, in float32, each parameter cut along its rows. Collective."""
        found: dict[int, Tensor] = {}  # one that has several names is one tensor
        state = {**self.module.state_dict()}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in found:
                found[id(parameter)] = self._rows(self._whole(parameter))
            state[name] = found[id(parameter)]
        return state

    def shapes(self) -> dict[str, Tensor]:
        """As the module's state_dict, of tensors without values."""
        whole = {
            name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
        }
        return {**self.module.state_dict(), **whole}

    def load_whole_state(self, saved: Mapping[str, Any]) -> None:
        """Take up what `whole_state` gave, or the state_dict of a module that is not spread. Collective."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                self._set(parameter, _read(saved[name]).to(self.device, torch.float32))
        names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        others = {name: value for name, value in saved.items() if name not in names}
        self.module.load_state_dict(others, strict=False)
        if not self.spreads_parameters:
            self.engine.optimizer.update_lp_params()

    def whole_optimizer_state(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of each parameter of these groups, in their order, what the optimizer keeps for it. Collective."""
        found: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            first = self._flat(index)[0]
            kept = self._base.state.get(first, {})
            for parameter in group["params"]:
                values: dict[str, Any] = {}
                for key, value in kept.items():
                    if isinstance(value, Tensor) and value.shape == first.shape:
                        values[key] = self._rows(self._whole_kept(parameter, value, key))
                    elif isinstance(value, Tensor) and value.numel() > 1:
                        raise StateError(f"DeepSpeed: {key!r} of the optimizer's state belongs to no parameter")
                    else:
                        values[key] = copy.deepcopy(value)
                found.append(values)
        return found

    def load_whole_optimizer_state(self, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
        """Take up what `whole_optimizer_state` gave. Collective."""
        states = iter(saved)
        for index, group in enumerate(groups):
            own = [next(states) for _ in group["params"]]
            shapes = [tuple(getattr(each, "ds_shape", each.shape)) for each in group["params"]]
            # A parameter that was never used may have nothing.
            pattern, shape = next((pair for pair in zip(own, shapes, strict=True) if pair[0]), ({}, ()))
            for flat in self._flat(index):
                self._base.state[flat] = {
                    key: torch.zeros_like(flat, requires_grad=False)
                    if _is_shaped(value, shape)
                    else copy.deepcopy(value)
                    for key, value in pattern.items()
                }
            for parameter, shape, values in zip(group["params"], shapes, own, strict=True):
                for key, value in values.items():
                    if _is_shaped(value, shape):
                        self._set_kept(parameter, _read(value).to(self.device), index, key)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            found: Tensor = _api().safe_get_full_fp32_param(parameter)
            return found
        with self._gathered(parameter):
            return parameter.detach().float().clone()

    def _set(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.spreads_parameters or not parameter.requires_grad:
            with self._gathered(parameter, changes=True):
                parameter.copy_(value)
        if not parameter.requires_grad:
            return
        api = _api()
        if self.spreads_parameters:
            api.safe_set_local_fp32_param(parameter, _own_part(value, api.safe_get_local_fp32_param(parameter)))
        else:
            api.safe_set_full_fp32_param(parameter, value)

    def _whole_kept(self, parameter: nn.Parameter, flat: Tensor, key: str) -> Tensor:
        """What the optimizer keeps for a parameter under a key. Collective."""
        if self.spreads_parameters:
            found: Tensor = _api().safe_get_full_optimizer_state(parameter, key)
            return found
        # Of several groups, DeepSpeed's own function finds only what the first one has.
        whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=flat.device)
        here = parameter._hp_mapping  # type: ignore[attr-defined]
        if here is not None:
            _slice(whole, here.lp_fragment_address).copy_(_slice(flat, here.hp_fragment_address))
        dist.all_reduce(whole)
        return whole.view(parameter.shape)

    def _set_kept(self, parameter: nn.Parameter, value: Tensor, index: int, key: str) -> None:
        """The same of a parameter in the group of this number."""
        if self.spreads_parameters:
            api = _api()
            part = _own_part(value, api.safe_get_local_optimizer_state(parameter, key))
            api.safe_set_local_optimizer_state(parameter, part, key)
        elif (here := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            flat = self._base.state[self._flat(index)[0]][key]
            _slice(flat, here.hp_fragment_address).copy_(_slice(value.flatten(), here.lp_fragment_address))

    @contextmanager
    def _gathered(self, parameter: nn.Parameter, changes: bool = False) -> Iterator[None]:
        if not self.spreads_parameters:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changes else None):
            yield

    def _rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor of which all ranks have all, as DTensor."""
        from torch.distributed.tensor import DTensor, Shard

        ((start, stop), *_) = Layout(tuple(whole.shape), (dist.get_world_size(),), (0,)).region(dist.get_rank())
        rows = whole[start:stop].clone()  # without what the others have
        made: Tensor = DTensor.from_local(
            rows, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return made

    def _flat(self, index: int) -> list[Tensor]:
        """What the optimizer in the engine has instead of the parameters of one group."""
        if not self.spreads_parameters:
            return list(self._base.param_groups[index]["params"])
        spread = self.engine.optimizer
        return [
            flat
            for number, flat in enumerate(spread.fp32_partitioned_groups_flat)
            if spread.sub_group_to_group_id[number] == index
        ]

    @property
    def _base(self) -> Optimizer:
        found: Optimizer = self.engine.optimizer.optimizer
        return found

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}

    def _passes(self) -> int:
        """Backward passes since the last step."""
        return 0 if self.engine is None else self.engine.optimizer.micro_step_id + 1

    def _is_last_pass(self, is_last: bool) -> None:
        if self.engine is not None:  # where it is not there yet, the forward pass says so
            self.engine.set_gradient_accumulation_boundary(is_last)


class ZeroOptimizer(Optimizer):
    """What steps a model that DeepSpeed has. Its groups are over the parameters; those of the engine over flat parts.

    Collective to make, to step, and to ask for its state.

    Args:
        optimizer: over the model's parameters; the engine takes it over.
        model: that model.
    """

    def __init__(self, optimizer: Optimizer, model: Zero) -> None:
        _check_is_known(optimizer, model.config)
        # A copy of the groups: the engine puts its flat parts into those of the optimizer itself.
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        trained = {id(each) for each in model.module.parameters() if each.requires_grad}
        if {id(each) for group in self.param_groups for each in group["params"]} != trained:
            raise UserError("DeepSpeed: the optimizer has other parameters than those of the model that are trained")
        self.model = model
        self._inside = optimizer
        model.begin(optimizer)

    @property
    def has_stepped(self) -> bool:
        """Whether the last `step` was taken: DeepSpeed leaves one out if the gradient's norm is not finite."""
        stepped: bool = self.model.engine.was_step_applied()
        return stepped

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, step, and have the parameters on all ranks; the gradients are none then. Collective."""
        if closure is not None:
            raise UserError("DeepSpeed: an optimizer's step takes no closure")
        for own, inside in zip(self.param_groups, self.model._base.param_groups, strict=True):
            inside.update({key: value for key, value in own.items() if key != "params"})
        self.model.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients are gone with the step."""

    def state_dict(self) -> dict[str, Any]:
        """As that of the same optimizer over parameters that are not spread. Collective."""
        state = super().state_dict()
        whole = self.model.whole_optimizer_state(self.param_groups)
        return {**state, "state": {number: values for number, values in enumerate(whole) if values}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, also of an optimizer over parameters that are not spread. Collective."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({key: value for key, value in saved.items() if key != "params"})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        states = [state_dict["state"].get(number, {}) for number in numbers]
        self.model.load_whole_optimizer_state(self.param_groups, states)


def alone(module: nn.Module, config: ZeroConfig, device: torch.device) -> Zero:
    """A module that is not spread, and computes as it does in the engine."""
    model = Zero(module, config, device)
    if config.bf16:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
        cast_around(module)
    model._is_apart = True
    return model


def _check_is_known(optimizer: Optimizer, config: ZeroConfig) -> None:
    kind = type(optimizer)
    is_known = kind.__module__.startswith("torch.optim") and kind.__name__ in OPTIMIZERS
    if not is_known and not config.takes_any_optimizer:
        raise UserError(f"DeepSpeed: {unknown_optimizer(kind.__name__)}")


def _slice(flat: Tensor, where: Any) -> Tensor:
    """What is at one of DeepSpeed's addresses."""
    return flat[where.start : where.start + where.numel]


def _own_part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a parameter, of which all ranks have equally many numbers: the last ones may be no one's."""
    part = torch.zeros_like(like, dtype=value.dtype)
    own = value.flatten()[dist.get_rank() * like.numel() :][: like.numel()]
    part[: own.numel()] = own
    return part


def _read(saved: Tensor | Sharded) -> Tensor:
    return saved.whole() if isinstance(saved, Sharded) else saved


def _is_shaped(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, (Tensor, Sharded)) and tuple(value.shape) == shape


def _api() -> Any:
    return importlib.import_module("deepspeed.utils")


def _imported(device: torch.device) -> Any:
    """DeepSpeed, on this kind of device, and on the process group that there is. Collective the first time."""
    # Where its log goes from now on: standard output is the program's.
    with contextlib.redirect_stdout(sys.stderr), replaced({"DS_ACCELERATOR": device.type}):
        deepspeed = importlib.import_module("deepspeed")
    if device.type == "cpu":
        # Sums of its own over shared memory: compiled for a minute when first used, and waiting without a limit.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls torch by names that are to change, and torch says so in each step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
