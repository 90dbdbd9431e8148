"""Steps of bfloat16 weights: computed in float32, then rounded to nearest or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..dtensor import is_dtensor
from .values import check_seed

#: Key of an optimizer's first group that holds the number of steps so far.
STEPS = "rounded_steps"
Rounding = Literal["nearest", "stochastic"]


class Bfloat16Weights:
    """Trains bfloat16 parameters without float32 copies that stay: only the step itself is in float32.

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)      # a model whose parameters are bfloat16
        Bfloat16Weights(optimizer)
        ...
        optimizer.step()                                                # the loop stays as it is

    A bfloat16 number has 8 significant bits. So a step that is smaller than 1/512 to 1/256 of a weight is lost when it
    is rounded to nearest, in every step again, and the weight never moves. With ``rounding="stochastic"`` the weight
    moves to the next number with a probability such that it moves by the step on average.

    Every step gives the optimizer float32 copies of parameters and gradients, so that it computes in float32 and its
    moments are float32; afterwards parameters are rounded. During the step that takes 8 bytes a parameter more. Loading
    a state dict keeps the moments float32 too.

    Random numbers depend on ``seed`` and the number of the step alone, so that all processes of DDP round alike. The
    number is in the optimizer's state dict, in its first group as ``"rounded_steps"``.

    Args:
        optimizer: any optimizer of torch. Its parameters in other dtypes are left alone.
        rounding: ``"stochastic"`` or ``"nearest"``.
        seed: of the random numbers; the same in every process.

    Raises:
        ValueError: if ``rounding`` is something else, no parameter is bfloat16, or one is sharded (a DTensor): use
            float32 parameters there, and FSDP2's ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, rounding: Rounding = "stochastic", seed: int = 0
    ) -> None:  # fmt: skip
        if rounding not in get_args(Rounding):
            raise ValueError(f"rounding is {rounding!r}, must be one of {get_args(Rounding)}")
        check_seed("seed", seed)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.dtype == torch.bfloat16 for p in parameters):
            dtypes = sorted({str(p.dtype) for p in parameters})
            raise ValueError(f"optimizer has parameters of {', '.join(dtypes)}, must have some of torch.bfloat16")
        if any(is_dtensor(p) for p in parameters):
            raise ValueError(
                "optimizer has sharded parameters, must have whole ones: keep float32 parameters, and give FSDP2 "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
            )
        self.optimizer, self.rounding, self.seed = optimizer, rounding, seed
        optimizer.param_groups[0].setdefault(STEPS, 0)
        # Learning-rate schedulers expect methods, and wrap them too.
        self._step, self._load = optimizer.step, optimizer.load_state_dict
        optimizer.step = MethodType(self._stepping(self._step), optimizer)  # type: ignore[method-assign]
        optimizer.load_state_dict = MethodType(self._loading(self._load), optimizer)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the optimizer as it was; it then steps bfloat16 parameters in bfloat16."""
        self.optimizer.step = self._step  # type: ignore[method-assign]
        self.optimizer.load_state_dict = self._load  # type: ignore[method-assign]
        self.optimizer.param_groups[0].pop(STEPS, None)

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def stepping(optimizer: Any, closure: Any = None) -> None:
            if closure is not None:
                raise ValueError(
                    "closure is given to optimizer.step, must be None: it would run the model while its parameters are "
                    "float32; compute the loss and its gradient before the step"
                )
            with self._widened(self.rounding):
                step()
            optimizer.param_groups[0][STEPS] += 1

        return stepping

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(load)
        def loading(optimizer: Any, state_dict: dict[str, Any]) -> None:
            with self._widened("nearest"):  # exact: nothing steps
                load(state_dict)
            optimizer.param_groups[0].setdefault(STEPS, 0)

        return loading

    @contextmanager
    def _widened(self, rounding: Rounding) -> Iterator[None]:
        """Put float32 copies of bfloat16 parameters into the optimizer within the context, and round them afterwards.

        The parameters themselves keep their dtype, because a change of it would drop the hooks of DDP.
        """
        optimizer, wide = self.optimizer, {}
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.dtype == torch.bfloat16):
            wide[p] = p.detach().float().requires_grad_(p.requires_grad)
            wide[p].grad = None if p.grad is None else p.grad.float()
        self._exchange(wide)
        try:
            yield
        finally:
            self._exchange({copy: p for p, copy in wide.items()})
            generators = {device: self._generator(device) for device in {p.device for p in wide}}
            with torch.no_grad():
                for p, copy in wide.items():
                    nearest = rounding == "nearest"
                    p.copy_(copy if nearest else stochastically_rounded(copy.detach(), generators[p.device]))

    def _exchange(self, other: dict[Tensor, Tensor]) -> None:
        """Replace parameters in the optimizer, whose state stays."""
        for group in self.optimizer.param_groups:
            group["params"] = [other.get(p, p) for p in group["params"]]
        for before, after in other.items():
            if before in self.optimizer.state:
                self.optimizer.state[after] = self.optimizer.state.pop(before)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return the random numbers of this step."""
        step = self.optimizer.param_groups[0][STEPS]
        # Seeds that differ by a large odd number, so that those of two runs do not meet.
        return torch.Generator(device).manual_seed((self.seed * 0x9E3779B97F4A7C15 + step) % 2**63)


def stochastically_rounded(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a float32 tensor in bfloat16, rounded to one of the two neighbours at random, so that the mean is exact.

    Numbers that bfloat16 holds, inf and NaN stay as they are.
    """
    # The low 16 bits of a float32 number are what bfloat16 drops. A carry out of them is the next bfloat16 number away
    # from zero, and a uniform 16-bit number makes that carry with the right probability.
    bits = x.view(torch.int32)
    carried = bits + torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    rounded = carried.bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
