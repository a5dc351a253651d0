"""What a plain script sees under ``ddpkit launch``: what ``python SCRIPT`` would show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.shell import HANG_S, ROOT, Shell

SPAWN = ("-o", "launch.start_method=spawn")  # no torch in the ranks: quick

LOOK = """
import __main__, inspect, json, os, signal, sys
import neighbour

def typed(x: int): pass

class Here: pass

seen = {
    "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "spec": str(__spec__),
    "main": __main__.__dict__ is globals(), "names": sorted(globals()), "neighbour": neighbour.__file__,
    "loader": type(__loader__).__name__, "builtins": type(__builtins__).__name__,
    "future": typed.__annotations__ == {"x": int}, "source": inspect.getsource(Here), "stdin": sys.stdin.read(),
    "sigint": str(signal.getsignal(signal.SIGINT)), "sigterm": str(signal.getsignal(signal.SIGTERM)),
    "masked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "umask": os.umask(0), "cwd": os.getcwd(),
    "launch": "launch" in sys.modules, "random": __import__("random").__file__,
}
with open(f"seen-{os.environ.get('RANK', 'python')}.json", "w") as file:
    json.dump(seen, file)
"""


def _seen(shell: Shell, who: object) -> Any:
    return json.loads((shell.cwd / f"seen-{who}.json").read_text())


@pytest.mark.parametrize("options", [(), SPAWN], ids=["warm", "spawn"])
def test_a_script_in_another_folder_sees_what_python_shows_it(shell: Shell, options: tuple[str, ...]) -> None:
    script = shell.script("some/folder/look.py", LOOK)
    shell.script("some/folder/neighbour.py", "")
    (shell.cwd / "link.py").symlink_to(script)
    arguments = ["link.py", "-x", "--", "--nproc-per-node", "9", "-m", "ä b", ""]
    subprocess.run([sys.executable, *arguments], cwd=shell.cwd, check=True, stdin=subprocess.DEVNULL, timeout=HANG_S)
    done = shell.run("launch", "--nproc-per-node", "2", *options, *arguments)
    assert done.returncode == 0, done.stderr
    assert _seen(shell, 0) == _seen(shell, 1) == _seen(shell, "python")
    assert done.stderr == ""


def test_a_module_sees_what_python_m_shows_it(shell: Shell) -> None:
    shell.script("package/__init__.py", "")
    shell.script("package/look.py", LOOK.replace("import neighbour", "from . import neighbour"))
    shell.script("package/neighbour.py", "")
    arguments = ["-m", "package.look", "--nproc-per-node", "9", "-m", "x"]
    subprocess.run([sys.executable, *arguments], cwd=shell.cwd, check=True, stdin=subprocess.DEVNULL, timeout=HANG_S)
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "1", *arguments)
    assert done.returncode == 0, done.stderr
    expected, seen = _seen(shell, "python"), _seen(shell, 0)
    # The loader's address is part of the text.
    assert seen.pop("spec").startswith("ModuleSpec(name='package.look'")
    del expected["spec"]
    assert seen == expected


LIFE = """
import atexit, multiprocessing, os, pickle, random, subprocess, sys, threading, time
import numpy as np

class Own:
    def __init__(self, value): self.value = value

def child(queue): queue.put(Own(os.getpid()))

def slow_child(path):
    time.sleep(0.3)
    open(path, "w").close()

def late(rank):
    threading.main_thread().join()  # the script's last line has been passed
    pickle.loads(pickle.dumps(Own(1)))
    print(f"thread {rank}", flush=True)

if __name__ == "__main__":
    rank = os.environ["RANK"]
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert queue.get().value == process.pid
        process.join()
    if os.fork() == 0:  # its failure is its own
        sys.stderr = open(os.devnull, "w")
        raise ValueError("of a child of the script")
    os.wait()
    multiprocessing.get_context("fork").Process(target=slow_child, args=(f"child-{rank}",)).start()  # joined at the end
    threading.Thread(target=late, args=(rank,)).start()
    atexit.register(lambda: print(f"atexit {rank} {pickle.loads(pickle.dumps(Own(2))).value}"))
    print("drawn", rank, np.random.rand(), random.random(), os.environ["OMP_NUM_THREADS"])
    subprocess.Popen(["sleep", "1000"], start_new_session=True)  # ended with the run, not joined
    sys.stdout.write("no newline")
