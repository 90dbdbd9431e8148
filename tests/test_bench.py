"""The benchmarks run, record what they promise, and never print the speed of a wrong result."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pages import read_page

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="not in a checkout")


def run(code, tmp_path):
    """Run Python in the checkout and return the process and the JSON it wrote to the file named by argv[1]."""
    out = tmp_path / "rows.json"
    process = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert out.exists(), process.stderr
    return process, json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


QUICK = """
import sys
from bench.cli import main

sys.exit(main(["fake_quantize", "--quick", "--device", "cpu", "--out", sys.argv[1]]))
"""


def test_quick_run_records_everything(tmp_path):
    process, document = run(QUICK, tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert document["device"]["name"]
    assert document["threads"] >= 1
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["git"]) == {"commit", "dirty"}
    assert document["bandwidth_gb_s"] > 0
    assert not [text for text in _strings(document) if text.startswith("/")], "a path of this machine"

    rows = document["rows"]
    assert {row["op"] for row in rows} == {
        "fake_quantize", "fake_quantize_backward", "fake_quantize_jvp", "quantize",
    }  # fmt: skip
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert {row["granularity"] for row in rows} == {"per row", "per tensor", "group 32"}
    for case in {row["case"] for row in rows}:
        names = {row["implementation"] for row in rows if row["case"] == case}
        assert {"reference", "copy_", "copy into fresh memory"} <= names
    for row in rows:
        if row["status"] == "missing":
            assert row["note"]
            continue
        assert row["status"] == "ok", row
        q = row["quantiles_ms"]
        ordered = [q[name] for name in ("min", "p10", "p25", "p50", "p75", "p90", "max")]
        assert ordered == sorted(ordered)
        assert q["p50"] == row["median_ms"] > 0
        assert row["repetitions"] >= 3
        assert math.isclose(row["fraction_of_floor"], row["floor_ms"] / row["median_ms"], rel_tol=0.05, abs_tol=1e-4)
        if row["kind"] == "ours":
            assert len(row["errors"]) == len(row["tolerances"])
            assert all(error <= allowed for error, allowed in zip(row["errors"], row["tolerances"], strict=True))
            assert row["speedup_over"]["copy_ (out)"] > 0


def test_second_order_checks_every_case_and_measures_memory(tmp_path):
    process, document = run(QUICK.replace('"fake_quantize", ', '"second_order", "--dtype", "fp32", '), tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = document["rows"]
    assert {row["op"] for row in rows} == {
        "linear forward mode", "gram_schmidt", "cross_entropy_hvp", "cross-entropy double backward",
        "linear cross-entropy double backward",
    }  # fmt: skip
    assert all(row["status"] == "ok" for row in rows if row.get("kind") == "ours")
    assert any(row.get("peak_bytes") is not None for row in rows)


WRONG = """
import sys
import torch
from bench import cli
from bench.case import Call, Case
from bench.suites import SUITES

right = torch.arange(1000.0)
off, unwritten = right.clone(), right.clone()
off[7] += 0.1
unwritten[999] = float("nan")

def fail():
    raise ValueError("no such kernel")

def cases(settings):
    calls = [
        Call("right", lambda: right),
        Call("one off", lambda: off),
        Call("unwritten", lambda: unwritten),
        Call("short", lambda: right[:-1]),
        Call("raises", fail),
        Call("own rule", lambda: off, expected=lambda: (off.double(),)),
    ]
    yield lambda: Case("identity", (1000,), torch.float32, calls, lambda: (right.double(),), (1e-6,), bytes=8000)

