"""The whole program killed, started twice, superseded; what `ddpkit status` says meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

from ddpkit.checkpoint import listing
from tests import toy
from tests.resume import faults
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import (
    ROOT,
    Tree,
    assert_same_end,
    cli,
    events,
    marked,
    metrics,
    shell,
    start,
    started,
    tree,
    until,
    write,
)


@pytest.mark.slow
def test_whatever_is_killed_the_same_command_at_once_goes_on(tmp_path: Path) -> None:
    changes = {"data__loader": {"num_workers": 2}, "checkpoint": {"every_steps": 2}}
    assert start(tree(tmp_path / "reference", **changes), 2) == "done"
    config = write(tmp_path / "c.yaml", tree(tmp_path / "run", **changes))
    env = plan(
        tmp_path / "faults",
        Fault("train", 4, whom="grandparent"),  # the launcher
        Fault("open", 2, rank=1, path="own-00001", whom="parent"),  # in a save, the process that started the ranks
        Fault("fetch", 3, rank=1),  # a loader worker
        Fault("eval", 1, rank=1),  # one rank
        Fault("train", 3, rank=1, whom="all"),
    )
    mark = uuid.uuid4().hex
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        assert len(codes) < 10, codes
        # No waiting for the ranks of the launcher before: the new one has to.
        ended = subprocess.run(
            [sys.executable, "-m", "ddpkit", "run", str(config)],
            cwd=ROOT,
            env=os.environ | env | {"TOY_RUN": mark},
            capture_output=True,
            timeout=100,
        )
        codes.append(ended.returncode)
    assert not pending(tmp_path / "faults")
    # The launcher was killed twice; otherwise it told of a failure. Of how many is not fixed: workers fetch ahead and
    # saves go on beside training, so that two accidents may fall into one attempt.
    assert codes.count(-signal.SIGKILL) == 2 and set(codes[:-1]) == {-signal.SIGKILL, 1}
    until(lambda: not marked(mark), 30)
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    attempts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "attempts").iterdir())]
    assert [attempt.get("exit_code") for attempt in attempts] == [code if code >= 0 else None for code in codes]
    assert {attempt["ranks"] for attempt in attempts} == {2}
    assert all((tmp_path / "run" / "logs" / f"attempt-{number}").is_dir() for number in range(len(codes)))


def slow(run_dir: Path) -> Tree:
    return tree(run_dir, train__step="tests.resume.test_from_the_shell:waiting_step")


def waiting_step(model: nn.Module, batch: Any) -> Any:
    """At the fifth pass, waits for the test's word, or for a stop."""
    if faults.watch().come_to("train") == 5:
        gate = Path(os.environ["TOY_GATE"])
        (gate / f"waiting-{os.environ['RANK']}").touch()
        until(lambda: (gate / "open").exists() or faults.is_agreed())
    return toy.step(model, batch)


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_is_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, config = tree(tmp_path / "reference"), str(write(tmp_path / "c.yaml", slow(tmp_path / "run")))
    assert start(reference, 2) == "done"
    run_dir, env = tmp_path / "run", {"TOY_GATE": str(tmp_path)}
    with started("run", config, env=env) as first:
        until(lambda: (tmp_path / "waiting-0").exists() and (tmp_path / "waiting-1").exists())
        until(lambda: bool(events(run_dir, "saved")))  # beside training
        until(lambda: "step 3" in (run_dir / "logs/attempt-0/rank-0.log").read_text())  # by the launcher
        before = _files(run_dir)
        second = shell("run", config, env=env)
        assert second.code == 2
        holder = json.loads((run_dir / "claim.json").read_text())["claimant"]
        assert f"pid {holder['process']['pid']} on {holder['place']['host']}" in second.err
        assert holder["process"]["pid"] in [child.pid for child in psutil.Process(first.pid).children(recursive=True)]
        assert _files(run_dir) == before

        status = cli(capsys, "status", str(run_dir), "--json")
        found = json.loads(status.out)
        assert (found["state"], found["step"], found["saved_step"]) == ("running", 4, 4)
        assert found["checkpoints"] == {"4": "intact"}
        assert found["metrics"]["train"]["step"] == 3
        assert found["attempts"][0]["ranks"] == 2
        assert "running, step 4" in cli(capsys, "status", str(run_dir)).out
        evaluated = shell("eval", str(run_dir), "-o", "launch.nproc_per_node=1", env=env)  # beside the running one
        assert json.loads(evaluated.out)["step"] == 4
        (tmp_path / "open").touch()
        assert first.wait(100) == 0
    assert_same_end(run_dir, tmp_path / "reference")
    assert not (run_dir / "claim.json").exists()


