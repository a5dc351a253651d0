"""The page about a run: what it shows, that it is thinned without losing a spike, and that nothing in it is alive."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import curves, drawing, report
from launch.curves import COLUMNS, Curve
from tests.histories import START, History, Tree
from tests.resume.runs import cli

HOSTILE: str = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b]0;\x07\ud800"


TAGS = {"html", "head", "meta", "link", "title", "style", "body", "main", "header", "footer", "section", "h1", "h2"}
TAGS |= {"p", "b", "i", "small", "span", "div", "dl", "dt", "dd", "pre", "figure", "figcaption", "svg", "path", "rect"}
TAGS |= {"details", "summary", "table", "thead", "tbody", "tr", "th", "td"}


class Elements(HTMLParser):
    """The tags of a page and their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile(run_dir: Path) -> Path:
    """A run everything about which wants to be a script."""
    made = History(run_dir)
    made.attempt(0, 0, 30, how=HOSTILE, exit_code=1, launcher=HOSTILE, job=HOSTILE, requeued=HOSTILE, ranks=HOSTILE)
    made.event("started", 0, 3, step=0, world_size=2)
    made.event("skipped", 0, 9, step=4, cause=HOSTILE)
    made.event("failed", 0, 30, step=HOSTILE, cause=HOSTILE)
    for step in range(10, 60, 10):
        values: Tree = {HOSTILE: 1.0 / step, f"lr/{HOSTILE}": 0.1, "text": HOSTILE}
        made.train(step, step, **values)
    made.evaluate(50, 52, **{HOSTILE: 0.5})
    tree: Tree = {
        "rank": HOSTILE,
        "host": HOSTILE,
        "kind": HOSTILE,
        "message": HOSTILE,
        "traceback": HOSTILE,
        "log": HOSTILE,
    }
    tree |= {"last_lines": [HOSTILE], "others": [{"rank": HOSTILE, "message": HOSTILE}, HOSTILE], "attempt": HOSTILE}
    (run_dir / "failure.json").write_text(json.dumps(tree))
    (run_dir / "config.yaml").write_text(f"model: {{args: {{name: {HOSTILE[:-1]}}}}}</pre><script>alert(3)</script>")
    return made.write()


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300), st.integers(1, 40))
def test_thinned_curves_keep_every_extreme_the_first_and_the_last(values: list[float], gap: int) -> None:
    steps = [float(gap * place) for place in range(len(values))]
    curve = Curve(steps[-1])
    for step, value in zip(steps, values, strict=True):
        curve.add(step, value)
    points = curve.points()
    assert points == sorted(points) and set(points) <= set(zip(steps, values, strict=True))
    assert points[0] == (steps[0], values[0]) and points[-1] == (steps[-1], values[-1])
    assert (curve.low, curve.high, curve.last) == (min(values), max(values), values[-1])
    assert {curve.low, curve.high} <= {y for _, y in points}


def test_a_spike_among_a_million_steps_stays_and_little_else() -> None:
    curve = Curve(1_000_000)
    for step in range(0, 1_000_000, 7):
        curve.add(step, 1e6 if step == 333_333 - 333_333 % 7 else math.sin(step))
    points = curve.points()
    assert (333_333 - 333_333 % 7, 1e6) in points
    assert len(points) <= 4 * COLUMNS
    assert curve.count == len(range(0, 1_000_000, 7))


def test_a_curve_of_few_points_is_all_there() -> None:
    curve = Curve(100)
    for step in range(0, 101, 5):
        curve.add(step, step % 3)
    assert curve.points() == [(step, step % 3) for step in range(0, 101, 5)]


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [5e-324, 1e-320],
        [1e299, -1e299],
        [math.nan, math.inf, -math.inf, 10**400, 1.0],
        [1e16, 1e16 + 2],
        [3e-14, 4e-14],
        [1e-9, 1e9],
        [-1.0, -1.0],
        [math.nan],
    ],
)
@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("span", [0, 7])
def test_any_values_make_a_chart_or_none(values: list[float], from_zero: bool, span: int) -> None:
    curve = Curve(span)
    for step, value in enumerate(values):
        curve.add(step, value)
    made = drawing.chart("it", {"it": curve}, span, from_zero=from_zero)
    finite = sum(abs(value) < 1e300 for value in values)
    assert (made != "") == (finite > 0) == (curve.count > 0)
    numbers = [float(each) for path in re.findall(r' d="([^"]*)"', made) for each in re.findall(r"-?[\d.]+", path)]
    assert all(-1 <= each <= 1001 for each in numbers)
    assert "nan" not in made and "inf" not in made
    assert curve.missing == len(values) - finite and (not made or ("not finite" in made) == bool(curve.missing))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 440, [0, 100, 200, 300, 400]),
        (-0.3, 0.3, [-0.2, 0, 0.2]),
        (3, 3, [3]),
        (0, 3e-14, [0, 1e-14, 2e-14, 3e-14]),
    ],
)
def test_scales_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert drawing.nice_steps(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [
        (4503.4, 3, "4503"),
        (0.00012345, 3, "0.000123"),
        (12345, 4, "12.35k"),
        (64_000, 4, "64k"),
        (-2.5e6, 4, "-2.5M"),
        (1e17, 4, "1e+17"),
        (math.nan, 4, "nan"),
    ],
)
def test_numbers_are_short(value: float, digits: int, words: str) -> None:
    assert drawing.number(value, digits) == words


