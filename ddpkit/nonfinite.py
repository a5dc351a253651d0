"""A loss or a gradient that is infinite or not a number: seen by all ranks at once, and traced to where it came from.

Whether a step can be taken needs no agreement: DDP has averaged the gradients, so one rank's NaN is in everybody's; and
a loss that is not finite starts the backward pass with NaN, so that it gets there too. Only when that has happened do
the ranks speak to each other: each runs its passes again, with hooks on all modules, and says what it has found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from ddpkit.agree import Ranks
from ddpkit.checkpoint.shards import is_spread
from ddpkit.generators import HostGenerators
from ddpkit.model import is_unit, reshard, unsynced, unwrap
from ddpkit.optimizing import are_finite
from ddpkit.sampler import Pass
from ddpkit.zero import Zero

_MOST_NAMES = 8


@dataclass(frozen=True)
class Fault:
    """Why an optimizer step was not taken; the same on all ranks.

    Attributes:
        text: what was not finite, on which rank, and where it came from.
        is_overflow: all losses were finite, and the gradients too large for fp16 with this loss scale. That is how it
            finds its scale, and no error.
    """

    text: str
    is_overflow: bool = False


@dataclass(frozen=True)
class Finding:
    """What one rank has found in its first pass that gives something that is not finite.

    Attributes:
        place: which pass it was.
        loss: its value, as text.
        source: where in the forward pass it appeared first; None if everything there was finite.
        order: how many modules had been entered before.
        batch: the tensors of the batch that are not finite themselves.
        parameters: those with a value that is not finite.
        gradients: the parameters whose gradients are not finite.
    """

    place: str
    loss: str
    source: str | None
    order: int
    batch: list[str]
    parameters: list[str]
    gradients: list[str]


class Watch:
    """Looks after the steps of a model on this rank.

    Args:
        ranks: partners in an agreement on what was found.
        model: as `wrap` gave it.
        device: of this rank.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, device: torch.device) -> None:
        self._ranks = ranks
        self._model = model
        self._module = unwrap(model)
        self._buffers = _Buffers(self._module)
        self._generators = _Generators(device)
        self._passes: list[_Seen] = []

    def begin(self, part: Pass, batch: Any) -> None:
        """A forward pass over ``batch`` comes next."""
        if not self._passes:
            self._buffers.keep()
        self._passes.append(_Seen(part, batch, self._generators.state()))

    def start_of_backward(self, loss: Tensor, weight: Any) -> Tensor | None:
        """The gradient that the backward pass of the last one starts with: one, or NaN if the loss is not finite.

        Args:
            loss: as the backward pass is to start from.
            weight: what the pass counts for; the loss of one that counts nothing may be anything.
        """
        if isinstance(weight, float) and weight == 0.0:
            return None
        loss = loss.detach()
        if not isinstance(weight, float):
            loss = torch.where(torch.as_tensor(weight, device=loss.device) > 0, loss, 0.0).to(loss.dtype)
        self._passes[-1].loss = loss
        return loss * 0 + 1  # no operation that waits for a GPU

    def end(self) -> None:
        """The step was taken."""
        self._passes.clear()
        self._buffers.note_changes()

    def take_back(self) -> None:
        """The step was not taken, for a reason that is known: have buffers and generators as before it."""
        passes, self._passes = self._passes, []
        self._back_to(passes[0])

    def explain(
        self, function: Callable[[nn.Module, Any], Any], gradients: Sequence[str], loss_scale: float | None
    ) -> Fault:
        """The step cannot be taken: have buffers and generators as before it, and find out why. Collective.

        Args:
            function: ``(model, batch) -> loss``, with everything that belongs to a forward pass.
            gradients: the parameters whose averaged gradients are not finite.
            loss_scale: fp16's; None for other formats.
        """
        passes, self._passes = self._passes, []
        self._back_to(passes[0])
        if loss_scale is not None and loss_scale > 1:  # below that, it is no matter of the scale
            are_bad = [each.loss is not None and not bool(torch.isfinite(each.loss)) for each in passes]
            if not any(self._ranks.exchange("losses that are not finite", any(are_bad))):
                return overflow(loss_scale)
        finding = self._look(function, passes)
        self._back_to(passes[0])
        told = self._ranks.exchange("what is not finite", None if finding is None else asdict(finding))
        findings = {rank: Finding(**tree) for rank, tree in enumerate(told) if tree is not None}
        return Fault(describe(findings, gradients))

    def _back_to(self, first: _Seen) -> None:
        """As it all was before the step, whose first pass this was."""
        self._buffers.restore()
        self._generators.restore(first.generators)

    def _look(self, function: Callable[[nn.Module, Any], Any], passes: Sequence[_Seen]) -> Finding | None:
        """Run the passes again as they were. All of them, on every rank: a layer may exchange its statistics."""
        found = None
        for number, seen in enumerate(passes, 1):
            self._generators.restore(seen.generators)
            each = self._run_again(function, seen, f"pass {number} of {len(passes)}")
            found = found or (each if seen.part.size else None)
        return found

    def _run_again(self, function: Callable[[nn.Module, Any], Any], seen: _Seen, name: str) -> Finding | None:
        with (
            self._model.apart() if isinstance(self._model, Zero) else unsynced(self._model),
            _parameters_in_use(self._module) as named,
            first_source(self._module) as source,
            torch.compiler.set_stance("force_eager"),
        ):
            loss = function(self._model, seen.batch)
            # Not by backward(), which would have DDP and FSDP2 take the gradients for those of a step.
            given = torch.autograd.grad(loss, list(named.values()), allow_unused=True) if named else []
        reshard(self._model)
        bad = [name for name, value in zip(named, given, strict=True) if value is not None and not are_finite([value])]
        is_finite = bool(torch.isfinite(loss))
        if is_finite and not bad:
            return None
        part = seen.part
        return Finding(
            place=f"{name}, samples {part.start} to {part.stop - 1} of the epoch",
            loss=str(loss.item()),
            source=source.text or (None if is_finite else "the loss itself, of outputs that are finite"),
            order=source.order,
            batch=[
                keystr(path) or "the batch" for path, leaf in tree_flatten_with_path(seen.batch)[0] if _is_bad(leaf)
            ],
            parameters=[name for name, value in self._module.named_parameters() if _is_bad(value)],
            gradients=bad,
        )


