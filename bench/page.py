"""Results as an HTML page: ``python -m bench --html`` while it runs, ``python -m bench.page`` from files of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qatkernels.page import Markup, Page, facts, folded, paragraph, table, tag

from .report import HEADER, cells, floor_text, noise_text, peak_text
from .run import Row

#: Cases of a suite up to which its tables are shown without a click.
_FEW_CASES = 12

_HOW = (
    "Each table is one task, done by several implementations in turn. Times are medians, with the range from the 10th "
    "to the 90th percentile; shorter is better. In the picture the bar is the median and the thin line that range; the "
    "dotted line is the floor: a copy of as many bytes as the task must move, or its matrix products at the rate of a "
    "large one. Of floor is floor / median: 100% is as fast as that. Error is the largest of any element against a "
    "float64 reference; a wrong result has no time."
)


def page(documents: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the page of documents of results (:func:`bench.report.document`)."""
    names = list(dict.fromkeys(document["device"]["name"] for document in documents))
    rows = [row for document in documents for row in document["rows"]]
    drawn = Page(
        "Benchmarks" + (f" on {', '.join(names)}" if names else ""),
        f"{len(_by_case(rows))} cases, {sum(row['status'] == 'ok' for row in rows)} timings",
    )
    drawn.add("Suites", *_overview(rows), paragraph(_HOW))
    for suite, of_suite in _grouped(rows, "suite").items():
        drawn.add(f"Suite {suite}", *_cases(of_suite))
    for document in documents:
        drawn.add(f"Machine and settings, {', '.join(document['settings']['suites'])}", *_machine(document))
    return drawn.encode()


def _grouped(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["case"]), []).append(row)
    return groups


def _overview(rows: Sequence[Row]) -> list[Markup]:
    """Return a table with a line for each suite: its cases, what went wrong, and how close ours come to the floor."""
    lines, bad = [], []
    for i, (suite, of_suite) in enumerate(_grouped(rows, "suite").items()):
        ours = sorted(row["fraction_of_floor"] for row in of_suite if row["status"] == "ok" and row["kind"] == "ours")
        cases = _by_case(of_suite).values()
        wrong = sum(row["status"] in ("wrong", "failed") for row in of_suite)
        noisy = sum(bool(noise_text(case)) for case in cases)
        middle = f"{ours[len(ours) // 2]:.0%}" if ours else None
        lines.append((suite, len(cases), wrong, noisy, middle))
        bad += [i] if wrong else []
    head = ("suite", "cases", "wrong or failed", "noisy cases", "ours of floor, median")
    return [table(head, lines, bad=bad)] if lines else [paragraph("There are no results yet.")]


def _cases(rows: Sequence[Row]) -> list[Markup]:
    cases = _by_case(rows)
    blocks = [_case(case, found) for (_, case), found in cases.items()]
    return blocks if len(blocks) <= _FEW_CASES else [folded(f"{len(blocks)} cases", *blocks)]


def _case(name: str, rows: Sequence[Row]) -> Markup:
    """Return the table of one case, and what there is to say about it."""
    shown = [row for row in rows if row["status"] != "missing"]
    timed = [row for row in shown if row["status"] == "ok"]
    longest = max((row["quantiles_ms"]["p90"] for row in timed), default=0.0)
    lines = []
    for row in shown:
        lead, numbers = cells(row)[:3], cells(row)[3:]
        lines.append((*lead, _bar(row, longest) if row["status"] == "ok" else None, *numbers))
    bad = [i for i, row in enumerate(shown) if row["status"] != "ok"]
    notes = [noise_text(rows), peak_text(rows)]
    notes += [f"missing: {r['implementation']} ({r['timing']}): {r['note']}" for r in rows if r["status"] == "missing"]
    notes += dict.fromkeys(f"{row['implementation']}: {row['note']}" for row in timed if row["note"])
    return Markup(
        tag("h3", name)
        + (tag("p", floor_text(timed[0]), "quiet") if timed else "")
        + table((*HEADER[:3], "time", *HEADER[3:]), lines, words=4, bad=bad)
        + "".join(tag("p", note, "quiet") for note in notes if note)
    )


def _bar(row: Row, longest: float) -> Markup:
    """Return the median as a bar, the 10th to 90th percentile as a thin line, and the floor as a dotted one."""
    ends = (row["median_ms"], row["quantiles_ms"]["p10"], row["quantiles_ms"]["p90"], row["floor_ms"])
    median, low, high, floor = (120 * min(end / longest, 1.0) for end in ends)
    kind = "c0" if row["kind"] == "ours" else "other"
    return Markup(
        f'<svg class="bar {kind}" viewBox="0 0 120 16" preserveAspectRatio="none" role="img" '
        f'aria-label="{row["median_ms"]:.4g} ms"><path class="fill" d="M0 3H{median:.1f}V13H0z"/>'
        f'<path class="spread" d="M{low:.1f} 8H{high:.1f}"/><path class="stop" d="M{floor:.1f} 0V16"/></svg>'
    )


def _machine(document: Mapping[str, Any]) -> list[Markup]:
    plain = {key: value for key, value in document.items() if key not in ("rows", "schema")}
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= {f"{key}: {name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return [facts({name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in flat.items()})]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of files of results."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description="Show files of results as one HTML page.")
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="file that `python -m bench` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page; one file, needs no network")
    options = parser.parse_args(argv)
    documents = []
    for path in options.results:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            parser.error(f"{path} cannot be read ({problem})")
        if not isinstance(document, dict) or not {"device", "settings", "rows"} <= document.keys():
            parser.error(f"{path} holds no rows of `python -m bench`; give a file that it wrote")
        documents.append(document)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(page(documents))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