def test_numbers_that_are_close_are_told_apart(tmp_path: Path) -> None:
    curve = Curve(1)
    curve.add(0, 1.00001)
    curve.add(1, 1.00002)
    ticks = re.findall(r"%\">([^<]*)</span>", drawing.chart("it", {"it": curve}, 1).partition("<svg")[0])
    assert len(set(ticks)) == len(ticks) > 2


def test_nothing_that_a_run_has_written_is_alive_in_its_page(tmp_path: Path) -> None:
    made = report.page(hostile(tmp_path))
    made.encode("utf-8")
    assert "\x1b" not in made
    elements = Elements(made)
    assert {tag for tag, _ in elements.found} <= TAGS
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.keys() & {"src", "href"} <= ({"href"} if tag == "link" else set())
    assert elements.text.count("<script>alert(1)</script>") > 10
    assert "<script>alert(3)</script>" in elements.text


def test_what_the_page_shows(tmp_path: Path) -> None:
    made = History(tmp_path)
    made.attempt(0, 0, 30, how="rank 1 was killed", exit_code=1)
    made.event("started", 0, 3, step=0, world_size=2)
    for step in range(10, 110, 10):
        made.train(step, at=3 + step / 10)
    made.event("saved", 0, 9, step=50, bytes=12_300_000, seconds=0.5, held_s=0.001)
    made.event("restored", 1, 40, step=50, world_size=2)
    made.evaluate(100, 50)
    (tmp_path / "failure.json").write_text(json.dumps({"rank": 1, "host": "n1", "message": "was killed", "others": 3}))
    text = Elements(report.page(made.write())).text
    for words in ("rank 1 on n1 failed", "was killed", "loss", "accuracy", "Learning rate", "Throughput", "Memory"):
        assert words in text, words
    for words in ("saves: 1", "failures and skipped steps", "Goodput", "forward and backward passes", "Dotted lines"):
        assert (words in text) == (words != "failures and skipped steps"), words
    page = report.page(tmp_path)
    assert page.count('class="mark"') == page.count("<figure")  # the restart, in each
    assert set(re.findall(r'data-points="(\d+)"', page)) == {"10", "1"}
    assert "0.01" in text and "0.02" in text and "seconds a step" in text  # each rank's wait for data


def test_a_run_of_which_next_to_nothing_is_known_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "started", "attempt": 0, "unix": "now"}\n')
    text = Elements(report.page(tmp_path)).text
    assert "interrupted" in text and "Curves" not in text


def test_ranks_are_compared_and_of_many_the_slowest_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    times = {"step_s": [0.1] * 100, "data_s": [0.0] * 99 + ["no"], "communication_s": [0.05] * 99 + [0.01]}
    lines = [{"kind": "train", "step": step, "time": {"by_rank": times, "unix": START}} for step in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recording = curves.read(path)
    assert (recording.span, len(recording.by_rank["step_s"]), recording.by_rank["step_s"][99].count) == (2, 100, 2)
    made = report._ranks(recording)
    assert made.count("<tr>") == 51 and 'data-name="rank">99<' in made and "Of 100 ranks the 50 that wait least" in made
    assert "waiting for data" not in made  # no rank did


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    out = tmp_path / "report.html"
    nothing = cli(capsys, "report", str(run_dir), "-o", str(out))
    assert nothing.code == 2 and "there is no run in it" in nothing.err and not out.exists()
    hostile(run_dir)
    for given_out, words in ((tmp_path / "no/report.html", "there is no directory"), (tmp_path, "is a directory")):
        refused = cli(capsys, "report", str(run_dir), "-o", str(given_out))
        assert (refused.code, refused.out) == (2, "") and words in refused.err
    assert cli(capsys, "report", str(run_dir)).code == 2  # -o is missing
    out.write_text("before")
    assert cli(capsys, "report", str(run_dir), "-o", str(out)).code == 0
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
