from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpkit import config as configs
from ddpkit import yaml_files
from ddpkit.config import Absent, Config, Difference
from ddpkit.errors import ConfigError

MINIMAL = """\
run_dir: runs/x
model: {factory: "pkg.models:build"}
data:
  train: {factory: "pkg.data:train"}
  global_batch_size: 64
optimizer: {factory: "torch.optim:SGD", args: {lr: 1e-1}}
train:
  step: pkg.steps:step
  epochs: 10
"""

FULL = """\
run_dir: runs/digits
seed: 3
launch: {launcher: local, nproc_per_node: 2, timeout_s: 60}
model:
  factory: pkg.models:build
  args: {width: 32, layers: [1, 2.5, "x", null, true], init: {ref: "pkg.init:normal"}}
data:
  train: &data
    factory: pkg/data.py:train
    args: {transform: {factory: "pkg.data:Crop", args: {size: 8}}}
  eval: *data
  global_batch_size: 64
  sampler: {factory: "pkg.data:Sampler", args: {}}
  loader: {num_workers: 2, collate_fn: "pkg.data:collate"}
optimizer:
  factory: torch.optim:SGD
  args: {lr: 1e-1, momentum: 0.9}
  groups:
    - {params: ["*.bias"], args: {weight_decay: 0.0}}
scheduler:
  factory: torch.optim.lr_scheduler:CosineAnnealingLR
  args:
    T_max: 200
train:
  step: pkg.steps:step
  eval_step: pkg.steps:evaluate
  max_steps: 100
  eval_every: {steps: 4}
checkpoint: {every_steps: 50, keep: 3}
"""

CONTRACT = """\
run_dir: runs/digits
seed: 0
launch:
  launcher: local
  nnodes: 1
  nproc_per_node: 2
  start_method: warm
  max_restarts: 0
  backend: auto
  timeout_s: 1800
  stall_timeout_s: 600
  rdzv_endpoint: null
  cpus_per_rank: null
  slurm: {}
model:
  factory: examples.digits:build_model
  args: {width: 32}
  sync_batchnorm: true
  parallel: ddp
  compile: false
  activation_checkpointing: []
  ema_decay: null
  init_from: null
data:
  train: {factory: examples.digits:train_dataset, args: {}}
  eval: {factory: examples.digits:eval_dataset}
  global_batch_size: 64
  micro_batch_size: null
  eval_batch_size: null
  shuffle: true
  drop_last: true
  sampler: elastic
  loader: {num_workers: 0, pin_memory: auto, prefetch_factor: 2, persistent_workers: true, collate_fn: null}
optimizer: {factory: "torch.optim:SGD", args: {lr: 0.1, momentum: 0.9}, groups: []}
scheduler: {factory: "torch.optim.lr_scheduler:CosineAnnealingLR", args: {T_max: 200}, interval: step}
train:
  step: examples.digits:train_step
  eval_step: examples.digits:eval_step
  epochs: 10
  eval_every: 1
  precision: fp32
  clip_grad_norm: null
  deterministic: false
  callbacks: []
checkpoint: {every_steps: 50, every_minutes: null, keep: 3, best: null}
trackers: []
log_every: 10
"""

ON_FILES = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # its files are written anew each time
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a file into a folder that is current, and give its relative name."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "x.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configs.load(path, overrides)
    return str(caught.value)


# ---------------------------------------------------------------------- reading


def test_the_defaults_are_those_of_the_documented_config(write: Callable[..., str]) -> None:
    full = configs.load(write(CONTRACT))
    minimal = configs.load(write(MINIMAL))
    for section in ("launch", "checkpoint"):
        given = {"nproc_per_node": 2} if section == "launch" else {}
        assert getattr(minimal, section).model_copy(update=given) == getattr(full, section)
    assert minimal.data.loader == full.data.loader
    assert minimal.data.model_copy(update={"train": full.data.train, "eval": full.data.eval}) == full.data
    assert minimal.model.model_copy(update={"factory": full.model.factory, "args": full.model.args}) == full.model
    steps = {"step": full.train.step, "eval_step": full.train.eval_step}
    assert minimal.train.model_copy(update=steps) == full.train
    assert (minimal.seed, minimal.log_every, minimal.trackers) == (full.seed, full.log_every, full.trackers)
    assert (minimal.scheduler, minimal.launch.nproc_per_node, minimal.checkpoint.max_failures) == (
        None,
        "auto",
        3,
    )