SUITES["planted"] = cases
sys.exit(cli.main(["planted", "--quick", "--device", "cpu", "--out", sys.argv[1]]))
"""


def test_wrong_results_are_not_speeds(tmp_path):
    process, document = run(WRONG, tmp_path)
    assert process.returncode == 1
    rows = {row["implementation"]: row for row in document["rows"]}
    statuses = {name: row["status"] for name, row in rows.items() if row["kind"] == "ours"}
    bad = {"one off": "wrong", "unwritten": "wrong", "short": "wrong", "raises": "failed"}
    assert statuses == {"right": "ok", "own rule": "ok", **bad}
    for name in bad:
        assert not [key for key in rows[name] if key.endswith("_ms")]
    printed = {line.split("  ")[1].strip(): line for line in process.stdout.splitlines() if line.startswith("  ")}
    assert "WRONG" in printed["one off"]
    assert "WRONG" not in printed["right"]
    assert "no such kernel" in printed["raises"]


def test_a_code_that_is_off_by_one_is_seen():
    from bench.exact import errors, expected, without_ties
    from bench.suites.fake_quantize import TOLERANCE
    from qatkernels.grids import lsq
    from qatkernels.ops._op import OPS
    from qatkernels.testing.samples import make

    for dtype in (torch.float32, torch.bfloat16):
        for noise in (False, True):
            sample = without_ties(make(lsq(4), (64, 256), dtype, noise=noise))
            args = sample.args("fake_quantize")
            wanted = expected("fake_quantize", sample, args)
            y = OPS["fake_quantize"].reference(*args)
            assert errors(y, wanted)[0] <= TOLERANCE[dtype]
            y[3, 5] += sample.scale[3].to(dtype)
            assert errors(y, wanted)[0] > TOLERANCE[dtype]


def test_no_weight_is_at_a_rounding_tie():
    from bench.exact import avoid_ties
    from qatkernels.testing.samples import GRIDS

    for grid in GRIDS:
        levels = torch.tensor(grid.values)
        ties = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor(grid.passes)]).repeat(2, 1)
        scale = torch.tensor([0.5, 0.3])
        w = avoid_ties(ties * scale[:, None], scale, grid)
        exact, single = w.double() / scale.double()[:, None], w / scale[:, None]
        code = [torch.round(r * grid.steps - grid.offset) for r in (exact, single)]
        assert torch.equal(code[0].float(), code[1])
        for edge in grid.passes:
            assert torch.equal(exact > edge, single > edge)
            assert (exact - edge).abs().min() > 0


def test_calls_take_turns_and_slow_ones_leave():
    from bench.clock import race

    turns = []
    cost = {"quick": 1.0, "slow": 200.0}

    def clock(run):
        return cost[run()]

    def call(name):
        return lambda: turns.append(name) or name

    times = race({name: call(name) for name in cost}, clock, budget=0.5)
    assert turns[:6] == ["quick", "slow"] * 3
    assert len(times["slow"].samples) == 3
    assert len(times["quick"].samples) > 3
    assert times["quick"].median == 1.0


def test_unknown_suite_is_refused(capsys):
    from bench.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["no-such-suite"])
    assert stop.value.code == 2
    assert "no-such-suite" in capsys.readouterr().err


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@pytest.mark.parametrize("name", ["fake_quantize", "grouped", "hessian", "linear", "lowbit", "second_order", "winq"])
def test_every_suite_builds_and_runs_a_case(name):
    """The first case at its quick size: every call of ours runs. Values are compared by the command."""
    from bench.case import Call, Settings
    from bench.suites import SUITES

    settings = Settings(torch.device("cpu"), (torch.float32,), quick=True)
    case = next(SUITES[name](settings))()
    ours = [call for call in case.calls if isinstance(call, Call) and call.kind == "ours"]
    assert ours
    for call in ours:
        call.run()


def test_the_tables_of_cpus_are_those_of_the_results():
    from bench import cpu
    from bench.markdown import DOCS, block

    assert block(cpu.BEGIN, cpu.END, cpu.render(cpu.RESULTS)) in DOCS.read_text()


PAGE = """
import sys
from bench.cli import main

sys.exit(main(["fake_quantize", "--quick", "--device", "cpu", "--out", sys.argv[1], "--html", sys.argv[1] + ".html"]))
"""


def test_the_page_shows_every_row(tmp_path):
    _, document = run(PAGE, tmp_path)
    written = (tmp_path / "rows.json.html").read_bytes()
    page = read_page(written)
    for row in document["rows"]:
        assert row["case"] in page.text
        if row["status"] == "ok":
            assert f"{row['median_ms']:.4g}" in page.words
    for value in (document["git"]["commit"], document["versions"]["torch"], document["device"]["name"]):
        assert f" {value} " in page.text
    # The command that shows files of results writes the same.
    again = tmp_path / "new" / "again.html"
    command = [sys.executable, "-m", "bench.page", str(tmp_path / "rows.json"), "--out", str(again)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert read_page(again.read_bytes()).text.replace(document["date"], "") == page.text.replace(document["date"], "")


def test_the_page_shows_what_went_wrong():
    from bench.page import page

    document = json.loads((ROOT / "bench" / "results" / "hessian-amd-epyc.json").read_text())
    hostile = "<script>alert(1)</script>"
    ok = next(row for row in document["rows"] if row["status"] == "ok" and row["kind"] == "ours")
    noisy = {**ok, "case": "n", "quantiles_ms": {**ok["quantiles_ms"], "p25": 1.0, "p75": 3.0}, "peak_bytes": 2e6}
    document["rows"] = [
        noisy,
        {**ok, "case": hostile, "status": "wrong", "errors": [0.5], "implementation": hostile},
        # What `python -m bench` records for a case that it could not build.
        {"suite": "hessian", "case": hostile, "implementation": "", "timing": "", "status": "failed", "kind": "ours",
         "note": hostile},
        {**ok, "case": hostile, "status": "missing", "note": hostile},
    ]  # fmt: skip
    found = read_page(page([document]))
    assert found.text.count(hostile) == 4
    assert {"WRONG", "FAILED", "NOISY"} <= found.words
    assert "spans a factor of 3.0" in found.text
    assert "peak memory: " in found.text
    assert "hessian 2 2 1" in found.text.replace("  ", " "), "cases, wrong or failed, noisy"
    document["rows"] = []
    assert "There are no results yet." in read_page(page([document])).text


@pytest.mark.parametrize(
    ("content", "words"), [("{", "cannot be read"), ("[]", "holds no rows"), (None, "No such file")]
)
def test_the_page_of_no_results(content, words, tmp_path, capsys):
    from bench.page import main

    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "rows.json"), "--out", str(tmp_path / "page.html")])
    assert words in capsys.readouterr().err
