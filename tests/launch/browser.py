"""A real browser that nobody sees, spoken to over a pair of pipes, as its developer tools do."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

Tree = dict[str, Any]

PROGRAM = shutil.which("chromium")

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
_COMPLAINTS = (
    "Log.entryAdded",
    "Page.javascriptDialogOpening",
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
)


class Page:
    """A tab of the browser, and all that has happened in it.

    Attributes:
        requests: every address that was asked for.
        complaints: what would stand in the browser's console, exceptions and dialogs.
    """

    def __init__(self, told: int, heard: int) -> None:
        self._told, self._heard = told, heard
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[Tree] = []
        self._events: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, path: Path, width: int, *, dark: bool = False, scripts: bool = True) -> None:
        """Show a file at a width, and wait until it is there."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.requests.clear()
        self.complaints.clear()
        self._events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._take(self._message())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is, in this page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def ask(self, method: str, **parameters: Any) -> Tree:
        """Give a command, and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._told, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: Tree = answer["result"]
                return result
            self._take(answer)

    def _take(self, message: Tree) -> None:
        method, parameters = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method in _COMPLAINTS:
            self.complaints.append(parameters)

    def _message(self, timeout_s: float = 90) -> Tree:
        deadline = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._heard], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._heard, 1 << 16)
            assert piece, "the browser has gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        tree: Tree = json.loads(message)
        return tree


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A new browser with a tab; nothing is left of it afterwards."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        for_it, told = os.pipe()
        heard, from_it = os.pipe()
        stack.callback(os.close, told)
        stack.callback(os.close, heard)
        # It reads from descriptor 3, and writes to 4.
        script = f'exec "$@" 3<&{for_it} 4>&{from_it}'
        with (Path(folder) / "errors").open("w") as errors:
            process = subprocess.Popen(
                ["bash", "-c", script, "bash", PROGRAM, *_OPTIONS, f"--user-data-dir={folder}/profile"],
                pass_fds=(for_it, from_it),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**os.environ, "HOME": folder, "TMPDIR": folder},
            )
        os.close(for_it)
        os.close(from_it)
        stack.callback(_end, process)
        yield Page(told, heard)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, alive
