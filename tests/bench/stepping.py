"""What the loop adds to a step."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import ddpkit
from ddpkit.world import World
from tests.bench.measure import SCRIPTS, Bar, Measurement, Row, in_turn, tool


def _beside_peers(repeats: int) -> list[Row]:
    milliseconds: dict[str, list[float]] = {}
    # Several processes: where a model's tensors happen to lie makes its steps 2 % faster or slower, for as long as it
    # lives. Who makes its model first changes.
    for number in range(repeats):
        script = [str(SCRIPTS / "step_overhead.py"), "30", str(number)]
        done = subprocess.run(
            [tool("ddpkit"), "launch", "--nproc-per-node", "2", *script],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        for name, turns in json.loads(done.stdout.strip().splitlines()[-1]).items():
            milliseconds.setdefault(name, []).extend(1e3 * each for each in turns)
    ours = milliseconds.pop("ddpkit")
    bars = {"by hand": 1.01, "accelerate": 1.0, "Fabric": 1.0}
    return [Row("a step, 2 ranks", "ms", ours, Bar(bars[name]), name, milliseconds[name]) for name in bars]


class _Nothing(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(4)


def _cpu_alone(repeats: int) -> list[Row]:
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
    return [Row("a step's CPU time, 1 rank", "us", found["ours"], Bar(30.0, of="difference"), "by hand", found["hand"])]


MEASUREMENTS: dict[str, Measurement] = {"step": _beside_peers, "step-cpu": _cpu_alone}
