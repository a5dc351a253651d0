"""``launch.local`` in a notebook: a real kernel, cells one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.launch.shell import HANG_S, Shell, wait_for

DEFINE = """
import os
import ddpkit, launch, torch

class Mine(Exception):
    pass

scale = 3

def mean_of_ranks(offset):
    print("rank", os.environ["RANK"])
    with ddpkit.runtime() as rt:
        return scale * rt.mean(float(rt.rank)) + offset
"""


@dataclass
class Notebook:
    """A kernel, and what its cells show."""

    manager: KernelManager
    client: BlockingKernelClient

    def cell(self, code: str) -> tuple[str, str]:
        """What a cell prints, and its result or the error that it ended with."""
        return self.shown(self.client.execute(code, allow_stdin=False))

    def shown(self, cell: str) -> tuple[str, str]:
        """The same of a cell under way."""
        printed, result = "", ""
        while True:
            message: Any = self.client.get_iopub_msg(timeout=HANG_S)
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                printed += content["text"]
            elif message["msg_type"] == "execute_result":
                result = content["data"]["text/plain"]
            elif message["msg_type"] == "error":
                result = f"{content['ename']}: {content['evalue']}"
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, result


@pytest.fixture
def notebook(shell: Shell) -> Iterator[Notebook]:
    manager = KernelManager()
    manager.start_kernel(cwd=str(shell.cwd), env=shell.env(IPYTHONDIR=str(shell.cwd / "ipython")))
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=HANG_S)
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_functions_of_cells_run_on_ranks(notebook: Notebook, shell: Shell) -> None:
    assert notebook.cell(DEFINE) == ("", "")
    for _ in range(2):  # a cell may be run again
        assert notebook.cell("launch.local(mean_of_ranks, 1)") == ("rank 0\n", "[2.5, 2.5]")
    assert notebook.cell("scale = 5") == ("", "")
    assert notebook.cell("launch.local(lambda x, y=2: scale * x + y, 4, y=1)") == ("", "[21, 21]")
    assert notebook.cell("[f(2) for f in launch.local(lambda: lambda x: x * scale)]") == ("", "[10, 10]")

    failing = "def fails():\n    if os.environ['RANK'] == '1':\n        raise Mine('of', 'rank 1')\nlaunch.local(fails)"
    assert notebook.cell(failing) == ("", "Mine: ('of', 'rank 1')")
    caught = "try:\n    launch.local(fails)\nexcept Mine as e:\n    print(e.args, type(e.__cause__).__name__)"
    assert notebook.cell(caught) == ("('of', 'rank 1') RankError\n", "")

    kernel = psutil.Process(notebook.manager.provisioner.pid)  # type: ignore[union-attr]  # it is there
    waits = "import time\nlaunch.local(lambda: (open(f\"here-{os.environ['RANK']}\", 'w').close(), time.sleep(1000)))"
    cell = notebook.client.execute(waits)
    wait_for(lambda: all((shell.cwd / f"here-{rank}").exists() for rank in (0, 1)))
    assert len(kernel.children(recursive=True)) >= 2
    notebook.manager.interrupt_kernel()
    assert notebook.shown(cell)[1].startswith("KeyboardInterrupt")
    wait_for(lambda: not kernel.children(recursive=True), "the end of the ranks")
    assert notebook.cell("launch.local(mean_of_ranks, 0)") == ("rank 0\n", "[2.5, 2.5]")
