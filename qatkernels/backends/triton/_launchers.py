"""The decorator that registers the launchers of this package."""

from __future__ import annotations

import functools

from ..registry import implements

#: ``@launches("<op>")`` registers a function that launches the kernels of an op.
launches = functools.partial(implements, backend="triton")
