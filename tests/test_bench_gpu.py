"""Calls on a GPU machine: they run, lose nothing when killed, and come home."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="not in a checkout")

from bench.codes import DOOMED  # noqa: E402
from bench.gpu import cli, pack, tables  # noqa: E402
from bench.gpu.results import bring_home, latest_rows, summary  # noqa: E402
from bench.gpu.steps import Call, Step  # noqa: E402
from bench.journal import Journal, read  # noqa: E402
from bench.markdown import DOCS, block  # noqa: E402


def gpu(*arguments):
    command = [sys.executable, "-m", "bench.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_runs_of_both_calls(tmp_path):
    """Every step runs and is in the journal, and the summary is made again from it."""
    first, second = tmp_path / "1", tmp_path / "2"
    process = gpu("call1", "--out", first, "--dry")
    assert process.returncode == 0, process.stdout + process.stderr
    steps = {r["name"]: r["status"] for r in read(first / "journal.jsonl", "step")}
    assert steps == dict.fromkeys(("doctor", "smoke", "rows", "tests"), "ok"), process.stdout
    kinds = {r["kind"] for r in read(first / "journal.jsonl")}
    assert {"machine", "begin", "row", "smoke", "tests", "step"} <= kinds
    assert summary(first) in process.stdout
    assert (first / "summary.txt").read_text().strip() == summary(first)
    assert gpu("summary", first).stdout.strip() == summary(first)

    # What the second call runs again: one check and one case, made to look as if they had failed.
    journal = Journal(first / "journal.jsonl")
    check = read(first / "journal.jsonl", "smoke")[0]
    journal.write("smoke", {k: v for k, v in check.items() if k != "kind"} | {"status": "failed"})
    journal.write("begin", {"key": "fake_quantize 0"})
    journal.write("row", {"key": "fake_quantize 0", "row": {"status": "failed", "note": "planted"}})
    process = gpu("call2", "--out", second, "--dry", "--after", first / "journal.jsonl")
    assert process.returncode == 0, process.stdout + process.stderr
    steps = {r["name"]: r["status"] for r in read(second / "journal.jsonl", "step")}
    assert {name for name, status in steps.items() if status == "ok"} >= {
        "smoke again", "rows", "memcheck (without compute-sanitizer)", "racecheck (without compute-sanitizer)",
        "ncu gemv (without ncu)", "ncu decode (without ncu)", "ncu backward (without ncu)",
    }, process.stdout  # fmt: skip
    assert {name for name, status in steps.items() if status not in ("ok", "not run")} == set()
    assert {r["key"] for r in read(second / "journal.jsonl", "begin")} == {"fake_quantize 0"}
    again = [r for r in read(second / "journal.jsonl", "smoke") if not r["under"] and r["status"] != "begun"]
    assert [(r["op"], r["name"]) for r in again] == [(check["op"], check["name"])]
    with pytest.raises(SystemExit, match="dry run"):
        bring_home([first], tmp_path, DOCS, tmp_path / "last")


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "folder/j.jsonl"
    Journal(path).write("row", {"a": 1})
    with path.open("a") as file:
        file.write('{"kind": "row", "a": 2')
    assert read(path) == [{"kind": "row", "a": 1}]
    assert read(tmp_path / "none") == []


def python(code):
    return (sys.executable, "-c", code)


def statuses(call):
    return [(r["name"], r["status"]) for r in read(call.journal.path, "step")]


def test_steps_end_at_their_limits_and_leave_nothing_behind(tmp_path):
    call = Call(tmp_path, 100, dry=False)
    child = "import subprocess, sys; print('child', subprocess.Popen(['sleep', '60']).pid, flush=True); "
    assert call.run(Step("fine", python("print('seen')"), 30)) == 0
    assert call.run(Step("bad", python("print('why'); raise SystemExit(7)"), 30)) == 7
    assert call.run(Step("long", python(child + "import time; time.sleep(60)"), 10)) is None
    assert statuses(call) == [("fine", "ok"), ("bad", "failed"), ("long", "ended at its limit")]
    assert read(call.journal.path, "step")[1]["note"] == "why"
    log = (tmp_path / "log.txt").read_text()
    assert "seen" in log
    stat = Path(f"/proc/{log.split('child ')[1].split()[0]}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "a child is still running"
    assert call.run(Step("late", python(""), 4)) is None
    assert statuses(call)[-1] == ("late", "not run")
    assert "ended at its limit" in summary(tmp_path)


def test_a_process_that_loses_its_gpu_is_started_again(tmp_path):
    call, marks = Call(tmp_path, 100, dry=False), tmp_path / "marks"
    code = f"from pathlib import Path; p = Path({str(marks)!r}); n = len(p.read_text()) if p.exists() else 0; "
    code += f"p.write_text('x' * (n + 1)); raise SystemExit({DOOMED} if n < 2 else 0)"
    assert call.persist(Step("rows", python(code), 30)) == 0
    assert [name for name, _ in statuses(call)] == ["rows", "rows, process 2", "rows, process 3"]


PLANTED = """
import os
import shutil
import sys
import torch
from bench import cli
from bench.case import Call, Case
from bench.suites import SUITES

