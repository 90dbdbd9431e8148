"""Folders like those of transformers: ``config.json``, weights, generation settings, tokenizer."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing
from ..files import CheckpointError, explained, rename
from ..nn import packed_modules, quantized_modules
from ..nn.activation import quantized_ends
from ..nn.packed_linear import Packed
from ..nn.quantized import Quantized
from .integers import IntegerWeight, UnfitError, check_calibrated


@dataclass(frozen=True)
class Source:
    """A causal language model of transformers, taken apart.

    Attributes:
        model: the model.
        config: its configuration, without a quantization, and with the dtype of its weights.
        layers: quantized and packed layers by name.
        linears: names of the linear layers that stay in full precision.
        others: every tensor that is not part of a quantized weight, under the name that a file gives it.
        untied: names of output layers that shared their weight with an embedding, which a file cannot say.
        tables: names of quantized embeddings, whose values are among ``others``.
    """

    model: nn.Module
    config: Any
    layers: dict[str, Quantized | Packed]
    linears: list[str]
    others: dict[str, Tensor]
    untied: list[str]
    tables: list[str]

    @classmethod
    def of(cls, model: nn.Module, what: str, takes: Callable[[object], bool] = lambda act: False) -> Source:
        """Take a model apart.

        Args:
            model: a quantized or packed model.
            what: the format, for messages.
            takes: whether the format holds a quantizer of a layer's input or output.

        Raises:
            ValueError: if the model is not of transformers, or has no quantized layer.
            UnfitError: if a quantized layer is no linear layer where transformers builds the model.
            MissingExtraError: if transformers is not installed.
        """
        try:
            from transformers import PreTrainedModel
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError as error:
            raise missing(f"export to {what}", "export", error) from error
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"the model is {type(model).__name__}, export to {what} takes a model of transformers")
        config: Any = model.config
        layers: dict[str, Quantized | Packed] = {**quantized_modules(model), **packed_modules(model)}
        if not layers:
            raise ValueError("the model has no quantized layer, quantize_model makes them")
        built = _built(model, config)
        for name, layer in layers.items():
            if isinstance(layer, nn.Embedding):
                continue
            if not isinstance(built.get(name), nn.Linear):
                found = type(built[name]).__name__ if name in built else "nothing"
                raise UnfitError(
                    f"{name} is a {type(layer).__name__}, and transformers builds {found} of that name: {what} "
                    "quantizes nn.Linear only. Exclude it from quantize_model"
                )
            for end, act in quantized_ends(layer).items():
                if not takes(act):
                    raise UnfitError(f"{name} quantizes its {end}: {_ACTIVATIONS[what].format(**_FITTING[end])}")
            check_calibrated(name, layer)
        linears = [name for name, m in built.items() if isinstance(m, nn.Linear) and name not in layers]
        tables = {name: values_of(layer) for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
        untied = [name for name in _tied(model, config) if name in layers or tables]
        config = _plain(config)
        config.dtype = model.dtype
        config.architectures = [type(model).__name__]
        if untied:
            config.tie_word_embeddings = False
        plain = other_tensors(model, layers) | {f"{name}.weight": value for name, value in tables.items()}
        others = revert_weight_conversion(model, plain)
        layers = {name: layer for name, layer in layers.items() if name not in tables}
        if not layers:
            raise ValueError(f"only embeddings of the model are quantized, and {what} has codes of linear layers only")
        return cls(model, config, layers, linears, others, untied, list(tables))

    def integers(self, name: str) -> IntegerWeight:
        """Return the weight of a quantized layer; its errors name the layer."""
        with naming(name, self.layers[name]):
            return IntegerWeight.of(self.layers[name])

    @property
    def notes(self) -> list[str]:
        """What a user should know about any folder of this model."""
        return [
            f"{name} and the embedding, which the model ties, are stored apart: one is quantized, the other is not"
            for name in self.untied
        ] + [as_floats(name) for name in self.tables]

    def write(
        self, path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], kind: str, tokenizer: Any,
        metadata: Mapping[str, str] | None = None,
    ) -> int:  # fmt: skip
        """Write a folder.

        Args:
            path: the folder, which must not exist yet or be empty.
            tensors: the quantized weights; all others are added.
            settings: fields to add to ``config.json``.
            kind: ``"pt"`` or ``"mlx"``, the framework that a file of safetensors names.
            tokenizer: a tokenizer of transformers, or None.
            metadata: more of it for the file of safetensors.

        Returns:
            Bytes written.

        Raises:
            CheckpointError: if the folder holds something, or cannot be written.
        """
        from safetensors.torch import save_file

        every = {name: t.detach().cpu().contiguous() for name, t in {**self.others, **tensors}.items()}
        with new_folder(path) as folder:
            save_file(every, folder / "model.safetensors", {"format": kind, **(metadata or {})})
            config = json.loads(self.config.to_json_string(use_diff=True)) | dict(settings)
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            if (generation := getattr(self.model, "generation_config", None)) is not None:
                generation.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


#: Why a format does not take layers that quantize their input or output, with what `_FITTING` says of these.
_ACTIVATIONS = {
    "compressed-tensors": (
        "use QuantConfig({fits}), or train without {field}. The format holds one learned scale without a zero point. "
        "With dynamic scales results would differ: compressed-tensors divides the largest element of a token by 127.5, "
        "this library by 127"
    ),
    "MLX": "MLX has no field for that. Train without {field}",
    "torchao": "export to torchao takes weights alone. Train without {field}",
    "gemma": "the format holds one learned scale of int8 {end}s, QuantConfig({fits}); or train without {field}",
}
_FITTING = {
    "input": {"end": "input", "field": "act_bits", "fits": "act_bits=8, act_scheme='lsq'"},
    "output": {"end": "output", "field": "out_bits", "fits": "out_bits=8"},
}


@contextlib.contextmanager
def naming(name: str, layer: Quantized | Packed) -> Iterator[None]:
    """Put the name and the shape of a layer before the message of an UnfitError."""
    try:
        yield
    except UnfitError as error:
        raise UnfitError(f"{name} ({layer.weight.shape[0]} x {layer.weight.shape[1]}): {error}") from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside a path, which gets that name when the context ends without an error.

    Raises:
        CheckpointError: if the path exists and is not an empty folder, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already: give the name of a new folder, or delete it first")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with explained("written", path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "r+b") as opened:
                        os.fsync(opened.fileno())
            rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _built(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Return the modules that transformers builds for a configuration, which are those that a reader of the file has.

    They are on the meta device: nothing is allocated.
    """
    with torch.device("meta"):
        return dict(type(model)(_plain(config)).named_modules())


def _plain(config: Any) -> Any:
    """Return a copy of a configuration that says nothing of a quantization."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    return config


def _tied(model: nn.Module, config: Any) -> list[str]:
    """Return the name of the output layer if the configuration ties it to the embedding."""
    if not getattr(config, "tie_word_embeddings", False):
        return []
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is head]


def values_of(layer: Quantized | Packed) -> Tensor:
    """Return the weight that a layer computes with, in the dtype of its weight."""
    if isinstance(layer, Packed):
        return layer.weight.dequantize(layer.weight.dtype)
    return layer.quantized_weight().detach()


def as_floats(name: str) -> str:
    """Return a note that an embedding is stored with its quantized values, as full precision."""
    return f"{name} is stored in full precision, with exactly its quantized values: only linear layers have codes here"


def other_tensors(model: nn.Module, layers: Mapping[str, Quantized | Packed]) -> dict[str, Tensor]:
    """Return what a model's state dict holds beside quantized weights; what several names share, under the first."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    prefixes = tuple(f"{name}." for name in layers)
    for name, value in model.state_dict(keep_vars=True).items():
        if name.startswith(prefixes) and not (name.endswith(".bias") and name.removesuffix(".bias") in layers):
            continue
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found
