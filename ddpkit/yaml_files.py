"""YAML 1.2 in and out: each value knows the file and line it came from, and what is wrong is one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from ddpkit.errors import ConfigError, nearest

MAX_BYTES = 1 << 20  # configs are a thousand times smaller, and the parser is pure Python
MAX_NODES = 100_000  # after aliases are expanded: ten lines of aliases of aliases can stand for billions
MAX_DEPTH = 64  # well inside Python's own recursion limit, for everything that walks a tree later
MAX_FILES = 64  # read through defaults: files that include each other twice double at every level
MAX_BITS = 1024  # Python refuses to print an integer of a few thousand digits, in messages too

KeyPath: TypeAlias = tuple[str | int, ...]
Scalar: TypeAlias = bool | int | float | str | None

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset({"str", "int", "float", "bool", "null"})
_WORDS_OF_YAML = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
_ENV = re.compile(r"(?:env|oc\.env):(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:,(?P<default>.*))?", re.DOTALL)
_DOLLAR = re.compile(r"\\\$\{|\$\{(?P<inside>[^{}]*)\}|\$\{")  # \${ stands for ${ itself
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")


@dataclass(frozen=True)
class Located:
    """A value, and the place (``configs/x.yaml:12``, ``-o seed=1``) that gave it."""

    value: Scalar | list[Located] | dict[str, Located]
    place: str

    def plain(self) -> JsonValue:
        """The value without its places, in containers of its own."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def place_of(self, path: KeyPath) -> str:
        """The place of the value at ``path``, or of the innermost one around it that exists."""
        if path and isinstance(self.value, dict) and path[0] in self.value:
            return self.value[str(path[0])].place_of(path[1:])
        if path and isinstance(self.value, list) and path[0] in range(len(self.value)):
            return self.value[int(path[0])].place_of(path[1:])
        return self.place


@dataclass
class Choices:
    """Names of files chosen from outside for the groups of ``defaults`` lists, and which groups there were."""

    names: Mapping[str, Located]
    used: set[str] = field(default_factory=set)

    def of(self, group: str, name: Located) -> Located:
        """The file's name for a group for which the ``defaults`` list says ``name``."""
        if group not in self.names:
            return name
        self.used.add(group)
        return self.names[group]


def read(path: str | os.PathLike[str], env: Mapping[str, str] | None = None, choices: Choices | None = None) -> Located:
    """Read a file and the files that its ``defaults`` list names, merged.

    A string in ``defaults`` names a file beside this one (``base``: ``base.yaml``), merged at the root;
    ``{group: name}`` merges ``group/name.yaml`` under the key ``group`` (``{a/b: name}``: under ``a.b``), null nothing;
    ``_self_`` is where this file's own content is merged, by default after the others. Mappings merge deeply; anything
    else is replaced. ``choices`` may name other files for the groups; ``env`` is as for ``parse``.

    Raises ``ConfigError`` for whatever is wrong with any of the files; no other exception.
    """
    return _Files(env, choices or Choices({})).read(Path(path), "", ())


def parse(text: str, name: str, *, numbered: bool = True, env: Mapping[str, str] | None = None) -> Located:
    """Parse one YAML document. ``name`` says in messages where it came from; ``numbered`` adds the line.

    With ``env``, ``${env:NAME}`` and ``${oc.env:NAME,default}`` in values become what the variable holds: text where
    they are quoted or stand amid other text, and else what YAML makes of it. ``\\${`` stands for ``${``.

    Raises ``ConfigError``, with all problems of one kind in one message; no other exception.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # YAML 1.2 lets an anchor be set again
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        raise ConfigError(_syntax_message(error, text, name, numbered)) from None
    except ReaderError as error:
        line, column = _line_and_column(text, error.position)
        where = _place(name, line, column) if numbered else name
        found = f"the character U+{ord(text[error.position]):04X}"
        raise ConfigError(f"{where}: {found} is not allowed in YAML; remove it") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply; {MAX_DEPTH} levels are allowed") from None
    except (
        YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        OverflowError,
    ) as error:
        # ruamel lets through what its own parts raise on some broken input (a %YAML directive without a
        # number, an escape beyond Unicode): to the user it is all the same.
        raise ConfigError(f"{name}: not valid YAML ({error})") from None
    if node is None:
        return Located(None, name)
    builder = _Builder(yaml, name, numbered, env)
    built = builder.build(node, (), None)
    if builder.problems:
        raise ConfigError("\n".join(builder.problems))
    return built


def merge(base: Located, over: Located) -> Located:
    """``over`` on top of ``base``: mappings merge deeply, anything else of ``over`` replaces."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Located(merged, over.place)


