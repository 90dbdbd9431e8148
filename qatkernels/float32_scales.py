"""The base class of modules with scales: casts do not change scales, and the state dict has their layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .arguments import TRACED
from .dtensor import beside, for_own_tokens, gathered, is_dtensor


class Float32Scales(nn.Module):
    """A module whose ``scale`` and ``zero_point`` keep their dtype and bits when the model is cast.

    Rounding a scale to bfloat16 would change every weight of its group.

    The state dict also has the :attr:`layout` of the scales, as torch's extra state. Loading a state dict with another
    layout is an error. Shapes alone cannot tell: scales for 8 bits have the same shape as scales for 2 bits. The layout
    is text in a uint8 tensor, because some file formats hold tensors only.
    """

    #: Names of the parameters and buffers that casts do not change.
    uncast: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    #: Error message for another layout, with three fields: prefix in the state dict, its layout, this module's layout.
    refusal: ClassVar[str] = (
        "{}scale is of {}, must be of {}; load_weights(model, state_dict) takes the weights alone and sets scales anew"
    )
    #: Whether a strict load of a state dict without a layout is an error. Earlier versions wrote none.
    layout_required: ClassVar[bool] = False
    #: Where :func:`qatkernels.nn.shard_scales` has taken the scales out of what FSDP2 manages: how many dimensions of
    #: their mesh are FSDP2's, the first ones. The others are of tensor or expert parallel. Else 0.
    scales_apart: int = 0

    scale: Tensor
    zero_point: Tensor | None

    @property
    def layout(self) -> str:
        """A text that says what the numbers in the state dict mean."""
        raise NotImplementedError

    def check_scale(self) -> None:
        """Raise RuntimeError if a wrapper has cast the scale, or TypeError if torch.fx has replaced it."""
        if self.scale.dtype is not torch.float32:
            if isinstance(self.scale, torch.fx.Proxy):
                raise TypeError(f"scale is a placeholder. {TRACED}")
            raise RuntimeError(
                f"scale is {self.scale.dtype}, must be torch.float32: no cast changes it. FSDP2's MixedPrecisionPolicy "
                "casts every parameter that it manages to param_dtype: call qatkernels.nn.shard_scales(model) first "
                "and pass what it returns to each fully_shard as ignored_params, or leave param_dtype out and run the "
                "model under torch.autocast"
            )

    def _scales_for(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point to quantize a tensor with.

        They are gathered where only they are sharded (:func:`shard_scales`), and are put where a sharded tensor is.
        Under expert parallelism a tensor that is not sharded has tokens of this process.
        """
        scale, zero_point = self.scale, self.zero_point
        if not is_dtensor(scale):
            return scale, zero_point
        return self._put(scale, tensor), None if zero_point is None else self._put(zero_point, tensor)

    def _put(self, scale: Any, tensor: Tensor) -> Tensor:
        """Return scales, which are a DTensor, where a tensor is."""
        if self.scales_apart and not (is_dtensor(tensor) and tensor.device_mesh == scale.device_mesh):
            scale = gathered(scale, self.scales_apart)
        if is_dtensor(tensor):
            return beside(scale, tensor)
        return for_own_tokens(scale) if is_dtensor(scale) else scale

    def get_extra_state(self) -> Tensor:
        """Return the layout as text in a tensor."""
        # On the device of the scale, because torch.distributed rejects state dicts on several devices.
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8, device=self.scale.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the layout. ``load_state_dict`` has done so before; transformers' loader calls this alone.

        Raises:
            RuntimeError: if it is another one.
        """
        found = layout_in({"_extra_state": state}, "")
        if found is not None and found != self.layout:
            raise RuntimeError(self.refusal.format("", found, self.layout))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, _, error_msgs = args
        if problems := self._problems(state_dict, prefix):
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.layout_required and (name := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(name)

    def _problems(self, state_dict: Any, prefix: str) -> list[str]:
        """Return the reasons why the state dict cannot be loaded; an empty list if it can."""
        stored = layout_in(state_dict, prefix)
        if stored is None or stored == self.layout:
            return []
        return [self.refusal.format(prefix, stored, self.layout)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        holders = (self._parameters, self._buffers)
        scales = [t for holder in holders for n in self.uncast if (t := holder.get(n)) is not None]
        not_cast = scales + [p.grad for p in scales if p.grad is not None]

        def move_only(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is t for t in not_cast):
                return tensor.to(applied.device)
            return applied

        return super()._apply(move_only, recurse)


def layout_in(state_dict: Any, prefix: str) -> str | None:
    """Return the layout in a state dict for the module with this prefix, or None if there is none."""
    layout = state_dict.get(f"{prefix}_extra_state")
    if layout is None or (isinstance(layout, Tensor) and layout.is_meta):
        return None
    if not isinstance(layout, Tensor) or layout.dtype != torch.uint8 or layout.ndim != 1:
        return f"unknown ({layout!r:.40})"
    return bytes(layout.tolist()).decode(errors="replace")
