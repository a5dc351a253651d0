"""``ddpkit run`` as a user meets it: exit codes, what is left, and doing it again."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from tests.launch.shell import Shell


@pytest.mark.parametrize(
    "options", [(), pytest.param(("-o", "launch.start_method=spawn"), marks=pytest.mark.slow)], ids=["warm", "spawn"]
)
def test_done_and_again(shell: Shell, options: tuple[str, ...]) -> None:
    shell.config()
    done = shell.run("run", "config.yaml", *options)
    assert done.returncode == 0, done.stderr
    run_dir = shell.cwd / "run"
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "attempts", "checkpoints", "logs"} <= names
    assert "failure.json" not in names
    assert {path.name for path in (run_dir / "logs/attempt-0").iterdir()} == {"rank-0.log", "rank-1.log"}
    attempt = json.loads((run_dir / "attempts/attempt-0.json").read_text())
    assert (attempt["exit_code"], attempt["how"], attempt["ranks"]) == (0, "done", 2)
    again = shell.run("run", "config.yaml", *options)
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr == "ddpkit: run is finished: step 6\n"
    assert not (run_dir / "attempts/attempt-1.json").exists()


STEPS = """
import os, signal
import tests.toy

calls = 0

def step(model, batch):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK", "0") == os.environ["BAD_RANK"]:
        exec(os.environ["DO"])
    return tests.toy.step(model, batch)
"""


def _config_with(shell: Shell, **launch: object) -> None:
    shell.script("steps.py", STEPS)
    shell.config(
        launch={"nproc_per_node": 2} | launch,
        train={"step": "steps:step", "eval_step": "tests.toy:eval_step", "epochs": 3},
        checkpoint={"every_steps": 2},
    )


@pytest.mark.parametrize("code", ["raise ValueError('in the step')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_failing_rank_is_reported_once(shell: Shell, code: str) -> None:
    _config_with(shell)
    done = shell.run("run", "config.yaml", env={"BAD_RANK": "1", "DO": code})
    assert done.returncode == 1
    assert done.stderr.count(f"ddpkit: rank 1 on {socket.gethostname()} failed: ") == 1
    assert done.stderr.count("Traceback") == (1 if "ValueError" in code else 0), done.stderr
    kept = json.loads((shell.cwd / "run/failure.json").read_text())
    assert kept["rank"] == 1
    if "ValueError" in code:
        assert (kept["kind"], kept["message"]) == ("ValueError", "in the step")
        assert "steps.py" in kept["traceback"]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("os._exit(0)", None, "left with exit code 0 before the run was done"),
        pytest.param("raise SystemExit", "RuntimeError", "sys.exit() in the middle of the run", marks=pytest.mark.slow),
        pytest.param("raise SystemExit(75)", "RuntimeError", "sys.exit(75) in the middle of", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_leaves_a_run_early_is_the_cause(shell: Shell, code: str, kind: str | None, words: str) -> None:
    _config_with(shell)
    done = shell.run("run", "config.yaml", env={"BAD_RANK": "1", "DO": code})
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(f"ddpkit: rank 1 on {socket.gethostname()} failed: ") == 1 and words in done.stderr
    kept = json.loads((shell.cwd / "run/failure.json").read_text())
    assert (kept["rank"], kept["kind"]) == (1, kind)
    if kind is not None:
        assert "steps.py" in kept["traceback"]


KILLED_ONCE = """
import glob, time

if not os.path.exists("once"):
    while not glob.glob("run/checkpoints/step-*"):  # it is written beside training
        time.sleep(0.01)
    open("once", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_restart_goes_on_from_the_checkpoint(shell: Shell) -> None:
    _config_with(shell, max_restarts=1)
    done = shell.run("run", "config.yaml", env={"BAD_RANK": "1", "DO": KILLED_ONCE})
    assert done.returncode == 0, done.stderr
    assert "restarting all ranks (1 of 1)" in done.stderr
    attempts = [json.loads((shell.cwd / f"run/attempts/attempt-{n}.json").read_text()) for n in (0, 1)]
    assert [attempt["exit_code"] for attempt in attempts] == [1, 0]
    kinds = [json.loads(line)["event"] for line in (shell.cwd / "run/events.jsonl").read_text().splitlines()]
    assert "restore" in " ".join(kinds)


@pytest.mark.slow
def test_an_inline_run_is_interrupted_and_goes_on(shell: Shell) -> None:
    _config_with(shell)
    inline = ("--launcher", "inline", "-o", "launch.nproc_per_node=1")
    for attempt, (do, code) in enumerate([("os.kill(os.getpid(), signal.SIGINT)", 130), ("pass", 0)]):
        done = shell.run("run", "config.yaml", *inline, env={"BAD_RANK": "0", "DO": do})
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        record = json.loads((shell.cwd / f"run/attempts/attempt-{attempt}.json").read_text())
        assert (record["launcher"], record["exit_code"]) == ("inline", code)


def test_a_run_dir_that_cannot_be_written(shell: Shell) -> None:
    shell.script("taken", "")
    for run_dir in ("taken", "taken/below", "/proc/nowhere"):
        shell.config(run_dir=run_dir)
        done = shell.run("run", "config.yaml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"ddpkit: run_dir: {run_dir} cannot be written")
        done = shell.run("launch", "--run-dir", run_dir, "taken")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"ddpkit: run_dir: {run_dir} cannot be written")


def test_a_port_that_is_taken_is_one_message(shell: Shell) -> None:
    shell.config()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        inline = ("--launcher", "inline", "-o", "launch.nproc_per_node=1")
        done = shell.run("run", "config.yaml", *inline, env=env)
        assert done.returncode == 2
        assert done.stderr.startswith(f"ddpkit: MASTER_PORT={port} on 127.0.0.1 is taken by another process")
        assert "Traceback" not in done.stderr
        script = "import ddpkit\nwith ddpkit.runtime(): pass"
        plain = shell.run("-c", script, prefix=(sys.executable,), env=env)
        assert plain.returncode == 1
        assert f"UserError: MASTER_PORT={port} on 127.0.0.1 is taken" in plain.stderr
