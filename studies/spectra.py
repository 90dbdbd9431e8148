"""The loss surface of the demo's models along QAT: ``python -m studies.spectra``.

Trains the demo in full precision and at 4, 2 and 1 bits, keeps the model at several steps of each, and analyses all of
them on the same text. A second call goes on where the first one stopped; finished spectra are not computed again.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qatkernels.trainer import TrainConfig, spectra, toml, train

#: Half the width, two of three blocks, half the context, and more steps: minutes in place of an hour on two cores.
SMALL = {
    "width": 96, "depth": 2, "context": 64, "steps": 1500, "qat_steps": 600, "eval_windows": 64, "precision": "float32",
}  # fmt: skip


def models(config: TrainConfig, steps: list[int]) -> list[Path]:
    """Return the models in the order of training: full precision, then each width at these steps and its end."""
    out = Path(config.out)
    found = [out / "fp"]
    for bits in config.bits:
        folder = out / f"w{bits:g}"
        kept = [folder / f"step-{step:06d}.safetensors" for step in steps if step < config.training.qat_steps]
        found += [*kept, folder]
    return found


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m studies.spectra", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="runs/spectra", help="folder of the run (default: runs/spectra)")
    parser.add_argument("--small", action="store_true", help="a smaller model, trained longer")
    parser.add_argument("--config", type=Path, help="TOML file with other settings of the training")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 2, 1], help="bit widths (default: 4 2 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches, windows and probes (default: 0)")
    parser.add_argument(
        "--at",
        type=int,
        nargs="+",
        default=[0, 50, 200],
        help="steps of QAT to look at besides the last (default: 0 50 200)",
    )
    parser.add_argument("--windows", type=int, default=16, help="windows of text in the loss (default: 16)")
    parser.add_argument("--probes", type=int, default=3, help="random vectors (default: 3)")
    parser.add_argument("--lanczos", type=int, default=200, help="Lanczos steps from each (default: 200)")
    parser.add_argument(
        "--near-zero", type=float, default=0.02, help="what is near zero in table and picture (default: 0.02)"
    )
    parser.add_argument("--results", help="folder that report.json and spectra.png are copied to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    asked = options(arguments)
    other: dict[str, Any] = (SMALL if asked.small else {}) | (toml.read(asked.config) if asked.config else {})
    settings: dict[str, Any] = {"out": asked.out, "bits": tuple(asked.bits), "seed": asked.seed}
    settings["keep_every"] = math.gcd(*asked.at) or 10**9
    config = TrainConfig(**settings | other).resolved()
    train(config)
    out = Path(asked.out) / "spectra"
    report = spectra.run(spectra.SpectrumConfig(
        checkpoints=tuple(map(str, models(config, asked.at))), out=str(out), windows=asked.windows, seed=asked.seed,
        probes=asked.probes, steps=asked.lanczos, near_zero=asked.near_zero, device=config.device,
    ))  # fmt: skip
    spectra.show(report, str(out))
    if asked.results:
        Path(asked.results).mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "spectra.png"):
            shutil.copy(out / name, Path(asked.results) / name)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
