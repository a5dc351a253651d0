"""From references in the config to the user's objects: looked for before a run starts, built in the ranks."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pydantic import JsonValue

from ddpkit import references, services
from ddpkit.config import Config, Factory, is_factory, is_reference
from ddpkit.errors import ConfigError, nearest
from ddpkit.references import Reference, parse

__all__ = ["Reference", "all_references", "build", "check", "expect", "missing_trackers", "parse", "resolve"]

T = TypeVar("T")


def check(config: Config, search_path: Sequence[str]) -> list[str]:
    """Look for everything that the config refers to, importing nothing; give a line for each that is missing.

    ``search_path`` is the ``sys.path`` of the ranks. What only an import can decide counts as there.
    """
    lines = []
    read = functools.cache(references.syntax_tree)  # most references are to the same file
    for key, ref in all_references(config):
        problem = references.missing(parse(ref), search_path, read)
        if problem is not None:
            lines.append(f"{key}: {problem}")
    return lines + missing_trackers(config)


def missing_trackers(config: Config) -> list[str]:
    """Give a line for each tracker that is asked for by name and not installed; imports none."""
    names = [each if isinstance(each, str) else getattr(each, "name", None) for each in config.trackers]
    problems = [(index, services.missing(name)) for index, name in enumerate(names) if name is not None]
    return [f"trackers.{index}: {problem}" for index, problem in problems if problem is not None]


def resolve(ref: str, key: str) -> object:
    """Import what ``ref`` names and return it. ``key`` is where the config says it.

    Raises ``ConfigError`` where the module or the name is not there. What goes wrong inside the user's module
    while it is imported is raised as it is.
    """
    reference = parse(ref)
    found: object = _module(reference, key)
    for name in reference.name.split("."):
        found = _attribute(found, name, reference, key)
    return found


def build(
    spec: Factory | Mapping[str, JsonValue],
    *positional: object,
    key: str,
    shared: Mapping[str, object] | None = None,
) -> object:
    """Call ``spec``'s factory with ``positional`` and its args, and return what it gives.

    Inside the args ``{factory: ..., args: ...}`` is built first and ``{ref: ...}`` is the object itself.
    ``key`` is where the config says it (``optimizer``). ``shared`` are objects for every factory in there that has a
    parameter of that name; one among ``positional`` is then not given twice.

    Raises ``ConfigError`` where the factory is not there, cannot be called, or does not take these arguments.
    What the factory itself raises is raised as it is, except that a value refused by one of torch's is a ConfigError.
    """
    factory, args = (
        (spec.factory, spec.args) if isinstance(spec, Factory) else (spec.get("factory"), spec.get("args", {}))
    )
    if not (isinstance(factory, str) and isinstance(args, dict)):
        raise ConfigError(f"{key}: expected {{factory: 'package.module:name', args: {{...}}}}, got {spec!r}")
    target = resolve(factory, f"{key}.factory")
    if not callable(target):
        raise ConfigError(f"{key}.factory: {factory} is {_a(type(target).__name__)}, which cannot be called")
    named = _wanted(target, args, shared or {})
    positional = tuple(each for each in positional if not any(each is given for given in named.values()))
    _check_fits(target, factory, positional, {**named, **args}, key)
    built = {**named, **{name: _built(value, f"{key}.args.{name}", shared) for name, value in args.items()}}
    try:
        return target(*positional, **built)
    except (TypeError, ValueError) as error:
        if not factory.startswith("torch."):
            raise  # the user's own code, and its traceback matters
        raise ConfigError(f"{key}: {factory} does not take these arguments: {error}") from error


def expect(value: object, kind: type[T], key: str, what: str, *, ref: str | None = None) -> T:
    """Return ``value`` if it is a ``kind``, which ``what`` describes (``an nn.Module``).

    Raises ``ConfigError`` otherwise, naming ``key`` and ``ref``, the factory that returned it.
    """
    if isinstance(value, kind):
        return value
    got = "nothing (None)" if value is None else _a(type(value).__name__)
    returned = f"{ref} returned {got}" if ref else f"got {got}"
    raise ConfigError(f"{key}: {returned}; {what} is needed")


# ---------------------------------------------------------------------- the references of a config


def all_references(config: Config) -> Iterator[tuple[str, str]]:
    """Give every key that refers to an object of the user's, and the reference."""
    data, train = config.data, config.train
    factories = {
        "model": config.model,
        "data.train": data.train,
        "data.eval": data.eval,
        "data.sampler": data.sampler,
        "optimizer": config.optimizer,
        "scheduler": config.scheduler,
        **{f"train.metrics.{name}": metric for name, metric in train.metrics.items()},
        **{f"model.init.{index}": init for index, init in enumerate(config.model.init)},
        **{f"trackers.{index}": tracker for index, tracker in enumerate(config.trackers)},
        **{f"train.callbacks.{index}": callback for index, callback in enumerate(train.callbacks)},
    }
    for key, factory in factories.items():
        if isinstance(factory, Factory):
            yield f"{key}.factory", factory.factory
            yield from _references_in(factory.args, f"{key}.args")
    plain = {
        "data.loader.collate_fn": data.loader.collate_fn,
        "data.loader.worker_init_fn": data.loader.worker_init_fn,
        "train.step": train.step,
        "train.eval_step": train.eval_step,
        **{f"train.callbacks.{index}": ref for index, ref in enumerate(train.callbacks)},
    }
    yield from ((key, ref) for key, ref in plain.items() if isinstance(ref, str))


