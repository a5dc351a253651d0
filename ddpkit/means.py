"""The means over the ranks of what their steps report, by one small all-reduce.

Not by an exchange over the store: that goes through rank zero, takes a millisecond on two ranks and ten thousand
questions on ten thousand. But an all-reduce needs the same names on every rank, and would hang or add up apples and
pears if one rank reported others. So the names are agreed on over the store, once; each all-reduce tells along with the
values whether they still hold for everybody, and where they do not, they are agreed on anew.

Nobody waits for it: it is begun at one step and looked at when the next one is done. A rank that waited would wait for
the slowest one (1 ms, beside a step of 4 ms on two cores).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddpkit.agree import Ranks


@dataclass(frozen=True)
class _Sum:
    """An all-reduce under way, and what it was made of."""

    own: Mapping[str, float]
    weight: float
    asks: bool
    flat: torch.Tensor
    work: Any


class RankMeans:
    """Weighted means of named values, of this rank and all others.

    What comes out depends on the values of one call alone: not on what was reported before it, so a run that was
    resumed has the same bits as one that was not.

    Args:
        ranks: the others.
        device: this rank's, where its process group wants tensors.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._names: list[str] = []
        self._sum: _Sum | None = None

    def begin(self, values: Mapping[str, float], weight: float, asks: bool) -> None:
        """Set out for the means, and whether any rank ``asks`` (for a save, say). Collective; waits for nobody.

        Args:
            values: this rank's, by name; the mean of one that not all ranks report is of those which do.
            weight: what they count for; with 0 they are not looked at.
            asks: a question that travels along.
        """
        own = values if weight else {}  # the values of a rank that has nothing to report are NaN
        self._sum = self._summing(own, weight, asks)

    def end(self) -> tuple[dict[str, float], bool]:
        """What came of it: the means, and whether any rank asked, the same on all ranks. Collective."""
        assert self._sum is not None  # begun
        own, weight, asks = self._sum.own, self._sum.weight, self._sum.asks
        differs, asked, sums = self._summed()
        if differs:
            told = self._ranks.exchange("names of what is recorded", list(own))
            self._names = sorted({name for names in told for name in names})
            self._sum = self._summing(own, weight, asks)
            _, asked, sums = self._summed()
        means = {name: total / counted for name, (total, counted) in sums.items() if counted}
        return {name: means[name] for name in (*own, *means) if name in means}, asked

    def close(self) -> None:
        """Forget what is under way: it holds the process group."""
        self._sum = None

    def _summing(self, own: Mapping[str, float], weight: float, asks: bool) -> _Sum:
        differs = bool(own) and own.keys() != set(self._names)
        flat = [float(differs), float(asks)]
        for name in self._names:
            flat += (weight * own[name], weight) if name in own else (0.0, 0.0)
        summed = torch.tensor(flat, dtype=torch.float64, device=self._device)
        work = dist.all_reduce(summed, async_op=True) if self._ranks.world_size > 1 else None
        return _Sum(own, weight, asks, summed, work)

    def _summed(self) -> tuple[bool, bool, dict[str, tuple[float, float]]]:
        """Whether the names differ from those agreed on, whether anybody asks, each name's sum and weight."""
        done, self._sum = self._sum, None
        assert done is not None
        if done.work is not None:
            done.work.wait()
        flat = done.flat.tolist()
        pairs = zip(flat[2::2], flat[3::2], strict=True)
        return flat[0] > 0, flat[1] > 0, dict(zip(self._names, pairs, strict=True))
