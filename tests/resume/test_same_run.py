"""The same command again: what continues, what is finished, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddpkit import config as configs
from ddpkit.errors import UserError
from tests.resume.faults import Fault, plan
from tests.resume.runs import assert_same_end, cli, events, metrics, shell, start, tree, write


def test_finished_runs_say_so_and_longer_ones_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    short, long = tree(run_dir, train__epochs=2), tree(run_dir, train__epochs=3)
    reference = tree(tmp_path / "reference", train__epochs=3)
    assert start(reference, 2) == start(short, 2) == "done"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}

    again = cli(capsys, "run", str(write(tmp_path / "c.yaml", short)))
    assert (again.code, again.out) == (0, "")
    assert "finished" in again.err and "step 12" in again.err
    shorter = cli(capsys, "run", str(tmp_path / "c.yaml"), "-o", "train.epochs=1")
    assert (shorter.code, shorter.out) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before

    assert start(long, 2, attempt=1) == "done"
    assert_same_end(run_dir, tmp_path / "reference")
    told = [event["event"] for event in events(run_dir)]
    assert [name for name in told if name not in ("saved", "save_delayed")] == [
        "started",
        "finished",
        "restored",
        "finished",
    ]


def test_fewer_epochs_end_a_run_where_it_stands(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    env = plan(tmp_path / "faults", Fault("train", 15, do="SIGTERM"))
    assert start(tree(run_dir), 2, env) == "SIGTERM"
    assert start(tree(run_dir, train__epochs=1), 2, attempt=1) == "done"
    last = metrics(run_dir)[-1]
    assert last["kind"] == "eval" and last["step"] == events(run_dir, "stopped")[0]["step"]
    assert events(run_dir, "finished")[0]["step"] == last["step"]


def test_a_changed_config_is_refused_with_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, path = tmp_path / "run", tmp_path / "c.yaml"
    assert start(tree(run_dir, train__epochs=1), 1) == "done"
    kept = (run_dir / "config.yaml").read_text()
    write(path, tree(run_dir, train__epochs=1))
    changes = ["-o", "optimizer.args.lr=0.02", "-o", "seed=3", "-o", "data.eval.args.length=12"]
    refused = cli(capsys, "run", str(path), *changes)
    assert (refused.code, refused.out) == (2, "")
    for difference in ("optimizer.args.lr: 0.01 -> 0.02", "seed: 0 -> 3", "data.eval.args.length: 11 -> 12"):
        assert difference in refused.err
    assert "--accept-change seed --accept-change data.eval.args.length --accept-change optimizer" in refused.err
    partly = cli(capsys, "run", str(path), *changes, "--accept-change", "optimizer", "--accept-change", "seed")
    assert partly.code == 2 and "data.eval" in partly.err and "optimizer" not in partly.err
    free = ["launch.nproc_per_node=1", "data.loader.num_workers=1", "data.micro_batch_size=2", "data.eval_batch_size=4"]
    free += [
        "checkpoint.asynchronous=false",
        "checkpoint.every_steps=1",
        "checkpoint.keep=1",
        "log_every=1",
        "launch.timeout_s=9",
        "train.epochs=1",
    ]
    accepted = cli(capsys, "run", str(path), *(part for key in free for part in ("-o", key)))
    assert accepted.code == 0 and "finished" in accepted.err
    assert (run_dir / "config.yaml").read_text() == kept


def test_an_accepted_change_holds_from_then_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, path = tmp_path / "run", write(tmp_path / "c.yaml", tree(tmp_path / "run", train__epochs=1))
    assert start(tree(run_dir, train__epochs=1), 2) == "done"
    changed = ["-o", "train.clip_grad_norm=1.0", "-o", "train.epochs=2"]
    assert shell("run", str(path), *changed, "--accept-change", "train.clip_grad_norm").code == 0
    assert configs.load(run_dir / "config.yaml").train.clip_grad_norm == 1.0
    assert cli(capsys, "run", str(path), *changed).code == 0
    assert cli(capsys, "run", str(path)).code == 2


def test_another_model_is_one_message_with_keys_and_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, path = tmp_path / "run", write(tmp_path / "c.yaml", tree(tmp_path / "run", train__epochs=1))
    assert start(tree(run_dir, train__epochs=1), 2) == "done"
    kept = (run_dir / "config.yaml").read_text()
    change = ["-o", "model.args.width=8", "-o", "model.args.batchnorm=false", "-o", "train.epochs=2"]
    refused = shell("run", str(path), *change, "--accept-change", "model.args")
    assert refused.code == 2
    assert "Traceback" not in refused.err
    assert refused.err.count("(16, 6) in the checkpoint, (8, 6) in the model") == 1
    assert refused.err.count("1.running_mean: in the checkpoint, not in the model") == 1
    assert refused.err.count("another model") == 1
    # What was refused did not change what the run is.
    assert (run_dir / "config.yaml").read_text() == kept
    assert cli(capsys, "run", str(path)).code == 0


def test_a_start_that_never_got_anywhere_may_be_corrected(tmp_path: Path) -> None:
    wrong = shell("run", str(write(tmp_path / "c.yaml", tree(tmp_path / "run", model__args={"widht": 3}))))
    assert wrong.code in (1, 2) and "widht" in wrong.err
    right = shell("run", str(write(tmp_path / "c.yaml", tree(tmp_path / "run", train__epochs=1))))
    assert right.code == 0, right.err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"optimizer__args": {"lr": 0.01, "betas": [0.9, 0.99]}, "optimizer__groups": [{"params": ["0.*"]}]}, "groups"),
        ({"scheduler": None}, "scheduler"),
    ],
)
def test_other_objects_than_the_saved_ones_are_refused(
    changes: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    assert start(tree(tmp_path / "run", train__epochs=1), 2) == "done"
    end = start(tree(tmp_path / "run", **changes), 2, attempt=1, errors=True)
    assert end.startswith("UserError") and complaint in end


def test_a_state_that_cannot_be_saved_is_told_before_the_first_step(tmp_path: Path) -> None:
    scheduler = {
        "factory": "torch.optim.lr_scheduler:LambdaLR",
        "args": {"lr_lambda": {"factory": "tests.resume.test_same_run:Decay"}},
    }
    config = tree(tmp_path / "run", scheduler=scheduler)
    env = plan(tmp_path / "faults", Fault("train", 1, whom="group"))
    with pytest.raises(UserError, match=r"scheduler\.lr_lambdas\.0\.history"):
        start(config, 2, env)


class Decay:
    """A callable with a state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.history = iter([1, 2])

    def __call__(self, epoch: int) -> float:
        return 0.9**epoch


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep_is_how_many_stay(keep: int, tmp_path: Path) -> None:
    assert start(tree(tmp_path, checkpoint={"every_steps": 4, "keep": keep}), 1) == "done"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (4, 8, 12, 16, 18)][-keep:]


