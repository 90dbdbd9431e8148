"""Text from a trained model, packed or not, one byte at a time; and the packing of what `train` left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantConfig, load_packed, model_bytes, pack_model, quantize_model, save_packed
from . import checkpoint, sources
from .checkpoint import CheckpointError
from .model import Cache, ModelConfig, Transformer


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


def load(path: Path) -> nn.Module:
    """Return a byte-level model in eval mode: a packed one from a file, a trained one from its folder.

    Raises:
        CheckpointError: if it is missing, damaged, or of another kind.
    """
    model = load_trained(path)[0] if path.is_dir() else load_packed(path, lambda config: _build(config, path))
    if not isinstance(model, Transformer):
        raise CheckpointError(f"{path} holds a {type(model).__name__}, must be a model of --model demo")
    return model.eval()


def _build(described: dict[str, Any], file: Path) -> nn.Module:
    """Return the model that a file says it holds, if it can."""
    sources.check_room(described["model"], file.stat().st_size)
    return sources.build(described["model"])


def load_trained(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a finished phase of `qatkernels train`, and its config.json.

    Raises:
        CheckpointError: if a file is missing, damaged, or of another kind.
    """
    described = checkpoint.read_json(folder / "config.json")
    tensors, header = checkpoint.load(folder / "model.safetensors")
    if described != header:
        raise checkpoint.DamagedError(folder / "config.json", "model.safetensors says something else of itself")
    try:
        model = _build(described, folder / "model.safetensors")
        if described["quantization"] is not None:
            quantization = QuantConfig.from_dict(described["quantization"])
            model = quantize_model(model, quantization, exclude=described["exclude"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} does not hold a model of this version ({reason})") from error
    return model, described


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
    model, described = load_trained(folder)
    if described["quantization"] is None:
        raise CheckpointError(f"{folder} was trained in full precision, there is nothing to pack")
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.endswith((".scale", ".zero_point")))
    packed = pack_model(model, scale_dtype=scale_dtype)
    save_packed(packed, out, {"phase": described["phase"], "model": described["model"]})
    return {"parameters": parameters, "disk": out.stat().st_size, "memory": model_bytes(packed)}
