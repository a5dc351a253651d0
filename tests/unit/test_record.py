from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ddpkit.record import JsonLines, Recorder, cut_metrics


def line(step: int, kind: str = "train") -> str:
    return json.dumps({"kind": kind, "step": step, "loss": 0.5}) + "\n"


@pytest.mark.parametrize(
    ("content", "step", "evaluated", "left"),
    [
        (line(1) + line(2) + line(3), 2, False, line(1) + line(2)),
        (line(1) + line(2) + line(2, "eval") + line(3), 2, True, line(1) + line(2) + line(2, "eval")),
        (line(1) + line(2) + line(2, "eval") + line(3), 2, False, line(1) + line(2)),
        (line(1) + line(2), 9, False, line(1) + line(2)),
        (line(1) + line(2), 0, False, ""),
        (line(1) + '{"kind": "tr', 9, False, line(1)),
        (line(1) + line(2).rstrip(), 9, False, line(1)),  # whole, but for its end: it may have been longer
        (line(1) + '{"ki\n' + line(2), 9, False, line(1) + '{"ki\n' + line(2)),  # lost to a full disk long ago
        (line(1) + "[3]\n" + line(2), 9, False, line(1)),
        (line(1) + "\0\0\0\0", 9, False, line(1)),
        ("", 9, False, ""),
    ],
)
def test_a_restore_keeps_the_lines_of_its_own_past(
    content: str, step: int, evaluated: bool, left: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    cut_metrics(path, step, evaluated)
    assert path.read_text() == left


def test_there_may_be_nothing_to_cut(tmp_path: Path) -> None:
    cut_metrics(tmp_path / "metrics.jsonl", 5, True)
    assert list(tmp_path.iterdir()) == []


def test_half_a_line_of_the_process_before_spoils_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line(1) + '{"event": "sav')
    lines = JsonLines(path)
    lines.write({"event": "started"})
    lines.write({"event": "saved"})
    lines.close()
    assert path.read_text() == line(1) + '{"event": "sav\n{"event": "started"}\n{"event": "saved"}\n'


FULL = """
    import logging, resource, signal, sys
    from pathlib import Path
    from ddpkit.record import JsonLines
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lines = JsonLines(Path(sys.argv[1]))
    lines.write({"n": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, resource.RLIM_INFINITY))
    lines.write({"n": 2})
    lines.write({"n": 3})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    lines.write({"n": 4})
    lines.make_durable()
"""


def test_a_full_disk_delays_lines_and_gives_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("cannot be written") == 1
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 3}\n{"n": 4}\n'  # none torn, none lost


def test_only_rank_zero_writes_and_what_depends_on_time_is_set_apart(tmp_path: Path) -> None:
    for is_main in (False, True):
        recorder = Recorder(tmp_path, is_main, attempt=3)
        recorder.open_metrics(0, evaluated=False)
        recorder.metrics("train", {"step": 1, "epoch": 0, "samples": 8}, {"loss": 0.25}, step_s=0.1)
        recorder.event("saved", step=1)
        recorder.make_durable()
        recorder.close()
        assert len(list(tmp_path.iterdir())) == 2 * is_main
    metric: dict[str, Any] = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert metric.pop("time").keys() == {"unix", "step_s"}
    assert metric == {"kind": "train", "step": 1, "epoch": 0, "samples": 8, "loss": 0.25}
    event: dict[str, Any] = json.loads((tmp_path / "events.jsonl").read_text())
    assert event.pop("unix") > 0
    assert event == {"event": "saved", "attempt": 3, "step": 1}


def test_a_value_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, True, attempt=0)
    recorder.open_metrics(0, evaluated=False)
    values = {"third": 1 / 3, "tiny": 5e-324, "large": 1.7976931348623157e308}
    recorder.metrics("eval", {"step": 1, "epoch": 0, "samples": 8}, values)
    recorder.close()
    found = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {name: found[name] for name in values} == values


def test_a_directory_that_vanishes_under_it_is_no_reason_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, True, attempt=0)
    recorder.open_metrics(0, evaluated=False)
    for path in tmp_path.iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        recorder.event("saved")
        recorder.make_durable()
        recorder.close()
    assert list(tmp_path.iterdir()) == []
