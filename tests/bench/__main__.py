"""Run the benchmarks, print the table, write it as JSON, and with ``--docs`` into the documentation."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench import checkpoints, data, starting, stepping
from tests.bench.measure import Row

_MEASUREMENTS = starting.MEASUREMENTS | stepping.MEASUREMENTS | data.MEASUREMENTS | checkpoints.MEASUREMENTS
_DOCS = Path(__file__).parents[2] / "docs"
_BEGIN, _END = "<!-- python -m tests.bench --docs -->\n", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_MEASUREMENTS)}; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where to write the figures")
    parser.add_argument("--docs", action="store_true", help="also renew these rows in docs/benchmarks.md")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in _MEASUREMENTS]:
        parser.error(f"no measurement is called {', '.join(unknown)}; there are {', '.join(_MEASUREMENTS)}")
    for package in ("ddpkit", "launch"):  # as after a first start, or where a wheel is installed; torch's are there
        compileall.compile_dir(_DOCS.parent / package, quiet=1)
    entries: list[dict[str, Any]] = []
    for name in arguments.names or _MEASUREMENTS:
        new = [entry(name, row) for row in _MEASUREMENTS[name](arguments.repeats)]
        print(table(new), flush=True)
        entries += new
    if len({each["measurement"] for each in entries}) > 1:
        print(table(entries))
    write(arguments.json, entries)
    if arguments.docs:
        renew(_DOCS, entries)


def entry(measurement: str, row: Row) -> dict[str, Any]:
    """A row as it is kept: medians, and the runs behind them."""
    quartiles = statistics.quantiles(row.judged, n=4, method="inclusive") if len(row.judged) > 1 else None
    return {
        "measurement": measurement,
        "name": row.name,
        "unit": row.unit,
        "ours": statistics.median(row.ours),
        "peer_name": row.peer_name,
        "peer": statistics.median(row.peer) if row.peer else None,
        "ratio": row.ratio,
        "judged_by": row.bar.of,
        "judged": statistics.median(row.judged),
        "quartiles": [quartiles[0], quartiles[2]] if quartiles else None,
        "bar": row.bar.value,
        "at_least": row.bar.at_least,
        "reaches": row.reaches,
        "n": len(row.ours),
        "runs": {"ours": list(row.ours), "peer": list(row.peer)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The rows for people; the spread is the middle half of the figures that the bar is for."""
    lines = [
        "| what | ours | peer | ratio | bar | reached | n | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in entries:
        unit = "" if each["judged_by"] == "ratio" else f" {each['unit']}"
        label = {"ratio": "ratio", "difference": "ours - peer", "ours": "ours"}[each["judged_by"]]
        low, high = each["quartiles"] or (each["judged"], each["judged"])
        shown = (
            each["name"],
            f"{each['ours']:.4g} {each['unit']}",
            "-" if each["peer"] is None else f"{each['peer_name']} {each['peer']:.4g} {each['unit']}",
            "-" if each["ratio"] is None else f"{each['ratio']:.3f}",
            f"{label} {'>=' if each['at_least'] else '<='} {each['bar']:g}{unit}",
            "yes" if each["reaches"] else "no",
            each["n"],
            f"{low:.3g} to {high:.3g}{unit}",
        )
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines) + "\n"


def renew(docs: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Put these rows in the place of their older selves; rows that were not measured now stay, with their date."""
    kept = json.loads((docs / "benchmarks.json").read_text()) if (docs / "benchmarks.json").exists() else []
    measured = {each["measurement"] for each in entries}
    rows = [each for each in kept if each["measurement"] in set(_MEASUREMENTS) - measured] + list(entries)
    rows.sort(key=lambda each: list(_MEASUREMENTS).index(each["measurement"]))
    write(docs / "benchmarks.json", rows)
    parts = []
    for machine, date in sorted({(each["machine"], each["date"]) for each in rows}):
        of_it = [each for each in rows if (each["machine"], each["date"]) == (machine, date)]
        parts.append(f"{machine}, {date}:\n\n{table(of_it)}")
    page = docs / "benchmarks.md"
    before, _, rest = page.read_text().partition(_BEGIN)
    page.write_text(before + _BEGIN + "\n".join(parts) + _END + rest.partition(_END)[2])


def write(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
