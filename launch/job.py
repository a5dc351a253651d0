"""The values that cross a process boundary: what ranks are to do, and what they say in return. All of it JSON."""

from __future__ import annotations

import base64
import signal
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks ranks to stop; blocked in a new rank until it can stop in an orderly way."""

STACK_SIGNAL = signal.SIGRTMIN + 9
"""Has a rank write where all its threads are, also from inside C++."""

HELD_SIGNALS = (*STOP_SIGNALS, STACK_SIGNAL)
"""Blocked in a new rank until it can take them: they would end it."""

BEGUN, STOPPED, DONE = "begun", "stopped", "done"
"""What a rank tells its launcher when it has come so far: it takes part in votes, it leaves by one, its job is done."""

Kind = Literal["run", "eval", "script", "module", "call"]


@dataclass(frozen=True)
class Job:
    """What every rank does: exactly one of a config, a script, a module or a pickled call.

    Attributes:
        kind: which of the following fields counts.
        config: "run" and "eval": the resolved config.
        options: "run" and "eval": what else the worker needs (attempt, launcher's pid, step to evaluate).
        target: "script": its path as given; "module": its name.
        argv: "script" and "module": the arguments.
        call: "call": (function, args, kwargs), by cloudpickle.
        search_path: put before ``sys.path``: what ``python`` itself would put there, or the caller's own path.
        runtime: "script" and "module": what the launcher was told for the runtime that they may enter, by the names
            of `ddpkit.runtime`'s arguments.
    """

    kind: Kind
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    argv: tuple[str, ...] = ()
    call: bytes = b""
    search_path: tuple[str, ...] = ()
    runtime: dict[str, float] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether ddpkit itself does it, from a config: ranks tell of what they reach, and leave together."""
        return self.kind in ("run", "eval")

    def to_json(self) -> dict[str, Any]:
        """A tree that `from_json` takes back."""
        return asdict(self) | {"call": base64.b64encode(self.call).decode()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        given = tree | {
            "call": base64.b64decode(tree["call"]),
            "argv": tuple(tree["argv"]),
            "search_path": tuple(tree["search_path"]),
        }
        return cls(**given)


@dataclass(frozen=True)
class RankOrder:
    """One rank's part: its environment, a directory for temporary files, and the descriptors that it writes to."""

    rank: int
    env: dict[str, str]
    scratch: str
    stdout: int
    stderr: int
    report: int
    stacks: int

    PIPES: ClassVar = ("stdout", "stderr", "report", "stacks")

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that it writes to."""
        return tuple(getattr(self, name) for name in self.PIPES)


@dataclass(frozen=True)
class Terms:
    """What the launchers of an elastic group have to agree in, each on its machine.

    Attributes:
        nproc: ranks on each machine.
        min_nodes: machines, at least.
        max_nodes: machines, at most.
        max_restarts: how often a failed group is started again.
    """

    nproc: int
    min_nodes: int
    max_nodes: int
    max_restarts: int

    @property
    def alone(self) -> bool:
        """There is only this machine."""
        return self.max_nodes == 1

    def describe(self) -> str:
        """In the words of the config."""
        nodes = self.min_nodes if self.min_nodes == self.max_nodes else f"{self.min_nodes}:{self.max_nodes}"
        return f"nproc_per_node {self.nproc}, nnodes {nodes}, max_restarts {self.max_restarts}"


@dataclass(frozen=True)
class Memory:
    """What a rank held shortly before its end, when it held most. All sizes in bytes.

    Attributes:
        held: resident in the rank itself.
        children: processes that descend from it, such as loader workers.
        held_by_children: resident in those, what they share counted in each.
        held_by_all: the same sum over all ranks of this node and their children.
        limit: the smallest that holds for them.
        limit_of: whose limit that is, in words.
        seen_s_before: seconds from then to the end.
        ran_out: the kernel has ended a process here in the last half minute because memory had run out; None where it
            does not tell.
    """

    held: int
    children: int
    held_by_children: int
    held_by_all: int
    limit: int
    limit_of: str
    seen_s_before: float
    ran_out: bool | None


@dataclass(frozen=True)
class Failure:
    """How one rank ended badly.

    Attributes:
        rank: which one.
        host: where it ran.
        when: seconds on this node's monotonic clock: of the exception, or when its end was seen.
        exit_code: of the process; negative for a signal.
        kind: the exception's type; empty if there was none to see.
        message: its text.
        traceback: as Python prints it; empty for input errors and kills.
        is_users_input: the user's input is wrong (exit code 2).
        is_consequence: it is what a rank sees when another one has gone.
        late: the rank that does not come and its host, where this one has found out that all wait for it.
        last_lines: of its output, where there is no exception to quote.
        memory: what it held, if that has been looked at.
        exception: the exception itself, by cloudpickle; empty if it cannot be pickled.
    """

    rank: int
    host: str
    when: float
    exit_code: int
    kind: str = ""
    message: str = ""
    traceback: str = ""
    is_users_input: bool = False
    is_consequence: bool = False
    late: tuple[int, str] | None = None
    last_lines: tuple[str, ...] = ()
    memory: Memory | None = None
    exception: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """A tree that `from_json` takes back."""
        return asdict(self) | {"exception": base64.b64encode(self.exception).decode()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Failure:
        """The failure that `to_json` wrote."""
        given = tree | {
            "late": (tree["late"][0], tree["late"][1]) if tree["late"] is not None else None,
            "last_lines": tuple(tree["last_lines"]),
            "memory": Memory(**tree["memory"]) if tree["memory"] is not None else None,
            "exception": base64.b64decode(tree["exception"]),
        }
        return cls(**given)


def unpickled(result: str) -> Any:
    """What a rank's call returned, out of an `Outcome`; None if it returned nothing of that kind."""
    import cloudpickle  # for the results of functions alone

    return cloudpickle.loads(base64.b64decode(result)) if result else None
