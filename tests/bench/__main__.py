"""Run the benchmarks, print the table, write it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from tests.bench import checkpoints, data, starting, stepping
from tests.bench.measure import Row

_GROUPS: dict[str, Callable[[int], list[Row]]] = {
    "start": starting.rows,
    "step": stepping.rows,
    "data": data.rows,
    "checkpoint": checkpoints.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(_GROUPS)}; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.groups or _GROUPS:
        rows += _GROUPS[name](arguments.repeats)
        print(table(rows), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    tree = {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(row) | {"ratio": row.ratio, "reaches": row.reaches} for row in rows],
    }
    arguments.json.write_text(json.dumps(tree, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    lines = ["| what | ours | peer | ratio | n | spread (ours / peer) | bar | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        peer = f"{row.peer_name} {row.peer:.3g} {row.unit}" if row.peer is not None else "-"
        ratio = f"{row.ratio:.3f}" if row.ratio is not None else "-"
        bar = f"{'>=' if row.at_least else '<='} {row.bar:g}"
        reached = "yes" if row.reaches else "no"
        shown = (row.name, f"{row.ours:.3g} {row.unit}", peer, ratio, row.n, row.spread, bar, reached)
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