def test_yaml_1_2_scalars(write: Callable[..., str]) -> None:
    args = "{a: 1e-3, b: no, c: 012, d: '1', e: 1:30, f: .inf, g: =, h: 0x1F, i: ~, j: !!str 3, k: on}"
    config = configs.load(write(MINIMAL.replace("{lr: 1e-1}", args)))
    values = {
        "a": 0.001,
        "b": "no",
        "c": 12,
        "d": "1",
        "e": "1:30",
        "f": float("inf"),
        "g": "=",
        "h": 31,
        "i": None,
    }
    assert config.optimizer.args == {**values, "j": "3", "k": "on"}


def test_an_integer_is_good_for_a_float(write: Callable[..., str]) -> None:
    value = configs.load(write(MINIMAL), ["train.clip_grad_norm=1"]).train.clip_grad_norm
    assert value == 1.0 and isinstance(value, float)


def test_merge_keys_and_aliases(write: Callable[..., str]) -> None:
    text = MINIMAL.replace("{lr: 1e-1}", "{x: &x {a: 1, b: 2}, y: {<<: *x, b: 3}, z: {<<: [{a: 9}, *x]}}")
    args = configs.load(write(text)).optimizer.args
    assert args == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 9, "b": 2}}


def test_a_config_is_frozen_and_apart_from_the_tree_it_came_from() -> None:
    tree = configs.to_tree(configs.from_tree(yaml_files.parse(FULL, "x").plain()))
    config = configs.from_tree(tree)
    before = configs.to_tree(config)
    args: Any = tree["model"]
    args["args"]["layers"].append("later")
    assert configs.to_tree(config) == before
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


# ---------------------------------------------------------------------- writing


