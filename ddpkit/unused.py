"""Parameters without gradient: DDP would wait for them, and says so a step later, by numbers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpkit.errors import UserError

_TORCHS_WORDS = "Expected to have finished reduction in the prior iteration"
_NUMBERS = re.compile(r"Parameter indices which did not receive grad for rank (\d+): ([\d ]+)")
_MOST_NAMES = 8


class Replicated(DistributedDataParallel):
    """torch's DDP, which names the parameters that it waits for in vain."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The forward pass of the module inside. Collective where it has buffers."""
        try:
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except RuntimeError as error:
            raise _explained(self, error) from error


def check_all_reduced(model: nn.Module) -> None:
    """After the backward pass of a step: each parameter must have had its gradient, or ranks would part silently.

    Raises:
        UserError: some had none; it names them.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    try:
        model._check_reducer_finalized()  # type: ignore[no-untyped-call]  # torch's; the next forward pass would ask
    except RuntimeError as error:
        raise _explained(model, error) from error


def _explained(model: DistributedDataParallel, error: RuntimeError) -> Exception:
    """What to raise for an error of DDP's: itself, if it is about something else."""
    if not (str(error).startswith(_TORCHS_WORDS) and (found := _NUMBERS.search(str(error)))):
        return error
    # DDP numbers those that take a gradient.
    names = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    without = [names[int(number)] for number in found[2].split()]
    more = f" and {len(without) - _MOST_NAMES} more" if len(without) > _MOST_NAMES else ""
    return UserError(
        f"model: {', '.join(without[:_MOST_NAMES])}{more} received no gradient in a step on rank {found[1]}: forward "
        "pass and loss do not use them, and DDP waits for all. Use them; or list them in model.freeze, if they are "
        "never to be trained; or set model.ddp.find_unused_parameters, if only some steps do without them (in a "
        "script: rt.wrap(..., find_unused_parameters=True))"
    )
