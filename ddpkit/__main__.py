"""``ddpkit`` and ``python -m ddpkit``: the one place in this package that knows of the launcher layer.

The layer is loaded from beside this package under a name of its own: the user's directory may hold a ``launch.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ddpkit.errors import EXIT_INTERRUPTED, EXIT_STOPPED

_ALIAS = "_ddpkit_launch"


class UntilThereAreRanks:
    """Handles a stop signal as long as there is nobody to pass it on to: ends the process.

    Attributes:
        received: it has come. Its exception may get lost: Python drops what is raised in a callback of an import, say.
            Whoever takes over then knows.
    """

    def __init__(self, end: BaseException) -> None:
        self._end = end
        self.received = False

    def __call__(self, *_: object) -> NoReturn:
        """Handle the signal."""
        self.received = True
        raise self._end


def main() -> None:
    """Run the command line; ends the process."""
    interrupt, stop, say = KeyboardInterrupt(), SystemExit(EXIT_STOPPED), sys.unraisablehook
    # One of these that gets lost would be told of with a traceback, which says nothing to the user.
    sys.unraisablehook = lambda lost: None if lost.exc_value in (interrupt, stop) else say(lost)
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, UntilThereAreRanks(interrupt))
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, UntilThereAreRanks(stop))
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
