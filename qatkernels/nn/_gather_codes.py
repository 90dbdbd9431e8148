"""FSDP2 gathers codes and scales instead of weights: each process quantizes the rows that it holds.

FSDP2 calls two methods of a shard, before and after an all-gather. Here the first one quantizes and packs, the second
one dequantizes, so that the parameter which a layer multiplies with holds levels already. Autograd then finds the
gradient of the levels. The straight-through rule is applied to it after FSDP2 has reduced it, by the process that holds
the rows and their scales: the rule is linear in the gradient, so the mean over the processes may come first.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import fsdp_has_run
from ..dtensor import is_dtensor, local_part
from ..ops._fake_quantize import BACKWARD
from ..ops.packing import PACK, UNPACK
from ._quantize_model import quantized_modules
from .quant_linear import QuantLinear
from .quantized import Quantized


def gather_codes(model: nn.Module) -> list[str]:
    """Let FSDP2 gather the codes of quantized weights, in place of the weights. Call it after ``fully_shard``.

        ignored = shard_scales(model, mesh)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        gather_codes(model)

    A weight of b bits then takes b / 16 of the bytes of bfloat16 in each all-gather, and its scales 4 bytes each.
    Codes are those of the float32 masters, as :func:`pack_model` takes them, also with ``param_dtype=bfloat16``.
    Gradients travel as before; scales need no collective of their own.

    Args:
        model: a model after ``shard_scales`` and ``fully_shard``.

    Returns:
        The names of the layers whose codes are gathered: every :class:`QuantLinear` that FSDP2 shards by rows, with as
        many rows in each process and scales of rows or groups, and whose weight no other module has. The weights of
        other layers are gathered as they are.

    Raises:
        ValueError: if there is no such layer, or the model has run a forward since ``fully_shard``. In a forward: if
            there is noise on the weights, or something is added to them (WinQ with ``noise_std``, SQuAT with
            ``target="quantized"``, StableQAT), which a shard alone cannot know.
    """
    if fsdp_has_run(model):
        raise ValueError(
            "the model has run a forward since fully_shard, must have run none: call gather_codes right after the last "
            "fully_shard (and check, or a trial batch, after that)"
        )
    layers = quantized_modules(model)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    reasons = {name: _why_not(layer, owners) for name, layer in layers.items()}
    found = [name for name, reason in reasons.items() if reason is None]
    if not found:
        said = [f"{name or 'the model'} {reason}" for name, reason in reasons.items()]
        raise ValueError(
            f"the model has no layer whose codes can be gathered: {said[0] if said else 'it has no quantized layer'}"
        )
    for name in found:
        weight: Any = layers[name].weight
        weight._local_tensor = shard = weight._local_tensor.as_subclass(MasterShard)
        shard.rule = StraightThrough(name, layers[name])
        # torch takes a hook for what requires a gradient only. A frozen weight may train later.
        trains = weight.requires_grad
        weight.requires_grad_(True).register_post_accumulate_grad_hook(shard.rule)
        weight.requires_grad_(trains)
    return found


def _why_not(layer: Quantized, owners: Mapping[int, int]) -> str | None:
    """Return why the codes of a layer cannot be gathered, as the rest of a sentence, or None if they can."""
    from torch.distributed.tensor import Shard

    weight: Any = layer.weight
    scale: Any = layer.scale
    if type(layer).forward is not QuantLinear.forward:
        return f"is a {type(layer).__name__}, must be a QuantLinear"
    if not is_dtensor(weight):
        return "is not sharded: call gather_codes after fully_shard"
    if isinstance(weight._local_tensor, MasterShard):
        return "has its codes gathered already"
    if weight.device.type != weight.device_mesh.device_type:
        return f"has its shards on {weight.device.type} (CPUOffloadPolicy), must have them on the mesh's device"
    if layer.config.per_tensor:
        return "has one scale for the whole weight, must have one for each row or group"
    if not layer.scales_apart:
        return "has scales that are not sharded by shard_scales: call it before fully_shard"
    placement, parts = weight.placements[-1], weight.device_mesh.shape[-1]
    if not isinstance(placement, Shard) or placement.dim or scale.placements != weight.placements:
        return f"is sharded as {weight.placements}, must be by rows, and its scales with it"
    if parts == 1:
        return "is in one shard, so that nothing is gathered"
    if len(weight) % parts:
        return f"has {len(weight)} rows, which {parts} processes do not share evenly"
    if _scales_alone_train(layer):
        return "has a frozen weight and scales that train, whose gradient is computed from that of the weight"
    return "shares its weight with another module" if owners[id(weight)] > 1 else None


def _scales_alone_train(layer: Quantized) -> bool:
    scales = (p for p in (layer.scale, layer.zero_point) if p is not None)
    return not layer.weight.requires_grad and any(p.requires_grad for p in scales)


class MasterShard(Tensor):
    """The rows of a master weight that this process holds. All but FSDP2 sees a plain tensor."""

    rule: StraightThrough
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what this process sends, and what :meth:`fsdp_post_all_gather` needs beside it."""
        quantizer, grid = module.quantizer, module.grid
        if not quantizer.unmodified or any(quantizer.noise(module.training)):
            raise ValueError(
                "there is noise on a weight, something is added to it, or its gradient is StableQAT's, and only its "
                "codes are gathered: take noise_std=0 (WinQ) or target='latent' (SQuAT), or leave gather_codes out"
            )
        if _scales_alone_train(module):
            raise ValueError(
                "a weight is frozen and its scales train, whose gradient is computed from that of the weight: freeze "
                "the scales too, or leave gather_codes out"
            )
        self.rule.look()
        scale, zero_point = _scales_of(module)
        codes = quantizer.codes(self, scale, zero_point)
        packed = PACK.overload(codes, grid.code_min, grid.storage_bits)
        parts = (packed, *quantizer.stored(scale, zero_point))
        return tuple(part for part in parts if part is not None), module

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], module: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the levels of the whole weight, or write them into ``out``."""
        packed, scale, *zero_point = gathered
        grid = module.grid
        codes = UNPACK.overload(packed, grid.code_min, grid.storage_bits, module.in_features)
        # FSDP2 frees and allocates the storage, which it can do with torch's own memory only. Later writes are no
        # change that autograd should see: a forward may have saved these numbers, which were freed meanwhile.
        levels = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out.data
        torch.ops.qatkernels.dequantize_out(
            codes, scale, zero_point[0] if zero_point else None, module.quantizer.constants, dtype, levels
        )
        if out is not None:
            return None
        module._levels = weakref.ref(levels)
        return levels, (levels,)


def _scales_of(layer: Quantized) -> tuple[Tensor, Tensor | None]:
    """Return the scales and zero points of the rows that this process holds."""
    zero_point = layer.zero_point
    return local_part(layer.scale.detach()), None if zero_point is None else local_part(zero_point.detach())


class StraightThrough:
    """Turns the gradient of levels, which FSDP2 has reduced, into those of master weight, scales and zero points.

    FSDP2 may add the gradient of another backward to one that the rule has been applied to. That one is 0 where the
    rule masks, so it passes the rule again unchanged. It would count for the scales again, so what it gives to them is
    subtracted: what it gives when the weight is gathered for the next forward or backward, by when it may have been
    clipped or zeroed.

    Args:
        name: name of the layer, for messages.
        layer: the layer.
    """

    def __init__(self, name: str, layer: Quantized) -> None:
        self.name, self.layer, self.weight = name, layer, layer.weight
        self.look()

    def _rule(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradients of the master weight, the scales and the zero points."""
        layer, weight = self.layer, self.weight
        return list(BACKWARD.overload(
            gradient, local_part(weight.detach()), *layer.quantizer.stored(*_scales_of(layer)), None,
            layer.quantizer.constants, 0.0, 0.0, layer.quantizer.grad_scale,
        ))  # fmt: skip

    @torch.no_grad()
    def look(self) -> None:
        """Note what the gradient gives to the scales as it is, before another one is added to it."""
        grad: Any = self.weight.grad
        self.seen = None if grad is None else weakref.ref(grad._local_tensor)
        self.version = 0 if grad is None else grad._version
        self.before = [] if grad is None else self._rule(grad._local_tensor)[1:]

    @torch.no_grad()
    def __call__(self, weight: Any) -> None:
        """Apply the rule to ``weight.grad``, in place, and add to the gradients of the scales."""
        if not isinstance(weight._local_tensor, MasterShard):  # model.to() and the like replace it
            warnings.warn(
                f"the weight of {self.name} was moved or cast after gather_codes, so weights are gathered, not codes: "
                "move the model before fully_shard",
                stacklevel=2,
            )
            return
        gradient, learned = weight.grad._local_tensor, (self.layer.scale, self.layer.zero_point)
        masked, *sums = self._rule(gradient)
        added_to = self.seen is not None and self.seen() is gradient
        # What FSDP2 adds does not count as a change of the DTensor. Zeroing does, where nothing was gathered since.
        if added_to and weight.grad._version != self.version:
            added_to = False
            if any(_has_gradient(parameter) for parameter in learned):
                raise ValueError(
                    f"the gradients of {self.name} were changed between two backwards that accumulate without a gather "
                    "between them: clip or unscale them after the last one, or zero all of them"
                )
        for i, parameter in enumerate(learned):
            if parameter is not None and parameter.requires_grad:
                _add_to_grad(parameter, sums[i] - self.before[i] if added_to else sums[i])
        gradient.copy_(masked)
        self.look()


def _has_gradient(parameter: Any) -> bool:
    return parameter is not None and parameter.grad is not None and bool(parameter.grad._local_tensor.any())


def _add_to_grad(parameter: Any, value: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    if parameter.grad is not None:
        parameter.grad._local_tensor += value
        return
    parameter.grad = DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
