"""What is asked of Slurm: the options in ``launch.slurm``, checked, and the text of the script made of them.

The names, the checks of names and types, and the text are submitit's; what ddpkit needs besides (requeueing, the
warning, the shape of the job) is added here. Nothing needs Slurm.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from submitit.slurm.slurm import SlurmExecutor, _convert_mem, _make_sbatch_string

from ddpkit.config import Launch, node_range
from ddpkit.errors import UserError, nearest
from ddpkit.explain import shown

_CHILD = Path(__file__).with_name("child.py")
_LONGEST_WARNING_S = 90
_SHORTEST_WARNING_S = 15  # of a limit of a minute, that leaves 45 s of work

_NOT_FOR_USERS = {"command", "folder", "map_count", "num_gpus"}  # submitit's own business, and a name that it gave up
_OURS = {
    "nodes": "give launch.nnodes",
    "ntasks_per_node": "give launch.nproc_per_node; there is one task per node, or with launch.start_method=spawn one "
    "per rank",
    "cpus_per_task": "give launch.cpus_per_rank",
    "cpus_per_gpu": "give launch.cpus_per_rank; a rank has one GPU",
    "gpus_per_task": "give gpus_per_node; a rank chooses its GPU among those of the node",
    "use_srun": "leave it out; a job of ddpkit starts its tasks by srun",
}
_OURS_BESIDES = {  # in additional_parameters
    "signal": "give launch.warning_signal, and signal_delay_s",
    "ntasks": "give launch.nnodes and launch.nproc_per_node",
    **dict.fromkeys(("output", "error", "open-mode", "array", "requeue", "no-requeue"), "leave it out; ddpkit sets it"),
    **{key.replace("_", "-"): advice for key, advice in _OURS.items()},
}
# Where Slurm takes more than submitit's annotations say, or they are no types to check against.
_TYPES: dict[str, Any] = {
    "gpus_per_node": int | str,  # a100:4
    "mem": int | str,
    "mem_gb": float,
    "srun_args": list[str],
}
_WORDS = {"int": "a whole number", "str": "a string", "bool": "true or false", "float": "a number"}


def parameters(launch: Launch) -> tuple[int, dict[str, Any]]:
    """Give the ranks per node, and the arguments for submitit's text of the script, of a ``launch`` section.

    Raises:
        UserError: an unknown name, a wrong type, something that another key of ``launch`` decides, or a number of
            ranks that cannot be told from here.
    """
    given = _checked(launch.slurm)
    if launch.rdzv_endpoint is not None:
        raise UserError(f"launch.rdzv_endpoint: {launch.rdzv_endpoint} is for launch.launcher=torchrun; leave it out")
    nproc = _ranks_per_node(launch, given)
    is_warm = launch.start_method == "warm"
    # srun does not take the number over from sbatch (since Slurm 22.05): it is said twice.
    cpus = _cpus_per_rank(launch, given) * (nproc if is_warm else 1)
    srun = ["--kill-on-bad-exit=1", "--open-mode=append"]
    # With all cores of the node, and one task: no binding to the one core that srun thinks a task has.
    srun.append(f"--cpus-per-task={cpus}" if cpus else "--cpu-bind=none")
    # The defaults of submitit are not ours: a limit of 5 minutes (the partition has its own), a wckey.
    asked = {"time": None, "wckey": None, "cpus_per_task": cpus or None} | given
    delay_s = _warning_s(given)
    asked |= {
        "nodes": node_range(launch.nnodes)[1],
        "ntasks_per_node": 1 if is_warm else nproc,
        "signal_delay_s": delay_s,
        "srun_args": srun + given.get("srun_args", []),
        # To the tasks, not to the batch shell, which would not pass it on.
        "additional_parameters": given.get("additional_parameters", {})
        | {"requeue": True, "signal": f"{launch.warning_signal}@{delay_s}"},
    }
    return nproc, asked


def text(parameters: Mapping[str, Any], folder: Path, name: str, array: int | None) -> str:
    """The script that sbatch is given.

    Args:
        parameters: as `parameters` gives them.
        folder: of this submission, absolute: where the plan is and the logs go.
        name: of the job, unless they have one.
        array: how many jobs there are; None for one that is no array.
    """
    # A command of ours, instead of submitit's: its way is to pickle a function, and to run it under signal handlers
    # that ignore SIGTERM and save on rank zero alone. Here no user object is pickled, and what a stop means is agreed.
    task, leave = (shlex.join([sys.executable, str(_CHILD), role, str(folder)]) for role in ("task", "leave"))
    command = f"{task} || exec {leave} $?"
    made: str = _make_sbatch_string(command, folder, **{"job_name": name} | dict(parameters), map_count=array)
    return made


def stated(script: str) -> list[str]:
    """The options that a script states, as they are spelt."""
    return re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by the names that submitit's text knows, as far as users may give them."""
    types = _types()
    other_names: dict[str, str] = {name: str(other) for name, other in SlurmExecutor._equivalence_dict().items()}
    checked: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for key, value in options.items():
        bare = key.removeprefix("slurm_")
        name = other_names.get(bare, bare)
        where = f"launch.slurm.{key}"
        if name in _OURS:
            raise UserError(f"{where}: {_OURS[name]}")
        if name not in types:
            known = sorted((types.keys() | other_names.keys()) - _OURS.keys() - {"tasks_per_node"})
            raise UserError(f"{where}: unknown key{nearest(bare, known)} (submitit's names: {', '.join(known)})")
        if name in given_as:
            raise UserError(f"{where}: {given_as[name]} says the same; leave one of them out")
        given_as[name] = key
        if value is None or value is False:
            continue  # submitit would write the word into the script
        _check_type(where, value, types[bare if bare in types else name])
        checked[name] = _convert_mem(value) if bare == "mem_gb" else value
    for key in checked.get("additional_parameters", {}):
        if (advice := _OURS_BESIDES.get(key.replace("_", "-"))) is not None:
            raise UserError(f"launch.slurm.additional_parameters.{key}: {advice}")
    return checked


