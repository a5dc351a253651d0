"""What the config's types say of themselves: a JSON schema for editors, and a page for people. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ddpkit import yaml_files
from ddpkit.config import schema

Schema: TypeAlias = Mapping[str, Any]

_VARIABLE = {"type": "string", "pattern": r"\$\{(oc\.)?env:"}
_DEFAULTS = {
    "description": "Files that this one builds on: `name`, `{group: name}`, and `_self_` for where this one comes.",
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]},
}
_ANYTHING = "any value"
_WORDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text", "null": "null"}
_PLURALS = {"a factory": "factories", "a reference": "references", "a section": "sections"}


# ---------------------------------------------------------------------- for editors


def editor_schema() -> dict[str, Any]:
    """The JSON schema of a config file, as it is written: with ``defaults``, and variables in the place of values.

    A file that builds on others need not be complete, so what is needed is said for those without ``defaults`` alone.
    """
    whole = schema()
    lenient: dict[str, Any] = _lenient(whole)
    lenient["properties"] = {"defaults": _DEFAULTS, **lenient["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of ddpkit",
        **{key: value for key, value in lenient.items() if key != "title"},
        "if": {"not": {"required": ["defaults"]}},
        "then": _needed(whole, whole),
    }


def _lenient(node: Any) -> Any:
    """Nothing is required, and where a value is no text anyway, it may be a variable."""
    if isinstance(node, list):
        return [_lenient(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    if "properties" in node:
        children = {key: _lenient(child) for key, child in node["properties"].items()}
        others = {key: value for key, value in node.items() if key not in ("properties", "required")}
        return {"properties": children, **_lenient(others)}
    if "enum" in node or node.get("type") in ("integer", "number", "boolean"):
        about = {key: node[key] for key in ("description", "default", "title") if key in node}
        return {**about, "anyOf": [{key: value for key, value in node.items() if key not in about}, _VARIABLE]}
    return {key: value if key in ("default", "description") else _lenient(value) for key, value in node.items()}


def _needed(node: Schema, whole: Schema) -> dict[str, Any]:
    """The keys that are required, and those inside of sections that are."""
    inside = {key: _needed(_section(node["properties"][key], whole), whole) for key in node.get("required", ())}
    inside = {key: needed for key, needed in inside.items() if needed}
    if not node.get("required"):
        return {}
    return {"required": list(node["required"]), **({"properties": inside} if inside else {})}


# ---------------------------------------------------------------------- for people


def reference() -> str:
    """Every key of a config, with its type, default and meaning, as Markdown."""
    whole = schema()
    return "\n".join([*_tables("", whole, whole), *_table("a factory", "", whole["$defs"]["Factory"], whole)]) + "\n"


def _tables(path: str, section: Schema, whole: Schema) -> Iterator[str]:
    """The table of a section's keys, and those of the sections in it."""
    yield from _table(path, path, section, whole)
    for key, node in section["properties"].items():
        name = f"{path}.{key}" if path else key
        for below, part in (*((name, part) for part in _sections(node, whole)), *_in_list(name, node, whole)):
            yield from _tables(below, part, whole)


def _table(heading: str, path: str, section: Schema, whole: Schema) -> Iterator[str]:
    if heading:
        yield from (f"### {heading}", "", section["description"], "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    required = section.get("required", ())
    for key, node in section["properties"].items():
        name = f"{path}.{key}" if path else key
        default = "needed" if key in required else _default(node)
        meaning = node.get("description") or _section(node, whole)["description"]
        yield f"| `{name}` | {_type(node, whole)} | {default} | {_cell(meaning)} |"
    yield ""


def _in_list(name: str, node: Schema, whole: Schema) -> list[tuple[str, Schema]]:
    return [(f"{name}.N", part) for part in _sections(node.get("items", {}), whole)]


def _sections(node: Schema, whole: Schema) -> list[Schema]:
    """The sections that a value may be, factories aside: they are all alike."""
    found = [_section(option, whole) for option in _alternatives(node)]
    return [option for option in found if "properties" in option and not _is_factory(option)]


def _section(node: Schema, whole: Schema) -> Schema:
    found: Schema = whole["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    return found


def _is_factory(section: Schema) -> bool:
    return list(section.get("properties", ())) == ["factory", "args"]


def _type(node: Schema, whole: Schema) -> str:
    return " or ".join(dict.fromkeys(_kind(option, whole) for option in _alternatives(node)))


def _alternatives(node: Schema) -> list[Schema]:
    found: list[Schema] = node.get("anyOf") or node.get("oneOf") or [node]
    return found


def _kind(node: Schema, whole: Schema) -> str:
    """One alternative of a type in words."""
    found = _section(node, whole)
    if "enum" in found or "const" in found:
        return " or ".join(f"`{choice}`" for choice in found.get("enum", [found.get("const")]))
    if "properties" in found:
        return "a factory" if _is_factory(found) else "a section"
    if found.get("type") == "array":
        return f"a list of {_plural(_type(found['items'], whole))}"
    if found.get("type") == "object":
        values = _type(found.get("additionalProperties", {}), whole)
        return "a mapping" if values == _ANYTHING else f"a mapping of names to {_plural(values)}"
    if "format" in found:
        return f"a {found['format']}"
    return _WORDS.get(found.get("type", ""), _ANYTHING) + _bounds(found)


def _plural(kind: str) -> str:
    return " or ".join(_PLURALS.get(word, word) for word in kind.split(" or "))


def _bounds(node: Schema) -> str:
    words = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maximum": "<="}
    stated = [f"{word} {node[key]:g}" for key, word in words.items() if key in node and node[key] < 2**31]
    return f" {', '.join(stated)}" if stated else ""


def _default(node: Schema) -> str:
    is_section = "default" not in node or (isinstance(node["default"], dict) and node["default"])
    return "as below" if is_section else f"`{_inline(node['default'])}`"


def _inline(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else yaml_files.dump(value).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
