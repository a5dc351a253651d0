"""One run over a series of world sizes: in the steps that survive every sample of every epoch is used exactly once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpkit
from ddpkit.testing import run_ranks
from tests import toy

LENGTH, EPOCHS = 53, 4


def attempt(
    run_dir: Path, stop_after: int | None, *, stream: bool, drop_last: bool, dropout: float
) -> tuple[list[tuple[int, int, int]], dict[str, Any]]:
    """Go on for ``stop_after`` steps: what the step saw as (step, epoch, index), and the parameters at the end."""
    ledger: list[tuple[int, int, int]] = []
    model: Any = None
    try:
        with ddpkit.runtime(seed=6, timeout_s=30) as rt:
            model = rt.wrap(toy.model(dropout=dropout, dtype="float64"))
            loader = rt.loader(
                toy.dataset(LENGTH, dtype="float64", stream=stream),
                global_batch_size=8,
                drop_last=drop_last,
                num_workers=rt.world_size % 2,
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            run = rt.resume(run_dir, model=model, optimizer=optimizer, loader=loader, every_steps=None, log_every=1)
            begun = run.progress.step
            for epoch in run.epochs(EPOCHS):
                for batch in loader:
                    loss = toy.step(model, batch)["loss"]
                    run.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    assert loader.current is not None
                    if loader.current.size:
                        ledger += [(run.progress.step, epoch, int(index)) for index in batch[2]]
                    if rt.is_main and run.progress.step + 1 - begun == stop_after:
                        rt.stop.request("the test")
                        # The vote takes its time: more steps may follow before the stop, and they count.
                    run.step(loss=loss)
    except ddpkit.StopRequested:
        pass
    module = model.module if hasattr(model, "module") else model
    return ledger, {key: tensor.clone() for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("stream", "drop_last", "dropout"), [(False, True, 0.0), (False, False, 0.3), (True, False, 0.0)]
)
def test_a_run_goes_on_at_any_number_of_ranks(stream: bool, drop_last: bool, dropout: float, tmp_path: Path) -> None:
    how: dict[str, Any] = {"stream": stream, "drop_last": drop_last, "dropout": dropout}
    ledger: list[tuple[int, int, int]] = []
    for ranks, steps in ((2, 3), (1, 4), (4, 5), (3, None)):
        found = run_ranks(attempt, ranks, tmp_path / "run", steps, **how)
        ledger += [entry for entries, _ in found for entry in entries]
        at = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert at == max(step for step, *_ in ledger) + 1

    per_epoch = LENGTH - LENGTH % 8 if drop_last else LENGTH
    for epoch in range(EPOCHS):
        seen = Counter(index for _, when, index in ledger if when == epoch)
        assert set(seen.values()) == {1}
        assert len(seen) == per_epoch
    sizes = Counter(step for step, *_ in ledger)
    assert sorted(sizes) == list(range(len(sizes)))
    assert set(sizes.values()) == {8} | ({LENGTH % 8} if not drop_last else set())

    if not dropout:
        alone, expected = attempt(tmp_path / "alone", None, **how)
        assert sorted(alone) == sorted(ledger)
        for key, tensor in found[0][1].items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-10, msg=key)
