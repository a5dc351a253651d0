"""Every example under every launcher, as a reader starts it; those for Slurm as dry runs. tests/slurm has a cluster."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.finetune.pretrain import pretrain
from tests.examples.starting import EXAMPLES
from tests.launch.shell import ROOT, Shell
from tests.resume.runs import metrics

CONFIGS = {  # and what makes them smaller
    "segmentation": ("data.train.args.count=32", "data.eval.args.count=5"),
    "finetune": (),
    "language_model": ("data.train.args.megabytes=0.1", "data.eval.args.megabytes=0.02"),
}
SCRIPTS = {"minimal.py": 128, "before_after/after.py": 48}  # and their steps
LAUNCHERS = {"inline": 1, "local": 2, "torchrun": 2}  # and ranks
# A process that no launcher has started takes all cores; beside other tests its threads would spin for each other.
ALONE = {"OMP_NUM_THREADS": "1"}
SHORT = ("train.max_steps=2", "train.epochs=null", "log_every=1", "launch.backend=gloo", "launch.timeout_s=60")


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A directory with the examples in it, as the repository's root has them."""
    made = Shell(tmp_path)
    for name in ("examples", "configs"):
        os.symlink(ROOT / name, tmp_path / name)
    try:
        yield made
        made.assert_nothing_left()
    finally:
        for process in made.survivors():
            process.kill()
        for child in made.children:
            child.communicate()


def test_the_index_names_every_example_and_commands_that_there_are() -> None:
    index = (EXAMPLES / "README.md").read_text()
    there = {path.name for path in EXAMPLES.iterdir() if not path.name.startswith("__") and path.name != "README.md"}
    assert there == {name.strip("/") for name in re.findall(r"^\| \[`([\w./]+)`\]", index, re.MULTILINE)}
    named = re.findall(r"(?:examples|configs)/[\w/.]+\.(?:py|yaml|sh|sbatch)", index)
    assert len(named) >= len(there) and [name for name in named if not (ROOT / name).exists()] == []


def test_what_slurm_would_get(shell: Shell) -> None:
    run = shell.run("run", "examples/slurm/preemptible.yaml", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert {"#SBATCH --nodes=2", "#SBATCH --partition=preemptible", "#SBATCH --requeue"} <= {*run.stdout.splitlines()}
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sweep = shell.run("examples/slurm/sweep.sh", "--dry-run", prefix=("sh",), env={"PATH": beside})
    assert sweep.returncode == 0, sweep.stderr
    assert "#SBATCH --array=0-5%2" in sweep.stdout
    # What comes after srun in the script for an allocation, for one process that nobody has started.
    [command] = re.findall(r"ddpkit (run .*) \"\$@\"", (EXAMPLES / "slurm/interactive.sh").read_text())
    alone = shell.run(*command.split(), "--dry-run")
    assert alone.returncode == 0 and "launcher: inline" in alone.stdout, alone.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("example", CONFIGS)
def test_configs(shell: Shell, example: str, launcher: str) -> None:
    if example == "finetune":
        pretrain(shell.cwd / "runs/pretrained.pth", epochs=1)
    options = [*SHORT, *CONFIGS[example], f"launch.nproc_per_node={LAUNCHERS[launcher]}"]
    command = ("run", f"examples/{example}/config.yaml", "--launcher", launcher, *(f"-o{each}" for each in options))
    env = ALONE if launcher == "inline" else {}
    done = shell.run(*command, env=env)
    assert done.returncode == 0, done.stderr
    lines = metrics(shell.cwd / "runs" / example)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert "is finished" in shell.run(*command).stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("example", SCRIPTS)
def test_scripts(shell: Shell, example: str, launcher: str) -> None:
    if launcher == "inline":  # a script alone needs none
        done = shell.run(f"examples/{example}", prefix=(sys.executable,), env=ALONE)
    else:
        ranks = ("--nproc-per-node", str(LAUNCHERS[launcher]))
        done = shell.run("launch", "--launcher", launcher, "-olaunch.backend=gloo", *ranks, f"examples/{example}")
    assert done.returncode == 0, done.stderr
    [run_dir] = [path.parent for path in (shell.cwd / "runs").glob("*/checkpoints")]
    assert list(run_dir.glob(f"checkpoints/step-{SCRIPTS[example]:08}/manifest.json"))
