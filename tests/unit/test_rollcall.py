"""What follows from the answers to a roll-call."""

from __future__ import annotations

import threading
import zlib
from dataclasses import replace

from torch._C._distributed_c10d import HashStore

from ddpkit.rollcall import Answer, _is_busy, ask, asked, is_timeout, judge

WAITS = Answer("training", 7, "a collective", 10.0, collectives=30, at="train.py:9 in step: loss.backward()")
LATE = Answer("training", 7, None, 9.0, 29, "train.py:5 in step: lock.acquire()", ["  File train.py, line 5"])


def _judge(*answers: Answer | None, timeout_s: float = 10.0, is_stopping: bool = False) -> tuple[bool, str]:
    verdict = judge(dict(enumerate(answers)), lambda rank: f"is silent, says {rank}", timeout_s, is_stopping)
    return verdict.is_stalled, verdict.text


def test_a_late_rank_is_named_with_its_stack_and_who_waits_where() -> None:
    is_stalled, text = _judge(WAITS, LATE, WAITS)
    assert is_stalled
    assert text.splitlines()[0].startswith("rank 1 (training, 7 steps done) has done nothing for 9 s, at train.py:5")
    assert "rank 0 waits for a collective (its number 30), training" in text
    assert text.endswith("rank 1, Python stack:\n  File train.py, line 5")


def test_who_computes_is_told_from_who_waits() -> None:
    over, lock = threading.Event(), threading.Lock()
    lock.acquire()

    def compute() -> None:
        while not over.is_set():
            zlib.compress(bytes(1 << 20))  # without the interpreter's lock, as a backward pass

    threads = [threading.Thread(target=compute), threading.Thread(target=lock.acquire)]
    for thread in threads:
        thread.start()
    try:
        assert [_is_busy(thread) for thread in threads] == [True, False]
    finally:
        over.set()
        lock.release()
        for thread in threads:
            thread.join()


def test_who_has_a_question_to_answer_does_not_ask() -> None:
    store = HashStore()
    assert ask(store, 0, answered=0) == (1, True)
    assert ask(store, 2, answered=0) == (1, False) and asked(store) == 1
    assert ask(store, 2, answered=1) == (2, True)
    assert ask(store, 0) == (3, True)  # on a main thread: another thread answers meanwhile


def test_a_rank_without_an_answer_is_late() -> None:
    is_stalled, text = _judge(WAITS, None)
    assert is_stalled and text.startswith("rank 1 is silent, says 1\n")


def test_ranks_that_all_wait_have_parted() -> None:
    is_stalled, text = _judge(WAITS, replace(WAITS, waits_for="barrier end"))
    assert is_stalled and "parted ways" in text and "rank 1 waits for barrier end, training" in text


def test_a_rank_that_works_while_others_wait_is_let_be() -> None:
    for busy in (replace(LATE, phase="main_first"), replace(LATE, phase="saving"), replace(LATE, still_s=4.9)):
        is_stalled, text = _judge(WAITS, busy)
        assert not is_stalled and "rank 1 (" in text


def test_one_stuck_rank_is_enough_beside_one_that_works() -> None:
    is_stalled, text = _judge(WAITS, replace(LATE, phase="saving", stack=["  File other"]), LATE)
    assert is_stalled and "rank 2, Python stack" in text and "File other" not in text


def test_nobody_waits() -> None:
    is_stalled, text = _judge(LATE, LATE)
    assert not is_stalled and text.startswith("no rank waits for another:\nrank 0 (training")


def test_who_has_been_asked_to_stop_is_stuck_though_nobody_waits_for_it() -> None:
    is_stalled, text = _judge(LATE, replace(LATE, still_s=1), is_stopping=True)
    assert is_stalled and text.count("Python stack") == 1 and "rank 0, Python stack:\n  File train.py" in text
    busy, saving = replace(LATE, is_busy=True), replace(LATE, phase="saving")
    for others in ((), (WAITS,)):
        assert not _judge(busy, saving, *others, is_stopping=True)[0]
    assert _judge(busy, WAITS)[0]  # with all the time that there is for a step


def test_on_a_gpu_the_count_of_collectives_tells_who_waits() -> None:
    ahead = replace(LATE, collectives=30, at="train.py:9 in step: loss.item()")
    is_stalled, text = _judge(ahead, LATE, ahead)
    assert is_stalled and "rank 2 waits for a collective (its number 30)" in text
    assert text.startswith("rank 1 (") and "rank 0, Python stack" not in text
    assert not _judge(replace(ahead, still_s=1), replace(LATE, still_s=1))[0]  # in passing


def test_the_words_of_a_timeout() -> None:
    gloo = "[unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete"
    nccl = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=9)"
    assert is_timeout(RuntimeError(gloo)) and is_timeout(RuntimeError(nccl))
    assert not is_timeout(RuntimeError("Connection closed by peer [127.0.0.1]:1234"))