def overflow(loss_scale: float) -> Fault:
    """Nothing but a loss scale that is too large, and smaller in the next step."""
    return Fault(f"the gradients are too large for fp16 with a loss scale of {loss_scale:g}", is_overflow=True)


def describe(findings: Mapping[int, Finding], gradients: Sequence[str]) -> str:
    """What all ranks have found, in words.

    Args:
        findings: by rank; layers that exchange statistics spread a NaN, forwards and backwards, so it came from the
            rank that has it first in the order of the forward pass, or else in the gradients of most parameters.
        gradients: the parameters whose averaged gradients are not finite.
    """
    if not findings:
        return (
            f"the averaged gradients of {_some(gradients)} are not finite, but every rank's passes, run again, are: it "
            "comes of their sum, or of something that is not the same twice"
        )
    rank = min(findings, key=lambda rank: (*_distance(findings[rank]), rank))
    found = findings[rank]
    others = [other for other in findings if other != rank]
    where = f"on rank {rank}" + (f" (and then on {', '.join(map(str, others))})" if others else "")
    lines = [f"the loss is {found.loss} {where}, in {found.place}"]
    if found.source is not None:
        lines.append(f"it appeared first in {found.source}")
    else:
        lines[0] += ": it is finite, and so is all of the forward pass, but gradients are not"
    if found.batch:
        lines.append(f"the batch has values that are not finite: {_some(found.batch)}")
    if found.parameters:
        lines.append(f"these parameters have values that are not finite: {_some(found.parameters)}")
    lines.append(f"gradients that are not finite: {_some(found.gradients) or 'none of that rank alone'}")
    return "; ".join(lines)


def _distance(found: Finding) -> tuple[bool, bool, int, int]:
    """How far a rank's finding is from where it all began; the least is the closest."""
    return not found.batch, found.source is None, found.order, -len(found.gradients)


