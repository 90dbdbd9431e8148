"""Names at their old places: they still work in this version, with a DeprecationWarning that says the new place."""

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
    """Return the ``__getattr__`` of a module from which names moved.

    Args:
        old: name of the module.
        names: the module that each name is in now.
        modules: modules that were in this one, by name: what they are called now.
        renamed: names that are others in the same module.
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
