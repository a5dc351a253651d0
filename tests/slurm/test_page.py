"""docs/slurm.md, and what README.md says of Slurm: typed on the login node of a real cluster.

The partition is the cluster's; what its nodes lack (GPUs, modules, 8 cores for a rank, four hours) is taken out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import pages
from tests.resume.runs import events, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Home, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PAGE, README = "docs/slurm.md", "README.md"
FIRST_STEPS = {block.file: block.text for block in pages.blocks("docs/first-steps.md") if block.file is not None}
NOT_HERE = (
    ("partition: gpu", "partition: low"),
    ("cpus_per_rank: 8", "cpus_per_rank: 1"),
    ("timeout_min: 240", "timeout_min: 60"),
    ("    gpus_per_node: 4\n", ""),
    ("    setup: [module load cuda, source env.sh]\n", ""),
    ("    additional_parameters: {reservation: mine}    # any option of sbatch\n", ""),
)


def logs(run_dir: Path) -> str:
    return "".join(path.read_text() for path in (run_dir / "slurm").glob("submission-*/*_log.*"))


def test_the_page_and_the_readme_are_typed(cluster: Cluster) -> None:
    blocks = pages.blocks(PAGE)
    languages = ["indented", "yaml", "indented", "indented", "indented", "indented", "python"]
    assert [block.language for block in blocks] == languages
    submit, section, dry_run, wait, follow, sweep, python = (block.text.strip() for block in blocks)
    [readme] = [block.text.strip() for block in pages.blocks(README) if block.section == "On Slurm"]
    home = Home.made(cluster, "as-the-page-says")
    (home.cwd / "mine.py").write_text(FIRST_STEPS["mine.py"])
    (home.cwd / "mine.yaml").write_text(FIRST_STEPS["mine.yaml"].replace("length: 6400", "length: 640"))
    config = section + "\n"
    for written, here in NOT_HERE:
        assert written in config
        config = config.replace(written, here)
    (home.cwd / "CONFIG.yaml").write_text(f"defaults: [mine]\n{config}")
    run_dir = home.cwd / "runs/mine"

    def typed(line: str, *options: str) -> tuple[str, str]:
        """Type a line of a page, as it stands there; what it prints on standard output, and on standard error."""
        words = line.replace("RUN_DIR", "runs/mine").split()
        command = [sys.executable, "-m", "ddpkit", *words[1:]] if words[0] == "ddpkit" else words
        process = home.start(*command, *options, prefix=())
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        return out, err

    # What would be submitted, and the job itself, long enough to be looked at.
    printed, _ = typed(dry_run)
    assert "#SBATCH --nodes=2" in printed and "#SBATCH --time=60" in printed
    job = typed(submit, "-o", "train.epochs=100000")[0].strip()
    assert job.isdigit()

    def trains() -> bool:
        now = cluster.job(int(job))
        assert now.state in ("PENDING", "CONFIGURING", "RUNNING"), (now, logs(run_dir))
        return (run_dir / "metrics.jsonl").exists() and bool(metrics(run_dir))

    cluster.wait_until(trains, "it trains", 150)
    status, tail, cancel = follow.splitlines()
    assert "running" in typed(status)[0]
    watched = list(run_dir.glob(tail.partition("RUN_DIR/")[2]))

    def is_heard() -> bool:
        return "train  epoch 0  step 10" in "".join(path.read_text() for path in watched)

    cluster.wait_until(is_heard, "rank zero is heard")
    typed(cancel.replace("JOB_ID", job))
    wait_for_end(cluster, int(job))
    assert [event["reason"] for event in events(run_dir, "stopped")] != []
    assert {f"{job}_submission.sh", "plan.json", "outcome.json"} <= {path.name for path in watched[0].parent.iterdir()}

    # Submitted again it goes on; this time it is followed.
    _, shown = typed(wait, "-o", "train.epochs=null", "-o", f"train.max_steps={metrics(run_dir)[-1]['step'] + 20}")
    assert "goes on at step" in shown and "is requeued" not in shown

    # The README's command; a sweep, which is not waited for.
    assert "partition=gpu" in readme
    given = ("-o", "run_dir=runs/readme", "-o", "train.epochs=1", "-o", "launch.cpus_per_rank=1")
    (home.cwd / "CONFIG.yaml").write_text("defaults: [mine]\nlaunch: {slurm: {timeout_min: 5}}\n")
    job = typed(readme.replace("partition=gpu", "partition=low"), *given)[0].strip()
    array = typed(sweep, "-o", "run_dir=runs/sweep")[0].strip()
    found = cluster.run("scontrol", "show", "job", "--oneliner", array).stdout
    assert re.findall(r"ArrayTaskId=(\S+)", found), found
    plans = [json.loads(path.read_text()) for path in (home.cwd / "runs/sweep/slurm/submission-0").glob("plan-*.json")]
    of_runs = {plan["job"]["config"]["run_dir"] for plan in plans}
    assert of_runs == {f"runs/sweep/optimizer.args.lr={rate},seed={seed}" for rate in (0.1, 0.01) for seed in (1, 2, 3)}
    cluster.run("scancel", array)
    assert wait_for_end(cluster, int(job)).state == "COMPLETED"

    # From Python: the block, with a function before it and what it gives after it.
    function = "def train(rate, epochs):\n    import os\n    return os.environ['RANK'], rate, epochs\n\n\n"
    told = "\nprint(job.job_id.isdigit(), results)\n"
    here = python.replace('partition="gpu"', 'partition="low"')
    (home.cwd / "submits.py").write_text(function + here + told)
    printed, _ = typed(f"{sys.executable} submits.py")
    assert printed.splitlines()[-1] == f"True {[(str(rank), 0.1, 3) for rank in range(8)]}"
