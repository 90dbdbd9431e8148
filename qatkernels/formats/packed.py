"""Files of packed models. A packed model is a single safetensors file; loading it never executes code from the file.

The header says which layers are packed, and how. The tensors are those of the model's state dict, where a shared tensor
is stored once. A digest covers both. docs/packing.md describes the format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import files
from ..dtypes import dtype_name
from ..files import CheckpointError
from ..float32_scales import Float32Scales
from ..grids import make_grid
from ..nn import LearnedActivation, packed_modules
from ..nn._gather_model import is_sharded, whole_in_every_process
from ..nn.activation import ACTS
from ..nn.experts import Stack, find
from ..nn.packed_linear import KINDS, Packed, PackedEmbedding
from ..nn.quant_conv1d import is_conv1d
from ..ops.contract import FLOATS
from ..ops.packed_weight import PackedWeight
from ._export import ExportReport, ExportRow

FORMAT, VERSION = "qatkernels-packed", 1


def export(model: nn.Module, path: Path, *, config: Mapping[str, Any] | None = None) -> ExportReport:
    """Write a packed model as this library's own file, and say how each layer is stored; see :func:`save_packed`."""
    save_packed(model, path, config)
    rows = []
    for name, layer in packed_modules(model).items():
        weight = layer.weight
        stored_as = f"{weight.grid.scheme}, {weight.grid.bits:g} bits"
        rows.append(ExportRow(name, stored_as, 8 * weight.nbytes / max(weight.numel(), 1)))
    return ExportReport(path, rows, path.stat().st_size)


def save_packed(model: nn.Module, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a packed model to one file, atomically.

    Args:
        model: a model from :func:`pack_model`, on any device.
        path: destination.
        config: JSON-able values that :func:`load_packed` gives to the function that builds the model.

    Raises:
        ValueError: if no layer is packed, ``config`` is not JSON-able, or the state dict holds something that is not a
            tensor.
        CheckpointError: if the file cannot be written.
    """
    if not packed_modules(model):
        raise ValueError("the model has no packed layer: call pack_model first")
    if is_sharded(model):
        raise ValueError(f"the model is sharded: {whole_in_every_process(model)}, and save that in one of them")
    first_names: dict[int, str] = {}  # by id of the tensor
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    layouts = _layouts(model)  # not stored as tensors: the header has the same information
    for name, value in model.state_dict(keep_vars=True).items():
        if name in layouts:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"the state dict holds {type(value).__name__} as {name}, must hold tensors only")
        if (first_name := first_names.setdefault(id(value), name)) == name:
            tensors[name] = value
        else:
            aliases[name] = first_name
    layers: dict[nn.Module, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Packed):
            entry = layers.setdefault(module, {"names": [], **_layer_entry(module, f"{name}.".lstrip("."))})
            entry["names"].append(name)
            entry["weight"] = first_names[id(module.weight.packed)].removesuffix("packed")
    header = {
        "format": FORMAT, "version": VERSION, "config": dict(config or {}), "layers": list(layers.values()),
        "aliases": aliases,
    }  # fmt: skip
    try:
        files.save(Path(path), tensors, header)
    except TypeError as error:
        raise ValueError(f"config is {config!r}, must be JSON-able: {error}") from error


def _layouts(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of the state dict that describe the layout of codes and scales."""
    return {
        f"{name}._extra_state": module.get_extra_state()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Float32Scales)
    }


def _layer_entry(module: Packed, prefix: str) -> dict[str, Any]:
    """Return the entry of a layer in the header, without its names."""
    grid = module.grid
    present: dict[str, Any] = {}
    if module.bias is not None:
        present["bias"] = "trains" if module.bias.requires_grad else "frozen"
    if module.weight.zero_point is not None:
        present["zero_point"] = True
    present["dtype"] = dtype_name(module.weight.dtype)
    acts = {name: _act_entry(getattr(module, name), f"{prefix}{name}") for name in ACTS}
    if acts["out_act"] is not None:
        present["out_act"] = acts["out_act"]
    return {
        "kind": module.kind,
        "scheme": grid.scheme,
        "bits": grid.bits,
        "cols": module.weight.cols,
        "act_bits": module.act_bits,
        "act": acts["act"],
        **present,
    }


def _act_entry(act: nn.Module | None, name: str) -> dict[str, Any] | None:
    """Return the entry of a quantizer of activations, None if there is none."""
    if act is None:
        return None
    if type(act) is not LearnedActivation:
        raise ValueError(f"{name} is a {type(act).__qualname__}, must be a LearnedActivation to be saved")
    return {"scheme": act.grid.scheme, "bits": act.grid.bits, "offset": act.zero_point is not None}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


