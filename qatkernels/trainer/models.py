"""Which model a run trains: the demo's, one that an earlier run left, or one of transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError, DamagedError, header, load, open_tensors, read_json
from ..nn import QuantConfig, quantize_model
from .demo_model import ModelConfig, Transformer

#: The model that ``--model`` names unless it is a path.
DEMO = "demo"
#: Layers of the demo's model that stay in full precision, as in the papers.
EXCLUDED = ("lm_head",)
_STRANGE = "no model that `qatkernels train` wrote, or one of another version"
#: Bytes that the rotary angles of a stored model may take: a few numbers in a header ask for them, no file holds them.
_MAX_ANGLES = 2**27


def describe(model: str, shape: ModelConfig) -> dict[str, Any]:
    """Return the values that a model is built from, as they are written beside its weights.

    Args:
        model: ``--model``: ``demo``; a folder or file that `qatkernels train` left; a folder with the ``config.json``
            of a causal language model of transformers, and perhaps its weights, or that file alone.
        shape: of the demo's model.

    Returns:
        The fields of :class:`ModelConfig`, or ``transformers`` with the fields of a configuration of transformers.

    Raises:
        ValueError: if there is no such model.
    """
    if model == DEMO:
        return asdict(shape)
    path = Path(model)
    try:
        if path.suffix == ".safetensors":
            found = header(path)
        else:
            found = read_json(path / "config.json" if path.is_dir() else path)
    except CheckpointError as error:
        raise ValueError(f"--model is {model}, must be {DEMO}, or hold a model: {error}") from error
    if "model_type" in found:
        return {"transformers": found}
    ours = found.get("model")
    if not isinstance(ours, dict):
        raise ValueError(
            f"--model is {model}, which holds neither a model of `qatkernels train` nor one of transformers"
        )
    if "transformers" in ours:
        return ours
    return {**ours, "context": shape.context}  # rotary positions: nothing in the weights depends on it


def build(described: dict[str, Any]) -> nn.Module:
    """Return a new model of the kind that :func:`describe` told, its weights drawn from torch's generator.

    Raises:
        ValueError: if it is none that can be built here.
    """
    if "transformers" not in described:
        return Transformer(ModelConfig(**described))
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(f"a model of transformers needs `pip install qatkernels[hf]` ({error})") from error
    settings = {key: value for key, value in described["transformers"].items() if key != "dtype"}
    config = AutoConfig.for_model(**settings)
    config.use_cache = False
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def check_room(described: dict[str, Any], size: int) -> None:
    """Raise ValueError if a demo's model is larger than a file of so many bytes can be, before it is built.

    What a file says of its model decides how much memory is asked for, and a stranger may have written it. A model of
    transformers has no such formula and is not checked.

    Args:
        described: as :func:`describe` returns it.
        size: bytes of the file with its weights.
    """
    if "transformers" in described:
        return
    config = ModelConfig(**described)
    weights = 2 * config.vocab * config.width + 4 * config.depth * config.width**2  # at least; each has a bit or more
    if weights > 8 * size:
        raise ValueError(f"its model has {weights} weights or more, which {size} bytes cannot hold")
    if (angles := 4 * config.context * config.width // config.heads) > _MAX_ANGLES:
        raise ValueError(
            f"context is {config.context}, whose rotary angles take {angles} bytes, must be at most {_MAX_ANGLES}"
        )


def weight_files(model: str) -> list[Path]:
    """Return the files of the weights that training starts from, none if they are to be drawn.

    Raises:
        ValueError: if there are weights that cannot be read.
    """
    path = Path(model)
    if model == DEMO or (path.is_file() and path.suffix != ".safetensors"):
        return []
    if path.is_file():
        return [path]
    if "phase" in read_json(path / "config.json"):
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files and (pickled := sorted(path.glob("*.bin"))):
        raise ValueError(
            f"--model is {model}, whose weights are in {pickled[0].name}, must be in *.safetensors: a pickle "
            "is not opened here; for new weights give the config.json alone"
        )
    return files


def initial_weights(model: str) -> dict[str, Tensor] | None:
    """Return the weights that training starts from, None if they are to be drawn.

    A model that was quantized gives its full-precision master weights, without the scales.

    Raises:
        CheckpointError: if they cannot be read.
        ValueError: if they are there in a form that is not read.
    """
    files = weight_files(model)
    if not files:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        found, about = _tensors(file)
        tensors |= found if about is None else _masters(found, about, file)
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _masters(tensors: dict[str, Tensor], about: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Leave out what quantization added: entries of linear layers that the model does not have in full precision.

    The names alone do not tell, because models have parameters of their own that are called ``scale``.
    """
    if about.get("quantization") is None:
        return tensors
    try:
        with torch.device("meta"):
            model = build(about["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is {_STRANGE} ({error})") from error
    own, kept = model.state_dict().keys(), set(about.get("exclude", ()))
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in kept}
    return {name: t for name, t in tensors.items() if name in own or not _within(name, layers)}