text_values = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "no",
        "1e-3",
        "012",
        "null",
        "~",
        "",
        " ",
        "a: b",
        "- a",
        "#x",
        "<<",
        "=",
        "2020-01-01",
        "true",
        ".inf",
        "x\n",
        "\x85",
        "\ufeff",
    ]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | text_values,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(text_values.filter(lambda key: key not in ("factory", "ref")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(ON_FILES, max_examples=150)
@given(
    args=st.dictionaries(text_values, plain_values, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    run_dir=st.text(min_size=1),
)
def test_dump_reads_back_to_an_equal_config(write: Callable[..., str], args: Any, seed: int, run_dir: str) -> None:
    tree: Any = yaml_files.parse(FULL, "x").plain()
    tree["optimizer"]["args"], tree["seed"] = args, seed
    tree["run_dir"] = "".join(c for c in run_dir if c != "\0" and not 0xD800 <= ord(c) < 0xE000) or "x"
    config = configs.from_tree(tree)
    again = configs.load(write(configs.dump(config)))
    assert again == config
    assert repr(configs.to_tree(again)) == repr(configs.to_tree(config))  # tells 1 from 1.0 and true


def test_dump_is_readable_and_quotes_what_other_readers_would_misread() -> None:
    tree: Any = {
        "a": "no",
        "b": "1e-3",
        "c": 1e-05,
        "d": [{"x": 1, "z": []}, [1, 2]],
        "e": {},
        "f": "pkg.a:b",
        "g": 0.1,
    }
    assert yaml_files.dump(tree) == (
        'a: "no"\nb: "1e-3"\nc: 1.0e-05\nd:\n  - x: 1\n    z: []\n  - - 1\n    - 2\ne: {}\nf: pkg.a:b\ng: 0.1\n'
    )
    assert yaml_files.parse(yaml_files.dump(tree), "x").plain() == tree


def test_to_tree_is_complete_and_from_tree_reads_it(write: Callable[..., str]) -> None:
    config = configs.load(write(FULL))
    tree = configs.to_tree(config)
    assert tree.keys() == Config.model_fields.keys()
    assert configs.from_tree(tree) == config


# ---------------------------------------------------------------------- what is wrong, and where


def test_all_problems_come_at_once_each_with_its_line(write: Callable[..., str]) -> None:
    text = (
        MINIMAL.replace("epochs: 10", "epochs: ten\n  max_step: 5")
        .replace("global_batch_size: 64", "global_batch_size: true")
        .replace("run_dir: runs/x\n", "")
    )
    assert refusal(write(text)).splitlines() == [
        "x.yaml: run_dir: missing; a string is needed",
        "x.yaml:4: data.global_batch_size: expected an integer of at least 1, got true (bool)",
        "x.yaml:8: train.epochs: expected an integer of at least 1 or null, got 'ten' (str)",
        "x.yaml:9: train.max_step: unknown key; did you mean 'max_steps'? (the keys of train: "
        "step, eval_step, metrics, "
        "epochs, max_steps, eval_every, eval_ema, precision, tf32, clip_grad_norm, clip_grad_value, log_grad_norm, "
        "on_nonfinite, max_skipped, deterministic, early_stopping, callbacks, profile)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "launch.nproc_per_node=0",
            "launch.nproc_per_node: expected an integer of at least 1 or 'auto', got 0 (int)",
        ),
        (
            "launch.launcher=locla",
            "launch.launcher: expected 'inline' or 'local' or 'torchrun' or 'slurm', got 'locla' "
            "(str); did you mean 'local'?",
        ),
        (
            "launch.timeout_s=.inf",
            "launch.timeout_s: expected a number of at most 10000000 and above 0, got inf (float)",
        ),
        (
            "train.clip_grad_norm='0.1'",
            "train.clip_grad_norm: expected a number above 0 or null, got '0.1' (str); a number is "
            "written without quotes",
        ),
        (
            "train.clip_grad_norm=true",
            "train.clip_grad_norm: expected a number above 0 or null, got true (bool)",
        ),
        ("seed=true", "seed: expected an integer of at least 0, got true (bool)"),
        ("seed=1.0", "seed: expected an integer of at least 0, got 1.0 (float)"),
        ("seed=null", "seed: expected an integer of at least 0, got null"),
        (
            "train.eval_every={epochs: 2}",
            "train.eval_every.steps: missing; an integer of at least 1 is needed",
        ),
        (
            "data.sampler=elastik",
            "data.sampler: expected 'elastic' or 'distributed' or a mapping with the keys factory, "
            "args, got 'elastik' (str); did you mean 'elastic'?",
        ),
        (
            "data.sampler={factory: 'a:b', arg: 1}",
            "data.sampler.arg: unknown key; did you mean 'args'? (the keys of data.sampler: factory, args)",
        ),
        ("data.loader.pin_memory=1", "data.loader.pin_memory: expected 'auto' or true or false, got 1 (int)"),
        ("data.train=pkg:f", "data.train: expected a mapping with the keys factory, args, got 'pkg:f' (str)"),
        (
            "train.step=pkg.steps.step",
            "train.step: 'pkg.steps.step' is no reference; write 'pkg.steps:step', with a colon before the name",
        ),
        ("train.step=[1]", "train.step: expected a reference such as 'package.module:name', got a list"),
        ("model.args=[1]", "model.args: expected a mapping, got a list"),
        (
            "model.args.f={factory: 3, arg: 1}",
            "model.args.f.factory: expected a reference such as 'package.module:name', got 3 (int)",
        ),
        (
            "model.args.f=[{ref: nothing}]",
            "model.args.f.0.ref: 'nothing' is no reference; write 'package.module:name' or 'path/to/file.py:name'",
        ),
        (
            "optimizer.groups=[{params: []}]",
            "optimizer.groups.0: names no parameters; give params, modules or both",
        ),
        ("run_dir=''", "run_dir: '' cannot be a path"),
        (
            "train.max_steps=5",
            "train.max_steps: train.epochs and train.max_steps are both given; leave one out, or set it to null",
        ),
        ("train.epochs=null", "train: neither train.epochs nor train.max_steps is given; give one of them"),
        ("train.eval_step=a:b", "train.eval_step: given without data.eval; give both or neither"),
        ("data.eval={factory: 'a:b'}", "data.eval: given without train.eval_step; give both or neither"),
        ("sede=1", "sede: unknown key; did you mean 'seed'? (the keys at the top: run_dir, seed, launch, "),
        (
            "data.loader.num_worker=1",
            "data.loader.num_worker: unknown key; did you mean 'num_workers'? (the keys of data.loader: ",
        ),
    ],
)
def test_an_override_is_told_what_is_wrong_with_it(write: Callable[..., str], override: str, message: str) -> None:
    lines = refusal(write(MINIMAL), override).splitlines()
    assert any(message in line for line in lines), lines
    assert "pydantic" not in "".join(lines)


def test_the_line_names_the_override_and_not_the_file(write: Callable[..., str]) -> None:
    assert refusal(write(MINIMAL), "seed=x") == "-o seed=x: seed: expected an integer of at least 0, got 'x' (str)"


@pytest.mark.parametrize(
    "override", ["seed", "=1", "a..b=1", "seed.x=1", "optimizer.groups.7={}", "seed=[", "seed=2020-01-01"]
)
def test_an_override_that_cannot_be_applied(write: Callable[..., str], override: str) -> None:
    assert f"-o {override}" in refusal(write(FULL), override)


def test_overrides_reach_into_lists_and_make_what_is_not_there(write: Callable[..., str]) -> None:
    overrides = [
        "optimizer.groups.0.args.weight_decay=1e-2",
        "optimizer.groups.1={params: [head.*]}",
        "launch.nproc_per_node=4",
        "scheduler=null",
        "model.args.new.deep=no",
    ]
    config = configs.load(write(FULL), overrides)
    assert [group.params for group in config.optimizer.groups] == [("*.bias",), ("head.*",)]
    assert config.optimizer.groups[0].args == {"weight_decay": 0.01}
    assert config.launch.nproc_per_node == 4 and config.scheduler is None
    assert config.model.args["new"] == {"deep": "no"}
    groups = configs.load(write(MINIMAL), ["optimizer.groups.0={params: [a]}"]).optimizer.groups
    assert groups[0].params == ("a",)


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        "x",
        {1: 2},
        {"run_dir": {1}},
        {"model": {"args": {"a": (1, 2)}}},
        {"seed": object()},
        {"model": {"factory": "a:b", "args": {"deep": [[[[[[[[[]]]]]]]]]}}},
    ],
)
def test_from_tree_refuses_what_is_no_config(tree: Any) -> None:
    with pytest.raises(ConfigError):
        configs.from_tree(tree)


