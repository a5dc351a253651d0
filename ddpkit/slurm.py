"""What only Slurm's own commands know. Imports nothing of torch."""

from __future__ import annotations

import re
import subprocess

from ddpkit.errors import UserError

_COMMAND_S = 60.0  # a busy controller lets its clients wait


def first_address(nodes: str) -> str:
    """The address of the first of ``nodes``, a list as Slurm writes it: the one by which Slurm itself reaches it.

    Its name may not resolve, and what variables hold is the address of wherever srun was typed.

    Raises:
        UserError: Slurm does not say.
    """
    name, *_ = _scontrol("show", "hostnames", nodes).split()
    shown = _scontrol("show", "node", "--oneliner", name)
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if found is None:
        raise UserError(f"`scontrol show node {name}` names no NodeAddr; set MASTER_ADDR to the address of that node")
    return found[1]


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, stdin=subprocess.DEVNULL)
        problem = done.stderr.strip() if done.returncode or not done.stdout.strip() else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is not None:
        raise UserError(
            f"`{' '.join(command)}` does not say where rank 0 is: {problem}. Set MASTER_ADDR to the address of the "
            "step's first node."
        )
    return done.stdout
