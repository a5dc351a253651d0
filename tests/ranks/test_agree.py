from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import ddpkit
from ddpkit.agree import RankFailed, Ranks, RanksMissing
from ddpkit.errors import UserError
from ddpkit.rollcall import CollectiveTimeout
from ddpkit.testing import RankDied, run_ranks
from ddpkit.world import World


def agreements() -> dict[str, Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        ranks, me = rt.ranks, rt.rank
        found: dict[str, Any] = {
            "exchange": ranks.exchange("squares", me * me),
            "conclusion": ranks.conclude("least and most", me, lambda values: (min(values), max(values))),
            "again": [ranks.exchange("squares", [me, use]) for use in range(3)],
            "decide": ranks.decide("best", {"step": 7, "loss": 0.1 + 0.2} if rt.is_main else "not looked at"),
            "unicode": ranks.exchange("Größe/измерение ☃ 0/1", "ä\n\0☃" * (me + 1)),
            "names that look like uses": [ranks.exchange("a", 1), ranks.exchange("a/0", 2), ranks.exchange("a/0/1", 3)],
            "big": [len(text) for text in ranks.exchange("big", "x" * 500_000)],
            "shape": ranks.exchange("shape", (1, {"k": (2,)}))[0],
            "not finite": str(ranks.exchange("nan", [float("nan"), float("-inf")])[-1]),
        }
        order: list[int] = []
        for scope in ("global", "node", "global"):
            with rt.main_first(scope), rt.main_first():
                order.append(len(order))
        found["sections"] = order
        rt.barrier("here")
        with pytest.raises(TypeError):
            ranks.exchange("not JSON", {1, 2})
        return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_agreements_are_the_same_on_all_ranks(size: int) -> None:
    for found in run_ranks(agreements, size):
        assert found == {
            "exchange": [rank * rank for rank in range(size)],
            "conclusion": [0, size - 1],
            "again": [[[rank, use] for rank in range(size)] for use in range(3)],
            "decide": {"step": 7, "loss": 0.1 + 0.2},
            "unicode": ["ä\n\0☃" * (rank + 1) for rank in range(size)],
            "names that look like uses": [[1] * size, [2] * size, [3] * size],
            "big": [500_000] * size,
            "shape": [1, {"k": [2]}],
            "not finite": "[nan, -inf]",
            "sections": [0, 1, 2],
        }


def keys_after_much_use() -> tuple[int, int]:
    with ddpkit.runtime(timeout_s=20) as rt:

        def use(times: int) -> int:
            for number in range(times):
                rt.ranks.exchange("value", number)
                rt.barrier("again")
                rt.mean(1.0)
                with rt.main_first():
                    pass
                with rt.main_first("node"):
                    pass
            rt.barrier("counted")
            keys = rt.store.num_keys()
            rt.barrier("counted")
            return keys

        use(3)
        return use(5), use(50)


def test_the_store_does_not_grow() -> None:
    before, after = run_ranks(keys_after_much_use, 3)[0]
    assert after <= before + 8  # the keys of the uses under way


class Ours(Exception):
    pass


def in_a_section(action: str, scope: str, work_s: float) -> tuple[float, str]:
    """Rank zero acts in a section that takes longer than collectives may. When the others came out, and how."""
    told = ""
    with ddpkit.runtime(timeout_s=2) as rt:
        started = time.monotonic()
        rt.barrier("before")  # so that every rank's clock runs when rank zero begins
        try:
            with rt.main_first(scope):
                if rt.is_main:
                    if action == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(work_s)
                    if action == "raise":
                        raise Ours("no such data set")
        except RankFailed as error:
            told = str(error)
        waited = time.monotonic() - started
        if action == "raise" and not rt.is_main:
            return waited, told
        rt.barrier("after")
        tensor = torch.ones(1)
        dist.all_reduce(tensor)  # the group still works
    return waited, told


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "node"])
def test_no_training_timeout_ends_a_section_that_rank_zero_works_in(scope: str) -> None:
    for waited, _ in run_ranks(in_a_section, 3, "sleep", scope, 5.0):
        assert waited >= 5.0


def words_in_a_long_section() -> list[str]:
    """What each rank tells its log."""
    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]  # of one instance
    logging.getLogger("ddpkit").addHandler(handler)
    in_a_section("sleep", "global", 12.0)
    return words