_DTYPES = [dtype_name(dtype) for dtype in FLOATS]
_Fields = dict[str, tuple[Callable[[Any], bool], str]]
#: For each field of a header: a test of its value, and a phrase for the error message. The fields in `_OPTIONAL` may be
#: absent from the entry of a layer.
_HEADER: _Fields = {
    "config": (lambda v: isinstance(v, dict), "an object"),
    "layers": (lambda v: isinstance(v, list) and all(isinstance(e, dict) for e in v), "a list of objects"),
    "aliases": (lambda v: isinstance(v, dict) and all(isinstance(e, str) for e in v.values()), "an object of names"),
}
_LAYER: _Fields = {
    "names": (_is_names, "a list of names"),
    "kind": (lambda v: isinstance(v, str) and v in KINDS, f"one of {sorted(KINDS)}"),
    "weight": (lambda v: isinstance(v, str), "a string"),
    "scheme": (lambda v: isinstance(v, str), "a string"),
    "bits": (_is_number, "a number"),
    "cols": (lambda v: _is_whole(v) and v >= 0, "an integer of at least 0"),
    "act_bits": (lambda v: v is None or (_is_whole(v) and 2 <= v <= 8), "null or 2 to 8"),
    "act": (lambda v: v is None or isinstance(v, dict), "null or an object"),
}
_OPTIONAL: _Fields = {
    "bias": (lambda v: v in ("trains", "frozen"), "'trains' or 'frozen'"),
    "zero_point": (lambda v: v is True, "true"),
    "dtype": (lambda v: v in _DTYPES, f"one of {_DTYPES}"),
    "out_act": (lambda v: isinstance(v, dict), "an object"),
}
_ACT: _Fields = {
    "scheme": (lambda v: isinstance(v, str), "a string"),
    "bits": (_is_number, "a number"),
    "offset": (lambda v: isinstance(v, bool), "true or false"),
}


def _check(header: dict[str, Any]) -> None:
    """Raise KeyError if a field of a header is missing, ValueError if its value is not allowed."""

    def check_fields(where: str, values: dict[str, Any], fields: _Fields) -> None:
        for name, (is_allowed, allowed) in fields.items():
            if not is_allowed(values[name]):
                raise ValueError(f"{where}{name} is {values[name]!r:.80}, must be {allowed}")

    check_fields("", header, _HEADER)
    for i, layer in enumerate(header["layers"]):
        check_fields(f"layers[{i}].", layer, _LAYER)
        check_fields(f"layers[{i}].", layer, {name: field for name, field in _OPTIONAL.items() if name in layer})
        for name in ACTS:
            if layer.get(name) is not None:
                check_fields(f"layers[{i}].{name}.", layer[name], _ACT)


