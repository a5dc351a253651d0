"""The wheel, installed where the checkout is not: its commands, and its types for those who check theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch.shell import ROOT, Shell

MINE = """
import torch
from torch import nn

def model():
    return nn.Linear(2, 1)

def dataset():
    return torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))

def step(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
"""

CONFIG = """
run_dir: run
launch: {nproc_per_node: 2, backend: gloo}
model: {factory: "mine:model"}
data: {train: {factory: "mine:dataset"}, global_batch_size: 4}
optimizer: {factory: "torch.optim:SGD", args: {lr: 1e-2}}
train: {step: "mine:step", epochs: 1}
"""

OWN = """
import sys, launch, ddpkit
from pathlib import Path
with ddpkit.runtime(backend="gloo") as rt:
    for module in (ddpkit, launch):
        home = Path(module.__file__).parent
        assert Path(sys.prefix) in home.parents and (home / "py.typed").exists(), home
    print(rt.world_size, rt.mean(float(rt.rank)))
"""

# Where a type were not seen, but Any, its error would not come, and the comment that expects it be one too many.
TYPED = """
import launch
from ddpkit import Runtime, UserError, runtime


def size(rt: Runtime) -> int:
    wrong: str = rt.world_size  # type: ignore[assignment]
    return rt.world_size + len(wrong)


def main() -> list[int]:
    with runtime(seed=0) as rt:
        loader = rt.loader([1, 2], global_batch_size=2)
        run = rt.resume("run", every_steps=2, loader=loader)
        for epoch in run.epochs(3):
            run.step(epoch=epoch + 1)
        run.step("loss")  # type: ignore[call-arg]
        loader.done.lower()  # type: ignore[attr-defined]
    try:
        return launch.local(size, rt, nproc_per_node=2)
    except UserError as error:
        error.exit_code.lower()  # type: ignore[attr-defined]
        return []
"""


def _run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and this one's libraries, but not what is installed in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()  # building leaves files beside the sources
    for part in ("ddpkit", "launch"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder)
    [wheel] = folder.glob("ddpkit-*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    [packages] = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    # Not to be found installed already: among this environment's libraries there is a checkout's.
    _run(*pip, "--python", python, "install", "--ignore-installed", "--no-deps", "--no-index", wheel, cwd=folder)
    return python.parent


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_wheel_works_outside_of_the_checkout(shell: Shell, installed: Path) -> None:
    environment = {"PYTHONPATH": "", "PATH": f"{installed}:/usr/bin:/bin"}

    def ddpkit(*arguments: str) -> str:
        done = shell.run(*arguments, prefix=(str(installed / "ddpkit"),), env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name, text in {"mine.py": MINE, "config.yaml": CONFIG, "own.py": OWN}.items():
        shell.script(name, text)
    assert "ddpkit" in ddpkit("--help")
    ddpkit("run", "config.yaml")
    assert '"step": 2' in ddpkit("status", "run", "--json")
    assert ddpkit("launch", "--nproc-per-node", "2", "own.py") == "2 0.5\n"
    assert "talk" in ddpkit("doctor", "-o", "launch.nproc_per_node=2", "-o", "launch.backend=gloo")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_users_types_are_checked_against_the_wheels(tmp_path: Path, installed: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    _run(sys.executable, "-m", "mypy", "--python-executable", installed / "python", "typed.py", cwd=tmp_path)
