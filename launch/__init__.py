"""Start ranks from Python: ``launch.local(fn, *args, nproc_per_node=2)``, ``launch.torchrun`` or
``launch.slurm``.

The command line is `launch.cli`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calls import local as local
    from .calls import slurm as slurm
    from .calls import torchrun as torchrun

__all__ = ["local", "slurm", "torchrun"]


def __getattr__(name: str) -> Any:
    # Resolved late: the command line's help and refusals import this package and nothing more of it.
    if name in __all__:
        from . import calls

        return getattr(calls, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
