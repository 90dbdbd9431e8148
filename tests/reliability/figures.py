"""The tables of docs/reliability.md, from the JSON files in bench/results: `python -m tests.reliability.figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "bench" / "results"
#: Columns of the table of each part: heading, and name of the field in the file, which the runner prints too.
COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "mutations": (("cases", "cases"), ("refused", "refused"), ("read, and right", "right"), ("wrong", "wrong")),
    "kills": (
        ("runs", "cases"), ("kills", "kills"), ("at a moment", "moment"),
        ("while a file was written", "while a file was written"), ("at a call", "call"),
    ),
    "memory": (
        ("steps", "steps"), ("bytes a step", "bytes a step"), ("± its error", "standard error"),
        ("tensors gained", "tensors gained"), ("pool gained, bytes", "pool gained"),
    ),
    "random": (("calls", "cases"), ("wrong", "wrong")),
    "threads": (("threads", "threads"), ("ops", "ops"), ("calls", "calls")),
    "forks": (("forks", "forks"), ("calls in each child", "calls in each child")),
    "sanitizers": (("tests", "tests"), ("outcome", "outcome"), ("reports", "reports")),
}  # fmt: skip


def table(part: str) -> str:
    """Return the table of a part in Markdown, with the machines of its figures."""
    path = RESULTS / f"reliability-{part}.json"
    if not path.exists():
        return "Not run yet.\n"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"]
    columns = [*COLUMNS[part], ("wrong in all", "failures"), ("seconds", "seconds"), ("seed", "seed")]
    columns = [c for c in columns if c[1] != "failures" or not any(field == "wrong" for _, field in COLUMNS[part])]
    lines = ["| | " + " | ".join(heading for heading, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, found in results.items():
        known = {**found, "failures": len(found["failures"]), "seed": str(found["about"]["seed"])}
        lines.append(f"| `{name}` | " + " | ".join(_cell(known[field]) for _, field in columns) + " |")
    machines: dict[str, None] = {}
    for found in results.values():
        about = found["about"]
        isas = ", ".join(found.get("isas", [])) or about["build"]["isa"]
        machines[
            f"{about['cpu']}, {about['cores']} cores, ISA {isas}, torch {about['versions']['torch']}, "
            f"{about['date'][:10]}, commit {about['git']['commit'][:10]}, load before {about['load_before']:g}"
        ] = None
    return "\n".join(lines) + "\n\n" + "\n".join(f"On {text}." for text in machines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def written(text: str) -> str:
    """Return a page with its tables updated from the files."""
    for part in COLUMNS:
        begin, end = f"<!-- figures: {part} -->\n", f"<!-- end: {part} -->"
        before, rest = text.split(begin)
        text = before + begin + table(part) + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
