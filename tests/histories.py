"""Run directories as runs leave them, made up: a history of attempts with what they recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]

START = 1_700_000_000.0  # Unix time


@dataclass
class History:
    """A run directory that is being written.

    Attributes:
        run_dir: which.
        steps_s: the time in steps that survive so far.
    """

    run_dir: Path
    steps_s: float = 0.0
    evaluation_s: float = 0.0
    lines: list[Tree] = field(default_factory=list)
    events: list[Tree] = field(default_factory=list)

    def train(self, step: int, at: float, steps: int = 10, step_s: float = 0.1, **values: Any) -> None:
        """A line of training, ``at`` seconds after the start, of ``steps`` steps; their time counts."""
        self.steps_s += steps * step_s
        clock = {"step_s": step_s, "samples_per_s": 32 / step_s, "data_s": step_s / 10, "host_mb": 300.0 + step / 100}
        clock |= {"forward_backward_s": step_s * 0.7, "optimizer_s": step_s * 0.1, "communication_s": step_s * 0.2}
        by_rank = {"step_s": [step_s, step_s * 1.01], "data_s": [0.01, 0.02], "communication_s": [0.03, 0.01]}
        self._line("train", step, at, {"lr": 0.1 / step, "loss": math.exp(-step / 100), **values}, clock, by_rank)

    def evaluate(self, step: int, at: float, seconds: float = 2.0, **values: Any) -> None:
        """A line of an evaluation."""
        self.evaluation_s += seconds
        self._line("eval", step, at, values or {"loss": math.exp(-step / 90), "accuracy": 1 - 1 / step}, {}, None)

    def event(self, name: str, attempt: int, at: float, **fields: Any) -> None:
        """A line of events.jsonl."""
        self.events.append({"event": name, "attempt": attempt, **fields, "unix": START + at})

    def attempt(self, number: int, started: float, ended: float | None = None, **fields: Any) -> None:
        """What a launcher writes."""
        tree = {"attempt": number, "launcher": "local", "host": "elsewhere", "pid": 1, "ranks": 2}
        tree |= {"started": START + started} | ({} if ended is None else {"ended": START + ended})
        path = self.run_dir / "attempts" / f"attempt-{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree | fields))

    def write(self, lines: Iterable[Tree] | None = None) -> Path:
        """Write all of it; returns the run directory."""
        for name, what in (("metrics", self.lines if lines is None else lines), ("events", self.events)):
            with (self.run_dir / f"{name}.jsonl").open("w") as file:
                file.writelines(json.dumps(line) + "\n" for line in what)
        return self.run_dir

    def _line(self, kind: str, step: int, at: float, values: Tree, clock: Tree, by_rank: Tree | None) -> None:
        spent = {"steps_s": self.steps_s, "data_s": self.steps_s / 10, "forward_backward_s": self.steps_s * 0.7}
        spent |= {"optimizer_s": self.steps_s / 10, "evaluation_s": self.evaluation_s, "saving_s": 0.5}
        time = {"unix": START + at, **clock, "total_steps": 1000, "spent": spent}
        time |= {"by_rank": by_rank} if by_rank else {}
        self.lines.append(
            {"kind": kind, "step": step, "epoch": step // 100, "samples": 32 * step, **values, "time": time}
        )
