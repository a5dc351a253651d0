"""Where the processes that launchers start begin: ``python .../launch/child.py {node|rank|task|leave} ARGS``.

A file and not ``-m launch.child``: the user's directory may hold a ``launch.py`` of its own. This package is loaded
from where it lies, under a name that nobody else uses, so that ``import launch`` in a script means what it always did.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ALIAS = "_ddpkit_launch"


def _load() -> None:
    # Python put this folder first, where its modules would shadow the user's; ddpkit lies beside it.
    sys.path[0] = str(_HERE.parent)
    spec = importlib.util.spec_from_file_location(
        _ALIAS, _HERE / "__init__.py", submodule_search_locations=[str(_HERE)]
    )
    assert spec is not None and spec.loader is not None  # it is a Python file
    package = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "task":
        # From the first moment to the last: a preemption may come while this imports, or when all is done, and would
        # end the job as failed. In between, what passes signals on lets them through.
        signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        )
    _load()
    if role in ("node", "agent"):  # while it imports; what it starts afterwards it ends itself
        importlib.import_module("ddpkit.orphans").on_parents_death(signal.SIGKILL)
    module = importlib.import_module(f"{_ALIAS}.{role}")
    sys.exit(module.main(*arguments))