def test_from_tree_ends_on_a_tree_inside_itself() -> None:
    tree: dict[str, Any] = {}
    tree["model"] = tree
    with pytest.raises(ConfigError, match="nested more than"):
        configs.from_tree(tree)


# ---------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x.yaml: empty; a config is a mapping"),
        ("# nothing\n", "x.yaml: empty"),
        ("- a\n", "x.yaml: a config is a mapping of keys to values, and this is a list"),
        ("seed: 1\nrun_dir: a\nseed: 2\n", "x.yaml:3: seed: this key is given twice, first on line 1"),
        ("a: {b: 1, b: 2}", "x.yaml:1: a.b: this key is given twice, first on line 1"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "x.yaml:1: a: the tag !!python/object/apply:os.system is not allowed",
        ),
        ("a: !mine {b: 1}\n", "x.yaml:1: a: the tag !mine is not allowed"),
        ("a: !!set {b, c}\n", "the tag !!set is not allowed"),
        ("a: !!binary aGk=\n", "the tag !!binary is not allowed"),
        ("a:\n  b: 2020-01-01\n", "x.yaml:2: a.b: 2020-01-01 is a date; quote it ('2020-01-01')"),
        ("a: 2020-13-45\n", "is a date; quote it"),
        ("a: !!int x\n", "'x' is not a YAML int"),
        ("rename: {1: a}\n", "x.yaml:1: rename: the key 1 is not a string; quote it ('1')"),
        ("true: a\n", "x.yaml:1: the key true is not a string"),
        ("? [a]\n: b\n", "a key must be a string"),
        ("a:\n\tb: 1\n", "x.yaml:2:1: a tab"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: a second document"),
        ("a: *nowhere\n", "x.yaml:1:4: undefined alias 'nowhere'"),
        ("a: b: c\n", "x.yaml:1:5: a ':' that does not fit"),
        ("a: [1, 2\nb: 3\n", "opened on line 1 is not closed"),
        ("a: 'x\n", "opened on line 1 (a quote or a bracket) is closed"),
        ("a: @x\n", "quote the value"),
        ("a: x\n b: y\n", "x.yaml:2:3: "),
        (b"a: \x00\n", "x.yaml:1:4: the character U+0000 is not allowed"),
        (b"a: 1\nb: \xff\n", "x.yaml:2:4: not UTF-8 text"),
        ("a: x".encode("utf-16"), "not UTF-8 text"),
        ('a: "\\ud800"\n', "surrogate"),
        ('a: "\\U99999999"\n', "x.yaml: not valid YAML"),
        ("a: &x [*x]\n", "the alias *x stands inside what it names"),
        ("a: &x {<<: *x}\n", "the alias *x stands inside what it names"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "x.yaml:1: nested too deeply; 64 levels are allowed"),
        ("a: " + "{<<: " * 150 + "1" + "}" * 150, "nested too deeply"),
        ("a: " + "9" * 5000, "a: "),
        ("a: 0x" + "f" * 5000, "this integer is too large"),
        ("#" * (1 << 20) + "\na: 1", "larger than 1 MiB"),
    ],
)
def test_a_broken_file_is_one_plain_sentence(write: Callable[..., str], content: str | bytes, message: str) -> None:
    told = refusal(write(content))
    assert message in told
    assert len(told.splitlines()) == 1


