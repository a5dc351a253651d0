"""torch's elastic agent, which also hands out the processes that it has started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SubprocessContext


class TorchAgent(LocalElasticAgent):
    """Starts the ranks of one machine, looks at them now and then, and may start them again.

    Args:
        spec: the ranks.
        logs: where torch keeps something of them.
        started: called with the processes, each time that some have been started.
    """

    def __init__(
        self, spec: WorkerSpec, logs: LogsSpecs, started: Callable[[Iterable[subprocess.Popen[bytes]]], None]
    ) -> None:
        super().__init__(spec, logs)
        self._started = started

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # Private, as are the processes: torch tells of their pids, and how they end only when it ends the group.
        pids: dict[int, Any] = super()._start_workers(worker_group)
        assert isinstance(self._pcontext, SubprocessContext)  # it starts a program, not a function
        self._started(handler.proc for handler in self._pcontext.subprocess_handlers.values())
        return pids
