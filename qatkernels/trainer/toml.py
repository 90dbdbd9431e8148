"""A run's settings in a TOML file: the fields of the configuration, plain or under the groups that `--help` shows."""

from __future__ import annotations

import difflib
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from .config import ConfigError, TrainConfig, check_type

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file, by field of :class:`TrainConfig`.

    Args:
        path: such as ``qat-lr = 1e-3`` in the table ``[training]``, or in none; ``_`` and ``-`` are the same.

    Raises:
        ConfigError: if the file cannot be read, a name is not known, or a value is of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8, and of too many brackets
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    known = {entry.name: entry for entry in fields(TrainConfig)}
    groups = {entry.metadata["group"] for entry in known.values()}
    given: dict[str, Any] = {}
    for name, value in found.items():
        is_group = isinstance(value, dict) and name in groups
        if name in groups and isinstance(value, list) and any(isinstance(part, dict) for part in value):
            raise ConfigError(f"--config {path} has [[{name}]], must be one table, [{name}]")
        for key, setting in value.items() if is_group else [(name, value)]:
            field = key.replace("-", "_")
            if field not in known:
                raise ConfigError(
                    f"--config {path} sets {key!r}, which is not known{_nearest(field, [*known, *groups])}"
                )
            if field in given:
                raise ConfigError(f"--config {path} sets {key!r} twice")
            if is_group and known[field].metadata["group"] != name:
                where = known[field].metadata["group"]
                raise ConfigError(f"--config {path} sets {key!r} in [{name}], must be in [{where}] or before any table")
            given[field] = _value(path, known[field], setting)
    return given


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""


def _value(path: str | Path, entry: Field[Any], value: Any) -> Any:
    """Return a value in the type of its field; numbers may also be written as on the command line, such as "10M"."""
    parse = entry.metadata["parse"]
    try:
        if isinstance(entry.default, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        elif parse is not None and not isinstance(value, bool):
            value = parse(str(value))
        elif isinstance(entry.default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (ValueError, OverflowError):
        pass  # not what it is annotated with, or without a float: its type and its range say so
    try:
        check_type(entry.name, str(entry.type), value)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {str(error).removeprefix('--')}") from error
    return value
