"""Watch over ranks that torch's elastic agent starts: the launcher's side of `agent`.

The agent decides when ranks start, also again after a failure. A rank that it has started waits at its beginning for
an order, so that each attempt has its number, its logs and its report here as with the ranks of a `Node`. With several
machines each has a launcher; what they tell each other goes through the agents' `meeting`, a round for each attempt.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ddpkit.errors import EXIT_FAILED, EXIT_STOPPED, DdpkitError, UserError

from .attempts import AttemptFile, report_failure
from .causes import follows, order_by_cause
from .job import Failure, Job, Terms
from .ranks import Outcome, Rank
from .supervise import LaunchFailed, Node

_JOIN_S = 900  # as torchrun waits
_HEAR_S = 0.6  # for what other launchers have told already
_SETTLE_S = 3.0  # for what the ranks of other machines have to say of the same failure


@dataclass
class _Round:
    """What the agent has told of one attempt.

    Attributes:
        first: the rank of the first rank here, once all here have been born.
        world_size: ranks of all machines.
        hosts: of all machines, in the order of their ranks.
        attempt: its number, as the launcher that leads says.
        regroups: it ends because machines come or go.
        order: of failures, over all machines, by rank.
        failures: of ranks of all machines, by rank.
    """

    first: int | None = None
    world_size: int = 0
    hosts: tuple[str, ...] = ()
    attempt: int | None = None
    regroups: bool = False
    order: dict[int, int] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)


class ElasticNode(Node):
    """An agent process with its ranks, from entering the context to leaving it; then nothing of it is left.

    With several machines, the launcher on the agents' first one leads: it numbers the attempts.

    Args:
        terms: ranks and machines, the same for the launchers on all of them.
        env: variables for every rank besides those that say who it is.
        endpoint: ``host:port`` of one of the machines, where all meet; None on one machine.
        join_s: seconds for the launchers of all machines to come.
    """

    def __init__(
        self, terms: Terms, env: Mapping[str, str], endpoint: str | None = None, join_s: int = _JOIN_S
    ) -> None:
        # With a store shared between the attempts, gloo on one node finds the addresses of ranks that are gone.
        super().__init__(terms.nproc, "spawn", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **env})
        self.is_numbered_late = not terms.alone
        self._terms = terms
        self._endpoint = endpoint
        self._join_s = join_s
        self._rounds: dict[int, _Round] = defaultdict(_Round)
        self._current = 0
        self._stopped: DdpkitError | None = None  # the agent has, for this reason

    def _role(self, control: int) -> list[str]:
        settings = {"terms": vars(self._terms), "endpoint": self._endpoint, "join_s": self._join_s}
        return ["agent", str(control), json.dumps(settings), self._scratch]

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
            told_late = self._rounds[self._current].failures.values()
            if wrong := next((each for each in told_late if each.is_users_input), None):
                raise UserError(wrong.message)
            if self._stopped is not None:
                raise self._why_stopped(self._stopped)
            self._handle_events(timeout_s=None)
            self.ends_now = self.ends_now or self.requests.first is not None  # nothing has begun

    def _why_stopped(self, error: DdpkitError) -> DdpkitError:
        """What has kept the agent from starting ranks here: perhaps those of another machine, which were faster."""
        unseen = [told.failures.values() for number, told in self._rounds.items() if number > self._current]
        failures = order_by_cause([failure for those in unseen for failure in those])
        if not failures:
            return error
        first = failures[0]
        return UserError(first.message) if first.is_users_input else LaunchFailed(report_failure(failures, None))

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
        self._are_started = True

    def _have_begun(self) -> bool:
        # With several machines the others' ranks wait for those here, and are to stop with them.
        return super()._have_begun() or (self._are_started and not self._terms.alone)

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
            told.hosts = tuple(message["hosts"])
        elif "attempt" in message:
            told.attempt = message["attempt"]
        elif "regroups" in message:
            told.regroups = True
        elif "failure" in message:
            failure = Failure.from_json(message["failure"])
            order = message["order"]
            if failure.is_users_input:  # final, though the ranks here may have been started again meanwhile
                told, order = self._rounds[max(message["round"], self._current)], 0
            told.order.setdefault(failure.rank, order)  # by now more may be known of it, but no sooner
            told.failures[failure.rank] = failure

    # -- failures on several machines ------------------------------------------------------------------------------

    def _tell_failure(self, rank: Rank) -> None:
        if not (self._terms.alone or self._rounds[self._current].regroups):
            self._send(do="tell", round=self._current, failure=self._failure_of(rank).to_json())

    def _some_failed(self) -> bool:
        return super()._some_failed() or bool(self._rounds[self._current].failures)

    def _failures(self) -> list[Failure]:
        if self._terms.alone:
            return super()._failures()
        told = self._rounds[self._current]
        failures = told.failures | {failure.rank: failure for failure in super()._failures()}
        # Clocks of several machines have nothing in common; what comes after the last look is late in any case.
        return [replace(each, when=told.order.get(each.rank, math.inf)) for each in failures.values()]

    def _all_failures(self) -> tuple[Failure, ...]:
        failures = super()._all_failures()
        # To the agent the first rank that leaves with an agreed stop is one that has failed: it ends the others.
        return () if self._some_stopped() and all(map(_was_ended, failures)) else failures

    def _outcome(self) -> Outcome:
        told = self._rounds[self._current]
        wait_s = 0.0 if self._terms.alone else _HEAR_S if told.regroups else _SETTLE_S
        if not self._terms.alone:
            self._own_up(told)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not (self._is_settled() or self._lost or self.ends_now):
            self._handle_events(timeout_s=0.2)
        if not self._terms.alone:
            self._blame_the_silent(told)
        outcome = super()._outcome()
        # The agent restarts ranks also where those of another machine have failed, which is another thing.
        if told.regroups and self.requests.first is None and all(map(_was_ended, outcome.failures)):
            return replace(outcome, exit_code=EXIT_STOPPED, failures=(), is_saved=False, regroups=True)
        return outcome

    def _own_up(self, told: _Round) -> None:
        """Tell of ranks here that have left, if all that is told of is what others see of that."""
        failures = self._failures()
        if failures and not told.regroups and all(map(follows, failures)):
            for left in self._left():
                self._send(do="tell", round=self._current, failure=left.to_json())

    def _blame_the_silent(self, told: _Round) -> None:
        """Where nobody has a failure of its own to tell of, a machine that tells of nothing is the cause."""
        failures = self._failures()
        silent = set(range(told.world_size)) - {rank.rank for rank in self._ranks} - {each.rank for each in failures}
        if told.regroups or not failures or not silent or not all(map(follows, failures)):
            return
        first = min(silent)
        ranks = f"rank {first}" if len(silent) == 1 else f"ranks {', '.join(map(str, sorted(silent)))}"
        told.failures[first] = Failure(
            first,
            told.hosts[first // self._nproc],
            when=0.0,
            exit_code=EXIT_FAILED,
            message=f"nothing has been heard of {ranks}, and the others have lost their connection: they have "
            "left, or that machine is down, or cut off, or its launcher was killed there",
        )
        told.order[first] = 0

    def _is_settled(self) -> bool:
        """Whether all is known that can be: each failure's place among those of others, and which one is the cause."""
        failures = self._failures()
        if self._rounds[self._current].regroups and all(map(_was_ended, failures)):
            return False  # perhaps because of a failure that has not been told of yet
        return all(each.when < math.inf for each in failures) and not (failures and all(map(follows, failures)))


def _was_ended(failure: Failure) -> bool:
    """Whether a rank has ended because the agent wanted it to, or because of others."""
    return follows(failure) or failure.exit_code == -signal.SIGTERM
