"""Reads the settings of a run from a TOML file, with or without the tables that `--help` shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..options import ConfigError, Setting, check_type, nearest, plain_type, settings_of
from .config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file, by name of the field of :class:`TrainConfig`.

    Args:
        path: the file. It has lines such as ``qat-lr = 1e-3``, in the table ``[training]`` or before any table. ``_``
            and ``-`` in names are equivalent.

    Raises:
        ConfigError: if the file cannot be read, there is no setting of a name, or a value has the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8, or nested too deeply
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    known = settings_of(TrainConfig)
    tables = {setting.table for setting in known.values()}
    given: dict[str, Any] = {}
    for name, value in content.items():
        is_table = isinstance(value, dict) and name in tables
        if name in tables and isinstance(value, list) and any(isinstance(part, dict) for part in value):
            raise ConfigError(f"--config {path} has [[{name}]], must be one table, [{name}]")
        for key, setting_value in value.items() if is_table else [(name, value)]:
            setting = key.replace("-", "_")
            if setting not in known:
                raise ConfigError(
                    f"--config {path} sets {key!r}, which is not known{nearest(setting, [*known, *tables])}"
                )
            if setting in given:
                raise ConfigError(f"--config {path} sets {key!r} twice")
            if is_table and known[setting].table != name:
                where = known[setting].table
                raise ConfigError(f"--config {path} sets {key!r} in [{name}], must be in [{where}] or before any table")
            given[setting] = _value(path, setting, known[setting], setting_value)
    return given


def _value(path: str | Path, name: str, setting: Setting, value: Any) -> Any:
    """Return a value in the type of its setting. Numbers may be strings as on the command line, such as "10M"."""
    parse = setting.field.metadata["parse"]
    try:
        if isinstance(setting.field.default, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        elif parse is not None and not isinstance(value, bool):
            value = parse(str(value))
        elif isinstance(value, str) and plain_type(setting.hint) in (int, float):
            value = plain_type(setting.hint)(value)
        elif plain_type(setting.hint) is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (ValueError, OverflowError):
        pass  # the value cannot be converted; the checks of its type and range below raise the error
    try:
        check_type(name, setting, value)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {str(error).removeprefix('--')}") from error
    return value
