"""What a check of the config found, in plain words: the key, what was given, what is allowed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import JsonValue, ValidationError

from ddpkit.errors import nearest
from ddpkit.yaml_files import KeyPath, dotted

Schema: TypeAlias = Mapping[str, Any]

_WORDS: Mapping[str, str] = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}

_BOUNDS: Mapping[str, str] = {
    "minimum": "of at least",
    "maximum": "of at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
    "minItems": "with a length of at least",
    "maxItems": "with a length of at most",
}


class NestedProblems(ValueError):
    """What is wrong inside one value, each with its path in there, so that a validator can report it all."""

    def __init__(self, problems: list[tuple[KeyPath, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


def explain(error: ValidationError, tree: JsonValue, schema: Schema) -> dict[KeyPath, str]:
    """Give a sentence for each place in the tree. What is allowed there is read off the schema."""
    problems: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        path, found = _in_tree(tree, detail["loc"], is_missing=detail["type"] == "missing")
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, NestedProblems):
            problems.update({(*path, *inner): sentence for inner, sentence in cause.problems})
        elif detail["type"] == "value_error":
            problems[path] = str(cause)
        elif detail["type"] == "missing":
            problems[path] = f"missing; {_allowed(schema, path)} is needed"
        elif detail["type"] == "extra_forbidden":
            problems[path] = _unknown_key(schema, path)
        else:
            wrong = f"expected {_allowed(schema, path)}, got {shown(found)}{_hint(schema, path, found)}"
            problems.setdefault(path, wrong)
    return {path: sentence for path, sentence in problems.items() if not _is_implied(path, problems)}


def shown(value: JsonValue) -> str:
    """Show a value as messages do: short, with its type."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return brief(value) if value is None else f"{brief(value)} ({type(value).__name__})"


def brief(value: object) -> str:
    """Show a value in at most 60 characters, the words as in YAML."""
    words = {"None": "null", "True": "true", "False": "false"}
    text = repr(value)
    return words.get(text, text if len(text) <= 60 else f"{text[:57]}...")


def _is_implied(path: KeyPath, problems: Mapping[KeyPath, str]) -> bool:
    """Whether a union's other branch says more: 'elastic' was not meant where a factory lacks a key."""
    deeper = any(len(other) > len(path) and other[: len(path)] == path for other in problems)
    return deeper and problems[path].startswith("expected ")


def _in_tree(tree: JsonValue, location: tuple[int | str, ...], *, is_missing: bool) -> tuple[KeyPath, JsonValue]:
    """Pydantic's location without the labels of union branches that it mixes in, and the value there."""
    path: KeyPath = ()
    value = tree
    for key in location[:-1] if is_missing else location:
        if isinstance(value, dict) and key in value:
            value, path = value[str(key)], (*path, key)
        elif isinstance(value, list) and isinstance(key, int):
            value, path = value[key], (*path, key)
    return ((*path, location[-1]), None) if is_missing else (path, value)


# ---------------------------------------------------------------------- what the schema allows


def _branches(schema: Schema, node: Schema) -> list[Schema]:
    """The alternatives at a node of the schema, references followed."""
    if "$ref" in node:
        return _branches(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    for union in ("anyOf", "oneOf"):
        if union in node:
            return [branch for option in node[union] for branch in _branches(schema, option)]
    return [node]


def _schema_at(schema: Schema, path: KeyPath) -> list[Schema]:
    nodes = [schema]
    for key in path:
        below = (_below(node, key) for node in nodes)
        nodes = [branch for node in below if node is not None for branch in _branches(schema, node)]
    return nodes


def _below(node: Schema, key: str | int) -> Schema | None:
    found: Schema | None = node.get("items") if isinstance(key, int) else node.get("properties", {}).get(key)
    return found


def _allowed(schema: Schema, path: KeyPath) -> str:
    return " or ".join(_described(node) for node in _schema_at(schema, path)) or "another value"


def _described(node: Schema) -> str:
    """One alternative of the schema in words."""
    if "enum" in node or "const" in node:
        return " or ".join(_choices(node))
    if node.get("type") == "object" and "properties" in node:
        return f"a mapping with the keys {', '.join(node['properties'])}"
    if node.get("format") == "reference":
        return "a reference such as 'package.module:name'"
    if node.get("format") == "range of numbers":
        return "a range such as '2:4'"
    return _WORDS.get(node.get("type", ""), "a value") + _bounds(node)


def _choices(node: Schema) -> list[str]:
    return [repr(word) for word in node.get("enum", [node["const"]] if "const" in node else [])]


def _bounds(node: Schema) -> str:
    # A bound that is only there because the number has to fit into 64 bits would confuse.
    stated = [f"{word} {node[key]}" for key, word in _BOUNDS.items() if key in node and node[key] < 2**31]
    return f" {' and '.join(stated)}" if stated else ""


def _unknown_key(schema: Schema, path: KeyPath) -> str:
    keys = [key for node in _schema_at(schema, path[:-1]) for key in node.get("properties", {})]
    where = f"of {dotted(path[:-1])}" if path[1:] else "at the top"
    return f"unknown key{nearest(str(path[-1]), keys)} (the keys {where}: {', '.join(keys)})"


def _hint(schema: Schema, path: KeyPath, found: JsonValue) -> str:
    if not isinstance(found, str):
        return ""
    nodes = _schema_at(schema, path)
    if any(node.get("type") in ("integer", "number") for node in nodes) and _is_number(found):
        return "; a number is written without quotes"
    return nearest(found, [choice.strip("'") for node in nodes for choice in _choices(node)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
