"""Old import paths. They still work in this version, with a DeprecationWarning that names the new path."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(
    old: str,
    names: Mapping[str, str],
    modules: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose contents have moved.

    Args:
        old: name of the module.
        names: for each name that moved to another module, that module.
        modules: for each submodule that moved, its new full name.
        renamed: for each name that was renamed within the module, the new name.
    """
    modules, renamed = modules or {}, renamed or {}

    def find(name: str) -> Any:
        if name in names:
            warnings.warn(f"{old}.{name} is now in {names[name]}", DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(names[name]), name)
        if name in modules:
            warnings.warn(f"{old}.{name} is now {modules[name]}", DeprecationWarning, stacklevel=2)
            return importlib.import_module(modules[name])
        if name in renamed:
            warnings.warn(f"{old}.{name} is now {old}.{renamed[name]}", DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(old), renamed[name])
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
