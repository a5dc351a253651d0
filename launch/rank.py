"""The first and the last thing that happens in a rank: its environment and output before the job, its report after."""

from __future__ import annotations

import base64
import builtins
import contextlib
import faulthandler
import io
import json
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import types
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import cloudpickle

from ddpkit import world
from ddpkit.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
    DdpkitError,
    Stalled,
    StopRequested,
    UserError,
)
from ddpkit.launched import Launched, surrounded

from .carrying import carried
from .causes import cause_of, explain
from .job import BEGUN, DONE, STACK_SIGNAL, STOP_SIGNALS, STOPPED, Failure, Job, RankOrder
from .last_groups import keep_last_groups, let_go
from .memory import be_killed_first


def main(order_fd: str) -> int:
    """A rank that was started anew (``start_method: spawn``); its order lies in an inherited file."""
    with os.fdopen(int(order_fd)) as file:
        tree = json.load(file)
    return run(Job.from_json(tree["job"]), RankOrder(**tree["order"]))


def run(job: Job, order: RankOrder) -> int:
    """Do the job as this rank, and say how it went. Returns the exit code of the process."""
    world.adopt(order.env)
    be_killed_first()
    # Where multiprocessing puts its sockets, loader workers' too: those that are killed leave them behind.
    multiprocessing.current_process()._config["tempdir"] = order.scratch  # type: ignore[attr-defined]  # private; there is no other way
    _redirect(order, takes_input=order.rank == 0 and job.kind in ("script", "module"))
    faulthandler.enable(all_threads=False)  # a crash in native code says where it was called from
    sys.path[0:1] = job.search_path
    faulthandler.register(STACK_SIGNAL, file=order.stacks, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACK_SIGNAL])
    me = os.getpid()
    _report_stalls(order, with_exception=job.kind == "call")
    try:
        try:
            with surrounded(_launched(job, order)):
                _do(job, order)
        except BaseException:
            # torch's handler raises what it has to say of a dead loader worker wherever we are: here, or not at all.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
    except BaseException as error:
        if os.getpid() != me:
            raise  # a process that the script has forked: what becomes of it is the script's own business
        if isinstance(error, SystemExit):
            return _exit_code(error, job, order)
        if isinstance(error, UserError):
            report_failure(order, error, EXIT_USER, with_traceback=False)
            return EXIT_USER
        # ddpkit's own errors say what happened (a broken checkpoint, a full disk); where in ddpkit says nothing more.
        is_ours = isinstance(error, DdpkitError) and job.kind in ("run", "eval")
        report_failure(order, error, EXIT_FAILED, with_traceback=not is_ours, with_exception=job.kind == "call")
        return EXIT_FAILED
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    _report(order, {"reached": DONE})
    _leave(job, order, EXIT_DONE)
    return EXIT_DONE


def _launched(job: Job, order: RankOrder) -> Launched:
    """What the job's runtime is to know."""
    begun, stopped = (partial(_report, order, {"reached": reached}) for reached in (BEGUN, STOPPED))
    return Launched(**job.runtime, begun=begun, stopped=stopped)


def _report_stalls(order: RankOrder, with_exception: bool) -> None:
    """Where the main thread is stuck for good, it is another one that says so, and ends the process."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, Stalled):
            report_failure(order, args.exc_value, EXIT_FAILED, with_traceback=False, with_exception=with_exception)
        else:
            before(args)

    threading.excepthook = hook


def _do(job: Job, order: RankOrder) -> None:
    if job.kind in ("run", "eval"):
        from ddpkit import worker  # with torch; a script may not want it

        _show_log()
        # What comes when the work is done must not end this rank as failed; until then the worker has its own handlers.
        for number in {*STOP_SIGNALS, *signal.pthread_sigmask(signal.SIG_BLOCK, ())}:
            signal.signal(number, lambda *_: None)
        worker.work(job.kind, job.config, job.options)  # lets the stop signals through when it can stop
        return
    _let_signals_through()
    keep_last_groups()
    if job.kind == "call":
        function, args, kwargs = cloudpickle.loads(job.call)
        result = cloudpickle.dumps(function(*args, **kwargs))
        _report(order, {"result": base64.b64encode(result).decode()})
    else:
        _run_as_main(job)


def _let_signals_through() -> None:
    """A script gets the stop signals as ever. Slurm's warning would end one that has no handler: it is for others."""
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS) - set(STOP_SIGNALS)
    for number in held:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, held)


