"""Start ranks from Python: ``launch.local(fn, *args, nproc_per_node=2)``. The command line is `launch.cli`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calls import local as local

__all__ = ["local"]


def __getattr__(name: str) -> Any:
    # Resolved late: the command line's help and refusals import this package and nothing more of it.
    if name == "local":
        from .calls import local

        return local
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
