"""References to the user's objects, ``package.module:name`` or ``path/to/file.py:name``; imports nothing."""

from __future__ import annotations

import ast
import contextlib
import importlib
import keyword
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

from ddpkit.errors import ConfigError, nearest


@dataclass(frozen=True)
class Reference:
    """Where an object is: a module or a file's path, and a name in it, dotted or not (``Class.method``)."""

    module_or_path: str
    name: str
    is_file: bool

    def __str__(self) -> str:
        return f"{self.module_or_path}:{self.name}"


@dataclass(frozen=True)
class _Module:
    """A module that was found: its source file, unless it is a mere folder, and where its submodules are."""

    source: Path | None
    folders: tuple[str, ...]


def parse(ref: str) -> Reference:
    """Split a reference. Raises ``ConfigError`` with an example where it has another form."""
    where, colon, name = ref.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    well_formed = _is_dotted(name) and ref.isprintable()
    if colon and well_formed and (where.endswith(".py") if is_file else _is_dotted(where)):
        return Reference(where, name, is_file)
    raise ConfigError(f"{_cut(ref)!r} is no reference; {_example(ref, where, is_file)}")


def syntax_tree(source: Path) -> ast.Module:
    """Parse a file.

    Raises ``ConfigError`` with file, line and message where it does not parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import tells of invalid escapes
            return ast.parse(source.read_bytes(), str(source))
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ConfigError(f"{source}{line}: {error.msg}") from None
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{source}: cannot be parsed ({error})") from None


def missing(ref: Reference, search_path: Sequence[str], read: Callable[[Path], ast.Module] = syntax_tree) -> str | None:
    """Say what keeps ``ref`` from being found, or None: it is there, or only importing it can tell.

    Reads files, imports nothing. ``search_path`` is the ``sys.path`` of the ranks; ``read`` is `syntax_tree`, or one
    that remembers what it has read.
    """
    try:
        module = _find_file(ref) if ref.is_file else _find_module(ref, search_path)
        if module is None:
            return None
        tree = read(module.source) if module.source else ast.Module([], [])
    except ConfigError as error:
        return str(error)
    first = ref.name.partition(".")[0]
    defined = {name for node in _module_level(tree) for name in _bound_by(node)}
    if first in defined or _find_in(first, module.folders) or _may_define(tree, defined, first):
        return None
    alike = nearest(first, sorted(defined.union(submodules(module.folders))))
    return f"'{ref}': no {first!r} in {module.source or ', '.join(module.folders)}{alike}"


def submodules(folders: Iterable[str]) -> list[str]:
    """Names of the modules and packages in these folders, as far as they can be listed."""
    names: set[str] = set()
    for folder in folders:
        try:
            entries = list(Path(folder).iterdir())
        except OSError:
            continue
        names.update(entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir())
    return sorted(name for name in names if name.isidentifier() and name != "__pycache__")


# ---------------------------------------------------------------------- the form of a reference


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in text.split("."))


def _example(ref: str, where: str, is_file: bool) -> str:
    if is_file and not where.endswith(".py"):
        return "a file's name ends in .py, as in 'path/to/file.py:name'"
    head, dot, last = ref.rpartition(".")
    if ":" not in ref and dot and last != "py" and _is_dotted(ref):
        return f"write '{head}:{last}', with a colon before the name"
    return "write 'package.module:name' or 'path/to/file.py:name'"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------- from a reference to a source file


def _find_file(ref: Reference) -> _Module:
    path = Path(ref.module_or_path)
    with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be read
        if path.is_file():
            return _Module(path, ())
    alike = nearest(path.stem, submodules([str(path.parent)]))
    raise ConfigError(f"'{ref}': there is no file {path} (looked from {Path.cwd()}){alike}")


def _find_module(ref: Reference, search_path: Sequence[str]) -> _Module | None:
    """The module; None where only an import can tell. ``ConfigError`` where a part of its name is missing."""
    importlib.invalidate_caches()  # a file written a moment ago counts
    parts = ref.module_or_path.split(".")
    module: _Module | None = None
    for count, part in enumerate(parts):
        spec = _find_top(part, search_path) if module is None else _find_in(part, module.folders)
        if spec is None:
            if module is not None and module.source is not None and _may_add_modules(module.source):
                return None
            raise ConfigError(f"'{ref}': {_what_is_missing(parts, count, module, search_path)}")
        module = _described(spec)
        if module is None:
            return None
    return module


def _find_top(name: str, search_path: Sequence[str]) -> ModuleSpec | None:
    """What ``import name`` would take, with ``search_path`` for ``sys.path``; loads nothing.

    The finders beside PathFinder count too: builtin and frozen modules, and editable installs, have one each.
    """
    for finder in sys.meta_path:
        path = list(search_path) if finder is PathFinder else None
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None


def _find_in(name: str, folders: Sequence[str]) -> ModuleSpec | None:
    # The bare name: for a dotted one PathFinder asks sys.modules for the parent, which is not imported.
    return PathFinder.find_spec(name, list(folders)) if folders else None


def _described(spec: ModuleSpec) -> _Module | None:
    """None for what has no source to look into: builtin, frozen, extension and zipped modules."""
    folders = tuple(spec.submodule_search_locations or ())
    if spec.loader is None or spec.origin is None:  # a namespace package: folders without a file
        return _Module(None, folders)
    if type(spec.loader) is SourceFileLoader:
        return _Module(Path(spec.origin), folders)
    return None


def _may_add_modules(source: Path) -> bool:
    try:
        text = source.read_bytes()
    except OSError:
        return False
    return b"__path__" in text or b"sys.modules" in text


def _what_is_missing(parts: list[str], count: int, parent: _Module | None, search_path: Sequence[str]) -> str:
    part, so_far = parts[count], ".".join(parts[:count])
    if parent is None:
        first = search_path[0] if search_path else "the import path (it is empty)"
        others = f" and {len(search_path) - 1} more folders of the import path" if search_path[1:] else ""
        # Among hundreds of installed modules something is always a little alike.
        alike = nearest(part, submodules(search_path), likeness=0.75)
        return f"no module {part!r} in {first or Path.cwd()}{others}{alike}"
    if not parent.folders:
        return f"{so_far} is a module ({parent.source}), not a package, so it has no {part!r} in it"
    looked = ", ".join(parent.folders)
    return f"no module {part!r} in the package {so_far} ({looked}){nearest(part, submodules(parent.folders))}"


# ---------------------------------------------------------------------- names in a syntax tree


def _module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: all but the insides of functions and classes."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def _bound_by(node: ast.AST) -> Iterator[str]:
    """The names that one node binds; ``*`` for those of a star import."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest


def _may_define(tree: ast.Module, defined: set[str], name: str) -> bool:
    """Whether the source may bind ``name`` in another way than to define it at module level.

    Asked last: a walk through all of a large file takes as long as parsing it.
    """
    return not defined.isdisjoint({"*", "__getattr__"}) or any(
        (isinstance(node, ast.Global) and name in node.names)
        or (isinstance(node, ast.Name) and node.id in ("exec", "globals", "vars", "locals"))
        or (isinstance(node, ast.Attribute) and node.attr == "modules")
        for node in ast.walk(tree)
    )
