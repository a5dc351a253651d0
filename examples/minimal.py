"""A whole training loop of one's own: `ddpkit launch examples/minimal.py`, or python, torchrun, srun."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ddpkit


def spirals(count: int, seed: int) -> TensorDataset:
    """Points on two spirals that wind around each other, and on which of them each one lies."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 6 * radius + torch.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return TensorDataset(points + 0.02 * torch.randn(count, 2, generator=generator), labels)


def eval_step(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Whether each sample is right: one value a sample, of which the mean is over all samples of all ranks."""
    return {"accuracy": (model(batch[0]).argmax(dim=1) == batch[1]).float()}


with ddpkit.runtime(seed=0) as rt:  # the process group, if there are ranks
    model = rt.wrap(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = rt.loader(spirals(2048, seed=1), global_batch_size=128)  # 128 over all ranks, however many there are
    run = rt.resume("runs/minimal", every_steps=20, model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(8):  # goes on where the run stands
        for points, labels in loader:
            loss = nn.functional.cross_entropy(model(points), labels)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)  # counts, records, saves when due, stops when asked
        values = rt.evaluate(model, spirals(500, seed=2), eval_step)
        run.record("eval", values)
        if rt.is_main:
            print(f"epoch {epoch}: {values['accuracy']:.1%} right")
