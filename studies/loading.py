"""The memory that loading a model and one forward take, beside the size of its file.

The model is that of :mod:`studies.smollm2`: in bfloat16, quantized to be trained, and packed, each as a folder that
transformers' ``from_pretrained`` reads; packed also as the file of ``save_packed``. The embedding has 8 bits where the
model is quantized. Each case loads in a process of its own, which has loaded a model of the same kind and two layers
before, so that what is imported and made once does not count. The forward, of eight tokens, reads every weight: a file
that is mapped into memory takes none before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.memory import in_use, peak
from qatkernels import QuantConfig, load_packed, pack_model, quantize_model, save_packed

from .processes import in_own_process
from .results import Case, Figures, Results
from .runner import Session, Study
from .smollm2 import folder

CPU = torch.device("cpu")
TITLES = {
    "bfloat16": "bfloat16, `from_pretrained`",
    "qat-w2": "2 bits to be trained, masters in bfloat16, `from_pretrained`",
    "packed-w4": "packed, 4 bits, `from_pretrained`",
    "packed-w2": "packed, 2 bits, `from_pretrained`",
    "file-w4": "packed, 4 bits, `load_packed`",
    "file-w2": "packed, 2 bits, `load_packed`",
}


@dataclass(frozen=True)
class Size:
    """A size of the study: which of ``TITLES``, of the real model or of a random one of two small layers."""

    names: tuple[str, ...] = tuple(TITLES)
    tiny: bool = False


SIZES = {"cpu": Size(), "smoke": Size(("packed-w2", "file-w2"), tiny=True)}


def cases(session: Session) -> Iterator[Case]:
    """Yield the kinds of models and files."""
    for name in session.size.names:
        yield Case(name, 0, {"saved": name}, partial(run, session, name))


def run(session: Session, name: str) -> Figures:
    """Write a model, and return the bytes of its file and the peak of loading it."""
    small, large = (
        saved(session.work / f"{name}-{size}", name, folder(session.work / size, tiny))
        for size, tiny in (("tiny", True), ("model", session.size.tiny))
    )
    return {"file_bytes": _bytes(large), "peak_bytes": in_own_process(measured, name, small, large)}


def saved(path: Path, name: str, source: Path) -> Path:
    """Write the model of a folder as a case wants it, unless it is there, and return where."""
    from transformers import AutoModelForCausalLM

    import qatkernels.integrations.transformers  # noqa: F401  save_pretrained then knows quantized models

    if path.exists():
        return path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    kind, _, width = name.partition("-w")
    if width:
        embeddings = QuantConfig(8, group_size=32)
        quantize_model(model, QuantConfig(int(width), group_size=32), embeddings=embeddings, warn_below=0)
    if kind in ("packed", "file"):
        pack_model(model)
    if kind == "file":
        save_packed(model, path, {"model": model.config.to_dict()})
    else:
        model.save_pretrained(path)
    return path


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))


def measured(name: str, small: Path, large: Path) -> int | None:
    """Load and run a small model, then the one that is measured; return the most memory that it took, in bytes."""
    load: Callable[[Path], nn.Module] = _from_file if name.startswith("file") else _from_pretrained
    tokens = torch.arange(8).unsqueeze(0)

    @torch.no_grad()
    def run(path: Path) -> None:
        load(path).eval()(input_ids=tokens)

    run(small)
    return peak(lambda: run(large), CPU, since=in_use(CPU))


def _from_file(path: Path) -> nn.Module:
    return load_packed(path, _build)


def _build(config: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**config["model"]))


def _from_pretrained(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import qatkernels.integrations.transformers  # noqa: F401  from_pretrained then knows quantized models

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model


def report(results: Results, out: Path) -> str:
    """Return the table."""
    lines = ["| | file, MB | peak of memory, MB | over the file |", "|---|---|---|---|"]
    for row in results.rows:
        size, most = row["figures"]["file_bytes"], row["figures"]["peak_bytes"]
        shown = ("-", "-") if most is None else (f"{most * 1e-6:.1f}", f"{most / size:.2f}")
        lines.append(f"| {TITLES[row['case']]} | {size * 1e-6:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines)


STUDY = Study("loading", SIZES, cases, report)