@pytest.mark.slow
def test_a_long_section_is_reported() -> None:
    leaders, others = run_ranks(words_in_a_long_section, 2)
    assert "rank 0 has been at work in main_first for 10 s; 1 ranks wait" in leaders
    assert "rank 1 waits for main_first (rank 0 is at work): 10 s" in others


def others_in_a_failed_section() -> str:
    """Rank zero's error is kept back until the others have said what they were told."""
    with ddpkit.runtime(timeout_s=30) as rt:
        if rt.is_main:
            with pytest.raises(Ours), rt.main_first():
                raise Ours("no such data set")
            message = ""
        else:
            with pytest.raises(RankFailed) as caught, rt.main_first():
                raise AssertionError("the block must not run")
            message = str(caught.value)
        return message


def test_the_others_get_rank_zeros_cause() -> None:
    _, *others = run_ranks(others_in_a_failed_section, 3)
    assert others == ["rank 0 failed in main_first: Ours: no such data set"] * 2


def test_rank_zeros_error_in_a_section_ends_the_run() -> None:
    with pytest.raises(Ours, match="no such data set"):
        run_ranks(in_a_section, 3, "raise", "global", 0.0, timeout_s=20)


def test_rank_zeros_death_in_a_section_ends_the_run() -> None:
    with pytest.raises(RankDied, match="rank 0 ended with exit code -9"):
        run_ranks(in_a_section, 3, "die", "global", 0.0, timeout_s=20)


def late(missing: list[int]) -> str:
    with ddpkit.runtime(timeout_s=30) as rt:
        if rt.rank in missing:
            return ""
        with pytest.raises((RanksMissing, RankFailed)) as caught:
            rt.barrier("data are there", timeout_s=3.0)
        return str(caught.value)


@pytest.mark.parametrize("missing", [[1], [0, 3]])
def test_a_barrier_names_the_ranks_that_did_not_come(missing: list[int]) -> None:
    messages = run_ranks(late, 4, missing)
    for rank, message in enumerate(messages):
        if rank not in missing:
            assert "data are there: after 3 s these ranks have not come" in message
            assert str(missing) in message


def fails_in_mid_step(kind: str, waiting_in: str) -> float:
    """Rank 1 fails while the others wait for it; how long they wait is up to the caller's time limit."""
    with ddpkit.runtime(timeout_s=600) as rt:
        dist.all_reduce(torch.ones(1))
        if rt.rank == 1:
            if kind == "exit":
                sys.exit(3)
            raise Ours("mid-step")
        if waiting_in == "collective":
            dist.all_reduce(torch.ones(1))
        elif waiting_in == "barrier":
            rt.barrier("never")
        else:
            with rt.main_first():
                rt.barrier("never")
    return 0.0


