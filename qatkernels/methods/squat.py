"""SQuAT: sharpness- and quantization-aware training, which alternates two objectives.

The public text says: BERT on GLUE at 2, 3 and 4 bits; a sharpness objective and a step-size objective that alternate.
Everything else is inferred from the building blocks of the method, SAM (Foret et al., 2021) and LSQ (Esser et al.,
2020). Every such choice is a parameter:

    sharpness objective, scales frozen:   g = dL/dW at Q(W),   e = rho * g / norm(g) over all quantized weights
                                          W <- Opt(W, dL/dW at Q(W) + e)
    step-size objective, weights frozen:  s <- Opt(s, dL/ds at e = 0)

The gradient of W is straight-through: weights outside the pass-through range have gradient 0 and are not perturbed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dtensor import local_part, total
from ..nn import quantized_modules
from ..nn.activation import scales_of
from ..nn.quantized import Quantized
from ..nn.quantizer import ETA, RHO, ascent, modified
from ..nn.replay import RandomState, untouched
from ..ops import perturb_swap_, perturbation_norms
from ..options import AT_LEAST_0, AT_LEAST_1, check, option
from .grads import copy_if_shared, run_closure, take_grads, without_old_grads
from .shards import check_parameters, layers_by_weight
from .stats import GridStats
from .values import check_closure, check_count, check_size

Closure = Callable[[], Any]


@dataclass(frozen=True)
class SQuATConfig:
    """Settings of :class:`SQuAT`.

    Raises:
        ConfigError: if a value is out of range.
    """

    rho: float = option(RHO, "radius of the perturbation", AT_LEAST_0)
    target: Literal["quantized", "latent"] = option(
        "quantized", "what is perturbed: quantized (the weight after rounding) or latent (the master weight)"
    )
    norm: Literal["l2", "asam"] = option("l2", "norm of the perturbation: l2 or asam")
    eta: float = option(ETA, "added to the absolute value of each weight under asam", AT_LEAST_0)
    scale_every: int = option(1, "sharpness steps between two updates of the scales", AT_LEAST_1)
    minibatch: Literal["same", "next"] = option(
        "same", "batch that updates the scales: same (that of the sharpness step) or next (a step of their own)"
    )

    def __post_init__(self) -> None:
        check(self)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> SQuAT:
        """Return SQuAT for a quantized model."""
        return SQuAT(model, optimizer, **{entry.name: getattr(self, entry.name) for entry in fields(self)})


class SQuAT:
    """Makes two passes a step: one at the quantized weights, one at perturbed weights.

        squat = SQuAT(model, optimizer, rho=0.05)
        ...
        loss = squat.step(closure)      # closure: zero_grad, forward, backward, return the loss

    The second pass replays torch's random numbers, of the CPU and of the devices that hold parameters. So both passes
    have the same dropout and noise. The second pass changes gradients only: after a step, running statistics and other
    buffers are those of the first pass.

    Memory: while the second pass runs, the gradients of the quantized weights from the first pass are kept; with
    ``accumulate`` also the gradients that are added to. Weights are not copied. A quantized weight is perturbed where
    the forward computes it. A master weight is stored in the memory of its old gradient and restored bit for bit.

    Args:
        model: a quantized model; may be wrapped (DDP, FSDP2, torch.compile).
        optimizer: the optimizer of weights and scales, with any parameter groups. In a step that freezes a parameter,
            its gradient is None: torch's optimizers then skip it, weight decay included.
        rho: radius of the perturbation.
        target: what is perturbed: ``"quantized"`` gives Q(W) + e, ``"latent"`` gives Q(W + e).
        norm: ``"l2"``: e = rho * g / norm(g). ``"asam"`` (Kwon et al., 2021): e = rho * T^2 g / norm(T g), where
            T = abs(w) + eta and w is the tensor that is perturbed; use rho around 0.5.
        eta: the eta of ``"asam"``.
        scale_every: sharpness steps between two updates of the scales.
        minibatch: ``"same"``: the step-size objective uses the scales' gradient from the first pass of a sharpness
            step, which costs nothing. ``"next"``: after every ``scale_every`` sharpness steps there is a step with one
            pass that updates the scales only.

    Attributes:
        steps: optimizer steps so far, of either kind: calls of :meth:`after_step`.
        due: whether the next :meth:`after_step` changes weights: always False, it only counts.

    Raises:
        ValueError: if a value is out of range, the model has no quantized layer, or a weight is computed (pruned, or
            parametrized by weight_norm).
    """

    due = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        rho: float = SQuATConfig.rho,
        target: Literal["quantized", "latent"] = SQuATConfig.target,
        norm: Literal["l2", "asam"] = SQuATConfig.norm,
        eta: float = SQuATConfig.eta,
        scale_every: int = SQuATConfig.scale_every,
        minibatch: Literal["same", "next"] = SQuATConfig.minibatch,
    ) -> None:
        for name, value, allowed in (
            ("target", target, ("quantized", "latent")),
            ("norm", norm, ("l2", "asam")),
            ("minibatch", minibatch, ("same", "next")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, must be one of {allowed}")
        check_size("rho", rho)
        check_size("eta", eta)
        check_count("scale_every", scale_every, 1)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer is LBFGS, must be one that uses the gradients in .grad, such as AdamW")
        self.model, self.optimizer = model, optimizer
        self.rho, self.target, self.norm, self.eta = rho, target, norm, eta
        self.scale_every, self.minibatch = scale_every, minibatch
        self.steps = 0
        self.stats = GridStats(model)
        self._layers = layers_by_weight(model)
        self._measured: dict[str, Tensor | float] = {}  # the values that log() returns
        self._rise: Tensor | float = 0.0  # sharpness, summed over the calls of gradient() in this step
        self._checked: set[int] = set()  # ids of the quantized weights when the optimizer was last checked

    def step(self, closure: Closure | None = None, *, scaler: Any = None) -> Any:
        """Compute the gradients, step the optimizer and count the step.

        Args:
            closure: as for ``torch.optim.Optimizer.step``: computes a loss, calls ``backward`` and returns the loss. It
                is called twice and must use the same batch both times. For gradient accumulation it goes through all
                micro-batches. With autocast, it runs the forward under autocast; with a ``GradScaler``, it calls
                ``scaler.scale(loss).backward()``.
            scaler: the ``GradScaler``. Call ``scaler.update()`` yourself. The closure must not call
                ``scaler.unscale_``, which is allowed once a step. To clip, call :meth:`gradient`,
                ``scaler.unscale_(optimizer)``, clip, ``scaler.step(optimizer)`` and :meth:`after_step` instead.

        Returns:
            The return value of ``closure`` at the quantized weights.

        Raises:
            ValueError: if ``closure`` is not a function, SQuAT has no optimizer, the optimizer holds no quantized
                weight of the model, or for the reasons of :meth:`gradient`.
        """
        closure = check_closure("squat.step", closure)
        if self.optimizer is None:
            raise ValueError("optimizer is None, must be given to SQuAT for step(); gradient() needs none")
        self._check_optimizer(self.optimizer)
        loss = self.gradient(closure)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        self.after_step()
        return loss

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if the optimizer has no quantized weight; warn once if it lacks some weights or scales."""
        weights = {id(m.weight) for m in self._layers.values()}
        if weights == self._checked:
            return
        in_optimizer = {id(p) for p in _parameters_of(optimizer)}
        absent = (weights | self._scales()) - in_optimizer
        lacking = [name for name, p in self.model.named_parameters() if id(p) in absent and p.requires_grad]
        if not weights & in_optimizer:
            raise ValueError(
                "optimizer holds no quantized weight of the model: make it from the parameters of the model that SQuAT "
                "was given (after fully_shard, if any). If it keeps copies of them, call squat.gradient(closure), your "
                "optimizer's step, and squat.after_step()"
            )
        self._checked = weights
        if lacking:
            warnings.warn(
                f"optimizer lacks {len(lacking)} quantized weights and scales, which are therefore never updated "
                f"({', '.join(lacking[:3])}): make it after quantize_model, or freeze them (requires_grad_(False))",
                stacklevel=3,
            )

    def gradient(self, closure: Closure | None = None, *, accumulate: bool = False) -> Any:
        """Compute the gradients of a step into ``.grad``: None for parameters that are frozen in this step.

        Use this instead of :meth:`step` to do something between the gradient and the optimizer's step, such as
        clipping. :meth:`step` calls this, the optimizer's step and :meth:`after_step`. All calls between two optimizer
        steps have the same objective.

        Args:
            closure: as for :meth:`step`.
            accumulate: whether to add to the gradients in ``.grad``, for loops that accumulate gradients over calls.
                Each call then perturbs along the gradient of its own micro-batch. Under DDP and FSDP2, the model must
                be wrapped before SQuAT is made, and gradients are reduced in every pass, also within ``no_sync``. If
                the closure raises an error, gradients are as before the call.

        Returns:
            The return value of ``closure`` at the quantized weights.

        Raises:
            ValueError: if ``closure`` is not a function, the weight of a quantized layer is computed (pruned, or
                parametrized by weight_norm), or every quantized weight is frozen.
            RuntimeError: if the closure computed no gradient, or changed a weight (stepped the optimizer).
        """
        closure = check_closure("squat.gradient", closure)
        check_parameters(self._layers)
        # The optimizer may have parameters outside the model, such as those of the loss. Both passes give them a
        # gradient too.
        everything = dict.fromkeys((*self.model.parameters(), *_parameters_of(self.optimizer)))
        parameters = [p for p in everything if p.requires_grad]
        is_step_size_step = self.minibatch == "next" and self.steps % (self.scale_every + 1) == self.scale_every
        is_later_call = accumulate and any(p.grad is not None for p in parameters)
        with without_old_grads(self.model, parameters, accumulate):
            if is_step_size_step:
                return self._step_size_gradient(closure, parameters)
            return self._sharpness_gradient(closure, parameters, self._rise if is_later_call else 0.0)

    def after_step(self) -> None:
        """Count an optimizer step. Call this after ``optimizer.step()``; :meth:`step` calls it itself.

        A step that a ``GradScaler`` skipped counts too.
        """
        self.steps += 1
        self._rise = 0.0

    def _scales(self) -> set[int]:
        """Return the ids of the scales and zero points of weights and activations."""
        return set(map(id, scales_of(self.model)))

    def _step_size_gradient(self, closure: Closure, parameters: list[Tensor]) -> Any:
        """Make one pass, and keep the gradients of the scales only."""
        loss = run_closure(closure, self._layers)
        scales = self._scales()
        for parameter in parameters:
            if id(parameter) not in scales:
                parameter.grad = None
        return loss

    def _sharpness_gradient(self, closure: Closure, parameters: list[Tensor], rise: Tensor | float) -> Any:
        """Make both passes; ``rise`` is the sharpness of earlier calls in the same step."""
        random = RandomState(parameters)
        loss, scales = run_closure(closure, self._layers), self._scales()
        weights = {id(module.weight) for module in self._layers.values()}
        first_pass = dict(zip(map(id, parameters), take_grads(parameters), strict=True))
        scale_grads = {key: grad for key, grad in first_pass.items() if key in scales}
        weight_grads = {key: grad for key, grad in first_pass.items() if key in weights and grad is not None}
        del first_pass  # frees the other gradients for the second pass
        # With the same dropout and noise, both passes evaluate the same function.
        with random.replayed(), untouched(self.model), self._perturbed(weight_grads):
            perturbed_loss = run_closure(closure, self._layers)
        if loss is not None and perturbed_loss is not None:
            self._measured["sharpness"] = self._rise = rise + _value(perturbed_loss) - _value(loss)
        updates_scales = self.minibatch == "same" and (self.steps + 1) % self.scale_every == 0
        for parameter in parameters:
            if id(parameter) in scales:
                parameter.grad = scale_grads[id(parameter)] if updates_scales else None
        return loss

    @contextmanager
    def _perturbed(self, grads: dict[int, Tensor]) -> Iterator[None]:
        """Perturb the weights within the context.

        Args:
            grads: gradients by the id of their weight.
        """
        if not any(module.weight.requires_grad for module in self._layers.values()):
            raise ValueError(
                "every quantized weight of the model is frozen (requires_grad is False), at least one must be trained"
            )
        if not grads:
            raise RuntimeError("the closure computed no gradient in any quantized weight: does it call backward()?")
        factor = self._factor(grads)
        eta = self.eta if self.norm == "asam" else None
        if self.target == "latent":
            with self._master_weights_perturbed(grads, factor, eta):
                yield
            return
        pairs = [(m, grads.get(id(m.weight))) for m in quantized_modules(self.model).values()]
        with modified((m, (g.contiguous(), factor.to(g.device), eta)) for m, g in pairs if g is not None):
            yield

    @contextmanager
    def _master_weights_perturbed(self, grads: dict[int, Tensor], factor: Tensor, eta: float | None) -> Iterator[None]:
        """Perturb master weights in place, with the old weights in the memory of the gradients; restore at the end."""
        swapped: list[tuple[Quantized, Tensor]] = []
        try:
            for module in self._layers.values():
                if (g := grads.get(id(module.weight))) is not None:
                    # perturb_swap_ leaves the old weight where the gradient was.
                    old, w = copy_if_shared(local_part(g)).contiguous(), local_part(module.weight.detach())
                    perturbed = w.contiguous()
                    perturb_swap_(perturbed, old, factor.to(old.device), eta)
                    if not w.is_contiguous():
                        w.copy_(perturbed)
                    torch.autograd.graph.increment_version(module.weight)
                    swapped.append((module, old))
            yield
        finally:
            with torch.no_grad():
                for module, old in swapped:
                    local_part(module.weight.detach()).copy_(old)
                    torch.autograd.graph.increment_version(module.weight)

    @torch.no_grad()
    def _factor(self, grads: dict[int, Tensor]) -> Tensor:
        """Return rho over the norm of all gradients together, as a tensor on the device."""
        sums = []
        for module in self._layers.values():
            if (grad := grads.get(id(module.weight))) is not None:
                g = local_part(grad).contiguous()
                w = None
                if self.norm == "asam":
                    w = local_part(module.weight.detach() if self.target == "latent" else module.quantized_weight())
                    w = w.contiguous()
                sums.append((module.weight, perturbation_norms(g, w, self.eta)))
        factor, self._measured["perturbation_norm"] = ascent(total(sums), self.rho)
        return factor.float()

    def log(self) -> dict[str, float]:
        """Return the values to log. Syncs the device. From the first call on, flips take a byte per weight.

        - ``squat/sharpness``: the loss at the perturbed weights minus the loss at the quantized weights, of the last
          sharpness step, for one batch and the same dropout and noise. To first order it is the largest rise within
          ``rho``. Over calls that accumulate gradients it is summed.
        - ``squat/perturbation_norm``: the norm of the last perturbation.
        - ``squat/flips``: the fraction of codes that changed since the last call.
        - ``squat/distance``: the distance of the weights to the grid, in spacings.
        """
        measured = {f"squat/{name}": float(value) for name, value in self._measured.items()}
        return {**measured, "squat/flips": self.stats.flips(), "squat/distance": self.stats.distance()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Syncs the device."""
        return {"steps": self.steps, "seen": {name: float(value) for name, value in self._measured.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if this is not the state of a SQuAT.
        """
        if not {"steps"} <= set(state) <= {"steps", "seen"}:
            raise ValueError(f"state has {sorted(state)}, must have 'steps', and may have 'seen'")
        check_count("steps", state["steps"], 0)
        self.steps, self._measured = state["steps"], dict(state.get("seen", {}))


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _value(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, Tensor) else loss
