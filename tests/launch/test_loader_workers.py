"""A loader worker that dies or raises: which, of which rank, and how, in the user's own words."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from tests.launch.shell import Shell

# Rank 1's worker comes to sample 40 and does what it is told to.
PLAIN = """
import os, sys, time, torch
from torch.utils.data import DataLoader, Dataset

class OwnError(Exception):
    def __init__(self, code, text): super().__init__(f"{code}: {text}\\nand a second line")

class Data(Dataset):
    def __len__(self): return 64
    def __getitem__(self, item):
        time.sleep(0.005)
        if item == 40 and os.environ["RANK"] == "1":
            exec(sys.argv[1])
        return torch.zeros(3)

if __name__ == "__main__":
    for _ in DataLoader(Data(), batch_size=4, num_workers=int(sys.argv[2]), multiprocessing_context=sys.argv[3]):
        time.sleep(0.005)
"""

# What the rank sees of it is a connection that has gone; of its end it hears a moment later, or in the next line.
HANDING_OVER = "import multiprocessing.reduction as r; r.send_handle = lambda *a: os.kill(os.getpid(), 9)"
DEATHS = {
    HANDING_OVER: r"was ended by SIGKILL \(killed from outside: ",
    "os.kill(os.getpid(), 9)": r"was ended by SIGKILL \(killed from outside: ",
    "os.kill(os.getpid(), 11)": r"was ended by SIGSEGV \(a crash in native code\)",
    "print('my last words', flush=True); os._exit(3)": "ended its process with exit code 3",
}


def _fails(shell: Shell, *arguments: str) -> tuple[str, Any]:
    done = shell.run("launch", "--nproc-per-node", "2", "--run-dir", "kept", *arguments)
    assert done.returncode == 1
    assert done.stderr.count(" failed: ") == 1
    return done.stderr, json.loads((shell.cwd / "kept/failure.json").read_text())


@pytest.mark.parametrize(
    ("code", "workers", "context"),
    [
        ("os.kill(os.getpid(), 9)", "1", "fork"),
        (HANDING_OVER, "1", "fork"),
        *(
            pytest.param(code, workers, context, marks=pytest.mark.slow)
            for code, workers, context in [
                (HANDING_OVER, "3", "spawn"),
                ("os.kill(os.getpid(), 9)", "2", "spawn"),
                ("os.kill(os.getpid(), 11)", "2", "fork"),
                ("print('my last words', flush=True); os._exit(3)", "1", "spawn"),
                ("print('my last words', flush=True); os._exit(3)", "2", "fork"),
            ]
        ),
    ],
)
def test_a_worker_that_dies(shell: Shell, code: str, workers: str, context: str) -> None:
    shell.script("plain.py", PLAIN)
    said, kept = _fails(shell, "plain.py", code, workers, context)
    assert (kept["rank"], kept["kind"]) == (1, "LoaderWorkerDied")
    assert re.match(rf"the loader worker with pid \d+ {DEATHS[code]}", kept["message"])
    # Where the rank was, and nothing of how torch learnt of it.
    assert said.count("Traceback (most recent call last)") == 1 and 'plain.py", line' in kept["traceback"]
    assert "signal_handling" not in said and "/multiprocessing/" not in kept["traceback"]
    assert ("  | my last words\n" in said) == ("last words" in code)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("raise OwnError(7, 'own words')", "OwnError", "7: own words (in DataLoader worker process 0)"),
        pytest.param("{}['missing']", "KeyError", "'missing' (in DataLoader worker process 0)", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_raises(shell: Shell, code: str, kind: str, message: str) -> None:
    shell.script("plain.py", PLAIN)
    said, kept = _fails(shell, "plain.py", code, "2", "fork")
    assert (kept["rank"], kept["kind"], kept["message"]) == (1, kind, message)
    assert said.count("Traceback (most recent call last)") == 1
    assert kept["traceback"].startswith("In DataLoader worker process 0:\nTraceback (most recent call last):\n")
    assert "in __getitem__\n" in kept["traceback"] and "torch/utils/data" not in said
    assert ("and a second line" in kept["traceback"]) == (kind == "OwnError")


@pytest.mark.slow
def test_the_sample_is_named(shell: Shell) -> None:
    shell.script(
        "data.py",
        "class Data:\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, item):\n"
        "        if item == 7: raise ValueError('cannot be read')\n"
        "        return __import__('torch').zeros(4)\n",
    )
    shell.config(
        launch={"nproc_per_node": 1},
        data={
            "train": {"factory": "data:Data"},
            "global_batch_size": 16,
            "shuffle": False,
            "loader": {"num_workers": 1},
        },
    )
    done = shell.run("run", "config.yaml", "-o", "data.eval=null", "-o", "train.eval_step=null")
    assert done.returncode == 1
    assert "failed: ValueError: cannot be read (in DataLoader worker process 0)\n" in done.stderr
    if sys.version_info >= (3, 11):  # where an exception can be given a note
        assert "  at sample 7, position 7 of the epoch\n" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_of_a_run_that_dies_as_it_hands_over(shell: Shell, start: str) -> None:
    shell.script(
        "data.py",
        "import multiprocessing, os\nfrom tests.toy import dataset as made\n"
        "def dataset(start):\n"
        "    multiprocessing.set_start_method(start, force=True)\n"
        "    return Data(made())\n"
        "class Data:\n"
        "    def __init__(self, inner): self.inner = inner\n"
        "    def __len__(self): return len(self.inner)\n"
        "    def __getitem__(self, item):\n"
        f"        if item == 40: {HANDING_OVER}\n"
        "        return self.inner[item]\n",
    )
    shell.config(
        launch={"nproc_per_node": 1},
        data={
            "train": {"factory": "data:dataset", "args": {"start": start}},
            "global_batch_size": 16,
            "shuffle": False,
            "loader": {"num_workers": 2},
        },
    )
    done = shell.run("run", "config.yaml", "-o", "data.eval=null", "-o", "train.eval_step=null")
    assert done.returncode == 1
    kept = json.loads((shell.cwd / "run/failure.json").read_text())
    assert kept["kind"] == "LoaderWorkerDied"
    assert re.match(rf"the loader worker with pid \d+ {DEATHS[HANDING_OVER]}", kept["message"])
    assert "/ddpkit/" not in done.stderr  # where in ddpkit it was seen helps nobody