def _run_as_main(job: Job) -> None:
    """Run a script or a module as ``python`` does: in a ``__main__`` of its own that stays until the process ends.

    (The public functions of runpy put the old one back at the end, under the feet of the script's threads and atexit
    functions.)
    """
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # by this name multiprocessing's children know it; bound on its import, long ago
        sys.modules["__mp_main__"] = main
    sys.argv = [job.target, *job.argv]
    path = os.path.abspath(job.target)  # noqa: PTH100 - as python does: without resolving links
    if job.kind == "module":
        runpy._run_module_as_main(job.target)  # type: ignore[attr-defined]  # private; it is what `python -m` calls
    elif sys.path[0] == path:  # a folder or an archive with a __main__.py in it
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]  # as above
    else:
        main.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        exec(code, main.__dict__)


def _redirect(order: RankOrder, takes_input: bool) -> None:
    """Write to the launcher's pipes; lines appear as they are written, and a kill loses at most a part of one.

    Standard input is the launcher's for rank zero of a script; all others find nothing in it.
    """
    if not takes_input:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    os.dup2(order.stdout, 1)
    os.dup2(order.stderr, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper in a new process


def _show_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("ddpkit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _leave(job: Job, order: RankOrder, code: int) -> None:
    """Say that this rank leaves of its own accord: taking the interpreter apart takes longer than others wait."""
    _report(order, {"leaves": time.monotonic(), "code": code})
    if job.kind not in ("run", "eval"):  # which have closed their groups
        let_go()


def _exit_code(leaving: SystemExit, job: Job, order: RankOrder) -> int:
    if leaving.code in (None, EXIT_DONE, EXIT_STOPPED):
        _leave(job, order, leaving.code or EXIT_DONE)
    if leaving.code is None:
        return EXIT_DONE
    if isinstance(leaving.code, int):
        code = leaving.code & 0xFF
        if isinstance(leaving, StopRequested):
            _report(order, {"reached": STOPPED})
        if code not in (EXIT_DONE, EXIT_STOPPED):
            _report_exit(order, code)
        return code
    print(leaving.code, file=sys.stderr)  # noqa: T201 - what Python itself does with sys.exit("text")
    report_failure(order, leaving, EXIT_FAILED, with_traceback=False)
    return EXIT_FAILED


def report_failure(
    order: RankOrder, error: BaseException, exit_code: int, with_traceback: bool, with_exception: bool = False
) -> None:
    """Tell the launcher why this rank ends."""
    when = time.monotonic()  # first of all: the order of failures is the order of causes
    cause = cause_of(_without_our_frames(error))
    failure = Failure(
        rank=order.rank,
        host=socket.gethostname(),
        when=when,
        exit_code=exit_code,
        kind=cause.kind,
        message=cause.message,
        traceback=cause.traceback if with_traceback else "",
        is_users_input=isinstance(error, UserError),
        is_consequence=cause.is_consequence,
        late=error.late if isinstance(error, Stalled) else None,
        exception=carried(error) if with_exception and isinstance(error, Exception) else b"",
    )
    _report(order, {"failure": failure.to_json()})


def _report_exit(order: RankOrder, code: int) -> None:
    """Say now that this rank ends in error: leaving the interpreter takes longer than others take to notice."""
    failure = Failure(order.rank, socket.gethostname(), time.monotonic(), code, message=explain(code))
    _report(order, {"failure": failure.to_json()})


def _without_our_frames(error: BaseException) -> BaseException:
    """Begin the traceback where the user's code, or ddpkit's core, begins."""
    outside = {str(Path(__file__)), runpy.__file__, "<frozen runpy>"}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in outside:
        trace = trace.tb_next
    # A script that cannot even be compiled has no frame: the error itself shows the line.
    return error.with_traceback(trace) if trace is not None or isinstance(error, SyntaxError) else error


def _report(order: RankOrder, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    with contextlib.suppress(OSError):  # the launcher is gone, and this process will soon follow
        while data:
            data = data[os.write(order.report, data) :]
