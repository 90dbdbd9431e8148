"""The model that a run trains: the demo model, a model that an earlier run wrote, or one of transformers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import CheckpointError, DamagedError, header, load, open_tensors, read_json
from ..nn import QuantConfig, quantize_model
from ..nn.experts import Stack, stacks_of
from ..nn.quant_conv1d import is_conv1d
from ..nn.quantizer import scales_come_later
from ..nn.recipe import METHOD
from .demo_model import ModelConfig, Transformer

#: The value of ``--model`` that is not a path.
DEMO = "demo"
#: The file that marks a phase as finished: what the model is, and the result. It is written last.
MARKER = "phase.json"
#: Layers of the demo model that stay in full precision, as in the papers.
EXCLUDED = ("lm_head",)
_NOT_OURS = "not a model that `qatkernels train` wrote, or a model of another version"
#: Largest size in bytes of the rotary angles of a stored model. They are computed from numbers in the file's header, so
#: the size of the file does not limit them.
_MAX_ANGLES = 2**27


def describe(model: str, shape: ModelConfig) -> dict[str, Any]:
    """Return the values that a model is built from. They are saved in the header of its weights.

    Args:
        model: the value of ``--model``: ``demo``; a folder or file that `qatkernels train` wrote; a folder with the
            ``config.json`` of a causal language model of transformers, with or without weights; or such a
            ``config.json``.
        shape: shape of the demo model.

    Returns:
        The fields of :class:`ModelConfig`; or a dictionary with the key ``transformers``, whose value has the fields of
        a configuration of transformers.

    Raises:
        ValueError: if there is no such model.
    """
    if model == DEMO:
        return asdict(shape)
    path = Path(model)
    try:
        if path.suffix == ".safetensors":
            content = header(path)
        else:
            marked = path.is_dir() and (path / MARKER).exists()
            content = read_json(path / (MARKER if marked else "config.json") if path.is_dir() else path)
    except CheckpointError as error:
        raise ValueError(f"--model is {model}, must be {DEMO}, or hold a model: {error}") from error
    if "model_type" in content:
        return {"transformers": content}
    described = content.get("model")
    if not isinstance(described, dict):
        raise ValueError(
            f"--model is {model}, which holds neither a model of `qatkernels train` nor one of transformers"
        )
    if "transformers" in described:
        return described
    return {**described, "context": shape.context}  # with rotary positions no weight depends on the context


def build(described: dict[str, Any]) -> nn.Module:
    """Return a new model, with weights drawn from torch's default generator.

    Args:
        described: what :func:`describe` returned.

    Raises:
        ValueError: if such a model cannot be built here.
    """
    if "transformers" not in described:
        return Transformer(ModelConfig(**described))
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(f"a model of transformers needs `pip install qatkernels[hf]` ({error})") from error
    set_here = ("dtype", "quantization_config")
    settings = {key: value for key, value in described["transformers"].items() if key not in set_here}
    config = AutoConfig.for_model(**settings)
    config.use_cache = False
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def check_plausible_size(described: dict[str, Any], size: int) -> None:
    """Raise ValueError if a demo model has more weights than its file can hold.

    The header of a file decides how much memory the model takes, and the file may be malicious. So this is checked
    before the model is built. There is no formula for models of transformers, which are not checked.

    Args:
        described: what :func:`describe` returned.
        size: bytes of the file with the weights.
    """
    if "transformers" in described:
        return
    config = ModelConfig(**described)
    weights = 2 * config.vocab * config.width + 4 * config.depth * config.width**2  # a lower bound, without the MLPs
    if weights > 8 * size:  # a weight takes at least one bit
        raise ValueError(f"its model has at least {weights} weights, which {size} bytes cannot hold")
    if (angles := 4 * config.context * config.width // config.heads) > _MAX_ANGLES:
        raise ValueError(
            f"context is {config.context}, whose rotary angles take {angles} bytes, must be at most {_MAX_ANGLES}"
        )


def weight_files(model: str) -> list[Path]:
    """Return the files with the weights that training starts from; an empty list means random weights.

    Raises:
        ValueError: if there are weights in a format that is not read.
    """
    path = Path(model)
    if model == DEMO or (path.is_file() and path.suffix != ".safetensors"):
        return []
    if path.is_file():
        return [path]
    if (path / MARKER).exists():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files and (pickled := sorted(path.glob("*.bin"))):
        raise ValueError(
            f"--model is {model}, whose weights are in {pickled[0].name}, must be in *.safetensors: pickles "
            "are not opened, because they can run code; for random weights give the path of config.json"
        )
    return files


def initial_weights(model: str) -> dict[str, Tensor] | None:
    """Return the weights that training starts from, or None for random weights.

    Of a quantized model these are the full-precision master weights, without the scales.

    Raises:
        CheckpointError: if the weights cannot be read.
        ValueError: if the weights are in a format that is not read.
    """
    files = weight_files(model)
    if not files:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        content, about = _read_tensors(file)
        about = about or _saved_by_transformers(file.parent)
        tensors |= content if about is None else _master_weights(content, about, file)
    if _has_single_experts(tensors, Path(model)):
        # transformers stacks them while it loads; hf_folder imports what imports this module
        from . import hf_folder

        tensors = dict(hf_folder.load(Path(model)).state_dict())
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _has_single_experts(tensors: dict[str, Tensor], folder: Path) -> bool:
    """Whether a folder of transformers stores experts one by one, and the model has them in stacks."""
    single = {name for name in tensors if re.search(r"\.experts\.\d+\.", name)}
    if not single or not folder.is_dir():
        return False
    with torch.device("meta"):
        return not single & build(describe(str(folder), ModelConfig())).state_dict().keys()


def _saved_by_transformers(folder: Path) -> dict[str, Any] | None:
    """Return what the header of a trained model says, of a quantized model that ``save_pretrained`` wrote.

    Raises:
        CheckpointError: if the model is packed.
    """
    settings = read_json(folder / "config.json")
    quantization = settings.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return None
    if any(group.get("packed") for group in quantization.get("recipe", ())):
        raise CheckpointError(f"{folder} holds a packed model, which has no weights to train; give the one it is of")
    return {"model": {"transformers": settings}, "quantization": quantization}


def _master_weights(tensors: dict[str, Tensor], about: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Return the tensors without those that quantization added to layers; stacks of experts are no layers any more.

    A tensor was added if the full-precision model does not have it. Names alone do not tell, because a model may have
    parameters of its own that are called ``scale``.
    """
    if about.get("quantization") is None:
        return tensors
    try:
        with torch.device("meta"):
            model = build(about["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is {_NOT_OURS} ({error})") from error
    full_precision, exclude = model.state_dict().keys(), set(about.get("exclude", ()))
    layers = {
        name for name, m in model.named_modules()
        if (isinstance(m, nn.Linear | nn.Embedding) or is_conv1d(m)) and name not in exclude
    }  # fmt: skip
    stacks = {f"{prefix}.{stack.name}": stack for prefix, m in model.named_modules() for stack in stacks_of(m)}
    tensors, layers = _as_stacks(tensors, stacks), layers | stacks.keys()
    return {name: t for name, t in tensors.items() if name in full_precision or not _is_inside(name, layers)}


def _as_stacks(tensors: dict[str, Tensor], stacks: dict[str, Stack]) -> dict[str, Tensor]:
    """Return tensors with the weights and biases of layers that took the place of stacks as those of the stacks."""
    tensors = dict(tensors)
    for name, stack in stacks.items():
        if (weight := tensors.pop(f"{name}.weight", None)) is not None:
            tensors[name] = weight.mT.contiguous() if stack.transposed else weight
        if (bias := tensors.pop(f"{name}.bias", None)) is not None:
            tensors[f"{name}_bias"] = bias
    return tensors


def _is_inside(name: str, modules: set[str]) -> bool:
    """Whether the tensor of this name belongs to one of the modules, or to a submodule of one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


@dataclass(frozen=True)
class Trained:
    """A model that `qatkernels train` wrote.

    Attributes:
        model: the model on the CPU, in training mode; quantized if it was trained quantized.
        about: the header of its file: phase, model, quantization, exclude and result.
        file: the file with its weights.
    """

    model: nn.Module
    about: dict[str, Any]
    file: Path


def load_trained(path: Path) -> Trained:
    """Return a model that `qatkernels train` wrote.

    Args:
        path: the folder of a finished phase, such as ``runs/demo/w2``, or a ``.safetensors`` file in one.

    Raises:
        CheckpointError: if a file is missing or damaged, or was not written by `qatkernels train`.
    """
    is_file = path.suffix == ".safetensors"
    file = path if is_file else path / "model.safetensors"
    about = None if is_file else read_json(path / MARKER)
    tensors, file_header = load(file)
    if about is not None and about != file_header:
        raise DamagedError(path / MARKER, "it differs from the header of model.safetensors")
    about = file_header
    try:
        check_plausible_size(about["model"], file.stat().st_size)
        model = build(about["model"])
        if about["quantization"] is not None:
            quantization = QuantConfig.from_dict(about["quantization"])
            with scales_come_later():
                embeddings = about.get("embeddings")  # absent in files of earlier versions
                model = quantize_model(
                    model, quantization, exclude=about["exclude"], warn_below=0,
                    embeddings=QuantConfig.from_dict(embeddings) if embeddings else False,
                )  # fmt: skip
        fill(model, tensors, file.name)
        about["phase"], about["result"]["steps"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is {_NOT_OURS} ({' '.join(str(error).split())})") from error
    return Trained(model, about, file)


def fill(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights into a model by name. A weight that is tied to another one may be missing.

    Args:
        model: changed in place.
        weights: tensors by name.
        where: where the weights come from, for the error message.

    Raises:
        CheckpointError: if the weights belong to another model.
    """
    first_names = {id(p): name for name, p in model.named_parameters()}
    all_names = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    tied = {name for name, p in all_names.items() if first_names[id(p)] != name}
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit the model: {' '.join(str(error).split())}") from error
    missing = set(result.missing_keys) - tied
    if missing or result.unexpected_keys:
        name = sorted(missing or result.unexpected_keys)[0]
        raise CheckpointError(f"{where} does not fit the model: {'it has no' if missing else 'it has a'} {name}")


def excluded(model: nn.Module, embeddings: bool = False) -> tuple[str, ...]:
    """Return the names of the linear layers that stay in full precision: the output head.

    Args:
        model: the model.
        embeddings: whether embeddings of tokens are quantized, and with them a head that is tied to them.
    """
    if isinstance(model, Transformer):
        return EXCLUDED
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    if embeddings and head is not None and head.weight is table.weight:
        return ()
    return tuple(name for name, module in model.named_modules() if module is head)


def limits(described: dict[str, Any]) -> tuple[int, int | None]:
    """Return the vocabulary size of a model, and its longest sequence, None if there is no limit."""
    if "transformers" not in described:
        return int(described["vocab"]), int(described["context"])
    settings = described["transformers"]
    return int(settings.get("vocab_size", 0)), settings.get("max_position_embeddings") or settings.get("n_positions")


def tokenizer(model: str) -> Path | None:
    """Return the ``tokenizer.json`` in the folder of a model of transformers, or None: tokens are then bytes.

    Args:
        model: the value of ``--model``; of a file it is the folder that it is in.

    Raises:
        ValueError: if the folder has a tokenizer in other files alone.
    """
    folder = Path(model).parent if Path(model).is_file() else Path(model)
    if model == DEMO or (folder / "tokenizer.json").is_file():
        return None if model == DEMO else folder / "tokenizer.json"
    if other := [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]:
        raise ValueError(
            f"--model is {model}, whose tokenizer is in {other[0]}, must be in tokenizer.json: write it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return None


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a safetensors file. A file of this package is compared with its digest, and its header is returned too."""
    with open_tensors(file) as content:
        if "header" in (content.metadata() or {}):
            return load(file)
        return {name: content.get_tensor(name).clone() for name in content.keys()}, None  # noqa: SIM118
