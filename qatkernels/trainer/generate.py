"""Opens trained models, packed or not; packs them; generates text with them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError
from ..formats import load_packed, save_packed
from ..nn import model_bytes, pack_model, quantized_modules
from . import hf_folder, models
from .build import sizes
from .demo_model import Cache, ModelConfig, Transformer


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: bytes,
    count: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    cached: bool = True,
) -> Iterator[tuple[int, Tensor]]:
    """Continue a prompt.

    When a sequence has filled the context, the model reads its second half again and continues from there. Between two
    such steps each token costs one position.

    Args:
        model: a :class:`Transformer` in eval mode.
        prompt: at least one byte; if it is longer than the context, only its end is read.
        count: number of tokens.
        temperature: 0 takes the most likely token, the first one if several are equal. Otherwise the logits are divided
            by the temperature, and a token is drawn.
        generator: a CPU generator to draw tokens with; torch's default generator if None.
        cached: keep keys and values. If False, every token computes the whole window again, with the same result.

    Yields:
        Each token, with the float32 logits ``[vocab]`` that it was chosen from, on the CPU.

    Raises:
        ValueError: if the prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt is empty, must have at least one byte")
    config: ModelConfig = model.config  # type: ignore[assignment]
    device = next(model.parameters()).device
    tokens, cache = list(prompt), None
    start = max(0, len(tokens) - config.context)
    for _ in range(count):
        if len(tokens) - start > config.context:
            start, cache = len(tokens) - max(1, config.context // 2), None
        new = tokens[start:] if cache is None else tokens[-1:]
        if cached and cache is None:
            cache = Cache(config)
        logits = model(torch.tensor([new], device=device), cache)[0, -1].float().cpu()
        if temperature:
            # In float64 and relative to the largest logit, so that no temperature overflows or gives 0 / 0.
            scaled = (logits - logits.max()).double() / temperature
            token = int(torch.multinomial(scaled.softmax(-1).float(), 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        yield token, logits


def open_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a packed or trained model, and the values that it was built from (:func:`models.describe`).

    Args:
        path: a file with a packed model, the folder of a finished phase, or a folder of transformers.

    Raises:
        CheckpointError: if the model is missing or damaged, or the file is of another kind.
    """
    if path.is_dir():
        if not (path / models.MARKER).exists() and hf_folder.is_one(path):
            return hf_folder.load(path), models.describe(str(path), ModelConfig())
        trained = models.load_trained(path)
        return trained.model, trained.about["model"]
    described: dict[str, Any] = {}

    def build(config: dict[str, Any]) -> nn.Module:
        try:
            described.update(config["model"])
            models.check_plausible_size(described, path.stat().st_size)
            return models.build(described)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold a model of this version ({error})") from error

    return load_packed(path, build), described


def load(path: Path, tokenizer: Path | None = None) -> tuple[nn.Module, Any]:
    """Return a model to generate text with, in eval mode, and its tokenizer, which is None for demo models.

    Args:
        path: what :func:`open_model` opens.
        tokenizer: folder of the tokenizer of a model of transformers; the model's own if None.

    Raises:
        CheckpointError: if the model cannot be read, or has no tokenizer and does not read bytes.
    """
    model, _ = open_model(path)
    demo = isinstance(model, Transformer)
    return model.eval(), None if demo else hf_folder.tokenizer(tokenizer or path, model)


def show_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: bytes,
    count: int,
    show: Callable[[str], None],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> int:
    """Continue a text, and show it piece by piece, prompt included.

    Args:
        model: the model.
        tokenizer: its tokenizer; both as :func:`load` returns them.
        prompt: the text to continue, at least one byte.
        count: number of tokens; a model of transformers may end its text earlier.
        show: is called with each piece.
        temperature: as for :func:`generate`.
        seed: seed of the draws.

    Returns:
        The number of new tokens.
    """
    if tokenizer is not None:
        return hf_folder.show_text(model, tokenizer, prompt, count, show, temperature=temperature, seed=seed)
    # Neither the prompt nor the bytes of the model need be valid UTF-8.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    show(decoder.decode(prompt))
    draws = torch.Generator().manual_seed(seed)
    for token, _ in generate(model, prompt, count, temperature=temperature, generator=draws):
        show(decoder.decode(bytes([token])))
    show(decoder.decode(b"", final=True) + "\n")
    return count


def check_not_a_source(path: Path, out: Path) -> None:
    """Raise CheckpointError if writing a file would replace a file of the model that it is made of.

    Args:
        path: the model, a file or a folder.
        out: the file to write.
    """
    if not out.exists():
        return
    names = ("config.json", models.MARKER, *hf_folder.COPIED)
    sources = [path, *(path / name for name in names), *path.glob("model*.safetensors*")]
    if any(source.is_file() and out.samefile(source) for source in sources):
        raise CheckpointError(f"{out} is a file of the model in {path}, give another file to write to")


def pack(folder: Path, out: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Pack a trained model into a file, or into a folder of transformers.

    Args:
        folder: a folder that `qatkernels train` wrote, such as ``runs/demo/w2``, or that ``save_pretrained`` did.
        out: the file. A model of transformers becomes a folder if ``out`` does not end in ``.safetensors``.
        scale_dtype: dtype to store scales in.

    Returns:
        ``parameters``: number of parameters without scales; ``disk`` and ``memory``: bytes of the packed model.

    Raises:
        CheckpointError: if the model cannot be read or was trained in full precision, or ``out`` cannot be written or
            is one of the files of the model.
    """
    check_not_a_source(folder, out)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, give the folder of a trained model")
    model, described = open_model(folder)
    if not quantized_modules(model):
        raise CheckpointError(f"{folder} holds no quantized layer, there is nothing to pack")
    parameters = sizes(model)["parameters"]
    packed = pack_model(model, scale_dtype=scale_dtype)
    if "transformers" in described and out.suffix != ".safetensors":
        disk = hf_folder.save(packed, out, described["transformers"], folder)
    else:
        save_packed(packed, out, {"model": described})
        disk = out.stat().st_size
    return {"parameters": parameters, "disk": disk, "memory": model_bytes(packed)}
