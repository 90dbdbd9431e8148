"""The launchers of this package, by the op that each implements."""

from __future__ import annotations

from collections.abc import Callable

from ..ops._op import OPS, canonical

Launcher = Callable[..., None]

#: What launches the kernels of an op: its ``_out`` form, or the op itself if it works in place.
LAUNCHERS: dict[str, Launcher] = {}


def launches(op: str, *, any_strides: tuple[str, ...] = ()) -> Callable[[Launcher], Launcher]:
    """Register the decorated function as the launcher of an op, and have it called with contiguous tensors.

    Args:
        op: name of the op.
        any_strides: names of arguments that its kernels take as they are, because they read the strides.
    """

    def register(launcher: Launcher) -> Launcher:
        LAUNCHERS[op] = canonical(OPS[op], launcher, any_strides)
        return LAUNCHERS[op]

    return register
