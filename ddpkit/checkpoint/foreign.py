"""Weights out of files that are not ddpkit's. Nothing in such a file is executed: tensors are all that is read."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ddpkit.checkpoint import manifest
from ddpkit.errors import UserError, nearest
from ddpkit.model import retie, tied_names, unwrap

# What torch's own wrappers put into names: torch.compile, activation checkpointing, the older FSDP.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_PARALLEL = "module."  # what DataParallel and DDP put in front
_MOST_LINES = 40  # of each part of the table, and of a refusal
_USUAL_KEYS = ("state_dict", "model", "model_state_dict")  # of files with more than weights
_DEEPEST = 3  # levels at which a state dict is looked for, to name it


@dataclass(frozen=True)
class Weights:
    """What came of a foreign checkpoint; ``str()`` of it is a table.

    Attributes:
        path: the file.
        taken: names in the model, and the names in the file that they were taken from.
        skipped: names in the file that were not taken, and why.
        missing: names in the model that nothing was taken for: they stay as the model was built.
    """

    path: Path
    taken: Mapping[str, str]
    skipped: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """The part of ``taken`` whose names differ."""
        return {name: source for name, source in self.taken.items() if name != source}

    def __str__(self) -> str:
        head = (
            f"{self.path}: {len(self.taken)} taken, {len(self.renamed)} of them renamed; {len(self.skipped)} skipped; "
            f"{len(self.missing)} missing"
        )
        renamed = [f"  renamed  {source} -> {name}" for name, source in self.renamed.items()]
        skipped = [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        missing = [f"  missing  {name}: as the model was built" for name in self.missing]
        return "\n".join([head, *_cut(renamed), *_cut(skipped), *_cut(missing)])


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    strip_prefix: str | None = None,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    skip_mismatched: bool = False,
) -> Weights:
    """Load a state dict that somebody else has saved into a model; before `Runtime.wrap`, on rank zero at least.

    Wrapping gives the weights of rank zero to all. The tensors are read to the CPU, mapped where the file allows it,
    and copied to wherever the model is; one on the meta device gets them as they are. What torch's wrappers add to
    names, in the file or in the model, does not count: DataParallel's and DDP's ``module.``, torch.compile's
    ``_orig_mod.`` and the like.

    Args:
        model: yours; in a DDP already, the caller sees to it that all ranks load the same.
        path: a safetensors file if it ends in .safetensors, the list of several files that Hugging Face's libraries
            write if it ends in .json, and else a file of `torch.save` (.pt, .pth, .bin, .ckpt).
        key: where in the file the state dict is, dots leading further in ("state_dict", "ema.model").
        strip_prefix: taken off the names in the file that begin with it.
        rename: regular expressions, and what takes the place of what they find: one after the other, as `re.sub` does.
        strict: refuse names in the model that the file lacks, and names in the file that the model lacks.
        skip_mismatched: leave out tensors of other shapes than the model's (or complex for real), instead of refusing
            them.

    Returns:
        What was taken, renamed, skipped, and what is missing.

    Raises:
        UserError: the file cannot be read, holds objects that only code could make, or does not fit the model. In
            the latter case some of it may have been loaded.
    """
    path = Path(path).expanduser()
    module = unwrap(model)
    own = module.state_dict(keep_vars=True)
    _refuse_sharded(own)
    state = _read(path, key)
    sources = _sources(state, own, strip_prefix, rename or {}, path)
    skipped, mismatched = _left_out(state, own, sources)
    chosen = {name: source for name, source in sources.items() if source not in skipped and source not in mismatched}
    missing, unexpected = _load(module, {name: state[source] for name, source in chosen.items()}, own, path)
    result = Weights(
        path,
        taken={name: source for name, source in chosen.items() if name not in unexpected},
        skipped={**skipped, **mismatched, **{chosen[name]: "not in the model" for name in unexpected}},
        missing=missing,
    )
    excused = {name for name, source in sources.items() if source in mismatched}
    faults = [] if skip_mismatched else [f"  {name}: {reason}" for name, reason in mismatched.items()]
    if strict or not result.taken:
        faults += [f"  {name}: in the model, not in the file" for name in missing if name not in excused]
        faults += [f"  {chosen[name]}: in the file, not in the model" for name in unexpected]
    if faults or not result.taken:
        hint = _prefix_hint(set(sources), set(own)) or _key_hint(state)
        advice = hint or _advice(result, mismatched)
        raise UserError("\n".join([f"{path} does not fit the model:", *_cut(faults), advice]))
    return result


# ---------------------------------------------------------------------- names


def _sources(
    state: Mapping[str, Any], own: Mapping[str, Any], strip_prefix: str | None, rename: Mapping[str, str], path: Path
) -> dict[str, str]:
    """The names in the file by what they are called in the model."""
    names = _plain_names(state, own)
    if strip_prefix is not None:
        names = _stripped(names, strip_prefix, path)
    for pattern, replacement in rename.items():
        names = _substituted(names, pattern, replacement, path)
    in_model = {plain: name for name, plain in _plain_names(own, names.values()).items()}
    sources: dict[str, str] = {}
    for source, name in names.items():
        name = in_model.get(name, name)
        if name in sources:
            raise UserError(f"{path}: both {sources[name]} and {source} become {name}; change strip_prefix or rename")
        sources[name] = source
    return sources


def _plain_names(state: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The names without what wrappers have added; ``module.`` counts as added if the others lack it."""
    names = {name: _plain(name) for name in state}
    depth = _common_depth(names.values()) - _common_depth(map(_plain, others))
    return {name: plain[max(depth, 0) * len(_PARALLEL) :] for name, plain in names.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_depth(names: Iterable[str]) -> int:
    """How often all names have ``module.`` in front."""
    depths = []
    for name in names:
        depths.append(0)
        while name.startswith(_PARALLEL):
            name, depths[-1] = name.removeprefix(_PARALLEL), depths[-1] + 1
    return min(depths, default=0)


def _stripped(names: Mapping[str, str], prefix: str, path: Path) -> dict[str, str]:
    """Without the prefix, be it meant with or without what wrappers have added."""
    stripped = {
        source: source.removeprefix(prefix) if source.startswith(prefix) else name.removeprefix(prefix)
        for source, name in names.items()
    }
    if stripped == names:
        raise UserError(f"{path}: no name in it begins with {prefix!r} (strip_prefix); {_some(names.values())}")
    return stripped


def _substituted(names: Mapping[str, str], pattern: str, replacement: str, path: Path) -> dict[str, str]:
    try:
        substituted = {source: re.sub(pattern, replacement, name) for source, name in names.items()}
    except (re.error, IndexError) as error:
        raise UserError(f"rename: {pattern!r} -> {replacement!r}: {error}") from None
    if not any(re.search(pattern, name) for name in names.values()):
        raise UserError(f"{path}: no name in it fits the pattern {pattern!r} (rename); {_some(names.values())}")
    return substituted


# ---------------------------------------------------------------------- into the model


def _left_out(
    state: Mapping[str, Any], own: Mapping[str, Any], sources: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The names in the file of what is no tensor, and of tensors that do not fit the model's; with reasons."""
    skipped, mismatched = {}, {}
    for name, source in sources.items():
        value, target = state[source], own.get(name)
        if not isinstance(value, Tensor):
            if target is None or isinstance(target, Tensor):  # and not a module's extra state
                skipped[source] = f"{type(value).__name__}, no tensor"
        elif isinstance(target, Tensor) and not is_lazy(target) and target.shape != value.shape:
            mismatched[source] = f"{tuple(value.shape)} in the file, {tuple(target.shape)} in the model"
        elif isinstance(target, Tensor) and not torch.can_cast(value.dtype, target.dtype):  # complex to real, say
            mismatched[source] = f"{value.dtype} in the file, {target.dtype} in the model"
    return skipped, mismatched


def _load(
    module: nn.Module, state: dict[str, Any], own: Mapping[str, Any], path: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Let torch load it, with whatever the modules do then; the names that it misses, and that it has no use for."""
    ties = tied_names(module)
    on_meta = any(isinstance(target, Tensor) and target.is_meta for target in own.values())
    if on_meta:  # taken as they are, so in the types that the model has
        state = {name: _typed_as(own.get(name), value) for name, value in state.items()}
    try:
        found = module.load_state_dict(state, strict=False, assign=on_meta)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {error}") from error
    if on_meta:
        retie(module, ties, preferred=state.keys())
    # A weight that is used under several names is there as soon as one of them is.
    present = {name for group in ties for name in group if not state.keys().isdisjoint(group)}
    return tuple(name for name in found.missing_keys if name not in present), tuple(found.unexpected_keys)


def _typed_as(target: Any, value: Any) -> Any:
    return value.to(target.dtype) if isinstance(target, Tensor) and isinstance(value, Tensor) else value


def _refuse_sharded(own: Mapping[str, Any]) -> None:
    from torch.distributed.tensor import DTensor  # half a second, where torch has not needed it yet

    if any(isinstance(value, DTensor) for value in own.values()):
        raise UserError("the model's parameters are spread over the ranks already; load the weights before rt.wrap")


# ---------------------------------------------------------------------- the file


def _read(path: Path, key: str | None) -> dict[str, Any]:
    """The state dict in a file, its tensors on the CPU."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; {_what_to_do_with(path)}")
    if path.suffix in (".safetensors", ".json"):
        if key is not None:
            raise UserError(f"{path}: it is one state dict; leave key={key!r} out")
        return _safetensors(path) if path.suffix == ".safetensors" else _in_several_files(path)
    return _under(_saved(path, key), key, path)


def _what_to_do_with(directory: Path) -> str:
    if (directory / ".metadata").exists():
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {directory} {directory.name}.pt"
        return f"it is one of torch.distributed.checkpoint, whose files take a pickle. If you trust it:\n  {command}"
    if (directory / manifest.NAME).exists():
        return "it is a checkpoint of ddpkit: ddpkit export RUN_DIR OUT.safetensors writes its model as one file"
    indices = sorted(path.name for path in directory.glob("*.index.json"))
    return f"give {' or '.join(indices)} in it" if indices else "give a file in it"


def _in_several_files(index: Path) -> dict[str, Any]:
    """What Hugging Face's libraries write of large models: a list of which tensor is in which file beside it."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except FileNotFoundError:
        raise UserError(f"{index}: there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a list of weights in several files (weight_map) that can be read") from error
    return {name: value for file in files for name, value in _read(index.parent / file, None).items()}


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read: {error}") from error


def _saved(path: Path, key: str | None) -> Any:
    """What `torch.save` wrote, as far as it is tensors and plain values."""
    try:
        is_archive = zipfile.is_zipfile(path)  # the older format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise UserError(_why_not(path, key, error)) from error


def _why_not(path: Path, key: str | None, error: Exception) -> str:
    converted = path.with_name(f"{path.stem}-weights.pt")
    if isinstance(error, RuntimeError) and "TorchScript" in str(error):
        command = f"torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), {str(converted)!r})"
        what = "is a TorchScript program"
    elif isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
        command = _conversion(path, key, converted)
        what = f"holds objects ({found[1]}) beside tensors and plain values"
    else:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, pickle.UnpicklingError):  # whose words are advice that is none
            reason = "torch has not written it, or it is damaged"
        return f"{path}: not a file of torch.save that can be read: {reason}"
    return (
        f"{path} {what}: loading that runs code out of the file, which ddpkit never does. If you trust the file, take "
        f'the weights out of it once, where its classes can be imported:\n  python -c "import torch; {command}"\n'
        f"and give {converted}{'' if key is None else ', without a key'}."
    )


def _conversion(path: Path, key: str | None, converted: Path) -> str:
    """What takes the tensors out of a file with objects, a whole model as they come or one among other things."""
    if key is None:
        there = f"next((m[k] for k in {_USUAL_KEYS} if k in m), m)"
    else:
        there = "m" + "".join(f"[{part!r}]" for part in key.split("."))
    return (
        f"m = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"m = m if isinstance(m, torch.nn.Module) else {there}; "
        "m = m.state_dict() if isinstance(m, torch.nn.Module) else m; "
        f"torch.save({{k: v for k, v in m.items() if isinstance(v, torch.Tensor)}}, {str(converted)!r})"
    )


def _under(content: Any, key: str | None, path: Path) -> dict[str, Any]:
    """The state dict at ``key``."""
    place = content
    names = [str(name) for name in content] if isinstance(content, Mapping) else []
    parts = [key] if key in names else (key or "").split(".")
    for part in parts if key is not None else ():
        named = {str(name): value for name, value in place.items()} if isinstance(place, Mapping) else {}
        if part not in named:
            raise UserError(f"{path}: there is no key {key!r} in it{nearest(key or '', names)}; {_described(content)}")
        place = named[part]
    if not isinstance(place, Mapping) or not any(isinstance(value, Tensor) for value in place.values()):
        where = "it" if key is None else f"its key {key!r}"
        raise UserError(f"{path}: {where} is no state dict (names and tensors); {_described(content)}")
    return {str(name): value for name, value in place.items()}


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"the file holds one {type(content).__name__}"
    found = list(_state_dicts(content, ()))
    if found:
        return f"give key: {' or '.join(found)}"
    entries = [f"{name} ({type(value).__name__})" for name, value in content.items()]
    return f"the file holds {', '.join(entries[:10]) or 'nothing'}"


def _state_dicts(content: Mapping[Any, Any], above: tuple[str, ...]) -> Iterator[str]:
    """The keys below which there are tensors by name."""
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(name, str):
            if any(isinstance(leaf, Tensor) and isinstance(child, str) for child, leaf in value.items()):
                yield ".".join((*above, name))
            elif len(above) < _DEEPEST:
                yield from _state_dicts(value, (*above, name))


# ---------------------------------------------------------------------- words


def _advice(result: Weights, mismatched: Collection[str]) -> str:
    advice = "Give the model that it was made with, or strip_prefix and rename"
    if not result.taken:
        return f"{advice}."
    ways = ["strict: false", *(["skip_mismatched: true"] if mismatched else [])]
    return f"{advice}; {' and '.join(ways)} would go on without what does not fit."


def _key_hint(state: Mapping[str, Any]) -> str | None:
    keys = list(_state_dicts(state, ()))
    return f"There is a state dict further inside: give key: {' or '.join(keys)}" if keys else None


def _prefix_hint(found: set[str], own: set[str]) -> str | None:
    """A prefix with which most names would be the same, if there is one."""
    enough = max(len(own & found), len(own) // 2)
    for prefix in _prefixes(found):
        if len(own & {name.removeprefix(prefix) for name in found}) > enough:
            return f"The names in it begin with {prefix!r}, the model's do not: give strip_prefix: {prefix}"
    for prefix in _prefixes(own):
        if len(own & {prefix + name for name in found}) > enough:
            return f"The model's names begin with {prefix!r}, those in it do not: give rename: {{'^': '{prefix}'}}"
    return None


def _prefixes(names: set[str]) -> list[str]:
    """The first parts of the names, the commonest first."""
    counts = Counter(name.partition(".")[0] + "." for name in sorted(names) if "." in name)
    return [prefix for prefix, _ in counts.most_common(3)]


def _some(names: Iterable[str]) -> str:
    return f"there are {', '.join(list(names)[:5])}, ..."


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"  and {len(lines) - _MOST_LINES} more"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
