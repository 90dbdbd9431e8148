"""Text from a trained model, packed or not, one byte at a time; and the packing of what `train` left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError
from ..formats import load_packed, save_packed
from ..nn import model_bytes, pack_model
from . import models
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
    """Go on from a prompt.

    A sequence that has filled the context goes on from its second half, which is then read anew: between two such
    steps a token costs one position.

    Args:
        model: a :class:`Transformer` in eval mode.
        prompt: at least one byte; of what exceeds the context only the end is read.
        count: number of tokens.
        temperature: 0 takes the likeliest token, the first of those that are equal; otherwise the logits are divided by
            it and a token is drawn.
        generator: draws them, on the CPU; torch's default one if None.
        cached: keep keys and values. Without, every token costs the whole window; the results are those of the same
            windows.

    Yields:
        Each token, and the float32 logits ``[vocab]`` that it was chosen from, on the CPU.

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
            # In float64 and from the largest logit down, so that no temperature makes two infinite, or 0 / 0.
            scaled = (logits - logits.max()).double() / temperature
            token = int(torch.multinomial(scaled.softmax(-1).float(), 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        yield token, logits


def opened(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model, packed or trained, and the values that it was built from (:func:`models.describe`).

    Raises:
        CheckpointError: if it is missing, damaged, or of another kind.
    """
    if path.is_dir():
        trained = models.load_trained(path)
        return trained.model, trained.about["model"]
    described: dict[str, Any] = {}

    def build(config: dict[str, Any]) -> nn.Module:
        try:
            described.update(config["model"])
            models.check_room(described, path.stat().st_size)
            return models.build(described)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold a model of this version ({error})") from error

    return load_packed(path, build), described


def load(path: Path) -> nn.Module:
    """Return a byte-level model in eval mode: a packed one from a file, a trained one from its folder.

    Raises:
        CheckpointError: if it is missing, damaged, or of another kind.
    """
    model, _ = opened(path)
    if not isinstance(model, Transformer):
        raise CheckpointError(f"{path} holds a {type(model).__name__}, must be a model of --model demo")
    return model.eval()


def pack(folder: Path, out: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Pack the model of a finished phase into a file.

    Args:
        folder: a folder that `qatkernels train` wrote, such as ``runs/demo/w2``.
        out: the file.
        scale_dtype: dtype that scales are stored in.

    Returns:
        ``parameters`` of the model without its scales, and the bytes of the packed one on ``disk`` and in ``memory``.

    Raises:
        CheckpointError: if the model cannot be read, was trained in full precision, or ``out`` cannot be written or is
            one of the files that are packed.
    """
    for source in ("model.safetensors", "config.json"):
        if out.exists() and (folder / source).exists() and out.samefile(folder / source):
            raise CheckpointError(f"{out} is a file of the model in {folder}, give another one to write")
    trained = models.load_trained(folder)
    if trained.about["quantization"] is None:
        raise CheckpointError(f"{folder} was trained in full precision, there is nothing to pack")
    parameters = sizes(trained.model)["parameters"]
    packed = pack_model(trained.model, scale_dtype=scale_dtype)
    save_packed(packed, out, {name: trained.about[name] for name in ("phase", "model")})
    return {"parameters": parameters, "disk": out.stat().st_size, "memory": model_bytes(packed)}
