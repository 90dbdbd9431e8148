"""The command line. Commands that are killed run in separate processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qatkernels import cli
from qatkernels.trainer.display import TrainingDisplay

from .conftest import options

ROOT = Path(__file__).parents[2]


def test_terminated_says_how_to_go_on(tiny: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "qatkernels", "train", *options({**tiny, "steps": 100_000})]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert any("fp     step" in line for line in child.stderr), "no line about the progress"
        child.terminate()
        rest = child.stderr.read()
        assert child.wait(60) == 128 + signal.SIGTERM
    assert rest.splitlines()[-1] == (
        f"stopped by SIGTERM; `qatkernels train --resume --out {tiny['out']}` continues from here"
    )
    assert list((Path(tiny["out"]) / "fp").glob("state-*.safetensors"))


def test_resume_takes_the_options_of_the_run(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options(tiny)]) == 0
    table = capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", tiny["out"]]) == 0
    assert capsys.readouterr().out == table
    assert cli.main(["train", "--resume", "--out", tiny["out"], "--width", "64"]) == 2
    assert "--width is 64, but the run in" in capsys.readouterr().err
    for column in ("bits", "nearest", "QAT", "tokens/s"):
        assert column in table


def test_errors_are_one_line_and_exit_code_2(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, file = tmp_path / "empty.txt", tmp_path / "file"
    empty.touch()
    file.touch()
    for settings, message in (
        ({"data": str(tmp_path / "nothing")}, "does not exist"),
        ({"data": str(empty)}, "is empty"),
        ({"out": str(file / "run")}, "cannot be written"),
        ({"bits": (9,)}, "bits is 9"),
        ({"batch": 0}, "--batch is 0"),
    ):
        assert cli.main(["train", *options({**tiny, **settings})]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("qatkernels: ")
        assert error.count("\n") == 1
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_a_damaged_configuration(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options(tiny)]) == 0
    path = Path(tiny["out"]) / "run.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert cli.main(["train", *options({**tiny, "bits": (2, 1)})]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


#: Says whether the interpreter came to its end, and whether what is registered for that ran.
PROGRAM = """
import atexit, os, sys
from qatkernels import cli
from qatkernels.trainer import report
exits = os._exit
def told(code):
    os.write(2, b"left without the interpreter's end; ")
    exits(code)
os._exit = told
atexit.register(print, "the end")
sys.exit(cli.run())
"""


def called(arguments: list[str], rank: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env={**os.environ, **rank, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_a_command_ends_like_any_program(tiny: dict[str, Any]) -> None:
    """Also where torchrun's variables are: only what has trained with others cannot."""
    alone = ["train", *options({**tiny, "steps": 2, "qat_steps": 2})]
    for arguments, code in ((["doctor"], 0), (["generate", "none"], 2), (alone, 0)):
        done = called(arguments, {"RANK": "0"})
        assert done.returncode == code, done.stderr
        assert done.stdout.endswith("the end\n")
        assert "left without" not in done.stderr


def test_training_with_others_ends_without_the_interpreter(tiny: dict[str, Any]) -> None:
    """Whose end gloo's threads would abort; everything was said, and functions of atexit ran."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = called(["train", *options({**tiny, "steps": 2, "qat_steps": 2, "parallel": "ddp"})], group)
    assert done.returncode == 0, done.stderr
    assert "left without the interpreter's end" in done.stderr
    assert "tokens/s" in done.stdout
    assert done.stdout.endswith("the end\n")


@pytest.mark.parametrize(
    ("rate", "shown"), [(0.53, "0.53 tokens/s"), (41.7, "41.7 tokens/s"), (1234.5, "1.23k tokens/s")]
)
def test_rates_have_a_fitting_unit(rate: float, shown: str) -> None:
    lines: list[str] = []
    with TrainingDisplay(10, lines.append) as display:
        display.step("fp", {"step": 1, "held_out": 2.5}, rate)
        result = {"phase": "fp", "bits": None, "bits_per_byte": 2.5, "tokens_per_second": rate, "steps": 1}
        display.end(result)
        display.end(result | {"steps": 0})
    assert f"held out, {shown}, 0:0" in lines[0]
    assert lines[1].endswith(f", {shown}")
    assert lines[2].endswith("held out")  # nothing was trained


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["train", "--resume", "--restart"]
    for arguments in ([], ["dance"], ["train", "--steps", "many"], both, ["doctor", "-x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, "train", "doctor"])
def test_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    wanted = {None: list(cli.COMMANDS), "train": ["--data", "--resume", "--qat-lr", "examples:"], "doctor": ["--json"]}
    assert all(word in text for word in wanted[command])


def test_every_command_prints_json(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object, and nothing else, on the standard output."""
    out, packed = tiny["out"], str(tmp_path / "packed.safetensors")
    calls = {
        "train": options(tiny),
        "plan": ["--params", "1M", "--tokens", "50M", "--bits", "2"],
        "spectrum": [
            f"{out}/w2",
            *["--probes", "1", "--steps", "3", "--windows", "2", "--out"],
            str(tmp_path / "spectrum"),
        ],
        "pack": [f"{out}/w2", packed],
        "export": [packed, str(tmp_path / "again.safetensors"), "--to", "safetensors"],
        "generate": [str(tmp_path / "again.safetensors"), "--tokens", "5"],
        "check": [f"{out}/w2"],
        "doctor": [],
    }
    assert calls.keys() == cli.COMMANDS.keys()
    found = {}
    for command, arguments in calls.items():
        assert cli.main([command, *arguments, "--json"]) == 0, command
        found[command] = json.loads(capsys.readouterr().out)
    assert found["train"] == json.loads((Path(out) / "report.json").read_text())
    assert found["plan"]["plans"][0]["bits"] == 2
    assert found["spectrum"]["checkpoints"][0]["spectrum"]["n"] > 0
    size = Path(packed).stat().st_size
    assert (found["pack"]["path"], found["pack"]["disk"]) == (packed, size)
    assert found["export"]["exact"]
    assert found["export"]["layers"][0]["stored_as"] == "seq, 2 bits"
    assert found["generate"]["text"].startswith("def ")
    assert found["generate"]["tokens"] == 5
    assert found["check"]["ok"]
    assert found["check"]["layers"][0]["calls"] > 0
    assert not found["doctor"]["broken"]
