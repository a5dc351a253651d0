"""What the loop adds to a step, and how soon a killed group is back."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import ddpkit
from ddpkit.world import World
from tests.bench.measure import SCRIPTS, Row, compare, in_turn, spread, tool


def rows(repeats: int) -> list[Row]:
    """The loop beside others on 2 ranks, its CPU time alone on one, and recovery."""
    return [*_beside_peers(repeats), _cpu_alone(repeats), _recovery(max(3, repeats // 2))]


def _beside_peers(repeats: int) -> list[Row]:
    command = [tool("ddpkit"), "launch", "--nproc-per-node", "2", str(SCRIPTS / "step_overhead.py"), str(4 * repeats)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    milliseconds = {name: [1e3 * each for each in blocks] for name, blocks in found.items()}
    hand = milliseconds["by hand"]
    rows = []
    for name, bar in (("ddpkit", 1.01), ("accelerate", float("inf")), ("Fabric", float("inf"))):
        # Pair by pair, since the machine's speed drifts.
        ratios = [a / b for a, b in zip(milliseconds[name], hand, strict=True)]
        median = statistics.median(ratios)
        rows.append(Row(f"step, 2 ranks: {name}", "x", median, "by hand", 1.0, len(hand), spread(ratios), bar))
    return rows


class _Nothing(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(4)


def _cpu_alone(repeats: int) -> Row:
    """CPU time of `run.backward` and `run.step` beside ``loss.backward()``; fetching is left out of both."""
    steps = 2000

    with tempfile.TemporaryDirectory() as folder, ddpkit.runtime(world=World()) as rt:
        model = rt.wrap(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loader = rt.loader(_Nothing(), global_batch_size=1)
        run = rt.resume(folder, every_steps=None, model=model, optimizer=optimizer, loader=loader)
        batch = next(iter(loader))

        def step() -> torch.Tensor:
            loss: torch.Tensor = model(batch).square().mean()
            return loss

        def ours() -> float:
            begun = time.process_time()
            for _ in range(steps):
                loss = step()
                run.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)
            return (time.process_time() - begun) / steps * 1e6

        def by_hand() -> float:
            begun = time.process_time()
            for _ in range(steps):
                step().backward()  # type: ignore[no-untyped-call]  # torch's
                optimizer.step()
                optimizer.zero_grad()
            return (time.process_time() - begun) / steps * 1e6

        found = in_turn({"ours": ours, "hand": by_hand}, repeats)
    added = [a - b for a, b in zip(found["ours"], found["hand"], strict=True)]
    return Row("step, CPU added on 1 rank", "us", statistics.median(added), None, None, repeats, spread(added), 30.0)


def _recovery(repeats: int) -> Row:
    script = str(SCRIPTS / "recover.py")
    ours = [tool("ddpkit"), "launch", "--nproc-per-node", "2", "-o", "launch.max_restarts=1", script]
    peer = [tool("torchrun"), "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d"]
    peer += ["--rdzv-endpoint", "127.0.0.1:0", script]
    found = in_turn({"ours": lambda: _recover(ours), "peer": lambda: _recover(peer)}, repeats)
    return compare("recovery from a killed rank", "s", found["ours"], "torchrun", found["peer"], 0.5)


def _recover(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        # torchrun needs the second variable to restart with gloo on one node at all (torch 2.13).
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run([*command, str(mark)], capture_output=True, text=True, timeout=180, env=env)
        if not mark.exists():
            raise RuntimeError(f"{command}: no recovery\n{done.stdout}\n{done.stderr}")
        return float(mark.read_text())
