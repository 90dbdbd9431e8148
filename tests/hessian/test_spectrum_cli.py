"""`qatkernels spectrum` on checkpoints of a real run, and what it refuses."""

import json
import shutil

import pytest
import torch

from qatkernels import files
from qatkernels.cli import main
from qatkernels.cli._main import parsers
from qatkernels.cli.arguments import from_arguments
from qatkernels.hessian import HessianOperator, Spectrum, spectrum
from qatkernels.nn import quantized_weights
from qatkernels.trainer import CheckpointError, ConfigError, TrainConfig, data, spectra, train
from studies import spectra as study
from studies.results import Results
from studies.runner import command
from tests.pages import read_page
from tests.passes import each_pass

OPTIONS = ["--probes", "2", "--steps", "8", "--windows", "3", "--device", "cpu"]


def configured(arguments):
    """Return what a command line asks for."""
    argv = ["spectrum", *arguments]
    return from_arguments(parsers(argv)[0].parse_args(argv), spectra.SpectrumConfig)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run at 4 and 2 bits."""
    folder = tmp_path_factory.mktemp("spectrum")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(600)))
    config = TrainConfig(
        out=str(folder / "run"), data=str(text), bits=(4, 2), device="cpu", precision="float32", width=16, depth=1,
        heads=2, context=16, batch=2, steps=4, qat_steps=2, eval_windows=4, eval_every=2,
    )  # fmt: skip
    train(config, say=lambda _: None)
    return folder / "run"


def test_report_and_picture(run, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["spectrum", str(run / "fp"), str(run / "w4"), str(run / "w2" / "model.safetensors")]
    assert main([*arguments, *OPTIONS, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("Krylov basis: 8 vectors of 4,096 in float32 on cpu, 0 MB\n")
    assert "w4" in printed.out
    assert "negative" in printed.out
    report = json.loads((out / "report.json").read_text())
    assert [(c["phase"], c["bits"], c["step"]) for c in report["checkpoints"]] == [
        ("fp", None, 4),
        ("w4", 4, 2),
        ("w2", 2, 2),
    ]
    for entry in report["checkpoints"]:
        found = entry["spectrum"]
        assert found["n"] == 16 * 48 + 16 * 16 + 16 * 128 + 64 * 16
        assert found["lambda_min"] < found["lambda_max"]
        assert sum(found["bins"]["mass"]) == pytest.approx(1, abs=0.02)
        for row in found["masses"]:
            for mass in (row["near_zero"], row["negative"]):
                assert 0 <= mass["least"] <= mass["value"] <= mass["most"] <= 1
        assert found["masses"][0]["near_zero"]["most"] == pytest.approx(found["near_zero_bounds"][1])
        assert 0 <= entry["clamped"] < (0.5 if entry["bits"] else 1e-9)
        assert 0 < entry["bits_per_byte"] < 10
        assert entry["gradient_norm_ratio"] > 0
        assert set(entry["sharpness"]) == ({"latent"} if entry["bits"] is None else {"latent", "quantized"})
    shown = read_page((out / "report.html").read_bytes())
    assert shown.drawn == 1, "one panel with a density for each model"
    for entry in report["checkpoints"]:
        assert {entry["name"], f"{entry['spectrum']['lambda_max']:.4g}", f"{entry['bits_per_byte']:.3f}"} <= shown.words
    assert report["settings"]["probes"] == 2
    assert report["text"]["source"].endswith("text.txt"), "what the run was trained on"

    # Again: nothing is computed, everything is the same; other settings compute anew.
    before = (out / "report.json").read_bytes()
    assert main([*arguments, *OPTIONS, "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("was done before") == 3
    assert (out / "report.json").read_bytes() == before
    assert main([*arguments, *OPTIONS, "--steps", "5", "--out", str(out)]) == 0
    assert "was done before" not in capsys.readouterr().err


def test_a_spectrum_in_the_folder_of_a_run_is_on_its_page(run, tmp_path):
    whole = tmp_path / "run"
    shutil.copytree(run, whole)
    shutil.copytree(whole / "w2", whole / "earlier")
    for step in (0, 1):  # two checkpoints of a phase give charts over its steps
        tensors, header = files.load(whole / "w2" / "model.safetensors")
        header["result"]["steps"] = step
        files.save(whole / "w2" / f"step-{step:06d}.safetensors", tensors, header)
    before = read_page((whole / "report.html").read_bytes())
    assert "Hessian" not in before.words
    found = [str(whole / "w2" / f"step-00000{step}.safetensors") for step in (0, 1)]
    config = configured([str(whole / "fp"), *found, *OPTIONS, "--out", str(whole / "spectrum")])
    report = spectra.run(config, say=lambda _: None)
    for path in (whole / "report.html", whole / "spectrum" / "report.html"):
        shown = read_page(path.read_bytes())
        assert {"Hessian", "w2-step-000001", f"{report['checkpoints'][2]['spectrum']['lambda_max']:.4g}"} <= shown.words
        assert shown.drawn == 3 + (before.drawn if path.parent == whole else 0)


def test_it_is_the_spectrum_of_the_trained_weights(run, tmp_path):
    """The same numbers from the pieces, for a quantized and for the full-precision model."""
    for phase in ("w2", "fp"):
        config = configured([str(run / phase), *OPTIONS, "--seed", "3", "--out", str(tmp_path / phase)])
        report = spectra.run(config, say=lambda _: None)
        loaded = spectra.load(run / phase)
        weights, _ = files.load(run / phase / "model.safetensors")
        assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())
        corpus = data.load(run.parent / "text.txt", 16)
        torch.manual_seed(3)
        op = HessianOperator(loaded.model, spectra.mean_loss, [corpus.batch(3, 16)], loaded.params)
        wanted = spectrum(op, 2, 8, seed=3)
        raw = json.loads(next((tmp_path / phase / "ritz").iterdir()).read_text())
        found = Spectrum.from_dict(raw["spectrum"])
        for a, b in zip(found.ritz, wanted.ritz, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert report["checkpoints"][0]["spectrum"]["lambda_max"] == pytest.approx(wanted.lambda_max, rel=1e-4)
    assert len(loaded.params) == 4
    assert not quantized_weights(loaded.model)


def test_options_reach_the_operator(run, tmp_path):
    """Engines, kept graphs, checkpointing and small bases agree."""
    variants = (
        [], ["--engine", "forward"], ["--checkpointing"], ["--basis-dtype", "bfloat16"], ["--dtype", "float64"],
        ["--block", "2"], ["--basis-device", "cpu"],
    )  # fmt: skip
    found = []
    for i, extra in enumerate(variants):
        config = configured([str(run / "w4"), *OPTIONS, *extra, "--out", str(tmp_path / str(i))])
        found.append(spectra.run(config, say=lambda _: None)["checkpoints"][0]["spectrum"])
    for other in found[1:]:
        assert other["lambda_max"] == pytest.approx(found[0]["lambda_max"], rel=1e-3)
    assert found[3]["settings"]["basis_bytes"] * 2 == found[0]["settings"]["basis_bytes"]
    config = configured([str(run / "w4"), *OPTIONS, "--batches", "3", "--out", str(tmp_path / "several")])
    several = spectra.run(config, say=lambda _: None)["checkpoints"][0]["spectrum"]
    assert several["lambda_max"] != pytest.approx(found[0]["lambda_max"], rel=1e-3)


def test_the_study_is_one_command(run, tmp_path):
    """Models along QAT, in the order of training; a second call computes nothing."""
    given = ["--smoke", "--data", str(run.parent), "--out", str(tmp_path)]
    with each_pass() as passes:
        assert command(study.STUDY, given) == 0
    assert passes.count > 0
    results = Results(tmp_path / "spectra.jsonl")
    assert [(row["figures"]["phase"], row["figures"]["step"]) for row in results.rows] == [
        ("fp", 4), ("w4", 2), ("w4", 4), ("w1", 2), ("w1", 4)
    ]  # fmt: skip
    text = study.report(results, tmp_path)
    assert text.count("w4-step-000002") == 1
    assert (tmp_path / "small-seed0-6x2.png").exists()
    with each_pass() as passes:
        assert command(study.STUDY, given) == 0
    assert passes.count == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-folder"], "no-such-folder.*cannot be read"),
        (["{run}"], "cannot be read"),
        (["{run}/w4", "--probes", "0"], "--probes is 0, must be at least 1"),
        (["{run}/w4", "--near-zero", "-1"], "--near-zero is -1.0, must be positive"),
        (["{run}/w4", "--rho", "nan"], "--rho is nan"),
        (["{run}/w4", "--engine", "forward", "--checkpointing"], "--checkpointing is for --engine reverse"),
        (["{run}/w4", "--data", "nowhere"], "--data nowhere does not exist"),
        (["{run}/w4", "--basis-device", "attic"], "--basis-device is attic, cannot be used here"),
        (["{run}/w4", "--device", "cuda"], "PyTorch sees no CUDA device"),
    ],
)
def test_bad_input(run, arguments, words, capsys, tmp_path, request):
    import re

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    given = [a.format(run=run) for a in arguments]
    assert main(["spectrum", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert "Traceback" not in error


def test_models_of_others_are_refused(run, tmp_path, capsys):
    stranger = tmp_path / "stranger.safetensors"
    files.save(stranger, {"w": torch.ones(2)}, {"made": "elsewhere"})
    with pytest.raises(CheckpointError, match="is not a model that `qatkernels train` wrote"):
        spectra.load(stranger)
    broken = tmp_path / "w4"
    shutil.copytree(run / "w4", broken)
    tensors, header = files.load(broken / "model.safetensors")
    tensors["norm.weight"].fill_(torch.nan)
    files.save(broken / "model.safetensors", tensors, header)
    assert main(["spectrum", str(broken), *OPTIONS, "--out", str(tmp_path / "out")]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give a checkpoint"):
        spectra.SpectrumConfig(checkpoints=())
    with pytest.raises(ConfigError, match=r"--seed is 18446744073709551616, must be -2\*\*63 to 2\*\*64 - 1"):
        spectra.SpectrumConfig(checkpoints=("w4",), seed=2**64)
    with pytest.raises(SystemExit):
        main(["spectrum"])
    assert "CKPT" in capsys.readouterr().err
