"""Every block of every page is run or checked, and what stands in backquotes between the blocks exists.

Pages with a test of their own are named with it. The blocks of the others are in the table below, one by one.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpkit
import launch
from ddpkit import config as configs
from ddpkit import config_schema
from ddpkit.run import Run
from ddpkit.session import Runtime
from launch import cli, telling
from launch.accounting import Account
from launch.status import Status
from tests import pages
from tests.bench.__main__ import _MEASUREMENTS
from tests.launch.shell import ROOT, Shell
from tests.resume.runs import events

PAGES = [
    *("README.md", "CONTRIBUTING.md", "examples/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]

OWN_TEST = {
    "docs/failures.md": "tests/launch/test_pages.py",
    "docs/first-steps.md": "tests/launch/test_pages.py",
    "docs/guarantees.md": "tests/launch/test_guarantees_page.py",
    "docs/launching.md": "tests/launch/test_pages.py",
    "docs/own-loop.md": "tests/resume/test_own_loop_page.py",
    "docs/slurm.md": "tests/slurm/test_page.py",
    "docs/training.md": "tests/launch/test_training_page.py",
    "docs/writing.md": "tests/launch/test_pages.py",
}
"""By page, the test that follows all of its blocks."""


@dataclass(frozen=True)
class Elsewhere:
    """A block that something else runs: a test that names the page, or .ci/run."""

    where: str


@dataclass(frozen=True)
class NotRun:
    """A block that nobody runs, and why."""

    why: str


Check = Callable[[Shell, pages.Block], None]

# ---------------------------------------------------------------------- what blocks are checked by

PARTS = """

class Block(nn.Sequential):
    pass


def build_model(width=32):
    model = nn.Sequential(Block(nn.Linear(2, width), nn.ReLU()), nn.Linear(width, 2))
    model.head = model.pop(1)
    return model


class Sender:
    def log(self, values, step):
        pass
