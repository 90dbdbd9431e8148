"""The committed results: they are what the studies go on from, and the tables of the documents come from them."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bench.markdown import block
from qatkernels.plan.fit import select
from studies import plan_report
from studies.results import Results
from studies.runner import Session, Study, marks, page_text, parser_of, studies

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "results").glob("*/*.jsonl"))
#: Which page has the tables that a study's report wrote (`python -m studies NAME --report --page docs/PAGE`).
PAGES = {
    "adapters": "tutorial-lora.md", "formats": "formats.md", "initial_scales": "quantize-model.md",
    "loading": "packing.md", "plan": "planner.md", "smollm2": "real-model.md", "squat": "reproduction.md",
    "traffic": "distributed.md", "winq": "reproduction.md", "winq_rounding": "reproduction.md",
    "winq_why": "reproduction.md",
}  # fmt: skip


TEXTS = {path.name: path.read_text() for path in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = [(name, *found) for name, text in TEXTS.items()
            for found in re.findall(r"python -m studies (\w+)([^`;#\n]*)", text)]  # fmt: skip


@pytest.mark.parametrize(("page", "name", "arguments"), COMMANDS)
def test_commands_of_the_documents(page: str, name: str, arguments: str) -> None:
    assert name in studies()
    study: Study = importlib.import_module(f"studies.{name}").STUDY
    parser_of(study).parse_args(shlex.split(arguments))


def test_links_to_results() -> None:
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(((?:\.\./bench/|docs/)?results/[^)]*)\)", text):
            assert (ROOT / "docs" / link).exists(), f"{name}: {link}"
    assert len(COMMANDS) > 8


def study_of(path: Path) -> Study:
    study: Study = importlib.import_module(f"studies.{path.stem}").STUDY
    return study


def test_there_are_results() -> None:
    names = {
        "adapters", "formats", "hessian_peers", "initial_scales", "loading", "plan", "plan_recovery", "smollm2",
        "spectra", "squat", "traffic", "winq", "winq_rounding", "winq_why",
    }  # fmt: skip
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_left_to_run(path: Path, tmp_path: Path) -> None:
    """Every case of the default size has its row, with today's settings."""
    study, results = study_of(path), Results(path)
    assert results.study["study"] == study.name
    if study.name == "squat":  # its sentences are downloaded, and read when a case trains
        (tmp_path / "reviews.tsv").write_text("")
    session = Session(study.sizes[results.study["size"]], results, tmp_path / "work", str(tmp_path))
    cases = list(study.cases(session))
    assert cases
    for case in cases:
        assert results.has(case), case.name


def tables(text: str) -> list[str]:
    return re.findall(r"^\|[^-].*\|$", text, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "plan"])
def test_documents_have_what_the_report_wrote(name: str, tmp_path: Path) -> None:
    path, page = next(path for path in FILES if path.stem == name), ROOT / "docs" / PAGES[name]
    results = Results(path)
    text = page_text(results, page, study_of(path).report(results, tmp_path))
    assert block(*marks(name), text) in page.read_text()


@pytest.mark.parametrize("name", ["lsq-2-float16", "seq-4-float32"])
def test_exports_are_what_the_table_says(name: str, tmp_path: Path) -> None:
    """Two of the cases run again, without ONNX, which takes longest."""
    path = next(path for path in FILES if path.stem == "formats")
    committed = Results(path).figures(name, 0)
    study = study_of(path)
    size = {**study.sizes["full"], "formats": ("gguf", "compressed-tensors", "mlx")}
    session = Session(size, Results(tmp_path / "new.jsonl"), tmp_path)
    found = next(case for case in study.cases(session) if case.name == name).run()
    assert found.keys() == committed.keys()
    for group, cells in found.items():
        for to, cell in cells.items():
            wanted = {**committed[group][to]}
            assert cell.pop("error", 0) == pytest.approx(wanted.pop("error", 0), rel=1e-3), (group, to)
            assert cell == wanted, (group, to)


def test_the_planners_table(tmp_path: Path) -> None:
    """runs.csv is what the report writes, and the comparison of schedules is that of the page; a fit takes too long."""
    path = next(path for path in FILES if path.stem == "plan")
    runs = plan_report.table(Results(path))
    assert plan_report.as_csv(runs) == (path.parent / "runs.csv").read_bytes()
    assert len(select(runs, schedule="classic")["loss"]) > 400
    page = (ROOT / "docs" / PAGES["plan"]).read_text().splitlines()
    lines = tables(plan_report.markdown_of_schedules(plan_report.compare(plan_report.complete(runs))))
    assert len(lines) == 1 + 27
    assert [line for line in lines if line not in page] == []
