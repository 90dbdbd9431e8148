"""How the launchers of this package are entered."""

from __future__ import annotations

import functools

from ..registry import implements

#: ``@launches("<op>")`` enters a function as what launches the kernels of an op.
launches = functools.partial(implements, backend="triton")
