"""Progress: a bar on a terminal, and lines everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..units import human

if TYPE_CHECKING:
    from typing_extensions import Self


class Display:
    """What has been done of work that consists of many equal units, and how long the rest will take.

    Args:
        total: units of work.
        unit: what they are called.
        say: receives lines instead of the terminal.

    Attributes:
        say: prints a line.
        done: units so far, with those of earlier processes.
        left: how much time is left, in words.
        has_bar: whether there is a terminal with a bar on it.
    """

    def __init__(self, total: int, unit: str, say: Callable[[str], None] | None = None) -> None:
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[note]}"),
            console=console, transient=True, disable=say is not None or not console.is_terminal,
        )  # fmt: skip
        self.say = say or (lambda line: self._bar.console.print(line, soft_wrap=True))
        self.has_bar = not self._bar.disable
        self.done, self.left = 0, ""
        self._total, self._unit, self._here = total, unit, 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, note="")
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, done: int = 0) -> None:
        """Start a part of the work, of which an earlier process has done so many units."""
        self.done += done
        self._bar.update(self._task, completed=self.done, description=name)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count units, and show a note beside the bar."""
        self.done, self._here = self.done + units, self._here + units
        seconds = (time.perf_counter() - self._began) / self._here * (self._total - self.done)
        self.left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        note = f"{self.done}/{self._total} {self._unit}, {note}{self.left}"
        self._bar.update(self._task, completed=self.done, note=note)


class TrainingDisplay(Display):
    """The display of a training run: a line for each evaluation where there is no bar.

    Args:
        total: steps of all phases.
        say: receives lines instead of the terminal.
    """

    def __init__(self, total: int, say: Callable[[str], None] | None = None) -> None:
        super().__init__(total, "steps", say)
        self._held_out = ""

    def begin(self, name: str, done: int = 0) -> None:
        """Start a phase of which an earlier process has taken so many steps."""
        self._held_out = ""
        if done:
            self.say(f"{name:<6} {done} steps were done before")
        super().begin(name, done)

    def step(self, phase: str, entry: dict[str, Any], rate: float) -> None:
        """Show one step: the log's entry and the tokens per second of the phase."""
        speed = f"{human(rate)} tokens/s, "
        if "held_out" in entry:
            self._held_out = f"{entry['held_out']:.3f} bits/byte held out, "
        self.advance(1, self._held_out + speed)
        if "held_out" in entry and not self.has_bar:
            self.say(f"{phase:<6} step {entry['step']:>5}  {self._held_out}{speed}{self.left}")

    def end(self, result: dict[str, Any]) -> None:
        """Announce the end of a phase."""
        before = "" if result["bits"] is None else f" (round-to-nearest {result['start_bits_per_byte']:.3f})"
        self.say(
            f"{result['phase']:<6} done: {result['bits_per_byte']:.3f} bits/byte held out{before}, "
            f"{human(result['tokens_per_second'])} tokens/s"
        )