right = torch.arange(100.0)

def case(name, run):
    return Case(name, (100,), torch.float32, [Call("ours", run)], lambda: (right.double(),), (1e-6,), bytes=800)

def broken():
    raise ValueError("cannot be built")

def cases(settings):
    yield lambda: case("good", lambda: right)
    yield broken
    yield lambda: case("deadly", lambda: os._exit(3))
    yield lambda: case("last", lambda: right)

SUITES["planted"] = cases
sys.exit(cli.main(["planted", "--quick", "--device", "cpu", "--budget", "0.01", "--journal", sys.argv[1]]))
"""


def test_rows_go_on_after_what_took_their_process_along(tmp_path):
    path = tmp_path / "j.jsonl"
    command = [sys.executable, "-c", PLANTED, str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == DOOMED
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    rows = list(latest_rows(read(path)))
    ours = {row["case"]: row["status"] for row in rows if row["kind"] == "ours"}
    assert ours == {"good 100 float32": "ok", "planted 1": "failed", "planted 2": "failed", "last 100 float32": "ok"}
    assert {row["note"] for row in rows if row["status"] == "failed"} == {
        "ValueError: cannot be built", "begun, and nothing came of it",
    }  # fmt: skip
    assert cli_failed(path) == {"planted 1", "planted 2"}


def cli_failed(path):
    from bench.cli import failed_cases

    return failed_cases(path)


def machine(**changes):
    return {
        "settings": {"quick": False, "suites": ["lowbit"]}, "date": "2026-12-01T00:00:00Z", "threads": 16,
        "device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "cpu": "a CPU"}, "load_before": 0.1,
        "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"}, "build": None, "bandwidth_gb_s": 3000.0,
        "git": {"commit": None, "dirty": None}, "products_tflop_s": {"bfloat16": 790.0},
    } | changes  # fmt: skip


def row(**changes):
    return {
        "suite": "lowbit", "case": "packed linear lsq4 4096x4096 bfloat16 per row 1 tokens", "op": "packed linear",
        "shape": [4096, 4096], "dtype": "bfloat16", "grid": "lsq4", "granularity": "per row", "variant": "1 tokens",
        "bytes": 8_400_000, "flops": 33_554_432, "implementation": "cuda", "timing": "graph", "kind": "ours",
        "output": "fresh", "note": "", "unchecked": "", "tolerances": [0.01], "status": "ok", "errors": [0.001],
        "median_ms": 0.0035, "floor_ms": 0.003, "fraction_of_floor": 0.857, "repetitions": 15,
        "speedup_over": {"copy_ (out)": 0.9, "nn.Linear bfloat16 (fresh)": 3.2},
    } | changes  # fmt: skip


def journal_of(folder, rows, **changes):
    out = Journal(folder / "journal.jsonl")
    out.write("pack", {"status": "unpacked", "git": {"commit": "0123456789abcdef", "dirty": False}})
    out.write("machine", machine(**changes))
    for key, found in rows.items():
        out.write("begin", {"key": key})
        for one in found:
            out.write("row", {"key": key, "row": one})


def test_calls_come_home(tmp_path):
    docs, results = tmp_path / "page.md", tmp_path / "results"
    docs.write_text(f"# Page\n\n{tables.BEGIN}\n{tables.NOTHING}\n{tables.END}\n\nAfter.\n")
    first, second = tmp_path / "1", tmp_path / "2"
    wrong = row(status="wrong", errors=[0.5])
    family = row(
        suite="fake_quantize", case="fake_quantize lsq4", op="fake_quantize", implementation="triton", output="out"
    )
    journal_of(first, {"lowbit 0": [wrong], "lowbit 1": [], "fake_quantize 0": [family]})
    journal_of(second, {"lowbit 0": [row()]})
    written = bring_home([first, second], results, docs, tmp_path / "last.jsonl")
    assert [path.name for path in written] == ["lowbit-h100.json", "fake_quantize-h100.json", "gpu-checks-h100.json"]
    lowbit = json.loads(written[0].read_text())
    assert [r["status"] for r in lowbit["rows"]] == ["ok", "failed"]
    assert lowbit["git"]["commit"] == "0123456789abcdef"
    assert lowbit["schema"] == 1
    text = docs.read_text()
    assert text.startswith("# Page")
    assert text.endswith("After.\n")
    assert "### NVIDIA H100 80GB HBM3" in text
    assert "| lsq4, per row | cuda | 3.5 (80%) |" in text  # 8.4 MB at 3000 GB/s take 2.8 µs
    assert "| fake_quantize lsq4 | 3.5 (86%) | - | 1e-03 |" in text
    assert "begun, and nothing came of it" in text
    assert tables.render(results) in text
    assert read(tmp_path / "last.jsonl") == read(second / "journal.jsonl")
    journal_of(tmp_path / "3", {}, device={"type": "cuda", "name": "NVIDIA H200", "cpu": ""})
    with pytest.raises(SystemExit, match="different devices"):
        bring_home([first, tmp_path / "3"], results, docs, tmp_path / "last.jsonl")
    with pytest.raises(SystemExit, match=r"has no journal\.jsonl"):
        bring_home([tmp_path], results, docs, tmp_path / "last.jsonl")


def test_the_docs_hold_what_the_results_say():
    """`python -m bench.gpu docs` makes them."""
    assert block(tables.BEGIN, tables.END, tables.render(ROOT / "bench/results")) in DOCS.read_text()


def test_the_command_line_fits(capsys):
    for call in ("call1", "call2"):
        cli.main(["command", call, "--out", '"$OUT"'])
        line = capsys.readouterr().out.splitlines()[0]
        assert f'python3 -m bench.gpu {call} --out "$OUT" --seconds ' in line


def test_names_of_devices():
    from bench.machine import slug

    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "rtx-4090",
        "AMD EPYC": "amd-epyc",
    }  # fmt: skip
    assert {name: slug(name) for name in names} == names


def test_without_a_pack_everything_is_compiled(tmp_path):
    assert pack.unpack(tmp_path / "no-such-pack")["status"] == "absent"


WARM = """
import sys
import torch
from bench.gpu import fake_driver
fake_driver.install((9, 0), compiling=sys.argv[1] == "compile")
import qatkernels as qk
from qatkernels.backends import IMPLS
from qatkernels.testing.samples import make
for tokens in (1, 2):
    IMPLS["fake_quantize"]["triton"](*make(qk.grids.lsq(4), (64, 256), torch.bfloat16).args("fake_quantize"))
