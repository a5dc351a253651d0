"""The same with ddpkit: `ddpkit launch --nproc-per-node 2 examples/before_after/after.py`, or torchrun, srun."""

import torch
from torch import nn

import ddpkit
from signals import Net, Signals

EPOCHS = 3
BATCH_SIZE = 32

with ddpkit.runtime(seed=0) as rt:
    torch.manual_seed(0)  # for the same first weights as before; left out, they follow from the runtime's seed
    model = rt.wrap(Net(), sync_batchnorm=False)  # as before; left out, BatchNorm sees the batch of all ranks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # The order of before, which goes with the number of ranks; left out, it is the same on any number of them.
    loader = rt.loader(Signals(512), global_batch_size=BATCH_SIZE, sampler="distributed")
    run = rt.resume("runs/signals", every_steps=10, model=model, optimizer=optimizer, loader=loader)

    for epoch in run.epochs(EPOCHS):
        for signals, labels in loader:
            loss = nn.functional.cross_entropy(model(signals), labels)
            optimizer.zero_grad()
            run.backward(loss)
            optimizer.step()
            run.step(loss=loss)
        if rt.is_main:
            print(f"epoch {epoch}: loss {loss.item():.6f}")
