"""Shows references of docstrings, such as ``:class:`QuantLinear```, as code. Docstrings are written for Sphinx too."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`<]*?)`")


class Roles(griffe.Extension):
    """Rewrites docstrings when they are loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
