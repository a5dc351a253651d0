from __future__ import annotations

import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler

from ddpkit.checkpoint.writer import read_tensors, write_tensors
from ddpkit.errors import BrokenCheckpoint, StateError
from ddpkit.state import pack, rng_state, set_rng_state, tensor_names, unpack

DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits"))
    },
    key=str,
)


def through_files(tree: Any, directory: Path) -> Any:
    skeleton, tensors = pack(tree)
    path = directory / "t.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, tensors)
    assert set(tensor_names(skeleton)) == set(tensors)
    return unpack(json.loads(json.dumps(skeleton, allow_nan=False)), read_tensors(path))


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit, and of the same types throughout."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        plain = expected.detach().resolve_conj().resolve_neg().contiguous()
        assert torch.equal(found.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8))
        return
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        assert found.flags.writeable
    elif isinstance(expected, np.generic):
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert_same(list(found), list(expected))
        assert_same(list(found.values()), list(expected.values()))
        assert_same(getattr(found, "_metadata", None), getattr(expected, "_metadata", None))
    elif isinstance(expected, (list, tuple, deque)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, complex):
        assert_same([found.real, found.imag], [expected.real, expected.imag])
    elif isinstance(expected, float):
        assert (math.isnan(expected) and math.isnan(found)) or struct.pack("d", found) == struct.pack("d", expected)
    else:
        assert found == expected