def test_saving_by_the_clock(tmp_path: Path) -> None:
    # Every minute of no length is over at every line of metrics (every third step); with several ranks, once their
    # means have come: at the next step, or at the end of the epoch.
    for ranks, steps in ((1, [3, 6, 9, 12, 15, 18]), (2, [4, 6, 10, 12, 16, 18])):
        run_dir = tmp_path / str(ranks)
        config = tree(run_dir, checkpoint={"every_steps": None, "every_minutes": 1e-9, "keep": 9})
        assert start(config, ranks) == "done"
        assert [event["step"] for event in events(run_dir, "saved")] == steps


def test_metrics_are_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    assert start(tree(tmp_path / "reference"), 1) == "done"
    env = plan(tmp_path / "faults", Fault("train", 11, whom="group"))
    assert start(tree(tmp_path / "run"), 1, env) == "killed"
    path = tmp_path / "run" / "metrics.jsonl"
    assert metrics(tmp_path / "run")[-1]["step"] == 9  # beyond the checkpoint of step 8
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 8')  # half a line
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"event": "sav')
    assert start(tree(tmp_path / "run"), 1, attempt=1) == "done"
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    whole = [json.loads(line) for line in lines if not line.endswith("sav")]
    assert len(whole) == len(lines) - 1
    assert any(event["event"] == "restored" for event in whole)
