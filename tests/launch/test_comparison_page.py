"""docs/comparison.md: tables that are whole, and notes that are there."""

from __future__ import annotations

import re

from tests.launch.shell import ROOT

PAGE = (ROOT / "docs/comparison.md").read_text()
TABLES, _, NOTES = PAGE.partition("\n## Notes\n")


def test_every_row_says_something_of_every_peer() -> None:
    rows = [line.strip("|").split("|") for line in TABLES.splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert {len(row) for row in rows} == {8}
    assert [row for row in rows if not all(cell.strip() for cell in row[1:])] == []


def test_every_note_is_there_and_is_referred_to() -> None:
    notes = {int(number) for number in re.findall(r"^(\d+)\. ", NOTES, re.MULTILINE)}
    assert notes == {int(number) for number in re.findall(r"\[(\d+)\]", TABLES)}
    assert notes == set(range(1, len(notes) + 1))