"""
ACCELERATE = (
    "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: 'no'\nnum_processes: 1\n"
)
SHORT = "log_every: 1\n"
TWO_STEPS = ("-o", "train.max_steps=2", "-o", "train.epochs=null", "-o", "launch.backend=gloo")
FIRST_STEPS = {block.file: block.text for block in pages.blocks("docs/first-steps.md") if block.file is not None}


def mine(shell: Shell, piece: str = "", code: str = "") -> Path:
    """The two files of the first steps and a config that builds on theirs, short, with a piece and some code more."""
    shell.script("mine.py", FIRST_STEPS["mine.py"] + code)
    shell.script("short.yaml", FIRST_STEPS["mine.yaml"] + SHORT)
    return shell.script("piece.yaml", f"defaults: [short]\n{piece}")


def done(shell: Shell, *command: str, **options: Any) -> str:
    """What a command of ``ddpkit`` (or another one) prints; it has to end well."""
    ended = shell.run(*command, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def trained(shell: Shell, block: pages.Block) -> None:
    """A piece of config about models, in a run of two steps."""
    mine(shell, block.text, PARTS)
    shell.script("accelerate.yaml", ACCELERATE)
    weights = {"model.0.0.weight": (32, 2), "model.0.0.bias": (32,), "model.fc.weight": (2, 32), "model.fc.bias": (2,)}
    (shell.cwd / "weights").mkdir()
    taken = {"state_dict": {name: torch.full(shape, 0.5) for name, shape in weights.items()}}
    torch.save(taken, shell.cwd / "weights/resnet50.pth")
    printed = done(shell, "run", "piece.yaml", *TWO_STEPS)
    files = {path.name for path in (shell.cwd / "runs/mine/checkpoints/step-00000002").iterdir()}
    assert ("sharded-00001.safetensors" in files) == ("fsdp2" in block.text)
    assert ("head.weight" in printed) == ("init_from" in block.text), printed


def called_back(shell: Shell, block: pages.Block) -> None:
    """The callback ends the run; its bar is lower, so that it does so after the first epoch."""
    assert block.text.count("> 0.99") == 1
    mine(shell, "train: {callbacks: ['mine:Watch']}", block.text.replace("> 0.99", "> 0.5"))
    done(shell, "run", "piece.yaml", "-o", "launch.backend=gloo")
    [finished] = events(shell.cwd / "runs/mine", "finished")
    assert (finished["step"], finished["reason"]) == (100, "good enough")


def typed(shell: Shell, block: pages.Block) -> None:
    """Commands about a run that is there."""
    mine(shell)
    done(shell, "run", "piece.yaml", *TWO_STEPS)
    commands = "".join(f"$ {line}\n" for line in block.text.replace("RUN_DIR", "runs/mine").splitlines())
    pages.follow(shell, [pages.Block("console", commands + "runs/mine: finished, ...\n", block.section)])
    assert "<svg" in (shell.cwd / "report.html").read_text()


def a_script_as_it_is(shell: Shell, block: pages.Block) -> None:
    shell.script("SCRIPT.py", "import os, sys\nprint(os.environ['WORLD_SIZE'], sys.argv[1:])\n")
    command = block.text.strip().replace("[ARGS...]", "--its own")
    pages.follow(shell, [pages.Block("console", f"$ {command}\n2 ['--its', 'own']\n", block.section)])


def a_status(shell: Shell, block: pages.Block) -> None:
    """The very text that such a run is told in."""
    at = time.mktime((2026, 3, 1, 13, 20, 0, 0, 0, -1))
    phases = {
        "data_s": 213.0,
        "forward_backward_s": 3230.0,
        "optimizer_s": 71.0,
        "evaluation_s": 120.0,
        "saving_s": 4.0,
    }
    slurm: dict[str, Any] = {"ranks": 8, "launcher": "slurm", "job": "17"}
    stopped = {"how": "stopped on request (SIGTERM)", "requeued": "preempted", "from_step": 0, "to_step": 212}
    status = Status(
        run_dir="runs/digits",
        state="running",
        step=450,
        saved_step=400,
        epoch=2,
        epochs=5,
        samples=28800,
        samples_per_s=8.113,
        max_steps=None,
        total_steps=1000,
        eta_s=3600 + 12 * 60.0,
        recorded_at=at - 3,
        at=at,
        metrics={
            "train": {"kind": "train", "step": 450, "epoch": 2, "samples": 28800, "lr": 0.05, "loss": 0.2149},
            "eval": {"kind": "eval", "step": 440, "epoch": 2, "samples": 28160, "loss": 0.2712, "accuracy": 0.9222},
        },
        checkpoints={400: "intact", 350: "intact"},
        set_aside=[],
        best=None,
        ended_early=None,
        attempts=[
            {"attempt": 0, **slurm, **stopped, "started": 0.0, "ended": 1860.0},
            {"attempt": 1, **slurm, "from_step": 212},
        ],
        job=None,
        goodput=3550 / 4080,
        account=Account(4080.0, 3550.0, 120.0, 4.0, 30.0, 260.0, 116.0),
        phases=phases,
        slowest_phase="forward_backward_s",
        failure=None,
        notes=[],
    )
    assert telling.describe(status) == block.text.strip()


def config_files(shell: Shell, block: pages.Block) -> None:
    """Files that build on files, and another model by the command line."""
    for name in ("resnet", "vit"):
        shell.script(f"conf/model/{name}.yaml", f"factory: mine:{name}\n")
    shell.script("conf/base.yaml", FIRST_STEPS["mine.yaml"] + "seed: 1\n")
    shell.script("conf/launch/slurm.yaml", "launcher: slurm\n")
    shell.script("conf/data/train/cifar.yaml", "factory: mine:cifar\n")
    path = shell.script("conf/digits.yaml", block.text)
    for override, model in (([], "mine:resnet"), (["model=vit"], "mine:vit")):
        config = configs.load(path, override)
        assert (config.seed, config.model.factory, config.launch.launcher) == (3, model, "slurm")
        assert config.data.train.factory == "mine:cifar"


def with_variables(shell: Shell, block: pages.Block) -> None:
    path = mine(shell, block.text)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SCRATCH", "/scratch"), ("NOTE", "012"), ("LR", "0.1")):
            patch.setenv(name, value)
        config = configs.load(path)
        assert config.run_dir == "/scratch/runs/digits"
        assert config.optimizer.args == {"lr": 0.1, "note": "012"}
        patch.delenv("LR")
        assert configs.load(path).optimizer.args["lr"] == 1e-3


DATA = """\
import torch

