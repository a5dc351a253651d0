from __future__ import annotations

import os
import sys

import pytest

from launch.output import Output


class Cell:
    """A notebook's stdout: it has a descriptor, which is the terminal's in which the notebook's server runs."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.text = ""

    def fileno(self) -> int:
        return self.descriptor

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        self.text += text


def test_what_stands_for_stdout_is_written_to_and_not_around(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    cell = Cell(write)
    monkeypatch.setattr(sys, "stdout", cell)
    Output(None, tee_all=False).write(0, "stdout", b"of rank zero\n")
    os.close(write)
    with os.fdopen(read) as terminal:
        assert terminal.read() == ""
    assert cell.text == "of rank zero\n"
