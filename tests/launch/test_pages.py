"""The pages of docs/ that are followed from beginning to end: what they say is typed, what they show appears."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from launch.cli import main
from tests import pages
from tests.launch.shell import ROOT, Shell

FIRST_STEPS, WRITING = "docs/first-steps.md", "docs/writing.md"
LAUNCHING, FAILURES = "docs/launching.md", "docs/failures.md"

QUICK = {"The config is wrong"}
"""Of docs/failures.md: what is said before ranks start."""

LEFT_OUT = {
    # A memory cgroup; tests/launch/test_out_of_memory.py makes one, and compares the words.
    "Memory runs out": 1,
    # A disk of its own, mounted by root; tests/resume/test_full_disk.py has one, and compares the words.
    "The disk is full": 1,
}
"""Sections of docs/failures.md that need what not every machine gives, and how many blocks each has."""

OF_OTHERS = {"torchrun", "srun", "mpirun", "python", "launch.local(train,"}
"""How commands in the table of docs/launching.md may begin besides: tests/slurm and tests/launch start ranks by these;
what they start, if it is ddpkit's, is checked here as well."""


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("console", "$ echo one\ntwo\n"),
        ("console", "$ echo one; echo two\ntwo\none\n"),
        ("console", "$ echo rank 1\nrank 2\n"),
        ("console", "$ false\n"),
        ("console", "$ true\n[exit code 1]\n"),
        ("json", "{}\n"),
    ],
    ids=["not shown", "order", "rank", "failed", "not failed", "nobody's"],
)
def test_a_page_that_is_wrong(shell: Shell, language: str, text: str) -> None:
    with pytest.raises(AssertionError):
        pages.follow(shell, [pages.Block(language, text, "made up")])


def test_a_page_that_is_right(shell: Shell) -> None:
    text = "$ echo one; echo 3 of 12 in $PWD; sh -c 'exit 3'\none\n5 ... \n[exit code 3]\n"
    pages.follow(shell, [pages.Block("console", text, "made up")])


@pytest.mark.slow
def test_first_steps(shell: Shell) -> None:
    pages.follow(shell, pages.blocks(FIRST_STEPS))


def test_first_steps_up_to_the_first_run(shell: Shell) -> None:
    begin = [block for block in pages.blocks(FIRST_STEPS) if block.section in ("One file of your own", "One config")]
    assert [block.language for block in begin] == ["python", "yaml", "console", "console"]
    pages.follow(shell, begin)


@pytest.mark.slow
def test_writing(shell: Shell) -> None:
    pages.follow(shell, pages.blocks(WRITING))


@pytest.mark.parametrize(
    "section",
    [
        title if title in QUICK else pytest.param(title, marks=pytest.mark.slow)
        for title in pages.sections(FAILURES)
        if title not in LEFT_OUT
    ],
)
def test_failures(shell: Shell, section: str) -> None:
    pages.write_files(shell, pages.blocks(FIRST_STEPS))
    pages.follow(shell, [block for block in pages.blocks(FAILURES) if block.section == section])


def test_no_more_is_left_out_than_is_said() -> None:
    counts = Counter(block.section for block in pages.blocks(FAILURES))
    assert {section: counts[section] for section in LEFT_OUT} == LEFT_OUT
    assert counts.keys() >= QUICK


@pytest.mark.slow
def test_launching(shell: Shell) -> None:
    pages.follow(shell, pages.blocks(LAUNCHING))


def test_every_command_of_the_table(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (ROOT / LAUNCHING).read_text().partition("| your situation |")[2].partition("\n\n")[0]
    spans = [span for span in re.findall(r"`([^`]+)`", table) if " " in span]
    assert len(spans) > 25
    pages.write_files(shell, pages.blocks(FIRST_STEPS))
    shell.script("package/module.py", "")
    monkeypatch.chdir(shell.cwd)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for span in spans:
        words = shlex.split(span)
        assert words[0] in OF_OTHERS | {"ddpkit"}, span
        if "ddpkit" not in words:
            continue
        command = words[words.index("ddpkit") + 1 :]
        if command[0] in ("run", "launch"):
            assert main([command[0], "--dry-run", *command[1:]]) == 0, span
        else:
            assert command[0] == "doctor" and set(command[1:]) <= {"--launcher", "torchrun"}, span


def test_links_lead_somewhere() -> None:
    found = 0
    pages_of_the_root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
    for page in [*pages_of_the_root, *(ROOT / "docs").glob("*.md")]:
        for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / name if name else page
            assert target.exists(), (page.name, name)
            assert not anchor or anchor in _anchors(target), (page.name, name, anchor)
            found += 1
    assert found > 30


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