PLAIN: list[Any] = [
    None,
    True,
    0,
    -(2**63),
    2**20000,
    -0.0,
    0.1,
    1e-320,
    1.7976931348623157e308,
    math.nan,
    math.inf,
    -math.inf,
    complex(-0.0, math.nan),
    "",
    "é\n\x00\u2028😀",
    "lone \ud83d\ude00 surrogates",
    b"",
    bytes(range(256)),
    [],
    (),
    {},
    (1, (2, [3, ()])),
    {"!": "tensor", "name": "not one"},
    {"!": 1},
    {1: "int", "1": "str", 2.5: "float", None: "none", (1, ("a", 2.0)): "tuple", math.inf: "inf"},
    {True: 1, "b": {"a": 1, "": 2}},
    {"z": 1, "a": 2},
    OrderedDict([("z", 1), (3, 2)]),
    Counter({5: 2, 3: 1, 7: 0, "x": -1}),
    defaultdict(list, {"a": [1]}),
    defaultdict(None, {1: 2}),
    deque([1, [2]], maxlen=3),
    deque(),
    {1, "a", (2, 3), None, frozenset({4})},
    frozenset(),
    torch.Size([2, 0, 3]),
    torch.bfloat16,
    torch.device("cuda:1"),
    torch.device("cpu"),
    np.float64(0.1),
    np.float32("nan"),
    np.int8(-3),
    np.bool_(True),
    np.complex64(1 - 2j),
    np.str_("né"),
    np.bytes_(b"a\x00b"),
    np.datetime64("2024-01-02T03:04:05", "ns"),
    np.arange(6, dtype=">f4").reshape(2, 3),
    np.array(3, dtype=">i8"),
    np.zeros((0, 3), dtype="<u2"),
    np.arange(12).reshape(3, 4).T,
    np.arange(12)[::-3],
    np.array(["a", "bcd"]),
    np.array([True, False]),
    np.array([(1.5, [1, 2])], dtype=[("a", ">f8"), ("b", "<i2", (2,))]),
    np.array(["2024-01-02"], dtype="datetime64[D]"),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{type(value).__name__}")
def test_every_plain_value_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    assert_same(through_files(value, tmp_path), value)
    assert_same(through_files({"a": [value]}, tmp_path), {"a": [value]})


def test_a_deque_keeps_its_bound_and_a_defaultdict_its_factory(tmp_path: Path) -> None:
    found = through_files([deque([1], 3), defaultdict(int)], tmp_path)
    assert found[0].maxlen == 3
    assert found[1]["new"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    assert_same(through_files({"x": tensor}, tmp_path), {"x": tensor})


def test_tensors_of_every_layout_in_memory(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": torch.ones(1).expand(3, 3),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "every_other": torch.rand(6, dtype=torch.complex64)[::2],
        "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "parameter": nn.Parameter(torch.rand(2)),
    }
    assert_same(through_files(tree, tmp_path), tree)


def test_names_are_readable_and_never_collide() -> None:
    one = torch.ones(1)
    tree = {
        "optimizer": {"state": {0: {"exp_avg": one}}},
        "a.b": one * 2,
        "a": {"b": one * 3},
        "__metadata__": one * 4,
        "\ud800": one * 5,
    }
    skeleton, tensors = pack(tree)
    assert list(tensors) == ["optimizer.state.0.exp_avg", "a.b", "a.b#2", "__metadata__#2", "?"]
    assert_same(unpack(skeleton, tensors), tree)
    assert list(pack(one)[1]) == ["value"]


def test_tied_tensors_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.rand(3, 3))
    wide = torch.rand(2, dtype=torch.complex128)
    tree = {"a": weight, "b": weight, "c": weight.detach(), "t": weight.T, "w": [wide, wide]}
    assert list(pack(tree)[1]) == ["a", "t", "w.0"]
    found = through_files(tree, tmp_path)
    assert found["a"] is found["b"] and found["a"] is found["c"] and found["w"][0] is found["w"][1]
    assert found["t"] is not found["a"]
    found["a"].zero_()
    assert found["t"].abs().sum() > 0  # another view is a tensor of its own


def test_different_empty_tensors_are_not_tied() -> None:
    skeleton, tensors = pack([torch.empty(0), torch.empty(0)])
    found = unpack(skeleton, tensors)
    assert found[0] is not found[1]


def test_packing_does_not_copy_what_can_be_streamed() -> None:
    tensor = torch.rand(4, 4)
    assert pack({"x": tensor})[1]["x"].data_ptr() == tensor.data_ptr()


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")
itself: list[Any] = []
itself.append({"again": itself})
deep: list[Any] = []
for _ in range(5000):
    deep = [deep]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (object(), "builtins.object"),
        (lambda: 0, "function"),
        (Color.RED, "Color"),
        (Point(1, 2), "Point"),
        (UserDict(), "UserDict"),
        (itself, "contains itself"),
        (deep, "deeper than"),
        ({b"key": 1}, "a key of type bytes"),
        ({(1, object()): 1}, "a key of type object"),
        ({np.int64(1): 1}, "a key of type int64"),
        (defaultdict(lambda: 0), "default factory"),
        (np.array([object()]), "Python objects"),
        (np.array([(object(), 1)], dtype=[("o", "O"), ("i", "i4")]), "Python objects"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta device"),
        (nn.UninitializedParameter(), "UninitializedParameter"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_saved_is_named_with_its_path(value: Any, complaint: str) -> None:
    with pytest.raises(StateError, match=complaint) as error:
        pack({"outer": [0, {"inner": value}]})
    assert "outer.1.inner" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_nested_tensors_are_refused() -> None:
    for tensor in (
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ):
        with pytest.raises(StateError, match=r"'x'.*cannot be saved"):
            pack({"x": tensor})


def test_one_value_in_two_places_is_no_cycle(tmp_path: Path) -> None:
    shared = [1]
    assert_same(through_files([shared, {"a": shared}], tmp_path), [[1], {"a": [1]}])


@pytest.mark.parametrize(
    "skeleton",
    [
        {"!": "nonsense"},
        {"!": ["list"]},
        {"!": "tensor"},
        {"!": "tensor", "name": "missing"},
        {"!": "tensor", "name": "x", "dtype": "load"},
        {"!": "tensor", "name": "x", "dtype": "complex128", "shape": [3]},
        {"!": "tensor", "name": "x", "dtype": "float32", "shape": [10**12]},
        {"!": "ndarray", "name": "x", "dtype": "|O", "shape": [1]},
        {"!": "ndarray", "name": "x", "dtype": "<f8", "shape": [10**12]},
        {"!": "ndarray", "name": "x", "dtype": "<f8", "shape": [-1]},
        {"!": "numpy", "dtype": "|O", "base64": "AAAAAAAAAAA="},
        {"!": "bytes", "base64": "*"},
        {"!": "set", "items": [[]]},
        {"!": "dict", "items": [[1]]},
        {"!": "defaultdict", "factory": "eval", "items": []},
        {"!": "torch.dtype", "name": "nn"},
        {"!": "torch.device", "name": "nowhere"},
        {"!": "tuple", "items": 3},
    ],
    ids=str,
)
def test_a_skeleton_that_pack_cannot_have_made_is_a_broken_checkpoint(skeleton: Any) -> None:
    with pytest.raises(BrokenCheckpoint):
        unpack({"a": skeleton}, {"x": torch.zeros(8, dtype=torch.uint8)})


keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
trees = st.recursive(
    keys | st.binary() | st.complex_numbers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back(tree: Any) -> None:
    skeleton, tensors = pack(tree)
    assert_same(unpack(json.loads(json.dumps(skeleton, allow_nan=False)), tensors), tree)


def trained(optimizer: optim.Optimizer, model: nn.Module, scheduler: Any = None) -> None:
    for _ in range(3):

        def closure() -> Any:
            optimizer.zero_grad()
            loss = model(torch.ones(4, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adam": lambda params: optim.Adam(params, amsgrad=True),
    "adamw_tensor_lr": lambda params: optim.AdamW(params, lr=torch.tensor(0.01)),
    "sgd": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "plain_sgd": lambda params: optim.SGD(params, lr=0.1),
    "lbfgs": lambda params: optim.LBFGS(params, max_iter=3),
    "rmsprop": lambda params: optim.RMSprop(params, momentum=0.5, centered=True),
    "groups": lambda params: optim.Adam([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_come_back(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    trained(optimizer, model)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    found = through_files(state, tmp_path)
    assert_same(found, state)

    again = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    again.load_state_dict(found["model"])
    resumed = OPTIMIZERS[name](list(again.parameters()))
    resumed.load_state_dict(found["optimizer"])
    trained(optimizer, model)
    trained(resumed, again)
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), optimizer.state_dict())


class Warmup:
    def __init__(self) -> None:
        self.steps = 5

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.steps)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, T_max=9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step]),
    "callable": lambda o: lr_scheduler.LambdaLR(o, [Warmup()]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedulers_come_back(name: str, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, SCHEDULERS[name](optimizer)

    model, optimizer, scheduler = made()
    trained(optimizer, model, scheduler)
    state = [scheduler.state_dict(), optimizer.state_dict()]
    found = through_files(state, tmp_path)
    assert_same(found, state)
    again, resumed, continued = made()
    again.load_state_dict(model.state_dict())
    continued.load_state_dict(found[0])
    resumed.load_state_dict(found[1])
    trained(optimizer, model, scheduler)
    trained(resumed, again, continued)
    assert_same(continued.state_dict(), scheduler.state_dict())
    assert_same(again.state_dict(), model.state_dict())


def test_a_grad_scaler_comes_back(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    assert_same(through_files(scaler.state_dict(), tmp_path), scaler.state_dict())


def test_a_modules_state_keeps_the_versions_of_its_parts(tmp_path: Path) -> None:
    state: Any = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    found = through_files(state, tmp_path)
    assert found._metadata == state._metadata
    assert found._metadata["0"]["version"] == 2


def drawn() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    before = rng_state(cpu)
    try:
        random.gauss(0, 1)  # leaves a second value behind, which is state too
        np.random.randn()
        state = rng_state(cpu)
        expected = drawn()
        set_rng_state(through_files(state, tmp_path), cpu)
        assert drawn() == expected
        assert drawn() != expected
    finally:
        set_rng_state(before, cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generators_go_on_where_they_were_on_a_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    state = rng_state(device)
    expected = torch.rand(5, device=device)
    set_rng_state(through_files(state, tmp_path), device)
    assert torch.equal(torch.rand(5, device=device), expected)
    tree = {"parameter": expected, "double": expected.to(torch.complex128).T}
    assert_same(through_files(tree, tmp_path), {name: tensor.cpu() for name, tensor in tree.items()})
