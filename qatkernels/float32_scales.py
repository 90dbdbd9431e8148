"""The base of every module with scales: no cast changes them, and a state dict says what they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Float32Scales(nn.Module):
    """A module whose ``scale`` and ``zero_point`` keep their bits whatever the model is cast to.

    A scale rounded to bfloat16 would move every weight of its group.

    The state dict also has the :attr:`layout` that the scales belong to, as torch's extra state; loading refuses
    another layout. Shapes alone cannot tell: scales of 8 bits have the shape of scales of 2 bits. The layout is text in
    a uint8 tensor, because some file formats hold tensors only.
    """

    #: Names of the parameters and buffers that no cast changes.
    uncast: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    #: Error message for another layout. Filled in: prefix in the state dict, layout there, layout of this module.
    refusal: ClassVar[str] = (
        "{}scale is of {}, must be of {}; load_weights(model, state_dict) takes the weights alone and sets scales anew"
    )
    #: Whether a strict load refuses a state dict without a layout, as earlier versions wrote.
    layout_required: ClassVar[bool] = False

    scale: Tensor

    @property
    def layout(self) -> str:
        """What the numbers in the state dict stand for, in words."""
        raise NotImplementedError

    def check_scale(self) -> None:
        """Raise RuntimeError if a wrapper has cast the scale, which no cast of the module does."""
        if self.scale.dtype is not torch.float32:
            raise RuntimeError(
                f"scale is {self.scale.dtype}, must be torch.float32: no cast changes it. FSDP2's MixedPrecisionPolicy "
                "casts it with the weights: leave its param_dtype out, and run the model under torch.autocast"
            )

    def get_extra_state(self) -> Tensor:
        """Return the layout as text in a tensor."""
        # On the device of the rest: torch.distributed refuses state dicts on several devices.
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8, device=self.scale.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the layout was compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing_keys, _, error_msgs = args
        if problems := self._problems(state_dict, prefix):
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.layout_required and (name := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(name)

    def _problems(self, state_dict: Any, prefix: str) -> list[str]:
        """Return why nothing can be loaded."""
        found = layout_in(state_dict, prefix)
        if found is None or found == self.layout:
            return []
        return [self.refusal.format(prefix, found, self.layout)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = [t for own in (self._parameters, self._buffers) for n in self.uncast if (t := own.get(n)) is not None]
        kept = scales + [p.grad for p in scales if p.grad is not None]

        def move_only(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is k for k in kept):
                return tensor.to(applied.device)
            return applied

        return super()._apply(move_only, recurse)


def layout_in(state_dict: Any, prefix: str) -> str | None:
    """Return the layout that a state dict has for the module of a prefix, or None if it has none."""
    layout = state_dict.get(f"{prefix}_extra_state")
    if layout is None or (isinstance(layout, Tensor) and layout.is_meta):
        return None
    if not isinstance(layout, Tensor) or layout.dtype != torch.uint8 or layout.ndim != 1:
        return f"unknown ({layout!r:.40})"
    return bytes(layout.tolist()).decode(errors="replace")