"""


@pytest.mark.parametrize("options", [(), SPAWN], ids=["warm", "spawn"])
def test_processes_threads_and_the_end_of_a_script(shell: Shell, options: tuple[str, ...]) -> None:
    shell.script("life.py", LIFE)
    done = shell.run("launch", "--nproc-per-node", "2", "--tee", "all", *options, "life.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for rank in (0, 1):
        assert f"[rank {rank}] thread {rank}" in done.stdout.replace("no newline", "")
        assert f"atexit {rank} 2" in done.stdout
        assert (shell.cwd / f"child-{rank}").exists()
    drawn = [line.split()[4:] for line in lines if "drawn" in line]
    assert len(drawn) == 2
    assert drawn[0][0] != drawn[1][0]  # numpy
    assert drawn[0][1] != drawn[1][1]  # random
    assert "ValueError" not in done.stderr


def test_environment_of_every_rank(shell: Shell) -> None:
    shell.script(
        "env.py",
        "import json, os, torch\n"
        "json.dump([dict(os.environ), torch.get_num_threads()], open(f\"env-{os.environ['RANK']}.json\", 'w'))\n",
    )
    done = shell.run("launch", "--nproc-per-node", "3", "env.py", env={"OMP_NUM_THREADS": "2", "MINE": "a\nb"})
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        env, threads = json.loads((shell.cwd / f"env-{rank}.json").read_text())
        expected = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 3,
            "LOCAL_WORLD_SIZE": 3,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": 2,  # the user's own
            "GLOO_SOCKET_IFNAME": "lo",
            "MINE": "a\nb",
        }
        assert {name: env[name] for name in expected} == {name: str(value) for name, value in expected.items()}
        assert 0 < int(env["MASTER_PORT"]) < 1 << 16
        assert threads == 2


GROUPS = """
import json, os, psutil, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
assert total.item() == 3, total
dist.barrier()
if dist.get_rank() == 0:
    top = psutil.Process(int(sys.argv[1])) if sys.argv[1:] else psutil.Process().parent().parent()
    family = [top, *top.children(recursive=True)]
    listening = [
        c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    ]
    print(json.dumps({"listening": listening, "family": len(family), "torch": torch.__version__}))
dist.barrier()
dist.destroy_process_group()
"""


TRAINING = """
import json, os, sys, torch
from torch import nn

torch.manual_seed(0)
inputs = torch.randn(32, 4)
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
net = nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

def end(weight, rank, world_size):
    with open(f"{sys.argv[1]}-{rank}.json", "w") as file:
        json.dump([world_size, weight.detach().flatten().tolist()], file)
"""

ALONE = """
for epoch in range(2):
    for x, y in torch.utils.data.DataLoader(data, batch_size=8):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
end(net.weight, 0, 1)
"""

BY_HAND = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler
dist.init_process_group("gloo")
model = DistributedDataParallel(net)
sampler = DistributedSampler(data, shuffle=False)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for x, y in torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
end(model.module.weight, dist.get_rank(), dist.get_world_size())
dist.destroy_process_group()
"""

ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
loader = torch.utils.data.DataLoader(data, batch_size=4)
model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
for epoch in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
end(accelerator.unwrap_model(model).weight, accelerator.process_index, accelerator.num_processes)
"""

FABRIC = """
from lightning_fabric import Fabric
fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]))
fabric.launch()
model, optimizer = fabric.setup(net, optimizer)
loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=4))
for epoch in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
end(model.module.weight, fabric.global_rank, fabric.world_size)
"""


@pytest.mark.slow
def test_scripts_of_other_libraries_run_as_they_are(shell: Shell) -> None:
    kinds = {"by-hand": BY_HAND, "with-accelerate": ACCELERATE, "with-fabric": FABRIC}
    weights = []
    for kind, text in kinds.items():
        shell.script(f"{kind}.py", TRAINING + text)
        done = shell.run("launch", "--nproc-per-node", "2", f"{kind}.py", kind)
        assert done.returncode == 0, done.stderr
        ends = [json.loads((shell.cwd / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ends[0] == ends[1] and ends[0][0] == 2
        weights.append(torch.tensor(ends[0][1]))
    shell.script("one.py", TRAINING + ALONE)
    plain = shell.run("one.py", "one", prefix=(sys.executable,))
    assert plain.returncode == 0, plain.stderr
    alone = torch.tensor(json.loads((shell.cwd / "one-0.json").read_text())[1])
    for kind, weight in zip(kinds, weights, strict=True):
        torch.testing.assert_close(weight, alone, msg=kind)


LAST_STEP = """
import torch, torch.distributed as dist

