"""The loss surface of the demo's models along QAT: ``python -m bench.reproduce.spectra``.

Trains the demo in full precision and at 4, 2 and 1 bits, keeps the model at several steps of each, and analyses all of
them on the same text. A second call goes on where the first one stopped; finished spectra are not computed again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qatkernels.nn import QuantConfig, quantize_model
from qatkernels.train import TrainConfig, checkpoint, spectra, train
from qatkernels.train.loop import EXCLUDED
from qatkernels.train.model import Transformer

#: A quarter of the width and of the batch.
QUICK = {"width": 96, "depth": 2, "context": 64, "batch": 8, "steps": 400, "qat_steps": 160, "eval_windows": 64}


def described(config: TrainConfig, phase: str, bits: float | None, step: int) -> dict[str, Any]:
    """Return the header that a finished model of this phase and step has."""
    return {
        "phase": phase,
        "model": asdict(config.model),
        "quantization": None if bits is None else QuantConfig(bits=bits).to_dict(),
        "exclude": list(EXCLUDED),
        "result": {"phase": phase, "bits": bits, "steps": step},
    }


def train_with_snapshots(config: TrainConfig) -> list[Path]:
    """Train, keep the model of every checkpoint of the QAT phases, and return all models in the order of training."""
    out, save = Path(config.out), checkpoint.save
    widths = {f"w{bits:g}": bits for bits in config.bits}

    def keeping(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
        save(path, tensors, header)
        phase = path.parent.name
        if path.name == "state.safetensors" and phase in widths and header is not None:
            model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
            save(snapshot(out, phase, header["step"]), model, described(config, phase, widths[phase], header["step"]))

    with mock.patch.object(checkpoint, "save", keeping):
        train(config)
    first, _ = checkpoint.load(out / "fp" / "model.safetensors")
    models = [out / "fp"]
    for phase, bits in widths.items():
        model = Transformer(config.model)
        model.load_state_dict(first)
        model = quantize_model(model, QuantConfig(bits=bits), exclude=EXCLUDED)  # type: ignore[assignment]
        save(snapshot(out, phase, 0), model.state_dict(), described(config, phase, bits, 0))
        models += [*sorted((out / "snapshots").glob(f"{phase}-*.safetensors")), out / phase]
    return models


def snapshot(out: Path, phase: str, step: int) -> Path:
    """Where the model of a step is kept."""
    return out / "snapshots" / f"{phase}-{step:05d}.safetensors"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce.spectra", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/spectra", help="folder of the run (default: runs/spectra)")
    parser.add_argument("--every", type=int, default=50, help="steps of QAT between snapshots (default: 50)")
    parser.add_argument("--windows", type=int, default=16, help="windows of text in the loss (default: 16)")
    parser.add_argument("--probes", type=int, default=20, help="random vectors (default: 20)")
    parser.add_argument("--lanczos", type=int, default=60, help="Lanczos steps from each (default: 60)")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model, for slow machines and to see that it runs"
    )
    parser.add_argument("--results", help="folder that report.json and spectra.png are copied to")
    options = parser.parse_args()
    smaller: dict[str, Any] = QUICK if options.quick else {}
    config = TrainConfig(**{"out": options.out, "bits": (4, 2, 1), "save_every": options.every} | smaller).resolved()
    models = train_with_snapshots(config)
    out = Path(options.out) / "spectra"
    settings = spectra.SpectrumConfig(
        checkpoints=tuple(map(str, models)), out=str(out), windows=options.windows, probes=options.probes,
        steps=options.lanczos, device=config.device,
    )  # fmt: skip
    report = spectra.run(settings)
    spectra.show(report, str(out))
    if options.results:
        Path(options.results).mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "spectra.png"):
            shutil.copy(out / name, Path(options.results) / name)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