def _files(run_dir: Path) -> dict[Path, int | str]:
    """Each with the time of its last change; the claim, whose holder touches it now and then, with its content."""
    return {path: path.read_text() if path.name == "claim.json" else _changed(path) for path in run_dir.rglob("*")}


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_of_two_started_together_one_trains(tmp_path: Path) -> None:
    assert start(tree(tmp_path / "reference"), 2) == "done"
    config, env = str(write(tmp_path / "c.yaml", slow(tmp_path / "run"))), {"TOY_GATE": str(tmp_path)}
    with started("run", config, env=env) as one, started("run", config, env=env) as other:
        until(lambda: one.poll() is not None or other.poll() is not None)
        (tmp_path / "open").touch()
        assert sorted([one.wait(100), other.wait(100)]) == [0, 2]
        refused = one if one.returncode == 2 else other
        assert refused.stderr is not None
        said = refused.stderr.read()
        assert "is in use by" in said and "Traceback" not in said
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def superseding_step(model: nn.Module, batch: Any) -> Any:
    """At the fifth pass, when the save of the fourth step has come as far as it is to, somebody else takes over."""
    if faults.watch().come_to("train") == 5 and os.environ["RANK"] == "0":
        path = Path(os.environ["TOY_CLAIM"])
        until(lambda: any((path.parent / "checkpoints").glob(os.environ["TOY_SAVED"])))
        claim = json.loads(path.read_text())
        claim["token"], claim["claimant"]["place"]["host"] = "another", "elsewhere"
        path.with_suffix(".new").write_text(json.dumps(claim))
        path.with_suffix(".new").replace(path)
    return toy.step(model, batch)


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_superseded_run_fails_clearly_and_commits_nothing_more(is_saved: bool, tmp_path: Path) -> None:
    """After a save, or while it is written."""
    config = tree(tmp_path, train__step="tests.resume.test_from_the_shell:superseding_step")
    held = [] if is_saved else [Fault("open", 1, path="own-00000", do="", until=6)]
    saved = "step-00000004" if is_saved else ".step-00000004*/main*"
    env = {"TOY_CLAIM": str(tmp_path / "claim.json"), "TOY_SAVED": saved} | plan(tmp_path / "faults", *held)
    end = start(config, 2, env, errors=True)
    assert end.startswith("Superseded") and "was taken over by" in end and "elsewhere" in end
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"][:is_saved]
    assert json.loads((tmp_path / "claim.json").read_text())["token"] == "another"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_from_the_shell_and_what_status_says(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = tmp_path / "run", str(write(tmp_path / "c.yaml", slow(tmp_path / "run")))
    env = {"TOY_GATE": str(tmp_path)}
    with started("run", config, env=env) as process:
        until(lambda: (tmp_path / "waiting-0").exists() and (tmp_path / "waiting-1").exists())
        process.send_signal(number)
        assert process.wait(100) == code
    (stopped,) = events(run_dir, "stopped")
    assert stopped["reason"] == number.name
    found = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
    assert (found["state"], found["saved_step"]) == ("stopped", stopped["step"])
    (tmp_path / "open").touch()
    assert shell("run", config, env=env).code == 0
    found = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
    assert (found["state"], found["step"]) == ("finished", 18)
    assert 0 < found["goodput"] <= 1
    assert [attempt["exit_code"] for attempt in found["attempts"]] == [code, 0]
    assert len(metrics(run_dir)) == 9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_killed_at_random_moments(ranks: int, tmp_path: Path) -> None:
    chance = random.Random(ranks)
    changes = {
        "launch": {"nproc_per_node": ranks, "cpus_per_rank": 1},  # as the ranks of the reference have
        "data__loader": {"num_workers": 2 * (ranks % 2)},
        "train__step": "tests.toy:slow_step",
        "train__epochs": 8,
    }
    assert start(tree(tmp_path / "reference", **changes), ranks) == "done"
    config = str(write(tmp_path / "c.yaml", tree(tmp_path / "run", **changes)))
    for attempt in range(9):
        with started("run", config) as process:
            time.sleep(chance.uniform(0.3, 5) if attempt < 8 else 0)  # the moment is what is random here
            if attempt < 8 and process.poll() is None:
                _kill_somebody(psutil.Process(process.pid), chance)
            code = process.wait(100)
        if code == 0:
            break
    assert code == 0
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    assert all(each.problem is None for each in listing.listing(tmp_path / "run"))


def _kill_somebody(launcher: psutil.Process, chance: random.Random) -> None:
    below = launcher.children(recursive=True)
    whom = chance.choice(["launcher", "all", "any", "any", "stop"])
    if whom == "stop":
        launcher.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
        return
    chosen = {"launcher": [launcher], "all": [*below, launcher], "any": [chance.choice(below or [launcher])]}[whom]
    for process in chosen:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
