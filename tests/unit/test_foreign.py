"""Other people's checkpoints: what is taken from them, in which words the rest is refused, and that none is run."""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ddpkit
from ddpkit.errors import UserError


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, classes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight


def net(seed: int = 1, **args: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**args)


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(own[name], value.to(own[name].dtype), rtol=0, atol=0)


def refusal(model: nn.Module, path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        ddpkit.load_weights(model, path, **options)
    return str(caught.value)


def as_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_pt(content: Any, path: Path) -> Path:
    torch.save(content, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_old_pth(content: Any, path: Path) -> Path:
    torch.save(content, path.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pth")


@pytest.mark.parametrize("write", [as_pt, as_old_pth, as_safetensors])
def test_a_plain_state_dict_is_taken_whole(write: Callable[..., Path], tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    model = net()
    path = write(theirs, tmp_path / "x")
    found = ddpkit.load_weights(model, path)
    path.unlink()  # nothing of the model lies in the file any more
    assert_same(model, theirs)
    assert (len(found.taken), found.renamed, found.skipped, found.missing) == (len(theirs), {}, {}, ())
    assert str(found) == f"{path}: 9 taken, 0 of them renamed; 0 skipped; 0 missing"


def test_wrappers_names_do_not_count(tmp_path: Path) -> None:
    plain = net(2)
    compiled: Any = torch.compile(plain)
    wrapped: Any
    for wrapped in (
        nn.DataParallel(plain),
        nn.DataParallel(nn.DataParallel(plain)),
        compiled,
        nn.DataParallel(compiled),
        torch.compile(nn.DataParallel(plain)),
    ):
        model: Any = net()
        found = ddpkit.load_weights(model, as_pt(wrapped.state_dict(), tmp_path / "x"))
        assert_same(model, plain.state_dict())
        assert len(found.renamed) == 9
    model = nn.DataParallel(net())  # and the other way round
    for state in (plain.state_dict(), nn.DataParallel(plain).state_dict(), compiled.state_dict()):
        nn.init.zeros_(model.module.head.weight)
        ddpkit.load_weights(model, as_pt(state, tmp_path / "x"))
        assert_same(model.module, plain.state_dict())
    model = net()
    model.body = torch.compile(model.body)  # the model's own parts are wrapped
    ddpkit.load_weights(model, as_pt(plain.state_dict(), tmp_path / "x"))
    assert_same(model.body._orig_mod, plain.body.state_dict())


def test_a_models_own_module_stays_in_its_names(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    theirs, model = Holder(), Holder()
    for state in (theirs.state_dict(), nn.DataParallel(theirs).state_dict()):
        ddpkit.load_weights(model, as_pt(state, tmp_path / "x"))
        assert_same(model, theirs.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "ema.model", "a.b"])
def test_a_state_dict_under_a_key(key: str, tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    content: dict[str, Any] = {"epoch": 3, "optimizer": torch.optim.Adam(net().parameters()).state_dict()}
    content |= {"ema": {"model": theirs}} if key == "ema.model" else {key: theirs}
    path = as_pt(content, tmp_path / "x")
    model = net()
    ddpkit.load_weights(model, path, key=key)
    assert_same(model, theirs)
    assert f"is no state dict (names and tensors); give key: {key}" in refusal(model, path)
    assert "there is no key 'statedict' in it" in refusal(model, path, key="statedict")


def test_a_key_may_be_a_number(tmp_path: Path) -> None:
    model = net()
    ddpkit.load_weights(model, as_pt({3: net(2).state_dict()}, tmp_path / "x"), key="3")
    assert_same(model, net(2).state_dict())


@pytest.mark.parametrize("write", [as_pt, as_safetensors])
def test_weights_in_several_files(write: Callable[..., Path], tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    parts = {
        "one": {n: t for n, t in theirs.items() if "body" in n},
        "two": {n: t for n, t in theirs.items() if "head" in n},
    }
    places = {name: write(part, tmp_path / at).name for at, part in parts.items() for name in part}
    index = tmp_path / "model.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = net()
    ddpkit.load_weights(model, index)
    assert_same(model, theirs)
    assert "give model.index.json in it" in refusal(model, tmp_path)
    (tmp_path / places["head.weight"]).unlink()
    assert "there is no such file" in refusal(model, index)
    index.write_text("[]")
    assert "not a list of weights in several files" in refusal(model, index)


def test_prefixes_and_renames(tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    path = as_pt({f"module.encoder.{name}": value for name, value in theirs.items()}, tmp_path / "x")
    for prefix in ("encoder.", "module.encoder."):
        model = net()
        assert len(ddpkit.load_weights(model, path, strip_prefix=prefix).renamed) == 9
        assert_same(model, theirs)
    renamed = {name.replace("body.0", "stem").replace("head", "fc"): value for name, value in theirs.items()}
    path = as_pt(renamed, tmp_path / "x")
    model = net()
    rename = {r"^stem\.(\w+)$": r"body.0.\1", "^fc": "head"}
    found = ddpkit.load_weights(model, path, rename=rename)
    assert_same(model, theirs)
    assert found.renamed == {
        "body.0.weight": "stem.weight",
        "body.0.bias": "stem.bias",
        "head.weight": "fc.weight",
        "head.bias": "fc.bias",
    }
    assert "  renamed  fc.bias -> head.bias" in str(found)
    assert "both head.weight and head.bias become head.x" in refusal(
        model, as_pt(theirs, tmp_path / "x"), rename={r"head\.\w+": "head.x"}
    )
    assert "no name in it fits the pattern '^nothing'" in refusal(model, path, rename={"^nothing": ""})
    assert "no name in it begins with 'model.'" in refusal(model, path, strip_prefix="model.")
    assert "rename: '(' -> ''" in refusal(model, path, rename={"(": ""})


def test_a_prefix_that_would_help_is_named(tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    path = as_pt({f"model.{name}": value for name, value in theirs.items()}, tmp_path / "x")
    assert refusal(net(), path).endswith("give strip_prefix: model.")
    holder = nn.ModuleDict({"net": net()})
    assert refusal(holder, as_pt(theirs, tmp_path / "x")).endswith("give rename: {'^': 'net.'}")


def test_what_does_not_fit_is_refused_or_left_out(tmp_path: Path) -> None:
    theirs: dict[str, Any] = dict(net(2, classes=9).state_dict())
    del theirs["body.0.bias"]
    path = as_pt({**theirs, "aux.weight": torch.ones(2), "note": "hello"}, tmp_path / "x")
    told = refusal(net(), path)
    for line in (
        "  head.weight: (9, 5) in the file, (4, 5) in the model",
        "  body.0.bias: in the model, not in the file",
        "  aux.weight: in the file, not in the model",
        "strict: false and skip_mismatched: true would go on without what does not fit",
    ):
        assert line in told
    assert "head.bias: in the model, not in the file" not in told  # it has another shape
    assert "aux" not in refusal(net(), path, strict=False)
    assert "(9, 5)" not in refusal(net(), path, skip_mismatched=True)

    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ddpkit.load_weights(model, path, strict=False, skip_mismatched=True)
    own = model.state_dict()
    for name in ("head.weight", "head.bias", "body.0.bias"):
        assert torch.equal(own[name], before[name])
    for name in ("body.0.weight", "body.1.running_mean"):
        assert torch.equal(own[name], theirs[name])
    assert set(found.skipped) == {"head.weight", "head.bias", "aux.weight", "note"}
    assert found.missing == ("body.0.bias", "head.weight", "head.bias")
    assert "  skipped  note: str, no tensor" in str(found)
    assert "  missing  body.0.bias: as the model was built" in str(found)
    # A file of which nothing fits is of another model, whatever was asked for.
    assert "does not fit the model" in refusal(nn.Linear(2, 2), path, strict=False, skip_mismatched=True)


def test_numbers_that_would_lose_a_part_of_theirs_do_not_fit(tmp_path: Path) -> None:
    theirs = net(2).state_dict()
    path = as_pt({**theirs, "head.bias": theirs["head.bias"].to(torch.complex64)}, tmp_path / "x")
    assert "head.bias: torch.complex64 in the file, torch.float32 in the model" in refusal(net(), path)
    assert "head.bias" in ddpkit.load_weights(net(), path, skip_mismatched=True).skipped
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        as_pt({name: value.to(dtype) if value.is_floating_point() else value for name, value in theirs.items()}, path)
        ddpkit.load_weights(net(), path)


def test_tied_weights_need_to_be_there_once(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = Tied().embed.weight.detach().clone()
    for name in ("embed.weight", "out.weight"):
        model = Tied()
        found = ddpkit.load_weights(model, as_safetensors({name: theirs}, tmp_path / "x"))
        assert found.missing == ()
        assert torch.equal(model.embed.weight, theirs)
        with torch.device("meta"):
            model = Tied()
        ddpkit.load_weights(model, as_safetensors({name: theirs}, tmp_path / "x"))
        assert torch.equal(model.embed.weight, theirs)
        assert model.out.weight is model.embed.weight


def test_a_model_on_the_meta_device_gets_the_tensors_in_its_own_types(tmp_path: Path) -> None:
    theirs = net(2).half().state_dict()
    with torch.device("meta"):
        model = Net()
    model.head.weight.requires_grad_(False)
    ddpkit.load_weights(model, as_pt(theirs, tmp_path / "x"))
    assert_same(model, theirs)
    assert model.head.weight.dtype == torch.float32
    assert not model.head.weight.requires_grad


def test_modules_own_conversions_happen(tmp_path: Path) -> None:
    """weight_norm as it was written years ago, and a BatchNorm from before it counted its batches."""
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    state = old.state_dict()
    del state["1.num_batches_tracked"]
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    ddpkit.load_weights(model, as_pt(state, tmp_path / "x"))
    inputs = torch.randn(2, 3)
    torch.testing.assert_close(model[0](inputs), old[0](inputs))


# ---------------------------------------------------------------------- what is not read


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("it-ran"),))


@pytest.mark.parametrize("write", [as_pt, as_old_pth])
def test_nothing_in_a_file_is_run(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = refusal(net(), write({"state_dict": net().state_dict(), "bomb": Bomb()}, tmp_path / "x"))
    assert "runs code out of the file, which ddpkit never does" in told
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("case", ["alone", "among others", "under a key", "values among objects"])
def test_a_whole_pickled_model_is_refused_with_a_way_that_works(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))  # so that whatever is there is gone afterwards
    del sys.modules["mine"]
    theirs = importlib.import_module("mine").Net(3, 2)
    content, key = {
        "alone": (theirs, None),
        "among others": ({"epoch": 3, "model": theirs}, None),
        "under a key": ({"a": {"net": theirs}}, "a.net"),
        "values among objects": ({**theirs.state_dict(), "made_by": theirs}, None),
    }[case]
    told = refusal(nn.Linear(3, 2), as_pt(content, tmp_path / "x"), key=key)
    assert "x.pt holds objects (mine.Net) beside tensors and plain values" in told
    assert told.endswith(f"give {tmp_path / 'x-weights.pt'}{', without a key' if key else ''}.")
    command = told.splitlines()[1].strip()
    assert command.startswith("python -c ")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True, timeout=60)
    model = nn.Linear(3, 2)
    ddpkit.load_weights(model, tmp_path / "x-weights.pt")
    assert_same(model, theirs.state_dict())


def test_files_that_are_something_else(tmp_path: Path) -> None:
    model = net()
    whole = as_pt(net().state_dict(), tmp_path / "whole").read_bytes()
    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), script)
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.pt").write_bytes(b"hello world" * 20)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps(net().state_dict()))
    for folder, mark in {"dcp": ".metadata", "ours": "manifest.json"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / mark).touch()
    (tmp_path / "junk.safetensors").write_bytes(b"hello world" * 20)
    for name, message in {
        "nothere.pt": "there is no such file",
        "nothere.safetensors": "there is no such file",
        "cut.pt": "not a file of torch.save that can be read",
        "junk.pt": "not a file of torch.save that can be read",
        "empty.pt": "not a file of torch.save that can be read",
        "junk.safetensors": "not a safetensors file that can be read",
        "script.pt": "is a TorchScript program",
        "pickled.pt": "torch has not written it, or it is damaged",
        "": "is a directory; give a file in it",
        "dcp": "dcp_to_torch",
        "ours": "ddpkit export RUN_DIR OUT.safetensors",
    }.items():
        told = refusal(model, tmp_path / name)
        assert message in told, (name, told)
        assert "Traceback" not in told
    assert "the file holds one Tensor" in refusal(model, as_pt(torch.ones(3), tmp_path / "x"))
    assert "the file holds epoch (int)" in refusal(model, as_pt({"epoch": 3}, tmp_path / "x"))
    assert "is one state dict; leave key='a' out" in refusal(model, tmp_path / "x.safetensors", key="a")
    namespace = as_pt({"model": net().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "x")
    assert "argparse.Namespace" in refusal(model, namespace)