def replace_at(tree: Located, path: Sequence[str], new: Located) -> Located:
    """``tree`` with ``new`` at ``path``; mappings on the way are made, a list takes indices up to its length.

    Raises ``ConfigError`` where the path leads through something that has no keys.
    """
    if not path:
        return new
    head, rest = path[0], path[1:]
    inside = tree.value
    if inside is None:
        inside = [] if head == "0" else {}
    if isinstance(inside, dict):
        child = inside.get(head, Located(None, new.place))
        return Located({**inside, head: replace_at(child, rest, new)}, tree.place)
    if isinstance(inside, list):
        if not (head.isdecimal() and int(head) <= len(inside)):
            raise ConfigError(f"{new.place}: {head!r} is no index of this list; it has {len(inside)} entries")
        children = [*inside, Located(None, new.place)]
        index = int(head)
        children[index] = replace_at(children[index], rest, new)
        return Located(children[: max(len(inside), index + 1)], tree.place)
    raise ConfigError(f"{new.place}: there is no key {head!r} inside {inside!r}")


def dump(tree: JsonValue) -> str:
    """Block-style YAML that reads back as the same values, with this module, PyYAML or any other reader."""
    if isinstance(tree, (dict, list)) and tree:
        return "".join(f"{line}\n" for line in _block(tree))
    return f"{_inline(tree)}\n"


