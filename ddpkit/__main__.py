"""``ddpkit`` and ``python -m ddpkit``: the one place in this package that knows of the launcher layer.

The layer is loaded from beside this package under a name of its own: the user's directory may hold a ``launch.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from pathlib import Path

from ddpkit.errors import EXIT_INTERRUPTED, EXIT_STOPPED

_ALIAS = "_ddpkit_launch"


def main() -> None:
    """Run the command line; ends the process."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # until there are ranks to pass it on to
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    try:
        code = _main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is decided; one more Ctrl-C shall not garble it
    sys.exit(code)


def _main() -> int:
    folder = Path(__file__).resolve().parent.parent / "launch"
    if not getattr(sys.flags, "safe_path", False):
        # Python put the current directory (-m) or that of the console script first, where a random.py of the user's
        # would shadow the standard one. The current directory is for the ranks.
        sys.path[0] = str(folder.parent)
    spec = importlib.util.spec_from_file_location(
        _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # it is a Python file
    package = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = package
    spec.loader.exec_module(package)
    code: int = importlib.import_module(f"{_ALIAS}.cli").main(sys.argv[1:])
    return code


if __name__ == "__main__":
    main()
