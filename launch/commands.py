"""What each verb of the command line does.

What dry runs and refusals of configs do not need is imported where it is used: it took them a third longer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

from ddpkit import config as configs
from ddpkit import factories, world
from ddpkit.config import Config
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, BrokenCheckpoint, ConfigError, UserError, nearest

from . import plan as plans
from .job import Job
from .launchers import slurm
from .plan import Plan


def run(arguments: Namespace) -> int:
    """`ddpkit run`: idempotent; starts, continues, or says that the run is finished."""
    if arguments.sweep:
        return _run_sweep(arguments)
    config = configs.load(arguments.config, _overrides(arguments))
    run_dir = Path(config.run_dir)
    plan = _run_plan(config, arguments)
    if arguments.dry_run:
        print(f"{configs.dump(config)}---\n{_describe(plan)}")
        return EXIT_DONE
    is_submitted = plan.launcher == "slurm" and slurm.is_submitted(run_dir)
    # Of several machines' launchers, one may come when the others' ranks are at work.
    joins = plan.launcher == "torchrun" and plan.nnodes > 1
    if not _has_work(config, run_dir, arguments.accept_change, is_submitted or joins):
        return EXIT_DONE
    return _start(plan)


def _run_sweep(arguments: Namespace) -> int:
    """One array of jobs, a job for each run that is not finished; all are checked before any is submitted."""
    from . import sweep

    overrides = _overrides(arguments)
    runs = sweep.runs(arguments.sweep, lambda chosen: configs.load(arguments.config, [*overrides, *chosen]))
    home = Path(runs[0].run_dir).parent
    if runs[0].launch.launcher != "slurm":
        raise UserError("--sweep: an array of runs is for --launcher slurm; elsewhere, run them one after the other")
    plans = [_run_plan(config, arguments) for config in runs]
    if arguments.dry_run:
        listed = "\n".join(f"run {index}: {config.run_dir}" for index, config in enumerate(runs))
        print(f"{configs.dump(runs[0])}---\n{listed}\n{plans[0].describe()}\n---\n{slurm.describe(plans, home, True)}")
        return EXIT_DONE
    is_submitted = slurm.is_submitted(home, is_array=True)
    left = [
        plan
        for config, plan in zip(runs, plans, strict=True)
        if _has_work(config, Path(config.run_dir), arguments.accept_change, is_submitted)
    ]
    return slurm.run_array(left, home) if left else EXIT_DONE


def launch(arguments: Namespace) -> int:
    """`ddpkit launch`: a script or module on several ranks, as ``python`` would run it."""
    overrides = _overrides(arguments)
    if arguments.nproc_per_node is not None:
        overrides.append(f"launch.nproc_per_node={arguments.nproc_per_node}")
    if arguments.nnodes is not None:
        overrides.append(f"launch.nnodes={arguments.nnodes}")
    settings = configs.load_launch(overrides)
    if settings.launcher == "inline":
        raise UserError("launch.launcher: inline is for `ddpkit run`; start a single script with python itself")
    told = settings.model_fields_set & {"timeout_s", "stall_timeout_s"}
    job = replace(_script_job(arguments), runtime={key: getattr(settings, key) for key in sorted(told)})
    is_chosen = settings.launcher == "slurm" and arguments.run_dir is None
    run_dir = slurm.new_home(_name(job)) if is_chosen else arguments.run_dir
    plan = plans.make(
        settings,
        job,
        run_dir=run_dir,
        tee_all=arguments.tee == "all",
        command=tuple(sys.argv),
        waits=arguments.wait,
    )
    if is_chosen:
        print(f"ddpkit: --run-dir was not given; it is {run_dir}", file=sys.stderr)
    if arguments.dry_run:
        print(_describe(plan))
        return EXIT_DONE
    return _start(plan)


def evaluate(arguments: Namespace) -> int:
    """`ddpkit eval`: prints one JSON line; writes nothing into the run directory."""
    from ddpkit.checkpoint import listing

    stored = arguments.run_dir / "config.yaml"
    if not stored.is_file():
        raise UserError(f"{arguments.run_dir}: there is no config.yaml in it; `ddpkit run` makes a run directory")
    overrides = [f"run_dir={arguments.run_dir}", *_overrides(arguments)]
    if arguments.ema:
        overrides.append("train.eval_ema=true")
    config = configs.load(stored, overrides)
    _check_references(config)
    if listing.intact_newest(arguments.run_dir) is None:
        if listing.complete(listing.checkpoints_directory(arguments.run_dir)):
            raise BrokenCheckpoint(
                f"{arguments.run_dir}: none of its checkpoints is intact; see ddpkit verify {arguments.run_dir}"
            )
        raise UserError(f"{arguments.run_dir}: there is no checkpoint to evaluate yet")
    job = Job("eval", configs.to_tree(config), {"step": _chosen_step(arguments)}, search_path=(str(Path.cwd()),))
    plan = replace(_plan(config, job, None, arguments), waits=True)  # for the answer
    if arguments.dry_run:
        print(_describe(plan))
        return EXIT_DONE
    return _start(plan)


def status(arguments: Namespace) -> int:
    """`ddpkit status`: where a run stands."""
    from .status import read_status, to_json
    from .telling import describe

    found = read_status(arguments.run_dir)
    print(to_json(found) if arguments.json else describe(found))
    return EXIT_DONE


def report(arguments: Namespace) -> int:
    """`ddpkit report`: one self-contained page about a run."""
    from .report import write_report

    write_report(arguments.run_dir, arguments.out)
    return EXIT_DONE


def export(arguments: Namespace) -> int:
    """`ddpkit export`: the model alone, in a format that other programs read."""
    from .export import write_model  # with torch, only here

    write_model(arguments.run_dir, arguments.out, _chosen_step(arguments), averaged=arguments.ema)
    return EXIT_DONE


def doctor(arguments: Namespace) -> int:
    """`ddpkit doctor`: what was found, and why; 1 if some ranks cannot talk."""
    settings = configs.load_launch(_overrides(arguments))
    if settings.launcher == "slurm":
        raise UserError(
            "doctor: a submitted job answers too late; have Slurm start ranks here and now: "
            "srun --nodes=2 --ntasks-per-node=2 ddpkit doctor"
        )
    with world.adopted({"TORCH_CPP_LOG_LEVEL": "FATAL"}):  # or torch tells at length what the doctor says in a line
        from . import doctor as examination  # with torch, only here

    return examination.examine(settings, arguments.launcher)


def schema(arguments: Namespace) -> int:
    """`ddpkit schema`: what a config may say, for editors or for people."""
    from ddpkit import config_schema

    print(config_schema.reference() if arguments.markdown else json.dumps(config_schema.editor_schema(), indent=2))
    return EXIT_DONE


def verify(arguments: Namespace) -> int:
    """`ddpkit verify`: a line for each checkpoint; 1 if one is not intact."""
    from ddpkit.checkpoint import listing

    if not arguments.run_dir.is_dir():
        raise UserError(f"{arguments.run_dir}: there is no such directory")
    found = listing.listing(arguments.run_dir)
    aside = listing.set_aside(listing.checkpoints_directory(arguments.run_dir))
    if not found and not aside:
        raise UserError(f"{arguments.run_dir}: there are no checkpoints in it")
    for each in found:
        print(f"{each.path.name}: {'intact' if each.problem is None else each.problem}")
    for _, path in aside:
        print(f"{path.name}: broken, set aside earlier")
    # Those set aside are not the run's any more; without any other, though, it has nothing that is intact.
    return EXIT_DONE if found and all(each.problem is None for each in found) else EXIT_FAILED


def _chosen_step(arguments: Namespace) -> int | None:
    """The step that was asked for, or that of the best checkpoint; None for the newest."""
    if not arguments.best:
        step: int | None = arguments.step
        return step
    from ddpkit.checkpoint import listing

    found = listing.intact_best(arguments.run_dir)
    if found is None:
        raise UserError(f"--best: {arguments.run_dir} has no rule for it: checkpoint.best: {{metric: ..., mode: max}}")
    best, manifest = found
    if manifest is None:
        raise UserError(f"--best: {arguments.run_dir}: no intact checkpoint was evaluated and has {best.metric!r}")
    print(
        f"ddpkit: the best checkpoint is that of step {manifest.step}: "
        f"{best.metric} {manifest.progress['values'][best.metric]:.6g}",
        file=sys.stderr,
    )
    return manifest.step


def _start(plan: Plan) -> int:
    launcher = importlib.import_module(f"{__package__}.launchers.{plan.launcher}")
    code: int = launcher.run(plan)
    return code


def _overrides(arguments: Namespace) -> list[str]:
    overrides = list(arguments.overrides)
    if arguments.launcher is not None:
        overrides.append(f"launch.launcher={arguments.launcher}")
    return overrides


def _run_plan(config: Config, arguments: Namespace) -> Plan:
    _check_references(config)
    _check_first_weights(config)
    _check_accelerate(config)
    # Of a job on other machines, the launcher is there too.
    options = {} if config.launch.launcher == "slurm" else {"launcher_pid": os.getpid(), **_terminal()}
    job = Job("run", configs.to_tree(config), options, search_path=(str(Path.cwd()),))
    return _plan(config, job, Path(config.run_dir), arguments)


def _terminal() -> dict[str, int]:
    """The columns of the terminal that people look at; ranks write to a pipe."""
    return {"terminal": os.get_terminal_size(sys.stderr.fileno()).columns} if sys.stderr.isatty() else {}


def _describe(plan: Plan) -> str:
    told = plan.describe()
    return told if plan.launcher != "slurm" else f"{told}\n---\n{slurm.describe((plan,), slurm.home(plan))}"


def _has_work(config: Config, run_dir: Path, accepted: list[str], is_shared: bool) -> bool:
    """Whether a run may start or go on now; says so if it is finished.

    With ``is_shared`` it is no matter who uses the run directory: a job that is submitted already, or other machines.
    """
    from ddpkit.checkpoint import claim, listing

    from .status import ended_early, is_finished

    _check_same_run(config, run_dir, accepted)
    holder = None if is_shared else claim.holder(run_dir, claim.Claimant.here())
    if holder is not None:
        raise UserError(
            f"run_dir: {run_dir} is in use by pid {holder.claimant.process.pid} on {holder.claimant.place.host} since "
            f"{holder.started_at}; wait for it, stop it, or choose another run_dir"
        )
    newest = listing.intact_newest(run_dir)
    if newest is not None and is_finished(config, newest):
        early = ended_early(config, newest)
        why = f" ({early})" if early is not None else ""
        print(f"ddpkit: {run_dir} is finished: step {newest.step}{why}", file=sys.stderr)
        return False
    return True


def _name(job: Job) -> str:
    return Path(job.target).stem if job.kind == "script" else job.target.rpartition(".")[2]


def _plan(config: Config, job: Job, run_dir: Path | None, arguments: Namespace) -> Plan:
    return plans.make(
        config.launch,
        job,
        run_dir=run_dir,
        tee_all=arguments.tee == "all",
        command=tuple(sys.argv),
        deterministic=config.train.deterministic,
        global_batch_size=config.data.global_batch_size if job.kind == "run" else None,
        waits=arguments.wait,
    )


def _check_references(config: Config) -> None:
    problems = factories.check(config, [str(Path.cwd()), *sys.path[1:]])
    if problems:
        raise ConfigError("\n".join(problems))


def _check_first_weights(config: Config) -> None:
    """A run that goes on does not need them any more."""
    init_from = config.model.init_from
    if init_from is None or (path := Path(init_from.path)).exists():
        return
    from ddpkit.checkpoint import listing

    if listing.has_any(Path(config.run_dir)):
        return
    beside = [entry.name for entry in path.parent.glob("*")]
    raise ConfigError(f"model.init_from.path: {path}: there is no such file{nearest(path.name, beside)}")


def _check_accelerate(config: Config) -> None:
    if config.model.parallel == "accelerate":
        from ddpkit import accelerated

        try:
            accelerated.check(config)
        except ConfigError as error:
            raise ConfigError(f"model.accelerate_config: {error}") from None


def _script_job(arguments: Namespace) -> Job:
    if arguments.module:
        name, *argv = arguments.module
        top = name.partition(".")[0]  # looking further would import it
        if PathFinder.find_spec(top, [str(Path.cwd())]) is None and importlib.util.find_spec(top) is None:
            raise UserError(f"launch: there is no module {top}, in {Path.cwd()} or installed")
        return Job("module", target=name, argv=tuple(argv), search_path=(str(Path.cwd()),))
    given = arguments.script[1:] if arguments.script[:1] == ["--"] else arguments.script
    if not given:
        raise UserError(
            "launch: nothing to launch was given: ddpkit launch [options] SCRIPT.py [ARGS...], or -m MODULE"
        )
    script, *argv = given
    if script.startswith("-"):
        raise UserError(f"launch: unknown option {script}; see ddpkit launch --help")
    if not Path(script).exists():
        raise UserError(f"launch: there is no file {script} in {Path.cwd()}")
    # What python puts first on the path: the folder that the script really lies in; a folder or an archive itself.
    is_code = Path(script).is_file() and not zipfile.is_zipfile(script)
    if not is_code and not _has_main(Path(script)):
        raise UserError(f"launch: {script} has no __main__.py, so there is nothing in it to launch")
    first = Path(script).resolve().parent if is_code else Path(script).absolute()
    return Job("script", target=script, argv=tuple(argv), search_path=(str(first),))


def _has_main(place: Path) -> bool:
    """Whether python finds what to run in a folder, or in an archive."""
    if place.is_dir():
        names = [path.name for path in place.iterdir()]
    else:
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
    return not {"__main__.py", "__main__.pyc"}.isdisjoint(names)


def _check_same_run(config: Config, run_dir: Path, accepted: list[str]) -> None:
    stored = run_dir / "config.yaml"
    if not stored.exists():
        return
    try:
        before = configs.load(stored)
    except ConfigError as error:
        raise UserError(f"{error}\n{stored} belongs to the run; restore it, or choose another run_dir") from error
    found = configs.differences(before, config)
    refused = [each for each in found if not any(_covers(key, each.key) for key in accepted)]
    if refused:
        lines = "\n".join(f"  {each}" for each in refused)
        accept = " ".join(f"--accept-change {each.key}" for each in refused)
        raise UserError(
            f"the config differs from the one that {run_dir} was started with:\n{lines}\n"
            f"Undo the change, choose another run_dir, or accept it: {accept}"
        )


def _covers(accepted: str, key: str) -> bool:
    return key == accepted or key.startswith(accepted + ".")
