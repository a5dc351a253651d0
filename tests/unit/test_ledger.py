from __future__ import annotations

import pytest

from ddpkit.ledger import EVALUATION, SAVING, Ledger

PHASES = {"data_s": 0.01, "forward_backward_s": 0.06}


def test_steps_are_what_is_left_of_the_time_when_nothing_else_held_them() -> None:
    ledger = Ledger()
    ledger.take_up(None, 0)
    ledger.stepped(10, 0.1, 10, PHASES)
    ledger.away(EVALUATION, 3.0)
    ledger.away(SAVING, 1.0)
    ledger.stepped(20, 0.5, 10, PHASES)
    ledger.stepped(30, 0.1, 10, PHASES)
    assert ledger.totals == pytest.approx(
        {"steps_s": 3.0, "data_s": 0.3, "forward_backward_s": 1.8, "evaluation_s": 3.0, "saving_s": 1.0}
    )


def test_a_restore_goes_on_with_the_totals_of_its_own_past() -> None:
    ledger = Ledger()
    ledger.take_up({"step": 50, "time": {"spent": {"steps_s": 5.0, "saving_s": 0.5}}}, 54)
    ledger.stepped(60, 0.2, 6, {"data_s": 0.1})  # of 55 to 60; 51 to 54 have no line of their own any more
    assert ledger.totals == pytest.approx({"steps_s": 7.0, "saving_s": 0.5, "data_s": 1.0})


@pytest.mark.parametrize("line", [None, {"step": 50, "time": {}}, {"step": 50}])
def test_without_totals_the_count_begins_at_the_restored_step(line: dict[str, object] | None) -> None:
    ledger = Ledger()
    ledger.take_up(line, 54)
    ledger.stepped(60, 0.2, 6, {})
    assert ledger.totals == pytest.approx({"steps_s": 1.2})
