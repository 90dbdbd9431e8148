"""Import of results: from the journals of calls to files in bench/results, tables of the docs, and a summary."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..journal import Record, read
from ..machine import slug
from ..report import document, save
from ..run import Row
from . import smoke, tables
from .target import LAST

_JOURNAL = "journal.jsonl"
#: Maximum lines of a part of a summary. Only the end of a call's output is shown, so it must be short.
_MOST = 30


def bring_home(folders: Sequence[Path], results: Path, docs: Path, last: Path = LAST) -> list[Path]:
    """Write the results of calls to files of the repository.

    Args:
        folders: folders of calls on one device, the earliest first; a case that was run again replaces the earlier one.
        results: where the files go: ``<suite>-<device>.json`` in the format of the benchmarks, and
            ``gpu-checks-<device>.json`` for what was checked without being timed.
        docs: page whose tables are made again.
        last: where the last journal is kept for a second call.

    Returns:
        The files.

    Raises:
        SystemExit: if a folder has no journal, or no rows of a device.
    """
    journals = [_journal(folder) for folder in folders]
    records = [record for journal in journals for record in read(journal)]
    machines = [r for r in records if r["kind"] == "machine"]
    if not machines:
        raise SystemExit(f"{journals[0]} has no machine: no row was timed")
    if len({m["device"]["name"] for m in machines}) > 1:
        raise SystemExit(f"the calls ran on different devices: {sorted({m['device']['name'] for m in machines})}")
    if any(m["settings"]["quick"] for m in machines):
        raise SystemExit("these are rows of a dry run: nothing to bring home")
    described = {k: v for k, v in machines[-1].items() if k not in ("kind", "settings")}
    for machine in machines:
        described["products_tflop_s"] = machine["products_tflop_s"] | described["products_tflop_s"]
    # The GPU machine may have no repository, or one of another commit. The pack names the one that it was made from.
    packs = [r for r in records if r["kind"] == "pack" and r.get("git")]
    if packs:
        described["git"] = packs[-1]["git"]
    device = slug(described["device"]["name"])
    by_suite: dict[str, list[Row]] = {}
    for row in latest_rows(records):
        by_suite.setdefault(row["suite"], []).append(row)
    written = []
    for suite, rows in by_suite.items():
        settings = {**machines[-1]["settings"], "suites": [suite]}
        written.append(save(document(rows, described, settings), results / f"{suite}-{device}.json"))
    kinds = ("pack", "step", "tests", "test", "cut", "tune")
    calls = [{kind: [_bare(r) for r in read(journal, kind)] for kind in kinds} for journal in journals]
    checks: dict[str, Any] = {"calls": calls}
    checks["smoke"] = [_bare(r) for r in smoke.outcomes_of(records).values()]
    written.append(save({"schema": 1, **described, **checks}, results / f"gpu-checks-{device}.json"))
    for folder in folders:
        if (profile := folder / "ncu.txt").exists():
            written.append(Path(shutil.copyfile(profile, results / f"ncu-{device}.txt")))
    tables.update(docs, results)
    last.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(journals[-1], last)
    return written


def _journal(folder: Path) -> Path:
    journal = folder / _JOURNAL
    if not journal.exists():
        raise SystemExit(f"{folder} has no {_JOURNAL}: is it the folder of a call?")
    return journal


def _bare(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "kind"}


def latest_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yield the rows of each case; of a case that ran several times, those of the last time that gave rows."""
    found: dict[str, list[list[Row]]] = {}
    for record in records:
        if record["kind"] == "begin":
            found.setdefault(record["key"], []).append([])
        elif record["kind"] == "row":
            found.setdefault(record["key"], [[]])[-1].append(record["row"])
    for key, times in found.items():
        rows = next((rows for rows in reversed(times) if rows), None)
        if rows is None:
            rows = [{"case": key, "note": "begun, and nothing came of it", "status": "failed"}]
        for row in rows:
            yield {"suite": key.split()[0], "case": key, "implementation": "", "timing": "", "kind": "ours"} | row


def summary(folder: Path) -> str:
    """Return the summary of a call: its steps, the rows as tables, and what failed."""
    records = read(_journal(folder))
    parts = [_steps(records), _smoke(records), _tests(records)]
    machines = [r for r in records if r["kind"] == "machine"]
    if machines:
        bandwidth: float = machines[-1]["bandwidth_gb_s"]
        rates = machines[-1]["products_tflop_s"]
        parts.append(f"{machines[-1]['device']['name']}: copies {bandwidth:.0f} GB/s, products {rates} TFLOP/s")
        parts += tables.sections([_complete(row) for row in latest_rows(records)], bandwidth * 1e9)
    parts += [f"out of time: {r['suite']} from case {r['before']} on" for r in records if r["kind"] == "cut"]
    # Failures come last, because the beginning of long output is cut off.
    return "\n\n".join([*parts[3:], *parts[:3]])


def _complete(row: Row) -> Row:
    return {"op": "", "shape": [], "dtype": "", "grid": "", "granularity": "", "variant": ""} | row


def _steps(records: Sequence[Record]) -> str:
    lines = [f"{r['name']:28} {r['status']:18} {r['seconds']:6.1f} s" for r in records if r["kind"] == "step"]
    packs = [f"pack: {r['status']} {r.get('note', '')}".rstrip() for r in records if r["kind"] == "pack"]
    return "\n".join(["steps:", *packs, *lines])


def _smoke(records: Sequence[Record]) -> str:
    found = smoke.outcomes_of(records).values()
    bad = [f"  {r['op']} {r['name']} on {r['backend']} {r['under']}: {r['status']} {r.get('note', '')}"
           for r in found if r["status"] != "ok"]  # fmt: skip
    return "\n".join([f"smoke: {len(found)} checks, {len(bad)} not right", *bad[:_MOST]])


def _tests(records: Sequence[Record]) -> str:
    totals: list[dict[str, Any]] = [r for r in records if r["kind"] == "tests"]
    if not totals:
        return "tests: none ran"
    t = totals[-1]
    bad = [f"  {r['id']}: {(r['note'].strip().splitlines() or [''])[-1][:150]}" for r in records if r["kind"] == "test"]
    state = "" if t["finished"] else ", not finished"
    return "\n".join(
        [
            f"tests: {t['passed']} passed, {t['failed']} failed, {t['skipped']} skipped in {t['seconds']} s{state}",
            *bad[:_MOST],
        ]
    )
