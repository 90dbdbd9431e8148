"""Progress output: a bar on a terminal, and lines of text everywhere."""

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
    """Shows the progress of work in equal units, and estimates the remaining time.

    Args:
        total: units of work.
        unit: their name, such as ``"steps"``.
        say: called with each line instead of printing it.

    Attributes:
        say: prints a line.
        done: units done so far, including those of earlier processes.
        left: the remaining time as text.
        has_bar: whether a bar is shown on a terminal.
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
        self._total, self._unit, self._done_by_this_process = total, unit, 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, note="")
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, done: int = 0) -> None:
        """Start a part of the work.

        Args:
            name: name of the part.
            done: units of it that an earlier process has done.
        """
        self.done += done
        self._bar.update(self._task, completed=self.done, description=name)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count units, and show a note beside the bar."""
        self.done, self._done_by_this_process = self.done + units, self._done_by_this_process + units
        seconds_per_unit = (time.perf_counter() - self._began) / self._done_by_this_process
        seconds = seconds_per_unit * (self._total - self.done)
        self.left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        note = f"{self.done}/{self._total} {self._unit}, {note}{self.left}"
        self._bar.update(self._task, completed=self.done, note=note)


class TrainingDisplay(Display):
    """The display of a training run. Without a bar it prints one line per evaluation.

    Args:
        total: steps of all phases.
        say: called with each line instead of printing it.
    """

    def __init__(self, total: int, say: Callable[[str], None] | None = None) -> None:
        super().__init__(total, "steps", say)
        self._held_out = ""

    def begin(self, name: str, done: int = 0) -> None:
        """Start a phase; ``done`` is the number of steps that an earlier process has taken."""
        self._held_out = ""
        if done:
            self.say(f"{name:<6} {done} steps were done before")
        super().begin(name, done)

    def step(self, phase: str, entry: dict[str, Any], rate: float) -> None:
        """Show one step.

        Args:
            phase: name of the phase.
            entry: the log entry of the step.
            rate: tokens per second in this phase.
        """
        speed = f"{human(rate)} tokens/s, "
        if "held_out" in entry:
            self._held_out = f"{entry['held_out']:.3f} bits/byte held out, "
        self.advance(1, self._held_out + speed)
        if "held_out" in entry and not self.has_bar:
            self.say(f"{phase:<6} step {entry['step']:>5}  {self._held_out}{speed}{self.left}")

    def end(self, result: dict[str, Any]) -> None:
        """Announce the end of a phase."""
        before = "" if result["bits"] is None else f" (round-to-nearest {result['start_bits_per_byte']:.3f})"
        speed = f", {human(result['tokens_per_second'])} tokens/s" if result["steps"] else ""
        self.say(f"{result['phase']:<6} done: {result['bits_per_byte']:.3f} bits/byte held out{before}{speed}")
