"""A moving average of the weights, which is often better than the weights: kept, evaluated and exported beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpkit.model import unwrap

NAME = "ema"
"""Under which a run keeps it."""

_INSIDE = "module."  # torch's prefix of what is averaged


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An average of a model's parameters that moves by ``1 - decay`` of the way with each ``update_parameters(model)``.

    Parameters that are in half precision are averaged in float32: such small steps would be lost in theirs. Buffers
    (running statistics) are the model's own. The first update takes the parameters as they are.

    Args:
        model: wrapped or not; ``averaged(...).module`` is a copy of the module inside.
        decay: above 0 and below 1.
    """
    module = unwrap(model)
    if any(each.dtype in (torch.bfloat16, torch.float16) for each in module.parameters()):
        average = AveragedModel(module, avg_fn=_Towards(decay)).float()
    else:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # torch's
    return average.requires_grad_(False)


def weights_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of the averaged module, out of that of its `AveragedModel`."""
    return {name.removeprefix(_INSIDE): value for name, value in state.items() if name.startswith(_INSIDE)}


class _Towards:
    """A class since a copy or a pickle of the average needs one."""

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def __call__(self, average: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
        return torch.lerp(average, value.to(average.dtype), 1 - self._decay)