print(dict(fake_driver.kernels), fake_driver.failures)
"""


@pytest.mark.slow
def test_kernels_are_compiled_without_a_gpu(tmp_path):
    """Once for two calls alike; the second process finds the kernel and the function that launches it."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    entries = []
    for mode in ("count", "compile", "compile"):
        out = subprocess.run(
            [sys.executable, "-c", WARM, mode], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert out.stdout.strip() == "{'fake_quantize_fwd_kernel': 1} []", out.stdout + out.stderr
        entries.append(sorted(path.name for path in tmp_path.iterdir()))
    assert entries[0] == []
    assert len(entries[1]) == 3  # the driver's utilities, the kernel, its launcher
    assert entries[2] == entries[1]
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


DECODING = """
import collections, ctypes
import torch
from bench.gpu import fake_driver, host
host.pretend()
import qatkernels as qk
from qatkernels import backends
from qatkernels.testing.decode import make

launches = ctypes.CDLL(None).fake_launches
launches.restype = ctypes.c_long
triton = collections.Counter()
fake_driver._Counted.run = lambda *args: triton.update(["launch"])

def who(call):
    before = launches(), triton["launch"]
    call()
    return "cuda" * (launches() > before[0]) + "triton" * (triton["launch"] > before[1])

assert backends.chosen("lowbit_linear", "CUDA") == "cuda"
for grid in (qk.grids.binary(), qk.grids.lsq(3), qk.grids.affine(4)):
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, act_bits in ((1, None), (8, 8), (9, None), (130, 8)):
            args = make(grid, tokens, 64, 256, 64, dtype, bias=dtype, act_bits=act_bits)
            args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            expected = "cuda" if tokens <= 8 else "triton"
            for again in range(3):
                assert who(lambda: torch.ops.qatkernels.lowbit_linear(*args)) == expected, (grid, dtype, tokens)
            out = torch.empty(tokens, 64, dtype=dtype, device="cuda")
            assert who(lambda: torch.ops.qatkernels.lowbit_linear_out(*args, out)) == expected
            x = args[0].view(1, tokens, 256)
            assert who(lambda: torch.ops.qatkernels.lowbit_linear(x, *args[1:])) == expected
            if dtype == torch.float32:
                assert who(lambda: torch.ops.qatkernels.lowbit_linear(*args[:4], None, None, *args[6:])) == expected
    w = [t if t is None else t[None] for t in args[1:4]]
    ends = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    assert who(lambda: torch.ops.qatkernels.lowbit_linear(args[0], *w, None, ends, *args[6:])) == "triton"
weight = qk.PackedWeight(*args[1:4], grid, 256)
x = torch.zeros(2, 256, dtype=torch.bfloat16, device="cuda")
assert who(lambda: qk.lowbit_linear(x, weight)) == "cuda"
print("done")
"""


@pytest.mark.slow
def test_who_decodes_without_a_gpu():
    """Tensors of a CUDA device that is not there, in a build with CUDA: the choice itself, up to the launch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from qatkernels import backends

    if torch.version.cuda is None or "cuda" in backends.MISSING or shutil.which("nvcc") is None:
        pytest.skip("needs a build with CUDA, and nvcc")
    from bench.gpu import host

    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QATKERNELS_BACKEND")}
    environment["LD_PRELOAD"] = str(host.build())
    command = [sys.executable, "-W", "ignore", "-c", DECODING]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stdout.strip() == "done", process.stdout + process.stderr
