"""Turn the quantized layers of a trained model into packed ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends import DEVICES, REGISTRY, order
from ..ops import PackedWeight
from ._gather_model import copy_whole, is_sharded, reshard
from .grouped_quant_linear import GroupedQuantLinear
from .packed_linear import GroupedPackedLinear, Packed, PackedEmbedding, PackedLinear, packed_weight
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .quantized import OFFLOADED, is_offloaded, reparametrization
from .recipe import describe
from .replaced import message, replaced_layers

#: How a layer is packed, by its type or a base of it: ``packer(layer, weight=packed_weight)`` returns the new layer.
#: Such a layer has QuantLinear's attributes. Another kind of layer is another entry.
PACKERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    QuantLinear: PackedLinear.from_quantized,
    GroupedQuantLinear: GroupedPackedLinear.from_quantized,
    QuantEmbedding: PackedEmbedding.from_quantized,
}


def pack_model(model: nn.Module, *, scale_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every quantized layer of a model, in place, by its packed form; the rest stays as it is.

    A sharded model (``fully_shard``, ``parallelize_module``) is copied instead, and stays as it is: the result is whole
    in every process, and is used, saved or exported like any other. All processes must call this. Quantized weights are
    gathered one at a time, the other parameters are whole in the result.

    Layers that are the same object stay one object, and layers that share weight, scale and zero point share the packed
    weight. Biases stay the same Parameters, learned quantizers of activations the same modules.

    Args:
        model: a model from :func:`quantize_model`, trained; changed in place unless it is sharded.
        scale_dtype: dtype that scales are stored in: float32 (exact), bfloat16 or float16. Codes do not depend on it.

    A warning names a layer that was quantized and that something has replaced by a plain one since: it stays as it is.

    Returns:
        ``model``, or the new layer if the model itself is a quantized layer, or the copy of a sharded model.
        :func:`packed_modules` lists the layers.

    Raises:
        ValueError: if no layer is quantized, or one cannot be packed. The model is then unchanged.
    """
    found = [m for m in model.modules() if _packer(m) is not None]
    if not found:
        raise ValueError("the model has no quantized layer, quantize_model makes them")
    for item in replaced_layers(model).items():
        warnings.warn(message(*item), stacklevel=2)
    return pack_layers(model, found, scale_dtype)


def pack_layers(model: nn.Module, layers: Iterable[nn.Module], scale_dtype: torch.dtype) -> nn.Module:
    """Replace quantized layers of a model, in place; return the model, or the new layer if it is the model itself.

    A sharded model is copied instead.

    Raises:
        ValueError: if one of them cannot be packed. The model is then unchanged.
    """
    sharded = is_sharded(model)
    if sharded:
        reshard(model)
    names = {module: name for name, module in model.named_modules()}
    packed: dict[tuple[int, ...], PackedWeight] = {}
    kept: list[tuple[Tensor | None, ...]] = []  # keeps the tensors alive, so that their ids stay unique
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        packer = _packer(layer)
        assert packer is not None
        parts: tuple[Tensor | None, ...] = (layer.weight, layer.scale, layer.zero_point)  # type: ignore[assignment]
        key = tuple(map(id, parts))
        kept.append(parts)
        try:
            _check(layer)
            if key not in packed:
                packed[key] = packed_weight(layer, scale_dtype)
                packed[key].layer = names[layer]
            replacements[layer] = packer(layer, weight=packed[key])
        except ValueError as error:
            raise ValueError(f"{names[layer] or 'the model'} cannot be packed: {error}") from error
    if sharded:
        copied = copy_whole(model, replacements)
        describe(copied)
        return copied
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    describe(model)
    return replacements.get(model, model)


def _check(layer: nn.Module) -> None:
    """Raise ValueError if the weight that a layer has now is not the one that its forward would use."""
    how = reparametrization(layer)
    if how is not None and not is_parametrized(layer, "weight"):  # which computes the weight whenever it is read
        raise ValueError(
            f"it is {how}, and its weight may be that of an earlier step: make the present one permanent first "
            "(torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm)"
        )
    if is_offloaded(layer):
        raise ValueError(OFFLOADED.format("pack"))


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """Return the packed layers of a model by name; one that is registered twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and persistent buffers, counting shared ones once."""
    state = model.state_dict(keep_vars=True)
    tensors = {id(t): t for name, t in state.items() if not name.endswith("_extra_state")}
    return sum(tensor.nbytes for tensor in tensors.values())


def _packer(module: nn.Module) -> Callable[..., nn.Module] | None:
    return next((PACKERS[base] for base in type(module).__mro__ if base in PACKERS), None)


def compile_kernels(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Compile the kernels that a packed model will launch, so that no request waits for a compiler.

    Of the backends here, Triton compiles kernels when they are first launched. Every configuration that a layer can
    use, whatever the number of tokens, is launched once. Layers of equal shape share the compilation. Nothing is tuned.

    Args:
        model: a packed model, on the device that it will run on.
        dtype: dtype of the activations.

    Returns:
        How many layers kernels were compiled for. It is 0 on a CPU, without Triton, and if QATKERNELS_BACKEND names
        another backend: then there is nothing to compile.

    Raises:
        ValueError: if the model has no packed layer.
    """
    layers = packed_modules(model)
    if not layers:
        raise ValueError("the model has no packed layer, pack_model makes them")
    count = 0
    for layer in layers.values():
        if isinstance(layer, PackedEmbedding):  # which multiplies nothing
            continue
        device = layer.weight.device.type.upper()
        names = {stage.backend for stage in order("lowbit_linear", device)} if device in DEVICES else set()
        compilers = [b.warm_up for b in REGISTRY.backends.values() if b.name in names and b.warm_up is not None]
        bias = layer.bias if isinstance(layer, PackedLinear) else None
        for warm_up in compilers:
            warm_up(layer.weight, dtype, bias, layer.act_bits)
        count += bool(compilers)
    return count