def main():
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(20, 1))
    for _ in range(8):
        model(torch.rand(32, 20)).square().mean().backward()
    dist.destroy_process_group()

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "then"),
    [
        ('("gloo")', '("gloo")'),
        ('("gloo")', "()"),  # a backend for each kind of device
        ("dist.destroy_process_group()", "pass"),
        ("\nmain()", "\nraise SystemExit(main())"),
    ],
    ids=["gloo", "no backend", "not destroyed", "by SystemExit"],
)
def test_a_script_that_ends_with_its_last_step_ends(shell: Shell, now: str, then: str) -> None:
    # Each hangs every second time, or aborts, where the model frees the group of gloo: `launch.last_groups`.
    assert now in LAST_STEP
    shell.script("last.py", LAST_STEP.replace(now, then))
    for _ in range(4):
        done = shell.run("launch", "--nproc-per-node", "2", "last.py")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_runs_at_once_and_they_listen_on_the_loopback_only(shell: Shell) -> None:
    shell.script("groups.py", GROUPS)
    children = [shell.start("launch", "--nproc-per-node", "2", "groups.py") for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=HANG_S)
        assert child.returncode == 0, err.decode()
        told = json.loads(out)
        assert told["family"] >= 5  # the launcher, the node process, the store, two ranks
        assert len(told["listening"]) >= 2  # the store, gloo's own
        assert set(told["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_names_of_the_users_own_are_not_shadowed(shell: Shell) -> None:
    for name in ("launch", "random", "examples", "rank", "node", "job", "world", "errors"):
        shell.script(f"{name}.py", f"MINE = '{name}'")
    shell.script(
        "names.py",
        "import random\n"
        "import launch, examples, rank, node, job, world, errors\n"
        "print(*(m.MINE for m in (launch, examples, rank, node, job, world, errors, random)))\n",
    )
    for prefix in ((), (str(Path(sys.executable).with_name("ddpkit")),)):
        done = shell.run("launch", *SPAWN, "--nproc-per-node", "1", "names.py", prefix=prefix)
        assert (done.returncode, done.stdout) == (0, "launch examples rank node job world errors random\n"), done.stderr


def test_a_folder_and_an_archive_run_as_under_python(shell: Shell) -> None:
    shell.script("app/__main__.py", "import sys, inside; print(sys.argv, sys.path[0], __name__, inside.__name__)")
    shell.script("app/inside.py", "")
    subprocess.run([sys.executable, "-m", "zipapp", "app"], cwd=shell.cwd, check=True, timeout=HANG_S)
    for target in ("app", "app.pyz"):
        command = [sys.executable, target, "x"]
        python = subprocess.run(command, cwd=shell.cwd, check=True, timeout=HANG_S, capture_output=True, text=True)
        done = shell.run("launch", *SPAWN, "--nproc-per-node", "1", target, "x")
        assert (done.returncode, done.stdout) == (0, python.stdout), done.stderr


def test_output_that_is_large_binary_or_endless_in_its_line(shell: Shell) -> None:
    shell.script(
        "big.py",
        "import os, sys\n"
        "out = sys.stdout.buffer\n"
        "for _ in range(80): out.write(bytes(range(256)) * 512)\n"  # 10 MiB
        "for _ in range(80): sys.stderr.buffer.write(b'x' * (1 << 17))\n"  # and 10 MiB without the end of a line
        "out.write(b'last words of %s' % os.environ['RANK'].encode())\n",
    )
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "3", "--run-dir", "kept", "big.py")
    assert done.returncode == 0
    assert done.stdout.endswith("last words of 0")
    for rank in range(3):
        data = (shell.cwd / f"kept/logs/attempt-0/rank-{rank}.log").read_bytes()
        assert len(data) == 20 * (1 << 20) + len("last words of 0")
        assert data.count(b"x" * 1000) and bytes(range(256)) in data
    teed = shell.run("launch", *SPAWN, "--nproc-per-node", "2", "--tee", "all", "big.py")
    assert teed.returncode == 0
    assert "last words of 0\n" in teed.stdout and "last words of 1\n" in teed.stdout
    assert "[rank 0] xxx" in teed.stderr and "[rank 1] xxx" in teed.stderr


def test_a_reader_that_goes_away_ends_nothing(shell: Shell) -> None:
    shell.script("chatty.py", "import sys\nfor i in range(5000): print(i)\nopen('done', 'w').close()\n")
    command = f"{sys.executable} -m ddpkit launch -o launch.start_method=spawn --nproc-per-node 1 chatty.py | head -1"
    done = shell.run(prefix=("bash", "-c", f"set -o pipefail; {command}"))
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert (shell.cwd / "done").exists()


def test_logs_without_a_run_dir_are_kept_for_failures_alone(shell: Shell) -> None:
    (shell.cwd / "tmp").mkdir()
    shell.script("end.py", "import sys; print('out'); sys.exit(int(sys.argv[1]))")
    options = ("launch", *SPAWN, "--nproc-per-node", "1", "end.py")
    assert shell.run(*options, "0", env={"TMPDIR": "tmp"}).returncode == 0
    assert list((shell.cwd / "tmp").iterdir()) == []
    failed = shell.run(*options, "3", env={"TMPDIR": "tmp"})
    assert failed.returncode == 1
    [kept] = (shell.cwd / "tmp").rglob("rank-0.log")
    assert kept.read_text() == "out\n"
    assert str(kept.relative_to(shell.cwd)) in failed.stderr


def test_the_checkout_is_what_these_tests_run(shell: Shell) -> None:
    done = shell.run(prefix=(sys.executable, "-c", "import ddpkit; print(ddpkit.__file__)"))
    assert Path(done.stdout.strip()).parent == ROOT / "ddpkit"


@pytest.mark.slow
def test_rank_zero_alone_reads_what_is_piped_in(shell: Shell) -> None:
    shell.script("read.py", "import os, sys\nprint(os.environ['RANK'], repr(sys.stdin.read()))\n")
    (shell.cwd / "input").write_text("hello\n")
    with (shell.cwd / "input").open() as piped:
        done = shell.run("launch", "--nproc-per-node", "2", "--tee", "all", "read.py", stdin=piped)
    assert sorted(done.stdout.splitlines()) == ["[rank 0] 0 'hello\\n'", "[rank 1] 1 ''"]