class Source:
    """Where a value that is not finite appeared first. `first_source` fills it in."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.order = 0
        self._around: list[str] = []

    def enter(self, name: str, inputs: Any) -> None:
        """A module is called."""
        if self.text is None:
            if _has_nan(inputs):
                self.text = (
                    f"the forward pass of {self._around[-1]}, before its part {name}"
                    if self._around
                    else "what the model was called with"
                )
            self.order += 1
        self._around.append(name)

    def leave(self, name: str, outputs: Any) -> None:
        """It has returned."""
        self._around.pop()
        if self.text is None and any(_is_bad(leaf) for leaf in tree_flatten(outputs)[0]):
            self.text = f"the forward pass of {name}"


@contextmanager
def first_source(module: nn.Module) -> Iterator[Source]:
    """Look into every module's forward pass inside the block."""
    source = Source()
    handles = []
    for path, part in module.named_modules():
        name = f"{path} ({type(part).__name__})" if path else f"the model ({type(part).__name__})"

        def enter(part: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            source.enter(name, (args, kwargs))

        def leave(part: nn.Module, args: Any, outputs: Any, name: str = name) -> None:
            source.leave(name, outputs)

        handles += [part.register_forward_pre_hook(enter, with_kwargs=True), part.register_forward_hook(leave)]
    try:
        yield source
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _parameters_in_use(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What gradients can be asked for, by name; FSDP2's come in as forward passes in the block gather them."""
    found: dict[str, Tensor] = {}

    def note(path: str, part: nn.Module) -> None:
        for name, value in part.named_parameters(prefix=path):
            if value.requires_grad and not is_spread(value):
                found[name] = value

    note("", module)
    units = [(path, part) for path, part in module.named_modules() if is_unit(part)]
    handles = [part.register_forward_pre_hook(partial(_noted, note, path)) for path, part in units]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _noted(note: Callable[[str, nn.Module], None], path: str, part: nn.Module, args: Any) -> None:
    note(path, part)


@dataclass
class _Seen:
    """A pass of the step under way, for as long as it may have to be run again."""

    part: Pass
    batch: Any
    generators: tuple[Any, Tensor | None]
    loss: Tensor | None = None


class _Buffers:
    """A module's buffers (running statistics) as they were before a step.

    Most change in every step, or never do (masks, tables). Of those a copy is made once, and they are looked at for a
    change that torch has counted since.
    """

    def __init__(self, module: nn.Module) -> None:
        # Batch normalisation changes its statistics without being counted, and may begin to do so at any time.
        self._kept = [
            _Kept(part._buffers, name, moves=isinstance(part, _NormBase))
            for part in module.modules()
            for name in part._buffers
        ]
        self._knows_what_moves = False

    def keep(self) -> None:
        """Copy them."""
        for kept in self._kept:
            kept.look()
        copies = [kept.copy for kept in self._kept if kept.moves and kept.copy is not None]
        if copies:
            torch._foreach_copy_(copies, [kept.buffer for kept in self._kept if kept.moves and kept.buffer is not None])

    def restore(self) -> None:
        """Have them as they were."""
        with torch.no_grad():
            for kept in self._kept:
                kept.restore()

    def note_changes(self) -> None:
        """The step was taken. By values, once: some kernels change what they are given without being counted."""
        if not self._knows_what_moves:
            self._knows_what_moves = True
            for kept in self._kept:
                kept.moves = kept.moves or kept.differs()


class _Kept:
    """A buffer and a copy of it.

    Args:
        owner: the buffers of its module.
        name: of this one.
        moves: whether it may change in each step without torch's count telling.
    """

    __slots__ = ("_name", "_owner", "_version", "buffer", "copy", "moves")

    def __init__(self, owner: dict[str, Tensor | None], name: str, moves: bool) -> None:
        self._owner = owner
        self._name = name
        self.moves = moves
        self.buffer: Tensor | None = None
        self.copy: Tensor | None = None
        self._version = 0

    def look(self) -> None:
        """Have a new copy if the buffer is another tensor than before, or has been changed."""
        buffer = self._owner.get(self._name)
        if buffer is self.buffer and (buffer is None or self.moves or buffer._version == self._version):
            return
        self.buffer, self.copy = buffer, None
        if buffer is not None:
            self.copy = buffer.detach().clone()
            self._version = buffer._version

    def differs(self) -> bool:
        """Whether its value is not that of the copy."""
        return self.buffer is not None and self.copy is not None and not torch.equal(self.buffer, self.copy)

    def restore(self) -> None:
        """Have the module have the tensor that it had, with the value that it had."""
        buffer, self._owner[self._name] = self.buffer, self.buffer
        # A constant may be a view that cannot be written to.
        if buffer is not None and self.copy is not None and (self.moves or buffer._version != self._version):
            buffer.copy_(self.copy)
            self._version = buffer._version


class _Generators:
    """What a pass draws from: Python's, NumPy's and torch's generators, the device's too."""

    def __init__(self, device: torch.device) -> None:
        self._host = HostGenerators()
        self._device = device

    def state(self) -> tuple[Any, Tensor | None]:
        """Where they stand; it takes a microsecond or two."""
        return self._host.state(), torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def restore(self, state: tuple[Any, Tensor | None]) -> None:
        """Put them back there."""
        host, device = state
        self._host.restore(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self._device)


def _is_bad(leaf: Any) -> bool:
    leaf = leaf.to_local() if is_spread(leaf) else leaf  # this rank's part: nobody else is asking now
    is_real = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return is_real and not bool(torch.isfinite(leaf.detach()).all())


def _has_nan(inputs: Any) -> bool:
    """Masks of attention are made of infinities, so those say nothing here."""
    return any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(torch.isnan(leaf.detach()).any())
        for leaf in tree_flatten(inputs)[0]
    )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
