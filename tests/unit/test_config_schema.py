"""The config's types speak for themselves: to editors, and to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ddpkit import config_schema, yaml_files
from tests.unit.test_config import CONTRACT, FULL, MINIMAL

ROOT = Path(__file__).parents[2]


def mistakes(text: str) -> list[str]:
    tree: Any = yaml_files.parse(text, "x").plain()
    errors = jsonschema.Draft202012Validator(config_schema.editor_schema()).iter_errors(tree)
    return list(dict.fromkeys(error.json_path for error in errors))  # a key may be wrong in several ways


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL,
        FULL,
        CONTRACT,
        (ROOT / "configs/digits.yaml").read_text(),
        "defaults: [base, {model: resnet}, _self_]\nseed: 1\nmodel: {compile: true}\n",
        MINIMAL + "seed: ${env:SEED}\nlaunch: {start_method: '${oc.env:HOW,warm}', snapshot: '${env:S}'}\n",
    ],
)
def test_editors_accept_what_ddpkit_accepts(text: str) -> None:
    assert mistakes(text) == []


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (MINIMAL + "sed: 1\n", "$"),
        (MINIMAL + "seed: x\n", "$.seed"),
        (MINIMAL + "seed: ${seed}\n", "$.seed"),
        (MINIMAL.replace("global_batch_size: 64", "shuffle: true"), "$.data"),
        (MINIMAL.replace('{factory: "pkg.models:build"}', "{compile: 1, factory: a}"), "$.model.compile"),
        ("defaults: base\n", "$.defaults"),
        ("defaults: [base]\nlaunch: {nodes: 1}\n", "$.launch"),
    ],
)
def test_editors_see_what_ddpkit_refuses(text: str, path: str) -> None:
    assert mistakes(text) == [path]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(config_schema.editor_schema())


def test_the_page_on_the_config_is_what_the_types_say() -> None:
    written = (ROOT / "docs/config.md").read_text()
    _, mark, keys = written.partition("(Printed by `ddpkit schema --markdown` from here on.)\n\n")
    assert mark
    assert keys == config_schema.reference() + "\n", "put what `ddpkit schema --markdown` prints into docs/config.md"


def test_every_key_has_its_row() -> None:
    lines = config_schema.reference().splitlines()
    assert "| `seed` | an integer >= 0 | `0` | What all randomness of the run follows from. |" in lines
    rows = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert {"model.init_from.rename", "optimizer.groups.N.params", "train.eval_every.steps", "factory"} <= rows
