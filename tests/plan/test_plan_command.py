"""The command `qatkernels plan`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qatkernels import cli
from studies.plan_recovery import PLANTED, table
from tests.pages import read_page, words_of

ASK = ["plan", "--params", "1.2B", "--tokens", "100B", "--bits", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    columns = table("small", 0.005, 0)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*columns, "schedule"])
        out.writerows([*row, "classic"] for row in zip(*columns.values(), strict=True))
        out.writerow([1e9, 1e9, 1e11, 2, 99.0, "fused"])
    return path


def test_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(ASK) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "1.2B parameters, 100B tokens, 2 bits",
        "  quantized share  31.4%  (formula [paper])",
        "  full precision   68.6B tokens",
        "  quantized        31.4B tokens",
        "  schedule         classic: cooldown that ends at 68.6B tokens, then quantized: re-warmup and decay",
        "  weights          300 MB, in bfloat16 2.4 GB",
        "  S                333.3 tokens per parameter byte",
    ]


def test_several_widths_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ASK, "4", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["bits"] for one in found["plans"]] == [2, 4, 1]
    assert all(one["tokens_fp"] + one["tokens_qat"] == 10**11 for one in found["plans"])
    assert [one["schedule"] for one in found["plans"]] == ["classic", "fused", "classic"]


def test_fit_save_and_use_again(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, picture, written = tmp_path / "law.json", tmp_path / "plan.png", tmp_path / "plan.html"
    fitted = ["--runs", str(runs), "--where", "schedule=classic", "--resamples", "20", "--memory", "300MB"]
    assert cli.main([*ASK, *fitted, "--save", str(stored), "--plot", str(picture),
                     "--html", str(written)]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = read_page(written.read_bytes())
    assert page.drawn == 2
    coefficients = json.loads(stored.read_text())["coefficients"]
    assert {f"{value:.4g}" for value in coefficients.values()} <= page.words
    for line in text.splitlines():  # what the terminal says of the plan is on the page
        if line.startswith("  ") and "at its limit" not in line:
            assert words_of(line) <= page.words, line
    for wanted in ("at 90% confidence; fitted law; formula [paper]: 31.4%", "10% instead", "wastes", "within 1% of fp",
                   "law fitted to 300 runs: R² 0.9", "lambda", "weights in 300 MB, same compute"):  # fmt: skip
        assert wanted in text
    assert cli.main([*ASK, "--law", str(stored), "--json", "--fraction", "0.6"]) == 0
    one = json.loads(capsys.readouterr().out)["plans"][0]
    assert one["fraction"] == pytest.approx(PLANTED.optimal_fraction(1.2e9, 1e11, 2), abs=0.02)
    assert one["other_fraction"] == 0.6
    assert one["wasted_tokens"] > 0


def test_without_resamples_there_are_no_intervals(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "law.json"
    fitted = ["--runs", str(runs), "--where", "schedule=classic", "--resamples", "0", "--save", str(stored)]
    assert cli.main([*ASK, *fitted]) == 0
    assert "no resamples, no interval" in capsys.readouterr().out
    assert set(json.loads(stored.read_text())["intervals"].values()) == {None}
    stored.write_text(stored.read_text().replace('"alpha": 1', '"alpha": 2'))
    assert cli.main([*ASK, "--law", str(stored)]) == 2
    assert "law.json is damaged (its digest does not match" in capsys.readouterr().err


def test_warnings_go_to_stderr(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--params", "10M", "--tokens", "500M", "--bits", "8"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in out
    assert err.count("an extrapolation\n") == 2
    assert "bits is 8, outside of the 1 to 6" in err
    assert cli.main(["plan", "--params", "10M", "--tokens", "10B", "--bits", "2", "--runs", str(runs), "--where",
                     "schedule=classic", "--resamples", "0"]) == 0  # fmt: skip
    assert "params is 1e+07, outside of the 8.6e+07 to 2.2e+09 of the fitted runs" in capsys.readouterr().err


def test_below_one_token_a_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["plan", "--params", "1B", "--tokens", "400M", "--bits", "4"]
    assert cli.main(tiny) == 2
    assert "S = 0.8 tokens per parameter byte, must be above 1" in capsys.readouterr().err
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"coefficients": PLANTED.to_dict()}))
    assert cli.main([*tiny, "--law", str(law)]) == 0
    assert "formula [paper]: none, S ≤ 1" in capsys.readouterr().out


def test_page_without_a_law_or_matplotlib(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.html"
    code = f"import sys; sys.modules['matplotlib'] = None; from qatkernels import cli; sys.exit(cli.main({ASK!r} + "
    done = subprocess.run([sys.executable, "-c", f"{code}['--html', {str(path)!r}]))"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = read_page(path.read_bytes())
    assert page.drawn == 1
    assert {"31.4%", "68.6B", "300"} <= page.words


def test_warnings_are_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert cli.main(["plan", "--params", "1.2B", "--tokens", "3B", "--bits", "8", "--html", str(path)]) == 0
    assert "note" in read_page(path.read_bytes()).classes


def test_plot_without_a_law(tmp_path: Path) -> None:
    assert cli.main([*ASK, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert (tmp_path / "plan.svg").stat().st_size > 1000


def test_a_bug_is_no_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is raised with its traceback. An error of one line would blame the user."""

    def wrong(*arguments: object) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(np, "exp", wrong)
    with pytest.raises(ValueError, match="could not be broadcast"):
        cli.main(ASK)


def test_errors_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    broken, odd = tmp_path / "broken.json", tmp_path / "odd.json"
    broken.write_text("{")
    odd.write_text(json.dumps({"coefficients": {**PLANTED.to_dict(), "rho": "many"}}))
    for arguments, message in (
        (["--save", "x.json"], "--save needs --runs"),
        (["--law", "x", "--runs", "y"], "--runs and --law are both given"),
        (["--memory", "1GB"], "--memory needs a law"),
        (["--law", str(empty)], "holds no law"),
        (["--law", str(tmp_path / "none.json")], "No such file"),
        (["--law", str(broken)], "is damaged"),
        (["--law", str(odd)], "holds no law"),
        (["--plot", str(tmp_path / "none" / "plan.png")], "cannot be written: No such file"),
        (["--plot", str(tmp_path / "plan.xyz")], "ends in .xyz, must end in one of"),
        (["--runs", str(tmp_path / "none.csv")], "cannot be read"),
        (["--runs", str(runs), "--where", "colour=red"], "is not COLUMN=VALUE"),
        (["--runs", str(runs), "--where", "schedule=slow"], "leaves no runs"),
        (["--runs", str(runs), "--where", "schedule=fused"], f"--runs {runs}: there are 1 runs"),
        (["--bits", "-1"], "bits is"),
    ):
        assert cli.main([*ASK, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.startswith("qatkernels: ")
        assert err.count("\n") == 1
    for arguments in (["plan"], [*ASK, "--tokens", "many"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
