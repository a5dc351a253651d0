"""The command line: its names, its refusals, and that neither needs torch, starts a process, or writes a thing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from tests.launch.shell import ROOT, Shell

# Runs many commands in one process, with an audit hook that sees every attempt to start one or to write a file.
DRIVER = """
import contextlib, io, json, os, sys
seen = []
def audit(event, arguments):
    if event in ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "subprocess.Popen", "os.mkdir", "os.rename"):
        seen.append(event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not str(arguments[0]).endswith(".pyc") and "__pycache__" not in str(arguments[0]):
            seen.append(f"open {arguments[0]}")
sys.addaudithook(audit)
import ddpkit.__main__ as entry
answers = []
for command in json.load(sys.stdin):
    sys.argv = ["ddpkit", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry.main()
        except SystemExit as leaving:
            code = leaving.code
    answers.append([code, out.getvalue(), err.getvalue(), [name for name in seen], "torch" in sys.modules])
    seen.clear()
json.dump(answers, sys.stdout)
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def _answers(shell: Shell, *commands: tuple[str, ...]) -> list[Any]:
    before = sorted(shell.cwd.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-B", "-c", DRIVER],
        input=json.dumps(commands),
        cwd=shell.cwd,
        env=shell.env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(shell.cwd.rglob("*")) == before
    answers = json.loads(done.stdout)
    for _, _, _, side_effects, torch_is_there in answers:
        assert side_effects == []
        assert not torch_is_there
    return [answer[:3] for answer in answers]


def test_help_needs_no_torch(shell: Shell) -> None:
    verbs = ("run", "launch", "eval", "status", "report", "export", "verify")
    for code, out, err in _answers(shell, ("--help",), *((verb, "--help") for verb in verbs)):
        assert (code, err) == (0, "")
        assert out.startswith("usage: ddpkit")


def test_dry_runs_say_what_would_be_done(shell: Shell) -> None:
    shell.config()
    shell.script("script.py", "raise SystemExit('it ran')")
    slurm = ("--launcher", "slurm", "-o", "launch.nproc_per_node=3", "--dry-run")
    run, launch, module, inline, submitted, swept = _answers(
        shell,
        ("run", "config.yaml", "--dry-run", "-o", "launch.nproc_per_node=3", "-o", "optimizer.args.lr=1e-3"),
        ("launch", "--dry-run", "--nproc-per-node", "4", "script.py", "--dry-run"),
        ("launch", "--dry-run", "-m", "script", "-x"),
        ("run", "--launcher", "inline", "-o", "launch.nproc_per_node=1", "--dry-run", "config.yaml"),
        ("launch", *slurm, "-o", "launch.slurm.partition=gpu", "script.py"),
        ("run", *slurm, "config.yaml", "--sweep", "seed=[1, 2]"),
    )
    assert run[0] == 0 and "lr: 0.001\n" in run[1] and "ranks: 3\n" in run[1] and "job: run run\n" in run[1]
    assert launch[0] == 0 and "ranks: 4\n" in launch[1] and "job: script script.py\n" in launch[1]
    assert module[0] == 0 and "job: module script\n" in module[1]
    assert inline[0] == 0 and "launcher: inline\nranks: 1\n" in inline[1]
    assert (
        submitted[0] == 0 and "#SBATCH --partition=gpu\n" in submitted[1] and "job: script script.py\n" in submitted[1]
    )
    assert submitted[2] == "ddpkit: --run-dir was not given; it is runs/script-0\n"
    assert swept[0] == 0 and "run 1: run/seed=2\n" in swept[1] and "#SBATCH --array=0-1%2\n" in swept[1]


def test_refusals_are_one_message_and_exit_code_2(shell: Shell) -> None:
    shell.config()
    shell.script("script.py", "")
    os.mkdir(shell.cwd / "empty")
    with zipfile.ZipFile(shell.cwd / "archive.pyz", "w") as archive:
        archive.writestr("main.py", "")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("run", "none.yaml"), "none.yaml"),
        (("run", "config.yaml", "-o", "trian.epochs=1"), "train"),
        (("run", "config.yaml", "--launcher", "lokal"), "launch.launcher"),
        (("run", "config.yaml", "-o", "launch.nproc_per_node=17"), "data.global_batch_size: 16"),
        (("run", "config.yaml", "-o", "model.factory=tests.toy:modle"), "model.factory"),
        (("run", "config.yaml", "-o", "launch.backend=nccl"), "launch.backend: nccl needs GPUs"),
        (("launch", "--nproc-per-node", "0", "script.py"), "launch.nproc_per_node"),
        (("launch", "--nproc-per-node", "-1", "script.py"), "launch.nproc_per_node"),
        (("launch", "--nproc-per-node", "abc", "script.py"), "launch.nproc_per_node"),
        (("launch", "--nproc-per-node", "", "script.py"), "launch.nproc_per_node"),
        (("launch", "--nnodes", "2", "script.py"), "launch.nnodes"),
        (("launch", "-o", "launch.nproc=2", "script.py"), "nproc_per_node"),
        (("launch", "-o", "seed=2", "script.py"), "seed"),
        (("launch", "-o", "nonsense", "script.py"), "nonsense"),
        (("launch", "--launcher", "inline", "script.py"), "launch.launcher: inline"),
        (("launch", "--launcher", "slurm", "script.py"), "launch.nproc_per_node: auto cannot look at the nodes"),
        (
            ("run", "config.yaml", "--launcher", "slurm", "-o", "launch.slurm.partiton=x"),
            "launch.slurm.partiton: unknown",
        ),
        (("run", "config.yaml", "--launcher", "slurm", "--sweep", "sede=[1]"), "sede: unknown key"),
        (("doctor", "--launcher", "slurm"), "srun --nodes=2 --ntasks-per-node=2 ddpkit doctor"),
        (("run", "config.yaml", "--sweep", "seed=[1]"), "--sweep: an array of runs is for --launcher slurm"),
        (("launch", "missing.py"), "there is no file missing.py in"),
        (("launch", "empty"), "empty has no __main__.py"),
        (("launch", "archive.pyz"), "archive.pyz has no __main__.py"),
        (("launch", "-m", "no_such_module"), "there is no module no_such_module"),
        (("launch", "-m"), "nothing to launch"),
        (("launch",), "nothing to launch"),
        (("launch", "--"), "nothing to launch"),
        (("eval", "empty"), "config.yaml"),
        (("status", "empty"), "empty"),
        (("report", "empty", "-o", "report.html"), "empty"),
        (("report", "empty", "-o", "none/report.html"), "there is no directory"),
        (("verify", "empty"), "empty"),
        (("verify", "none"), "none"),
    ]
    if Path("/dev/nvidia0").exists():
        cases = [case for case in cases if "launch.backend=nccl" not in case[0]]
    for (command, words), (code, out, err) in zip(cases, _answers(shell, *(case[0] for case in cases)), strict=True):
        assert (code, out) == (2, ""), (command, code, out, err)
        assert err.startswith("ddpkit: ") and words in err, (command, err)
        assert "Traceback" not in err


def test_the_names_on_the_command_line_are_a_contract() -> None:
    expected = {
        "run": "--accept-change --dry-run --help --launcher --sweep --tee --wait -h -o",
        "launch": "--dry-run --help --launcher --nnodes --nproc-per-node --run-dir --tee --wait -h -m -o",
        "eval": "--best --dry-run --ema --help --launcher --step --tee --wait -h -o",
        "status": "--help --json -h",
        "report": "--help -h -o",
        "export": "--best --ema --help --step -h",
        "verify": "--help -h",
    }
    for verb, options in expected.items():
        parser = cli._parser()._subparsers
        assert parser is not None
        found = parser._group_actions[0].choices[verb]._option_string_actions  # type: ignore[index]  # argparse offers no public way
        assert sorted(found) == options.split()


def test_the_three_ways_in_whatever_lies_in_the_current_directory(shell: Shell) -> None:
    shell.script("script.py", "")
    for name in ("random", "tempfile", "logging", "pydantic", "launch_", "torch", "config"):
        shell.script(f"{name}.py", "raise ImportError('the user's own'.replace(' ', '-'))".replace("user's", "user"))
    command = ("launch", "--dry-run", "--nproc-per-node", "1", "script.py")
    ways = ([sys.executable, "-m", "ddpkit"], [sys.executable, "-m", "launch"], ["ddpkit"])
    env = shell.env(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    outs = set()
    for way in ways:
        done = subprocess.run([*way, *command], cwd=shell.cwd, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), (way, done.stderr)
        outs.add(done.stdout)
    shell.script("launch.py", "raise ImportError('the own launch.py')")
    for way in (ways[0], ways[2]):
        done = subprocess.run([*way, *command], cwd=shell.cwd, env=env, capture_output=True, text=True, timeout=60)
        outs.add(done.stdout)
    assert len(outs) == 1


def test_the_layers_import_one_way() -> None:
    for path in (ROOT / "ddpkit").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) launch\b", path.read_text(), re.MULTILINE), path
    for path in (ROOT / "launch").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) launch\b", text, re.MULTILINE), path
        if path.name not in ("export.py", "meeting.py", "torch_agent.py"):  # loaded late; by the agent alone
            assert not re.search(r"^(from|import) torch\b", text, re.MULTILINE), path
    others = {"inline", "local", "torchrun", "slurm"}
    for name in others:
        text = (ROOT / f"launch/launchers/{name}.py").read_text()
        assert not any(re.search(rf"from \.{other}\b|import {other}\b", text) for other in others - {name})
