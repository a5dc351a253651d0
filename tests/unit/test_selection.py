"""What the best checkpoint is, which ones pruning leaves, and when a run ends early."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpkit import selection
from ddpkit.checkpoint import contents, listing
from ddpkit.checkpoint.store import CheckpointStore, Snapshot
from ddpkit.errors import UserError
from ddpkit.selection import Best, EarlyStopping


class Alone:
    rank = 0
    world_size = 1

    def conclude(self, name: str, value: Any, conclusion: Callable[[list[Any]], Any]) -> Any:
        return conclusion([value])


def saver(run_dir: Path, best: Best, keep: int = 2) -> tuple[CheckpointStore, Callable[..., None]]:
    directory = listing.checkpoints_directory(run_dir)
    store = CheckpointStore(directory, keep, Alone(), lambda *_, **__: None, print, lambda: None, best)

    def save(step: int, evaluated: int | None = None, **values: float) -> None:
        rule = {"metric": best.metric, "mode": best.mode}
        progress = {"step": step, "evaluated": step if evaluated is None else evaluated, "values": values, "best": rule}
        store.save(step, lambda: contents.take(Snapshot(progress, {"w": torch.ones(3)}, {}, own={}), 0, 1))

    return store, save


def steps(run_dir: Path) -> list[int]:
    return sorted(step for step, _ in listing.complete(listing.checkpoints_directory(run_dir)))


def best_step(run_dir: Path) -> int | None:
    found = listing.intact_best(run_dir)
    assert found is not None
    return None if found[1] is None else found[1].step


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    store, save = saver(tmp_path, Best("loss"))
    for step, loss in ((1, 0.5), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)):
        assert store.would_be_best(loss) == (step < 3)
        save(step, loss=loss)
    assert steps(tmp_path) == [2, 4, 5]
    save(6, loss=0.2)  # as good, and not better
    assert (steps(tmp_path), best_step(tmp_path)) == ([2, 5, 6], 2)
    save(7, loss=0.1)
    assert (steps(tmp_path), best_step(tmp_path)) == ([6, 7], 7)


def test_a_checkpoint_without_an_evaluation_of_its_own_is_no_candidate(tmp_path: Path) -> None:
    _, save = saver(tmp_path, Best("accuracy", "max"), keep=1)
    save(1, accuracy=0.5)
    save(2, evaluated=1, accuracy=0.9)  # saved again with what step 1 gave
    save(3)
    assert (steps(tmp_path), best_step(tmp_path)) == ([1, 3], 1)


def test_a_broken_best_gives_way_to_the_next_best(tmp_path: Path) -> None:
    _, save = saver(tmp_path, Best("loss"), keep=3)
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2)):
        save(step, loss=loss)
    file = next((listing.checkpoints_directory(tmp_path) / listing.step_name(1)).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert best_step(tmp_path) == 3
    _, save = saver(tmp_path, Best("loss"), keep=1)  # another start, which knows nothing
    save(4, loss=0.9)
    assert 3 in steps(tmp_path)
    assert 1 not in steps(tmp_path)


def test_a_run_without_a_rule_has_no_best(tmp_path: Path) -> None:
    directory = listing.checkpoints_directory(tmp_path)
    store = CheckpointStore(directory, 1, Alone(), lambda *_, **__: None, print, lambda: None)
    snapshot = Snapshot({"step": 1, "evaluated": 1, "values": {"loss": 1.0}}, {}, {}, own={})
    store.save(1, lambda: contents.take(snapshot, 0, 1))
    assert listing.intact_best(tmp_path) is None


def verdicts(rule: EarlyStopping, values: list[float]) -> list[bool]:
    state: dict[str, Any] | None = None
    given = []
    for value in values:
        state = rule.waited(state, value)
        given.append(rule.verdict(state) is not None)
    return given


@pytest.mark.parametrize(
    ("rule", "values", "ends"),
    [
        (EarlyStopping("x", 2), [3.0, 2.0, 2.0, 2.5], [False, False, False, True]),
        (EarlyStopping("x", 2), [3.0, 3.1, 2.9, 3.0, 3.0], [False, False, False, False, True]),
        (EarlyStopping("x", 1, mode="max"), [3.0, 4.0, 4.0], [False, False, True]),
        (EarlyStopping("x", 2, min_delta=0.5), [3.0, 2.6, 2.5], [False, False, True]),  # better than 2.5 it would be
        (EarlyStopping("x", 2, min_delta=0.5), [3.0, 2.6, 2.4], [False, False, False]),
        (EarlyStopping("x", 2), [math.nan, math.inf], [False, True]),  # nothing to compare with, and no reason to go on
        (EarlyStopping("x", 2), [1.0, math.nan, 0.5, math.nan], [False, False, False, False]),
    ],
)
def test_early_stopping_counts_evaluations_that_are_not_better(
    rule: EarlyStopping, values: list[float], ends: list[bool]
) -> None:
    assert verdicts(rule, values) == ends


def test_more_patience_lets_a_run_go_on_and_another_metric_begins_anew() -> None:
    state: dict[str, Any] | None = None
    for value in (1.0, 2.0, 2.0):
        state = EarlyStopping("x", 2).waited(state, value)
    assert selection.ended_early({"stopping": state}, EarlyStopping("x", 2)) == (
        "x was not better than 1 in 2 evaluations"
    )
    assert selection.ended_early({"stopping": state}, EarlyStopping("x", 3)) is None
    assert selection.ended_early({"stopping": state}, None) is None
    assert selection.ended_early({"stopping": state}, EarlyStopping("y", 2)) is None
    assert EarlyStopping("y", 2).waited(state, 9.0) == {"metric": "y", "mode": "min", "best": 9.0, "waits": 0}
    assert selection.ended_early({"ended": "enough"}, None) == "enough"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="choose min or max"):
        Best("x", "most")
    with pytest.raises(UserError, match="patience=0"):
        EarlyStopping("x", 0)
    with pytest.raises(UserError, match=r"key: the evaluation gives no value 'eror'; did you mean 'error'\?"):
        selection.value_of("eror", {"error": 1.0, "within": 2.0}, "key")