def test_an_alias_bomb_is_refused(write: Callable[..., str]) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "once aliases" in refusal(write("\n".join(["l0: &l0 [x]", *levels])))


def test_a_name_may_be_anchored_twice_without_a_warning(
    write: Callable[..., str], recwarn: pytest.WarningsRecorder
) -> None:
    config = configs.load(write(MINIMAL.replace("{lr: 1e-1}", "{a: &x 1, b: &x 2, c: *x}")))
    assert config.optimizer.args["c"] == 2
    assert not recwarn.list


def test_a_path_that_cannot_be_read(write: Callable[..., str]) -> None:
    write(MINIMAL, "train.yaml")
    assert refusal("trian.yaml") == "trian.yaml: there is no such file; did you mean 'train.yaml'?"
    assert refusal("nowhere/at/all.yaml") == "nowhere/at/all.yaml: there is no such file"
    assert refusal(".") == ".: cannot be read: Is a directory"
    assert "cannot be read" in refusal("x" * 300)
    assert "cannot be read" in refusal("a\0b")
    assert "cannot be read: Not a directory" in refusal("train.yaml/x")
    assert "larger than" in refusal("/dev/zero")


# What means something to a YAML parser, to be put where it does not belong.
MARKS = [
    "%YAML 1.1\n---\n",
    "---\n",
    "&a ",
    "*data",
    "<<: ",
    "!!int ",
    "!!float x",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!python/name:os.system ",
    "!<",
    "- ",
    "? ",
    ": ",
    "{",
    "]",
    '"',
    '"\\x',
    "|9\n",
    "\t",
    "\x00",
    "\x85",
    "é",
    "2020-01-01",
    "0x",
    "1e999",
    "null",
    "=",
]


