"""How start-up, memory and the traffic of agreements grow with the ranks: ``python -m tests.bench.scaling``.

Writes ``scaling.json``, and prints a table for the documentation. torchrun starts the same script beside ours.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.measure import SCRIPTS, tool

_EXCHANGES = 50


def main() -> None:
    rows = [footprint(ranks, ours=True) for ranks in (2, 4, 8, 16, 32)] + [footprint(8, ours=False)]
    tree = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"), "rows": rows}
    Path("scaling.json").write_text(json.dumps(tree, indent=1) + "\n")
    print("| launcher | ranks | first step, s | memory of a rank (PSS), MB | of all processes, MB | an exchange, ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        exchange = "-" if row["exchange_ms"] is None else f"{row['exchange_ms']:.2f}"
        shown = (row["launcher"], row["ranks"], f"{row['first_step_s']:.2f}", row["pss_mb"], row["all_mb"], exchange)
        print("| " + " | ".join(map(str, shown)) + " |")


def footprint(ranks: int, ours: bool) -> dict[str, Any]:
    """One start of a script that trains, with ddpkit's loop under our launcher and written by hand under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        script = [str(SCRIPTS / "footprint.py"), folder, "ddpkit" if ours else "by hand", str(_EXCHANGES)]
        by_us = [tool("ddpkit"), "launch", "--nproc-per-node", str(ranks), *script]
        by_torchrun = [tool("torchrun"), "--standalone", "--nproc-per-node", str(ranks), *script]
        begun = time.monotonic()
        done = subprocess.run(
            by_us if ours else by_torchrun,
            capture_output=True,
            text=True,
            timeout=180,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        found = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
        if len(found) != ranks:
            raise RuntimeError(f"{len(found)} of {ranks} ranks came to the end:\n{done.stdout}\n{done.stderr}")
    return {
        "launcher": "ddpkit" if ours else "torchrun, by hand",
        "ranks": ranks,
        "first_step_s": max(each["stepped"] for each in found) - begun,
        "pss_mb": round(statistics.mean(each["pss"] for each in found) / 1e6),
        "all_mb": round(max(each["all"] for each in found) / 1e6),
        "exchange_ms": statistics.median(each["exchange_s"] for each in found) * 1e3 if ours else None,
    }


if __name__ == "__main__":
    main()
