"""The means over the ranks of what their steps report, by one small all-reduce.

Not by an exchange over the store: that goes through rank zero, takes a millisecond on two ranks and ten thousand
questions on ten thousand. But an all-reduce needs the same names on every rank, and would hang or add up apples and
pears if one rank reported others. So the names are agreed on over the store, once; each all-reduce tells along with the
values whether they still hold for everybody, and where they do not, they are agreed on anew.

Nobody waits for it: it is begun at one step and looked at when the next one is done. A rank that waited would wait for
the slowest one (1 ms, beside a step of 4 ms on two cores).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddpkit.agree import Ranks


class Means(NamedTuple):
    """What the ranks' reports came to, the same on all ranks.

    Attributes:
        values: the means by name.
        asked: whether any rank asks.
        by_rank: what each rank has told of itself.
    """

    values: dict[str, float]
    asked: bool
    by_rank: list[list[float]]


@dataclass(frozen=True)
class _Sum:
    """An all-reduce under way, and what it was made of."""

    own: Mapping[str, float]
    weight: float
    asks: bool
    of_itself: Sequence[float]
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
        self._alone: Means | None = None

    def begin(self, values: Mapping[str, float], weight: float, asks: bool, of_itself: Sequence[float] = ()) -> None:
        """Set out for the means, and whether any rank ``asks`` (for a save, say). Collective; waits for nobody.

        Args:
            values: this rank's, by name; the mean of one that not all ranks report is of those which do.
            weight: what they count for; with 0 they are not looked at.
            asks: a question that travels along.
            of_itself: numbers of this rank of which no mean is formed; as many on every rank.
        """
        own = values if weight else {}  # the values of a rank that has nothing to report are NaN
        if self._ranks.world_size == 1:  # by the same arithmetic; a tensor would have a GPU waited for
            means = {name: weight * value / weight for name, value in own.items()}
            self._alone = Means(means, asks, [list(of_itself)] if of_itself else [])
        else:
            self._sum = self._summing(own, weight, asks, of_itself)

    def end(self) -> Means:
        """What came of it, the same on all ranks. Collective."""
        if self._alone is not None:
            alone, self._alone = self._alone, None
            return alone
        assert self._sum is not None  # begun
        own, weight, asks, of_itself = self._sum.own, self._sum.weight, self._sum.asks, self._sum.of_itself
        differs, asked, by_rank, sums = self._summed()
        if differs:
            told = self._ranks.exchange("names of what is recorded", list(own))
            self._names = sorted({name for names in told for name in names})
            self._sum = self._summing(own, weight, asks, of_itself)
            _, asked, by_rank, sums = self._summed()
        means = {name: total / counted for name, (total, counted) in sums.items() if counted}
        return Means({name: means[name] for name in (*own, *means) if name in means}, asked, by_rank)

    def close(self) -> None:
        """Forget what is under way: it holds the process group."""
        self._sum = self._alone = None

    def _summing(self, own: Mapping[str, float], weight: float, asks: bool, of_itself: Sequence[float]) -> _Sum:
        differs = bool(own) and own.keys() != set(self._names)
        rank, width = self._ranks.rank, len(of_itself)
        slots = [0.0] * (self._ranks.world_size * width)  # each rank adds nothing to the others'
        slots[rank * width : (rank + 1) * width] = of_itself
        flat = [float(differs), float(asks), *slots]
        for name in self._names:
            flat += (weight * own[name], weight) if name in own else (0.0, 0.0)
        summed = torch.tensor(flat, dtype=torch.float64, device=self._device)
        return _Sum(own, weight, asks, of_itself, summed, dist.all_reduce(summed, async_op=True))

    def _summed(self) -> tuple[bool, bool, list[list[float]], dict[str, tuple[float, float]]]:
        """Whether the names differ from those agreed on, whether anybody asks, the ranks' own, each name's sum."""
        done, self._sum = self._sum, None
        assert done is not None
        done.work.wait()
        flat = done.flat.tolist()
        width = len(done.of_itself)
        end = 2 + self._ranks.world_size * width
        by_rank = [flat[place : place + width] for place in range(2, end, width)] if width else []
        pairs = zip(flat[end::2], flat[end + 1 :: 2], strict=True)
        return flat[0] > 0, flat[1] > 0, by_rank, dict(zip(self._names, pairs, strict=True))