def _references_in(args: Mapping[str, JsonValue] | list[JsonValue], key: str) -> Iterator[tuple[str, str]]:
    children: Iterable[tuple[object, JsonValue]] = enumerate(args) if isinstance(args, list) else args.items()
    for name, value in children:
        if is_reference(value):
            yield f"{key}.{name}.ref", str(value["ref"])
        elif isinstance(value, (dict, list)):
            if is_factory(value):
                yield f"{key}.{name}.factory", str(value["factory"])
            yield from _references_in(value, f"{key}.{name}")


# ---------------------------------------------------------------------- importing


def _module(ref: Reference, key: str) -> ModuleType:
    if ref.is_file:
        return _load_file(ref, key)
    try:
        return importlib.import_module(ref.module_or_path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{ref.module_or_path}.".startswith(f"{error.name}."):
            raise  # a module that the user's own code imports
        raise ConfigError(f"{key}: '{ref}': {error}") from None


def _load_file(ref: Reference, key: str) -> ModuleType:
    """The module in a file. It stays in ``sys.modules``: it runs once, and its functions can be pickled."""
    path = Path(ref.module_or_path).resolve()
    stem = "".join(character if character.isalnum() else "_" for character in path.stem)
    name = f"ddpkit_file_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{key}: '{ref}': there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(owner: object, name: str, ref: Reference, key: str) -> object:
    try:
        return getattr(owner, name)
    except AttributeError:
        if isinstance(owner, ModuleType) and hasattr(owner, "__path__"):
            return _submodule(owner, name, ref, key)
        raise _no_such_name(owner, name, ref, key) from None


def _submodule(package: ModuleType, name: str, ref: Reference, key: str) -> ModuleType:
    full_name = f"{package.__name__}.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        raise _no_such_name(package, name, ref, key) from None


def _no_such_name(owner: object, name: str, ref: Reference, key: str) -> ConfigError:
    where = owner.__file__ if isinstance(owner, ModuleType) else getattr(owner, "__qualname__", repr(owner))
    return ConfigError(f"{key}: '{ref}': no {name!r} in {where}{nearest(name, dir(owner))}")


# ---------------------------------------------------------------------- building


def _built(value: JsonValue, key: str, shared: Mapping[str, object] | None) -> object:
    if is_reference(value):
        return resolve(str(value["ref"]), f"{key}.ref")
    if is_factory(value):
        return build(value, key=key, shared=shared)
    if isinstance(value, dict):
        return {name: _built(child, f"{key}.{name}", shared) for name, child in value.items()}
    if isinstance(value, list):
        return [_built(child, f"{key}.{index}", shared) for index, child in enumerate(value)]
    return value


def _wanted(
    target: Callable[..., object], args: Mapping[str, object], shared: Mapping[str, object]
) -> dict[str, object]:
    """The shared objects for which the factory has a parameter that the args leave open."""
    try:
        parameters = inspect.signature(target).parameters if shared else {}
    except (ValueError, TypeError):  # as below
        return {}
    return {name: value for name, value in shared.items() if name in parameters and name not in args}


def _check_fits(
    target: Callable[..., object],
    factory: str,
    positional: tuple[object, ...],
    args: Mapping[str, object],
    key: str,
) -> None:
    """Refuse arguments that the factory does not take, before anything is built for it."""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # some callables written in C do not say what they take
        return
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        raise ConfigError(_misfit(signature, factory, positional, args, key, str(error))) from None


def _misfit(
    signature: inspect.Signature,
    factory: str,
    positional: tuple[object, ...],
    args: Mapping[str, object],
    key: str,
    error: str,
) -> str:
    taken = f" (the signature is {factory.rpartition(':')[2]}{_without_types(signature)})"
    named = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [] if takes_any else [name for name in args if name not in named]
    if unknown:
        name = unknown[0]
        return f"{key}.args.{name}: {factory} has no such parameter{nearest(name, named)}{taken}"
    return f"{key}.args: {factory}: {error}{taken}"


def _without_types(signature: inspect.Signature) -> inspect.Signature:
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