def _within(name: str, modules: set[str]) -> bool:
    """Whether a tensor belongs to one of the modules, or to a part of one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


@dataclass(frozen=True)
class Trained:
    """A model that `qatkernels train` left.

    Attributes:
        model: on the CPU, in training mode; quantized if it was trained so.
        about: what was written beside it: phase, model, quantization, exclude and result.
        file: where its weights are.
    """

    model: nn.Module
    about: dict[str, Any]
    file: Path


def load_trained(path: Path) -> Trained:
    """Return a model of `qatkernels train`.

    Args:
        path: the folder of a finished phase, such as ``runs/demo/w2``, or a ``.safetensors`` file in one.

    Raises:
        CheckpointError: if a file is missing, damaged, or of another kind.
    """
    alone = path.suffix == ".safetensors"
    file = path if alone else path / "model.safetensors"
    described = None if alone else read_json(path / "config.json")  # it is written last: the phase is finished
    tensors, inside = load(file)
    if described is not None and described != inside:
        raise DamagedError(path / "config.json", "model.safetensors says something else of itself")
    about = inside if described is None else described
    try:
        check_room(about["model"], file.stat().st_size)
        model = build(about["model"])
        if about["quantization"] is not None:
            quantization = QuantConfig.from_dict(about["quantization"])
            model = quantize_model(model, quantization, exclude=about["exclude"], warn_below=0)
        model.load_state_dict(tensors)
        about["phase"], about["result"]["steps"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is {_STRANGE} ({' '.join(str(error).split())})") from error
    return Trained(model, about, file)


def fill(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights by name; those that are tied to another may be missing.

    Raises:
        CheckpointError: if they are not this model's.
    """
    tied = {id(p): name for name, p in model.named_parameters()}
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    twins = {name for name, p in own.items() if tied[id(p)] != name}
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit the model: {' '.join(str(error).split())}") from error
    missing = set(found.missing_keys) - twins
    if missing or found.unexpected_keys:
        name = sorted(missing or found.unexpected_keys)[0]
        raise CheckpointError(f"{where} does not fit the model: {'it has no' if missing else 'it has a'} {name}")


def excluded(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers that stay in full precision: the one that makes the logits."""
    if isinstance(model, Transformer):
        return EXCLUDED
    head = model.get_output_embeddings()  # type: ignore[operator]
    return tuple(name for name, module in model.named_modules() if module is head)


def limits(described: dict[str, Any]) -> tuple[int, int | None]:
    """Return the size of a model's vocabulary, and the longest sequence if there is one."""
    if "transformers" not in described:
        return int(described["vocab"]), int(described["context"])
    settings = described["transformers"]
    return int(settings.get("vocab_size", 0)), settings.get("max_position_embeddings") or settings.get("n_positions")


def tokenizer(model: str) -> Path | None:
    """Return the file of the tokenizer that lies beside a model of transformers; without one tokens are bytes."""
    file = Path(model) / "tokenizer.json"
    return file if model != DEMO and file.is_file() else None


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a safetensors file; one of ours is held against its digest, and comes with its header."""
    with open_tensors(file) as content:
        if "header" in (content.metadata() or {}):
            return load(file)
        return {name: content.get_tensor(name).clone() for name in content.keys()}, None  # noqa: SIM118
