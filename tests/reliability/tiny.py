"""A simple text, and settings of runs that take a fraction of a second, for all parts."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any

#: A model and a training small enough for hundreds of runs.
SETTINGS: dict[str, Any] = {
    "device": "cpu", "precision": "float32", "bits": (2,),
    "width": 16, "depth": 1, "heads": 2, "context": 16, "batch": 4, "steps": 6, "qat_steps": 6,
    "eval_every": 3, "eval_windows": 4, "log_every": 2, "save_every": 2,
}  # fmt: skip


def text(folder: Path) -> Path:
    """Write a file of text and return it."""
    draw = random.Random(0)
    pairs = ((draw.choice(("red", "green", "blue")), draw.randrange(10)) for _ in range(400))
    path = folder / "text.txt"
    path.write_text("".join(f"{colour} is number {n}{n}\n" for colour, n in pairs))
    return path


def options(settings: dict[str, Any]) -> list[str]:
    """Return settings as command line options."""
    listed: list[str] = []
    for name, value in settings.items():
        listed += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return listed


def quietly(call: Any, *arguments: Any) -> tuple[Any, str]:
    """Call a function; return its result and its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        return call(*arguments), said.getvalue()