def _types() -> dict[str, Any]:
    hints = get_type_hints(_make_sbatch_string)
    names = inspect.signature(_make_sbatch_string).parameters.keys() - _NOT_FOR_USERS
    return {name: hints[name] for name in names} | _TYPES


def _check_type(where: str, value: object, kind: Any) -> None:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = _in_words(kind)
        found = shown(value)  # type: ignore[arg-type]  # a JSON value, as the config has checked
        raise UserError(f"{where}: expected {wanted}, got {found}") from error


def _in_words(kind: Any) -> str:
    parts = [part for part in getattr(kind, "__args__", ()) if part is not type(None)]
    name = str(getattr(kind, "__name__", ""))
    if name in _WORDS:
        return _WORDS[name]
    if str(kind).startswith(("list", "typing.List")):
        return "a list of strings"
    if str(kind).startswith(("dict", "typing.Dict")):
        return "a mapping"
    return " or ".join(_in_words(part) for part in parts)


def _ranks_per_node(launch: Launch, given: Mapping[str, Any]) -> int:
    gpus = 0 if launch.backend == "gloo" else _gpus_per_node(given)
    if launch.backend == "nccl" and not gpus:
        raise UserError("launch.backend: nccl needs GPUs; give launch.slurm.gpus_per_node, or use auto or gloo")
    if launch.nproc_per_node != "auto":
        if gpus and launch.nproc_per_node > gpus:
            raise UserError(
                f"launch.nproc_per_node: {launch.nproc_per_node} ranks, but launch.slurm asks for {gpus} GPU(s) per "
                "node, and one rank needs one GPU. Ask for more, or give launch.backend=gloo to train on the CPU."
            )
        return launch.nproc_per_node
    found = gpus or launch.nproc_without_gpu
    if not found:
        raise UserError(
            "launch.nproc_per_node: auto cannot look at the nodes of a job that is still to come; give a number, or "
            "launch.slurm.gpus_per_node for one rank per GPU"
        )
    return found


def _gpus_per_node(given: Mapping[str, Any]) -> int:
    """As asked for by number or type and number: 4, a100:4, or gpu:a100:4 among other resources."""
    wanted = str(given.get("gpus_per_node", ""))
    if not wanted:
        resources = str(given.get("gres", "")).split(",")
        wanted = ",".join(item.partition(":")[2] or "1" for item in resources if item.partition(":")[0] == "gpu")
    try:
        return sum(int(item.rpartition(":")[2]) for item in wanted.split(",")) if wanted else 0
    except ValueError:
        raise UserError(f"launch.slurm: {wanted!r} is no number of GPUs; write 4, or a100:4") from None


def _cpus_per_rank(launch: Launch, given: Mapping[str, Any]) -> int:
    """Cores for a rank; 0 where the job has them without being told."""
    if launch.cpus_per_rank is not None:
        return launch.cpus_per_rank
    return 0 if "exclusive" in given else 1


def _warning_s(given: Mapping[str, Any]) -> int:
    """How long before the time limit the warning comes. Slurm looks every 30 s only: that much earlier or later."""
    limit_min = given.get("time")
    delay_s: int | None = given.get("signal_delay_s")
    if delay_s is None:
        quarter_s = _LONGEST_WARNING_S if limit_min is None else limit_min * 60 // 4
        return max(_SHORTEST_WARNING_S, min(_LONGEST_WARNING_S, quarter_s))
    if delay_s < 1 or (limit_min is not None and delay_s >= limit_min * 60):
        limit = "the time limit" if limit_min is None else f"the time limit of {limit_min * 60} s"
        raise UserError(f"launch.slurm.signal_delay_s: {delay_s} s is not between 1 s and {limit}")
    return delay_s


def usable_folder(folder: Path) -> Path:
    """Give ``folder`` back, unless Slurm would read its name in another way.

    Raises:
        UserError: there is a character in it that Slurm replaces.
    """
    bad: Sequence[str] = [mark for mark in "%\\\n" if mark in str(folder)]
    if bad:
        raise UserError(f"run_dir: {str(folder)!r}: Slurm gives {bad[0]!r} in the path of a log another meaning")
    return folder
