from __future__ import annotations

import functools
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpkit import config as configs
from ddpkit import factories
from ddpkit.config import Config, Factory
from ddpkit.errors import ConfigError
from ddpkit.factories import Reference

SOURCES = {
    "mine/__init__.py": "",
    "mine/models.py": """
        raise RuntimeError("imported")

        def build(width=1): ...
        class Net:
            def method(self): ...
    """,
    "mine/deep/er/steps.py": "def step(model, batch): ...",
    "mine/broken.py": "def build(:\n    pass\n",
    "mine/nul.py": "x = '\0'\n",
    "mine/bindings.py": """
        import os, a.b
        from c import d as e, f
        plain = first, (second, *third) = 1, (2, 3)
        annotated: int = 1
        counted += 1
        if (walrus := 1):
            inside_if = 1
        else:
            inside_else = 1
        try:
            inside_try = 1
        except E as error:
            inside_except = 1
        finally:
            inside_finally = 1
        with x as inside_with, y as (tuple_of_with, _):
            pass
        for loop in y:
            inside_for = 1
        while 1:
            inside_while = 1
        match x:
            case {"k": matched, **rest}: ...
            case [head, *tail]: ...
            case C() as captured: ...
        async def coroutine(): ...
        def function(parameter):
            global made_global
            local = 1
        class Class:
            attribute = 1
    """,
    "mine/star.py": "from somewhere import *\n",
    "mine/lazy.py": "def __getattr__(name): ...\n",
    "mine/tricks.py": "globals().update(x=1)\n",
    "mine/executed.py": "exec('x = 1')\n",
    "mine/swapped.py": "import sys\nsys.modules['mine.swapped.inner'] = sys\n",
    "mine/latin.py": "# -*- coding: latin-1 -*-\ndef caf\xe9(): ...\n",
    "alone.py": "def fn(): ...\n",
    "folder/script.py": "def main(): ...\n",
}

