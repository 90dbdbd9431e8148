"""What training does to the codes of a model: how many flip, and how far its weights are from the grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor, local_part
from ..grids import MIN_SCALE
from ..nn import LearnedActivation, quantized_modules
from ..nn.floor import count_act_at_floor, count_at_floor
from ..ops import fake_quantize, quantize
from .shards import layers_by_weight, locals_of, total


class GridStats:
    """Flips and distance to the grid of a model's quantized weights.

    Args:
        model: a quantized model. Nothing is kept until the first :meth:`flips`, from then on a byte for each weight.
        rotation: of weights that their quantizers see rotated, as :class:`~qatkernels.methods.WinQ`'s.

    Raises:
        ValueError: if the model has no quantized layer.
    """

    def __init__(self, model: nn.Module, rotation: Callable[[Tensor], Tensor] | None = None) -> None:
        self._layers, self._rotation = layers_by_weight(model), rotation
        self._every = list(quantized_modules(model).values())  # each has an input of its own, shared weight or not
        self._codes: dict[str, Tensor] = {}

    def _seen(self, w: Tensor) -> Tensor:
        """Return what the quantizer sees of a weight."""
        return w if self._rotation is None else self._rotation(w)

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """Return the present codes by layer; DTensors where weights are."""
        codes = {}
        for name, (module, part) in zip(self._layers, locals_of(self._layers), strict=True):
            group, w = module.group_size, module.weight
            seen = self._seen(part.weight)
            now = quantize(seen, part.scale, module.grid, group_size=group, zero_point=part.zero_point)
            if is_dtensor(w):
                now = type(w).from_local(
                    now, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
                )
            codes[name] = now
        return codes

    @torch.no_grad()
    def flips(self) -> float:
        """Return the fraction of weights whose code is another one than at the previous call; 0 at the first."""
        codes, counts = self.codes(), []
        for name, module in self._layers.items():
            now, before = local_part(codes[name]), local_part(self._codes.get(name, codes[name]))
            flipped = (now != before).sum().double()
            counts.append((module.weight, torch.stack([flipped, flipped.new_full((), now.numel())])))
        self._codes = codes
        flipped, size = total(counts).tolist()
        return float(flipped / size)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the codes of the last :meth:`flips` by layer, none if there was no call."""
        return dict(self._codes)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Count flips from the codes that :meth:`state_dict` returned."""
        self._codes = dict(state)

    @torch.no_grad()
    def at_floor(self) -> int:
        """Return how many scales have fallen to the floor, as :func:`qatkernels.scales_at_floor` counts them."""
        counts = [(module.weight, count_at_floor(part.weight, part.scale)) for module, part in locals_of(self._layers)]
        for act in (layer.act for layer in self._every):
            if isinstance(act, LearnedActivation):
                counts.append((act.scale, count_act_at_floor(local_part(act.scale.detach()), act.initialized)))
        return int(total(counts))

    @torch.no_grad()
    def distance(self) -> float:
        """Return the root mean square of ``(w - Q(w)) / spacing``, ``spacing`` that of the grid, ``scale / steps``.

        Uniformly spread weights give 0.29; weights beyond the outermost levels count with their whole distance.
        """
        sums = []
        for module, part in locals_of(self._layers):
            w, group = self._seen(part.weight), module.group_size
            wide = torch.promote_types(w.dtype, torch.float32)
            values = fake_quantize(w, part.scale, module.grid, group_size=group, zero_point=part.zero_point)
            spacing = part.scale.clamp_min(MIN_SCALE).view(-1, 1) / module.grid.steps
            rows = spacing.numel()
            away = (w.to(wide) - values.to(wide)).view(rows, w.numel() // max(rows, 1)) / spacing
            squared = away.square().sum().double()
            sums.append((module.weight, torch.stack([squared, squared.new_full((), w.numel())])))
        squared, size = total(sums).tolist()
        return float((squared / size) ** 0.5)
