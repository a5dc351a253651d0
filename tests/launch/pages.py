"""Pages of docs/ as something that can be run: their files, their commands, what they say these print."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.launch.shell import ROOT, Shell, finish

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """The parts of a page by their headings of the second level."""
    found = re.split(r"^## (.+)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code."""
    return _BLOCK.findall(text)


def follow(shell: Shell, text: str, timeout_s: float) -> str:
    """Do as a page says, in one bash: save blocks that begin with a file's name, run what is ``sh``; the output.

    Each line of a ``text`` block has to come in the output, in this order; ``...`` stands for anything.
    """
    commands, expected = [], []
    for language, block in blocks(text):
        named = re.match(r"# ([\w/]+\.py)\n", block)
        if named:
            shell.script(named[1], block)
        elif language == "sh":
            commands.append(block)
        elif language == "text":
            expected += block.splitlines()
    for name in ("examples", "configs"):
        if not (shell.cwd / name).exists():
            (shell.cwd / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    child = shell.start("-c", "set -e; exec 2>&1\n" + "\n".join(commands), prefix=("bash",), env={"PATH": path})
    done = finish(child, timeout_s)
    assert done.returncode == 0, done.stdout[-5000:]
    place = 0
    for line in expected:
        pattern = ".*".join(map(re.escape, line.split("...")))
        found = re.compile(f"^{pattern}$", re.MULTILINE).search(done.stdout, place)
        assert found, f"not in the output, or not in this order: {line}\n{done.stdout[-5000:]}"
        place = found.end()
    return done.stdout
