"""Statistics of the codes of a model in training: how many flip, and how far weights are from the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..arithmetic import quotient
from ..dtensor import is_dtensor, local_part, total
from ..grids import MIN_SCALE
from ..nn import quantized_modules
from ..nn.activation import learned_acts
from ..nn.floor import count_act_at_floor, count_at_floor
from ..nn.quantized import Quantized
from ..ops import fake_quantize, quantize
from .shards import Part, holders, layers_by_weight, locals_of


class GridStats:
    """Counts flips of the codes, and measures the distance of the quantized weights to the grid.

    Args:
        model: a quantized model. The first :meth:`flips` stores the codes, a byte per weight.
        rotation: applied to a weight before it is quantized, as in :class:`~qatkernels.methods.WinQ`; None for none.

    Raises:
        ValueError: if the model has no quantized layer.
    """

    def __init__(self, model: nn.Module, rotation: Callable[[Tensor], Tensor] | None = None) -> None:
        self._layers, self._rotation = layers_by_weight(model), rotation
        # Each has activations of its own, whether it shares its weight or not.
        self._every = list(quantized_modules(model).values())
        self._codes: dict[str, Tensor] = {}

    def _rotated(self, w: Tensor) -> Tensor:
        """Return the tensor that the quantizer of a weight gets."""
        return w if self._rotation is None else self._rotation(w)

    def _parts(self) -> Iterator[tuple[Quantized, Part]]:
        return locals_of(self._layers, whole_rows=self._rotation is not None)

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """Return the current codes by layer, as DTensors where weights are DTensors."""
        codes = {}
        for name, (module, part) in zip(self._layers, self._parts(), strict=True):
            group, w = module.group_size, module.weight
            rotated = self._rotated(part.weight)
            current = quantize(rotated, part.scale, module.grid, group_size=group, zero_point=part.zero_point)
            if is_dtensor(w):
                current = type(w).from_local(
                    current, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
                )
            codes[name] = current
        return codes

    @torch.no_grad()
    def flips(self) -> float:
        """Return the fraction of weights whose code changed since the previous call; 0 at the first call."""
        codes, counts = self.codes(), []
        for name, module in self._layers.items():
            current, previous = local_part(codes[name]), local_part(self._codes.get(name, codes[name]))
            flipped = (current != previous).sum().double()
            counts.append((module.weight, torch.stack([flipped, flipped.new_full((), current.numel())])))
        self._codes = codes
        flipped, size = total(counts).tolist()
        return float(flipped / size)

    @torch.no_grad()
    def histograms(self) -> dict[str, list[int]]:
        """Return how many weights have each code, by layer, from the smallest code of its grid to the largest."""
        counted = {}
        for name, codes in self.codes().items():
            grid, mine = self._layers[name].grid, local_part(codes).flatten().to(torch.int64)
            counts = torch.bincount(mine - grid.code_min, minlength=grid.levels)
            counted[name] = total([(self._layers[name].weight, counts)]).tolist()
        return counted

    def state_dict(self) -> dict[str, Tensor]:
        """Return the codes at the last call of :meth:`flips` by layer; empty if it was never called."""
        return dict(self._codes)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the codes that :meth:`state_dict` returned; the next :meth:`flips` compares with them."""
        self._codes = dict(state)

    @torch.no_grad()
    def at_floor(self) -> int:
        """Return how many scales are at the floor, as :func:`qatkernels.scales_at_floor` counts them."""
        counts = [
            (module.weight, count_at_floor(part.weight, part.scale).double() / holders(module))
            for module, part in locals_of(self._layers)
        ]
        for act in (act for layer in self._every for act in learned_acts(layer).values()):
            counts.append((act.scale, count_act_at_floor(local_part(act.scale.detach()), act.initialized)))
        return round(float(total(counts)))

    @torch.no_grad()
    def distance(self) -> float:
        """Return the root mean square of ``(w - Q(w)) / spacing``, where ``spacing`` is ``scale / grid.steps``.

        Weights that are uniformly distributed between levels give 0.29. A weight beyond the outermost level counts with
        its distance to that level.
        """
        sums = []
        for module, part in self._parts():
            w, group = self._rotated(part.weight), module.group_size
            wide = torch.promote_types(w.dtype, torch.float32)
            values = fake_quantize(w, part.scale, module.grid, group_size=group, zero_point=part.zero_point)
            spacing = quotient(part.scale.clamp_min(MIN_SCALE).view(-1, 1), module.grid.steps)
            rows = spacing.numel()
            distance = (w.to(wide) - values.to(wide)).view(rows, w.numel() // max(rows, 1)) / spacing
            squared = distance.square().sum().double()
            sums.append((module.weight, torch.stack([squared, squared.new_full((), w.numel())])))
        squared, size = total(sums).tolist()
        return float((squared / size) ** 0.5)
