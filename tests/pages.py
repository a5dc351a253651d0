"""Pages that run: a page's files and its commands, in the order in which a reader comes to them.

A block whose first line is ``# NAME.py`` (or any other name) is that file. A ``console`` block is a terminal: lines
that begin with ``$`` are typed, ``^C`` is the key, pressed when what stands before it has appeared, and all others have
to appear in this order, though more may appear between them; of one with ``...`` at its end or beginning, the rest. A
command that does not end with 0 says so, as ``[exit code 1]``.

Where commands build on each other and nobody presses a key, ``sh`` blocks run in one shell, and the lines of ``text``
blocks have to come in what they print, in this order; ``...`` stands for anything.

What is set in by four spaces is a block as well, of the language ``indented``: commands with ``CONFIG.yaml`` or
``RUN_DIR`` in them, in the place of which a test puts its own.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.launch.shell import HANG_S, ROOT, Shell, finish, wait_for

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
# What differs from run to run; a rank's number and an exit code do not.
_NUMBER = re.compile(r"(?<!rank )(?<!code )(?<![\w.])\d[\d.]*(?:e[-+]\d+)?\b")
_KEPT_TOGETHER = re.compile(r"\s+")


@dataclass(frozen=True)
class Block:
    """A block: its language, its text, and the title of the section that it is in."""

    language: str
    text: str
    section: str

    @property
    def file(self) -> str | None:
        """The name of the file that it is; None if it is none."""
        named = _FILE.match(self.text)
        return named[1] if named and self.language != "console" else None


def blocks(page: str) -> list[Block]:
    """All blocks of a page, such as ``docs/training.md``, in order."""
    text = (ROOT / page).read_text()
    titles = [(0, ""), *((found.start(), found[1]) for found in re.finditer(r"^##+ (.*)$", text, re.MULTILINE))]

    def section(place: int) -> str:
        return [title for start, title in titles if start <= place][-1]

    fenced = {found.start(): Block(found[1], found[2], section(found.start())) for found in _FENCED.finditer(text)}
    prose = _FENCED.sub(lambda found: "-" * len(found[0]), text)
    indented = {
        found.start(): Block("indented", textwrap.dedent(found[0]), section(found.start()))
        for found in _INDENTED.finditer(prose)
    }
    return [block for _, block in sorted((fenced | indented).items())]


def spans(page: str) -> list[str]:
    """What stands between backquotes in a page's text, beside its blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCED.sub("", (ROOT / page).read_text()))


def of_language(page: str, language: str) -> list[str]:
    """The texts of a page's blocks in one language."""
    return [block.text for block in blocks(page) if block.language == language]


def sections(page: str) -> list[str]:
    """Titles of the sections that have blocks, in order."""
    return list(dict.fromkeys(block.section for block in blocks(page)))


def by_section(page: str) -> dict[str, list[Block]]:
    """The blocks of a page by the titles of their sections; those before the first one under ``""``."""
    found: dict[str, list[Block]] = {}
    for block in blocks(page):
        found.setdefault(block.section, []).append(block)
    return found


def write_files(shell: Shell, page: Iterable[Block]) -> None:
    """Write the files that the blocks are."""
    for block in page:
        if block.file is not None:
            shell.script(block.file, block.text)


def follow(shell: Shell, page: Iterable[Block]) -> None:
    """Do what the blocks say: write their files, type their commands, compare what appears.

    A block that is neither a file nor a terminal fails: nobody would run it.
    """
    for block in page:
        if block.file is not None:
            shell.script(block.file, block.text)
        elif block.language == "console":
            _type(shell, block)
        else:
            raise AssertionError(f"a block that no test runs, in {block.section!r}:\n{block.text}")


def follow_in_one_shell(shell: Shell, page: Iterable[Block], timeout_s: float) -> str:
    """Do what blocks of ``sh`` say, one after the other, as long as all goes well; what they print.

    A block that is neither a file, nor ``sh``, nor ``text`` fails, as above.
    """
    commands, expected = [], []
    for block in page:
        if block.file is not None:
            shell.script(block.file, block.text)
        elif block.language == "sh":
            commands.append(block.text)
        elif block.language == "text":
            expected += block.text.splitlines()
        else:
            raise AssertionError(f"a block that no test runs, in {block.section!r}:\n{block.text}")
    for name in ("examples", "configs"):
        if not (shell.cwd / name).exists():
            (shell.cwd / name).symlink_to(ROOT / name)
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    child = shell.start("-c", "set -e; exec 2>&1\n" + "\n".join(commands), prefix=("bash",), env=env)
    done = finish(child, timeout_s)
    assert done.returncode == 0, done.stdout[-5000:]
    place = 0
    for line in expected:
        pattern = ".*".join(map(re.escape, line.split("...")))
        found = re.compile(f"^{pattern}$", re.MULTILINE).search(done.stdout, place)
        assert found, f"not in the output, or not in this order: {line}\n{done.stdout[-5000:]}"
        place = found.end()
    return done.stdout


def _type(shell: Shell, block: Block) -> None:
    lines = block.text.splitlines()
    typed = [f'{line[2:]}\ncode=$?; [ $code = 0 ] || echo "[exit code $code]"' for line in lines if line[:2] == "$ "]
    shown = [line for line in lines if line[:2] != "$ " and line.strip() not in ("", "...")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryFile() as screen:
        child = shell.start(
            *("-c", "\n".join(typed)),
            prefix=("bash",),
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            env={"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )

        def text() -> str:
            return os.pread(screen.fileno(), 1 << 24, 0).decode(errors="replace")

        if "^C" in shown:
            before = shown[: shown.index("^C")]
            wait_for(lambda: not _missing(shell, before, text()), f"{before} before ^C", HANG_S)
            os.killpg(child.pid, signal.SIGINT)
            shown.remove("^C")
        child.wait(2 * HANG_S)
        assert not (missing := _missing(shell, shown, text())), f"not shown: {missing}; but\n{text()}"
        told = [line for line in text().splitlines() if line.startswith("[exit code ")]
        assert told == [line for line in shown if line.startswith("[exit code ")], text()


def _missing(shell: Shell, shown: list[str], text: str) -> str | None:
    """The first line that does not appear after the one before it; None if all do."""
    appeared = iter([_plain(shell, line) for line in text.splitlines()])
    return next((line for line in shown if not any(_is(_plain(shell, line), each) for each in appeared)), None)


def _is(shown: str, appeared: str) -> bool:
    """Whether it is that line, or the part of it that is shown: ``beginning ...`` or ``... end``."""
    if shown.endswith(" ..."):
        return appeared.startswith(shown[:-4])
    return appeared.endswith(shown[4:]) if shown.startswith("... ") else appeared == shown


def _plain(shell: Shell, line: str) -> str:
    """A line without what is of this run and this machine alone."""
    line = line.replace(str(shell.cwd), "/home/me").replace(socket.gethostname(), "box")
    return _KEPT_TOGETHER.sub(" ", _NUMBER.sub("N", line)).strip()
