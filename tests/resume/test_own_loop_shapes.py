"""Scripts of other shapes than those of docs/own-loop.md: killed and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpkit.testing import run_ranks
from tests.resume.own_scripts import assert_killed_twice_it_ends_the_same, play_all

PRELUDE = """
import argparse
import sys

import torch
import ddpkit
from torch import nn
from torch.nn.functional import mse_loss

x = torch.linspace(-1, 1, 44).reshape(-1, 1)
data = torch.utils.data.TensorDataset(x, torch.sin(3 * x))


def net():
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
"""

# No dataset: it learns from what the policy does, drawn from each rank's own generators, in a world that moves.
REINFORCEMENT = """
class World:
    def __init__(self):
        self.place = 0.5

    def reward(self, action):
        return -(action - self.place).abs()

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


with ddpkit.runtime(seed=0) as rt:
    policy = rt.wrap(net())
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    world = World()
    run = rt.resume("runs/own", every_steps=2, log_every=1, policy=policy, optimizer=optimizer, world=world)
    for episode in run.epochs(12):
        for _ in range(2):
            seen = torch.full((6, 1), world.place)
            chosen = torch.distributions.Normal(policy(seen), 0.1)
            action = chosen.sample()
            reward = world.reward(action)
            loss = -(chosen.log_prob(action) * (reward - reward.mean())).mean()
            optimizer.zero_grad()
            run.backward(loss)
            optimizer.step()
            run.step(loss=loss, reward=reward.mean())
        world.place = 0.9 * world.place + 0.02
"""

# A class with the loop in its methods, options, and an exit code for the shell.
TRAINER = """
class Trainer:
    def __init__(self, rt, options):
        self.rt, self.options = rt, options
        self.model = rt.wrap(net())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=options.lr, momentum=0.9)
        self.loader = rt.loader(data, global_batch_size=8, drop_last=False)
        self.run = rt.resume(
            options.out, every_steps=3, log_every=1, model=self.model, optimizer=self.optimizer, loader=self.loader
        )

    def batch(self, inputs, targets):
        loss = mse_loss(self.model(inputs), targets)
        self.optimizer.zero_grad()
        self.run.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def epoch(self):
        for inputs, targets in self.loader:
            self.run.step(loss=self.batch(inputs, targets))

    def fit(self):
        for number in self.run.epochs(self.options.epochs):
            self.epoch()
        return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", default="runs/own")
    with ddpkit.runtime(seed=0) as rt:
        sys.exit(Trainer(rt, parser.parse_args([])).fit())


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code != 0:
            raise
"""

# An optimizer that calls the model as often as it likes in a step, and two phases: the last layer alone, then all.
PHASES = """
with ddpkit.runtime(seed=0) as rt:
    module = net()
    model = rt.wrap(module, find_unused_parameters=True)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    loader = rt.loader(data, global_batch_size=22)
    run = rt.resume("runs/own", every_steps=1, log_every=1, model=model, optimizer=optimizer, loader=loader)

    def one_epoch():
        for inputs, targets in loader:

            def closure():
                optimizer.zero_grad()
                loss = mse_loss(model(inputs), targets)
                run.backward(loss)
                return loss

            run.step(loss=optimizer.step(closure))

    for phase, until in ((False, 2), (True, 5)):
        for epoch in run.epochs(until):
            module[0].requires_grad_(phase)
            one_epoch()
"""

# Whatever goes wrong with a batch is noted, and the next one taken; an end that nobody counts, by break and return.
STUBBORN = """
def train(rt):
    model = rt.wrap(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = rt.loader(data, global_batch_size=8)
    run = rt.resume("runs/own", every_steps=1, log_every=1, model=model, optimizer=optimizer, loader=loader)
    while True:
        for inputs, targets in loader:
            try:
                loss = mse_loss(model(inputs), targets)
                optimizer.zero_grad()
                run.backward(loss)
                optimizer.step()
                run.step(loss=loss)
            except Exception as error:
                print("left out:", error)
                continue
            if run.progress.step >= 14:
                return
            if inputs.numel() == 0:
                break


with ddpkit.runtime(seed=0) as rt:
    train(rt)
"""

SHAPES = {"reinforcement": REINFORCEMENT, "trainer": TRAINER, "phases": PHASES, "stubborn": STUBBORN}
SOURCES = {name: PRELUDE + script for name, script in SHAPES.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Each script run to its end on two ranks, and how many layers it has called."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_ranks(play_all, 2, SOURCES, folder)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_killed_and_resumed(name: str, undisturbed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    reference, calls = undisturbed
    assert_killed_twice_it_ends_the_same(SOURCES[name], calls[name], reference / name, tmp_path)
