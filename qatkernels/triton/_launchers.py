"""The launchers of this package, by the op that each implements."""

from __future__ import annotations

from collections.abc import Callable

Launcher = Callable[..., None]

#: What launches the kernels of an op: its ``_out`` form, or the op itself if it works in place.
LAUNCHERS: dict[str, Launcher] = {}


def launches(op: str) -> Callable[[Launcher], Launcher]:
    """Register the decorated function as the launcher of an op; it is called as the contract of the op says."""

    def register(launcher: Launcher) -> Launcher:
        LAUNCHERS[op] = launcher
        return launcher

    return register
