"""Generates text from a trained model, packed or not, and packs the models that `train` wrote."""

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
        path: a file with a packed model, or the folder of a finished phase.

    Raises:
        CheckpointError: if the model is missing or damaged, or the file is of another kind.
    """
    if path.is_dir():
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


def load(path: Path) -> nn.Module:
    """Return a demo model in eval mode: a packed one from a file, or a trained one from its folder.

    Raises:
        CheckpointError: if the model is missing or damaged, or is not a demo model.
    """
    model, _ = open_model(path)
    if not isinstance(model, Transformer):
        raise CheckpointError(f"{path} holds a {type(model).__name__}, must be a model of --model demo")
    return model.eval()


def pack(folder: Path, out: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Pack the model of a finished phase into a file.

    Args:
        folder: a folder that `qatkernels train` wrote, such as ``runs/demo/w2``.
        out: the file.
        scale_dtype: dtype to store scales in.

    Returns:
        ``parameters``: number of parameters without scales; ``disk`` and ``memory``: bytes of the packed model.

    Raises:
        CheckpointError: if the model cannot be read or was trained in full precision, or ``out`` cannot be written or
            is one of the files of the model.
    """
    for source in ("model.safetensors", "config.json"):
        if out.exists() and (folder / source).exists() and out.samefile(folder / source):
            raise CheckpointError(f"{out} is a file of the model in {folder}, give another file to write to")
    trained = models.load_trained(folder)
    if trained.about["quantization"] is None:
        raise CheckpointError(f"{folder} was trained in full precision, there is nothing to pack")
    parameters = sizes(trained.model)["parameters"]
    packed = pack_model(trained.model, scale_dtype=scale_dtype)
    save_packed(packed, out, {name: trained.about[name] for name in ("phase", "model")})
    return {"parameters": parameters, "disk": out.stat().st_size, "memory": model_bytes(packed)}
