"""`ddpkit report` of a run that was killed and went on, and of hostile ones, in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.launch import browser
from tests.launch.browser import Page
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import cli, start, tree
from tests.unit.test_report import hostile


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in its eleventh step, and gone on from the eighth."""
    folder = tmp_path_factory.mktemp("killed")
    config = tree(folder / "run", log_every=1, checkpoint={"every_steps": 4, "keep": 3, "asynchronous": False})
    env = plan(folder / "faults", Fault("train", 11, whom="group"))
    assert start(config, 2, env) == "killed"
    assert start(config, 2, env, attempt=1) == "done"
    assert not pending(folder / "faults")
    return folder / "run"


def test_status_of_a_run_that_was_killed_and_went_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
    assert (found["state"], found["step"], found["total_steps"], found["eta_s"]) == ("finished", 18, 18, 0)
    assert [(each["from_step"], each.get("to_step")) for each in found["attempts"]] == [(0, None), (8, 18)]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 19))  # each once
    evaluations = sum(line["time"]["eval_s"] for line in lines if line["kind"] == "eval")
    account = found["account"]
    assert account["evaluation_s"] == pytest.approx(evaluations, abs=1e-3)
    assert account["saving_s"] > 0
    # A line has each step here; what is between two of them and no evaluation or save is the step.
    steps = sum(line["time"]["step_s"] for line in trained)
    assert 0 < account["steps_s"] <= steps + 1e-3
    assert steps <= account["steps_s"] + evaluations + account["saving_s"] + 1e-2
    assert found["goodput"] == pytest.approx(account["steps_s"] / account["wall_s"])
    assert sum(seconds for name, seconds in account.items() if name != "wall_s") == pytest.approx(account["wall_s"])
    assert found["slowest_phase"] == max(found["phases"], key=found["phases"].get)
    for line in trained:
        by_rank = line["time"]["by_rank"]
        assert all(len(by_rank[name]) == 2 for name in ("step_s", "data_s", "communication_s"))
        assert min(by_rank["step_s"]) > 0
    text = cli(capsys, "status", str(run_dir)).out
    assert f"[{'#' * 30}] 100 %" in text and "step 18 of 18, epoch 2 of 3" in text
    assert re.search(r"^goodput: \d+%; of .* since the first start:$", text, re.MULTILINE)


def page_fits(page: Page, path: Path, width: int) -> None:
    assert page.requests == [path.as_uri()]
    assert page.complaints == []
    assert page.value("window.innerWidth") == width
    widest = page.value(
        "JSON.stringify([...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right >"
        " window.innerWidth + 0.5).map(e => e.outerHTML.slice(0, 200)))"
    )
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth"), widest
    assert json.loads(widest) == []


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Debian's chromium: .ci/install-chromium")
def test_the_page_in_a_browser(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_path, bad_path = tmp_path / "report.html", tmp_path / "bad.html"
    (tmp_path / "bad").mkdir()
    for source, path in ((run_dir, page_path), (hostile(tmp_path / "bad"), bad_path)):
        assert cli(capsys, "report", str(source), "-o", str(path)).code == 0
    with browser.page() as page:
        backgrounds = set()
        for width, dark, scripts in ((360, False, True), (1200, False, False), (360, True, True), (1200, True, True)):
            page.open(page_path, width, dark=dark, scripts=scripts)
            page_fits(page, page_path, width)
            backgrounds.add(page.value("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2  # light and dark
        assert page.value("document.scripts.length") == 0
        charts = page.value("[...document.querySelectorAll('figure b:first-child')].map(e => e.textContent)")
        assert {"loss", "Learning rate", "Throughput", "Time of a step", "Memory"} <= set(charts)
        # Each curve is drawn, and inside of its picture.
        drawn = page.value(
            "[...document.querySelectorAll('path.line')].map(e => [e, e.getBBox()])"
            ".map(([e, b]) => [+e.dataset.points, b.width, b.x, b.x + b.width, b.y, b.y + b.height])"
        )
        assert len(drawn) >= len(charts)
        for points, width, left, right, top, bottom in drawn:
            assert points in (3, 18) and width > 500
            assert -1 <= left < right <= 1001 and -1 <= top <= bottom <= 301
        assert page.value("document.querySelectorAll('.lane rect.saved').length") > 0
        text = page.value("document.body.innerText")
        assert "rank" in text and "failed" not in text
        for width in (360, 1200):
            page.open(bad_path, width)
            page_fits(page, bad_path, width)
        assert page.value("document.scripts.length + document.images.length") == 0
        assert "<script>alert(1)</script>" in page.value("document.body.innerText")
