"""Trackers: which there are, the same run to the service after a restart, and no run that ends because of one."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import accelerate.tracking  # here, before a test makes believe that a library is installed
import pytest

from ddpkit import config, services, trackers
from ddpkit.errors import UserError
from ddpkit.trackers import Tracker, Trackers, flat
from ddpkit.world import World


def run(run_dir: Path, step: int = 0) -> Any:
    """As much of a run as trackers look at."""
    ranks = SimpleNamespace(on_main=lambda name, action: action())
    rt = SimpleNamespace(ranks=ranks, world=World(0, 1, 0, 1), device=SimpleNamespace(type="cpu"), is_main=True)
    return SimpleNamespace(run_dir=run_dir, rt=rt, progress=SimpleNamespace(step=step, epoch=1, samples=8 * step))


def send(tracked: Trackers, run: Any, *lines: int) -> None:
    with tracked:
        tracked.on_start(run)
        for step in lines:
            run.progress.step = step
            tracked.on_record(run, "train", {"loss": step / 2}, {"step_s": 0.25})


class Own:
    """A tracker of the user's."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.threads: set[int] = set()

    def start(self) -> None:
        self.calls.append("start")
        self.threads.add(threading.get_ident())

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))
        self.threads.add(threading.get_ident())

    def finish(self) -> None:
        self.calls.append("finish")


def test_names_are_accelerates() -> None:
    known = set(accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    assert set(services.SERVICES) == set(get_args(config.TrackerName)) == known


def test_all_that_is_written_is_in_the_run_directory(tmp_path: Path) -> None:
    place = services.Place(tmp_path / "runs" / "own", 0, None, goes_on=False)
    for name, key in [("tensorboard", "logging_dir"), ("wandb", "dir"), ("aim", "logging_dir"), ("swanlab", "logdir")]:
        assert Path(services.SERVICES[name].arguments(place)[key]).is_relative_to(place.run_dir)
    dvclive = services.SERVICES["dvclive"].arguments(place)
    # It leaves out what it wrote before only if that is in a folder below.
    assert Path(dvclive["dir"]).parent == Path(dvclive["dvcyaml"]).parent == place.run_dir


def test_every_line_is_sent_in_order_from_one_thread_of_its_own(tmp_path: Path) -> None:
    own = Own()
    send(Trackers([own], {"seed": 3, "optimizer": {"args": {"betas": [0.9], "eps": None}}}), run(tmp_path), 10, 20)
    line = {"train/loss": 5.0, "time/step_s": 0.25, "progress/epoch": 1, "progress/samples": 0}
    sent_config = {"seed": 3, "optimizer.args.betas": "[0.9]"}
    assert own.calls == ["start", sent_config, (10, line), (20, line | {"train/loss": 10.0}), "finish"]
    assert len(own.threads) == 1 and threading.get_ident() not in own.threads
    again = Own()
    send(Trackers([again], {"seed": 3}), run(tmp_path, step=20), 30)
    assert [call for call in again.calls if isinstance(call, str)] == ["start", "finish"]
    assert {"seed": 3} not in again.calls  # once is enough


def test_what_fails_costs_lines_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Own):
        def log(self, values: dict[str, Any], step: int) -> None:
            if step < 30:
                raise ConnectionError("no network")
            super().log(values, step)

    failing, fine = Failing(), Own()
    send(Trackers([failing, fine]), run(tmp_path), 10, 20, 30)
    assert [call[0] for call in failing.calls if isinstance(call, tuple)] == [30]
    assert [call[0] for call in fine.calls if isinstance(call, tuple)] == [10, 20, 30]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "Failing: a line could not be sent (ConnectionError: no network)" in warning


def test_what_cannot_start_ends_a_run_that_begins_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Offline(Own):
        def start(self) -> None:
            raise ConnectionError("no network")

    with pytest.raises(UserError, match=r"trackers: Offline could not be started: ConnectionError: no network"):
        send(Trackers([Offline()]), run(tmp_path), 10)
    assert not caplog.records
    offline = Offline()
    send(Trackers([offline]), run(tmp_path, step=10), 20)
    assert offline.calls == []
    assert "goes on without it" in caplog.text


def test_one_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    class Hanging(Own):
        def log(self, values: dict[str, Any], step: int) -> None:
            released.wait()

    monkeypatch.setattr(trackers, "_FINISH_S", 0.05)
    send(Trackers([Hanging()]), run(tmp_path), 10, 20)
    assert "has not sent everything" in caplog.text
    released.set()


def test_an_unknown_one_or_one_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        Trackers(["tensorbord"])
    with pytest.raises(UserError, match="is no tracker: a name is needed, or an object with log"):
        Trackers([{"name": "wandb"}])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=None))  # a folder of that name
    with pytest.raises(UserError, match="wandb needs the package wandb, which is not installed: pip install wandb"):
        Trackers([Tracker("wandb")])


class FakeWandb:
    """As much of W&B as accelerate uses, with what it is asked for."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.lines: list[int] = []
        self.configs: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.configs.append(values))

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        return SimpleNamespace(log=lambda values, step: self.lines.append(step), finish=lambda: None)


def test_a_run_that_goes_on_is_the_same_one_to_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(services, "_is_installed", lambda package: True)
    run_dir = tmp_path / "sweep" / "small"
    run_dir.mkdir(parents=True)
    wanted = Tracker("wandb", {"entity": "lab"})
    send(Trackers([wanted], {"seed": 0}), run(run_dir), 10)
    send(Trackers([wanted], {"seed": 0}), run(run_dir, step=10), 20)
    first, second = fake.inits
    assert first == second
    assert first["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["entity"]) == ("sweep", "small", "lab")
    assert fake.lines == [10, 20]
    assert fake.configs == [{"seed": 0}]
    (tmp_path / "sweep" / "other").mkdir()
    send(Trackers([wanted]), run(tmp_path / "sweep" / "other"), 10)
    assert fake.inits[2]["id"] != first["id"]


def test_an_identity_that_the_service_gives_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    def start_run(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id=options["run_id"] or "given by mlflow"))

    fake = SimpleNamespace(
        search_experiments=lambda filter_string: [],
        create_experiment=lambda **_: "1",
        start_run=start_run,
        log_metrics=lambda *_, **__: None,
        end_run=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setattr(services, "_is_installed", lambda package: True)
    for step in (0, 10):
        send(Trackers(["mlflow"]), run(tmp_path, step), step + 10)
    assert [options["run_id"] for options in started] == [None, "given by mlflow"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "given by mlflow"}


def test_arguments_that_a_tracker_does_not_take_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_is_installed", lambda package: True)
    with pytest.raises(UserError, match=r"trackers: mlflow does not take these args: .*'colour'"):
        Trackers([Tracker("mlflow", {"colour": "red"})]).on_start(run(tmp_path))


def test_a_config_is_flat_for_services() -> None:
    tree = {"a": {"b": 1, "c": {"d": True}}, "e": ["x", 2], "f": None, "g": "text"}
    assert dict(flat(tree)) == {"a.b": 1, "a.c.d": True, "e": '["x", 2]', "g": "text"}


@pytest.fixture(autouse=True)
def _log_reaches_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ddpkit"), "propagate", True)
