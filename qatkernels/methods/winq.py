"""WinQ: periodic resets of the weights towards the grid, and gradients at noisy weights.

Every training forward adds noise before it quantizes: U ~ N(0, noise_std^2) to each weight, u ~ N(0, scale_noise_std^2)
to each scale. After every ``reset_every`` optimizer steps, W <- (1 - a) * W + a * Q(W) with a = ``reset_weight``. A
reset changes no quantized value, and leaves optimizer state, scales and learning rate alone. [paper: WinQ]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensor import local_part
from ..nn import quantized_modules
from ..nn.quantized import Quantized
from ..nn.replay import RandomState, untouched
from ..ops import reset_
from ..options import AT_LEAST_0, AT_LEAST_1, SHARE, check, option
from .grads import Grads, add_, run_closure, set_grads, take_grads, without_old_grads
from .shards import check_parameters, layers_by_weight, locals_of
from .stats import GridStats
from .values import check_closure, check_count, check_size, is_number

Closure = Callable[[], Any]


@dataclass(frozen=True)
class WinQConfig:
    """Settings of WinQ for a run of known length. :class:`WinQ` describes the settings that both have.

    Attributes:
        reset_every: a quarter of the steps if None (inferred: the paper resets 2 to 5 times in a run).
        reset_until: not in the paper.

    Raises:
        ConfigError: if a value is out of range.
    """

    reset_every: int | None = option(
        None, "QAT steps between resets, 0 for no resets; a quarter of the QAT steps if not given", AT_LEAST_0
    )
    reset_weight: float = option(
        0.4, "weight on the quantized value in a reset, in [0, 1]: 0 changes nothing, 1 puts weights on the grid", SHARE
    )
    reset_until: float = option(1.0, "fraction of the QAT steps after which there are no more resets", SHARE)
    noise_std: float = option(1e-3, "standard deviation of the noise on weights", AT_LEAST_0)
    scale_noise_std: float | None = option(
        None, "standard deviation of the noise on scales; that of the weights if not given", AT_LEAST_0
    )
    two_sided: bool = option(False, "average the gradient over the noise U and its mirror image -U")
    samples: int = option(1, "noise draws that a step averages over", AT_LEAST_1)

    def __post_init__(self) -> None:
        check(self)

    def start(self, model: nn.Module, steps: int) -> WinQ:
        """Return WinQ for a quantized model that is about to be trained for ``steps`` steps."""
        every = max(steps // 4, 1) if self.reset_every is None else self.reset_every
        return WinQ(
            model, reset_every=every or None, reset_weight=self.reset_weight, noise_std=self.noise_std,
            scale_noise_std=self.scale_noise_std, two_sided=self.two_sided, samples=self.samples,
            last_reset=int(self.reset_until * steps),
        )  # fmt: skip


class WinQ:
    """Weight resets and noisy gradients for your own training loop.

        winq = WinQ(model, reset_every=60_000, reset_weight=0.4, noise_std=1e-3)
        ...
        optimizer.step()
        winq.after_step()

    The constructor turns the noise on, :meth:`remove` turns it off. Only training forwards (``model.train()``) have
    noise. Kernels draw it on the fly, so it takes no memory.

    Args:
        model: a quantized model; may be wrapped (DDP, FSDP2, torch.compile) before or after.
        reset_every: optimizer steps between resets, None for no resets. The paper's runs reset 2 to 5 times. Inferred:
            the quantity that matters is ``reset_every * lr / spacing``, the grid spacings that a weight can travel
            between resets under Adam. It is 10 to 25 in the paper's runs. In our own, with 0.1 to 8, every reset under
            a decaying rate cost something at the end, and less the more travel was left (docs/reproduction.md): leave
            ten spacings or more after the last one, or reset under a constant rate.
        reset_weight: weight on the **quantized** value, in [0, 1]: 0 changes nothing, 1 puts every weight on the grid.
            This is the paper's lambda (0.1 to 0.6, 0.4 best at 1 bit). The callback that the authors released has the
            opposite convention: its default of 0.2 is ``reset_weight=0.8`` here.
        noise_std: standard deviation of the noise on weights, 0.0002 to 0.002 in the paper; 0 for no noise.
        scale_noise_std: standard deviation of the noise on scales; ``noise_std`` if None, as in the released scripts.
        two_sided: whether :meth:`gradient` averages over U and -U (as NSO, the parent method; WinQ is one-sided).
        samples: draws of U that :meth:`gradient` averages over (as NSO; WinQ takes one).
        last_reset: the last step that a reset may follow, None for no limit. Not in the paper: weights that are pulled
            to the grid late, when the learning rate has decayed, no longer cross to another level.
        rotation: for layers that quantize a rotated weight (``Q(H W)``): the symmetric orthonormal map H along the
            inputs, such as :func:`hadamard`. It takes and returns a tensor of the weight's shape. The reset is then
            ``W <- H((1 - a) H W + a Q(H W))``, and codes stay the same up to the rounding of H.

    Attributes:
        steps: calls of :meth:`after_step`.
        resets: resets so far.

    Raises:
        ValueError: if a value is out of range, the model has no quantized layer, a weight is computed (pruned, or
            parametrized by weight_norm), layers share a weight but not its scales, or the rotation of a weight cannot
            be computed or is not its own inverse.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reset_every: int | None,
        reset_weight: float,
        noise_std: float,
        scale_noise_std: float | None = None,
        two_sided: bool = WinQConfig.two_sided,
        samples: int = WinQConfig.samples,
        last_reset: int | None = None,
        rotation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        scale_noise_std = noise_std if scale_noise_std is None else scale_noise_std
        if reset_every is not None:
            check_count("reset_every", reset_every, 1, ", or None for no resets")
        if not is_number(reset_weight) or not 0 <= reset_weight <= 1:
            raise ValueError(f"reset_weight is {reset_weight!r}, must be in [0, 1]: the weight on the quantized value")
        check_size("noise_std", noise_std)
        check_size("scale_noise_std", scale_noise_std)
        if not isinstance(two_sided, bool):
            raise ValueError(f"two_sided is {two_sided!r}, must be True or False")
        check_count("samples", samples, 1)
        if last_reset is not None:
            check_count("last_reset", last_reset, 0, ", or None for no limit")
        self.model, self.rotation, self.last_reset = model, rotation, last_reset
        self.reset_every, self.reset_weight = reset_every, reset_weight
        self.noise_std, self.scale_noise_std = noise_std, scale_noise_std
        self.two_sided, self.samples = two_sided, samples
        self.steps = self.resets = 0
        self.stats = GridStats(model, rotation)
        self._layers = layers_by_weight(model)
        self._warned = False
        if rotation is not None:
            _check_rotation(rotation, self._layers)
        if reset_every is not None and not self._trained_layers():
            warnings.warn(
                "every quantized weight of the model is frozen (requires_grad is False): a reset will be an error, "
                "give reset_every=None to have noise only",
                stacklevel=2,
            )
        self._set_noise(1)

    def _set_noise(self, sign: float) -> None:
        for layer in quantized_modules(self.model).values():
            layer.quantizer.set_noise(sign * self.noise_std, sign * self.scale_noise_std)

    def _trained_layers(self) -> dict[str, Quantized]:
        return {name: module for name, module in self._layers.items() if module.weight.requires_grad}

    def _warn_if_no_noise(self) -> None:
        """Warn once if noise is on, but no layer is in training mode."""
        noise = self.noise_std or self.scale_noise_std
        if noise and not self._warned and not any(m.training for m in quantized_modules(self.model).values()):
            self._warned = True
            warnings.warn(
                f"noise_std is {self.noise_std}, but no quantized layer is in training mode, and only training mode "
                "has noise: call model.train() (you can set single modules, such as dropout, back to eval())",
                stacklevel=3,
            )

    @property
    def passes(self) -> int:
        """Number of passes that :meth:`gradient` makes."""
        return self.samples * (2 if self.two_sided else 1)

    def remove(self) -> None:
        """Turn off the noise of the model, including that of another WinQ on it."""
        self.noise_std = self.scale_noise_std = 0.0
        self._set_noise(1)

    @property
    def due(self) -> bool:
        """Whether the next :meth:`after_step` resets."""
        step = self.steps + 1
        on_time = self.reset_every is not None and step % self.reset_every == 0
        return on_time and (self.last_reset is None or step <= self.last_reset)

    def after_step(self) -> bool:
        """Count an optimizer step, and reset if it is time. Call this after ``optimizer.step()``.

        Returns:
            Whether weights were reset.
        """
        due = self.due
        self._warn_if_no_noise()
        self.steps += 1
        if due:
            self.reset()
        return due

    @torch.no_grad()
    def reset(self) -> None:
        """Move every quantized weight towards the grid now, in one fused pass per weight.

        A tied weight moves once. A frozen weight (``requires_grad`` is False) does not move.

        Raises:
            ValueError: if the shards of a weight split a group (with a rotation, also a row that has one scale), a
                weight is computed (pruned, or parametrized by weight_norm), or all weights are frozen.
        """
        check_parameters(self._layers)
        if not (trained := self._trained_layers()):
            raise ValueError(
                "every quantized weight of the model is frozen (requires_grad is False), so a reset would change "
                "nothing: give reset_every=None"
            )
        for module, part in locals_of(trained, whole_rows=self.rotation is not None):
            weight = part.weight if self.rotation is None else self.rotation(part.weight).contiguous()
            group, zero_point = module.group_size, part.zero_point
            reset_(weight, part.scale, module.grid, self.reset_weight, group_size=group, zero_point=zero_point)
            if self.rotation is not None:
                part.weight.copy_(self.rotation(weight))
            # reset_ counted a new version of the local part; a DTensor has a version counter of its own.
            torch.autograd.graph.increment_version(module.weight)
        self.resets += 1

    def gradient(self, closure: Closure | None = None, *, accumulate: bool = False) -> Any:
        """Compute into ``.grad`` the mean gradient over ``samples`` noise draws, and their mirror images if two-sided.

        A mirrored pass replays torch's random numbers, so that it draws -U, and the same dropout. Afterwards buffers,
        such as running statistics, are those of the first pass. With more than one pass, a second set of gradients is
        kept while gradients are added; with ``accumulate`` also the gradients that are added to.

        Args:
            closure: as for ``torch.optim.Optimizer.step``: computes a loss, calls ``backward`` and returns the loss. It
                may zero gradients. It must use the same batch in every call.
            accumulate: whether to add to the gradients that were in ``.grad`` before the call, for loops that
                accumulate gradients over calls. If False, they are dropped. Under DDP and FSDP2, the model must be
                wrapped before WinQ is made, and gradients are reduced in every pass, also within ``no_sync``. If the
                closure raises an error, gradients are as before the call.

        Returns:
            The mean of the return values of ``closure``; None if it returned None.

        Raises:
            ValueError: if ``closure`` is not a function.
            RuntimeError: if the closure changed a weight (stepped the optimizer).
        """
        closure = check_closure("winq.gradient", closure)
        self._warn_if_no_noise()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        mean: Grads = [None] * len(parameters)
        signs = (1, -1) if self.two_sided else (1,)
        losses: list[Any] = []
        with without_old_grads(self.model, parameters, accumulate):
            try:
                for _ in range(self.samples):
                    random = RandomState(parameters) if self.two_sided else None
                    for sign in signs:
                        if sign < 0 and random is not None:
                            random.restore()
                        self._set_noise(sign)
                        # Only the first pass updates running statistics, so that a step updates them once.
                        with untouched(self.model) if losses else nullcontext():
                            loss = run_closure(closure, self._layers)
                        losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
                        mean = add_(mean, take_grads(parameters), 1 / self.passes)
            finally:
                self._set_noise(1)
            set_grads(parameters, mean)
        return None if any(loss is None for loss in losses) else sum(losses) / self.passes

    def log(self) -> dict[str, float]:
        """Return the values to log: flips since the last call, distance to the grid in spacings, and resets.

        Syncs the device. From the first call on, flips take a byte per weight.
        """
        flips, distance = self.stats.flips(), self.stats.distance()
        return {"winq/flips": flips, "winq/distance": distance, "winq/resets": float(self.resets)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. The noise is not part of it: it depends on torch's generator only."""
        return {"steps": self.steps, "resets": self.resets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if this is not the state of a WinQ.
        """
        if set(state) != {"steps", "resets"}:
            raise ValueError(f"state has {sorted(state)}, must have 'resets' and 'steps'")
        for name, value in state.items():
            check_count(name, value, 0)
        self.steps, self.resets = state["steps"], state["resets"]


@torch.no_grad()
def _check_rotation(rotation: Callable[[Tensor], Tensor], layers: dict[str, Quantized]) -> None:
    """Raise ValueError if a rotation cannot be used for the weight of a layer, or is not its own inverse."""
    for name, module in layers.items():
        weight = local_part(module.weight)
        if weight.is_meta or not weight.numel():
            continue
        values = (torch.arange(weight.numel(), device=weight.device) % 7 - 3).view(weight.shape).to(weight.dtype)
        try:
            back = rotation(rotation(values))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"rotation cannot be used for {name} of shape {tuple(weight.shape)}: {error}") from error
        rounding = max(1e-3, 32 * torch.finfo(weight.dtype).eps)
        if back.shape != values.shape or not torch.allclose(back.float(), values.float(), rtol=0, atol=rounding):
            raise ValueError(f"rotation is not its own inverse for {name} of shape {tuple(weight.shape)}")


def hadamard(w: Tensor) -> Tensor:
    """Return the normalized Walsh-Hadamard transform of ``w`` ``[..., K]`` along its last dimension.

    The transform is symmetric and orthonormal, so it is its own inverse up to rounding.

    Args:
        w: floating point tensor; K must be a power of two.

    Raises:
        ValueError: if K is not a power of two.
    """
    size = w.shape[-1] if w.ndim else 0
    if size < 1 or size & (size - 1):
        raise ValueError(f"w has shape {tuple(w.shape)}, its last dimension must be a power of two")
    y, half = w, 1
    while half < size:
        a, b = y.reshape(*w.shape[:-1], size // (2 * half), 2, half).unbind(-2)
        y = torch.stack((a + b, a - b), -2)
        half *= 2
    return (y.reshape(w.shape) * size**-0.5).to(w.dtype)
