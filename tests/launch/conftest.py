from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A directory of the test's own; afterwards nothing that was started from it may be left."""
    made = Shell(tmp_path)
    try:
        yield made
        for child in made.children:
            assert child.poll() is not None, f"still running: {child.args!r}"
        made.assert_nothing_left()
    finally:
        for process in made.survivors():
            process.kill()
        for child in made.children:
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
