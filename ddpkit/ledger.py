"""What a run's time went to, in the steps that survive. Each line of metrics has the totals so far.

So nobody has to add up a long file to know them, and a restore, which drops the lines of the steps that it has undone,
takes their time out of the totals as well: steps that are done twice count once. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEPS, EVALUATION, SAVING = "steps_s", "evaluation_s", "saving_s"


class Ledger:
    """The totals of one run, in seconds, on the rank that writes the lines."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._away_s = 0.0
        self._counted_to = 0

    def take_up(self, line: Mapping[str, Any] | None, step: int) -> None:
        """Go on after a restore of ``step``; ``line`` is the newest one that is left, if there is any."""
        totals = (line or {}).get("time", {}).get("spent")
        # The steps between that line and the checkpoint have survived as well: they are counted with the next ones.
        self._counted_to = step if line is None or totals is None else line["step"]
        self._totals = dict(totals or {})

    def away(self, name: str, seconds: float) -> None:
        """Training was held for so long, by `EVALUATION` or `SAVING`."""
        self._away_s += seconds
        self._add(name, seconds)

    def stepped(self, step: int, step_s: float, steps: int, phases: Mapping[str, float]) -> None:
        """A line of training is due.

        Args:
            step: of that line.
            step_s: the time a step since the line before, or since the start, with all that held it.
            steps: how many that were.
            phases: the parts of a step, in seconds.
        """
        count = step - self._counted_to
        self._add(STEPS, max(0.0, step_s - self._away_s / max(steps, 1)) * count)
        for name, seconds in phases.items():
            self._add(name, seconds * count)
        self._counted_to, self._away_s = step, 0.0

    @property
    def totals(self) -> dict[str, float]:
        """Seconds so far, by name."""
        return {name: round(seconds, 4) for name, seconds in self._totals.items()}

    def _add(self, name: str, seconds: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + seconds
