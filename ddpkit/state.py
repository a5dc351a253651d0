"""What a checkpoint can hold: a tree of plain values and tensors, as JSON and named tensors. No pickle.

In the JSON, plain values stand for themselves; all else is an object whose key ``"!"`` names its kind.
"""

from __future__ import annotations

import base64
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpkit.checkpoint.manifest import Json
from ddpkit.checkpoint.shards import Layout, Sharded, ShardFiles, is_spread, layout_of, own_part
from ddpkit.checkpoint.writer import STORED_DTYPES
from ddpkit.errors import BrokenCheckpoint, StateError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_KIND = "!"
_DEEPEST = 100  # levels; real states have fewer than ten, and JSON itself ends at about a thousand
_WIDEST_INT = 256  # bits written as decimal digits; json refuses to read more than 4300 digits
_FACTORIES = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
_ADVICE = "a state may hold None, numbers, strings, bytes, lists, tuples, dicts, sets, tensors, NumPy arrays"

Path = tuple[str, ...]


def pack(tree: Any) -> tuple[Json, dict[str, Tensor]]:
    """Split a state into a JSON skeleton and its tensors, named by path (``"optimizer.state.0.exp_avg"``).

    Exactly these types, not subclasses of them: None, bool, int, float, complex, str, bytes; list, tuple,
    dict (keys: None, bool, int, float, str, tuples of those; the order is kept), OrderedDict (with
    ``_metadata``, as modules give it), Counter, deque, set, frozenset, defaultdict (its factory is None or
    one of bool, dict, float, int, list, set, str, tuple, kept by name); torch.Size, torch.dtype,
    torch.device; NumPy scalars and arrays without object dtype (arrays come back in C order); dense tensors
    of any dtype, shape and strides.

    A Parameter comes back as a plain tensor. Of a DTensor, this rank's part stands among the tensors; it comes back
    as a `Sharded`, out of which any part can be read. Tensors that are the same view of the same memory are stored
    once and come back as one object; other sharing (overlapping views, one list twice) is not kept. Tensors
    are not copied where that can be avoided: write them before the state goes on changing.
    Raises StateError, naming the path, for anything else and for a structure that contains itself.
    """
    packer = _Packer()
    return packer.pack(tree, ()), packer.tensors


def unpack(skeleton: Json, tensors: Mapping[str, Tensor], shards: ShardFiles | None = None) -> Any:
    """The tree that `pack` took apart; its tensors are those of ``tensors`` (on the CPU after a read).

    ``shards`` has the parts of those that were spread over ranks; without it there must be none.
    Raises BrokenCheckpoint for a skeleton that `pack` cannot have made, or a tensor that is not there.
    """
    try:
        return _Unpacker(tensors, shards).unpack(skeleton)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # RecursionError is a RuntimeError, binascii.Error a ValueError.
        raise BrokenCheckpoint(f"the state does not fit together: {type(error).__name__}: {error}") from error


def tensor_names(skeleton: Json) -> Iterator[str]:
    """The names of the tensors that `unpack` will ask for, in the order of the tree (tied ones repeat)."""
    return (packed["name"] for packed in _tensors_in(skeleton) if packed[_KIND] != "sharded")


def layouts(skeleton: Json) -> dict[str, tuple[Layout, torch.dtype]]:
    """How the tensors lie over the ranks of which each rank has packed its part, and their types, by name."""
    found = [packed for packed in _tensors_in(skeleton) if packed[_KIND] == "sharded"]
    return {packed["name"]: (_layout(packed), _dtype(packed["dtype"])) for packed in found}