CONFIG: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"factory": "alone:fn"},
    "data": {"train": {"factory": "alone:fn"}, "global_batch_size": 8},
    "optimizer": {"factory": "alone:fn"},
    "train": {"step": "alone:fn", "epochs": 1},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with the sources above; what is imported from it is forgotten afterwards."""
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="latin-1" if "latin" in name else "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def config_with(ref: str) -> Config:
    return configs.from_tree({**CONFIG, "model": {"factory": ref}})


def check(ref: str) -> list[str]:
    return factories.check(config_with(ref), sys.path)


# ---------------------------------------------------------------------- parse


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("a.b:c", Reference("a.b", "c", False)),
        ("a:C.method", Reference("a", "C.method", False)),
        ("x.py:f", Reference("x.py", "f", True)),
        ("/abs/a-b c/x.py:f", Reference("/abs/a-b c/x.py", "f", True)),
        ("./odd:name/x.py:f.g", Reference("./odd:name/x.py", "f.g", True)),
    ],
)
def test_parse(ref: str, expected: Reference) -> None:
    assert factories.parse(ref) == expected
    assert str(expected) == ref


@pytest.mark.parametrize(
    "ref",
    [
        "",
        ":",
        "a",
        "a:",
        ":a",
        "a.b.c",
        "a:b:c",
        "a..b:c",
        ".a:b",
        "a:b.",
        "a:b-c",
        "a b:c",
        "class:f",
        "a:def",
        "x/y:f",
        "x.py",
        "x\0/y.py:f",
        "a:1",
        "a :b",
    ],
)
def test_a_malformed_reference_is_answered_with_an_example(ref: str) -> None:
    with pytest.raises(ConfigError, match=r"is no reference; .*'.*:.*'"):
        factories.parse(ref)


# ---------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "ref",
    [
        "mine.models:build",
        "mine.models:Net.method",
        "mine.deep.er.steps:step",
        "alone:fn",
        "folder/script.py:main",
        "mine:models",
        "mine.deep:er",
        "mine.star:any",
        "mine.lazy:any",
        "mine.tricks:any",
        "mine.executed:any",
        "mine.swapped.inner:any",
        "mine.latin:café",
        "sys:exit",
        "math:nothing_here",
        "os.path:join",
        "zipimport:any",
        "torch.optim:SGD",
        "torch.optim.lr_scheduler:CosineAnnealingLR",
        "numpy:asarray",
        "ddpkit.config:Config",
    ],
)
def test_what_is_there_or_cannot_be_decided_passes(folder: Path, ref: str) -> None:
    before = set(sys.modules)
    assert check(ref) == []
    assert not [
        name for name in set(sys.modules) - before if name.partition(".")[0] in ("mine", "alone", "torch", "folder")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "os",
        "a",
        "e",
        "f",
        "plain",
        "first",
        "second",
        "third",
        "annotated",
        "counted",
        "walrus",
        "inside_if",
        "inside_else",
        "inside_try",
        "inside_except",
        "inside_finally",
        "inside_with",
        "tuple_of_with",
        "loop",
        "inside_for",
        "inside_while",
        "matched",
        "rest",
        "head",
        "tail",
        "captured",
        "coroutine",
        "function",
        "made_global",
        "Class",
        "Class.attribute",
    ],
)
def test_every_way_to_bind_a_name_counts(folder: Path, name: str) -> None:
    assert check(f"mine.bindings:{name}") == []


@pytest.mark.parametrize("name", ["b", "d", "local", "parameter", "attribute", "nothing"])
def test_names_that_are_not_at_module_level_do_not_count(folder: Path, name: str) -> None:
    assert f"no {name!r} in " in check(f"mine.bindings:{name}")[0]


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        (
            "mine.models:biuld",
            ["model.factory: 'mine.models:biuld': no 'biuld' in ", "models.py; did you mean 'build'?"],
        ),
        ("mine.modles:build", ["no module 'modles' in the package mine (", "did you mean 'models'?"]),
        (
            "mien.models:build",
            ["no module 'mien' in ", "more folders of the import path; did you mean 'mine'?"],
        ),
        ("mine.deep.err.steps:step", ["no module 'err' in the package mine.deep (", "did you mean 'er'?"]),
        ("mine.models.inner:x", ["mine.models is a module (", "not a package"]),
        ("mine.deep:err", ["no 'err' in ", "did you mean 'er'?"]),
        (
            "folder/scirpt.py:main",
            ["there is no file folder/scirpt.py (looked from ", "did you mean 'script'?"],
        ),
        (f"{'long' * 80}.py:main", ["there is no file longlong"]),
        ("folder/script.py:mian", ["no 'mian' in folder/script.py; did you mean 'main'?"]),
        ("mine.broken:build", ["broken.py:1: "]),
        ("mine.nul:build", ["nul.py", "null bytes"]),
        ("torch.optim:SDG", ["no 'SDG' in ", "did you mean 'SGD'?"]),
    ],
)
def test_what_is_missing_is_told_with_the_nearest_name(folder: Path, ref: str, told: list[str]) -> None:
    (line,) = check(ref)
    assert all(part in line for part in told), line


def test_the_search_path_is_the_one_that_is_given(folder: Path) -> None:
    config = config_with("mine.models:build")
    (line,) = [line for line in factories.check(config, ["/nowhere"]) if line.startswith("model")]
    assert line == "model.factory: 'mine.models:build': no module 'mine' in /nowhere"


def test_check_covers_every_reference_of_a_config(folder: Path) -> None:
    nested = {
        "factory": "n.e:st",
        "args": {"ref_in_list": [{"ref": "n.e:ref"}], "deep": {"er": {"factory": "n.e:er"}}},
    }
    tree = {
        **CONFIG,
        "model": {"factory": "n.e:model", "args": {"nested": nested}},
        "data": {
            "train": {"factory": "n.e:train"},
            "eval": {"factory": "n.e:eval"},
            "global_batch_size": 8,
            "sampler": {"factory": "n.e:sampler"},
            "loader": {"collate_fn": "n.e:collate", "worker_init_fn": "n.e:init"},
        },
        "optimizer": {"factory": "n.e:optimizer"},
        "scheduler": {"factory": "n.e:scheduler"},
        "train": {
            "step": "n.e:step",
            "eval_step": "n.e:eval_step",
            "epochs": 1,
            "callbacks": ["n.e:callback"],
        },
        "trackers": [{"factory": "n.e:tracker"}],
    }
    keys = [line.partition(":")[0] for line in factories.check(configs.from_tree(tree), sys.path)]
    assert sorted(keys) == [
        "data.eval.factory",
        "data.loader.collate_fn",
        "data.loader.worker_init_fn",
        "data.sampler.factory",
        "data.train.factory",
        "model.args.nested.args.deep.er.factory",
        "model.args.nested.args.ref_in_list.0.ref",
        "model.args.nested.factory",
        "model.factory",
        "optimizer.factory",
        "scheduler.factory",
        "trackers.0.factory",
        "train.callbacks.0",
        "train.eval_step",
        "train.step",
    ]


# ---------------------------------------------------------------------- resolve


def test_resolve_imports_and_follows_dots(folder: Path) -> None:
    import collections

    assert factories.resolve("collections:OrderedDict.fromkeys", "k") == collections.OrderedDict.fromkeys
    step: Any = factories.resolve("mine.deep:er.steps.step", "k")  # submodules that nothing has imported yet
    assert step.__module__ == "mine.deep.er.steps"


def test_a_file_is_loaded_once_and_its_functions_can_be_pickled(folder: Path) -> None:
    path = folder / "one two.py"
    path.write_text("count = []\ndef add(): return len(count)\nclass Thing: pass\n")
    add: Any = factories.resolve("one two.py:add", "k")
    count: Any = factories.resolve(f"{path}:count", "k")
    count.append(1)
    assert add() == 1
    assert pickle.loads(pickle.dumps(add)) is add
    other = folder / "folder" / "one two.py"
    other.write_text("def add(): return 'other'\n")
    assert factories.resolve("folder/one two.py:add", "k") is not add


def test_a_file_that_fails_is_not_left_half_loaded(folder: Path) -> None:
    (folder / "late.py").write_text("x = 1\nraise KeyError('mine')\n")
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            factories.resolve("late.py:x", "k")


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        ("nowhere.at.all:x", "k: 'nowhere.at.all:x': No module named 'nowhere'"),
        ("mine.nowhere:x", "k: 'mine.nowhere:x': No module named 'mine.nowhere'"),
        ("alone.inner:x", "'alone' is not a package"),
        ("nowhere.py:x", "k: 'nowhere.py:x': there is no file "),
        ("alone:fnn", "did you mean 'fn'?"),
        ("mine:nothing", "k: 'mine:nothing': no 'nothing' in "),
        ("collections:OrderedDict.fromkey", "no 'fromkey' in OrderedDict; did you mean 'fromkeys'?"),
    ],
)
def test_what_resolve_does_not_find_is_a_config_error(folder: Path, ref: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        factories.resolve(ref, "k")
    assert told in str(caught.value)


def test_an_error_inside_the_users_module_is_raised_as_it_is(folder: Path) -> None:
    (folder / "needs.py").write_text("import not_installed.at_all\n")
    (folder / "wants.py").write_text("from alone import nothing\n")
    with pytest.raises(RuntimeError, match="imported"):
        factories.resolve("mine.models:build", "k")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        factories.resolve("needs:x", "k")
    with pytest.raises(ImportError, match="nothing"):
        factories.resolve("wants:x", "k")


# ---------------------------------------------------------------------- build and expect


def record(*args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, kwargs


def strict(params: object, lr: float, *, momentum: float = 0.0) -> tuple[object, float, float]:
    return params, lr, momentum


def failing() -> None:
    raise TypeError("the user's own")


THIS = "test_factories"


@pytest.fixture
def this_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setitem(sys.modules, THIS, sys.modules[__name__])
    return lambda name: f"{THIS}:{name}"


def test_build_calls_with_positional_and_built_arguments(this_module: Callable[[str], str]) -> None:
    nested = {"factory": this_module("strict"), "args": {"params": {"ref": "math:pi"}, "lr": 1}}
    args: Any = {
        "a": [nested, 2],
        "b": {"c": {"ref": "math:floor"}, "ref": "kept"},
        "d": None,
        "e": {"ref": "kept", "x": 1},
    }
    spec = Factory(factory=this_module("record"), args=args)
    import math

    built = factories.build(spec, "first", key="model")
    expected = {
        "a": [(math.pi, 1, 0.0), 2],
        "b": {"c": math.floor, "ref": "kept"},
        "d": None,
        "e": {"ref": "kept", "x": 1},
    }
    assert built == (("first",), expected)
    assert factories.build({"factory": this_module("record")}, key="model") == ((), {})


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            {"lr": 1, "momentun": 0.9},
            "optimizer.args.momentun: {ref} has no such parameter; did you mean 'momentum'? (the "
            "signature is strict(params",
        ),
        (
            {},
            "optimizer.args: {ref}: missing a required argument: 'lr' "
            "(the signature is strict(params, lr, *, momentum=0.0))",
        ),
        ({"params": 1, "lr": 1}, "optimizer.args: {ref}: multiple values for argument 'params'"),
        (
            {"lr": {"factory": "test_factories:strict", "args": {}}},
            "optimizer.args.lr.args: test_factories:strict: missing a required argument: 'params'",
        ),
        ({"lr": {"factory": "math:nothing"}}, "optimizer.args.lr.factory: 'math:nothing': no 'nothing' in "),
        (
            {"lr": {"factory": "math:pi"}},
            "optimizer.args.lr.factory: math:pi is a float, which cannot be called",
        ),
    ],
)
def test_arguments_that_do_not_fit(this_module: Callable[[str], str], args: Any, told: str) -> None:
    spec = Factory(factory=this_module("strict"), args=args)
    with pytest.raises(ConfigError) as caught:
        factories.build(spec, "params", key="optimizer")
    assert told.format(ref=this_module("strict")) in str(caught.value)


def test_what_the_factory_raises_is_raised_as_it_is(this_module: Callable[[str], str]) -> None:
    with pytest.raises(TypeError, match="the user's own"):
        factories.build(Factory(factory=this_module("failing")), key="model")


def test_a_callable_without_a_signature_is_called(
    monkeypatch: pytest.MonkeyPatch, this_module: Callable[[str], str]
) -> None:
    assert factories.build(Factory(factory="builtins:dict", args={"a": 1}), key="model") == {"a": 1}
    monkeypatch.setattr(sys.modules[THIS], "partial", functools.partial(strict, lr=2), raising=False)
    assert factories.build(Factory(factory=this_module("partial")), "p", key="model") == ("p", 2, 0.0)


def test_expect() -> None:
    assert factories.expect(3, int, "k", "an int") == 3
    with pytest.raises(ConfigError) as caught:
        factories.expect({}, int, "model.factory", "an nn.Module", ref="pkg:fn")
    assert str(caught.value) == "model.factory: pkg:fn returned a dict; an nn.Module is needed"
    with pytest.raises(ConfigError, match=r"^k: got nothing \(None\); an int is needed$"):
        factories.expect(None, int, "k", "an int")


@pytest.mark.parametrize("lr", ["fast", -1.0])
def test_a_value_that_torch_refuses_is_the_users_input(lr: str | float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"^optimizer: torch.optim:SGD does not take these arguments: .*"):
        factories.build({"factory": "torch.optim:SGD", "args": {"lr": lr}}, [parameter], key="optimizer")