def told_of_a_failure(waiting_in: str) -> str:
    try:
        fails_in_mid_step("raise", waiting_in)
    except (Ours, RankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("waiting_in", ["collective", "barrier", "section"])
def test_the_others_end_with_the_cause_of_a_failure_in_mid_step(waiting_in: str) -> None:
    first, failed, third = run_ranks(told_of_a_failure, 3, waiting_in, timeout_s=20)
    assert failed == "Ours: mid-step"
    assert first == third == "RankFailed: rank 1 failed: Ours: mid-step"


@pytest.mark.parametrize("waiting_in", ["collective", "barrier"])
def test_a_failure_in_mid_step_is_what_the_caller_gets(waiting_in: str) -> None:
    with pytest.raises(Ours, match="mid-step"):
        run_ranks(fails_in_mid_step, 3, "raise", waiting_in, timeout_s=20)


def test_leaving_with_an_exit_code_does_not_wait_for_the_others() -> None:
    with pytest.raises(SystemExit):
        run_ranks(fails_in_mid_step, 3, "exit", "barrier", timeout_s=20)


def all_exit() -> None:
    with ddpkit.runtime(timeout_s=20):
        sys.exit(0)


def test_all_may_exit_in_order() -> None:
    with pytest.raises(SystemExit) as caught:
        run_ranks(all_exit, 2)
    assert caught.value.code == 0


# Stopping.


def steps_until_stopped(seed: int, mode: str, limit: int) -> tuple[int, str | None]:
    """Steps with a collective in each, at a pace of its own on each rank; where this rank stopped, and why."""
    mine = random.Random(seed * 100 + int(os.environ["RANK"]))
    rt_seed = random.Random(seed)
    with ddpkit.runtime(timeout_s=20) as rt:
        asker, at = rt_seed.randrange(rt.world_size), rt_seed.randrange(1, 60)
        done = 0
        while done < limit and (reason := rt.stop.poll()) is None:
            if mode == "all" and done == at:
                rt.stop.request(f"by {rt.rank}")
            elif mode == "one" and rt.rank == asker and done == at:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(mine.random() * 0.004)
            dist.all_reduce(torch.ones(1))
            done += 1
        return done, reason if done < limit else None


def many_stops(mode: str, times: int) -> list[tuple[int, str | None]]:
    return [steps_until_stopped(seed, mode, 100_000) for seed in range(times)]


@pytest.mark.parametrize("mode", ["one", "all"])
def test_a_request_on_any_rank_stops_all_after_the_same_step(mode: str) -> None:
    first, *others = run_ranks(many_stops, 3, mode, 8)
    assert all(found == first for found in others)
    for done, reason in first:
        assert done > 0
        assert reason == "SIGTERM" if mode == "one" else str(reason).startswith("by ")


def many_ends() -> list[tuple[int, str | None]]:
    found = []
    for seed in range(8):
        found.append(steps_until_stopped(seed, "none", 5))
        with ddpkit.runtime(timeout_s=20) as rt:
            # A request that comes while the ranks leave: some have stopped looking by then.
            time.sleep(0.01 * seed * (rt.rank + 1))
            if rt.rank != seed % rt.world_size:
                rt.stop.request("too late")
    return found


def test_a_request_that_comes_when_the_ranks_leave_holds_up_nobody() -> None:
    first, *others = run_ranks(many_ends, 3)
    assert all(found == first == [(5, None)] * 8 for found in others)


def stop_while_waiting() -> tuple[int, str | None]:
    """Rank 1 is asked while it is inside a collective, which rank 0 enters only afterwards."""
    with ddpkit.runtime(timeout_s=30) as rt:
        done, reason = 0, None
        while (reason := rt.stop.poll()) is None:
            if rt.rank == 1 and done == 3:
                rt.stop.request("asked inside")
            if rt.rank == 0 and done == 3:
                deadline = time.monotonic() + 15
                while not rt.store.check(["stop/reason"]) and time.monotonic() < deadline:
                    time.sleep(0.01)
            dist.all_reduce(torch.ones(1))
            done += 1
        return done, reason


def test_a_rank_inside_a_collective_is_asked_too() -> None:
    first, second = run_ranks(stop_while_waiting, 2)
    assert first == second
    assert first[0] >= 4
    assert first[1] == "asked inside"


def test_a_single_process_stops_at_the_next_step() -> None:
    with ddpkit.runtime() as rt:
        assert rt.stop.poll() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert rt.stop.poll() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # asked already: Ctrl-C now ends at once
            time.sleep(10)


# The runtime.


def one_after_the_other() -> list[Any]:
    found: list[Any] = []
    for number in range(3):
        with ddpkit.runtime(seed=number, timeout_s=20) as rt:
            found.append(rt.ranks.exchange("values", [number, rt.rank]))
            tensor = torch.tensor(float(rt.rank))
            dist.all_reduce(tensor)
            found.append([float(tensor), rt.stop.poll()])
            try:
                with rt.main_first():
                    if number == 1 and rt.is_main:
                        raise Ours
            except (Ours, RankFailed) as error:
                found.append(type(error).__name__ if rt.is_main else str(error))
            if number == 0:
                rt.stop.request("the first one only")
        assert not dist.is_initialized()
    return found


def test_one_runtime_may_follow_another() -> None:
    found = run_ranks(one_after_the_other, 2)
    for rank, values in enumerate(found):
        failure = "Ours" if rank == 0 else "rank 0 failed in main_first: Ours: "
        assert values == [
            [[0, 0], [0, 1]],
            [1.0, None],
            [[1, 0], [1, 1]],
            [1.0, None],
            failure,
            [[2, 0], [2, 1]],
            [1.0, None],
        ]


def with_a_group_of_its_own() -> str:
    dist.init_process_group("gloo", init_method=None, store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError) as caught, ddpkit.runtime(timeout_s=20):
            pass
        return str(caught.value)
    finally:
        dist.destroy_process_group()


def test_a_process_group_that_exists_already_is_refused() -> None:
    for message in run_ranks(with_a_group_of_its_own, 2):
        assert "enter ddpkit.runtime() instead of calling init_process_group" in message


def test_a_single_process_needs_no_group() -> None:
    with ddpkit.runtime(world=World()) as rt:
        assert not dist.is_initialized()
        assert (rt.rank, rt.world_size, rt.local_rank, rt.is_main) == (0, 1, 0, True)
        rt.barrier("alone")
        with rt.main_first(), rt.main_first("node"):
            pass
        with pytest.raises(ValueError, match="choose 'global' or 'node'"), rt.main_first("machine"):
            pass


# Means.


def means() -> list[Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        me = rt.rank
        nothing = float("nan") if me == 1 else 4.0
        mapping = {"a": float(me), "b": torch.tensor([me, 2.0 * me])}
        return [
            rt.mean(me),
            rt.mean(me, weights=me + 1),
            rt.mean(nothing, weights=0 if me == 1 else 2.5),
            {name: torch.as_tensor(value).tolist() for name, value in rt.mean(mapping).items()},
            rt.mean(dict(reversed(mapping.items())))["a"] if me else rt.mean(mapping)["a"],
            rt.mean(torch.tensor([[True], [me == 0]])).tolist(),
            rt.mean(torch.tensor(1.5 + me, dtype=torch.bfloat16, requires_grad=True)).item(),
            rt.mean(2**53 + me) if me else rt.mean(2**53),
        ]


def test_means_are_exact() -> None:
    expected = [1, 8 / 6, 4.0, {"a": 1.0, "b": [1.0, 2.0]}, 1.0, [[1.0], [1 / 3]], 2.5, 2**53 + 1]
    for found in run_ranks(means, 3):
        for value, wanted in zip(found, expected, strict=True):
            assert value == (wanted if isinstance(wanted, (dict, list)) else pytest.approx(wanted, abs=1e-15))


def odd_means() -> list[str]:
    messages = []
    with ddpkit.runtime(timeout_s=20) as rt:
        for values, weight in (({"a": 1} if rt.rank else {"b": 1}, 1), (torch.ones(2 + rt.rank), 1), (1.0, 0)):
            with pytest.raises((UserError, ValueError)) as caught:
                rt.mean(values, weights=weight)
            messages.append(str(caught.value))
    return messages


def test_means_of_different_things_are_refused() -> None:
    for names, shapes, weights in run_ranks(odd_means, 2):
        assert "ranks [1] gave other names or shapes than rank 0" in names
        assert "[[2]]" in shapes and "[[3]]" in shapes
        assert "a mean needs more than 0" in weights


def _come_late() -> None:
    with ddpkit.runtime(timeout_s=5.0) as rt:
        model = rt.wrap(torch.nn.Linear(2, 1))
        if rt.rank == 1:
            time.sleep(30)  # the late one
        model(torch.ones(1, 2)).sum().backward()


def test_a_rank_that_does_not_come_to_a_collective_is_named_with_its_place() -> None:
    with pytest.raises(CollectiveTimeout, match=r"(?s)within 5 s.*rank 1 .*in _come_late: time\.sleep\(30\)"):
        run_ranks(_come_late, 3)


class PublishedLate(HashStore):
    """Rank zero publishes its word, and fails of it, while rank 1 is between two looks."""

    def check(self, keys: list[str]) -> bool:
        found = super().check(keys)
        if keys == ["failed"]:
            self.set("word/0/all", "[1, 2]")
            self.set("failed", '[0, "cause"]')
            return True
        return found


def test_an_agreement_that_has_been_reached_is_heard_by_all_before_the_failure_that_follows() -> None:
    ranks = Ranks(World(rank=1, world_size=2, local_rank=1, local_world_size=2), PublishedLate())
    assert ranks.exchange("word", 2) == [1, 2]
    with pytest.raises(RankFailed, match="rank 0 failed: cause"):
        ranks.exchange("another", 2)