def _tensors_in(skeleton: Json) -> Iterator[dict[str, Json]]:
    if isinstance(skeleton, list):
        for item in skeleton:
            yield from _tensors_in(item)
    elif isinstance(skeleton, dict):
        if skeleton.get(_KIND) in ("tensor", "ndarray", "sharded"):
            yield skeleton
        else:
            for item in skeleton.values():
                yield from _tensors_in(item)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and (on a GPU) CUDA's global generators: a tree for `pack`."""
    version, words, gauss = random.getstate()
    state = {
        "python": [
            version,
            np.array(words, dtype=np.uint64),
            gauss,
        ],  # an array: 625 numbers would swell the JSON
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(tree: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to what `rng_state` gave; CUDA's only if saved, and ``device`` is a GPU."""
    version, words, gauss = tree["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state(tree["numpy"])
    torch.set_rng_state(tree["torch"])
    if device.type == "cuda" and "cuda" in tree:
        torch.cuda.set_rng_state(tree["cuda"], device)


class _Packer:
    """One call of `pack`: the tensors found so far, and where the walk stands."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._tied: dict[tuple[object, ...], Json] = {}
        self._kept: list[Tensor] = []  # keys of _tied hold addresses: nothing may be freed and reused meanwhile
        self._open: set[int] = set()  # the containers around the present value

    def pack(self, value: Any, path: Path) -> Json:
        if isinstance(value, Tensor):
            return self._spread(value, path) if is_spread(value) else self._tensor(value, path)
        if type(value) is np.ndarray:
            return self._array(value, path)
        pack_container = _CONTAINERS.get(type(value))
        if pack_container is None:
            return _pack_leaf(value, path)
        if id(value) in self._open:
            raise StateError(f"{_at(path)}: a {type(value).__name__} contains itself and cannot be saved")
        if len(path) > _DEEPEST:
            raise StateError(f"{_at(path)}: nested deeper than {_DEEPEST} levels; give a flatter state")
        self._open.add(id(value))
        packed = pack_container(self, value, path)
        self._open.remove(id(value))
        return packed

    def items(self, values: Any, path: Path) -> list[Json]:
        return [self.pack(value, (*path, str(index))) for index, value in enumerate(values)]

    def pairs(self, mapping: Any, path: Path) -> list[Json]:
        return [[_pack_key(key, path), self.pack(value, (*path, str(key)))] for key, value in mapping.items()]

    def mapping(self, mapping: dict[Any, Any], path: Path) -> Json:
        if all(type(key) is str and key != _KIND and _pack_text(key) is key for key in mapping):
            return {key: self.pack(value, (*path, key)) for key, value in mapping.items()}
        return {_KIND: "dict", "items": self.pairs(mapping, path)}

    def ordered(self, mapping: OrderedDict[Any, Any], path: Path) -> Json:
        packed = {_KIND: "OrderedDict", "items": self.pairs(mapping, path)}
        # Module.state_dict() hangs the versions of its modules here; load_state_dict reads them.
        if hasattr(mapping, "_metadata"):
            packed["metadata"] = self.pack(mapping._metadata, (*path, "_metadata"))
        return packed

    def defaulting(self, mapping: defaultdict[Any, Any], path: Path) -> Json:
        factory = mapping.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise StateError(
                f"{_at(path)}: the default factory {factory!r} cannot be saved; "
                f"it may be None or one of {', '.join(_FACTORIES)}; or return a plain dict"
            )
        return {_KIND: "defaultdict", "factory": name, "items": self.pairs(mapping, path)}

    def unordered(self, values: Any, path: Path) -> Json:
        # A set's own order depends on string hashing, which differs between processes; the file must not.
        return {_KIND: type(values).__name__, "items": sorted(self.items(values, path), key=json.dumps)}

    def _tensor(self, tensor: Tensor, path: Path) -> Json:
        _refuse_unusual(tensor, path)
        tensor = tensor.detach()
        key = _view_of(tensor)
        if key not in self._tied:
            self._kept.append(tensor)
            plain = tensor.resolve_conj().resolve_neg()
            if plain.dtype in STORED_DTYPES:
                self._tied[key] = {_KIND: "tensor", "name": self._add(plain, path)}
            else:
                name = self._add(plain.contiguous().reshape(-1).view(torch.uint8), path)
                dtype = str(plain.dtype).removeprefix("torch.")
                self._tied[key] = {_KIND: "tensor", "name": name, "dtype": dtype, "shape": list(plain.shape)}
        return self._tied[key]

    def _spread(self, tensor: DTensor, path: Path) -> Json:
        """A DTensor: its layout, the same on all ranks, and this rank's part of it."""
        try:
            layout = layout_of(tensor)
        except StateError as error:
            raise StateError(f"{_at(path)}: {error}") from None
        local = tensor.to_local().detach()
        if all(split is None for split in layout.splits):
            return self._tensor(local, path)  # each rank has all of it
        # A part may be empty on one rank and not on another, and what is tied must be so on all.
        key = ("spread", local.untyped_storage()._cdata, *_view_of(local)[1:], layout)
        if key not in self._tied:
            self._kept.append(local)
            self._tied[key] = {
                _KIND: "sharded",
                "name": self._add(own_part(tensor), path),
                "dtype": str(local.dtype).removeprefix("torch."),
                "shape": list(layout.shape),
                "mesh": list(layout.mesh),
                "splits": list(layout.splits),
            }
        return self._tied[key]

    def _array(self, array: np.ndarray[Any, Any], path: Path) -> Json:
        _refuse_objects(array.dtype, path)
        content = np.ascontiguousarray(array).reshape(-1)
        if not content.flags.writeable:  # torch warns about memory that it might write to
            content = content.copy()
        raw = content.view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
        descr = _pack_descr(np.lib.format.dtype_to_descr(array.dtype))
        name = self._add(torch.from_numpy(raw), path)
        return {_KIND: "ndarray", "name": name, "dtype": descr, "shape": list(array.shape)}

    def _add(self, tensor: Tensor, path: Path) -> str:
        readable = ".".join(path).encode("utf-8", "replace").decode() or "value"
        name = readable
        count = 1
        while name in self.tensors or name == "__metadata__":  # the one name that safetensors keeps for itself
            count += 1
            name = f"{readable}#{count}"
        self.tensors[name] = tensor
        return name


_CONTAINERS: dict[type, Callable[[_Packer, Any, Path], Json]] = {
    list: _Packer.items,
    tuple: lambda packer, value, path: {_KIND: "tuple", "items": packer.items(value, path)},
    dict: _Packer.mapping,
    OrderedDict: _Packer.ordered,
    Counter: lambda packer, value, path: {_KIND: "Counter", "items": packer.pairs(value, path)},
    defaultdict: _Packer.defaulting,
    deque: lambda packer, value, path: {
        _KIND: "deque",
        "maxlen": value.maxlen,
        "items": packer.items(value, path),
    },
    set: _Packer.unordered,
    frozenset: _Packer.unordered,
}


def _pack_leaf(value: Any, path: Path) -> Json:
    """Types are compared exactly: a subclass (an enum, a NumPy float) would come back as something else."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if value.bit_length() <= _WIDEST_INT else {_KIND: "int", "hex": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}
    if kind is str:
        return _pack_text(value)
    if kind is bytes:
        return {_KIND: "bytes", "base64": base64.b64encode(value).decode()}
    if kind is complex:
        return {_KIND: "complex", "parts": [_pack_leaf(value.real, path), _pack_leaf(value.imag, path)]}
    if kind is torch.Size:
        return {_KIND: "torch.Size", "items": list(value)}
    if kind in (torch.dtype, torch.device):
        return {_KIND: f"torch.{kind.__name__}", "name": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic):
        _refuse_objects(value.dtype, path)
        descr = _pack_descr(np.lib.format.dtype_to_descr(value.dtype))
        return {_KIND: "numpy", "dtype": descr, "base64": base64.b64encode(value.tobytes()).decode()}
    raise StateError(f"{_at(path)}: a {kind.__module__}.{kind.__qualname__} cannot be saved; {_ADVICE}")


def _pack_text(text: str) -> Json:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates (odd file names): JSON would join two of them into one character
        return {_KIND: "str", "base64": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()}
    return text


def _pack_key(key: Any, path: Path) -> Json:
    if type(key) is tuple:
        return {_KIND: "tuple", "items": [_pack_key(part, path) for part in key]}
    if key is None or type(key) in (str, int, float, bool):
        return _pack_leaf(key, path)
    raise StateError(
        f"{_at(path)}: a key of type {type(key).__name__} cannot be saved ({key!r:.80}); "
        "keys may be None, bool, int, float, str or tuples of those"
    )


def _pack_descr(descr: Any) -> Json:
    """NumPy's own description of a dtype; tuples in it, which NumPy insists on, become tagged."""
    if isinstance(descr, tuple):
        return {_KIND: "tuple", "items": [_pack_descr(part) for part in descr]}
    return [_pack_descr(part) for part in descr] if isinstance(descr, list) else descr


def _view_of(tensor: Tensor) -> tuple[object, ...]:
    """What makes two tensors the same view of the same memory."""
    # Empty tensors have no memory that could tell them apart.
    memory = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return (
        memory,
        tensor.device,
        tensor.dtype,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _refuse_unusual(tensor: Tensor, path: Path) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        what = f"a {type(tensor).__module__}.{type(tensor).__qualname__}"
    elif tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested:
        what = f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}"
    elif tensor.is_meta:
        what = "a tensor on the meta device, which has no content,"
    else:
        return
    raise StateError(f"{_at(path)}: {what} cannot be saved; give its content as dense torch.Tensor objects")


def _refuse_objects(dtype: np.dtype[Any], path: Path) -> None:
    if dtype.hasobject:
        raise StateError(f"{_at(path)}: NumPy dtype {dtype} holds Python objects and cannot be saved; {_ADVICE}")


def _at(path: Path) -> str:
    return f"the state at {'.'.join(path)!r}" if path else "the state"


class _Unpacker:
    """One call of `unpack`: tied tensors come back as one object, also where they were stored as bytes."""

    def __init__(self, tensors: Mapping[str, Tensor], shards: ShardFiles | None = None) -> None:
        self._tensors = tensors
        self._shards = shards
        self._tied: dict[str, Tensor] = {}

    def unpack(self, packed: Json) -> Any:
        if isinstance(packed, list):
            return self.items(packed)
        if not isinstance(packed, dict):
            return packed
        if _KIND not in packed:
            return {key: self.unpack(value) for key, value in packed.items()}
        kind = packed[_KIND]
        if kind not in _KINDS:
            raise BrokenCheckpoint(f"the state holds something of the unknown kind {kind!r}")
        return _KINDS[kind](self, packed)

    def items(self, packed: list[Json]) -> list[Any]:
        return [self.unpack(item) for item in packed]

    def pairs(self, packed: list[Json]) -> list[tuple[Any, Any]]:
        return [(self.unpack(key), self.unpack(value)) for key, value in packed]

    def ordered(self, packed: dict[str, Json]) -> OrderedDict[Any, Any]:
        mapping = OrderedDict(self.pairs(packed["items"]))
        if "metadata" in packed:
            mapping._metadata = self.unpack(packed["metadata"])  # type: ignore[attr-defined]  # torch's own attribute
        return mapping

    def defaulting(self, packed: dict[str, Json]) -> defaultdict[Any, Any]:
        factory = None if packed["factory"] is None else _FACTORIES[packed["factory"]]
        return defaultdict(factory, self.pairs(packed["items"]))

    def tensor(self, packed: dict[str, Json]) -> Tensor:
        name = packed["name"]
        if name not in self._tied:
            tensor = self.stored(name)
            if "dtype" in packed:
                tensor = tensor.view(_dtype(packed["dtype"])).reshape(packed["shape"])
            self._tied[name] = tensor
        return self._tied[name]

    def sharded(self, packed: dict[str, Json]) -> Sharded:
        if self._shards is None:
            raise BrokenCheckpoint(f"the tensor {packed['name']!r} is spread over ranks, where none may be")
        return Sharded(packed["name"], _layout(packed), _dtype(packed["dtype"]), self._shards)

    def array(self, packed: dict[str, Json]) -> np.ndarray[Any, Any]:
        raw = self.stored(packed["name"]).numpy()
        if any(size < 0 for size in packed["shape"]):  # np.ndarray takes it
            raise BrokenCheckpoint(f"the state holds an array of shape {packed['shape']}")
        # Its own memory, aligned and writeable, as an array of the user's has.
        return np.ndarray(packed["shape"], self.numpy_dtype(packed), buffer=raw).copy()

    def scalar(self, packed: dict[str, Json]) -> Any:
        content = base64.b64decode(packed["base64"], validate=True)
        return np.ndarray((), self.numpy_dtype(packed), buffer=content)[()]

    def numpy_dtype(self, packed: dict[str, Json]) -> np.dtype[Any]:
        dtype = np.lib.format.descr_to_dtype(self.unpack(packed["dtype"]))
        if dtype.hasobject:  # would read addresses out of the file
            raise BrokenCheckpoint(f"the state holds the NumPy dtype {dtype}, which cannot have been saved")
        return dtype

    def stored(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise BrokenCheckpoint(f"the tensor {name!r} is missing")
        return self._tensors[name]


_KINDS: dict[str, Callable[[_Unpacker, dict[str, Json]], Any]] = {
    "int": lambda _, packed: int(packed["hex"], 16),
    "float": lambda _, packed: float(packed["value"]),
    "str": lambda _, packed: base64.b64decode(packed["base64"], validate=True).decode("utf-8", "surrogatepass"),
    "bytes": lambda _, packed: base64.b64decode(packed["base64"], validate=True),
    "complex": lambda unpacker, packed: complex(*unpacker.items(packed["parts"])),
    "tuple": lambda unpacker, packed: tuple(unpacker.items(packed["items"])),
    "dict": lambda unpacker, packed: dict(unpacker.pairs(packed["items"])),
    "OrderedDict": _Unpacker.ordered,
    "Counter": lambda unpacker, packed: Counter(dict(unpacker.pairs(packed["items"]))),
    "defaultdict": _Unpacker.defaulting,
    "deque": lambda unpacker, packed: deque(unpacker.items(packed["items"]), packed["maxlen"]),
    "set": lambda unpacker, packed: set(unpacker.items(packed["items"])),
    "frozenset": lambda unpacker, packed: frozenset(unpacker.items(packed["items"])),
    "torch.Size": lambda _, packed: torch.Size(packed["items"]),
    "torch.dtype": lambda _, packed: _dtype(packed["name"]),
    "torch.device": lambda _, packed: torch.device(packed["name"]),
    "tensor": _Unpacker.tensor,
    "sharded": _Unpacker.sharded,
    "ndarray": _Unpacker.array,
    "numpy": _Unpacker.scalar,
}


def _layout(packed: dict[str, Json]) -> Layout:
    shape, mesh, splits = (tuple(packed[key]) for key in ("shape", "mesh", "splits"))
    if len(mesh) != len(splits) or any(split is not None and split not in range(len(shape)) for split in splits):
        raise BrokenCheckpoint(f"the state holds a tensor of shape {shape}, split along {splits} over {mesh} ranks")
    return Layout(shape, mesh, splits)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise BrokenCheckpoint(f"the state names the dtype {name!r}, which torch does not have")
    return dtype
