"""The results of a study: one file of JSON lines, a row for each finished run.

A file has two kinds of lines. ``study`` says what all runs have in common: the name of the study, its size, and the
settings that every run shares. ``run`` is one run: case, seed, settings, figures, date, machine and git state. Each
line is complete, so two files of the same study are joined by ``cat``. Of two rows of the same case and seed the first
counts.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.journal import Journal, read
from bench.machine import cpu_model, git_state, versions

Figures = dict[str, Any]
Row = dict[str, Any]


class StudyError(Exception):
    """A study cannot run like this; the message says why and what to do."""


class MissingError(StudyError):
    """A choice depends on a run that is not finished."""


@dataclass(frozen=True)
class Case:
    """One run of a study.

    Attributes:
        name: unique among the cases of a seed.
        seed: of everything random in the run.
        settings: what makes this case different from the others, as JSON.
        run: computes the figures. It is called only if the results have no row of this case and seed.
    """

    name: str
    seed: int
    settings: Mapping[str, Any]
    run: Callable[[], Figures] = field(repr=False, compare=False)


class Results:
    """The rows of a study, in memory and on disk.

    Args:
        path: the file. It may not exist yet.

    Attributes:
        study: the ``study`` line, empty before :meth:`begin`.
        rows: the ``run`` lines in the order of the file, each case and seed once.

    Raises:
        StudyError: if the file joins results that were made with different settings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study: dict[str, Any] = {}
        self._rows: dict[tuple[str, int], Row] = {}
        self._journal: Journal | None = None
        for record in read(path, "study", "run"):
            if record["kind"] == "study":
                self._check_study(record)
            else:
                self._rows.setdefault((record["case"], record["seed"]), record)

    @property
    def rows(self) -> list[Row]:
        """The rows."""
        return list(self._rows.values())

    @functools.cached_property
    def _git(self) -> dict[str, Any]:
        """The state of the checkout that this process was started from."""
        return git_state()

    def begin(self, name: str, size: str, settings: Mapping[str, Any]) -> None:
        """Write what all runs have in common, or check it if the file has it already.

        Raises:
            StudyError: if the file was made by another study, in another size, or with other settings.
        """
        before, _ = self.study, self._git
        record = _as_json({"kind": "study", "study": name, "size": size, "settings": settings})
        self._check_study(record)
        if not before:
            self._write(record)

    def figures(self, name: str, seed: int) -> Figures:
        """Return the figures of a finished run.

        Raises:
            MissingError: if it is not finished.
        """
        try:
            found: Figures = self._rows[name, seed]["figures"]
        except KeyError:
            raise MissingError(
                f"a choice depends on seed {seed}, {name}, which is not finished; run that first"
            ) from None
        return found

    def has(self, case: Case) -> bool:
        """Whether a case is finished.

        Raises:
            StudyError: if it is, but with other settings.
        """
        row = self._rows.get((case.name, case.seed))
        if row is None:
            return False
        self._compare(f"seed {case.seed}, {case.name}", row["settings"], _as_json(case.settings))
        return True

    def add(self, case: Case, figures: Figures) -> Row:
        """Write the row of a finished run, and wait until it is on disk."""
        row = _as_json({
            "kind": "run", "case": case.name, "seed": case.seed, "settings": case.settings, "figures": figures,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "machine": machine(),
            "git": self._git,
        })  # fmt: skip
        self._write(row)
        self._rows[case.name, case.seed] = row
        return row

    def _write(self, record: dict[str, Any]) -> None:
        if self._journal is None:
            self._journal = Journal(self.path)
        self._journal.write(record["kind"], {k: v for k, v in record.items() if k != "kind"})

    def _check_study(self, record: dict[str, Any]) -> None:
        if self.study:
            for name in ("study", "size"):
                self._compare("the study", {name: self.study[name]}, {name: record[name]})
            self._compare("the study", self.study["settings"], record["settings"])
        else:
            self.study = record

    def _compare(self, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse settings that differ. One that only one of the two has was added or removed by a later version."""
        for name in before.keys() & now.keys():
            old, new = before[name], now[name]
            if isinstance(old, dict) and isinstance(new, dict):
                self._compare(f"{what}, {name}", old, new)
            elif old != new:
                raise StudyError(
                    f"{self.path} has results of {what} with {name} = {old}, this run has {new}; give another --out"
                )


def machine() -> dict[str, Any]:
    """Return what a run was made on: device, threads, load and versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else cpu_model(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "versions": versions(),
    }


def _as_json(value: Any) -> Any:
    """Return a value as it is read again: tuples are lists, and numbers that are not finite are None."""
    return json.loads(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
