"""Watch over ranks that torch's elastic agent starts: the launcher's side of `agent`.

The agent decides when ranks start, also again after a failure. A rank that it has started waits at its beginning for
an order, so that each attempt has its number, its logs and its report here as with the ranks of a `Node`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .job import Job
from .supervise import Node


class ElasticNode(Node):
    """An agent process with its ranks, from entering the context to leaving it; then nothing of it is left.

    Args:
        nproc: ranks to start on this machine.
        env: variables for every rank besides those that say who it is.
        max_restarts: how often the agent starts a failed group again.
        nnodes: machines, each with a launcher.
        endpoint: ``host:port`` of one of them, where all meet; None on one machine.
    """

    def __init__(
        self, nproc: int, env: Mapping[str, str], max_restarts: int = 0, nnodes: int = 1, endpoint: str | None = None
    ) -> None:
        # With a store shared between the attempts, gloo on one node finds the addresses of ranks that are gone.
        super().__init__(nproc, "spawn", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **env})
        self._agent = {
            "nproc": nproc,
            "nnodes": nnodes,
            "endpoint": endpoint,
            "max_restarts": max_restarts,
        }
        self._first: int | None = None

    def _role(self, control: int) -> list[str]:
        return ["agent", str(control), json.dumps(self._agent)]

    def _start(self, job: Job, restart_count: int) -> None:
        """Wait until the agent has started the ranks, then give them their orders."""
        while self._first is None and not self._lost:
            self._handle_events(timeout_s=None)
            if self._requested is not None:  # nothing has begun
                self.ends_now = True
                return
        if self._first is None:
            return  # the agent has gone
        for place, rank in enumerate(self._ranks):
            rank.rank = self._first + place
            rank.order = replace(rank.order, rank=rank.rank)
        self._first = None
        self._send(do="start", job=job.to_json(), ranks=[vars(rank.order) for rank in self._ranks])

    def _take(self, message: dict[str, Any]) -> None:
        if "first" in message:
            self._first = message["first"]
        super()._take(message)
