"""What a model is made of: its parts with their parameters, and the graph of what it computes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddpkit.callbacks import Callback
from ddpkit.model import unwrap

if TYPE_CHECKING:
    from ddpkit.run import Run

log = logging.getLogger("ddpkit")


@dataclass(frozen=True)
class Part:
    """A module of a model, with all that is in it.

    Attributes:
        name: in the model; "" is the model.
        kind: its class.
        parameters: numbers in it.
        trainable: those of them that are trained.
        bytes: of its parameters and buffers.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A model and its parts; what several parts share counts in each, but once in the model.

    Attributes:
        model: as a whole.
        parts: what it is made of, down to the depth that was asked for.
    """

    model: Part
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        rows = [("module", "class", "parameters", "trainable", "size")]
        rows += [_row(part) for part in (*self.parts, self.model)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


class ModelSummary(Callback):
    """Writes a run's model down when it starts, on rank zero: ``model.txt``, and ``model.dot`` after its first pass.

    Args:
        depth: down to where its parts are listed.
        graph: write its `graph`, too.
        model: its name among the run's objects.
    """

    def __init__(self, depth: int = 2, *, graph: bool = False, model: str = "model") -> None:
        self._depth = depth
        self._graph = graph
        self._model = model

    def on_start(self, run: Run) -> None:
        """Write."""
        if not run.rt.is_main:
            return
        model = run.objects[self._model]
        text = str(summarize(model, self._depth))
        log.info("%s", text)
        _write(run.run_dir / "model.txt", f"{text}\n")
        if self._graph:
            write_graph_of_first_pass(model, run.run_dir / "model.dot")


def summarize(model: nn.Module, depth: int = 2) -> Summary:
    """Count a model's parameters.

    Args:
        model: wrapped or not.
        depth: down to where its parts are listed; 0 lists none.
    """
    module = unwrap(model)
    inner = [(name, part) for name, part in module.named_modules() if name and name.count(".") < depth]
    return Summary(_part("", module), tuple(_part(name, part) for name, part in inner))


def graph(output: Any, model: nn.Module | None = None) -> str:
    """What led to ``output`` (a tensor, or tensors in any structure), as a graph in the DOT language.

    Args:
        output: of a forward pass in which gradients were recorded.
        model: whose parameters have their names in it.
    """
    named = () if model is None else unwrap(model).named_parameters()
    names: dict[Tensor, str] = {parameter: name for name, parameter in named}
    lines = ["digraph {", "  node [shape=box]"]
    numbers: dict[Any, int] = {}
    waiting = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in numbers:
            continue
        numbers[node] = len(numbers)
        waiting += [before for before, _ in node.next_functions if before is not None]
    for node, number in numbers.items():
        lines.append(f'  n{number} [label="{_label(node, names)}"]')
        lines += [f"  n{numbers[before]} -> n{number}" for before, _ in node.next_functions if before is not None]
    return "\n".join([*lines, "}"]) + "\n"


def write_graph_of_first_pass(model: nn.Module, path: Path) -> None:
    """Have the model's next forward pass leave its `graph` in a file."""
    module = unwrap(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def write(_: nn.Module, __: Any, output: Any) -> None:
        handle.remove()
        _write(path, graph(output, module))

    handle = module.register_forward_hook(write)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:  # of a full disk, say, which is no reason to end a run
        log.warning("%s: cannot be written: %s", path, error.strerror)


def _part(name: str, module: nn.Module) -> Part:
    parameters = list(module.parameters())
    return Part(
        name,
        type(module).__name__,
        sum(_count(each) for each in parameters),
        sum(_count(each) for each in parameters if each.requires_grad),
        sum(_count(each) * each.element_size() for each in (*parameters, *module.buffers())),
    )


def _count(tensor: Tensor) -> int:
    """Its numbers: of all of it, where DeepSpeed has spread it."""
    count: int = getattr(tensor, "ds_numel", tensor.numel())
    return count


def _row(part: Part) -> tuple[str, str, str, str, str]:
    return part.name or "all", part.kind, f"{part.parameters:,}", f"{part.trainable:,}", _size(part.bytes)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _label(node: Any, names: Mapping[Tensor, str]) -> str:
    leaf = getattr(node, "variable", None)  # of a node that collects a parameter's gradient
    if leaf is None:
        return str(node.name())
    return f"{names.get(leaf, 'leaf')} {tuple(leaf.shape)}"