torch.manual_seed(0)
inputs = torch.randn(256, 8)
dataset = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(8, 1))


"""


def both_sides_of_a_diff(shell: Shell, block: pages.Block) -> None:
    """What is taken away runs, and so does what comes instead; without a GPU, and with fewer workers."""
    for name, sign in (("before", "-"), ("after", "+")):
        side = "".join(f"{line[1:]}\n" for line in block.text.splitlines() if line[:1] in (" ", sign))
        side = re.sub(
            "num_workers=.", "num_workers=1", side.replace('"cuda"', '"cpu"').replace("range(10)", "range(2)")
        )
        shell.script(f"{name}.py", DATA + side)
    done(shell, "before.py", prefix=(sys.executable,))
    done(shell, "launch", "--nproc-per-node", "2", "after.py")
    done(shell, "export", "runs/mine", "exported.pt")
    before, after = (torch.load(shell.cwd / name, weights_only=True) for name in ("model.pt", "exported.pt"))
    assert ([*before], [*after]) == (["module.0.weight", "module.0.bias"], ["0.weight", "0.bias"])


def weights_of_data_parallel(shell: Shell, block: pages.Block) -> None:
    made = "import ddpkit\nmodel = Net()\nstate = torch.nn.DataParallel(Net()).state_dict()\n"
    made += "torch.save(state, 'model.pt')\ntorch.save({'state_dict': state}, 'old.pth')\n"
    same = "assert torch.equal(model[0].weight, state['module.0.weight'])\n"
    shell.script("load.py", DATA + made + block.text + same)
    done(shell, "load.py", prefix=(sys.executable,))


def checks_of_ci(shell: Shell, block: pages.Block) -> None:
    """What a contributor types is what .ci/run does, or there."""
    ci = (ROOT / ".ci/run").read_text()
    for line in block.text.splitlines():
        for command in line.partition("#")[0].strip().split(" && "):
            words = command.split()
            assert (ROOT / words[0]).exists() or " ".join(words[:2]) in ci, command


BLOCKS: dict[str, list[Check | Elsewhere | NotRun]] = {
    "README.md": [
        Elsewhere(".ci/run"),
        Elsewhere(".ci/run"),
        Elsewhere("tests/launch/test_readme.py"),
        Elsewhere("tests/launch/test_readme.py"),
        Elsewhere("tests/slurm/test_page.py"),
        Elsewhere("tests/launch/test_readme.py"),
    ],
    "CONTRIBUTING.md": [
        NotRun("it reaches out to the network, and into the hooks of the clone"),
        checks_of_ci,
    ],
    "docs/benchmarks.md": [NotRun("it wants the machine to itself, for longer than all tests")],
    "docs/config.md": [config_files, with_variables, Elsewhere("tests/unit/test_config_schema.py")],
    "docs/from-dataparallel.md": [both_sides_of_a_diff, weights_of_data_parallel],
    "docs/models.md": [
        *(trained, trained, trained),
        NotRun("it needs the network, and minutes for a build; .ci/run does the same"),
        *[Elsewhere("tests/resume/test_deepspeed.py")] * 2,
    ],
    "docs/moving.md": [
        Elsewhere("tests/launch/test_moving_page.py"),
        a_script_as_it_is,
        *[Elsewhere("tests/launch/test_moving_page.py")] * 10,
    ],
    "docs/recording.md": [called_back],
    "docs/watching.md": [typed, a_status],
}
WITH_RANKS = {trained, called_back, typed, both_sides_of_a_diff}

# ---------------------------------------------------------------------- the tests


def test_no_block_of_any_page_is_left_out() -> None:
    for page in PAGES:
        if (own := OWN_TEST.get(page)) is not None:
            assert page in (ROOT / own).read_text() and page not in BLOCKS
            continue
        listed = BLOCKS.get(page, [])
        assert len(listed) == len(pages.blocks(page)), page
        for block in listed:
            if isinstance(block, Elsewhere):
                assert page.rpartition("/")[2] in (ROOT / block.where).read_text(), (page, block)
    assert {*OWN_TEST, *BLOCKS} <= set(PAGES)


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(page, number, marks=pytest.mark.slow if check in WITH_RANKS else ())
        for page, checks in BLOCKS.items()
        for number, check in enumerate(checks)
        if callable(check)
    ],
)
def test_a_block(shell: Shell, page: str, number: int) -> None:
    check = BLOCKS[page][number]
    assert callable(check)
    check(shell, pages.blocks(page)[number])


@pytest.mark.parametrize("page", [page for page in PAGES if "`ddpkit " in (ROOT / page).read_text()])
def test_commands_between_the_blocks_are_understood(page: str) -> None:
    for span in pages.spans(page):
        words = shlex.split(span.partition(" > ")[0]) if span.startswith("ddpkit ") else []
        if len(words) > 2:
            cli._parser().parse_args(words[1:])


CALLED: dict[str, Any] = {"rt": Runtime, "run": Run, "ddpkit": ddpkit, "launch": launch}


def _called(function: ast.expr) -> tuple[Any, int] | None:
    """What a call is of, and how many arguments it gets besides those that stand there; None: nothing of ours."""
    if isinstance(function, ast.Name) and function.id in ddpkit.__all__:
        return getattr(ddpkit, function.id), 0
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in CALLED:
        owner = CALLED[function.value.id]
        return getattr(owner, function.attr), int(inspect.isclass(owner))
    return None


@pytest.mark.parametrize("page", PAGES)
def test_calls_between_the_blocks_can_be_made(page: str) -> None:
    for span in pages.spans(page):
        try:
            tree = ast.parse(span.removeprefix("with ").removesuffix(":").partition(" as ")[0])
        except SyntaxError:
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if (ours := _called(call.func)) is not None:
                function, more = ours
                keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
                inspect.signature(function).bind_partial(*[None] * more, *call.args, **keywords)


NO_KEYS = re.compile(
    r"launch\.(local|torchrun|py)\b.*|(model|data|trackers)\.(pt|safetensors|txt|dot|json|module)\b|\w+\.\w+\(.*\)"
)


KEYS = set(re.findall(r"^\| `([\w.*-]+)`", config_schema.reference(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_keys_between_the_blocks_are_keys(page: str) -> None:
    sections = "|".join(name for name in configs.Config.model_fields)
    for span in pages.spans(page):
        for path in re.findall(rf"(?:^|-o )((?:{sections})\.[a-z_.0-9]+)", span):
            parts = path.rstrip(".").split(".")
            known = any(".".join(parts[:length]) in KEYS for length in range(2, len(parts) + 1))
            assert known or NO_KEYS.fullmatch(span) or NO_KEYS.fullmatch(path), (span, path)


def test_measurements_that_pages_name_are_there() -> None:
    named = [
        word
        for page in ("docs/benchmarks.md", "docs/scale.md")
        for span in pages.spans(page)
        if span.startswith("python -m tests.bench ")
        for word in span.split()[3:]
    ]
    assert named and set(named) <= set(_MEASUREMENTS)
