"""SQuAT: sharpness- and quantization-aware training, alternating two objectives.

Confirmed by the public text: BERT on GLUE at 2, 3 and 4 bits; a sharpness objective and a step-size objective that
alternate. The rest is inferred from the method's building blocks, SAM (Foret et al., 2021) and LSQ (Esser et al.,
2020), and every choice is a parameter:

    sharpness objective, scales frozen:   g = dL/dW at Q(W),   e = rho * g / norm(g) over all quantized weights
                                          W <- Opt(W, dL/dW at Q(W) + e)
    step-size objective, weights frozen:  s <- Opt(s, dL/ds at e = 0)

Gradients reach W straight through, so weights beyond the clamp of the grid have none and are not perturbed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dtensor import is_dtensor, local_part
from ..nn import quantized_modules
from ..nn.activation import scales_of
from ..nn.quantized import Quantized
from ..nn.quantizer import ETA, RHO, ascent, modified
from ..nn.replay import RandomState, untouched
from ..ops import perturb_swap_, perturbation_norms
from ..options import AT_LEAST_0, AT_LEAST_1, check, option
from .grads import apart, own, run, take
from .shards import check_parameters, layers_by_weight, total
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
        "quantized", "what is perturbed: quantized (after rounding) or latent (before)"
    )
    norm: Literal["l2", "asam"] = option("l2", "norm of the perturbation: l2 or asam")
    eta: float = option(ETA, "added to every weight's size under asam", AT_LEAST_0)
    scale_every: int = option(1, "sharpness steps between steps of the scales", AT_LEAST_1)
    minibatch: Literal["same", "next"] = option("same", "batch of the step of the scales: same or next")

    def __post_init__(self) -> None:
        check(self)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> SQuAT:
        """Return SQuAT for a quantized model."""
        return SQuAT(model, optimizer, **{entry.name: getattr(self, entry.name) for entry in fields(self)})


class SQuAT:
    """Two passes a step: one at the quantized weights, one at perturbed ones.

        squat = SQuAT(model, optimizer, rho=0.05)
        ...
        loss = squat.step(closure)      # closure: zero_grad, forward, backward, return the loss

    The second pass replays torch's random numbers, of the CPU and of the devices that hold parameters: both passes are
    of the same dropout and noise. It leaves no trace but gradients: running statistics and other buffers are after a
    step those of the pass at the quantized weights.

    Memory: one more set of gradients of the quantized weights, the first pass's, while the second runs; with
    ``accumulate`` also the one that is added to. No copy of the weights: a quantized weight is perturbed where each
    forward makes it, a master weight changes places with its old gradient and comes back bit for bit.

    Args:
        model: a quantized model; may be wrapped (DDP, FSDP2, torch.compile).
        optimizer: the optimizer of weights and scales, whatever its parameter groups. A frozen parameter is one without
            a gradient, which torch's optimizers skip, weight decay and all.
        rho: radius of the perturbation.
        target: what is perturbed: ``"quantized"``, Q(W) + e after rounding, or ``"latent"``, Q(W + e).
        norm: ``"l2"``, e = rho * g / norm(g); or ``"asam"`` (Kwon et al., 2021), e = rho * T^2 g / norm(T g) with
            T = abs(w) + eta at what is perturbed; rho is then around 0.5.
        eta: ASAM's.
        scale_every: the scales move once in this many sharpness steps.
        minibatch: ``"same"``: the step-size objective takes its gradient from the first pass of a sharpness step, which
            costs nothing; ``"next"``: every ``scale_every`` sharpness steps a step of its own follows, with one pass,
            in which nothing but the scales moves.

    Attributes:
        steps: optimizer steps so far, of either kind: calls of :meth:`after_step`.
        due: whether the next :meth:`after_step` moves weights: never, it only counts.

    Raises:
        ValueError: if a value is out of range, the model has no quantized layer, or one with a weight that is computed
            (pruned, or parametrized by weight_norm).
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
        for name, given, allowed in (
            ("target", target, ("quantized", "latent")),
            ("norm", norm, ("l2", "asam")),
            ("minibatch", minibatch, ("same", "next")),
        ):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}, must be one of {allowed}")
        check_size("rho", rho)
        check_size("eta", eta)
        check_count("scale_every", scale_every, 1)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer is LBFGS, must be one that steps once along the gradients that are there")
        self.model, self.optimizer = model, optimizer
        self.rho, self.target, self.norm, self.eta = rho, target, norm, eta
        self.scale_every, self.minibatch = scale_every, minibatch
        self.steps = 0
        self.stats = GridStats(model)
        self._layers = layers_by_weight(model)
        self._seen: dict[str, Tensor | float] = {}
        self._rise: Tensor | float = 0.0  # of the step's calls so far
        self._checked: set[int] = set()  # ids of the weights that the optimizer was last looked through for

    def step(self, closure: Closure | None = None, *, scaler: Any = None) -> Any:
        """Compute the gradients, step the optimizer and count the step.

        Args:
            closure: as for ``torch.optim.Optimizer.step``: computes a loss, calls ``backward`` and returns the loss; of
                the same batch when it is called twice. For gradient accumulation it goes through all micro-batches.
                With autocast, the forward is under it; with a ``GradScaler``, it calls
                ``scaler.scale(loss).backward()``.
            scaler: the ``GradScaler``; ``scaler.update()`` is yours to call. ``scaler.unscale_`` can be called once a
                step, so not in the closure: to clip, call :meth:`gradient`, ``scaler.unscale_(optimizer)``, clip,
                ``scaler.step(optimizer)`` and :meth:`after_step`.

        Returns:
            What ``closure`` returned at the quantized weights.

        Raises:
            ValueError: if ``closure`` is no function, SQuAT was made without an optimizer, the optimizer holds no
                quantized weight of the model, or as :meth:`gradient`.
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
        """Raise ValueError if the optimizer steps no quantized weight; warn, once, if it lacks some, or scales."""
        weights = {id(m.weight) for m in self._layers.values()}
        if weights == self._checked:
            return
        stepped = {id(p) for p in _parameters_of(optimizer)}
        wanted = (weights | self._scales()) - stepped
        lacking = [name for name, p in self.model.named_parameters() if id(p) in wanted and p.requires_grad]
        if not weights & stepped:
            raise ValueError(
                "optimizer holds no quantized weight of the model: make it from the parameters of the model that SQuAT "
                "has (after fully_shard, if any). If it keeps copies of them, call squat.gradient(closure), your "
                "optimizer's step, and squat.after_step()"
            )
        self._checked = weights
        if lacking:
            warnings.warn(
                f"optimizer lacks {len(lacking)} quantized weights and scales, which therefore never move "
                f"({', '.join(lacking[:3])}): make it after quantize_model, or freeze them (requires_grad_(False))",
                stacklevel=3,
            )

    def gradient(self, closure: Closure | None = None, *, accumulate: bool = False) -> Any:
        """Leave in ``.grad`` the gradients to step with, None where a parameter is frozen in this step.

        For what comes between gradient and step, such as clipping; :meth:`step` is this, the optimizer's step and
        :meth:`after_step`. All calls between two optimizer steps serve the same objective.

        Args:
            closure: as for :meth:`step`.
            accumulate: whether gradients that are there already are added to, for loops that accumulate them over
                calls; each call then perturbs along the gradient of its own micro-batch. Under DDP and FSDP2, which
                the model must be wrapped in when SQuAT is made, gradients are reduced in every pass, also within
                ``no_sync``. After an error in the closure they are as before the call.

        Returns:
            What ``closure`` returned at the quantized weights.

        Raises:
            ValueError: if ``closure`` is no function, the weight of a quantized layer is computed (pruned, or
                parametrized by weight_norm), or every quantized weight is frozen.
            RuntimeError: if the closure left no gradient, or stepped the optimizer.
        """
        closure = check_closure("squat.gradient", closure)
        check_parameters(self._layers)
        # Those of the optimizer that are outside the model (of the loss, say) have a gradient from both passes, too.
        known = dict.fromkeys((*self.model.parameters(), *_parameters_of(self.optimizer)))
        parameters = [p for p in known if p.requires_grad]
        alone = self.minibatch == "next" and self.steps % (self.scale_every + 1) == self.scale_every
        added = accumulate and any(p.grad is not None for p in parameters)
        with apart(self.model, parameters, accumulate):
            if alone:
                return self._step_size(closure, parameters)
            return self._sharpness(closure, parameters, self._rise if added else 0.0)

    def after_step(self) -> None:
        """Count an optimizer step. Call after ``optimizer.step()``, unless :meth:`step` took it.

        A step that a ``GradScaler`` skipped counts too.
        """
        self.steps += 1
        self._rise = 0.0

    def _scales(self) -> set[int]:
        """Return the ids of the scales and zero points of weights and activations."""
        return set(map(id, scales_of(self.model)))

    def _step_size(self, closure: Closure, parameters: list[Tensor]) -> Any:
        loss = run(closure, self._layers)
        scales = self._scales()
        for parameter in parameters:
            if id(parameter) not in scales:
                parameter.grad = None
        return loss

    def _sharpness(self, closure: Closure, parameters: list[Tensor], before: Tensor | float) -> Any:
        random = RandomState(parameters)
        loss, scales = run(closure, self._layers), self._scales()
        weights = {id(module.weight) for module in self._layers.values()}
        first = dict(zip(map(id, parameters), take(parameters), strict=True))
        of_scales = {key: grad for key, grad in first.items() if key in scales}
        along = {key: grad for key, grad in first.items() if key in weights and grad is not None}
        del first  # the others' memory is the second pass's
        # The same dropout and noise: the gradient at the point that was perturbed.
        with random.replayed(), untouched(self.model), self._perturbed(along):
            second = run(closure, self._layers)
        if loss is not None and second is not None:
            self._seen["sharpness"] = self._rise = before + _value(second) - _value(loss)
        moves = self.minibatch == "same" and (self.steps + 1) % self.scale_every == 0
        for parameter in parameters:
            if id(parameter) in scales:
                parameter.grad = of_scales[id(parameter)] if moves else None
        return loss

    @contextmanager
    def _perturbed(self, grads: dict[int, Tensor]) -> Iterator[None]:
        """Perturb along gradients, by the id of their weights; restore at the end."""
        if not any(module.weight.requires_grad for module in self._layers.values()):
            raise ValueError(
                "every quantized weight of the model is frozen (requires_grad is False), one must be trained"
            )
        if not grads:
            raise RuntimeError("the closure left no gradient in any quantized weight: does it call backward()?")
        factor = self._factor(grads)
        eta = self.eta if self.norm == "asam" else None
        if self.target == "latent":
            with self._moved(grads, factor, eta):
                yield
            return
        if any(is_dtensor(g) for g in grads.values()):
            raise ValueError("target is 'quantized' with a sharded weight, must be 'latent' under FSDP2")
        found = [(m, grads.get(id(m.weight))) for m in quantized_modules(self.model).values()]
        with modified((m, (g.contiguous(), factor.to(g.device), eta)) for m, g in found if g is not None):
            yield

    @contextmanager
    def _moved(self, grads: dict[int, Tensor], factor: Tensor, eta: float | None) -> Iterator[None]:
        swapped: list[tuple[Quantized, Tensor]] = []
        try:
            for module in self._layers.values():
                if (g := grads.get(id(module.weight))) is not None:
                    old, w = own(local_part(g)).contiguous(), local_part(module.weight.detach())
                    moved = w.contiguous()
                    perturb_swap_(moved, old, factor.to(old.device), eta)
                    if not w.is_contiguous():
                        w.copy_(moved)
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
        """Return rho over the global norm; it stays on the device."""
        sums = []
        for module in self._layers.values():
            if (grad := grads.get(id(module.weight))) is not None:
                g = local_part(grad).contiguous()
                at = None
                if self.norm == "asam":
                    at = local_part(module.weight.detach() if self.target == "latent" else module.quantized_weight())
                    at = at.contiguous()
                sums.append((module.weight, perturbation_norms(g, at, self.eta)))
        factor, self._seen["perturbation_norm"] = ascent(total(sums), self.rho)
        return factor.float()

    def log(self) -> dict[str, float]:
        """Return what to log; waits for the device. Flips need a byte for each weight from the first call on.

        ``sharpness`` is the last sharpness step's loss at the perturbed weights less the one at the quantized weights,
        of one batch, with the same dropout and noise, and to first order the largest within ``rho``; over calls that
        accumulate gradients it is added up like these; ``perturbation_norm`` is the norm of the last perturbation;
        ``flips`` the fraction of codes that changed since the last call; ``distance`` to the grid is in spacings.
        """
        seen = {f"squat/{name}": float(value) for name, value in self._seen.items()}
        return {**seen, "squat/flips": self.stats.flips(), "squat/distance": self.stats.distance()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; waits for the device."""
        return {"steps": self.steps, "seen": {name: float(value) for name, value in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Raises:
            ValueError: if the state is not SQuAT's.
        """
        if not {"steps"} <= set(state) <= {"steps", "seen"}:
            raise ValueError(f"state has {sorted(state)}, must have 'steps', and may have 'seen'")
        check_count("steps", state["steps"], 0)
        self.steps, self._seen = state["steps"], dict(state.get("seen", {}))


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _value(loss: Any) -> Any:
    return loss.detach() if isinstance(loss, Tensor) else loss
