"""docs/comparison.md: tables that are whole, notes that are there, links that lead somewhere."""

from __future__ import annotations

import re

import pytest

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


@pytest.mark.parametrize("page", ["comparison.md", "guarantees.md", "moving.md"])
def test_links_lead_to_pages_and_headings(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    links = re.findall(r"\]\((?!https?:)([\w.-]*)(?:#([\w-]+))?\)", text)
    for name, heading in links:
        target = (ROOT / "docs" / (name or page)).read_text()
        slugs = [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", target, re.MULTILINE)
        ]
        assert not heading or heading in slugs, (name, heading)