def mutated(text: bytes, draw: random.Random) -> bytes:
    """The text with up to four places overwritten, and sometimes with its lines in another order."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        end = at + draw.choice((0, 0, 1, 20))
        text = text[:at] + draw.choice([draw.choice(MARKS).encode(), draw.randbytes(1), b""]) + text[end:]
    lines = text.splitlines(keepends=True)
    if draw.random() < 0.3:
        first, second = draw.randrange(len(lines)), draw.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


@settings(ON_FILES, max_examples=120)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_config_raises_nothing_but_config_errors(write: Callable[..., str], seed: int) -> None:
    text = mutated(FULL.encode(), random.Random(seed))
    try:
        configs.dump(configs.load(write(text)))
    except ConfigError as error:
        assert str(error).strip()


@settings(ON_FILES, max_examples=60)
@given(
    key=st.sampled_from(["seed", "a", "model.args.x", "optimizer.groups.0", "data.loader", ""]),
    value=st.text(max_size=20),
)
def test_any_override_is_applied_or_refused(write: Callable[..., str], key: str, value: str) -> None:
    try:
        configs.load(write(FULL), [f"{key}={value}"])
    except ConfigError as error:
        assert "-o " in str(error)


# ---------------------------------------------------------------------- defaults


def test_defaults_build_a_config_from_others(write: Callable[..., str]) -> None:
    write("defaults: [more]\nseed: 5\nlog_every: 7\n" + MINIMAL, "conf/base.yaml")
    write("log_every: 1\ncheckpoint: {keep: 9, every_steps: 2}\n", "conf/more.yaml")
    write("factory: torch.optim:Adam\nargs: {lr: 1e-2, betas: [0.9, 0.99]}\n", "conf/optimizer/adam.yaml")
    path = write(
        "defaults: [base, {optimizer: adam}]\noptimizer: {args: {betas: [0, 1]}}\ncheckpoint: {keep: 4}\n",
        "conf/x.yaml",
    )
    config = configs.load(path, ["seed=6"])
    assert (config.seed, config.log_every) == (6, 7)
    assert (config.checkpoint.keep, config.checkpoint.every_steps) == (4, 2)
    assert config.optimizer.factory == "torch.optim:Adam"
    assert config.optimizer.args == {"lr": 0.01, "betas": [0, 1]}


def test_self_says_where_the_files_own_content_is_merged(write: Callable[..., str]) -> None:
    write("seed: 1\n", "base.yaml")
    assert configs.load(write("defaults: [base]\nseed: 2\n" + MINIMAL)).seed == 2
    assert configs.load(write("defaults: [_self_, base]\nseed: 2\n" + MINIMAL)).seed == 1


def test_a_problem_is_told_with_the_file_it_is_in(write: Callable[..., str]) -> None:
    write("\nlr: 1\n", "optimizer/sgd.yaml")
    told = refusal(write("defaults: [{optimizer: sgd}]\nseed: x\n" + MINIMAL))
    assert "optimizer/sgd.yaml:2: optimizer.lr: unknown key" in told
    assert "x.yaml:2: seed: expected an integer" in told


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ("[a]", "the files include each other: x.yaml -> a.yaml -> b.yaml -> a.yaml"),
        ("[x]", "the files include each other: x.yaml -> x.yaml"),
        ("[nothere]", "x.yaml:1: defaults: nothere.yaml: there is no such file"),
        ("[exmaple]", "there is no such file; did you mean 'example.yaml'"),
        ("[{optimizer: nothere}]", "optimizer/nothere.yaml: there is no such file"),
        ("base", "defaults: expected a list"),
        ("[1]", "expected a file's name, {group: name} or _self_"),
        ("[{a: b, c: d}]", "expected a file's name, {group: name} or _self_"),
        ("[{optimizer: [a]}]", "optimizer: expected the name of a file in optimizer"),
        ('["a\\0b"]', "cannot be the name of a file"),
        ("[d0]", "more than 64 files"),
    ],
)
def test_defaults_that_cannot_be_followed(write: Callable[..., str], defaults: str, message: str) -> None:
    write("defaults: [b]\n", "a.yaml")
    write("defaults: [a]\n", "b.yaml")
    write("seed: 1\n", "example.yaml")
    for number in range(12):  # each twice: 4096 files in all
        write(f"defaults: [d{number + 1}, d{number + 1}]\n", f"d{number}.yaml")
    write("seed: 1\n", "d12.yaml")
    assert message in refusal(write(f"defaults: {defaults}\n{MINIMAL}"))


def test_groups_inside_groups_and_no_file_at_all(write: Callable[..., str]) -> None:
    write("defaults: [{args: wide}]\nfactory: a:b\n", "model/net.yaml")
    write("width: 9\n", "model/args/wide.yaml")
    write("width: 1\n", "model/args/slim.yaml")
    write("factory: c:d\n", "data/train/cifar.yaml")
    path = write("defaults: [_self_, {model: net}, {data/train: cifar}, {optimizer: null}]\n" + MINIMAL)
    config = configs.load(path)
    assert (config.model.factory, config.model.args) == ("a:b", {"width": 9})
    assert config.data.train.factory == "c:d"
    assert config.optimizer.factory == "torch.optim:SGD"
    assert configs.load(path, ["model/args=slim"]).model.args == {"width": 1}


def test_an_override_chooses_the_file_of_a_group(write: Callable[..., str]) -> None:
    write("factory: a:small\n", "model/small.yaml")
    write("factory: a:large\nargs: {width: 9}\n", "model/large.yaml")
    path = write("defaults: [_self_, {model: small}]\n" + MINIMAL)
    assert configs.load(path).model.factory == "a:small"
    config = configs.load(path, ["model=large", "model.args.width=10"])
    assert (config.model.factory, config.model.args) == ("a:large", {"width": 10})
    assert "-o model=lagre: model/lagre.yaml: there is no such file; did you mean 'large.yaml'?" in refusal(
        path, "model=lagre"
    )
    assert "-o data=large: data: expected a mapping" in refusal(path, "data=large")  # no group of this file's


# ---------------------------------------------------------------------- environment variables

VARIABLES = {"LR": "1e-2", "WHO": "me", "NUMBER": "7", "ODD": "a: b: c", "BETAS": "[0.5, 0.9]", "INSIDE": "${env:WHO}"}


def loaded(write: Callable[..., str], args: str, *overrides: str) -> dict[str, Any]:
    path = write(MINIMAL.replace('{factory: "pkg.models:build"}', f"\n  factory: a:b\n  args:\n    {args}"))
    return dict(configs.load(path, overrides, env=VARIABLES).model.args)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${env:LR}", 0.01),
        ("${oc.env:LR}", 0.01),
        ("'${env:LR}'", "1e-2"),
        ('"${env:NUMBER}"', "7"),
        ("${env:BETAS}", [0.5, 0.9]),
        ("${oc.env:NOTHERE,3}", 3),
        ("${env:NOTHERE, x y }", "x y"),
        ("${oc.env:NOTHERE,}", None),
        ("${env:NUMBER,3}", 7),
        ("runs/${env:WHO}/${env:NUMBER}-${env:NOTHERE,z}", "runs/me/7-z"),
        ("${env:INSIDE}", "${env:WHO}"),
        ("\\${env:WHO}", "${env:WHO}"),
        ("a \\\\${ b", "a \\${ b"),
        ("$HOME and {x}", "$HOME and {x}"),
        ("[a, '${env:WHO}']", ["a", "me"]),
    ],
)
def test_variables_are_filled_in_where_they_are_written(write: Callable[..., str], written: str, value: Any) -> None:
    assert loaded(write, f"x: {written}") == {"x": value}
    assert loaded(write, "y: 1", f"model.args.x={written}") == {"x": value, "y": 1}
    config = configs.load("x.yaml", [f"model.args.x={written}"], env=VARIABLES)
    write(configs.dump(config), "stored.yaml")
    assert configs.load("stored.yaml", env={}) == config  # what is stored needs no variable any more


def test_a_variable_may_choose_a_file(write: Callable[..., str]) -> None:
    write("factory: a:small\n", "model/me.yaml")
    path = write("defaults: [_self_, {model: '${env:WHO}'}]\n" + MINIMAL)
    assert configs.load(path, env=VARIABLES).model.factory == "a:small"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("${env:NOTHERE}", "x.yaml:5: model.args.x: the environment variable NOTHERE is not set; set it, or give a"),
        ("${model.width}", "'${model.width}': ${env:NAME} and ${oc.env:NAME,default} are filled in, and nothing else"),
        ("${HOME}", "'${HOME}': ${env:NAME} and"),
        ("${env:A-B}", "'${env:A-B}': ${env:NAME} and"),
        ("${env:A,${env:B}}", "'${': ${env:NAME} and"),
        ("${env:WHO", "'${': ${env:NAME} and"),
        ("${env:ODD}", "x.yaml:5 (${env:ODD}): a ':' that does not fit here"),
    ],
)
def test_what_cannot_be_filled_in(write: Callable[..., str], written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(write, f"x: {written}")
    assert message in str(caught.value)


# ---------------------------------------------------------------------- changed, described


def test_differences_name_the_leaves_that_may_not_change(write: Callable[..., str]) -> None:
    old = configs.load(write(FULL))
    overrides = [
        "optimizer.args.lr=0.2",
        "optimizer.args.nesterov=true",
        "model.args.layers.0=1.0",
        "model.args.width=32",
        "scheduler=null",
    ]
    found = configs.differences(old, configs.load("x.yaml", overrides))
    scheduler: Any = configs.to_tree(old)["scheduler"]
    assert found == [
        Difference("model.args.layers", [1, 2.5, "x", None, True], [1.0, 2.5, "x", None, True]),
        Difference("optimizer.args.lr", 0.1, 0.2),
        Difference("optimizer.args.nesterov", Absent.ABSENT, True),
        Difference("scheduler", scheduler, None),
    ]
    assert str(found[2]) == "optimizer.args.nesterov: not there -> true"


def test_what_is_free_to_change_is_no_difference(write: Callable[..., str]) -> None:
    old = configs.load(write(FULL))
    overrides = [
        "launch.nproc_per_node=8",
        "launch.start_method=spawn",
        "data.loader.num_workers=0",
        "data.micro_batch_size=2",
        "data.eval_batch_size=2",
        "checkpoint.every_steps=1",
        "log_every=1",
        "train.max_steps=null",
        "train.epochs=3",
        "run_dir=elsewhere",
    ]
    assert configs.differences(old, configs.load("x.yaml", overrides)) == []
    assert configs.differences(old, configs.load("x.yaml", ["train.precision=bf16"])) == [
        Difference("train.precision", "fp32", "bf16")
    ]


def test_every_key_of_the_schema_is_described() -> None:
    schema = configs.schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        key
        for section in sections
        for key, node in section.get("properties", {}).items()
        if not (node.get("description") or "$ref" in node)  # a section's own description says the same
    ]
    assert undescribed == []
    assert schema["required"] == ["run_dir", "model", "data", "optimizer", "train"]


def test_reading_and_checking_a_config_imports_no_torch(write: Callable[..., str]) -> None:
    code = (
        "import sys; from ddpkit import config, factories, yaml_files\n"
        "assert factories.check(config.load(sys.argv[1]), sys.path)\n"
        "sys.exit('torch' in sys.modules)"
    )
    path = os.path.abspath(write(FULL))
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def test_a_tilde_is_the_home_directory(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    text = MINIMAL.replace("runs/x", "~/runs/x").replace('build"}', 'build", init_from: {path: ~/a.pt}}')
    loaded = configs.load(write(text))
    assert loaded.run_dir == "/home/someone/runs/x"
    assert loaded.model.init_from is not None
    assert loaded.model.init_from.path == "/home/someone/a.pt"
