"""Watch over ranks that torch's elastic agent starts: the launcher's side of `agent`.

The agent decides when ranks start, also again after a failure. A rank that it has started waits at its beginning for
an order, so that each attempt has its number, its logs and its report here as with the ranks of a `Node`. With several
machines each has a launcher; what they tell each other goes through the agents' `meeting`, a round for each attempt.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ddpkit.errors import DdpkitError, UserError

from .attempts import AttemptFile
from .causes import follows
from .job import Failure, Job, Terms
from .supervise import LaunchFailed, Node, Outcome, Rank

_SETTLE_S = 3.0  # for what the ranks of other machines have to say of the same failure


@dataclass
class _Round:
    """What the agent has told of one attempt.

    Attributes:
        first: the rank of the first rank here, once all here have been born.
        world_size: ranks of all machines.
        attempt: its number, as the launcher that leads says.
        regroups: it ends because machines come or go.
        order: of failures, over all machines, by rank.
        others: failures of ranks on other machines, by rank.
    """

    first: int | None = None
    world_size: int = 0
    attempt: int | None = None
    regroups: bool = False
    order: dict[int, int] = field(default_factory=dict)
    others: dict[int, Failure] = field(default_factory=dict)


class ElasticNode(Node):
    """An agent process with its ranks, from entering the context to leaving it; then nothing of it is left.

    With several machines, the launcher on the agents' first one leads: it numbers the attempts.

    Args:
        terms: ranks and machines, the same for the launchers on all of them.
        env: variables for every rank besides those that say who it is.
        endpoint: ``host:port`` of one of the machines, where all meet; None on one machine.
    """

    def __init__(self, terms: Terms, env: Mapping[str, str], endpoint: str | None = None) -> None:
        # With a store shared between the attempts, gloo on one node finds the addresses of ranks that are gone.
        super().__init__(terms.nproc, "spawn", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **env})
        self.is_numbered_late = not terms.alone
        self._terms = terms
        self._endpoint = endpoint
        self._rounds: dict[int, _Round] = defaultdict(_Round)
        self._current = 0
        self._stopped: DdpkitError | None = None  # the agent has, for this reason

    def _role(self, control: int) -> list[str]:
        return ["agent", str(control), json.dumps({"terms": vars(self._terms), "endpoint": self._endpoint})]

    def number(self, take: Callable[[int], AttemptFile], follow: Callable[[int], AttemptFile]) -> AttemptFile | Outcome:
        """Take the number of the next attempt, or hear it from the launcher that leads.

        Raises:
            LaunchFailed: the agents have not met.
            UserError: the launchers were started differently.
        """
        if self._terms.alone:
            return take(self._terms.nproc)
        self._await(lambda: self._next() is not None)
        if (number := self._next()) is not None and self._rounds[number].first == 0:
            attempt = take(self._rounds[number].world_size)
            self._send(do="attempt", number=attempt.number)
            return attempt
        self._await(lambda: number is not None and self._rounds[number].attempt is not None)
        if number is None or (told := self._rounds[number].attempt) is None:
            return self._outcome()
        return follow(told)

    def _next(self) -> int | None:
        """The round that comes after this one, once its ranks here have been born."""
        return next(
            (number for number, told in self._rounds.items() if number > self._current and told.world_size), None
        )

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for it, or for a stop. Raises what has kept the agent from it."""
        while not (condition() or self._lost or self.ends_now):
            if self._stopped is not None:
                raise self._stopped
            self._handle_events(timeout_s=None)
            self.ends_now = self.ends_now or self._requested is not None  # nothing has begun

    def _start(self, job: Job, restart_count: int) -> None:
        """Wait until the agent has started the ranks, then give them their orders."""
        self._await(lambda: self._next() is not None)
        if (number := self._next()) is None:
            return
        self._current = number
        first = self._rounds[number].first
        assert first is not None  # they have been born
        for place, rank in enumerate(self._ranks):
            rank.rank = first + place
            rank.order = replace(rank.order, rank=rank.rank)
        self._send(do="start", job=job.to_json(), ranks=[vars(rank.order) for rank in self._ranks])

    def _take(self, message: dict[str, Any]) -> None:
        super()._take(message)
        if "refused" in message:
            self._stopped = UserError(message["refused"])
        elif "gave_up" in message:
            self._stopped = LaunchFailed(message["gave_up"])
        if "round" not in message:
            return
        told = self._rounds[message["round"]]
        if "first" in message:
            told.first, told.world_size = message["first"], message["world_size"]
        elif "attempt" in message:
            told.attempt = message["attempt"]
        elif "regroups" in message:
            told.regroups = True
        elif "failure" in message:
            failure = Failure.from_json(message["failure"])
            told.order.setdefault(failure.rank, message["order"])  # by now more may be known of it, but no sooner
            if failure.rank not in [rank.rank for rank in self._ranks]:
                told.others[failure.rank] = failure

    # -- failures on several machines ------------------------------------------------------------------------------

    def _tell_failure(self, rank: Rank) -> None:
        if not (self._terms.alone or self._rounds[self._current].regroups):
            self._send(do="tell", failure=self._failure_of(rank).to_json())

    def _some_failed(self) -> bool:
        return super()._some_failed() or bool(self._rounds[self._current].others)

    def _failures(self) -> list[Failure]:
        told = self._rounds[self._current]
        if self._terms.alone:
            return super()._failures()
        failures = [*super()._failures(), *told.others.values()]
        # Clocks of several machines have nothing in common; what comes after the last look is late in any case.
        return [replace(each, when=told.order.get(each.rank, math.inf)) for each in failures]

    def _outcome(self) -> Outcome:
        told = self._rounds[self._current]
        if told.regroups and self._requested is None:
            return replace(super()._outcome(), failures=(), regroups=True)
        deadline = time.monotonic() + _SETTLE_S
        while not (self._terms.alone or self._is_settled() or self._lost or self.ends_now):
            self._handle_events(timeout_s=0.2)
            if time.monotonic() > deadline:
                break
        return super()._outcome()

    def _is_settled(self) -> bool:
        """Whether all is known that can be: each failure's place among those of others, and which one is the cause."""
        failures = self._failures()
        return all(each.when < math.inf for each in failures) and not (failures and all(map(follows, failures)))
