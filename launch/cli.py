"""argv -> what is to be done: parsed, checked as a whole, planned, and only then carried out.

Nothing here or above imports torch: help, dry runs and refusals answer at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpkit.errors import EXIT_DONE, DdpkitError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = _command(arguments.command)(arguments)
        sys.stdout.flush()
        return code
    except DdpkitError as error:
        print(f"ddpkit: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes there
        return EXIT_DONE  # `ddpkit status | head`


def _nobody_reads(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    # Nothing of what is imported is garbage, nor will it be: no collection is to go through it, least of all those of
    # the interpreter's own end (15 % of a dry run).
    gc.disable()
    from ddpkit.world import adopted

    # Nor are plugins of pydantic looked for, in the metadata of all packages that are installed (5 %).
    with adopted({"PYDANTIC_DISABLE_PLUGINS": "__all__"}):
        from . import commands  # with pydantic: help and misspelt options take a fifth of the time without

    gc.freeze()
    gc.enable()
    command: Callable[[argparse.Namespace], int] = getattr(commands, name)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpkit", description="Train on any number of ranks; stop and go on anywhere."
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = verbs.add_parser("run", help="start a run, continue it, or say that it is finished")
    run.add_argument("config", metavar="CONFIG.yaml")
    _add_overrides(run)
    _add_launching(run)
    run.add_argument(
        "--accept-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let this key differ from the run's config",
    )
    run.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=[V,W]",
        help="slurm: a run for each of these values, as one array of jobs; several give all combinations",
    )
    run.set_defaults(command="run")

    launch = verbs.add_parser("launch", help="run a script of your own on several ranks")
    launch.add_argument("--nproc-per-node", metavar="N", help="ranks on this machine, or auto")
    launch.add_argument("--nnodes", metavar="N", help="machines, or with torchrun a range of them: 2:4")
    launch.add_argument("--run-dir", type=Path, metavar="DIR", help="where attempts, logs and failure reports go")
    _add_overrides(launch)
    _add_launching(launch)
    launch.add_argument("-m", dest="module", metavar="MODULE", nargs=argparse.REMAINDER, help="a module, as python -m")
    launch.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT.py [ARGS...]")
    launch.set_defaults(command="launch")

    evaluate = verbs.add_parser("eval", help="evaluate a checkpoint, exactly, on any number of ranks")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_choice(evaluate)
    evaluate.add_argument("--ema", action="store_true", help="of the moving average of the weights")
    _add_overrides(evaluate)
    _add_launching(evaluate)
    evaluate.set_defaults(command="evaluate")

    status = verbs.add_parser("status", help="where a run stands, how long it will take, where its time has gone")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(command="status")

    report = verbs.add_parser("report", help="one page about a run: curves, attempts, ranks, failures")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("-o", dest="out", type=Path, required=True, metavar="OUT.html", help="replaced if it is there")
    report.set_defaults(command="report")

    export = verbs.add_parser("export", help="write the model of a checkpoint as .pt or .safetensors")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    export.add_argument("out", type=Path, metavar="OUT")
    _add_choice(export)
    export.add_argument("--ema", action="store_true", help="the moving average of the weights (model.ema_decay)")
    export.set_defaults(command="export")

    doctor = verbs.add_parser("doctor", help="what this environment is, and whether ranks can talk in it")
    doctor.add_argument("--launcher", metavar="L", help="start ranks by this one; by default the ranks that are there")
    _add_overrides(doctor)
    doctor.set_defaults(command="doctor")

    schema = verbs.add_parser("schema", help="a JSON schema of the config, for editors")
    schema.add_argument("--markdown", action="store_true", help="the same for people: every key with its meaning")
    schema.set_defaults(command="schema")

    verify = verbs.add_parser("verify", help="check every checkpoint against its manifest")
    verify.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verify.set_defaults(command="verify")
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--step", type=int, metavar="N", help="of this step; by default the newest intact one")
    choice.add_argument("--best", action="store_true", help="the best intact one, by checkpoint.best")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        dest="overrides",
        action="append",
        default=[],
        metavar="key.path=value",
        help="set a key of the config",
    )


def _add_launching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launcher", metavar="L", help="short for -o launch.launcher=L")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--tee", choices=["all"], help="show the output of all ranks, not only rank 0's")
    parser.add_argument("--wait", action="store_true", help="follow a submitted job (other launchers wait anyway)")
