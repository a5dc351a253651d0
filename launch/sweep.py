"""A sweep: a run for each combination of values, each with a config and a directory of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import JsonValue

from ddpkit import yaml_files
from ddpkit.config import Config
from ddpkit.errors import ConfigError

_LONGEST_VALUE = 40
_LONGEST_NAME = 150  # of the 255 bytes that a file system takes


def runs(sweeps: Sequence[str], load: Callable[[list[str]], Config]) -> list[Config]:
    """Give the config of each run; its directory is a folder in that of the config, called by the chosen values.

    Args:
        sweeps: ``key.path=[value, ...]``, each.
        load: gives the config with these overrides, checked.

    Raises:
        ConfigError: one of them has another form, or a config that comes of it is wrong.
    """
    axes = [_axis(sweep) for sweep in sweeps]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--sweep {key}: given twice; give all its values in one list")
    configs = []
    for chosen in itertools.product(*(values for _, values in axes)):
        pairs = list(zip(keys, chosen, strict=True))
        config = load([f"{key}={yaml_files.dump(value).rstrip()}" for key, value in pairs])
        configs.append(config.model_copy(update={"run_dir": str(Path(config.run_dir) / _name(pairs))}))
    return configs


def _axis(sweep: str) -> tuple[str, list[JsonValue]]:
    key, equals, text = sweep.partition("=")
    key = key.strip()
    values = yaml_files.parse(text, f"--sweep {sweep}", numbered=False).plain() if equals else None
    if not key or not isinstance(values, list) or not values:
        raise ConfigError(f"--sweep {sweep}: expected key.path=[value, value], such as optimizer.args.lr=[0.1, 0.01]")
    if key == "run_dir" or key.split(".")[0] == "launch":
        raise ConfigError(
            f"--sweep {key}: the runs of a sweep are one array of jobs, all alike; give it by -o, for all"
        )
    if len({repr(value) for value in values}) < len(values):
        raise ConfigError(f"--sweep {sweep}: a value is there twice")
    return key, values


def _name(pairs: Sequence[tuple[str, JsonValue]]) -> str:
    """``lr=0.1,seed=2``: a name that any file system takes, and no two runs share."""
    full = ",".join(f"{key}={_word(value)}" for key, value in pairs)
    short = ",".join(f"{key}={_tidy(_word(value))[:_LONGEST_VALUE]}" for key, value in pairs)[:_LONGEST_NAME]
    return short if short == full else f"{short}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _word(value: JsonValue) -> str:
    return yaml_files.dump(value).strip()  # 1 and "1" are two


def _tidy(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
