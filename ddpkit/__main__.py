"""``ddpkit`` and ``python -m ddpkit``: the one place in this package that knows of the launcher layer.

The layer is loaded from beside this package under a name of its own: the user's directory may hold a ``launch.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

_ALIAS = "_ddpkit_launch"


def main() -> None:
    """Run the command line; ends the process."""
    folder = Path(__file__).resolve().parent.parent / "launch"
    spec = importlib.util.spec_from_file_location(
        _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # it is a Python file
    package = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = package
    spec.loader.exec_module(package)
    sys.exit(importlib.import_module(f"{_ALIAS}.cli").main(sys.argv[1:]))


if __name__ == "__main__":
    main()
