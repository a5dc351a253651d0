"""What named layers inside a model give, while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ddpkit.callbacks import Callback
from ddpkit.errors import UserError, nearest
from ddpkit.model import unwrap

if TYPE_CHECKING:
    from ddpkit.run import Run


@contextmanager
def capture(model: nn.Module, layers: Sequence[str], *, detach: bool = False) -> Iterator[dict[str, Any]]:
    """Keep what the named layers give, for as long as the context lasts.

    Args:
        model: wrapped or not.
        layers: names of modules as ``named_modules`` has them, or patterns as in a shell (``blocks.*.mlp``).
        detach: keep values alone, and not what gradients need.

    Yields:
        The newest output of each layer that has run, by name.

    Raises:
        UserError: a name or a pattern fits no module.
    """
    outputs: dict[str, Any] = {}
    found = _named(unwrap(model), layers)

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = tree_map(_detached, output) if detach else output

        return hook

    with ExitStack() as stack:
        for name, module in found.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield outputs


class LayerOutputs(Callback):
    """Records the mean and the standard deviation of what named layers give, with each line of metrics. For one run.

    Args:
        layers: as for `capture`.
        model: the name of the model among the run's objects.
    """

    def __init__(self, layers: Sequence[str], model: str = "model") -> None:
        self._layers = layers
        self._model = model
        self._stack = ExitStack()
        self._outputs: dict[str, Any] | None = None

    def __enter__(self) -> LayerOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_start(self, run: Run) -> None:
        """Look at the first step, if it is recorded."""
        _named(unwrap(run.objects[self._model]), self._layers)
        self._look_if_due(run)

    def on_step_end(self, run: Run) -> None:
        """Tell of a step that is recorded; nothing is kept of the others."""
        if self._outputs is not None:
            for name, output in self._outputs.items():
                values = torch.cat([leaf.flatten().float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
                run.note(**{f"{name}.mean": values.mean(), f"{name}.std": values.std(correction=0)})
            self._outputs = None
            self._stack.close()
        self._look_if_due(run)

    def _look_if_due(self, run: Run) -> None:
        if run.records_next_step:
            self._outputs = self._stack.enter_context(capture(run.objects[self._model], self._layers, detach=True))


def _named(module: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    names = dict(module.named_modules())
    found = {}
    for pattern in layers:
        fitting = [name for name in names if name and fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(f"capture: the model has no layer {pattern!r}{nearest(pattern, list(names))}")
        found.update({name: names[name] for name in fitting})
    return found


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