def escaped(tree: JsonValue) -> JsonValue:
    """The tree that ``parse`` with variables reads back as this one: each ``${`` in a value escaped."""
    if isinstance(tree, dict):
        return {key: escaped(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [escaped(child) for child in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


# ---------------------------------------------------------------------- files and their defaults


class _Files:
    """One call of ``read``: how many files it has come to."""

    def __init__(self, env: Mapping[str, str] | None, choices: Choices) -> None:
        self._env = env
        self._choices = choices
        self._count = 0

    def read(self, path: Path, asked_by: str, chain: tuple[Path, ...], group: str = "") -> Located:
        """A file with its defaults; ``group`` is where it is merged, as a prefix of the groups in it."""
        _refuse_cycle(path, asked_by, chain)
        self._count += 1
        if self._count > MAX_FILES:
            raise ConfigError(f"{asked_by}more than {MAX_FILES} files are read through defaults")
        own = parse(_text(path, asked_by), str(path), env=self._env)
        if own.value is None:
            raise ConfigError(f"{path}: empty; a config is a mapping of keys to values")
        if not isinstance(own.value, dict):
            raise ConfigError(f"{path}: a config is a mapping of keys to values, and this is {_kind(own.value)}")
        content = Located({key: child for key, child in own.value.items() if key != "defaults"}, own.place)
        if "defaults" not in own.value:
            return content
        merged = Located({}, own.place)
        for part in self._parts(path, own.value["defaults"], content, (*chain, path), group):
            merged = merge(merged, part)
        return Located(merged.value, own.place)

    def _parts(
        self, path: Path, defaults: Located, content: Located, chain: tuple[Path, ...], above: str
    ) -> Iterator[Located]:
        """What is merged, in order: the files that ``defaults`` names and, where it stands, ``content``."""
        if not isinstance(defaults.value, list):
            raise ConfigError(f"{defaults.place}: defaults: expected a list, such as [base, {{optimizer: sgd}}]")
        own_is_named = any(entry.value == "_self_" for entry in defaults.value)
        for entry in defaults.value:
            asked_by = f"{entry.place}: defaults: "
            if entry.value == "_self_":
                yield content
            elif isinstance(entry.value, str) and entry.value:
                yield self.read(_yaml_file(path.parent, entry.value, asked_by), asked_by, chain, above)
            elif isinstance(entry.value, dict) and len(entry.value) == 1:
                ((group, name),) = entry.value.items()
                yield self._chosen(path.parent / group, f"{above}{group}", group, name, entry.place, chain)
            else:
                raise ConfigError(f"{asked_by}expected a file's name, {{group: name}} or _self_")
        if not own_is_named:
            yield content

    def _chosen(
        self, folder: Path, whole: str, group: str, name: Located, place: str, chain: tuple[Path, ...]
    ) -> Located:
        """The file of a group, under the group's key."""
        chosen = self._choices.of(whole, name)
        asked_by = f"{place}: defaults: " if chosen is name else f"{chosen.place}: "
        if chosen.value is None:
            return Located({}, place)
        if not (isinstance(chosen.value, str) and chosen.value):
            raise ConfigError(f"{asked_by}{group}: expected the name of a file in {folder}")
        part = self.read(_yaml_file(folder, chosen.value, asked_by), asked_by, chain, f"{whole}/")
        for key in reversed(group.split("/")):
            part = Located({key: part}, place)
        return part


def _refuse_cycle(path: Path, asked_by: str, chain: tuple[Path, ...]) -> None:
    if any(_same_file(path, earlier) for earlier in chain):
        names = " -> ".join(str(link) for link in (*chain, path))
        raise ConfigError(f"{asked_by}the files include each other: {names}; remove one of these defaults")


def _same_file(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _yaml_file(folder: Path, name: str, asked_by: str) -> Path:
    if "\0" in f"{folder}{name}":
        raise ConfigError(f"{asked_by}{name!r} cannot be the name of a file")
    return folder / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")


def _text(path: Path, asked_by: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{asked_by}{path}: there is no such file{_beside(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{asked_by}{path}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB; this is no config")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{_place(str(path), line, column)}: not UTF-8 text; save it as UTF-8") from None


def _beside(path: Path) -> str:
    """The names in the same folder that are like the one that is missing."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return ""
    return nearest(path.name, names)


# ---------------------------------------------------------------------- from YAML's nodes to values


@dataclass
class _Builder:
    """Turns composed nodes into ``Located`` values and collects what is wrong with them."""

    yaml: YAML
    name: str
    numbered: bool
    env: Mapping[str, str] | None
    problems: list[str] = field(default_factory=list)
    open_nodes: set[int] = field(default_factory=set)
    built: int = 0

    def build(self, node: Node, path: KeyPath, at: Node | None) -> Located:
        """The value of ``node``; ``at`` is the node (its key) whose line is its place, None at the root."""
        place = self.name if at is None else self.place(at)
        self.built += 1
        if self.built > MAX_NODES:
            raise ConfigError(f"{self.name}: more than {MAX_NODES} values once aliases (*name) are expanded")
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{self.place(node)}: nested too deeply; {MAX_DEPTH} levels are allowed")
        if id(node) in self.open_nodes:
            self.report(node, path, f"the alias *{node.anchor} stands inside what it names")
            return Located(None, place)
        self.open_nodes.add(id(node))
        try:
            return Located(self.value(node, path), place)
        finally:
            self.open_nodes.discard(id(node))

    def value(self, node: Node, path: KeyPath) -> Scalar | list[Located] | dict[str, Located]:
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            return [self.build(child, (*path, index), child) for index, child in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self.scalar(node, tag, path)
        self.report(node, path, f"the tag {_shown_tag(tag)} is not allowed here; remove it")
        return None

    def scalar(self, node: ScalarNode, tag: str, path: KeyPath) -> Scalar | list[Located] | dict[str, Located]:
        kind = tag.removeprefix(_TAG)
        text = str(node.value)
        if kind in ("value", "merge"):  # a lone "=" or "<<": YAML 1.1 gave it a meaning, 1.2 does not
            kind = "str"
        if kind == "timestamp":
            self.report(node, path, f"{text} is a date; quote it ('{text}') to make it a string")
        elif kind not in _SCALARS or not tag.startswith(_TAG):
            self.report(node, path, f"the tag {_shown_tag(tag)} is not allowed here; remove it")
        elif kind == "str":
            found = self.string(node, text, path)
            return found if found is None or self.env is None else self.filled(node, found, self.env, path)
        else:
            return self.number(node, text, kind, path)
        return None

    def string(self, node: ScalarNode, text: str, path: KeyPath) -> str | None:
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.report(node, path, "half of a surrogate pair (\\ud800 to \\udfff); write the character itself")
            return None
        return text

    def filled(
        self, node: ScalarNode, text: str, env: Mapping[str, str], path: KeyPath
    ) -> Scalar | list[Located] | dict[str, Located]:
        """The text with what environment variables hold where it says so."""
        whole = _DOLLAR.fullmatch(text)
        if node.style is None and whole is not None and whole["inside"] is not None:
            found = self.variable(node, whole, env, path)
            return None if found is None else parse(found, f"{self.place(node)} ({text})", numbered=False).value
        return _DOLLAR.sub(lambda found: self.variable(node, found, env, path) or "", text)

    def variable(self, node: ScalarNode, found: re.Match[str], env: Mapping[str, str], path: KeyPath) -> str | None:
        """What stands for one ``${...}``, or for an escaped ``${``."""
        if found[0].startswith("\\"):
            return "${"
        asked = _ENV.fullmatch(found["inside"] or "")
        if asked is None:
            only = (
                "${env:NAME} and ${oc.env:NAME,default} are filled in, and nothing else; write \\${ for the characters"
            )
            self.report(node, path, f"{_cut(found[0])!r}: {only}")
            return None
        if asked["name"] not in env and asked["default"] is None:
            advice = f"set it, or give a default: ${{oc.env:{asked['name']},default}}"
            self.report(node, path, f"the environment variable {asked['name']} is not set; {advice}")
            return None
        return env.get(asked["name"], (asked["default"] or "").strip())

    def number(self, node: ScalarNode, text: str, kind: str, path: KeyPath) -> Scalar:
        try:
            value: Scalar = self.yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError, LookupError, OverflowError):
            self.report(node, path, f"{_cut(text)!r} is not a YAML {kind}; quote it to make it a string")
            return None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            self.report(node, path, "this integer is too large; quote it to make it a string")
            return None
        return value

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Located]:
        own: dict[str, Located] = {}
        merged: dict[str, Located] = {}
        lines: dict[str, int] = {}
        for key_node, child in node.value:
            if str(key_node.tag) == _TAG + "merge":
                merged = {**self.merged(child, path), **merged}
                continue
            key = self.key(key_node, path)
            if key is None:
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                twice = f"this key is given twice, first on line {lines[key]}; remove one"
                self.report(key_node, (*path, key), twice)
                continue
            lines[key] = line
            own[key] = self.build(child, (*path, key), key_node)
        return {**merged, **own}

    def key(self, node: Node, path: KeyPath) -> str | None:
        if isinstance(node, ScalarNode) and str(node.tag) in (_TAG + "str", _TAG + "value"):
            return self.string(node, str(node.value), path)
        if isinstance(node, ScalarNode):
            text = _cut(str(node.value))
            self.report(node, path, f"the key {text} is not a string; quote it ('{text}')")
        else:
            self.report(node, path, "a key must be a string; this one is a list or a mapping")
        return None

    def merged(self, node: Node, path: KeyPath) -> dict[str, Located]:
        """What ``<<: *name`` or ``<<: [*one, *two]`` brings in; the earlier wins."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        result: dict[str, Located] = {}
        for source in sources:
            if not isinstance(source, MappingNode):
                self.report(source, (*path, "<<"), "expected a mapping, or a list of mappings")
                continue
            built = self.build(source, (*path, "<<"), source)
            if isinstance(built.value, dict):
                result = {**built.value, **result}
        return result

    def place(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name

    def report(self, node: Node, path: KeyPath, sentence: str) -> None:
        key = f"{dotted(path)}: " if path else ""
        self.problems.append(f"{self.place(node)}: {key}{sentence}")


def dotted(path: KeyPath) -> str:
    """``("trackers", 0)`` as ``trackers.0``, the spelling of ``-o`` and of messages."""
    return ".".join(str(part) for part in path)


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"the single value {_cut(str(value))!r}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown_tag(tag: str) -> str:
    return tag.replace(_TAG, "!!")


# ---------------------------------------------------------------------- what the parser said, in plain words


def _place(name: str, line: int, column: int) -> str:
    return f"{name}:{line}:{column}"


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def _syntax_message(error: MarkedYAMLError, text: str, name: str, numbered: bool) -> str:
    mark = error.problem_mark or error.context_mark
    where = _place(name, mark.line + 1, mark.column + 1) if mark and numbered else name
    return f"{where}: {_sentence(error, _line_at(text, mark.line) if mark else '')}"


def _line_at(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number] if number < len(lines) else ""


def _sentence(error: MarkedYAMLError, line: str) -> str:
    """The problem in a plain sentence; the parser's own words where there is no better one."""
    problem = str(error.problem or error.context or "")
    if "'\\t'" in problem or (line[: len(line) - len(line.lstrip())].count("\t") and "\t" in line):
        return "a tab; YAML indents and separates with spaces"
    if "but found another document" in problem:
        return "a second document starts here (---); a config is one document"
    if "mapping values are not allowed" in problem:
        return "a ':' that does not fit here; check the indentation, or quote the value"
    if "undefined alias" in problem:
        return f"{problem.removeprefix('found ')}: no &name before it"
    if "cannot start any token" in problem:
        return f"{problem.removeprefix('found ')}; quote the value"
    if "unexpected end of stream" in problem or "<stream end>" in problem:
        opened = error.context_mark.line + 1 if error.context_mark else 1
        return f"the file ends before what was opened on line {opened} (a quote or a bracket) is closed"
    if "expected <block end>" in problem:
        return "the indentation, or a missing '-' or ':', does not fit the lines above"
    if "expected ',' or" in problem:
        opened = error.context_mark.line + 1 if error.context_mark else 1
        return f"a ',' is missing before this, or the bracket opened on line {opened} is not closed"
    if "could not find expected ':'" in problem:
        return "a key without its ':' before this"
    if "<document start>" in problem:
        return "this does not fit what comes before; a config is one mapping of keys to values"
    while_doing = f" ({error.context})" if error.context and error.problem else ""
    return f"not valid YAML: {problem}{while_doing}"


# ---------------------------------------------------------------------- out


def _block(tree: dict[str, JsonValue] | list[JsonValue]) -> Iterator[str]:
    entries = tree.items() if isinstance(tree, dict) else (("-", child) for child in tree)
    for key, child in entries:
        head = f"{_string(key)}:" if isinstance(tree, dict) else "-"
        if not (isinstance(child, (dict, list)) and child):
            yield f"{head} {_inline(child)}"
        elif isinstance(tree, list):
            for number, line in enumerate(_block(child)):
                yield f"  {line}" if number else f"- {line}"
        else:
            yield head
            yield from (f"  {line}" for line in _block(child))


def _inline(value: JsonValue) -> str:
    """A scalar, or an empty container."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float):
        return _float(value)
    return {dict: "{}", list: "[]", type(None): "null"}.get(type(value)) or str(value)


def _float(value: float) -> str:
    text = repr(value)
    if text.lstrip("-") in ("inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    return text if "." in text else text.replace("e", ".0e")  # PyYAML takes 1e-05 for a string


def _string(text: str) -> str:
    """Plain where no YAML reader could take it for something else, double-quoted otherwise."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS_OF_YAML:
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    code = ord(character)
    if character.isprintable() and code != 0xFEFF:
        return character
    if code == 0x0A:
        return "\\n"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