def load_packed(
    path: str | Path, build: Callable[[dict[str, Any]], nn.Module], *, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return the model in a file that :func:`save_packed` wrote, in eval mode.

    It takes the memory of the file, and that of the codes of one layer while they are checked.

    Args:
        path: the file.
        build: builds the model, as it was before quantization, from the ``config`` that was saved. Its Parameters have
            no data; if it reads or replaces their data, it is called again with them. Modules must have
            the same names; in place of a packed layer any module will do. Values of weights do not matter: Parameters
            that it makes have none (they are on the meta device), so that a large model is never there in full
            precision. Buffers that the file lacks must have data.
        device: device of the result.

    Returns:
        The model, with the dtypes that it was saved with.

    Raises:
        CheckpointError: if the file is missing or damaged, has another format or version, or does not fit the model
            that ``build`` returns. The message names the file and the reason. Errors of ``build`` are not caught.
        TypeError: if ``build`` returns no module.
    """
    path = Path(path)
    tensors, header = files.load(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a packed model: its format is {header.get('format')!r}, not {FORMAT!r}")
    if not _is_whole(version := header.get("version")) or version != VERSION:
        raise CheckpointError(f"{path} is version {version!r} of the format, this qatkernels reads {VERSION}")
    with _errors_name(path):
        _check(header)
        state = tensors | {alias: tensors[name] for alias, name in header["aliases"].items()}
    model = _without_data(build, header["config"])
    if not isinstance(model, nn.Module):
        raise TypeError(f"build returned {model!r:.80}, must return the model as it was before quantization")
    with _errors_name(path):
        model = _with_packed_layers(model, header["layers"], state)
        _fill(model, state)
    return model.to(device).eval()


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn errors about the content of a file into a CheckpointError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit this model: {reason}") from error


def _with_packed_layers(model: nn.Module, layers: list[dict[str, Any]], state: dict[str, Tensor]) -> nn.Module:
    """Replace modules of the model by the packed layers of a file, and return the model."""
    weights: dict[str, PackedWeight] = {}
    biases: dict[int, nn.Parameter] = {}
    for entry in layers:
        prefix = entry["weight"]
        if prefix not in weights:
            weights[prefix] = _packed_weight(entry, prefix, state)
            weights[prefix].layer = entry["names"][0]
        layer = None
        for name in entry["names"]:
            if (old := find(model, name)) is None:
                old = model.get_submodule(name)  # whose error says what is missing
            layer = layer or _layer(entry, weights[prefix], old, state, biases)
            if not name:
                return layer
            if isinstance(old, Stack):
                old.put(layer)
                continue
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return model


def _optional_tensor(state: dict[str, Tensor], name: str, required: bool) -> Tensor | None:
    """Return a tensor, or None if it is absent. It must be present if the header lists it; earlier files list none."""
    return state[name] if required else state.get(name)


def _packed_weight(entry: dict[str, Any], prefix: str, state: dict[str, Tensor]) -> PackedWeight:
    zero_point = _optional_tensor(state, f"{prefix}zero_point", "zero_point" in entry)
    grid = make_grid(entry["scheme"], entry["bits"])
    packed, scale = state[f"{prefix}packed"], state[f"{prefix}scale"]
    dtype = getattr(torch, entry.get("dtype", "float32"))
    weight = PackedWeight(packed, scale, zero_point, grid, entry["cols"], dtype=dtype)
    if not all(t is None or t.isfinite().all() for t in (weight.scale, zero_point)):
        raise ValueError(f"{prefix}scale or its zero point is not finite")
    if grid.levels < 1 << grid.storage_bits and weight.packed.numel():
        largest = int(weight.codes().amax())
        if largest > grid.code_max:
            raise ValueError(f"{prefix}packed has a code {largest}, must be {grid.code_min} to {grid.code_max}")
    return weight


def _layer(
    entry: dict[str, Any], weight: PackedWeight, old: nn.Module | Stack, state: dict[str, Tensor],
    biases: dict[int, nn.Parameter],
) -> Packed:  # fmt: skip
    """Return the packed layer for an entry of the header.

    Args:
        entry: the entry.
        weight: its packed weight.
        old: the module, or stack of experts, that it replaces. If this has a weight, shape and bias must fit.
        state: tensors of the file by name.
        biases: parameters made so far by id of the stored tensor, so that layers share a bias if the file does.
    """
    name, kind = entry["names"][0], KINDS[entry["kind"]]
    built = getattr(old, "weight", None)
    if isinstance(built, Tensor):
        shape = old.shape if isinstance(old, Stack) else built.t().shape if is_conv1d(old) else built.shape
        if shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)} in the file and {tuple(shape)} in the model")
    bias, stored = None, _optional_tensor(state, f"{name}.bias".lstrip("."), "bias" in entry)
    if isinstance(built, Tensor) and hasattr(old, "bias") and (old.bias is None) != (stored is None):
        raise ValueError(f"{name or 'the layer'} has a bias in the {'model' if stored is None else 'file'} only")
    if stored is not None:
        if stored.dtype not in FLOATS:
            raise ValueError(f"the bias of {name or 'the layer'} is {stored.dtype}, must be one of {FLOATS}")
        trains = entry.get("bias") != "frozen"
        bias = biases.setdefault(id(stored), nn.Parameter(torch.empty_like(stored), requires_grad=trains))
    rows, cols = weight.shape[-2:]
    act, out_act = _act(entry["act"], cols), _act(entry.get("out_act"), rows)
    layer = kind(weight, bias, act=act, act_bits=entry["act_bits"], out_act=out_act)
    if isinstance(layer, PackedEmbedding) and isinstance(old, nn.Embedding):
        layer.be_like(old)
    if isinstance(old, nn.Module) and is_conv1d(old):
        vars(layer)["of_conv1d"] = True
    return layer


def _act(entry: dict[str, Any] | None, features: int) -> LearnedActivation | None:
    """Return the quantizer of activations for an entry, None if there is none."""
    if entry is None:
        return None
    return LearnedActivation(features, make_grid(entry["scheme"], entry["bits"]), offset=entry["offset"])


def _without_data(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Return the model that ``build`` makes, without the data of its Parameters; with them if it reads or sets them."""
    with _parameters_on_meta():
        try:
            return build(config)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error) and "incompatible tensor type" not in str(error):
                raise
    return build(config)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules of this thread register Parameters without data. Buffers, which a file may lack, have data."""
    thread = threading.get_ident()
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the id of what was registered, which is kept alive

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        if id(parameter) not in made:  # a Parameter of several modules stays one
            made[id(parameter)] = parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return made[id(parameter)][1]

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # torch annotates too little
    try:
        yield
    finally:
        handle.remove()


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors of a file into a model. Tensors of the model get the dtypes of the file."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state and tensor.dtype != (dtype := state[name].dtype):
            if not {tensor.dtype, dtype} <= set(FLOATS):
                allowed = f"one of {FLOATS}" if tensor.dtype in FLOATS else tensor.dtype
                raise ValueError(f"{name} is {dtype}, must be {allowed}")
            if not tensor.is_meta:
                tensor.data = tensor.data.to(dtype)
    _take(model, state)
    model.load_state_dict(_layouts(model) | state)
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"{prefix}.{name}".lstrip(".") + " is on the meta device and not in the file: build it with data"
                )


def _take(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let a model's tensors without data be those of a file, not copies. What the model shares stays shared."""
    taken: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for name, old in list(held.items()):
                stored = state.get(f"{prefix}.{name}".lstrip("."))
                if old is None or not old.is_meta or stored is None or stored.shape != old.shape:
                    continue  # load_state_dict has the words for what is missing or does not fit
                if id(old) not in taken:
                    is_parameter = isinstance(old, nn.Parameter)
                    taken[id(old)] = nn.Parameter(stored, old.requires_grad) if is_parameter else stored
                held[name] = taken[id(old)]
