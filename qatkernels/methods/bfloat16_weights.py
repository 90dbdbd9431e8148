"""Steps of bfloat16 weights: computed in float32, then rounded to nearest or at random."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..dtensor import is_dtensor

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

    Every step converts parameters and gradients to float32, so that the optimizer computes in float32 and its moments
    are float32; afterwards parameters are rounded. During the step that takes 8 bytes a parameter more. Loading a state
    dict keeps the moments float32 too.

    Args:
        optimizer: any optimizer of torch. Its parameters in other dtypes are left alone.
        rounding: ``"stochastic"``, which draws from torch's generator of each parameter's device, or ``"nearest"``.

    Raises:
        ValueError: if ``rounding`` is something else, no parameter is bfloat16, or one is sharded (a DTensor): use
            float32 parameters there, and FSDP2's ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, rounding: Rounding = "stochastic") -> None:
        if rounding not in get_args(Rounding):
            raise ValueError(f"rounding is {rounding!r}, must be one of {get_args(Rounding)}")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.dtype == torch.bfloat16 for p in parameters):
            dtypes = sorted({str(p.dtype) for p in parameters})
            raise ValueError(f"optimizer has parameters of {', '.join(dtypes)}, must have some of torch.bfloat16")
        if any(is_dtensor(p) for p in parameters):
            raise ValueError(
                "optimizer has sharded parameters, must have whole ones: keep float32 parameters, and give FSDP2 "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
            )
        self.optimizer, self.rounding = optimizer, rounding
        #: Parameters that are float32 now, each with its bfloat16 gradient.
        self._wide: list[tuple[Tensor, Tensor | None]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._widen()),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was; it then steps bfloat16 parameters in bfloat16."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # torch gives the hook the optimizer among args when it calls step as a plain function.
        given = [value for value in (*args, kwargs.get("closure")) if value is not None and value is not optimizer]
        if given:
            raise ValueError(
                "closure is given to optimizer.step, must be None: it would run the model while its parameters are "
                "float32; compute the loss and its gradient before the step"
            )
        self._widen()

    @torch.no_grad()
    def _widen(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.dtype == torch.bfloat16:
                    grad = p.grad
                    p.grad = None
                    p.data = p.data.float()
                    p.grad = None if grad is None else grad.float()
                    self._wide.append((p, grad))

    @torch.no_grad()
    def _narrow(self, rounding: Rounding) -> None:
        for p, grad in self._wide:
            p.grad = None
            p.data = stochastically_rounded(p.data) if rounding == "stochastic" else p.data.bfloat16()
            p.grad = grad
        self._wide.clear()

    def _after_step(self, *_: Any) -> None:
        self._narrow(self.rounding)

    def _after_loading(self, *_: Any) -> None:
        self._narrow("nearest")  # exact: nothing has stepped


def stochastically_rounded(x: Tensor) -> Tensor:
    """Return a float32 tensor in bfloat16, rounded to one of the two neighbours at random, so that the mean is exact.

    Numbers that bfloat16 holds, inf and NaN stay as they are.
    """
    # The low 16 bits of a float32 number are what bfloat16 drops. A carry out of them is the next bfloat16 number away
    # from zero, and a uniform 16-bit number makes that carry with the right probability.
    bits = x.view(torch.int32)
    carried = (bits + torch.empty_like(bits).random_(0, 1 << 16)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), carried, x).bfloat16()
